"""Our VQGAN's encoding and decoding against diffusers' VQModel, and the memory of one large image in tiles.

ImageNet's VQGAN (f16, 128 channels) with random weights: images -> codes -> images, in images so large that
convolutions are nearly all of the work. Both have the same channels, multipliers, residual blocks and attention. Theirs
is timed with its defaults and in channels_last. If the processor computes bfloat16, both are timed in it too (ours by
autocast, as with Accelerate's mixed precision; theirs converted as a whole).

Before anything is timed, our decoder must agree with theirs for equal weights, and our fast mode (channels_last, in
place where possible) with the plain one: latents and images to 1e-4. Codes may differ if two are equally near; their
share is recorded, and the share of codes that bfloat16 changes. Encoders are not compared: ours halves the size with
4x4 kernels, theirs with 3x3. Memory: the peak above weights and image, in a separate process.
"""

from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import compare, seconds
from benchmarks.memory import peak_of
from benchmarks.record import Results
from stage1_tokenizer.bottlenecks.vq import VqConfig
from stage1_tokenizer.engine import processor
from stage1_tokenizer.networks.tiles import decode_codes, encode_codes, tiles_for
from stage1_tokenizer.networks.vqgan import AttentionBlock, ResidualBlock, Upsample, VqganNetworkConfig
from stage1_tokenizer.tokenizer import Tokenizer, TokenizerConfig

PEER = "diffusers VQModel"
OURS = "ours"


class Size(NamedTuple):
    """Sizes of the networks and images."""

    channels: int
    multipliers: tuple[int, ...]
    latent_channels: int
    codes: int
    side: int
    batch: int
    repeats: int
    large: int
    """Height and width of the large image, in pixels."""
    tile: int


FULL = Size(128, (1, 1, 2, 2, 4), 256, 1024, side=128, batch=4, repeats=5, large=2048, tile=256)
SMALL = Size(32, (1, 2), 8, 16, side=16, batch=2, repeats=1, large=64, tile=32)
SAME = 1e-4
"""Largest difference, relative to the largest value, that counts as equal."""


def our_tokenizer(size: Size, device: torch.device) -> Tokenizer:
    """Build our tokenizer with random weights; its codebook vectors have the distribution of its latents."""
    torch.manual_seed(0)
    network = VqganNetworkConfig(
        channels=size.channels,
        multipliers=size.multipliers,
        blocks=2,
        attention=(len(size.multipliers) - 1,),
        latent_channels=size.latent_channels,
    )
    bottleneck = VqConfig(codebook_size=size.codes, kmeans_init=False)
    tokenizer = Tokenizer(
        TokenizerConfig(image_size=(size.tile, size.tile), image_channels=3, network=network, bottleneck=bottleneck)
    )
    tokenizer.requires_grad_(False).eval()
    z = tokenizer.encoder(images(1, size.side, torch.device("cpu")))  # (1, D, h, w)
    spread = torch.randn(size.codes, size.latent_channels) * z.std(dim=(0, 2, 3)) + z.mean(dim=(0, 2, 3))
    tokenizer.bottleneck.codebook.weight.copy_(spread)  # type: ignore[union-attr, operator]
    return tokenizer.to(device)


def fast(model: nn.Module) -> nn.Module:
    """Convert a model to channels_last, as LoadedTokenizer does."""
    return model.to(memory_format=torch.channels_last)


def peer(size: Size, device: torch.device) -> Any:
    """Build diffusers' VQModel of that size, with the codebook and the decoder's weights of our tokenizer."""
    diffusers: Any = import_module("diffusers")  # an optional peer
    levels = len(size.multipliers)
    model: Any = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (levels - 1),
        block_out_channels=tuple(size.channels * multiplier for multiplier in size.multipliers),
        layers_per_block=2,
        latent_channels=size.latent_channels,
        num_vq_embeddings=size.codes,
        vq_embed_dim=size.latent_channels,
    )
    model.requires_grad_(False).eval()
    ours = our_tokenizer(size, torch.device("cpu"))
    model.quantize.embedding.weight.copy_(ours.bottleneck.codebooks()[0])
    nn.init.dirac_(model.post_quant_conv.weight)  # ours does not have this 1x1 convolution
    model.post_quant_conv.bias.zero_()
    for block, theirs in zip(ours.decoder, in_order(model.decoder), strict=True):
        if theirs is not None:
            theirs.load_state_dict(as_theirs(block))
    return model.to(device)


def in_order(decoder: Any) -> Iterator[Any]:
    """Yield the blocks of diffusers' decoder in the order of ours; None for a block without weights."""
    mid = decoder.mid_block
    yield from (decoder.conv_in, mid.resnets[0], mid.attentions[0], mid.resnets[1])
    for block in decoder.up_blocks:
        for number, resnet in enumerate(block.resnets):
            yield resnet
            yield from [block.attentions[number]] if hasattr(block, "attentions") else []
        yield from block.upsamplers or []
    yield from (decoder.conv_norm_out, None, decoder.conv_out)


def as_theirs(block: nn.Module) -> dict[str, Tensor]:
    """Return a block's weights under diffusers' names."""
    weights = dict(block.state_dict())
    if isinstance(block, ResidualBlock):
        return {name.replace("shortcut", "conv_shortcut"): tensor for name, tensor in weights.items()}
    if isinstance(block, AttentionBlock):
        renamed = {f"group_norm.{kind}": weights[f"norm.{kind}"] for kind in ("weight", "bias")}
        for kind in ("weight", "bias"):
            parts = weights[f"qkv.{kind}"].chunk(3)
            renamed |= {f"to_{name}.{kind}": part for name, part in zip("qkv", parts, strict=True)}
            renamed[f"to_out.0.{kind}"] = weights[f"out.{kind}"]
        return {name: tensor.flatten(1) if tensor.ndim == 4 else tensor for name, tensor in renamed.items()}
    assert isinstance(block, nn.Conv2d | nn.GroupNorm | Upsample)
    return weights


def images(n: int, side: int, device: torch.device) -> Tensor:
    """Draw noise images (n, 3, side, side) in [-1, 1]."""
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1)).to(device) * 2 - 1


def relative_difference(got: Tensor, wanted: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return float((got - wanted).abs().max() / wanted.abs().max())


def calls(ours: Tokenizer, half: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return our encode and decode. half: in bfloat16."""

    def within(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(given: Tensor) -> Tensor:
            with torch.autocast(given.device.type, torch.bfloat16, enabled=half):
                return function(given)

        return run

    return {"encode": within(ours.encode_codes), "decode": within(ours.decode_codes)}


def their_calls(theirs: Any, dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return diffusers' encode and decode, with codes (B, h, w, 1). Distances are computed in float32, as in ours."""
    for part in (theirs.encoder, theirs.quant_conv, theirs.post_quant_conv, theirs.decoder):
        part.to(dtype)

    def encode(x: Tensor) -> Tensor:
        z = theirs.encode(x.to(dtype)).latents.float()
        codes: Tensor = theirs.quantize(z)[2][2]
        return codes.view(z.shape[0], *z.shape[2:], 1)

    def decode(codes: Tensor) -> Tensor:
        shape = (*codes.shape[:3], theirs.config.latent_channels)
        z_q = theirs.quantize.get_codebook_entry(codes.flatten(), shape).to(dtype)
        image: Tensor = theirs.decode(z_q, force_not_quantize=True).sample
        return image

    return {"encode": encode, "decode": decode}


def check_agreement(size: Size, device: torch.device, x: Tensor) -> dict[str, Any]:
    """Compare our fast mode with the plain one, and our decoder with diffusers'. Returns the differences."""
    plain, quick = our_tokenizer(size, device), our_tokenizer(size, device)
    fast(quick)
    with torch.enable_grad():  # with gradients nothing is computed in place
        z, codes = plain.encoder(x), plain.encode_codes(x)
        image = plain.decode_codes(codes)
    found: dict[str, Any] = {
        "latents_apart": relative_difference(quick.encoder(x), z),
        "images_apart": relative_difference(quick.decode_codes(codes), image),
        "codes_that_differ": float((quick.encode_codes(x) != codes).float().mean()),
    }
    if find_spec("diffusers"):
        theirs = their_calls(peer(size, device), torch.float32)["decode"](codes)
        found["diffusers_images_apart"] = relative_difference(quick.decode_codes(codes), theirs)
    found["equal"] = all(value < SAME for name, value in found.items() if name.endswith("_apart"))
    assert found["equal"], found
    return found


@torch.inference_mode()
def measure(device: torch.device, small: bool) -> Results:
    """Check that the ways agree, time them, and return the results."""
    size = SMALL if small else FULL
    x = images(size.batch, size.side, device)
    results: Results = {"size": size._asdict(), **check_agreement(size, device, x)}
    print("differences, relative:", {name: value for name, value in results.items() if name != "size"}, flush=True)
    quick = our_tokenizer(size, device)
    fast(quick)
    codes = quick.encode_codes(x)
    native = processor.takes_fast_path("bfloat16", device)
    ways = {f"{OURS}, float32": calls(quick, half=False)}
    if native:
        ways[f"{OURS}, bfloat16"] = calls(quick, half=True)
        changed = ways[f"{OURS}, bfloat16"]["encode"](x) != codes
        results["codes_that_bfloat16_changes"] = float(changed.float().mean())
    else:
        print("bfloat16 is not timed: this processor emulates it")
    if find_spec("diffusers"):
        ways[f"{PEER}, float32"] = their_calls(peer(size, device), torch.float32)
        last = fast(peer(size, device))
        ways[f"{PEER}, float32, channels_last"] = their_calls(last, torch.float32)
        if native:
            half = fast(peer(size, device))
            ways[f"{PEER}, bfloat16, channels_last"] = their_calls(half, torch.bfloat16)
    else:
        print("diffusers is not timed: it is not installed (the extra `bench` has it)")
    rows = []
    for what, given in (("encode", x), ("decode", codes)):
        timed = compare({name: partial(way[what], given) for name, way in ways.items()}, size.repeats)
        rows += [{"what": what, "way": name, **took.row()} for name, took in timed.items()]
    results["rows"] = rows
    results["operations"] = operations(quick, x, codes)
    peaks: list[float | None] = []
    took_s = seconds(lambda: peaks.append(peak_of(device, prepare, size, device)))
    results["large"] = {"seconds_with_start": took_s, "peak_mib": peaks[0]}
    return results


def operations(model: Tokenizer, x: Tensor, codes: Tensor) -> dict[str, int]:
    """Count the multiplications and additions of our encoding and decoding, as torch counts them."""
    counted = {}
    for what, call in {"encode": partial(model.encode_codes, x), "decode": partial(model.decode_codes, codes)}.items():
        with FlopCounterMode(display=False) as counter:
            call()
        counted[what] = counter.get_total_flops()
    return counted


def prepare(size: Size, device: torch.device) -> Callable[[], object]:
    """Prepare the encoding and decoding of one image of size.large pixels a side in tiles, for `peak_of`."""
    model = our_tokenizer(size, device)
    fast(model)
    x = images(1, size.large, device)
    tiles = tiles_for(model.config, overlap=size.tile // 8)

    def call() -> Tensor:
        with torch.inference_mode():
            return decode_codes(model, encode_codes(model, x, tiles), tiles)

    return call


def table(results: Results) -> str:
    """Return the results as Markdown."""
    size = results["size"]
    medians = {(row["what"], row["way"]): row["median_s"] for row in results["rows"]}
    spreads = {(row["what"], row["way"]): row["spread"] for row in results["rows"]}
    lines = ["| images/s | encode | decode | against diffusers as it comes |", "|---|---|---|---|"]
    for way in dict.fromkeys(row["way"] for row in results["rows"]):
        cells, times = [], []
        for what in ("encode", "decode"):
            cells.append(f"{size['batch'] / medians[what, way]:.2f} ± {spreads[what, way]:.0%}")
            base = medians.get((what, f"{PEER}, float32"))
            times.append(f"{base / medians[what, way]:.2f}x" if base else "-")
        lines.append(f"| {way} | {cells[0]} | {cells[1]} | {', '.join(times)} |")
    rate = results["floors"]["float32_gflops"] * 1e9
    over = [medians[what, f"{OURS}, float32"] * rate / results["operations"][what] for what in ("encode", "decode")]
    large = results["large"]
    peak = "unknown" if large["peak_mib"] is None else f"{large['peak_mib']:,.0f} MiB"
    lines += [
        "",
        f"{size['side']}x{size['side']} pixels, batch {size['batch']}, factor {2 ** (len(size['multipliers']) - 1)}, "
        f"{size['channels']} channels. Ours in float32 takes {over[0]:.2f} and {over[1]:.2f} times as long as its "
        f"operations would at the rate of a large matrix product. One image of {size['large']}x{size['large']} in "
        f"tiles of {size['tile']}, encoded and decoded: {large['seconds_with_start']:.0f} s with the start of its "
        f"process, at most {peak} above weights and image.",
    ]
    return "\n".join(lines)

"""Conversion of the weights of another project's VQGAN to the names and shapes of our tokenizer."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from stage1_tokenizer.engine.console import print_note
from stage1_tokenizer.engine.errors import BadFileError, shorten
from stage1_tokenizer.import_weights.layer_names import AttentionNames, LayerNames, Side
from stage1_tokenizer.networks.vqgan import VqganNetworkConfig
from stage1_tokenizer.tokenizer import Tokenizer, TokenizerConfig

PARTS = ("weight", "bias")
LISTED = 5
"""Number of differences that a message names."""


class Pair(NamedTuple):
    """A layer of ours, and the layers of the file that it is made of, whose tensors are concatenated."""

    ours: str
    theirs: tuple[str, ...]
    parts: tuple[str, ...] = PARTS


def network_pairs(network: VqganNetworkConfig, names: LayerNames, attention: AttentionNames) -> Iterator[Pair]:
    """Yield the layers of encoder and decoder, in the order of our network."""
    yield from _encoder_pairs(network, names, attention)
    yield from _decoder_pairs(network, names, attention)


def _encoder_pairs(network: VqganNetworkConfig, names: LayerNames, attention: AttentionNames) -> Iterator[Pair]:
    place = iter(range(10**6))
    yield Pair(f"encoder.{next(place)}", ("encoder.conv_in",))
    for level in range(len(network.multipliers)):
        if level > 0:
            yield Pair(f"encoder.{next(place)}", (names.resample("encoder", level - 1),))
        for index in range(network.blocks):
            is_wider = index == 0 and level > 0 and network.multipliers[level] != network.multipliers[level - 1]
            yield from _block(f"encoder.{next(place)}", names.block("encoder", level, index), names, is_wider)
            if level in network.attention:
                yield from _attention(f"encoder.{next(place)}", names.attention("encoder", level, index), attention)
    yield from _middle("encoder", place, network, names, attention)
    yield from _end("encoder", place, names)


def _decoder_pairs(network: VqganNetworkConfig, names: LayerNames, attention: AttentionNames) -> Iterator[Pair]:
    place, last = iter(range(10**6)), len(network.multipliers) - 1
    yield Pair(f"decoder.{next(place)}", ("decoder.conv_in",))
    yield from _middle("decoder", place, network, names, attention)
    for level in range(last, -1, -1):
        for index in range(network.blocks + 1):
            is_wider = index == 0 and level < last and network.multipliers[level] != network.multipliers[level + 1]
            yield from _block(f"decoder.{next(place)}", names.block("decoder", level, index), names, is_wider)
            if level in network.attention:
                yield from _attention(f"decoder.{next(place)}", names.attention("decoder", level, index), attention)
        if level > 0:
            yield Pair(f"decoder.{next(place)}.conv", (names.resample("decoder", level),))
    yield from _end("decoder", place, names)


def _middle(
    side: Side, place: Iterator[int], network: VqganNetworkConfig, names: LayerNames, attention: AttentionNames
) -> Iterator[Pair]:
    first, between, second = names.middle(side)
    yield from _block(f"{side}.{next(place)}", first, names, is_wider=False)
    if network.middle_attention:
        yield from _attention(f"{side}.{next(place)}", between, attention)
    yield from _block(f"{side}.{next(place)}", second, names, is_wider=False)


def _end(side: Side, place: Iterator[int], names: LayerNames) -> Iterator[Pair]:
    yield Pair(f"{side}.{next(place)}", (f"{side}.{names.norm_out}",))
    next(place)  # SiLU
    yield Pair(f"{side}.{next(place)}", (f"{side}.conv_out",))


def _block(ours: str, theirs: str, names: LayerNames, is_wider: bool) -> Iterator[Pair]:
    yield from (Pair(f"{ours}.{part}", (f"{theirs}.{part}",)) for part in ("norm1", "conv1", "norm2", "conv2"))
    if is_wider:
        yield Pair(f"{ours}.shortcut", (f"{theirs}.{names.shortcut}",))


def _attention(ours: str, theirs: str, names: AttentionNames) -> Iterator[Pair]:
    yield Pair(f"{ours}.norm", (f"{theirs}.{names.norm}",))
    yield Pair(f"{ours}.qkv", tuple(f"{theirs}.{part}" for part in (names.q, names.k, names.v)))
    yield Pair(f"{ours}.out", (f"{theirs}.{names.out}",))


def convert(config: TokenizerConfig, pairs: list[Pair], state: Mapping[str, Tensor], source: str) -> Tokenizer:
    """Build our tokenizer with the weights of another project's.

    state: all weights that must be used; their names are those of the pairs with ".weight" and ".bias".

    Raises:
        BadFileError: names the layers that are missing, that are left over, or that have another shape.
    """
    with torch.device("meta"):  # no memory before the weights are known to fit
        wanted = {name: tuple(tensor.shape) for name, tensor in Tokenizer(config).state_dict().items()}
    used, problems, weights, formats = set[str](), list[str](), dict[str, Tensor](), set[str]()
    for pair in pairs:
        for part in pair.parts:
            keys = [f"{layer}.{part}" for layer in pair.theirs]
            used.update(keys)
            problems += [f"missing {key}" for key in keys if key not in state]
            found = [state[key] for key in keys if key in state]
            if len(found) < len(keys):
                continue
            shape = wanted[f"{pair.ours}.{part}"]
            found = [_as_convolution(tensor, len(shape)) for tensor in found]
            expected = (shape[0] // len(keys), *shape[1:])
            problems += [
                f"{key} is {tuple(state[key].shape)}, should be {expected}"
                for key, tensor in zip(keys, found, strict=True)
                if tuple(tensor.shape) != expected
            ]
            problems += [
                f"{key} has numbers of the format {_name(tensor.dtype)}"
                for key, tensor in zip(keys, found, strict=True)
                if not tensor.is_floating_point()
            ]
            formats.update(_name(tensor.dtype) for tensor in found)
            if not problems:
                weights[f"{pair.ours}.{part}"] = torch.cat([tensor.float() for tensor in found])
    problems += [f"unexpected {key}" for key in state if key not in used]
    problems.sort(key=lambda text: not text.startswith("missing"))
    if problems:
        rest = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise BadFileError(f"{source}: does not fit: {', '.join(map(shorten, problems[:LISTED]))}{rest}")
    if formats != {"float32"}:
        print_note(f"{source}: weights in {', '.join(sorted(formats - {'float32'}))} were converted to float32")
    tokenizer = Tokenizer(config)
    counters = {name: value for name, value in tokenizer.state_dict().items() if name not in weights}
    tokenizer.load_state_dict({**counters, **weights})
    return tokenizer.eval()


def _as_convolution(tensor: Tensor, dimensions: int) -> Tensor:
    """Return a matrix (c_out, c_in) as the kernel (c_out, c_in, 1, 1) of an equal convolution, where one is needed."""
    return tensor[:, :, None, None] if tensor.ndim == 2 and dimensions == 4 else tensor


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

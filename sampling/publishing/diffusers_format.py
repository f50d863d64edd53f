"""A tokenizer as a folder that diffusers loads: `VQModel` for bottleneck vq, `AutoencoderKL` for bottleneck kl.

    config.json                          the class and its arguments
    diffusion_pytorch_model.safetensors  the weights under the names of diffusers

    model = diffusers.VQModel.from_pretrained(FOLDER)
    z = model.encode(x).latents; x_hat = model.decode(z).sample        # x (B, C, H, W) in [-1, 1], as ours

The network must be `vqgan`. Each of its layers has a counterpart in diffusers (`encoder_names`, `decoder_names`):

    ours                                   diffusers
    convolution of stride 2, 3x3           Downsample2D, which pads below and on the right
      4x4                                  the same, if the kernel's first row and column are 0; else refused
    GroupNorm, any number of groups        one number of groups for all norms; else refused
    qkv, one 1x1 convolution               to_q, to_k, to_v, three linear layers
    no convolution beside the codebook     quant_conv and post_quant_conv with the identity

With `vq`, `cosine` needs no counterpart: the nearest of several codebook vectors of length one is also the one with the
greatest cosine, whatever the length of the vector. Written for diffusers 0.42.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.kl import KlBottleneck
from stage1_tokenizer.bottlenecks.vq import VectorQuantizer
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.networks.vqgan import AttentionBlock, ResidualBlock, Upsample, VqganNetworkConfig
from stage1_tokenizer.tokenizer import Tokenizer

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
VERSION = "0.42.1"
"""Version of diffusers for which the config is written."""
EPS = 1e-6
"""The eps of all norms in these classes of diffusers."""
Tensors = dict[str, Tensor]


class DiffusersModel(NamedTuple):
    """A model of diffusers: the content of its config.json, and its weights."""

    config: dict[str, Any]
    weights: Tensors

    @property
    def class_name(self) -> str:
        """Name of the class in diffusers."""
        return str(self.config["_class_name"])

    @property
    def config_json(self) -> bytes:
        """The text of config.json."""
        return (json.dumps(self.config, indent=2) + "\n").encode()


def to_diffusers(tokenizer: Tokenizer) -> DiffusersModel:
    """Translate a tokenizer.

    Raises:
        ConfigError: diffusers cannot express a layer exactly; the message names the layer.
    """
    network, bottleneck = tokenizer.config.network, tokenizer.bottleneck
    if not isinstance(network, VqganNetworkConfig):
        refuse("network", f"kind {network.kind} has no counterpart, only vqgan has")
    groups = count_norm_groups(tokenizer)
    weights = translate("encoder", tokenizer.encoder, encoder_names(network))
    weights |= translate("decoder", tokenizer.decoder, decoder_names(network))
    size = list(tokenizer.config.image_size)
    config: dict[str, Any] = {
        "_diffusers_version": VERSION,
        "act_fn": "silu",
        "block_out_channels": network.widths,
        "down_block_types": [block_type("Down", "Encoder", level, network) for level in range(len(network.widths))],
        "in_channels": tokenizer.config.image_channels,
        "latent_channels": network.latent_channels,
        "layers_per_block": network.blocks,
        "mid_block_add_attention": network.middle_attention,
        "norm_num_groups": groups,
        "out_channels": tokenizer.config.image_channels,
        "sample_size": size[0] if size[0] == size[1] else size,
        "scaling_factor": 1.0,  # latents of a tokenizer of ours are used as they are
        "up_block_types": [
            block_type("Up", "Decoder", level, network) for level in reversed(range(len(network.widths)))
        ],
    }
    match bottleneck:
        case VectorQuantizer():
            return DiffusersModel(*add_vq(bottleneck, config, weights))
        case KlBottleneck():
            return DiffusersModel(*add_kl(bottleneck, config, weights))
        case _:
            refuse("bottleneck", f"kind {tokenizer.config.bottleneck.kind} has no counterpart, only vq and kl have")


def refuse(layer: str, reason: str) -> NoReturn:
    """Raise the ConfigError that names a layer."""
    raise ConfigError(f"--format diffusers: diffusers cannot express the tokenizer's {layer}: {reason}")


def block_type(direction: str, part: str, level: int, config: VqganNetworkConfig) -> str:
    """Return the name of the class of a level's blocks."""
    return f"{'Attn' if level in config.attention else ''}{direction}{part}Block2D"


def encoder_names(config: VqganNetworkConfig) -> Iterator[str]:
    """Yield the names that diffusers gives to the layers of `VqganEncoder`, in their order; "" for the activation."""
    yield "conv_in"
    for level in range(len(config.widths)):
        if level > 0:
            yield f"down_blocks.{level - 1}.downsamplers.0.conv"
        yield from _block_names(f"down_blocks.{level}", config.blocks, level, config)
    yield from _middle_names(config)


def decoder_names(config: VqganNetworkConfig) -> Iterator[str]:
    """Yield the names that diffusers gives to the layers of `VqganDecoder`, in their order; "" for the activation."""
    yield "conv_in"
    middle = list(_middle_names(config))
    yield from middle[:-3]
    for number, level in enumerate(reversed(range(len(config.widths)))):
        yield from _block_names(f"up_blocks.{number}", config.blocks + 1, level, config)
        if level > 0:
            yield f"up_blocks.{number}.upsamplers.0.conv"
    yield from middle[-3:]


def _block_names(prefix: str, blocks: int, level: int, config: VqganNetworkConfig) -> Iterator[str]:
    for number in range(blocks):
        yield f"{prefix}.resnets.{number}"
        if level in config.attention:
            yield f"{prefix}.attentions.{number}"


def _middle_names(config: VqganNetworkConfig) -> Iterator[str]:
    """Yield the names of the blocks at the latent resolution, and of the three layers at the end of the network."""
    yield "mid_block.resnets.0"
    if config.middle_attention:
        yield "mid_block.attentions.0"
    yield from ("mid_block.resnets.1", "conv_norm_out", "", "conv_out")


def translate(part: str, layers: nn.Module, names: Iterator[str]) -> Tensors:
    """Return the weights of the encoder or the decoder under their names in diffusers."""
    found: Tensors = {}
    for number, (layer, name) in enumerate(zip(layers.children(), names, strict=True)):
        for key, tensor in _translate_layer(f"{part}.{number}", layer).items():
            found[f"{part}.{name}.{key}"] = tensor
    return found


def _translate_layer(path: str, layer: nn.Module) -> Tensors:
    """Return the weights of one layer, without the prefix of its name. path: its own name, for messages."""
    match layer:
        case ResidualBlock():
            return {name.replace("shortcut", "conv_shortcut"): tensor for name, tensor in _weights(layer).items()}
        case AttentionBlock():
            q, k, v = (_linear(weight, bias) for weight, bias in _thirds(layer.qkv))
            linear = {"to_q": q, "to_k": k, "to_v": v, "to_out.0": _linear(layer.out.weight, layer.out.bias)}
            tensors = _named("group_norm", layer.norm)
            return tensors | {f"{name}.{key}": value for name, part in linear.items() for key, value in part.items()}
        case Upsample():
            return _weights(layer.conv)
        case nn.Conv2d() if layer.stride == (2, 2):
            return {"weight": _corner_kernel(path, layer), "bias": _weights(layer)["bias"]}
        case _:
            return _weights(layer)


def _weights(layer: nn.Module) -> Tensors:
    return {name: tensor.detach() for name, tensor in layer.state_dict().items()}


def _named(name: str, layer: nn.Module) -> Tensors:
    return {f"{name}.{key}": tensor for key, tensor in _weights(layer).items()}


def _thirds(layer: nn.Conv2d) -> Iterator[tuple[Tensor, Tensor]]:
    assert layer.bias is not None
    return zip(layer.weight.chunk(3), layer.bias.chunk(3), strict=True)


def _linear(weight: Tensor, bias: Tensor | None) -> Tensors:
    """Return the weights of a linear layer that equals a 1x1 convolution (c, c, 1, 1)."""
    assert bias is not None
    return {"weight": weight.detach()[:, :, 0, 0], "bias": bias.detach()}


def _corner_kernel(path: str, layer: nn.Conv2d) -> Tensor:
    """Return the 3x3 kernel of a convolution of stride 2 that sees no pixel above and none on the left of its four."""
    kernel = layer.weight.detach()
    if kernel.shape[2:] == (3, 3):
        return kernel
    if kernel[:, :, 0].any() or kernel[:, :, :, 0].any():
        refuse(
            f"layer {path}",
            "its kernel is 4x4 and diffusers halves the resolution with 3x3; train with --network.downsample 3",
        )
    return kernel[:, :, 1:, 1:]


def count_norm_groups(tokenizer: Tokenizer) -> int:
    """Return the number of groups that all norms have. Raises ConfigError: they differ, or one has another eps."""
    norms = {
        f"{part}.{name}": module
        for part, network in (("encoder", tokenizer.encoder), ("decoder", tokenizer.decoder))
        for name, module in network.named_modules()
        if isinstance(module, nn.GroupNorm)
    }
    groups = next(iter(norms.values())).num_groups
    for path, norm in norms.items():
        if norm.num_groups != groups:
            refuse(
                f"layer {path}",
                f"its norm has {norm.num_groups} groups and the first one {groups}, but diffusers has one number for "
                "all; train with a network.norm_groups that divides all widths",
            )
        if norm.eps != EPS:
            refuse(f"layer {path}", f"its norm has eps {norm.eps}, and those of diffusers have {EPS}")
    return groups


def _convolution(layer: nn.Module, channels: int) -> Tensors:
    """Return the weights of a 1x1 convolution, or of the one that changes nothing."""
    if isinstance(layer, nn.Conv2d):
        return _weights(layer)
    return {"weight": torch.eye(channels)[:, :, None, None], "bias": torch.zeros(channels)}


def add_vq(bottleneck: VectorQuantizer, config: dict[str, Any], weights: Tensors) -> tuple[dict[str, Any], Tensors]:
    """Return config and weights of a VQModel: those of its networks, and those of the quantizer."""
    vectors = bottleneck.codebook.vectors.detach()  # (V, d)
    if getattr(bottleneck.config, "dot_product", False):
        refuse("bottleneck", "dot_product: true takes the greatest dot product, and diffusers the nearest vector")
    space, channels = bottleneck.space, config["latent_channels"]
    weights = weights | {"quantize.embedding.weight": vectors}
    for name, layer in (("quant_conv", space.project_in), ("post_quant_conv", space.project_out)):
        weights |= {f"{name}.{key}": tensor for key, tensor in _convolution(layer, channels).items()}
    sizes = {"num_vq_embeddings": len(vectors), "vq_embed_dim": vectors.shape[1], "norm_type": "group"}
    return {"_class_name": "VQModel", **config, **sizes}, weights


def add_kl(bottleneck: KlBottleneck, config: dict[str, Any], weights: Tensors) -> tuple[dict[str, Any], Tensors]:
    """Return config and weights of an AutoencoderKL. Its encoder has two channels per channel of the latent.

    An encoder of ours with fewer gets channels of zeros, which quant_conv does not read.
    """
    channels = config["latent_channels"]
    if bottleneck.noise_channels != channels:
        refuse(
            "layer bottleneck.project_out",
            f"it maps a latent of {bottleneck.noise_channels} channels to {channels}, and in diffusers both are equal; "
            "train with bottleneck.channels null",
        )
    weights = dict(weights)
    encoded, wanted = len(weights["encoder.conv_out.weight"]), 2 * channels
    for key in ("weight", "bias"):
        name = f"encoder.conv_out.{key}"
        tensor = weights[name]
        weights[name] = torch.cat([tensor, tensor.new_zeros(wanted - encoded, *tensor.shape[1:])])
    moments = _weights(bottleneck.project_in)
    padding = moments["weight"].new_zeros(wanted, wanted - encoded, 1, 1)
    weights["quant_conv.weight"] = torch.cat([moments["weight"], padding], dim=1)
    weights["quant_conv.bias"] = moments["bias"]
    weights |= {
        f"post_quant_conv.{key}": tensor for key, tensor in _convolution(bottleneck.project_out, channels).items()
    }
    return {"_class_name": "AutoencoderKL", **config}, weights

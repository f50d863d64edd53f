"""A tokenizer as a folder that diffusers loads: `VQModel` for bottleneck vq, `AutoencoderKL` for bottleneck kl.

    config.json                          the class and its arguments
    diffusion_pytorch_model.safetensors  the weights under the names of diffusers

    model = diffusers.VQModel.from_pretrained(FOLDER)
    z = model.encode(x).latents; x_hat = model.decode(z).sample        # x (B, C, H, W) in [-1, 1], as ours

The network must be `vqgan`. Each of its layers has a counterpart in diffusers, under the name by which it is imported:

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
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.kl import KlBottleneck
from stage1_tokenizer.bottlenecks.vq import VectorQuantizer
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.import_weights.conversion import network_pairs
from stage1_tokenizer.import_weights.from_diffusers import DiffusersNames
from stage1_tokenizer.networks.vqgan import VqganNetworkConfig
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
    weights = network_weights(tokenizer, network)
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


def network_weights(tokenizer: Tokenizer, network: VqganNetworkConfig) -> Tensors:
    """Return the weights of encoder and decoder under their names in diffusers."""
    names, state, found = DiffusersNames(len(network.widths)), tokenizer.state_dict(), Tensors()
    for pair in network_pairs(network, names, names.attention_parts[0]):
        for part in pair.parts:
            tensor = state[f"{pair.ours}.{part}"]
            if part == "weight" and ".downsamplers." in pair.theirs[0]:
                tensor = corner_kernel(pair.ours, tensor)
            elif ".attentions." in pair.theirs[0] and tensor.ndim == 4:
                tensor = tensor[:, :, 0, 0]  # their 1x1 convolutions are linear layers
            parts = zip(pair.theirs, tensor.chunk(len(pair.theirs)), strict=True)
            found |= {f"{name}.{part}": piece for name, piece in parts}
    return found


def corner_kernel(path: str, kernel: Tensor) -> Tensor:
    """Return the 3x3 kernel of a convolution of stride 2 (c, c, k, k) that reads nothing above or left of its pixels.

    Raises:
        ConfigError: the kernel is 4x4, and its first row and column are not 0.
    """
    if kernel.shape[2:] == (3, 3):
        return kernel
    if kernel[:, :, 0].any() or kernel[:, :, :, 0].any():
        reason = "its kernel is 4x4 and diffusers halves the resolution with 3x3; train with --network.downsample 3"
        refuse(f"layer {path}", reason)
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


def _weights(layer: nn.Module) -> Tensors:
    return {name: tensor.detach() for name, tensor in layer.state_dict().items()}


def _convolution(layer: nn.Module, channels: int) -> Tensors:
    """Return the weights of a 1x1 convolution, or of the one that changes nothing."""
    if isinstance(layer, nn.Conv2d):
        return _weights(layer)
    return {"weight": torch.eye(channels)[:, :, None, None], "bias": torch.zeros(channels)}


def add_vq(bottleneck: VectorQuantizer, config: dict[str, Any], weights: Tensors) -> tuple[dict[str, Any], Tensors]:
    """Return config and weights of a VQModel: those of its networks, and those of the quantizer."""
    vectors = bottleneck.codebook.vectors.detach()  # (V, d)
    if bottleneck.config.dot_product:
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

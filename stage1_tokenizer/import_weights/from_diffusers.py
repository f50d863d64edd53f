"""diffusers' VQModel and AutoencoderKL, as folders that `save_pretrained` writes or as single files."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stage1_tokenizer.config.base import Tree
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.import_weights.architecture import Architecture
from stage1_tokenizer.import_weights.conversion import Pair
from stage1_tokenizer.import_weights.family import CODEBOOK, Family, Statement, nested, stated_only
from stage1_tokenizer.import_weights.layer_names import AttentionNames, LayerNames, SideNames


class DiffusersNames(LayerNames):
    """Names of diffusers: `encoder.down_blocks.0.resnets.1.conv1`; up_blocks count from the lowest resolution."""

    folders = SideNames("down_blocks", "up_blocks")
    decoder_from_lowest = True
    blocks = "resnets"
    attentions = "attentions"
    resamplers = SideNames("downsamplers.0.conv", "upsamplers.0.conv")
    middles = ("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1")
    shortcut = "conv_shortcut"
    norm_out = "conv_norm_out"
    attention_parts = (
        AttentionNames("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
        AttentionNames("group_norm", "query", "key", "value", "proj_attn"),  # files before version 0.15
    )


class Diffusers(Family):
    """The part that VQModel and AutoencoderKL share."""

    project = "diffusers"
    class_name: str

    @property
    def names(self) -> LayerNames:
        """Names of the layers."""
        return DiffusersNames()

    @property
    def norm_groups(self) -> int:
        """Groups of channels in each norm."""
        groups = nested(self.config, "norm_num_groups")
        return groups if isinstance(groups, int) and groups > 0 else 32

    @property
    def image_size(self) -> Any:
        """Image size that the config states; None: it states none."""
        return nested(self.config, "sample_size")

    def statements(self, architecture: Architecture, state: Mapping[str, Tensor]) -> list[Statement]:
        """Return what the config states, with what the weights have."""
        config = self.config or {}
        given = config.get("_class_name")
        if given != self.class_name:
            raise ConfigError(f"--config {self.source}: its _class_name is {given!r}, --family wants {self.class_name}")
        self.require("act_fn", config.get("act_fn"), ("silu", "swish", None))
        self.require("norm_type", config.get("norm_type"), ("group", None))
        for side, letters in (("down_block_types", "Down"), ("up_block_types", "Up")):
            coder = "Encoder" if letters == "Down" else "Decoder"
            allowed = (f"{letters}{coder}Block2D", f"Attn{letters}{coder}Block2D")
            for kind in config.get(side) or ():
                self.require(side, kind, allowed)
        size, dim = state[f"{CODEBOOK}.weight"].shape if self.has_codes and f"{CODEBOOK}.weight" in state else (0, 0)
        latent = config.get("latent_channels")
        quantizer = [
            Statement("num_vq_embeddings", config.get("num_vq_embeddings"), size),
            Statement("vq_embed_dim", config.get("vq_embed_dim"), dim),
        ]
        return stated_only(
            [
                Statement("in_channels", config.get("in_channels"), architecture.image_channels),
                Statement("latent_channels", latent, architecture.latent_channels),
                Statement("block_out_channels", config.get("block_out_channels"), architecture.widths),
                Statement("layers_per_block", config.get("layers_per_block"), architecture.blocks),
                *(quantizer if self.has_codes else []),
            ]
        )


class DiffusersVq(Diffusers):
    """VQModel of diffusers."""

    name = "diffusers_vq"
    class_name = "VQModel"

    def bottleneck_tree(self) -> Tree:
        """Return the config of our bottleneck."""
        return {"kind": "vq", "update": "gradient", "kmeans_init": False, "revive_below": 0.0}

    def refuse(self, state: Mapping[str, Tensor], source: str) -> None:
        """Refuse norms that are conditioned on the latent (MoVQ)."""
        for name in state:
            if ".conv_y." in name or ".norm_layer." in name:
                raise BadFileError(
                    f"{source}: {name}: is of a norm of the latent (MoVQ); our network has no such norms"
                )


class DiffusersKl(Diffusers):
    """AutoencoderKL of diffusers."""

    name = "diffusers_kl"
    class_name = "AutoencoderKL"
    has_codes = False

    def bottleneck_tree(self) -> Tree:
        """Return the config of our bottleneck."""
        return {"kind": "kl", "project": self._has_output}

    def refuse(self, state: Mapping[str, Tensor], source: str) -> None:
        """Refuse a VQModel."""
        if f"{CODEBOOK}.weight" in state:
            raise BadFileError(f"{source}: {CODEBOOK}.weight: has a codebook; give --family diffusers_vq")

    def prepare(self, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
        """Return the weights; files without convolutions around the latent get one of ones on the diagonal."""
        state = super().prepare(state, source)
        self._has_output = "post_quant_conv.weight" in state
        moments = state.get("encoder.conv_out.weight")
        if "quant_conv.weight" not in state and moments is not None:
            channels = moments.shape[0]
            state["quant_conv.weight"] = moments.new_zeros(channels, channels).fill_diagonal_(1.0)
            state["quant_conv.bias"] = moments.new_zeros(channels)
        return state

    def bottleneck_pairs(self, state: Mapping[str, Tensor]) -> list[Pair]:
        """Return the layers of the bottleneck."""
        pairs = [Pair("bottleneck.project_in", ("quant_conv",))]
        return pairs + [Pair("bottleneck.project_out", ("post_quant_conv",))] * self._has_output

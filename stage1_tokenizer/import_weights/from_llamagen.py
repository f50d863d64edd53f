"""LlamaGen's image tokenizer: a VQGAN with short codebook vectors on the sphere.

Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation" (2024). The stored codebook
vectors have any length; the model scales them to length one, as our bottleneck does with `cosine`.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stage1_tokenizer.config.base import Tree
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.import_weights.architecture import Architecture
from stage1_tokenizer.import_weights.family import CODEBOOK, Family, Statement, nested, stated_only
from stage1_tokenizer.import_weights.layer_names import LayerNames, SideNames


class LlamagenNames(LayerNames):
    """Names of LlamaGen: `encoder.conv_blocks.0.res.1.conv1`; the decoder's blocks count from the lowest resolution."""

    folders = SideNames("conv_blocks", "conv_blocks")
    decoder_from_lowest = True
    blocks = "res"
    attentions = "attn"
    resamplers = SideNames("downsample.conv", "upsample.conv")
    middles = ("mid.0", "mid.1", "mid.2")


class LlamagenVq(Family):
    """VQ-8 and VQ-16 of LlamaGen."""

    name = "llamagen_vq"
    project = "LlamaGen"
    state_keys = ("ema", "model", "state_dict")
    ignored = ("quantize.codebook_used",)

    @property
    def names(self) -> LayerNames:
        """Names of the layers."""
        return LlamagenNames()

    def bottleneck_tree(self) -> Tree:
        """Return the config of our bottleneck."""
        cosine = nested(self.config, "codebook_l2_norm") is not False
        return {"kind": "vq", "update": "gradient", "cosine": cosine, "kmeans_init": False, "revive_below": 0.0}

    def refuse(self, state: Mapping[str, Tensor], source: str) -> None:
        """Refuse batch norms, which the project has as an option."""
        for name in state:
            if name.endswith(".running_mean"):
                raise BadFileError(f"{source}: {name}: is of a batch norm; our network has group norms only")

    def statements(self, architecture: Architecture, state: Mapping[str, Tensor]) -> list[Statement]:
        """Return what the config states, with what the weights have."""
        known = {"codebook_size", "codebook_embed_dim", "encoder_ch_mult", "decoder_ch_mult", "z_channels"}
        if not known & {*(self.config or {})}:
            raise ConfigError(f"--config {self.source}: has none of {', '.join(sorted(known))}, LlamaGen's keys")
        self.require("norm_type", nested(self.config, "norm_type"), ("group", None))
        size, dim = state[f"{CODEBOOK}.weight"].shape if f"{CODEBOOK}.weight" in state else (None, None)
        first = architecture.widths[0]
        found = [width / first for width in architecture.widths]
        return stated_only(
            [
                Statement("codebook_size", nested(self.config, "codebook_size"), size),
                Statement("codebook_embed_dim", nested(self.config, "codebook_embed_dim"), dim),
                Statement("z_channels", nested(self.config, "z_channels"), architecture.latent_channels),
                Statement("encoder_ch_mult", _relative(nested(self.config, "encoder_ch_mult")), found),
                Statement("decoder_ch_mult", _relative(nested(self.config, "decoder_ch_mult")), found),
            ]
        )


def _relative(multipliers: Any) -> Any:
    """Return multipliers divided by the first one, since only the ratios are known from the weights."""
    if isinstance(multipliers, list) and multipliers and all(isinstance(m, int) and m > 0 for m in multipliers):
        return [m / multipliers[0] for m in multipliers]
    return multipliers

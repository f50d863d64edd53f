"""taming-transformers' VQModel, and IBQ of SEED-Voken, which has the same network and names.

Esser et al., "Taming Transformers" (2021); Shi et al., "Taming Scalable Visual Tokenizer" (IBQ, 2024), whose code is
the codebook vector with the greatest dot product.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from stage1_tokenizer.config.base import Tree
from stage1_tokenizer.engine.console import print_note
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.import_weights.architecture import Architecture
from stage1_tokenizer.import_weights.family import CODEBOOK, Family, Statement, nested, stated_only
from stage1_tokenizer.import_weights.layer_names import LayerNames, SideNames

AVERAGED = "model_ema."
"""Beginning of the names of averaged weights (Lightning's LitEma); the rest is the name without its dots."""


class TamingNames(LayerNames):
    """Names of taming-transformers: `encoder.down.0.block.1.conv1`, `decoder.up.2.attn.0.q`."""

    folders = SideNames("down", "up")
    decoder_from_lowest = False
    blocks = "block"
    attentions = "attn"
    resamplers = SideNames("downsample.conv", "upsample.conv")
    middles = ("mid.block_1", "mid.attn_1", "mid.block_2")


class TamingVqgan(Family):
    """VQModel of taming-transformers."""

    name = "taming_vqgan"
    project = "taming-transformers"
    ignored = ("loss.", "colorize")

    @property
    def names(self) -> LayerNames:
        """Names of the layers."""
        return TamingNames()

    @property
    def params(self) -> Any:
        """Parameters of the model in the config."""
        model = nested(self.config, "model") or self.config
        return nested(model, "params") or nested(model, "init_args") or model

    @property
    def image_size(self) -> Any:
        """Image size that the config states; None: it states none."""
        return nested(self.params, "ddconfig", "resolution")

    def bottleneck_tree(self) -> Tree:
        """Return the config of our bottleneck: a codebook that learns by gradient, as in the project."""
        return {"kind": "vq", "update": "gradient", "kmeans_init": False, "revive_below": 0.0}

    def prepare(self, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
        """Return the weights to be imported, averaged ones if the file has them."""
        averaged = {name.removeprefix(AVERAGED): tensor for name, tensor in state.items() if name.startswith(AVERAGED)}
        state = super().prepare({k: tensor for k, tensor in state.items() if not k.startswith(AVERAGED)}, source)
        if averaged:
            missing = [name for name in state if name.replace(".", "") not in averaged]
            if missing:
                raise BadFileError(f"{source}: has averaged weights (model_ema), but none of {missing[0]}")
            print_note(f"{source}: has averaged weights (model_ema); these are imported")
            state = {name: averaged[name.replace(".", "")] for name in state}
        return state

    def refuse(self, state: Mapping[str, Tensor], source: str) -> None:
        """Refuse the quantizers of the project that our bottlenecks do not have."""
        target = str(nested(self.config, "model", "target") or nested(self.config, "model", "class_path") or "")
        if "quantize.embed.weight" in state or "quantize.proj.weight" in state or "Gumbel" in target:
            raise BadFileError(
                f"{source}: quantize.proj: is a Gumbel model, whose codes are the greatest outputs of a convolution, "
                "not the nearest codebook vectors; no bottleneck of ours has such codes"
            )
        if "quantize.used" in state:
            raise BadFileError(f"{source}: quantize.used: its codes are renumbered (remap), which is not imported")
        if ("IBQ" in target) != (self.name == "ibq") and target:
            other = "ibq" if "IBQ" in target else "taming_vqgan"
            raise ConfigError(f"--config {self.source}: is of a model {target}; give --family {other}")

    def statements(self, architecture: Architecture, state: Mapping[str, Tensor]) -> list[Statement]:
        """Return what the config states, with what the weights have."""
        params, dd = self.params, nested(self.params, "ddconfig")
        if not isinstance(dd, dict):
            raise ConfigError(
                f"--config {self.source}: has no model.params.ddconfig, so it is no config of this family"
            )
        for key, allowed in (
            ("double_z", (False, None)),
            ("resamp_with_conv", (True, None)),
            ("use_linear_attn", (False, None)),
            ("attn_type", ("vanilla", None)),
            ("give_pre_end", (False, None)),
            ("tanh_out", (False, None)),
        ):
            self.require(f"ddconfig.{key}", dd.get(key), allowed)
        for key in ("l2_normalize", "cosine_similarity"):
            self.require(key, nested(params, key), (False, None))
        self.require("remap", nested(params, "remap"), (None,))
        ch, mult = dd.get("ch"), dd.get("ch_mult")
        widths = [ch * m for m in mult] if isinstance(ch, int) and isinstance(mult, list) else None
        resolution, attended = dd.get("resolution"), dd.get("attn_resolutions")
        levels = None
        if isinstance(resolution, int) and isinstance(attended, list):
            levels = [level for level in range(len(architecture.widths)) if resolution // 2**level in attended]
        size, dim = state[f"{CODEBOOK}.weight"].shape if f"{CODEBOOK}.weight" in state else (None, None)
        return stated_only(
            [
                Statement("n_embed", nested(params, "n_embed"), size),
                Statement("embed_dim", nested(params, "embed_dim"), dim),
                Statement("ddconfig.z_channels", dd.get("z_channels"), architecture.latent_channels),
                Statement("ddconfig.in_channels", dd.get("in_channels"), architecture.image_channels),
                Statement("ddconfig.num_res_blocks", dd.get("num_res_blocks"), architecture.blocks),
                Statement("ch * ch_mult (channels of the levels)", widths, architecture.widths),
                Statement("levels with a resolution in attn_resolutions", levels, architecture.attention),
            ]
        )


class Ibq(TamingVqgan):
    """IBQ of SEED-Voken."""

    name = "ibq"
    project = "SEED-Voken"

    def bottleneck_tree(self) -> Tree:
        """Return the config of our bottleneck."""
        return super().bottleneck_tree() | {"dot_product": True}

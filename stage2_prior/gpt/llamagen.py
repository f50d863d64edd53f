"""The weights of LlamaGen's class-conditional GPT as weights of `Gpt`, which computes the same logits with them.

    tensors of gpt.pt -> read_sizes -> config_of -> convert -> tensors of Gpt

Sun et al., "Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation", 2024. Its code writes no config
beside the weights; the number of attention heads is in no tensor. `HEADS` has that of the published models, and a YAML
file with the options of its code (`LlamaGenConfig`) that of others.

| LlamaGen | Gpt |
|---|---|
| tok_embeddings, cls_embedding.embedding_table (last row: no class) | embedding, start |
| layers.N: attention.wqkv, attention.wo | layers.N: to_q, to_k, to_v, to_out |
| layers.N: feed_forward.w3 and w1, w2 | layers.N: the two halves of ff.0.proj, ff.2 |
| layers.N: attention_norm, ffn_norm | layers.N: g of the norms, which x-transformers stores less 1 |
| norm, output | norm, head.output |
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from stage1_tokenizer.config.base import Config
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, shorten
from stage2_prior.gpt.model import GptConfig

CHECKPOINT_KEYS = ("model", "module", "state_dict")
"""Keys of a checkpoint under which LlamaGen's trainings have the weights; those of FSDP have them at the top."""
HEADS = {(12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1536): 24, (24, 3200): 32}
"""Attention heads of the published models B, L, XL, XXL and 3B, by layers and width."""
TRAINING_KEYS = {
    *("initializer_range", "token_dropout_p", "attn_dropout_p", "ffn_dropout_p", "drop_path_rate"),
    *("caption_dim", "max_batch_size", "max_seq_len"),
}
"""Options of its code that change no result of trained weights of images of classes."""
NAME_QKV = "layers.0.attention.wqkv.weight"
LISTED = 5
"""Most tensors or keys that a message lists."""


class LlamaGenConfig(Config):
    """The options of LlamaGen's code (`ModelArgs`) that its results depend on. A null is not compared with the
    weights."""

    n_head: PositiveInt | None = None
    """Attention heads; null: those of the published model of this size."""
    n_kv_head: PositiveInt | None = None
    """Heads of keys and values; null: as many."""
    dim: PositiveInt | None = None
    """Channels."""
    n_layer: PositiveInt | None = None
    """Layers."""
    multiple_of: PositiveInt | None = None
    """The inner width of the feed-forward network is rounded up to a multiple of this; null: not compared."""
    ffn_dim_multiplier: float | None = None
    """Factor of the inner width before it is rounded."""
    rope_base: float = Field(10_000.0, gt=1.0)
    """Base of the rotation frequencies."""
    norm_eps: float = Field(1e-5, ge=0.0, le=1.0)
    """Number that RMSNorm adds to the mean square."""
    num_classes: PositiveInt | None = None
    """Classes, without "no class"."""
    class_dropout_prob: float = Field(0.1, ge=0.0, lt=1.0)
    """Share of withheld classes in training; with 0 there is no vector of "no class"."""
    resid_dropout_p: float = Field(0.1, ge=0.0, lt=1.0)
    """Dropout in training."""
    model_type: Literal["c2i", "t2i"] = "c2i"
    """Images of classes or of texts."""
    cls_token_num: PositiveInt = 1
    """Vectors in front of the codes."""
    vocab_size: PositiveInt | None = None
    """Codebook size."""
    block_size: PositiveInt | None = None
    """Codes of an image; null: as many as the tokenizer makes."""


class LlamaGenSizes(NamedTuple):
    """The sizes of a LlamaGen GPT, read from the shapes of its tensors."""

    layers: int
    width: int
    inner: int
    """Inner width of the feed-forward network."""
    codebook_size: int
    labels: int
    """Rows of the label table."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the name and the shape of every tensor."""
        width, inner = self.width, self.inner
        layer = {
            "attention.wqkv.weight": (3 * width, width),
            "attention.wo.weight": (width, width),
            "feed_forward.w1.weight": (inner, width),
            "feed_forward.w3.weight": (inner, width),
            "feed_forward.w2.weight": (width, inner),
            "attention_norm.weight": (width,),
            "ffn_norm.weight": (width,),
        }
        return {
            "tok_embeddings.weight": (self.codebook_size, width),
            "cls_embedding.embedding_table.weight": (self.labels, width),
            **{f"layers.{n}.{name}": shape for n in range(self.layers) for name, shape in layer.items()},
            "norm.weight": (width,),
            "output.weight": (self.codebook_size, width),
        }


def read_sizes(tensors: Mapping[str, Tensor], source: str) -> LlamaGenSizes:
    """Read the sizes from the tensors, and check that all tensors are there, with the shapes that follow from them.

    Raises:
        BadFileError: the tensors are those of another model (the message names them), or not float.
    """
    captions = [name for name in tensors if name.startswith("cls_embedding.") and "embedding_table" not in name]
    if captions:
        raise BadFileError(
            f"{source}: is a text-conditional GPT ({shorten(captions[0], 80)}); only class-conditional ones can be "
            "imported, since Tessera has no text encoder"
        )
    needed = ("tok_embeddings.weight", "cls_embedding.embedding_table.weight", "layers.0.feed_forward.w1.weight")
    missing = [name for name in needed if name not in tensors or tensors[name].ndim != 2]
    if missing:
        raise BadFileError(
            f"{source}: is not a GPT of LlamaGen: it has no matrix {', '.join(missing)}; it has "
            f"{', '.join(shorten(name, 80) for name in sorted(tensors)[:LISTED])}, ..."
        )
    numbers = [name.split(".")[1] for name in tensors if name.startswith("layers.")]
    layers = 1 + max(int(number) for number in numbers if number.isascii() and number.isdecimal() and len(number) < 4)
    codes, labels, first = (tensors[name] for name in needed)
    sizes = LlamaGenSizes(layers, codes.shape[1], first.shape[0], codes.shape[0], labels.shape[0])
    _check_tensors(tensors, sizes, source)
    return sizes


def _check_tensors(tensors: Mapping[str, Tensor], sizes: LlamaGenSizes, source: str) -> None:
    """Raise BadFileError unless the tensors are exactly those that the sizes ask for."""
    wanted = sizes.shapes()
    query_key_value = tensors.get("layers.0.attention.wqkv.weight")
    if query_key_value is not None and query_key_value.shape[0] < 3 * sizes.width:
        raise BadFileError(
            f"{source}: layers.0.attention.wqkv.weight is {tuple(query_key_value.shape)}: its heads share keys and "
            f"values (n_kv_head below n_head), which our attention cannot express; it needs {wanted[NAME_QKV]}"
        )
    problems = [f"missing {name}" for name in wanted if name not in tensors]
    problems += [f"unexpected {shorten(name, 80)}" for name in tensors if name not in wanted]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, should be {shape}"
        for name, shape in wanted.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    problems += [f"{name} is empty" for name in wanted if name in tensors and not tensors[name].numel()]
    problems += ["cls_embedding.embedding_table.weight has no class"] if sizes.labels == 1 else []
    problems += [
        f"{name} has numbers of the format {str(tensor.dtype).removeprefix('torch.')}"
        for name, tensor in tensors.items()
        if name in wanted and not tensor.dtype.is_floating_point
    ]
    if problems:
        rest = f" and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        raise BadFileError(f"{source}: is not a GPT of LlamaGen: {', '.join(problems[:LISTED])}{rest}")


def config_of(sizes: LlamaGenSizes, given: LlamaGenConfig) -> GptConfig:
    """Return the config of the Gpt that computes what a LlamaGen GPT of these sizes and options computes.

    Raises:
        ConfigError: the options do not fit the sizes; the heads are not known; or our GPT cannot express the model.
    """
    heads = given.n_head or HEADS.get((sizes.layers, sizes.width))
    if heads is None:
        raise ConfigError(
            f"a GPT of {sizes.layers} layers of width {sizes.width} is no published LlamaGen model, and its weights do "
            "not say the number of attention heads; give --heads NUMBER, or --config FILE with its options"
        )
    _check_options(sizes, given, heads)
    if heads == 1:
        raise ConfigError("n_head 1: our attention has no output projection (attention.wo) for a single head")
    if sizes.width % (4 * heads):
        raise ConfigError(
            f"n_head {heads}: the width {sizes.width} of the weights must be a multiple of 4 times as much; give the "
            "number of heads of the model's training"
        )
    tree = {
        "layers": sizes.layers,
        "width": sizes.width,
        "heads": heads,
        "feed_forward": sizes.inner,
        "positions": "rotary",
        "rotary_base": given.rope_base,
        "start_rotation": "zero",
        "qk_norm": False,
        "norm_eps": given.norm_eps,
        "feed_forward_bias": False,
        "dropout": given.resid_dropout_p,
        "label_dropout": given.class_dropout_prob,
    }
    return GptConfig.from_tree(tree, "sizes of the weights")


def _check_options(sizes: LlamaGenSizes, given: LlamaGenConfig, heads: int) -> None:
    """Raise ConfigError if options are not those of the weights, or say what our GPT cannot express."""
    if given.model_type != "c2i" or given.cls_token_num != 1:
        raise ConfigError(
            f"model_type {given.model_type}, cls_token_num {given.cls_token_num}: only class-conditional models with "
            "one vector in front of the codes (c2i, 1) can be imported"
        )
    inner = None
    if given.multiple_of is not None:  # as LlamaGen's code computes it
        plain = int((given.ffn_dim_multiplier or 1.0) * int(2 * 4 * sizes.width / 3))
        inner = -(-plain // given.multiple_of) * given.multiple_of
    classes = sizes.labels - bool(given.class_dropout_prob)
    stated: dict[str, tuple[int | None, int, str]] = {
        "dim": (given.dim, sizes.width, "tok_embeddings.weight"),
        "n_layer": (given.n_layer, sizes.layers, ""),
        "vocab_size": (given.vocab_size, sizes.codebook_size, "tok_embeddings.weight"),
        "num_classes": (given.num_classes, classes, "cls_embedding.embedding_table.weight"),
        "n_kv_head": (given.n_kv_head, heads, NAME_QKV),
        "the inner width by multiple_of and ffn_dim_multiplier": (
            inner,
            sizes.inner,
            "layers.0.feed_forward.w1.weight",
        ),
    }
    shapes = sizes.shapes()
    problems = [
        f"{key} is {value}, but {found} in the weights{f' ({name} {shapes[name]})' if name else ''}"
        for key, (value, found, name) in stated.items()
        if value not in (None, found)
    ]
    if problems:
        raise ConfigError(f"the options of the model do not fit the weights: {'; '.join(problems)}")


def convert(tensors: Mapping[str, Tensor], sizes: LlamaGenSizes, config: GptConfig) -> dict[str, Tensor]:
    """Return the weights of the Gpt of `config_of`, in float32, from those of LlamaGen."""
    start = tensors["cls_embedding.embedding_table.weight"]
    if config.label_dropout == 0.0:  # all labels are classes; ours has a last row, which sampling then refuses to use
        start = torch.cat([start, torch.zeros_like(start[:1])])
    converted = {
        "embedding.weight": tensors["tok_embeddings.weight"],
        "start.weight": start,
        "norm.weight": tensors["norm.weight"],
        "head.output.weight": tensors["output.weight"],
    }
    for n in range(sizes.layers):
        theirs, attention, feed_forward = f"layers.{n}", f"layers.{n}.layers.0", f"layers.{n}.layers.1"
        queries, keys, values = tensors[f"{theirs}.attention.wqkv.weight"].chunk(3)
        up, gate = (tensors[f"{theirs}.feed_forward.{name}.weight"] for name in ("w3", "w1"))
        converted |= {
            f"{attention}.0.0.g": tensors[f"{theirs}.attention_norm.weight"].float() - 1.0,
            f"{attention}.1.to_q.weight": queries,
            f"{attention}.1.to_k.weight": keys,
            f"{attention}.1.to_v.weight": values,
            f"{attention}.1.to_out.weight": tensors[f"{theirs}.attention.wo.weight"],
            f"{feed_forward}.0.0.g": tensors[f"{theirs}.ffn_norm.weight"].float() - 1.0,
            f"{feed_forward}.1.ff.0.proj.weight": torch.cat([up, gate]),
            f"{feed_forward}.1.ff.2.weight": tensors[f"{theirs}.feed_forward.w2.weight"],
        }
    return {name: tensor.float().contiguous() for name, tensor in converted.items()}

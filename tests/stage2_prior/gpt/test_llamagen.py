"""Imported weights of LlamaGen's GPT compute what its own code does: the fixture's logits, on every path of ours."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from stage1_tokenizer.config.base import parse_command_line
from stage1_tokenizer.engine.checkpoint import load_strict
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.fast_linear import Precision
from stage2_prior.generation import generate
from stage2_prior.gpt.llamagen import (
    HEADS,
    LlamaGenConfig,
    LlamaGenSizes,
    config_of,
    convert,
    read_sizes,
)
from stage2_prior.gpt.model import Gpt
from stage2_prior.guidance import Guidance
from stage2_prior.likelihood import image_nats, token_loss
from stage2_prior.plan import PlanConfig
from stage2_prior.prior import build_prior, count_parameters
from tests.helpers.commands import ROOT
from tests.helpers.llamagen import NO_CLASS, checkpoint, expected, slow_logits

SHAPE = TokenShape(8, 8, 1, 128)
EXPECTED = expected()
OPTIONS = LlamaGenConfig(n_head=4, multiple_of=32, dim=64, n_layer=2, num_classes=10, vocab_size=128)


def imported(**options: Any) -> Gpt:
    """The fixture as a Gpt."""
    tensors = checkpoint()
    sizes = read_sizes(tensors, "gpt.pt")
    config = config_of(sizes, OPTIONS.model_copy(update=options))
    model = Gpt(config, SHAPE, 10)
    load_strict(model, convert(tensors, sizes, config), "gpt.pt")
    return model.eval().requires_grad_(False)


def apart(logits: Tensor) -> float:
    """Return the largest difference from the fixture's logits, whose standard deviation is 1.03."""
    return float((logits - EXPECTED.logits).abs().max())


def cached_logits(model: Gpt, precision: Precision, replays: bool, known: int) -> Tensor:
    """Compute the logits (3, 64 - known, 128) after the known codes, one position after the other."""
    prepared = model.prepare(precision)
    prepared.replays = replays
    generation, found = prepared.begin(EXPECTED.labels), []
    codes = EXPECTED.codes.flatten(1)
    if known:
        generation.prefill(codes[:, :known, None])
    for code in codes.t()[known:]:
        found.append(generation.logits())
        generation.append(code)
    return torch.stack(found, dim=1)


def test_the_slow_formulas_are_llamagens() -> None:
    """The reference of the tests below computes the fixture's logits."""
    assert apart(slow_logits(checkpoint(), EXPECTED.codes.flatten(1), EXPECTED.labels)[:, :-1]) < 1e-5


def test_forward_pass() -> None:
    assert apart(imported()(EXPECTED.codes, EXPECTED.labels)) < 1e-5


@pytest.mark.parametrize("replays", [False, True], ids=["growing cache", "fixed cache"])
@pytest.mark.parametrize("known", [0, 1, 13])
def test_generation_with_a_cache(replays: bool, known: int) -> None:
    """Also where the class and known codes go through the layers at once."""
    found = cached_logits(imported(), "float32", replays, known)
    assert float((found - EXPECTED.logits[:, known:]).abs().max()) < 1e-5


@pytest.mark.parametrize(("precision", "most"), [("bfloat16", 0.02), ("int8", 0.06)])
def test_generation_in_lower_precisions(precision: Precision, most: float) -> None:
    """Their rounding is as large as with our own weights: shares of the logits' standard deviation."""
    difference = cached_logits(imported(), precision, False, 0) - EXPECTED.logits
    assert 1e-4 < float(difference.std() / EXPECTED.logits.std()) < most


def test_guidance_is_llamagens() -> None:
    """uncond + s (cond - uncond) from row 10, "no class", at each position: the codes are those of a slow loop."""
    weights, labels, scale = checkpoint(), torch.tensor([0, 3, 9]), 2.5
    codes = torch.zeros(3, 0, dtype=torch.int64)
    for _ in range(SHAPE.length):
        conditional = slow_logits(weights, codes, labels)[:, -1]
        unconditional = slow_logits(weights, codes, torch.full_like(labels, NO_CLASS))[:, -1]
        guided = unconditional + scale * (conditional - unconditional)
        codes = torch.cat([codes, guided.argmax(dim=-1, keepdim=True)], dim=1)
    found: list[Tensor] = []

    def choose(logits: Tensor, noise: Tensor, progress: float) -> Tensor:
        found.append(logits)
        return logits.argmax(dim=-1)

    generated = generate(imported(), labels, torch.zeros(3, SHAPE.length), choose, Guidance(scale))
    assert torch.equal(generated.flatten(1), codes)
    assert torch.allclose(found[-1], guided, atol=1e-4)


def test_likelihood() -> None:
    """The nats of an image are those of the fixture's logits, for a class and for no class."""
    logs = EXPECTED.logits.double().log_softmax(dim=-1)
    wanted = -logs.gather(2, EXPECTED.codes.flatten(1)[..., None])[..., 0].sum(dim=1)  # (3,), about 340 nats
    assert torch.allclose(image_nats(imported(), EXPECTED.codes, EXPECTED.labels), wanted, rtol=1e-6)


def test_gradients_are_those_of_the_formulas() -> None:
    """An imported prior can be trained further."""
    model = imported().requires_grad_()
    weights = {name: tensor.clone().requires_grad_() for name, tensor in checkpoint().items()}
    token_loss(model(EXPECTED.codes, EXPECTED.labels), EXPECTED.codes).backward()  # type: ignore[no-untyped-call]
    slow = slow_logits(weights, EXPECTED.codes.flatten(1), EXPECTED.labels)[:, :-1]
    token_loss(slow, EXPECTED.codes).backward()  # type: ignore[no-untyped-call]
    gradients = {name: tensor.grad for name, tensor in weights.items() if tensor.grad is not None}
    assert gradients.keys() == weights.keys()
    ours = dict(model.named_parameters())
    pairs = {
        "tok_embeddings.weight": ours["embedding.weight"].grad,
        "cls_embedding.embedding_table.weight": ours["start.weight"].grad,
        "layers.0.attention_norm.weight": ours["layers.0.layers.0.0.0.g"].grad,
        "layers.0.attention.wqkv.weight": torch.cat(
            [ours[f"layers.0.layers.0.1.to_{part}.weight"].grad for part in "qkv"]  # type: ignore[misc]
        ),
        "layers.1.feed_forward.w2.weight": ours["layers.1.layers.1.1.ff.2.weight"].grad,
    }
    for name, gradient in pairs.items():
        assert gradient is not None
        assert float((gradient - gradients[name]).norm()) < 1e-5 * float(gradients[name].norm()), name


PUBLISHED = {"b": (12, 768), "l": (24, 1024), "xl": (36, 1280), "xxl": (48, 1536)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_its_preset(name: str) -> None:
    """Config and number of parameters; no weight of that size is allocated. The inner width is by LlamaGen's rule."""
    layers, width = PUBLISHED[name]
    sizes = LlamaGenSizes(layers, width, -(-(8 * width // 3) // 256) * 256, 16_384, 1001)
    config = config_of(sizes, LlamaGenConfig(multiple_of=256, num_classes=1000))
    path = ROOT / f"configs/stage2/imagenet256_llamagen_{name}.yaml"
    preset = parse_command_line(PlanConfig, ["--config", str(path)]).prior
    assert config == preset.model_copy(update={"checkpoint": False})
    with FakeTensorMode():
        prior = build_prior(preset, TokenShape(16, 16, 1, 16_384), 1000)
    wanted = 0
    for shape in sizes.shapes().values():
        wanted += torch.Size(shape).numel()
    assert count_parameters(prior) == wanted


def test_a_model_without_no_class_has_a_row_for_it() -> None:
    """With class_dropout_prob 0 LlamaGen's table has one row per class; guidance is then refused by label_dropout."""
    tensors = checkpoint()
    tensors["cls_embedding.embedding_table.weight"] = tensors["cls_embedding.embedding_table.weight"][:10].clone()
    sizes = read_sizes(tensors, "gpt.pt")
    config = config_of(sizes, OPTIONS.model_copy(update={"class_dropout_prob": 0.0}))
    weights = convert(tensors, sizes, config)
    assert config.label_dropout == 0.0
    assert weights["start.weight"].shape == (11, 64)
    assert torch.equal(weights["start.weight"][:10], tensors["cls_embedding.embedding_table.weight"])


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__delitem__(name)


def with_tensor(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: torch.zeros(shape, dtype=dtype)})


WRONG = {
    "missing layers.1.ffn_norm.weight": without("layers.1.ffn_norm.weight"),
    "no matrix tok_embeddings.weight; it has cls_embedding": without("tok_embeddings.weight"),
    "unexpected layers.0.attention.q_norm.weight": with_tensor("layers.0.attention.q_norm.weight", 16),
    r"output.weight is \(127, 64\), should be \(128, 64\)": with_tensor("output.weight", 127, 64),
    r"wqkv.weight is \(96, 64\): its heads share keys": with_tensor("layers.0.attention.wqkv.weight", 96, 64),
    r"text-conditional GPT \(cls_embedding.cap_proj": with_tensor("cls_embedding.cap_proj.fc1.weight", 64, 2048),
    "norm.weight has numbers of the format int64": with_tensor("norm.weight", 64, dtype=torch.int64),
    "embedding_table.weight has no class": with_tensor("cls_embedding.embedding_table.weight", 1, 64),
    "tok_embeddings.weight is empty": with_tensor("tok_embeddings.weight", 0, 64),
    "unexpected layers.x.norm": with_tensor("layers.x.norm", 3),
    "missing layers.2.attention.wqkv.weight": with_tensor("layers.997.norm", 3),
}


@pytest.mark.parametrize("message", WRONG)
def test_other_weights_are_refused(message: str) -> None:
    """The message names the tensor, and what would be right."""
    tensors = checkpoint()
    WRONG[message](tensors)
    with pytest.raises(BadFileError, match=rf"gpt\.pt: .*{message}"):
        read_sizes(tensors, "gpt.pt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 96}, r"dim is 96, but 64 in the weights \(tok_embeddings.weight \(128, 64\)\)"),
        ({"n_layer": 3, "vocab_size": 16}, "n_layer is 3, but 2 .*vocab_size is 16, but 128"),
        ({"num_classes": 11}, "num_classes is 11, but 10"),
        ({"class_dropout_prob": 0.0}, "num_classes is 10, but 11"),
        ({"multiple_of": 256}, r"multiple_of.* is 256, but 192 .*w1.weight \(192, 64\)"),
        ({"n_kv_head": 2}, "n_kv_head is 2, but 4"),
        ({"n_head": None}, r"2 layers of width 64 .*--heads NUMBER"),
        ({"n_head": 5}, "n_head 5: the width 64"),
        ({"n_head": 1}, r"n_head 1: .*attention\.wo"),
        ({"model_type": "t2i"}, "model_type t2i"),
        ({"cls_token_num": 120}, "cls_token_num 120"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    """Both numbers, the key and the tensor."""
    with pytest.raises(ConfigError, match=message):
        config_of(read_sizes(checkpoint(), "gpt.pt"), OPTIONS.model_copy(update=options))


def test_heads_of_published_models_are_64_wide() -> None:
    """Sun et al. 2024, table 1; the heads of 3B are 100 wide."""
    assert {width // heads for (_, width), heads in HEADS.items()} == {64, 100}

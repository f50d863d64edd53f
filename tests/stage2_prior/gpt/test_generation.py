"""Generation with prepared weights (`stage2_prior/gpt/generation.py`) against x-transformers' own layers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sampling.sampler import Sampler, SamplingConfig
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.base import PreparedPrior
from stage2_prior.fast_linear import Precision
from stage2_prior.generation import generate
from stage2_prior.gpt.model import Gpt
from tests.helpers.artefacts import gpt, noise_of, pixelcnn, write_prior

V = 11
SHAPE = TokenShape(4, 5, 1, V)
LABELS = torch.tensor([0, 1, 2])
STEPS = pytest.mark.parametrize("replays", [False, True], ids=["growing cache", "fixed cache"])
"""True: the fixed cache of a GPU's CUDA graphs, whose kernels run one by one here."""


def wild(seed: int = 0, **options: object) -> Gpt:
    """Every parameter moved: gains of norms, of queries and keys, and biases, each other than it was made."""
    model = gpt(SHAPE, 2, seed, **options)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def prepared_of(model: Gpt, replays: bool) -> PreparedPrior:
    prepared = model.prepare()
    prepared.replays = replays
    return prepared


def codes_of(seed: int) -> Tensor:
    return torch.randint(V, (len(LABELS), SHAPE.length), generator=torch.Generator().manual_seed(seed))


def logits_of(prepared: PreparedPrior, codes: Tensor, known: int = 0) -> Tensor:
    """(B, L - known, V) at the positions after the known ones."""
    generation, found = prepared.begin(LABELS), []
    if known:
        generation.prefill(codes[:, :known, None])
    for code in codes.t()[known:]:
        found.append(generation.logits())
        generation.append(code)
    return torch.stack(found, dim=1)


def forward(model: Gpt, codes: Tensor) -> Tensor:
    return model(codes.view(-1, SHAPE.h, SHAPE.w, 1), LABELS)


OPTIONS: list[dict[str, Any]] = [
    {"positions": "rotary"},
    {"positions": "learned"},
    {"positions": "both"},
    {"qk_norm": False},
    {"norm_eps": 0.1},
    {"start_rotation": "zero"},
    {"rotary_base": 1e4, "feed_forward_bias": False},
]


@STEPS
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("known", [0, 1, 7, 19])
def test_logits_are_those_of_the_layers(replays: bool, options: dict[str, Any], known: int) -> None:
    """Trap 30: with every gain and bias other than 1 and 0, so that none may be forgotten."""
    model, codes = wild(**options), codes_of(1)
    wanted = forward(model, codes)[:, known:]
    assert wanted.std() > 0.5
    assert (logits_of(prepared_of(model, replays), codes, known) - wanted).abs().max() < 1e-5 * wanted.std()


@STEPS
def test_a_cache_that_serves_again_holds_nothing_of_before(replays: bool) -> None:
    """Trap 30: several generations from one prepared prior, one after the other and two at the same time."""
    model = wild()
    prepared = prepared_of(model, replays)
    for seed in (1, 2):
        codes = codes_of(seed)
        assert torch.allclose(logits_of(prepared, codes), forward(model, codes), atol=1e-4)
    one, other = prepared.begin(LABELS), prepared.begin(LABELS)
    codes, others = codes_of(3), codes_of(4)
    for place in range(SHAPE.length):
        assert torch.allclose(one.logits(), forward(model, codes)[:, place], atol=1e-4)
        assert torch.allclose(other.logits(), forward(model, others)[:, place], atol=1e-4)
        one.append(codes[:, place])
        other.append(others[:, place])


def test_weights_are_those_of_when_it_was_prepared() -> None:
    """A step of training changes what is prepared next, by whatever means the optimizer writes."""
    model, codes = wild(), codes_of(1)
    before = forward(model, codes)
    optimizer = torch.optim.AdamW(model.requires_grad_().parameters(), lr=0.1, fused=True)
    model(codes.view(-1, SHAPE.h, SHAPE.w, 1), LABELS).square().mean().backward()
    optimizer.step()
    model.requires_grad_(False)
    after = forward(model, codes)
    assert (before - after).abs().max() > 0.1
    assert torch.allclose(logits_of(model.prepare(), codes), after, atol=1e-4)
    generated = generate(model, LABELS, noise_of(3, SHAPE.length))
    assert torch.equal(generate(model, LABELS, noise_of(3, SHAPE.length), prepared=model.prepare()), generated)


@pytest.mark.parametrize(("precision", "least", "most"), [("bfloat16", 1e-4, 3e-2), ("int8", 1e-4, 8e-2)])
def test_other_precisions_are_near(precision: Precision, least: float, most: float) -> None:
    """And are what was asked for: not float32 under another name."""
    model, codes = wild(width=64), codes_of(1)
    wanted = forward(model, codes)
    apart = (logits_of(model.prepare(precision), codes) - wanted).std() / wanted.std()
    assert least < apart < most


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_what_is_generated_does_not_depend_on_the_batch(precision: Precision) -> None:
    """Trap 36, in int8 too: its inputs are scaled row by row."""
    model, noise = wild(), noise_of(12, SHAPE.length)
    labels = torch.arange(12) % 3
    prepared = model.prepare(precision)
    together = generate(model, labels, noise, prepared=prepared)
    for size in (1, 5):
        parts = zip(torch.split(labels, size), torch.split(noise, size), strict=True)
        alone = [generate(model, some, part, prepared=prepared) for some, part in parts]
        assert torch.equal(torch.cat(alone), together)


def test_the_sampler_takes_the_precision_that_it_is_given(tmp_path: Path) -> None:
    """The key reaches the arithmetic."""
    prior = write_prior(tmp_path)
    for precision in ("float32", "bfloat16", "int8"):
        sampler = Sampler(prior, SamplingConfig(precision=precision))
        assert sampler.prepared.precision == precision
        assert sampler.sample(2).shape[0] == 2


def test_a_pixelcnn_knows_float32_alone(tmp_path: Path) -> None:
    """Refused when the sampler is made, not after an hour of sampling."""
    with pytest.raises(ConfigError, match=r"precision int8: .*float32"):
        pixelcnn(SHAPE).prepare("int8")
    prior = write_prior(tmp_path, kind="pixelcnn")
    with pytest.raises(ConfigError, match="precision bfloat16"):
        Sampler(prior, SamplingConfig(precision="bfloat16"))

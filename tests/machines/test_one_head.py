"""A GPT of one head, to which x-transformers gives no projection behind its attention."""

from pathlib import Path

import pytest
import torch

from sampling.generate import main
from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.fast_linear import Precision
from tests.helpers.artefacts import gpt, pictures_of, write_prior
from tests.helpers.commands import run

SHAPE = TokenShape(4, 5, 1, 11)
LABELS = torch.tensor([0, 1, 2])
ONE_HEAD: list[tuple[Precision, float, float]] = [
    ("float32", 0.0, 1e-5),
    ("bfloat16", 1e-4, 3e-2),
    ("int8", 1e-4, 8e-2),
]


@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize(("precision", "least", "most"), ONE_HEAD)
@pytest.mark.parametrize("known", [0, 7])
def test_decoding_is_the_forward_pass(
    positions: str, precision: Precision, least: float, most: float, known: int
) -> None:
    """Trap 30: code by code with a cache, and after a prefix at once, the logits are those of the whole sequence."""
    model = gpt(SHAPE, heads=1, positions=positions)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    codes = torch.randint(SHAPE.V, (len(LABELS), SHAPE.length), generator=generator)
    wanted = model(codes.view(-1, SHAPE.h, SHAPE.w, 1), LABELS)[:, known:]
    generation, found = model.prepare(precision).begin(LABELS), []
    if known:
        generation.prefill(codes[:, :known, None])
    for code in codes.t()[known:]:
        found.append(generation.logits())
        generation.append(code)
    apart = (torch.stack(found, dim=1) - wanted).std() / wanted.std()
    assert least <= apart < most


def test_it_is_loaded_and_sampled_from(tmp_path: Path) -> None:
    """A checkpoint of `prior.heads 1` gives pictures, alike at every batch size."""
    write_prior(tmp_path / "run", heads=1)
    for size in (1, 4):
        out = tmp_path / str(size)
        ended = run(main, "--prior", tmp_path / "run", "--out", out, "-n", 4, "--batch_size", size, "--top_p", 1)
        assert ended.code == 0, ended.err
    assert len(set(pictures_of(tmp_path / "1").values())) == 4
    assert pictures_of(tmp_path / "1") == pictures_of(tmp_path / "4")

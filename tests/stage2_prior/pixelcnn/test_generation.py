"""Generation with a PixelCNN against its forward pass, for all sizes of its kernels."""

from itertools import product

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.base import Generation
from stage2_prior.generation import generate, sample_softmax
from stage2_prior.pixelcnn.model import PixelCnn
from tests.helpers.artefacts import pixelcnn

SHAPE = TokenShape(4, 5, 1, 11)


def codes_of(batch: int, seed: int = 0) -> Tensor:
    return torch.randint(SHAPE.V, (batch, *SHAPE[:3]), generator=torch.Generator().manual_seed(seed))


def step(generation: Generation, codes: Tensor, position: int) -> Tensor:
    """Return the logits at a position, and go on with the given code."""
    logits = generation.logits().clone()
    generation.append(codes[:, position // SHAPE.w, position % SHAPE.w, 0])
    return logits


def assert_equal_to_forward(model: PixelCnn, codes: Tensor, labels: Tensor, logits: list[Tensor]) -> None:
    wanted = model(codes, labels)
    assert wanted.std() > 0.1
    assert torch.allclose(torch.stack(logits, dim=1), wanted, rtol=1e-5, atol=1e-5 * float(wanted.std()))


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize(("first_kernel", "kernel"), [(3, 1), (7, 1), (3, 3), (7, 3), (3, 5), (5, 7)])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_kernel_and_depth_generates_as_forward(layers: int, first_kernel: int, kernel: int, batch: int) -> None:
    """One layer has no layers after the first; a kernel of 1 has no columns to the left; wide ones reach past the
    grid."""
    model = pixelcnn(SHAPE, layers=layers, first_kernel=first_kernel, kernel=kernel)
    codes, labels = codes_of(batch), torch.arange(batch) % 3
    generation = model.begin(labels)
    logits = [step(generation, codes, position) for position in range(SHAPE.length)]
    assert_equal_to_forward(model, codes, labels, logits)


def test_two_generations_at_once_do_not_share_memory() -> None:
    """Steps write into memory that is allocated once for each generation; the weights alone are shared."""
    model, labels = pixelcnn(SHAPE), torch.tensor([0, 2])
    prepared = model.prepare()
    pairs = [(prepared.begin(labels), codes_of(2, seed)) for seed in (1, 2)]
    logits: list[list[Tensor]] = [[], []]
    for position, (number, (generation, codes)) in product(range(SHAPE.length), enumerate(pairs)):
        logits[number].append(step(generation, codes, position))
    for (_, codes), found in zip(pairs, logits, strict=True):
        assert_equal_to_forward(model, codes, labels, found)


def test_large_logits_give_the_codes_of_forward_passes() -> None:
    """Logits of a few hundred, as of a prior that is nearly certain: the same noise chooses the same codes."""
    model, labels = pixelcnn(SHAPE), torch.tensor([0, 1, 2])
    model.head.get_parameter("output.weight").mul_(100.0)
    noise = torch.rand(3, SHAPE.length, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    wanted = torch.zeros(3, *SHAPE[:3], dtype=torch.int64)
    for position in range(SHAPE.length):
        logits = model(wanted, labels)[:, position]
        wanted[:, position // SHAPE.w, position % SHAPE.w, 0] = sample_softmax(logits, noise[:, position])
    assert model(wanted, labels).abs().max() > 100
    assert torch.equal(generate(model, labels, noise), wanted)

"""The output heads: logits of the K codes of a position, from its context and its codes so far."""

import pytest
import torch
from torch import Tensor

from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.output_head import DepthTransformerHead, LinearHead, build_head
from tests.helpers.artefacts import MAKERS

V, WIDTH, N = 11, 24, 5
KINDS = pytest.mark.parametrize("kind", MAKERS)
DEPTHS = pytest.mark.parametrize("K", [1, 2, 4])


def head_of(K: int) -> LinearHead | DepthTransformerHead:
    torch.manual_seed(0)
    return build_head(WIDTH, 2, TokenShape(2, 3, K, V)).double().requires_grad_(False)


def inputs(K: int, batch: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    contexts = torch.randn(batch, N, WIDTH, generator=generator, dtype=torch.float64)
    return contexts, torch.randn(batch, N, K, WIDTH, generator=generator, dtype=torch.float64)


@DEPTHS
def test_logits_are_those_of_one_code_after_the_other(K: int) -> None:
    """Trap 30: sampling asks for a code at a time, training for all of them, of the same distribution."""
    head, (contexts, embedded) = head_of(K), inputs(K)
    logits, following = head(contexts, embedded), head.prepare("float32")
    assert logits.shape == (3, N, K, V)
    for place in range(N):
        for depth in range(K):
            found = following(contexts[:, place], embedded[:, place, :depth])
            assert torch.allclose(found, logits[:, place, depth], rtol=1e-9, atol=1e-9)


@DEPTHS
def test_a_code_depends_on_those_before_it_in_its_own_position(K: int) -> None:
    """The factorisation over the depths: a code that saw itself would be learned perfectly and sampled at random."""
    head, (contexts, embedded) = head_of(K), inputs(K)
    before = head(contexts, embedded)
    for place in range(N):
        for depth in range(K):
            changed = embedded.clone()
            changed[:, place, depth] += 1.0
            apart = (head(contexts, changed) - before).abs().amax(dim=-1)  # (B, N, K)
            assert (apart[:, place, depth + 1 :] > 1e-4).all()
            apart[:, place, depth + 1 :] = 0
            assert (apart == 0).all()
        changed = contexts.clone()
        changed[:, place] += torch.linspace(-1, 1, WIDTH)
        apart = (head(changed, embedded) - before).abs().amax(dim=-1)
        assert (apart[:, place] > 1e-4).all()
        apart[:, place] = 0
        assert (apart == 0).all()


def test_one_code_is_a_linear_map_of_the_context() -> None:
    """With one code per position the head is a linear map without a transformer."""
    head, (contexts, embedded) = head_of(1), inputs(1)
    assert isinstance(head, LinearHead)
    assert torch.allclose(head(contexts, embedded)[:, :, 0], contexts @ head.output.weight.T)
    assert sum(parameter.numel() for parameter in head.parameters()) == WIDTH * V


@pytest.mark.parametrize("K", [2, 4])
def test_the_head_is_equations_9_to_11(K: int) -> None:
    """Inputs are the context and then the sums of the codes so far, each with its depth's vector; each depth has an
    output of its own."""
    head, (contexts, embedded) = head_of(K), inputs(K)
    assert isinstance(head, DepthTransformerHead)
    logits = head(contexts, embedded)
    for b in range(len(contexts)):
        for place in range(N):
            steps = [contexts[b, place]]
            for depth in range(1, K):
                so_far = torch.zeros(WIDTH, dtype=torch.float64)
                for code in range(depth):
                    so_far = so_far + embedded[b, place, code]
                steps.append(so_far)
            x = torch.stack([step + head.depths[depth] for depth, step in enumerate(steps)])[None]
            for each in head.layers:
                x = each(x)
            x = head.norm(x)[0]
            for depth in range(K):
                wanted = head.get_submodule(f"outputs.{depth}")(x[depth])
                assert torch.allclose(logits[b, place, depth], wanted, rtol=1e-9, atol=1e-9)


def test_depths_have_outputs_and_vectors_of_their_own() -> None:
    """A residual quantizer's code books are different ones, so code 3 of one depth is not code 3 of another."""
    head = head_of(3)
    assert isinstance(head, DepthTransformerHead)
    contexts, embedded = inputs(3)
    before = head(contexts, embedded)
    head.get_submodule("outputs.1").get_parameter("weight").mul_(2.0)
    after = head(contexts, embedded)
    assert torch.allclose(after[:, :, 1], 2 * before[:, :, 1])
    assert torch.equal(after[:, :, [0, 2]], before[:, :, [0, 2]])
    head.depths[2] += torch.linspace(-1, 1, WIDTH)
    assert torch.equal(head(contexts, embedded)[:, :, :2], after[:, :, :2])
    assert not torch.isclose(head(contexts, embedded)[:, :, 2], after[:, :, 2]).all(dim=-1).any()


@KINDS
def test_a_code_is_embedded_by_its_depth(kind: str) -> None:
    """Row k * V + c: the same number at two depths is two codes, and none of them falls on another's row."""
    model = MAKERS[kind](TokenShape(2, 3, 3, V))
    codes = torch.randint(V, (4, 5, 3), generator=torch.Generator().manual_seed(0))
    embedded = model.embed(codes)
    for depth in range(3):
        assert torch.equal(embedded[..., depth, :], model.embedding.weight[depth * V :][codes[..., depth]])
    assert torch.equal(model.embed(codes[..., :2]), embedded[..., :2, :])
    assert len(model.embedding.weight) == 3 * V


@KINDS
def test_a_context_is_told_the_sum_of_a_positions_codes(kind: str) -> None:
    """Later positions depend on the sum over depths of a position's embedded codes, as the quantizer decodes them."""
    model, labels = MAKERS[kind](TokenShape(2, 3, 3, V)), torch.tensor([0, 1])
    codes = torch.randint(V, (2, 2, 3, 3), generator=torch.Generator().manual_seed(0))
    summed = model.embed(codes).sum(dim=3).flatten(1, 2)
    logits = model.head(model.contexts(summed, labels, (2, 3)), model.embed(codes).flatten(1, 2))
    assert torch.allclose(logits.flatten(1, 2), model(codes, labels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("width", [12, 72, 112, 200])
def test_a_prior_of_any_width_has_a_head_over_the_depth(width: int) -> None:
    """A PixelCNN's width need not divide into heads, and x-transformers gives a lone head no projection back."""
    shape = TokenShape(1, 2, 3, 5)
    head = build_head(width, 1, shape)
    contexts, embedded = torch.randn(2, 2, width), torch.randn(2, 2, 3, width)
    logits = head(contexts, embedded)
    assert logits.shape == (2, 2, 3, 5)
    for depth in range(3):
        found = head.prepare("float32")(contexts[:, 1], embedded[:, 1, :depth])
        assert torch.allclose(found, logits[:, 1, depth], atol=1e-5)

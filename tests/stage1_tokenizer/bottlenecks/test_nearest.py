"""The search for the nearest code: correct, and without a matrix of all vectors by all codes."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from stage1_tokenizer.bottlenecks import nearest
from stage1_tokenizer.bottlenecks.nearest import GROUPS, TILE_CODES, find_nearest
from stage1_tokenizer.bottlenecks.vq import VectorQuantizer, VqConfig
from stage1_tokenizer.engine import processor
from tests.helpers.largest import LargestTensor


@pytest.fixture(params=["onednn", "-onednn"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test with all products by oneDNN, and without."""
    value: str = request.param
    if value == "onednn" and not processor.has_onednn():
        pytest.skip("this build of torch has no such operators")
    monkeypatch.setenv(processor.FAST_PATHS_VARIABLE, value)
    monkeypatch.setattr(nearest, "MIN_SCORES", 1)
    return value


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The scores of each tile that oneDNN computes."""
    seen: list[int] = []
    multiply = processor.multiply

    def counted(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
        scores = multiply(x, packed, bias)
        seen.append(scores.numel())
        return scores

    monkeypatch.setattr(processor, "multiply", counted)
    return seen


def scores_in_float64(x: Tensor, codebook: Tensor) -> Tensor:
    """The scores (N, V) of the nearest codes: the greatest is the nearest."""
    x, codebook = x.double(), codebook.double()
    return x @ codebook.T - codebook.square().sum(dim=1) / 2


@pytest.mark.parametrize("size", [GROUPS, 3 * GROUPS, 3 * GROUPS + 5, TILE_CODES, 2 * TILE_CODES + 7 * GROUPS])
@pytest.mark.parametrize("dim", [1, 3, 8])
def test_the_first_of_equally_near_codes_is_taken(size: int, dim: int) -> None:
    """Small integers: float32 computes them without rounding, and most vectors are equally near to many codes, in one
    group, in several, and in several tiles."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (600, dim), generator=generator).float()
    codebook = torch.randint(-2, 3, (size, dim), generator=generator).float()
    scores = scores_in_float64(x, codebook)
    assert ((scores == scores.amax(dim=1, keepdim=True)).sum(dim=1) > 1).any()
    assert torch.equal(find_nearest(x, codebook), scores.argmax(dim=1))


@pytest.mark.parametrize("step", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("dim", [8, 256])
def test_nearly_equal_codes(step: float, dim: int) -> None:
    """Each codebook vector has 15 others in other tiles and groups that differ by `step` per coordinate. The code is
    that of float64, unless float32's rounding of the scores is greater than the gap."""
    generator = torch.Generator().manual_seed(0)
    x, base = torch.randn(700, dim, generator=generator), torch.randn(300, dim, generator=generator)
    codebook = base.repeat(16, 1)
    codebook += step * torch.randn(codebook.shape, generator=generator)
    scores = scores_in_float64(x, codebook)
    codes = find_nearest(x, codebook)
    rounding = 4 * dim**0.5 * torch.finfo(torch.float32).eps * x.norm(dim=1) * codebook.norm(dim=1).max()
    best = scores.topk(2, dim=1)
    assert (best.values[:, 0] - scores.gather(1, codes[:, None])[:, 0] <= rounding).all()
    is_clear = best.values[:, 0] - best.values[:, 1] > rounding
    assert is_clear.float().mean() > (0.5 if step == 1e-3 else -1)
    assert torch.equal(codes[is_clear], best.indices[is_clear, 0])


@pytest.mark.parametrize("dim", [8, 64])
def test_vectors_of_the_codebook_are_found(dim: int) -> None:
    """Vectors that the codebook has twice, far apart and neighbouring, have the first one's code; in any layout."""
    generator = torch.Generator().manual_seed(0)
    once = torch.randn(1500, dim, generator=generator)
    codebook = torch.cat([once, once.flip(0), once[:700].repeat_interleave(2, dim=0)])
    for x in (once, once.T.contiguous().T, once.repeat(1, 2)[:, dim:]):
        assert torch.equal(find_nearest(x, codebook), torch.arange(1500))


def test_onednn_computes_tiles(path: str, tiles: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 14: also with dim 8 no more scores than a tile's at once. Where operations are only recorded, and where its
    packing would take too long, oneDNN is not called."""
    x, codebook = torch.randn(3000, 8), torch.randn(10_000, 8)
    find_nearest(x, codebook)
    assert sum(tiles) == (3000 * 10_000 if path == "onednn" else 0)
    assert max(tiles, default=0) <= 1 << 20
    tiles.clear()
    with FakeTensorMode():
        assert find_nearest(torch.zeros(3000, 8), torch.zeros(10_000, 8)).shape == (3000,)
    monkeypatch.setattr(nearest, "MIN_SCORES", 3000 * TILE_CODES + 1)
    find_nearest(x, codebook)
    assert not tiles


@pytest.mark.parametrize("n", [1, 33, 1000])
@pytest.mark.parametrize("size", [1, 2, 63, 64, 65, 128, 4096])
@pytest.mark.parametrize("dim", [1, 8, 64])
def test_it_is_the_nearest(n: int, size: int, dim: int) -> None:
    """Trap 3: by brute force in float64, for sizes that do and do not fit into chunks and blocks; where two codes are
    equally near to float32's eyes either will do."""
    generator = torch.Generator().manual_seed(0)
    x, codes = torch.randn(n, dim, generator=generator), torch.randn(size, dim, generator=generator)
    distances = torch.cdist(x.double(), codes.double()).square()
    ids = find_nearest(x, codes)
    assert ids.shape == (n,)
    assert ids.dtype == torch.int64
    chosen = distances.gather(1, ids[:, None])[:, 0]
    assert (chosen - distances.min(dim=1).values < 1e-5).all()
    clear = distances.topk(min(2, size), largest=False).values.diff(dim=1).flatten() > 1e-5
    if size > 1:
        assert clear.float().mean() > 0.5 or dim == 1
        assert torch.equal(ids[clear], distances.argmin(dim=1)[clear])


def test_no_other_precision() -> None:
    """Trap 6: a caller under autocast who forgot to say float32 would get codes that are merely near."""
    with pytest.raises(ValueError, match="float32"):
        find_nearest(torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(4, 3))


def test_autocast_around_it_changes_nothing() -> None:
    """Trap 6: a matrix product is the first thing that autocast makes bfloat16."""
    generator = torch.Generator().manual_seed(0)
    x, codes = torch.randn(500, 16, generator=generator), torch.randn(2048, 16, generator=generator)
    expected = find_nearest(x, codes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(find_nearest(x, codes), expected)


def test_no_matrix_of_vectors_by_codes() -> None:
    """Trap 14: training and evaluation at V = 16,384 hold no tensor larger than a chunk of scores or the codebook."""
    vq = VectorQuantizer(VqConfig(codebook_size=16_384, kmeans_init=False), latent_channels=8)
    z = torch.randn(1, 8, 32, 32, requires_grad=True)
    for training in (True, False):
        vq.train(training)
        with LargestTensor() as largest:
            out = vq(z)
            (out.loss + out.z_q.sum()).backward()
            vq.finish_step()
        assert largest.numel <= 1 << 21 < 1024 * 16_384


def test_draws_follow_the_distances() -> None:
    """RQ-VAE's stochastic codes: frequencies of exp(-distance^2 / temperature), within four standard deviations."""
    codes = torch.full((2 * GROUPS, 2), 1e4)  # two codes per group
    places = torch.tensor([0, 1, GROUPS, 2 * GROUPS - 1])
    codes[places] = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    x = torch.tensor([[0.4, 0.3]])
    torch.manual_seed(0)
    for temperature in (0.5, 2.0):
        expected = torch.softmax(-(codes - x).square().sum(dim=1) / temperature, dim=0)
        drawn = find_nearest(x.expand(20_000, 2).contiguous(), codes, temperature)
        share = torch.bincount(drawn, minlength=len(codes)) / 20_000
        assert torch.allclose(share, expected, atol=4 * 0.5 / 20_000**0.5)

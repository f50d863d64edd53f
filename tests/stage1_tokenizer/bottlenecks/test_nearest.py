"""The search for the nearest code: correct, and without a matrix of all vectors by all codes."""

import pytest
import torch

from stage1_tokenizer.bottlenecks.nearest import find_nearest
from stage1_tokenizer.bottlenecks.vq import VectorQuantizer, VqConfig
from tests.helpers.largest import LargestTensor


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
    codes = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    x = torch.tensor([[0.4, 0.3]])
    torch.manual_seed(0)
    for temperature in (0.5, 2.0):
        expected = torch.softmax(-(codes - x).square().sum(dim=1) / temperature, dim=0)
        drawn = find_nearest(x.expand(20_000, 2).contiguous(), codes, temperature)
        share = torch.bincount(drawn, minlength=4) / 20_000
        assert torch.allclose(share, expected, atol=4 * 0.5 / 20_000**0.5)

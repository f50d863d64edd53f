"""Memorisation: planted copies are found and counted, and fresh images are counted as rarely as expected."""

import io
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sampling.evaluation.extractors.base import Extracted, Extractor
from sampling.evaluation.memorisation import Memorised, count_memorised, find_nearest_training

N = 400


class Projection(Extractor):
    """An extractor: a fixed random projection of the image at 8x8."""

    def __init__(self) -> None:
        super().__init__("random projection", 32, (8, 8), "", is_inception=False)
        torch.manual_seed(0)
        self.weights = nn.Parameter(torch.randn(192, 32) / 192**0.5, requires_grad=False)

    def _extract(self, images: Tensor) -> Extracted:
        return Extracted((images.flatten(1).float() / 128 - 1) @ self.weights, None)


@pytest.fixture(scope="module")
def extractor() -> Extractor:
    return Projection()


def fresh(n: int, seed: int) -> Tensor:
    """Draw different smooth random images (n, 3, 16, 16)."""
    noise = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * 255
    return F.interpolate(noise, size=16, mode="bicubic").clamp(0, 255).round().to(torch.uint8)


def batches(images: Tensor, size: int = 64, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(images), size):
        part = images[start : start + size]
        yield part, torch.arange(first + start, first + start + len(part))


def jpeg(image: Tensor) -> Tensor:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=90)
    return torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)


def test_neighbours_are_those_of_a_loop(extractor: Extractor) -> None:
    """Neighbours do not depend on batches or on given features, and distances follow their definitions."""
    training, samples = fresh(50, 1), fresh(6, 2)
    features = extractor(training).features
    found = find_nearest_training(samples, batches(training, 7, first=0), extractor, k=4, training_features=features)
    own = find_nearest_training(samples, batches(training, 50), extractor, k=4)
    assert torch.equal(found.pixels.indices, own.pixels.indices)
    assert torch.equal(found.features.indices, own.features.indices)
    for i, sample in enumerate(samples):
        rms = np.array([float((sample.double() - x.double()).square().mean().sqrt()) for x in training])
        order = np.argsort(rms, kind="stable")[:4]
        assert found.pixels.indices[i].tolist() == order.tolist()
        np.testing.assert_allclose(found.pixels.distances[i], rms[order], rtol=1e-12)
        cosine = 1 - F.cosine_similarity(extractor(sample[None]).features.double(), features.double())
        order = np.argsort(cosine.numpy(), kind="stable")[:4]
        assert found.features.indices[i].tolist() == order.tolist()
        np.testing.assert_allclose(found.features.distances[i], cosine[torch.from_numpy(order)], atol=1e-6)


@pytest.mark.parametrize("measure", ["pixels", "features"])
def test_copies_are_found_and_counted(extractor: Extractor, measure: str) -> None:
    """Exact, noisy and JPEG copies are found with their original's index and counted; fresh images are not."""
    training = fresh(N, 1)
    noise = torch.randint(-4, 5, (3, 16, 16), generator=torch.Generator().manual_seed(5))
    noised = (training[123].int() + noise).clamp(0, 255).to(torch.uint8)
    samples = torch.cat([training[[7]], noised[None], jpeg(training[300])[None], fresh(40, 2)])
    found = getattr(find_nearest_training(samples, batches(training), extractor), measure)
    held_out = getattr(find_nearest_training(fresh(N, 3), batches(training), extractor), measure)
    assert found.indices[:3, 0].tolist() == [7, 123, 300]
    assert found.distances[0, 0] == pytest.approx(0, abs=1e-9)
    counted = count_memorised(found, held_out)
    assert counted.is_memorised[:3].all()
    assert counted.number <= 3 + 3  # 0.4 of 40 are expected
    assert found.distances[1, 0] < found.distances[1, 1] / 3, "the copy stands out"


def test_an_exact_copy_has_no_distance_in_pixels(extractor: Extractor) -> None:
    """Also for bright images, for which |x|^2 + |y|^2 - 2 x.y has an error of 0.1 of a grey level in float32."""
    training = torch.full((5, 3, 16, 16), 255, dtype=torch.uint8) - torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1)
    found = find_nearest_training(training, batches(training), extractor, k=2)
    assert found.pixels.distances[:, 0].tolist() == [0] * 5
    assert found.pixels.distances[:, 1].tolist() == [1] * 5


def test_fresh_images_are_counted_at_the_expected_share(extractor: Extractor) -> None:
    """About 5 % of 1500 images of the training's distribution are counted, within four standard errors."""
    training, share = fresh(N, 1), 0.05
    held_out = find_nearest_training(fresh(1500, 3), batches(training), extractor)
    found = find_nearest_training(fresh(1500, 2), batches(training), extractor)
    for ours, theirs in ((found.pixels, held_out.pixels), (found.features, held_out.features)):
        result = count_memorised(ours, theirs, share)
        assert result.expected == pytest.approx(share, abs=1 / 1500)
        error = (2 * share * (1 - share) / 1500) ** 0.5
        assert result.number / 1500 == pytest.approx(share, abs=4 * error)


def test_a_model_that_copies_half_its_samples_is_told(extractor: Extractor) -> None:
    training = fresh(N, 1)
    samples = torch.cat([training[:50], fresh(50, 2)])
    result: Memorised = count_memorised(
        find_nearest_training(samples, batches(training), extractor).pixels,
        find_nearest_training(fresh(200, 3), batches(training), extractor).pixels,
    )
    assert 50 <= result.number <= 55
    assert result.threshold > 0


def test_mirrored_copies_are_found_where_training_flips(extractor: Extractor) -> None:
    training = fresh(60, 1)
    samples = training[[9]].flip(3)
    assert find_nearest_training(samples, batches(training), extractor).pixels.distances[0, 0] > 5
    found = find_nearest_training(samples, batches(training), extractor, mirrored=True).pixels
    assert (int(found.indices[0, 0]), float(found.distances[0, 0])) == (9, 0.0)


def test_what_cannot_be_compared_is_refused(extractor: Extractor) -> None:
    with pytest.raises(ValueError, match="fewer than 3"):
        find_nearest_training(fresh(2, 0), batches(fresh(2, 1)), extractor)
    with pytest.raises(ValueError, match="training images are"):
        find_nearest_training(fresh(2, 0), [(fresh(4, 1)[..., :8], torch.arange(4))], extractor)

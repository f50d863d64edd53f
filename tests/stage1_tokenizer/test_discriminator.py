"""The discriminator: a grid of logits whose batches do not see each other."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stage1_tokenizer.discriminator import DiscriminatorConfig, PatchDiscriminator
from stage1_tokenizer.objective import discriminator_loss


def build_discriminator(image_channels: int = 3, **options: Any) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(DiscriminatorConfig(**{"channels": 4, "layers": 2, **options}), image_channels)


def batch(B: int = 4, seed: int = 1, size: int = 32) -> Tensor:
    return torch.randn(B, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_batches_do_not_mix(norm: str) -> None:
    """Trap 22: what is judged beside real images must not change their logits, in train mode with batch norm either."""
    model = build_discriminator(norm=norm)
    real = batch()
    (alone,) = model(real)
    for other in (batch(seed=2), 100 * batch(B=7, seed=3)):
        beside, judged = model(real, other)
        assert torch.equal(beside, alone)
        assert torch.equal(judged, model(other)[0])


def test_group_norm_judges_an_image_by_itself() -> None:
    """Trap 22: an image's logits are the same in any batch, so on one process as on many."""
    model = build_discriminator(norm="group")
    real = batch()
    one_by_one = torch.cat([model(image[None])[0] for image in real])
    assert torch.allclose(model(real)[0], one_by_one, atol=1e-6)
    mixed = build_discriminator(norm="batch")
    assert not torch.allclose(mixed(real)[0], torch.cat([mixed(image[None])[0] for image in real]), atol=1e-3)


def test_a_step_on_a_batch_of_one_is_finite() -> None:
    """Trap 22: with group norm the loss and every gradient are numbers at batch 1, on constant images too."""
    for images in (batch(B=1), torch.zeros(1, 3, 32, 32)):
        model = build_discriminator(norm="group")
        real, fake = model(images, images)
        torch.autograd.backward(discriminator_loss(real, fake, "hinge").total)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(("layers", "patch"), [(3, 70), (2, 34)])
def test_each_logit_judges_a_patch(layers: int, patch: int) -> None:
    """The patch's size is the paper's: three strided layers judge 70x70 pixels."""
    model = build_discriminator(layers=layers, norm="batch").eval().double()
    for place, module in enumerate(model.layers):  # its statistics are of whole batches
        if isinstance(module, nn.BatchNorm2d):
            model.layers[place] = nn.Identity()
    x = torch.randn(1, 3, 96, 96, dtype=torch.float64, requires_grad=True)
    (logits,) = model(x)
    middle = logits.shape[-1] // 2
    (gradient,) = torch.autograd.grad(logits[0, 0, middle, middle], x)
    rows = gradient.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert int(rows[-1] - rows[0]) + 1 == patch


@pytest.mark.parametrize("channels", [1, 3])
def test_one_channel_or_three(channels: int) -> None:
    """Grey images are judged too, and every batch has logits of its own size."""
    first, second = build_discriminator(channels)(torch.randn(2, channels, 32, 32), torch.randn(5, channels, 16, 16))
    assert (first.shape[:2], second.shape[:2]) == ((2, 1), (5, 1))

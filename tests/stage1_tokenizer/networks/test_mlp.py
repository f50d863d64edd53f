"""The multilayer perceptron: sizes, that every code sees every pixel, order of numbers, and that it learns digits."""

from pathlib import Path

import pytest
import torch
from einops import EinopsError
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.none import NoBottleneckConfig
from stage1_tokenizer.data.image_batches import normalise
from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.data.torchvision_sets import MnistConfig
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.networks import build_network
from stage1_tokenizer.networks.mlp import MlpDecoder, MlpNetworkConfig
from stage1_tokenizer.tokenizer import Tokenizer, TokenizerConfig

SIZE = (8, 12)


def built(channels: int = 3, hidden: tuple[int, ...] = (20, 15), factor: int = 4) -> tuple[nn.Module, MlpDecoder]:
    """An MLP for 8x12 images, a grid of 2x3 at factor 4."""
    torch.manual_seed(0)
    config = MlpNetworkConfig(hidden=hidden, factor=factor, latent_channels=5)
    encoder, decoder = build_network(config, channels, SIZE)
    assert isinstance(decoder, MlpDecoder)
    return encoder, decoder


def mnist(hidden: tuple[int, ...] = (300, 300)) -> Tokenizer:
    torch.manual_seed(0)
    network = MlpNetworkConfig(hidden=hidden, latent_channels=8)
    return Tokenizer(
        TokenizerConfig(image_size=(28, 28), image_channels=1, network=network, bottleneck=NoBottleneckConfig())
    )


@pytest.mark.parametrize("hidden", [(), (20,), (20, 15), (9, 11, 13)], ids=str)
@pytest.mark.parametrize("factor", [1, 2, 4])
@pytest.mark.parametrize("channels", [1, 3])
def test_sizes_and_the_mirror(hidden: tuple[int, ...], factor: int, channels: int) -> None:
    """The latent grid that the rest computes with, and a decoder whose widths are the encoder's in reverse."""
    encoder, decoder = built(channels, hidden, factor)
    z = encoder(torch.randn(2, channels, *SIZE))
    assert z.shape == (2, 5, 8 // factor, 12 // factor)
    assert decoder(z).shape == (2, channels, *SIZE)
    down = [tuple(layer.weight.shape) for layer in encoder.modules() if isinstance(layer, nn.Linear)]
    up = [tuple(layer.weight.shape) for layer in decoder.modules() if isinstance(layer, nn.Linear)]
    assert [shape[0] for shape in down[:-1]] == list(hidden)
    assert up == [(c_in, c_out) for c_out, c_in in reversed(down)]
    assert sum(isinstance(layer, nn.ReLU) for layer in encoder.modules()) == len(hidden)


def test_mnist_at_the_defaults_has_a_grid_of_4x4() -> None:
    """28 is not divisible by 8, so the factor is 7; 300-300 on both sides, as the config promises."""
    model = mnist()
    assert model.encoder(torch.zeros(1, 1, 28, 28)).shape == (1, 8, 4, 4)
    widths = [layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert widths == [300, 300, 8 * 16, 300, 300, 784]


def test_every_code_sees_every_pixel_and_every_pixel_every_code() -> None:
    """The Jacobians have no structural zero in either direction, unlike those of convolutions."""
    encoder, decoder = built()
    x = torch.randn(3, *SIZE)
    down = torch.autograd.functional.jacobian(lambda image: encoder(image[None])[0], x)  # type: ignore[no-untyped-call]
    assert down.shape == (5, 2, 3, 3, *SIZE)
    assert (down != 0).all()
    z = torch.randn(5, 2, 3)
    up = torch.autograd.functional.jacobian(lambda latent: decoder(latent[None])[0], z)  # type: ignore[no-untyped-call]
    assert (up != 0).all()


def test_numbers_keep_their_places_in_channels_last() -> None:
    """Training lays images out channels_last: a flattening by memory would shuffle the pixels that the weights know."""
    encoder, decoder = built()
    x = torch.randn(2, 3, *SIZE)
    z = encoder(x)
    # By hand: a row-major list of the numbers (C, H, W), each with its column of the first weight.
    first, *others = [layer for layer in encoder.modules() if isinstance(layer, nn.Linear)]
    numbers = torch.tensor([[x[b, c, i, j] for c in range(3) for i in range(8) for j in range(12)] for b in range(2)])
    y = numbers @ first.weight.T + first.bias
    for layer in others:
        y = layer(y.relu())
    assert torch.allclose(z, torch.stack([y[:, d * 6 : d * 6 + 6].reshape(2, 2, 3) for d in range(5)], 1), atol=1e-6)
    encoder, decoder = encoder.to(memory_format=torch.channels_last), decoder.to(memory_format=torch.channels_last)
    assert torch.equal(encoder(x.contiguous(memory_format=torch.channels_last)), z)
    assert torch.equal(decoder(z.contiguous(memory_format=torch.channels_last)), decoder(z))


@pytest.mark.parametrize("size", [(12, 8), (8, 8), (16, 12), (4, 24)], ids=str)
def test_another_image_size_is_an_error(size: tuple[int, int]) -> None:
    """(12, 8) and (4, 24) have just as many numbers as (8, 12), and would run, on pixels in the wrong places."""
    encoder, decoder = built()
    with pytest.raises(EinopsError):
        encoder(torch.randn(1, 3, *size))
    with pytest.raises(EinopsError):
        decoder(torch.randn(1, 5, size[0] // 4, size[1] // 4))


def test_a_size_that_the_factor_does_not_divide_is_refused() -> None:
    """The grid would be rounded down; the message names the sizes that fit."""
    network = MlpNetworkConfig(factor=7)
    with pytest.raises(ConfigError, match=r"32x32 is not divisible.*7.*28x28 and 35x35"):
        Tokenizer(
            TokenizerConfig(image_size=(32, 32), image_channels=1, network=network, bottleneck=NoBottleneckConfig())
        )


@pytest.mark.parametrize("hidden", [(), (20, 15)], ids=str)
def test_last_weight_is_that_of_the_last_layer(hidden: tuple[int, ...]) -> None:
    """Trap 15: with it at zero only the last bias is left, the same image whatever the latent is."""
    _, decoder = built(hidden=hidden)
    weight = decoder.last_weight
    assert any(weight is parameter for parameter in decoder.parameters())
    z = torch.randn(2, 5, 2, 3)
    assert not torch.allclose(*decoder(z))
    with torch.no_grad():
        weight.zero_()
    assert torch.equal(*decoder(z))


def overfit(model: Tokenizer, x: Tensor, steps: int) -> float:
    """Mean squared error on x after so many steps on x."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    error = torch.zeros(())
    for _ in range(steps):
        error = (model(x)[0] - x).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    return float(error.detach())


def test_it_learns_a_few_digits_by_heart(real_data: Path) -> None:
    """Eight digits through 128 numbers; a layer without gradient or a ReLU at the end would keep the error up."""
    config = MnistConfig(root=str(real_data / "mnist"), image_size=(28, 28), cache="none")
    images = open_data(config).image_batches("validation", seed=0)
    x = normalise(images.batch(torch.arange(8).numpy())[0])
    assert overfit(mnist(), x, steps=150) < 0.03 * float((x - x.mean(dim=0)).square().mean())


def test_it_learns_noise_by_heart() -> None:
    """The same without real data: pixels that have nothing to do with each other are each reproduced in their place."""
    x = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert overfit(mnist(), x, steps=120) < 0.03 * float(x.var())


def test_an_empty_or_zero_width_is_refused() -> None:
    """A layer of no width would make every image the same one."""
    with pytest.raises(ValueError, match="hidden"):
        MlpNetworkConfig(hidden=(300, 0))
    with pytest.raises(ValueError, match="factor"):
        MlpNetworkConfig(factor=0)

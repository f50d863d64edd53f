"""Encoders and decoders: sizes, what a latent position sees, where attention stands, and which layer is the last."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stage1_tokenizer.networks import NetworkConfig, build_network
from stage1_tokenizer.networks.sonnet import SonnetNetworkConfig
from stage1_tokenizer.networks.vqgan import AttentionBlock, Upsample, VqganNetworkConfig

TINY_SONNET: dict[str, Any] = {"channels": 8, "residual_channels": 4, "latent_channels": 5}
TINY_VQGAN: dict[str, Any] = {"channels": 4, "latent_channels": 5}
NETWORKS: list[tuple[NetworkConfig, int]] = [
    *((SonnetNetworkConfig(factor=factor, **TINY_SONNET), factor) for factor in (2, 4, 8, 16)),
    (SonnetNetworkConfig(factor=4, local=True, blocks=0, **TINY_SONNET), 4),
    *(
        (VqganNetworkConfig(multipliers=(1, 2, 3, 1)[:levels], **TINY_VQGAN), 2 ** (levels - 1))
        for levels in (1, 2, 3, 4)
    ),
    (VqganNetworkConfig(multipliers=(2, 1), blocks=2, attention=(0, 1), dropout=0.1, **TINY_VQGAN), 2),
]


def built(config: NetworkConfig, channels: int = 3) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    return build_network(config, channels, image_size=(16, 16))


@pytest.mark.parametrize(("config", "factor"), NETWORKS, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("channels", [1, 3])
def test_sizes(config: NetworkConfig, factor: int, channels: int) -> None:
    """The factor that stage two computes with is the true one, for non-square images and 1 or 3 channels too."""
    assert config.factor == factor
    encoder, decoder = built(config, channels)
    z = encoder(torch.randn(2, channels, 2 * factor, 3 * factor))
    assert z.shape == (2, config.latent_channels, 2, 3)
    assert decoder(z).shape == (2, channels, 2 * factor, 3 * factor)


@pytest.mark.parametrize("factor", [1, 3, 6, 0])
def test_a_factor_that_is_no_power_of_two_is_refused(factor: int) -> None:
    """The network could only give the nearest power of two, and every size after it would be wrong."""
    with pytest.raises(ValueError, match="factor"):
        SonnetNetworkConfig(factor=factor)


def seen_by(encoder: nn.Module, row: int, column: int, size: int = 40) -> Tensor:
    """Return the pixels (size, size) that one latent position depends on: those with a nonzero Jacobian."""
    x = torch.randn(16, 3, size, size, dtype=torch.float64, requires_grad=True)
    latent = encoder.double()(x)[:, :, row, column]
    (gradient,) = torch.autograd.grad((latent * torch.randn_like(latent)).sum(), x)
    return gradient.abs().sum(dim=(0, 1)) > 0


def extent(mask: Tensor) -> tuple[int, int, int, int]:
    """First and last row, first and last column where the mask holds."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return int(rows[0]), int(rows[-1]), int(columns[0]), int(columns[-1])


def test_a_local_code_sees_its_own_patch_and_little_else() -> None:
    """Two strided 4x4 kernels see 10x10 pixels, three around the own patch; that is what `local` promises."""
    encoder, _ = built(SonnetNetworkConfig(factor=4, local=True, blocks=2, **TINY_SONNET))
    mask = seen_by(encoder, row=5, column=4)
    assert extent(mask) == (4 * 5 - 3, 4 * 5 + 6, 4 * 4 - 3, 4 * 4 + 6)
    assert mask[20:24, 16:20].all()
    wide, _ = built(SonnetNetworkConfig(factor=4, local=False, blocks=2, **TINY_SONNET))
    first, last, _, _ = extent(seen_by(wide, row=5, column=4))
    assert last - first + 1 == 10 + 4 * 2 * 3, "three 3x3 kernels at a quarter of the resolution"


def test_the_local_decoder_looks_around() -> None:
    """Only the encoder is local: a patch is drawn with its neighbours in view, or seams would show."""
    _, decoder = built(SonnetNetworkConfig(factor=4, local=True, blocks=2, **TINY_SONNET))
    z = torch.randn(16, 5, 11, 11, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(decoder.double()(z)[:, :, 20:24, 20:24].abs().sum(), z)
    first, last, left, right = extent(gradient.abs().sum(dim=(0, 1)) > 0)
    assert min(last - first, right - left) + 1 >= 7


def attention_at(encoder_or_decoder: nn.Module, given: Tensor) -> list[tuple[int, int]]:
    """(channels, height) at which each attention block runs."""
    found: list[tuple[int, int]] = []
    for module in encoder_or_decoder.modules():
        if isinstance(module, AttentionBlock):
            module.register_forward_hook(lambda _m, inputs, _o: found.append((inputs[0].shape[1], inputs[0].shape[2])))
    encoder_or_decoder(given)
    return found


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("middle", [True, False])
@pytest.mark.parametrize("levels", [(), (0,), (2,), (1, 2)], ids=str)
def test_attention_stands_where_the_config_says(levels: tuple[int, ...], middle: bool, blocks: int) -> None:
    """After each residual block of the named levels, at their width and resolution, and in the middle if wanted."""
    config = VqganNetworkConfig(
        channels=4, multipliers=(1, 2, 3), blocks=blocks, attention=levels, middle_attention=middle, latent_channels=5
    )
    encoder, decoder = built(config)
    in_the_middle = [(12, 4)] * middle
    at_level = {level: (4 * config.multipliers[level], 16 // 2**level) for level in levels}
    down = [place for level in levels for place in [at_level[level]] * blocks]
    up = [place for level in reversed(levels) for place in [at_level[level]] * (blocks + 1)]
    assert attention_at(encoder, torch.randn(1, 3, 16, 16)) == down + in_the_middle
    assert attention_at(decoder, torch.randn(1, 5, 4, 4)) == in_the_middle + up


def test_attention_is_the_textbook_formula() -> None:
    """softmax(q k / sqrt(c)) v over all positions, added to the input; written out position by position."""
    torch.manual_seed(0)
    block = AttentionBlock(6).double()
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    q, k, v = block.qkv(block.norm(x)).flatten(2).chunk(3, dim=1)  # each (B, c, h*w)
    y = torch.stack(
        [v[b] @ ((k[b].T @ q[b, :, i]) / 6**0.5).softmax(0) for b in range(2) for i in range(12)]
    )  # (B * h*w, c)
    expected = x + block.out(y.reshape(2, 3, 4, 6).permute(0, 3, 1, 2))
    assert torch.allclose(block(x), expected)


def test_attention_at_a_level_that_is_not_there_is_refused() -> None:
    """It would silently be left out."""
    with pytest.raises(ValueError, match="level 3"):
        VqganNetworkConfig(multipliers=(1, 2, 4), attention=(3,))


@pytest.mark.parametrize(("config", "_factor"), NETWORKS, ids=lambda value: str(value)[:60])
@pytest.mark.parametrize("channels", [1, 3])
def test_last_weight_is_that_of_the_last_layer(config: NetworkConfig, _factor: int, channels: int) -> None:
    """Trap 15: with it at zero only the last bias is left, so every pixel passes through it and nothing comes after."""
    _, decoder = built(config, channels)
    weight = decoder.last_weight
    assert any(weight is parameter for parameter in decoder.parameters())
    assert channels in weight.shape[:2]
    z = torch.randn(2, config.latent_channels, 2, 3)
    with torch.no_grad():
        before = decoder(z)
        weight.zero_()
        after = decoder(z)
    assert not torch.equal(before, after)
    assert torch.equal(after, after[:1, :, :1, :1].expand_as(after))


@pytest.mark.parametrize("size", [(32, 16), (16, 16), (4, 5)], ids=str)
def test_upsampling_is_nearest_neighbour_and_a_convolution(size: tuple[int, int]) -> None:
    """The transposed convolution on a CPU equals both steps: forward and both gradients."""
    torch.manual_seed(0)
    layer = Upsample(6).double()
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    expected = layer.conv(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))
    output_gradient = torch.randn_like(expected)
    inputs = [x, *layer.parameters()]
    for got, wanted in zip(
        [layer(x), *torch.autograd.grad(layer(x), inputs, output_gradient)],
        [expected, *torch.autograd.grad(expected, inputs, output_gradient)],
        strict=True,
    ):
        assert torch.allclose(got, wanted, rtol=1e-10, atol=1e-10)


def test_without_gradients_the_same_numbers_come_out_and_the_input_is_left_alone() -> None:
    """Sums and SiLU then write over their arguments; none of these may be one that is needed again."""
    torch.manual_seed(0)
    config = VqganNetworkConfig(channels=8, multipliers=(1, 2, 2), attention=(1,), latent_channels=5)
    encoder, decoder = (network.eval().double() for network in build_network(config, 3, (32, 32)))
    for network, given in ((encoder, torch.randn(2, 3, 32, 32)), (decoder, torch.randn(2, 5, 24, 24))):
        x = given.double()
        expected = network(x)
        with torch.inference_mode():
            first, second = network(x), network(x)
        assert torch.allclose(first, expected, rtol=0, atol=1e-12)
        assert torch.equal(first, second)
        assert torch.equal(x, given.double())

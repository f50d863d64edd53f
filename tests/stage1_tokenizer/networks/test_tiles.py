"""Tiles: equal to the whole image where the network allows it, on the same grid, without seams, and what is refused."""

from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor

from stage1_tokenizer.bottlenecks.none import NoBottleneckConfig
from stage1_tokenizer.bottlenecks.vq import VqConfig
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.networks.mlp import MlpNetworkConfig
from stage1_tokenizer.networks.sonnet import SonnetNetworkConfig
from stage1_tokenizer.networks.tiles import Tiles, decode_codes, encode_codes, tiles_for
from stage1_tokenizer.networks.vqgan import VqganNetworkConfig
from stage1_tokenizer.tokenizer import Tokenizer, TokenizerConfig

SONNET = SonnetNetworkConfig(factor=2, channels=8, residual_channels=4, blocks=1, latent_channels=6)
VQGAN = VqganNetworkConfig(channels=4, multipliers=(1, 2), latent_channels=6)


def tokenizer(network: Any = SONNET, **options: Any) -> Tokenizer:
    """Trained on 16x24 images; 32 codes."""
    torch.manual_seed(0)
    default = {"image_size": (16, 24), "image_channels": 3, "bottleneck": VqConfig(codebook_size=32)}
    made = Tokenizer(TokenizerConfig(**{**default, "network": network, **options}))
    made(torch.randn(4, 3, 16, 24))
    return made.eval().requires_grad_(False)


def drawn(*size: int) -> Tensor:
    return torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("factor", [2, 4])
@pytest.mark.parametrize("blocks", [0, 2])
def test_a_network_of_known_reach_gives_what_it_gives_for_the_whole_image(
    local: bool, factor: int, blocks: int
) -> None:
    """An overlap of twice the reach gives latents and pixels of the whole image everywhere, also at seams."""
    model = tokenizer(SONNET.model_copy(update={"local": local, "factor": factor, "blocks": blocks})).double()
    reach = model.config.network.reach
    tiles = Tiles((4 * reach, 4 * reach + 1), 2 * reach, reach)
    x = drawn((9 * reach + 1) * factor, (6 * reach) * factor).double()
    z = tiles.encode(lambda tile: rearrange(model.encoder(tile), "B D h w -> B h w D"), x, factor)
    assert torch.allclose(z, rearrange(model.encoder(x), "B D h w -> B h w D"), rtol=0, atol=1e-12)
    image = tiles.decode(lambda tile: model.decoder(rearrange(tile, "B h w D -> B D h w")), z, factor)
    assert torch.allclose(image, model.decoder(rearrange(z, "B h w D -> B D h w")), rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.parametrize("factor", [2, 8])
def test_reach_is_as_far_as_a_network_sees(side: str, factor: int) -> None:
    """A change beyond it moves nothing; the bound is tight to a latent, or tiles would overlap for nothing."""
    network = SONNET.model_copy(update={"factor": factor})
    model, reach, side_latents = tokenizer(network, image_size=(32, 32)).double(), network.reach, 21
    scale = factor if side == "encoder" else 1
    given = torch.randn(1, 3 if side == "encoder" else 6, side_latents * scale, side_latents * scale).double()
    changed = given.clone()
    middle = slice(10 * scale, 11 * scale)
    changed[:, :, middle, middle] += 1.0
    run = getattr(model, side)
    moved = (run(given) != run(changed)).any(dim=1)[0].any(dim=1).nonzero()[:, 0] // (factor // scale)
    furthest = max(10 - int(moved.min()), int(moved.max()) - 10)
    assert reach - 1 <= furthest <= reach


@pytest.mark.parametrize("network", [SONNET, VQGAN], ids=lambda config: config.kind)
@pytest.mark.parametrize("size", [(16, 24), (8, 24), (16, 2)])
def test_an_image_no_larger_than_a_tile_goes_the_plain_way(network: Any, size: tuple[int, int]) -> None:
    """Bit for bit, so that nothing changes for anyone who has no large images."""
    model, x = tokenizer(network), drawn(*size)
    tiles = tiles_for(model.config)
    codes = encode_codes(model, x, tiles)
    assert torch.equal(codes, model.encode_codes(x))
    assert torch.equal(decode_codes(model, codes, tiles), model.decode_codes(codes))


def reference(tiles: Tiles, length: int, axis: int, factor: int) -> tuple[Tensor, Tensor]:
    """One side, number by number: which tile each latent is taken from, and the weight of each tile at each pixel."""
    size = tiles.size[axis]
    count = 1
    while size + (count - 1) * (size - tiles.overlap) < length:
        count += 1
    starts = [round(number * (length - size) / (count - 1)) for number in range(count)]
    nearest = [
        min(range(count), key=lambda k: (abs(latent + 0.5 - starts[k] - size / 2), -k)) for latent in range(length)
    ]
    weights = torch.zeros(count, length * factor)
    for pixel in range(length * factor):
        for k, start in enumerate(starts):
            distances = [pixel + 0.5 - start * factor] * (k > 0)
            distances += [(start + size) * factor - pixel - 0.5] * (k < count - 1)
            weights[k, pixel] = max(0.0, min(distances, default=1.0)) * (
                start * factor <= pixel < (start + size) * factor
            )
    return torch.tensor(nearest), weights / weights.sum(dim=0)


@pytest.mark.parametrize("overlap", [0, 1, 3])
@pytest.mark.parametrize("grid", [(9, 20), (8, 13), (31, 12)])
def test_codes_come_from_the_middle_and_pixels_are_blended(grid: tuple[int, int], overlap: int) -> None:
    """Against a slow reference, with tiles that show their number in place of an image."""
    tiles, factor = Tiles((8, 12), overlap), 2
    seen: list[Tensor] = []

    def number(_: Tensor) -> int:
        seen.append(_)
        return len(seen) - 1

    codes = tiles.encode(
        lambda x: torch.full((1, x.shape[2] // factor, x.shape[3] // factor, 1), number(x)),
        torch.zeros(1, 3, grid[0] * factor, grid[1] * factor),
        factor,
    )
    sides = []
    for axis, length in enumerate(grid):
        if length <= tiles.size[axis]:
            sides.append((torch.zeros(length, dtype=torch.long), torch.ones(1, length * factor)))
        else:
            sides.append(reference(tiles, length, axis, factor))
    (rows, down), (columns, right) = sides
    assert torch.equal(codes[0, :, :, 0], rows[:, None] * len(right) + columns)
    assert max(x.shape[2] * x.shape[3] for x in seen) <= 8 * 12 * factor**2, "no tile is larger than it may be"

    seen.clear()
    image = tiles.decode(
        lambda given: torch.full((1, 1, given.shape[1] * factor, given.shape[2] * factor), float(number(given))),
        codes,
        factor,
    )
    numbers = torch.arange(len(down) * len(right), dtype=torch.float32).view(len(down), len(right))
    assert torch.allclose(image[0, 0], down.T @ numbers @ right, atol=1e-4)


def test_a_constant_stays_constant() -> None:
    """The weights of all tiles sum to one at every pixel, with a reach that takes the whole overlap too."""
    for tiles in (Tiles((8, 12), 4), Tiles((8, 12), 4, 2), Tiles((8, 12), 3, 9), Tiles((5, 5), 0)):
        codes = torch.zeros(1, 27, 33, 1)
        image = tiles.decode(lambda c: torch.ones(1, 3, 2 * c.shape[1], 2 * c.shape[2]).bfloat16(), codes, 2)
        assert image.dtype == torch.float32, "blended in float32, whatever a tile was decoded in"
        assert image.shape == (1, 3, 54, 66)
        assert torch.allclose(image, torch.ones(()), atol=1e-6)


def test_a_normalising_network_gets_tiles_of_the_size_that_it_was_trained_on() -> None:
    """Its statistics are then taken over as much of an image as in training; the grid stays that of the whole image."""
    model = tokenizer(VQGAN)
    tiles = tiles_for(model.config)
    assert tiles == Tiles((8, 12), 2)
    codes = encode_codes(model, drawn(40, 26), tiles)
    assert codes.shape == (2, 20, 13, 1)
    assert decode_codes(model, codes, tiles).shape == (2, 3, 40, 26)


def test_the_default_tiles_of_a_plain_network_are_exact() -> None:
    """Whoever gives no sizes gets equality with the whole image."""
    tiles = tiles_for(tokenizer().config)
    assert tiles == Tiles((128, 128), 2 * SONNET.reach, SONNET.reach)


def test_sizes_that_do_not_fit_are_refused() -> None:
    """The message has the value and what is allowed."""
    config = tokenizer().config
    with pytest.raises(ConfigError, match=r"tile 33: must be a multiple of the tokenizer's factor 2.* 32 and 34"):
        tiles_for(config, tile=33)
    with pytest.raises(ConfigError, match="overlap 3: must be a multiple"):
        tiles_for(config, overlap=3)
    with pytest.raises(ConfigError, match="overlap 18: is more than half of a tile of 32x32"):
        tiles_for(config, tile=32, overlap=18)
    assert tiles_for(config, tile=32, overlap=16) == Tiles((16, 16), 8, SONNET.reach)


def test_a_fully_connected_network_takes_its_own_size_alone() -> None:
    """It has weights for every pixel of one size; a message says so, and no error of shapes."""
    model = tokenizer(MlpNetworkConfig(hidden=(8,), factor=4, latent_channels=3))
    tiles = tiles_for(model.config)
    assert encode_codes(model, drawn(16, 24), tiles).shape == (2, 4, 6, 1)
    for size in ((32, 24), (16, 20)):
        with pytest.raises(ConfigError, match=rf"{size[0]}x{size[1]}: .*multilayer perceptron.*only 16x24"):
            encode_codes(model, drawn(*size), tiles)
    with pytest.raises(ConfigError, match="multilayer perceptron"):
        decode_codes(model, torch.zeros(1, 8, 6, 1, dtype=torch.long), tiles)


def test_a_continuous_latent_has_no_codes_in_tiles_either() -> None:
    """The tokenizer's own message, and no assertion."""
    model = tokenizer(bottleneck=NoBottleneckConfig())
    with pytest.raises(ConfigError, match="continuous"):
        encode_codes(model, drawn(600, 600), tiles_for(model.config))

"""Encode and decode images of any size with a tokenizer, in overlapping tiles and with the memory of one tile.

    encode   each tile -> its codes; each code is taken from the tile whose middle is nearest
    decode   each tile -> its pixels; where tiles overlap, their pixels are blended linearly

Codes have the same grid as if the image were encoded whole. An image that fits into one tile is encoded whole.

Near its edges a tile gives other results than the whole image. A network without normalisation and attention (sonnet)
depends only on what lies within its `reach`. If this much is dropped at the edges of tiles, the result is that of the
whole image, up to rounding. With GroupNorm and attention (vqgan) each result depends on the whole tile, so there is no
such equality. Its tiles have the size of the training images, for which it works best: a VQGAN trained on CIFAR-10
(32x32 pixels) reconstructed images of 128x128 with 24.7 dB in tiles, and with 21.5 dB whole.

Memory beyond weights, image and result: about 6 x channels x 4 bytes per pixel of a tile and image of a batch, for a
few activations at full resolution; 200 MB for 256x256 pixels and 128 channels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor

from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.tokenizer import Tokenizer, TokenizerConfig

SMALLEST_TILE = 256
"""Smallest side of a default tile, in pixels, for a network that works for any size; smaller tiles are slow."""


@dataclass(frozen=True)
class Tiles:
    """Sizes by which images are cut into tiles, in latents."""

    size: tuple[int, int]
    """Height and width of a tile."""
    overlap: int
    """Smallest overlap of neighbouring tiles; at most half a tile."""
    reach: int = 0
    """Width of the margin that is dropped at a tile's edge, as far as the overlap allows."""

    def holds(self, grid: tuple[int, int]) -> bool:
        """Return True if one tile holds a whole image with this latent grid (h, w)."""
        return grid[0] <= self.size[0] and grid[1] <= self.size[1]

    def encode(self, encode: Callable[[Tensor], Tensor], x: Tensor, factor: int) -> Tensor:
        """x (B, C, H, W) -> codes (B, h, w, K); `encode` does this for one tile."""
        grid = (x.shape[2] // factor, x.shape[3] // factor)
        if self.holds(grid):
            return encode(x)
        codes: Tensor | None = None
        for rows, columns in product(*(self._cut(length, axis) for axis, length in enumerate(grid))):
            tile = encode(x[:, :, _to_pixels(rows.whole, factor), _to_pixels(columns.whole, factor)])  # (B, th, tw, K)
            if codes is None:
                codes = tile.new_empty((len(x), *grid, tile.shape[3]))
            codes[:, rows.own, columns.own] = tile[:, rows.inside, columns.inside]
        assert codes is not None
        return codes

    def decode(self, decode: Callable[[Tensor], Tensor], codes: Tensor, factor: int) -> Tensor:
        """codes (B, h, w, K) -> images (B, C, H, W); `decode` does this for one tile."""
        grid = (codes.shape[1], codes.shape[2])
        if self.holds(grid):
            return decode(codes)
        image: Tensor | None = None
        pieces = [self._cut(length, axis) for axis, length in enumerate(grid)]
        down, right = (
            self._weights(side, length, factor).to(codes.device) for side, length in zip(pieces, grid, strict=True)
        )
        for (i, rows), (j, columns) in product(enumerate(pieces[0]), enumerate(pieces[1])):
            tile = decode(codes[:, rows.whole, columns.whole])  # (B, C, th * factor, tw * factor)
            if image is None:
                size = (*tile.shape[:2], grid[0] * factor, grid[1] * factor)
                image = tile.new_zeros(size, dtype=torch.promote_types(tile.dtype, torch.float32))
            place = (_to_pixels(rows.whole, factor), _to_pixels(columns.whole, factor))
            image[:, :, *place] += tile * down[i, place[0], None] * right[j, place[1]]
        assert image is not None
        return image

    def _cut(self, length: int, axis: int) -> list["Piece"]:
        """Cut one side of `length` latents into tiles, evenly spread."""
        size = min(self.size[axis], length)
        count = 1 if length == size else -(-(length - self.overlap) // (size - self.overlap))
        starts = [round(number * (length - size) / max(1, count - 1)) for number in range(count)]
        # A latent belongs to the tile whose middle is nearest, so borders are halfway between two middles.
        borders = [0, *((a + b + size) // 2 for a, b in pairwise(starts)), length]
        return [Piece(*numbers) for numbers in zip(starts, [size] * count, borders, borders[1:], strict=False)]

    def _weights(self, pieces: list["Piece"], length: int, factor: int) -> Tensor:
        """Compute each tile's blending weight at each pixel of one side: (tiles, length * factor), columns of sum 1."""
        pixels = torch.arange(length * factor, dtype=torch.float32) + 0.5
        dropped = min(self.reach * factor, self.overlap * factor // 2)
        weights = []  # (length * factor,) each
        for number, piece in enumerate(pieces):
            begin, end = piece.start * factor, (piece.start + piece.size) * factor
            after = pixels - begin - dropped if number > 0 else torch.full_like(pixels, float(end - begin))
            before = end - dropped - pixels if number < len(pieces) - 1 else torch.full_like(pixels, float(end - begin))
            inside = (pixels > begin) & (pixels < end)
            weights.append(torch.minimum(after, before).clamp_min(0.0) * inside)
        stacked = torch.stack(weights)
        return stacked / stacked.sum(dim=0)


@dataclass(frozen=True)
class Piece:
    """One tile along one side, in latents: where it lies, and which part of it is used for codes."""

    start: int
    size: int
    own_start: int
    own_end: int

    @property
    def whole(self) -> slice:
        """Slice of the whole grid that the tile covers."""
        return slice(self.start, self.start + self.size)

    @property
    def own(self) -> slice:
        """Slice of the whole grid whose codes come from this tile."""
        return slice(self.own_start, self.own_end)

    @property
    def inside(self) -> slice:
        """The slice `own`, counted from the tile's start."""
        return slice(self.own_start - self.start, self.own_end - self.start)


def _to_pixels(latents: slice, factor: int) -> slice:
    return slice(latents.start * factor, latents.stop * factor)


def tiles_for(config: TokenizerConfig, tile: int | None = None, overlap: int | None = None) -> Tiles:
    """Choose the tiles for a tokenizer.

    tile: side in pixels; None: the training size, or at least 256 pixels for a network with a limited reach.
    overlap: in pixels; None: a quarter of a tile, or for a limited reach enough for equality with the whole image.

    Raises:
        ConfigError: the factor does not divide a size, or the overlap is more than half a tile.
    """
    network, factor = config.network, config.network.factor
    height, width = config.image_size
    if reach := network.reach:
        least = max(SMALLEST_TILE, 4 * reach * factor)  # with 4 x reach, at most half a tile is overlap
        height, width = max(height, least), max(width, least)
    for name, pixels in (("tile", tile), ("overlap", overlap)):
        if pixels is not None and pixels % factor:
            below = max(factor, pixels // factor * factor)
            raise ConfigError(
                f"{name} {pixels}: must be a multiple of the tokenizer's factor {factor}; the nearest are {below} and "
                f"{below + factor}"
            )
    size = (height // factor, width // factor) if tile is None else (tile // factor, tile // factor)
    half = min(size) // 2
    default = min(half, 2 * reach) if reach else min(size) // 4
    latents = default if overlap is None else overlap // factor
    if latents > half:
        raise ConfigError(
            f"overlap {latents * factor}: is more than half of a tile of {size[0] * factor}x{size[1] * factor} pixels"
        )
    return Tiles(size, latents, reach)


def encode_codes(tokenizer: Tokenizer, x: Tensor, tiles: Tiles) -> Tensor:
    """Encode x (B, C, H, W) in [-1, 1], of any size that the factor divides, to codes (B, h, w, K) int64.

    Raises:
        ConfigError: the network only takes images of the training size, or the tokenizer has no codes.
    """
    factor = tokenizer.config.network.factor
    _check_network(tokenizer.config, (x.shape[2], x.shape[3]))
    return tiles.encode(tokenizer.encode_codes, x, factor)


def decode_codes(tokenizer: Tokenizer, codes: Tensor, tiles: Tiles) -> Tensor:
    """Decode codes (B, h, w, K) int64 of any grid to images (B, C, h * factor, w * factor).

    Raises:
        ConfigError: the network only takes images of the training size.
        ValueError: a code is outside 0..V-1.
    """
    factor = tokenizer.config.network.factor
    _check_network(tokenizer.config, (codes.shape[1] * factor, codes.shape[2] * factor))
    return tiles.decode(tokenizer.decode_codes, codes, factor)


def _check_network(config: TokenizerConfig, size: tuple[int, int]) -> None:
    """Raise ConfigError if the network only takes images of the training size, and this is another size."""
    if config.network.name_of_one_size and size != config.image_size:
        raise ConfigError(
            f"an image of {size[0]}x{size[1]}: this tokenizer's network is a {config.network.name_of_one_size}, which "
            f"takes only {config.image_size[0]}x{config.image_size[1]}, also in tiles; resize the image to this size"
        )

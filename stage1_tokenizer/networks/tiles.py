"""Images of any size through a tokenizer in overlapping tiles, with the memory of one tile.

    encode   each tile -> its codes; each code is taken from the tile in whose middle it lies best
    decode   each tile -> its pixels; where tiles overlap, they are blended along a line from the one to the other

Codes lie on the same grid as if the image were encoded whole, and an image no larger than a tile goes the plain way,
bit for bit. What a tile gives at its edges is not what the whole image would give there. A network without
normalisation and attention (sonnet) sees no further than its `reach`; so much is dropped at the edges of its tiles, and
the result is that of the whole image up to rounding. GroupNorm and attention (vqgan) see the whole of what they are
given, so there is no such equality. Their tiles have the size of the training images, which is what they have learned:
a CIFAR-10 VQGAN of 32x32 reconstructed photographs of 128x128 with 24.7 dB in tiles, with 21.5 dB whole.

Memory beyond the weights, the image and its result: about 6 x channels x 4 bytes for each pixel of a tile (the widest
activations, at full resolution, a few at a time): 200 MB for 256x256 pixels and 128 channels, times the batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor

from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.tokenizer import Tokenizer, TokenizerConfig

SMALLEST = 256
"""Pixels a side of the least tile that is worth its overhead, where the network does not mind the size."""


@dataclass(frozen=True)
class Tiles:
    """How images are cut, in latents."""

    size: tuple[int, int]
    """Height and width of a tile."""
    overlap: int
    """Of neighbours, at least; at most half a tile."""
    reach: int = 0
    """What is wrong at a tile's edge and dropped, as far as the overlap allows."""

    def contain(self, grid: tuple[int, int]) -> bool:
        """Whether one tile holds a whole image of this many latents."""
        return grid[0] <= self.size[0] and grid[1] <= self.size[1]

    def encode(self, encode: Callable[[Tensor], Tensor], x: Tensor, factor: int) -> Tensor:
        """x (B, C, H, W) -> codes (B, h, w, K), by a function that does so for images of the size of a tile."""
        grid = (x.shape[2] // factor, x.shape[3] // factor)
        if self.contain(grid):
            return encode(x)
        codes: Tensor | None = None
        for rows, columns in product(*(self._along(length, axis) for axis, length in enumerate(grid))):
            tile = encode(x[:, :, _pixels(rows.whole, factor), _pixels(columns.whole, factor)])
            if codes is None:
                codes = tile.new_empty((len(x), *grid, tile.shape[3]))
            codes[:, rows.own, columns.own] = tile[:, rows.inside, columns.inside]
        assert codes is not None
        return codes

    def decode(self, decode: Callable[[Tensor], Tensor], codes: Tensor, factor: int) -> Tensor:
        """codes (B, h, w, K) -> image (B, C, H, W), by a function that does so for the codes of a tile."""
        grid = (codes.shape[1], codes.shape[2])
        if self.contain(grid):
            return decode(codes)
        image: Tensor | None = None
        along = [self._along(length, axis) for axis, length in enumerate(grid)]
        down, right = (
            self._weights(pieces, length, factor).to(codes.device) for pieces, length in zip(along, grid, strict=True)
        )
        for (i, rows), (j, columns) in product(enumerate(along[0]), enumerate(along[1])):
            tile = decode(codes[:, rows.whole, columns.whole])  # (B, C, th * factor, tw * factor)
            if image is None:
                size = (*tile.shape[:2], grid[0] * factor, grid[1] * factor)
                image = tile.new_zeros(size, dtype=torch.promote_types(tile.dtype, torch.float32))
            place = (_pixels(rows.whole, factor), _pixels(columns.whole, factor))
            image[:, :, *place] += tile * down[i, place[0], None] * right[j, place[1]]
        assert image is not None
        return image

    def _along(self, length: int, axis: int) -> list["Piece"]:
        """The tiles along one side of `length` latents, evenly spread."""
        size = min(self.size[axis], length)
        count = 1 if length == size else -(-(length - self.overlap) // (size - self.overlap))
        starts = [round(number * (length - size) / max(1, count - 1)) for number in range(count)]
        # A latent belongs to the tile whose middle is nearest: the border is halfway between two middles.
        borders = [0, *((a + b + size) // 2 for a, b in pairwise(starts)), length]
        return [Piece(*numbers) for numbers in zip(starts, [size] * count, borders, borders[1:], strict=False)]

    def _weights(self, pieces: list["Piece"], length: int, factor: int) -> Tensor:
        """How much each tile counts at each pixel along one side: (tiles, length * factor), columns of sum 1."""
        pixels = torch.arange(length * factor, dtype=torch.float32) + 0.5
        dropped = min(self.reach * factor, self.overlap * factor // 2)
        weights = []
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
    """One tile along one side, in latents."""

    start: int
    size: int
    own_start: int
    own_end: int

    @property
    def whole(self) -> slice:
        """What the tile covers of the whole grid."""
        return slice(self.start, self.start + self.size)

    @property
    def own(self) -> slice:
        """What the whole grid takes from this tile."""
        return slice(self.own_start, self.own_end)

    @property
    def inside(self) -> slice:
        """The same, counted from the tile's start."""
        return slice(self.own_start - self.start, self.own_end - self.start)


def _pixels(latents: slice, factor: int) -> slice:
    return slice(latents.start * factor, latents.stop * factor)


def tiles_for(config: TokenizerConfig, tile: int | None = None, overlap: int | None = None) -> Tiles:
    """The tiles of a tokenizer. tile: pixels a side; None: the training size, or what suits a network without
    normalisation. overlap: pixels; None: a quarter of a tile, or enough for equality with the whole image.

    Raises:
        ConfigError: a size that the factor does not divide, or an overlap of more than half a tile.
    """
    network, factor = config.network, config.network.factor
    height, width = config.image_size
    if reach := network.reach:
        least = max(SMALLEST, 4 * reach * factor)  # from 4 x reach on, at most half a tile is overlap
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
    """x (B, C, H, W) in [-1, 1], of any size that the factor divides -> codes (B, h, w, K) int64.

    Raises:
        ConfigError: the network's weights fit the training size alone and this is another, or the tokenizer has no
            codes.
    """
    factor = tokenizer.config.network.factor
    _check_network(tokenizer.config, (x.shape[2], x.shape[3]))
    return tiles.encode(tokenizer.encode_codes, x, factor)


def decode_codes(tokenizer: Tokenizer, codes: Tensor, tiles: Tiles) -> Tensor:
    """codes (B, h, w, K) int64 of any grid -> image (B, C, h * factor, w * factor).

    Raises:
        ConfigError: the network's weights fit the training size alone and this is another.
        ValueError: a code outside 0..V-1.
    """
    factor = tokenizer.config.network.factor
    _check_network(tokenizer.config, (codes.shape[1] * factor, codes.shape[2] * factor))
    return tiles.decode(tokenizer.decode_codes, codes, factor)


def _check_network(config: TokenizerConfig, size: tuple[int, int]) -> None:
    """Raise ConfigError where the network's weights fit the training size alone, and this is another."""
    if config.network.name_of_one_size and size != config.image_size:
        raise ConfigError(
            f"an image of {size[0]}x{size[1]}: this tokenizer's network is a {config.network.name_of_one_size}, which "
            f"takes {config.image_size[0]}x{config.image_size[1]} alone; tiles cannot change that, since it never "
            "learned what lies beside them"
        )

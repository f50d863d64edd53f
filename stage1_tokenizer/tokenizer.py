"""The tokenizer: encoder -> bottleneck -> decoder, and how one is loaded from disk.

The contract with stage two. Images x are float32 (B, C, H, W) in [-1, 1]. Codes are int64 (B, h, w, K) in 0..V-1,
row-major: flattening them as (h w K) gives the sequence that a prior models. In eval mode
`decode_codes(encode_codes(x))` is exactly the reconstruction of `forward(x)`.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks import BottleneckConfig, build_bottleneck
from stage1_tokenizer.bottlenecks.base import Bottlenecked
from stage1_tokenizer.config.base import Config, Tree, config_from_json
from stage1_tokenizer.config.error_messages import quote_value
from stage1_tokenizer.config.value_types import Size
from stage1_tokenizer.config.yaml_and_json import parse_json
from stage1_tokenizer.engine.checkpoint import load_strict, read_weights
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, shorten
from stage1_tokenizer.engine.file_names import describe_path
from stage1_tokenizer.networks import NetworkConfig, build_network

TOKENIZER_FILE = "tokenizer.safetensors"
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class TokenizerConfig(Config):
    """All that is needed to build a tokenizer again; it rides in the header of its file."""

    image_size: Size
    image_channels: Literal[1, 3]
    network: NetworkConfig
    bottleneck: BottleneckConfig


class TokenShape(NamedTuple):
    """Latent grid (h, w), codes per position K, codebook size V."""

    h: int
    w: int
    K: int
    V: int

    @property
    def length(self) -> int:
        """L, the tokens of one image."""
        return self.h * self.w * self.K

    @property
    def in_words(self) -> str:
        """The shape as messages say it."""
        return f"{self.h}x{self.w}x{self.K} codes of {self.V}"


class Tokenizer(nn.Module):
    """Encoder, bottleneck and decoder. `processes`: how many train it together (see build_bottleneck)."""

    def __init__(self, config: TokenizerConfig, processes: int = 1) -> None:
        super().__init__()
        check_image_size(config.image_size, config.network.factor)
        self.config = config
        self.encoder, self.decoder = build_network(config.network, config.image_channels, config.image_size)
        self.bottleneck = build_bottleneck(config.bottleneck, config.network.latent_channels, processes)

    @property
    def shape(self) -> TokenShape:
        """Grid, depth and codebook size of the codes.

        Raises:
            ConfigError: the bottleneck is continuous.
        """
        if self.bottleneck.depth == 0:
            raise ConfigError(
                f"a tokenizer with bottleneck.kind {self.config.bottleneck.kind!r} has a continuous latent and no "
                "codes, so there can be no prior over them; train one with a quantizer, e.g. --bottleneck.kind vq"
            )
        (height, width), factor = self.config.image_size, self.config.network.factor
        return TokenShape(height // factor, width // factor, self.bottleneck.depth, self.bottleneck.codebook_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Bottlenecked]:
        """x (B, C, H, W) in [-1, 1] -> its reconstruction (of that shape, not clamped) and the bottleneck's output."""
        bottlenecked = self.encode(x)
        return self.decode(bottlenecked.z_q), bottlenecked

    def encode(self, x: Tensor) -> Bottlenecked:
        """x (B, C, H, W) -> z_q (B, D, h, w), codes (B, h, w, K) and the bottleneck's loss."""
        bottlenecked: Bottlenecked = self.bottleneck(self.encoder(x))  # z (B, D, h, w)
        return bottlenecked

    def decode(self, z_q: Tensor) -> Tensor:
        """z_q (B, D, h, w) -> image (B, C, H, W)."""
        image: Tensor = self.decoder(z_q)
        return image

    def encode_codes(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> codes (B, h, w, K) int64."""
        codes = self.encode(x).codes
        if codes is None:
            _ = self.shape  # raises, and says why
        assert codes is not None
        return codes

    def decode_codes(self, codes: Tensor) -> Tensor:
        """codes (B, h, w, K) int64 -> image (B, C, H, W).

        Raises:
            ValueError: a code outside 0..V-1. (Indexing would wrap a negative one silently.)
        """
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.shape.V:
            raise ValueError(f"codes must lie in 0..{self.shape.V - 1}, got {int(codes.min())}..{int(codes.max())}")
        return self.decode(self.bottleneck.vectors(codes))


def check_image_size(size: tuple[int, int], factor: int, key: str = "data.image_size") -> None:
    """Raises ConfigError, naming the key and the nearest sizes that fit, unless the factor divides both sides."""
    if size[0] % factor == 0 and size[1] % factor == 0:
        return
    below = [max(factor, side // factor * factor) for side in size]
    above = [-(-side // factor) * factor for side in size]
    raise ConfigError(
        f"{key} {size[0]}x{size[1]} is not divisible by the tokenizer's factor {factor}; "
        f"the nearest sizes are {below[0]}x{below[1]} and {above[0]}x{above[1]}"
    )


def fingerprint(tokenizer: Tokenizer) -> str:
    """A hash of the config and of every weight: tokens and priors belong to the tokenizer that has theirs."""
    digest = hashlib.sha256(tokenizer.config.model_dump_json().encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class LoadedTokenizer:
    """A frozen tokenizer from disk: in eval mode, without gradients, its kernels in channels_last as in training."""

    tokenizer: Tokenizer
    path: Path
    fingerprint: str
    data: Tree
    """The data config with which it was trained."""
    step: int

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu", option: str = "--tokenizer") -> Self:
        """Load `tokenizer.safetensors`, given as the file or as the folder that holds it; `option` is named in errors.

        Raises:
            ConfigError: there is nothing at this path.
            BadFileError: the file is damaged, or is not a tokenizer.
        """
        file = resolve_tokenizer(path, option)
        tensors, header = read_weights(file, kind="tokenizer")
        config = config_from_json(TokenizerConfig, header.get("config"), str(file))
        tokenizer = build_for(tensors, lambda: Tokenizer(config), str(file))
        tokenizer.requires_grad_(False).eval().to(device).to(memory_format=torch.channels_last)
        data = config_tree(header.get("data"), str(file))
        return cls(tokenizer, file, fingerprint(tokenizer), data, saved_step(header, str(file)))


def build_for(tensors: Mapping[str, Tensor], build: Callable[[], ModuleT], source: str) -> ModuleT:
    """What `build` makes, with these weights in it.

    It is made on the meta device first, where tensors have shapes and no memory, and compared with the weights: so a
    header can make nobody take more memory than its file has.

    Raises:
        BadFileError: it cannot be built, or has other names, shapes or number formats than the weights.
    """
    try:
        with torch.device("meta"):
            planned = build()
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise BadFileError(f"{source}: its header describes a model that cannot be built: {error}") from None
    load_strict(planned, {name: tensor.to("meta") for name, tensor in tensors.items()}, source)
    model = build()
    load_strict(model, tensors, source)
    return model


def saved_step(header: Mapping[str, str], source: str) -> int:
    """The training step that a header names, 0 where it names none.

    Raises:
        BadFileError: what it names is no such number.
    """
    step = header.get("step", "0")
    if not (step.isascii() and step.isdecimal() and len(step) <= 18):
        raise BadFileError(f"{source}: its header says step {quote_value(step)}, which is not a number of steps")
    return int(step)


def config_tree(text: str | None, source: str) -> Tree:
    """A JSON object from a header, without knowing its class.

    Raises:
        BadFileError: it is missing or is not an object.
    """
    try:
        tree = parse_json(text)
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise BadFileError(f"{source}: its header does not say which data it was made from")
    return tree


def resolve_tokenizer(path: str | Path, option: str = "--tokenizer") -> Path:
    """The weights of a tokenizer, given as the file or its folder. Raises ConfigError where there are none."""
    return resolve(path, TOKENIZER_FILE, option)


def resolve(path: str | Path, name: str, option: str) -> Path:
    """The file itself, or the file `name` in the folder.

    Raises:
        ConfigError: neither exists.
    """
    path = Path(path)
    try:
        folder = path.is_dir()
        file = path / name if folder else path
        found = file.is_file()
    except OSError as error:  # a name too long, or a folder on the way that is closed to us
        raise ConfigError(f"{option} {shorten(str(path))}: {error.strerror}") from None
    if not found:
        hint = f"the folder holds no {name}" if folder else "there is no such file or folder"
        raise ConfigError(f"{option} {describe_path(path)}: {hint}")
    return file

"""The tokenizer: encoder -> bottleneck -> decoder, and its file `tokenizer.safetensors`.

The contract with stage two:

    image    x      (B, C, H, W)  float32 in [-1, 1]
    codes           (B, h, w, K)  int64 in 0..V-1; flattened row by row as (h w K), they are a prior's sequence
    image    x_hat  (B, C, H, W)  float32, near [-1, 1] but not clamped

In eval mode, `decode_codes(encode_codes(x))` is exactly the reconstruction that `forward(x)` returns.

Source: van den Oord, Vinyals and Kavukcuoglu, "Neural Discrete Representation Learning" (2017), section 3.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks import BottleneckConfig, build_bottleneck
from stage1_tokenizer.bottlenecks.base import Bottlenecked
from stage1_tokenizer.config.base import Config, Tree, config_from_json
from stage1_tokenizer.config.value_types import Size
from stage1_tokenizer.engine.checkpoint import read_weights, write_weights
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.hub import describe_weights, output_folder
from stage1_tokenizer.engine.model_files import read_data_tree, read_step, rebuild, resolve_weights
from stage1_tokenizer.networks import NetworkConfig, build_network

TOKENIZER_FILE = "tokenizer.safetensors"


class TokenizerConfig(Config):
    """All that is needed to build a tokenizer; saved in the header of its weights file."""

    image_size: Size
    """(H, W) in pixels of the images that the tokenizer is trained on."""
    image_channels: Literal[1, 3]
    """C: 1 for grey, 3 for colour images."""
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
        """L = h * w * K, the number of tokens of one image."""
        return self.h * self.w * self.K

    @property
    def in_words(self) -> str:
        """The shape as text for messages: `8x8x1 codes of 256`."""
        return f"{self.h}x{self.w}x{self.K} codes of {self.V}"


class Tokenizer(nn.Module):
    """Encoder, bottleneck and decoder. B images, D latent channels, (h, w) = (H, W) / factor."""

    def __init__(self, config: TokenizerConfig, processes: int = 1) -> None:
        """Build untrained weights. processes: number of processes that train this tokenizer together.

        Raises:
            ConfigError: the network's factor does not divide the image size.
        """
        super().__init__()
        check_image_size(config.image_size, config.network.factor)
        self.config = config
        self.encoder, self.decoder = build_network(config.network, config.image_channels, config.image_size)
        network = config.network
        self.bottleneck = build_bottleneck(
            config.bottleneck, network.latent_channels, processes, network.encoded_channels
        )

    @property
    def shape(self) -> TokenShape:
        """Grid, depth and codebook size of the codes.

        Raises:
            ConfigError: the bottleneck is continuous, so there are no codes.
        """
        if self.bottleneck.depth == 0:
            raise ConfigError(
                f"a tokenizer with bottleneck.kind {self.config.bottleneck.kind!r} has a continuous latent and no "
                "codes, so there can be no prior over them; train one with a quantizer, e.g. --bottleneck.kind vq"
            )
        (height, width), factor = self.config.image_size, self.config.network.factor
        return TokenShape(height // factor, width // factor, self.bottleneck.depth, self.bottleneck.codebook_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Bottlenecked]:
        """Reconstruct x (B, C, H, W) in [-1, 1]: x_hat (B, C, H, W), not clamped, and the bottleneck's output."""
        bottlenecked = self.encode(x)  # z_q (B, D, h, w), codes (B, h, w, K), loss ()
        return self.decode(bottlenecked.z_q), bottlenecked

    def encode(self, x: Tensor) -> Bottlenecked:
        """Encode x (B, C, H, W) to z_q (B, D, h, w), codes (B, h, w, K) or None, and the bottleneck's loss ()."""
        z = self.encoder(x)  # (B, D, h, w)
        bottlenecked: Bottlenecked = self.bottleneck(z)
        return bottlenecked

    def decode(self, z_q: Tensor) -> Tensor:
        """Decode z_q (B, D, h, w) to images (B, C, H, W)."""
        x_hat: Tensor = self.decoder(z_q)
        return x_hat

    def encode_codes(self, x: Tensor) -> Tensor:
        """Encode x (B, C, H, W) to codes (B, h, w, K) int64. Raise ConfigError if the bottleneck is continuous."""
        codes = self.encode(x).codes
        if codes is None:
            _ = self.shape  # raises the ConfigError
        assert codes is not None
        return codes

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Decode codes (B, h, w, K) int64 to images (B, C, H, W).

        Raises:
            ValueError: a code is outside 0..V-1. (Without this check, a negative code would index from the end.)
        """
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < self.shape.V:
            raise ValueError(f"codes must lie in 0..{self.shape.V - 1}, got {int(codes.min())}..{int(codes.max())}")
        return self.decode(self.bottleneck.codes_to_latents(codes))  # z_q (B, D, h, w) -> (B, C, H, W)


def build_tokenizer(
    network: NetworkConfig,
    bottleneck: BottleneckConfig,
    image_size: tuple[int, int],
    image_channels: int,
    processes: int = 1,
) -> Tokenizer:
    """Build an untrained tokenizer for images (C, H, W), in channels_last."""
    config = TokenizerConfig(
        image_size=image_size, image_channels=image_channels, network=network, bottleneck=bottleneck
    )
    return Tokenizer(config, processes).to(memory_format=torch.channels_last)


def check_image_size(size: tuple[int, int], factor: int, key: str = "data.image_size") -> None:
    """Raise ConfigError, with the key and the nearest sizes that fit, unless the factor divides both sides."""
    if size[0] % factor == 0 and size[1] % factor == 0:
        return
    below = [max(factor, side // factor * factor) for side in size]
    above = [-(-side // factor) * factor for side in size]
    raise ConfigError(
        f"{key} {size[0]}x{size[1]} is not divisible by the tokenizer's factor {factor}; "
        f"the nearest sizes are {below[0]}x{below[1]} and {above[0]}x{above[1]}"
    )


@torch.no_grad()
def start_codebook(tokenizer: Tokenizer, micro_batches: Sequence[Tensor]) -> None:
    """Start the codebook from the latents of the first batch, given as micro-batches (b, C, H, W) of this process."""
    z = torch.cat([tokenizer.encoder(x) for x in micro_batches])  # (B, D, h, w)
    # A value that is not finite must not break k-means: the guard reports it after the forward pass of this step.
    tokenizer.bottleneck.start(z.nan_to_num(posinf=0.0, neginf=0.0))


def fingerprint(tokenizer: Tokenizer, config: str | None = None) -> str:
    """Hash the config and all weights. Tokens and priors store this hash, to recognise their tokenizer.

    config: the config as its file's header has it; None: as this version writes it, with the keys that it has added.
    """
    digest = hashlib.sha256((config or tokenizer.config.model_dump_json()).encode())
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class LoadedTokenizer:
    """A frozen tokenizer from disk: in eval mode, without gradients, in channels_last as in training."""

    tokenizer: Tokenizer
    path: Path
    fingerprint: str
    data: Tree
    """The data config of its training."""
    step: int
    """Optimizer steps of its training."""

    @property
    def source(self) -> str:
        """The file for messages and records: hf:OWNER/NAME@COMMIT if it is from the Hub, else its path."""
        return describe_weights(self.path)

    @property
    def outputs(self) -> Path:
        """The folder for what is made with this tokenizer."""
        return output_folder(self.path)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu", option: str = "--tokenizer") -> Self:
        """Load a weights file, given as the file, the folder that holds it, or hf:OWNER/NAME@REVISION (hub.py).

        option: the option that named it, for errors.

        Raises:
            ConfigError: there is no such file or folder.
            BadFileError: the file is damaged, or is not a tokenizer.
        """
        file = resolve_tokenizer(path, option)
        tensors, header = read_weights(file, kind="tokenizer", importer="stage1_tokenizer.import_weights")
        config = config_from_json(TokenizerConfig, header.get("config"), str(file))
        tokenizer = rebuild(lambda: Tokenizer(config), tensors, str(file))
        tokenizer.requires_grad_(False).eval().to(device).to(memory_format=torch.channels_last)
        data, step = read_data_tree(header, str(file)), read_step(header, str(file))
        return cls(tokenizer, file, fingerprint(tokenizer, header["config"]), data, step)


def resolve_tokenizer(path: str | Path, option: str = "--tokenizer") -> Path:
    """Return the weights file of a tokenizer, given as the file or its folder. Raise ConfigError if there is none."""
    return resolve_weights(path, TOKENIZER_FILE, option)


def save_tokenizer(path: Path, tokenizer: Tokenizer, data: Config, step: int) -> None:
    """Write the weights after `step` optimizer steps; the header holds the tokenizer's config and its data config."""
    header = {"config": tokenizer.config.model_dump_json(), "data": data.model_dump_json(), "step": str(step)}
    write_weights(path, tokenizer, "tokenizer", header)

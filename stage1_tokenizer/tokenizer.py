"""The tokenizer: encoder -> bottleneck -> decoder, and its file `tokenizer.safetensors`.

The contract with stage two:

    image    x      (B, C, H, W)  float32 in [-1, 1]
    codes           (B, h, w, K)  int64 in 0..V-1; flattened row by row as (h w K), they are a prior's sequence
    image    x_hat  (B, C, H, W)  float32, near [-1, 1] but not clamped

In eval mode, `decode_codes(encode_codes(x))` is exactly the reconstruction that `forward(x)` returns.

Source: van den Oord, Vinyals and Kavukcuoglu, "Neural Discrete Representation Learning" (2017), section 3.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Self, assert_never

import torch
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks import BottleneckConfig, build_bottleneck
from stage1_tokenizer.bottlenecks.base import Bottlenecked
from stage1_tokenizer.config.base import Config, Tree, config_from_json, differences, stated_values
from stage1_tokenizer.config.value_types import Size
from stage1_tokenizer.config.yaml_and_json import parse_json
from stage1_tokenizer.engine.checkpoint import Header, read_header, read_weights, write_weights
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.initial_weights import check_initial, hash_weights
from stage1_tokenizer.engine.model_files import LoadedModel, read_data_tree, read_step, rebuild, resolve_weights
from stage1_tokenizer.networks import NetworkConfig, build_network

TOKENIZER_FILE = "tokenizer.safetensors"
DECODER = "decoder."
"""Beginning of the names of the decoder's weights, on which no code depends."""
TrainedParts = Literal["all", "bottleneck_and_decoder", "decoder"]
"""Parts of a tokenizer that a training changes."""
IMPORTER = "stage1_tokenizer.import_weights"
"""The command that imports tokenizers of other projects, for messages."""
ORIGIN = "source_"
"""Beginning of the header entries that an import writes: family, file, hash and licence of the source."""
SAME_CODES = "same_codes"
"""Header entry with the fingerprints of the tokenizers that have the same codes."""


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
        self.in_eval_mode: tuple[nn.Module, ...] = ()  # parts whose dropout is off in training too
        self.same_codes: tuple[str, ...] = ()  # fingerprints of the tokenizers whose codes this one keeps
        self.origin: dict[str, str] = {}  # header entries about the project that the weights come from

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


def freeze(tokenizer: Tokenizer, trained: TrainedParts) -> None:
    """Freeze all parts of a tokenizer but those to be trained; what is frozen stays equal to the last bit.

    A frozen encoder has no dropout. A frozen bottleneck draws as in any training (`kl`, the temperature of `rvq`).
    """
    match trained:
        case "all":
            return
        case "bottleneck_and_decoder":
            pass
        case "decoder":
            tokenizer.bottleneck.requires_grad_(False)
            tokenizer.bottleneck.is_frozen = True
        case _:
            assert_never(trained)
    tokenizer.encoder.requires_grad_(False)
    tokenizer.in_eval_mode = (tokenizer.encoder,)


def fingerprint(tokenizer: Tokenizer, config: str | None = None) -> str:
    """Hash the config and all weights.

    config: the config as its file's header has it; None: as this version writes it, with the keys that it has added.
    """
    return hash_weights(config or tokenizer.config.model_dump_json(), tokenizer.state_dict())


def code_fingerprint(tokenizer: Tokenizer) -> str:
    """Hash all that the codes of images depend on: encoder, bottleneck and their config.

    Tokens and priors store this hash, to recognise their tokenizer. A training of the decoder alone leaves it as it is.
    """
    weights = {name: value for name, value in tokenizer.state_dict().items() if not name.startswith(DECODER)}
    return hash_weights(json.dumps(stated_values(tokenizer.config), sort_keys=True), weights)


@dataclass(frozen=True)
class LoadedTokenizer(LoadedModel):
    """A frozen tokenizer from disk: in eval mode, without gradients, in channels_last as in training."""

    tokenizer: Tokenizer
    path: Path
    fingerprint: str
    data: Tree
    """The data config of its training."""
    step: int
    """Optimizer steps of its training."""
    code_fingerprint: str
    """Hash of encoder, bottleneck and config: tokenizers with the same one have the same codes for all images."""

    def makes_codes_of(self, saved: object) -> bool:
        """Return True if tokens or a prior whose header has this fingerprint fit this tokenizer.

        Files of former versions have the fingerprint of a whole tokenizer: of this one, or of one with its codes.
        """
        return saved in (self.code_fingerprint, self.fingerprint, *self.tokenizer.same_codes)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu", option: str = "--tokenizer") -> Self:
        """Load a weights file, given as the file, the folder that holds it, hf:OWNER/NAME@REVISION or pretrained:NAME.

        option: the option that named it, for errors.

        Raises:
            ConfigError: there is no such file or folder.
            BadFileError: the file is damaged, or is not a tokenizer.
        """
        file = resolve_tokenizer(path, option)
        tensors, header = read_weights(file, kind="tokenizer", importer=IMPORTER)
        config = config_from_json(TokenizerConfig, header.get("config"), str(file))
        tokenizer = rebuild(lambda: Tokenizer(config), tensors, str(file))
        tokenizer.same_codes = _read_same_codes(header, file)
        tokenizer.origin = {key: text for key, text in header.items() if key.startswith(ORIGIN)}
        tokenizer.requires_grad_(False).eval().to(device).to(memory_format=torch.channels_last)
        data, step = read_data_tree(header, str(file)), read_step(header, str(file))
        whole, codes = fingerprint(tokenizer, header["config"]), code_fingerprint(tokenizer)
        return cls(tokenizer, file, whole, data, step, codes)


def _read_same_codes(header: Header, file: Path) -> tuple[str, ...]:
    """Return the fingerprints in a header of the tokenizers with the same codes. Raises BadFileError."""
    try:
        names = parse_json(header.get(SAME_CODES, "[]"))
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadFileError(f"{file}: the entry {SAME_CODES} of its header is not a list of fingerprints")
    return tuple(names)


def read_tokenizer_config(file: Path) -> TokenizerConfig:
    """Read the config in the header of a tokenizer's file. Raises BadFileError."""
    return config_from_json(TokenizerConfig, read_header(file, "tokenizer", IMPORTER).get("config"), str(file))


def check_source(
    source: LoadedTokenizer,
    image_size: tuple[int, int],
    network: NetworkConfig,
    bottleneck: BottleneckConfig,
    trained: TrainedParts,
) -> None:
    """Check that a training with these configs, of these parts, can start from the weights of another tokenizer.

    Raises:
        ConfigError: lists the tensors that differ, or the options of parts that are to stay as they are.
    """
    own = source.tokenizer.config
    given = own.model_copy(update={"image_size": image_size, "network": network, "bottleneck": bottleneck})
    advice = "Leave out the options of network and bottleneck, which then are those of the file"
    with torch.device("meta"):
        planned = Tokenizer(given)
    check_initial(planned, source.tokenizer.state_dict(), source.path, advice)
    kept = {"all": set(), "bottleneck_and_decoder": {"network"}, "decoder": {"network", "bottleneck"}}[trained]
    lines = differences(own.model_dump(mode="json", include=kept), given.model_dump(mode="json", include=kept))
    if lines:
        raise ConfigError(
            f"--init_from {source.path}: --train {trained} keeps parts of it as they are, but these options of them "
            "differ (file -> given):\n" + "".join(f"  {line}\n" for line in lines) + advice
        )


def start_from(tokenizer: Tokenizer, source: LoadedTokenizer, trained: TrainedParts) -> str:
    """Load the weights of another tokenizer, and freeze the parts that are not trained; return a line that says so.

    Raises:
        ConfigError: the images have another number of channels; lists the tensors that differ.
    """
    weights = source.tokenizer.state_dict()
    check_initial(tokenizer, weights, source.path, "Give images with the number of channels of its training")
    tokenizer.load_state_dict(weights)
    freeze(tokenizer, trained)
    tokenizer.origin = source.tokenizer.origin  # its licence holds for what is trained from it
    if trained == "decoder":
        tokenizer.same_codes = (*source.tokenizer.same_codes, source.fingerprint)
    parameters = list(tokenizer.parameters())
    learning = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return (
        f"starting from {source.path} (step {source.step:,}, fingerprint {source.fingerprint}); --train {trained}: "
        f"{learning:,} of {sum(parameter.numel() for parameter in parameters):,} parameters learn"
    )


def resolve_tokenizer(path: str | Path, option: str = "--tokenizer") -> Path:
    """Return the weights file of a tokenizer, given as the file or its folder. Raise ConfigError if there is none."""
    return resolve_weights(path, TOKENIZER_FILE, option)


def save_tokenizer(path: Path, tokenizer: Tokenizer, data: Config, step: int) -> None:
    """Write the weights after `step` optimizer steps; the header holds the tokenizer's config and its data config."""
    header = {"config": tokenizer.config.model_dump_json(), "data": data.model_dump_json(), "step": str(step)}
    header |= tokenizer.origin
    if tokenizer.same_codes:
        header[SAME_CODES] = json.dumps(tokenizer.same_codes)
    write_weights(path, tokenizer, "tokenizer", header)

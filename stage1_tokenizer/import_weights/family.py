"""The base of all families: what a family states, and the steps of an import that all share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from stage1_tokenizer.config.base import Tree
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, shorten
from stage1_tokenizer.import_weights.architecture import Architecture, read_architecture
from stage1_tokenizer.import_weights.conversion import Pair, convert, network_pairs
from stage1_tokenizer.import_weights.layer_names import LayerNames
from stage1_tokenizer.networks.vqgan import VqganNetworkConfig
from stage1_tokenizer.tokenizer import Tokenizer, TokenizerConfig, check_image_size

CODEBOOK = "quantize.embedding"
"""Name of the codebook in all families that have one."""


class Statement(NamedTuple):
    """A value that the project's config states, and the value that the weights have."""

    key: str
    stated: Any
    found: Any


class Family(ABC):
    """A family of tokenizers: the names of their layers, and the meaning of their config."""

    name: ClassVar[str]
    """Name for `--family`."""
    project: ClassVar[str]
    """Name of the project, for messages."""
    state_keys: ClassVar[tuple[str, ...]] = ("state_dict", "model")
    """Entries of a checkpoint that hold the weights, the preferred one first."""
    ignored: ClassVar[tuple[str, ...]] = ()
    """Beginnings of the names of weights that belong to the training alone."""
    has_codes: ClassVar[bool] = True

    def __init__(self, config: Tree | None, source: str) -> None:
        """config: the project's config of the model; None: not given. source: its file, for messages."""
        self.config = config
        self.source = source

    @property
    @abstractmethod
    def names(self) -> LayerNames:
        """Names of the layers."""

    @property
    def norm_groups(self) -> int:
        """Groups of channels in each norm."""
        return 32

    @property
    def image_size(self) -> Any:
        """Image size that the config states; None: it states none."""
        return None

    @abstractmethod
    def bottleneck_tree(self) -> Tree:
        """Return the config of our bottleneck, without the sizes."""

    @abstractmethod
    def statements(self, architecture: Architecture, state: Mapping[str, Tensor]) -> list[Statement]:
        """Return what the config states, with what the weights have. Raises ConfigError for what is not supported."""

    def prepare(self, state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
        """Return the weights to be imported: the averaged ones if the file has both, without those of the training."""
        return {name: tensor for name, tensor in state.items() if not name.startswith(self.ignored or ("\0",))}

    def refuse(self, state: Mapping[str, Tensor], source: str) -> None:  # noqa: B027 (most have none)
        """Raise BadFileError, with the layer and the reason, for kinds of this project that cannot be imported."""

    def require(self, key: str, value: Any, allowed: Sequence[Any]) -> None:
        """Raise ConfigError unless a value of the config is one of those that our network has."""
        if value not in allowed:
            raise ConfigError(
                f"--config {self.source}: {key} is {shorten(value, 60)!r}; our network has only {allowed[0]!r}"
            )

    def convert(self, state: dict[str, Tensor], image_size: Any, source: str) -> Tokenizer:
        """Return our tokenizer with these weights.

        Raises:
            ConfigError: the config does not fit the weights, or states what our network cannot express.
            BadFileError: the weights are of another family, or cannot be expressed by our network.
        """
        state = self.prepare(state, source)
        self.refuse(state, source)
        names = self.names
        architecture = read_architecture(state, names, source)
        if self.config is not None:
            wrong = [each for each in self.statements(architecture, state) if each.stated != each.found]
            if wrong:
                lines = "; ".join(f"{key} is {stated!r}, the weights have {found!r}" for key, stated, found in wrong)
                raise ConfigError(f"--config {self.source}: does not fit {source}: {shorten(lines, 600)}")
        for level, width in enumerate(architecture.widths):
            if width % self.norm_groups:
                raise BadFileError(
                    f"{source}: {names.block('encoder', level, 0)}.norm2: {width} channels have no {self.norm_groups} "
                    "groups; the number of groups is in the project's config, give it with --config"
                )
        config = TokenizerConfig.from_tree(
            {
                "image_size": image_size,
                "image_channels": architecture.image_channels,
                "network": architecture.network_tree(self.norm_groups),
                "bottleneck": self.bottleneck_tree() | self._sizes(architecture, state, source),
            },
            f"architecture of {source}",
        )
        network = config.network
        assert isinstance(network, VqganNetworkConfig)
        check_image_size(config.image_size, network.factor, "--image_size")
        attention = next(
            (parts for parts in names.attention_parts if any(f".{parts.q}." in name for name in state)),
            names.attention_parts[0],
        )
        pairs = [*network_pairs(network, names, attention), *self.bottleneck_pairs(state)]
        return convert(config, pairs, state, source)

    def bottleneck_pairs(self, state: Mapping[str, Tensor]) -> list[Pair]:
        """Return the layers of the bottleneck."""
        return [
            Pair("bottleneck.space.project_in", ("quant_conv",)),
            Pair("bottleneck.space.project_out", ("post_quant_conv",)),
            Pair("bottleneck.codebook", (CODEBOOK,), ("weight",)),
        ]

    def _sizes(self, architecture: Architecture, state: Mapping[str, Tensor], source: str) -> Tree:
        """Return the keys of the bottleneck that are sizes of the weights."""
        if not self.has_codes:
            return {}
        codebook = state.get(f"{CODEBOOK}.weight")
        if codebook is None or codebook.ndim != 2:
            raise BadFileError(f"{source}: {CODEBOOK}.weight is missing, or is no matrix: there is no codebook")
        size, dim = codebook.shape
        return {"codebook_size": size, "code_dim": dim, "project": dim == architecture.latent_channels}


def nested(tree: Any, *keys: str) -> Any:
    """Return the value under nested keys; None if there is none."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def stated_only(statements: Sequence[Statement]) -> list[Statement]:
    """Return the statements whose key is in the config."""
    return [statement for statement in statements if statement.stated is not None]


def describe_names(state: Mapping[str, Tensor]) -> str:
    """Return the first names of weights, for messages."""
    return shorten(", ".join([*state][:4]))


def find_folder_files(folder: Path) -> tuple[Path, Path | None]:
    """Return the weights and the config of a diffusers folder. Raises ConfigError: it has none, or several."""
    found = [folder / name for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")]
    weights = [path for path in found if path.is_file()]
    if not weights:
        inside = [path.parent.name for path in folder.glob("*/config.json")]
        hint = f"; give one of its parts: {', '.join(sorted(inside))}" if inside else ""
        raise ConfigError(f"FILE {folder}: the folder holds no {found[0].name}{hint}")
    config = folder / "config.json"
    return weights[0], config if config.is_file() else None

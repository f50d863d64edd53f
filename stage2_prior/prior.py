"""The kinds of prior, and loading one from disk.

    from stage2_prior.prior import load_prior

    prior = load_prior("runs/stage2/shapes_vq_gpt")     # a run's folder; prior.tokenizer is its tokenizer
    logits = prior.model(codes, labels)                 # codes (B, h, w, K), labels (B,) -> (B, L, V)

`base.py` defines what a prior is; `generation.py` samples from one; `likelihood.py` scores with one. The words:

    forward     logits of codes that are all given, in one pass: Prior.forward, Prior.contexts, head.forward
    prepare     arrange weights for generation in one precision: Prior.prepare -> PreparedPrior, head.prepare,
                products.prepare
    begin       PreparedPrior.begin -> Generation: one batch of sequences, whose codes come in one after the other
    generate    the loop over all positions: generation.generate, with choose, guidance, windows and known codes
    KV cache    keys and values of a GPT's former positions: gpt/kv_cache.py
    decoder     only the tokenizer's network from latents to images; nothing in stage two has this name
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from stage1_tokenizer.config.base import Config, Tree, config_from_json
from stage1_tokenizer.config.yaml_and_json import LARGEST_JSON
from stage1_tokenizer.engine.checkpoint import read_weights
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.model_files import read_data_tree, read_step, rebuild, resolve_weights
from stage1_tokenizer.tokenizer import LoadedTokenizer, TokenShape
from stage2_prior.base import Prior
from stage2_prior.gpt.model import Gpt, GptConfig
from stage2_prior.pixelcnn.model import PixelCnn, PixelCnnConfig

PRIOR_FILE = "prior.safetensors"
MOST_CLASSES = 40_000
"""A header holds their names, in less JSON than yaml_and_json.py reads."""
LONGEST_NAMES = LARGEST_JSON - 100_000
"""Characters of JSON that they may have together: the rest is for what else the header says."""
PriorConfig = Annotated[GptConfig | PixelCnnConfig, Field(discriminator="kind")]


def build_prior(config: PriorConfig, shape: TokenShape, classes: int) -> Prior:
    """A prior over codes of a shape, for images of `classes` classes (0: unconditional)."""
    match config:
        case GptConfig():
            return Gpt(config, shape, classes)
        case PixelCnnConfig():
            return PixelCnn(config, shape, classes)
    assert_never(config)


class PriorHeader(Config):
    """What the header of a prior's file says about it."""

    prior: PriorConfig
    shape: tuple[int, int, int, int]
    """h, w, K, V."""
    classes: tuple[str, ...] = Field(max_length=MOST_CLASSES)
    """Names of the classes in the order of their labels, as they were at training."""
    tokenizer: str = Field(max_length=64)
    """The fingerprint of the tokenizer whose codes it models."""


@dataclass(frozen=True)
class SavedPrior:
    """A prior's file as it was read, apart from the tokenizer that it belongs to."""

    path: Path
    header: PriorHeader
    shape: TokenShape
    weights: dict[str, Tensor]
    data: Tree
    """The data config whose tokens it was trained on."""
    step: int
    """Optimizer steps that the weights have learned from."""

    @classmethod
    def read(cls, file: Path) -> Self:
        """Raises BadFileError: damaged, of another kind, or its header does not describe a prior."""
        weights, raw = read_weights(file, kind="prior")
        header = config_from_json(PriorHeader, raw.get("config"), str(file))
        data, step = read_data_tree(raw, str(file)), read_step(raw, str(file))
        return cls(file, header, TokenShape(*header.shape), weights, data, step)

    def build(self) -> Prior:
        """The model with these weights. Raises BadFileError: they do not fit the network that the header describes."""
        header = self.header
        return rebuild(lambda: build_prior(header.prior, self.shape, len(header.classes)), self.weights, str(self.path))


def saved_classes(folder: Path) -> tuple[str, ...]:
    """The class map of the prior saved in a run's folder, which labels keep for good; empty where there is none yet."""
    file = folder / PRIOR_FILE
    return SavedPrior.read(file).header.classes if file.exists() else ()


@dataclass(frozen=True)
class LoadedPrior:
    """A prior and its tokenizer from a run's folder, in eval mode, without gradients."""

    model: Prior
    tokenizer: LoadedTokenizer
    classes: tuple[str, ...]
    data: Tree
    """The data config whose tokens it was trained on."""
    path: Path
    step: int


def _check_shape(shape: TokenShape, tokenizer: LoadedTokenizer, file: Path) -> None:
    """Raises BadFileError unless a prior's header and its tokenizer agree on grid, codes per position and codebook."""
    if tokenizer.tokenizer.bottleneck.depth == 0:
        raise BadFileError(f"{file}: is a prior over codes, but the tokenizer {tokenizer.path} has none")
    if shape != tokenizer.tokenizer.shape:
        raise BadFileError(
            f"{file}: its header says codes of h, w, K, V = {', '.join(map(str, shape))}, "
            f"but those of {tokenizer.path} are {', '.join(map(str, tokenizer.tokenizer.shape))}"
        )


def load_prior(path: str | Path | None = None, device: torch.device | str = "cpu") -> LoadedPrior:
    """Load a trained prior, and the tokenizer beside it, from a run's folder or its `prior.safetensors`; None: from the
    newest run.

    Raises:
        ConfigError: one of the two does not exist.
        BadFileError: one is damaged, of another kind, or they do not belong together.
    """
    file = prior_file(path)
    saved = SavedPrior.read(file)
    tokenizer = LoadedTokenizer.load(file.parent, device, option="--prior")
    if tokenizer.fingerprint != saved.header.tokenizer:
        raise BadFileError(
            f"{file} was trained on the codes of the tokenizer {saved.header.tokenizer}, but {tokenizer.path} is "
            f"{tokenizer.fingerprint}; put the former's tokenizer.safetensors beside the prior"
        )
    _check_shape(saved.shape, tokenizer, file)
    model = saved.build().requires_grad_(False).eval().to(device)
    return LoadedPrior(model, tokenizer, saved.header.classes, saved.data, file, saved.step)


def prior_file(given: str | Path | None) -> Path:
    """Find the weights of the prior that an option names, or of the newest run. Raises ConfigError: there are none."""
    return resolve_weights(given or newest_run(), PRIOR_FILE, "--prior")


def newest_run(folder: Path = Path("runs/stage2")) -> Path:
    """Find the run whose prior was written last. Raises ConfigError: there is none."""
    files = sorted(folder.glob(f"*/{PRIOR_FILE}"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise ConfigError(
            f"there is no run to sample from: no {folder}/*/{PRIOR_FILE}; train one with "
            "`python stage2_prior/train.py --tokenizer runs/stage1/NAME`, or name one with --prior"
        )
    return files[-1].parent


def check_classes(classes: tuple[str, ...]) -> None:
    """Raises ConfigError where a prior's header could not hold the names of these classes: they are too many, or too
    long. To be called before anything is computed of such a data set."""
    if len(classes) > MOST_CLASSES:
        raise ConfigError(
            f"the data has {len(classes):,} classes, and a prior holds at most {MOST_CLASSES:,}; is data.root the "
            "folder above the folders of the classes?"
        )
    length = len(json.dumps(classes))
    if length > LONGEST_NAMES:
        raise ConfigError(
            f"the names of the data's {len(classes):,} classes have {length:,} characters as JSON, and a prior holds "
            f"at most {LONGEST_NAMES:,}; shorten the names of the folders"
        )


def labels_for(prior: LoadedPrior, classes: tuple[str, ...]) -> NDArray[np.int64]:
    """The prior's label for each label of a data set with these classes, matched by name: (max(1, classes),).

    Raises:
        ConfigError: a class is not among the prior's, and the prior does not know images without one.
    """
    if not prior.classes:
        return np.zeros(max(1, len(classes)), dtype=np.int64)
    null = prior.model.null_label
    labels = [prior.classes.index(name) if name in prior.classes else null for name in classes] or [null]
    if null in labels and prior.model.config.label_dropout == 0.0:
        unknown = [name for name in classes if name not in prior.classes]
        raise ConfigError(
            f"{'the class ' + unknown[0] if unknown else 'images without a class'}: this prior was trained on "
            f"{', '.join(prior.classes)} with label_dropout 0, so it does not know images of no class"
        )
    return np.array(labels, dtype=np.int64)


def parameters_of(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())

"""The kinds of prior, and the file of a trained prior: its header, loading it, matching its classes.

    from stage2_prior.prior import load_prior

    prior = load_prior("runs/stage2/shapes_vq_gpt")     # a run's folder; prior.tokenizer is its tokenizer
    logits = prior.model(codes, labels)                 # codes (B, h, w, K), labels (B,) -> (B, L, V)

`base.py` defines the interface of a prior. `generation.py` generates codes with it, `likelihood.py` scores codes.
Terms:

    forward     compute the logits of given codes in one pass: Prior.forward, Prior.contexts, head.forward
    prepare     arrange weights for generation in one precision: Prior.prepare -> PreparedPrior, head.prepare,
                fast_linear.prepare
    begin       start one batch of sequences: PreparedPrior.begin -> Generation
    generate    run the loop over all positions: generation.generate, with choose, guidance, windows and known codes
    step        compute one position in that loop
    cache       what a Generation keeps of former positions: keys and values (gpt/kv_cache.py), features (pixelcnn/)
    decode      turn codes into images, by the tokenizer; nothing in stage two has this name
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
from stage1_tokenizer.data import DataConfig
from stage1_tokenizer.engine.checkpoint import Header, load_strict, read_header, read_weights
from stage1_tokenizer.engine.console import print_note
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, shorten
from stage1_tokenizer.engine.files import write_file
from stage1_tokenizer.engine.initial_weights import check_initial, hash_weights
from stage1_tokenizer.engine.model_files import (
    LoadedModel,
    find_name,
    read_data_tree,
    read_step,
    rebuild,
    resolve_weights,
)
from stage1_tokenizer.engine.pretrained import PretrainedName, pretrained_names
from stage1_tokenizer.tokenizer import ORIGIN, TOKENIZER_FILE, LoadedTokenizer, TokenShape
from stage2_prior.base import LabelEmbedding, Prior
from stage2_prior.gpt.model import Gpt, GptConfig
from stage2_prior.pixelcnn.model import PixelCnn, PixelCnnConfig

PRIOR_FILE = "prior.safetensors"
RUNS = Path("runs/stage2")
"""Folder of the runs of priors."""
IMPORTER = "stage2_prior.import_weights"
"""The command that imports priors of other projects, for messages."""
TOKENIZER_SOURCE = "tokenizer_source"
"""Key in a prior's header: hf:OWNER/NAME@COMMIT or pretrained:NAME, if its tokenizer had such a name."""
DEFAULT = PretrainedName("shapes")
"""The prior of commands that name none, as long as the user has no run."""
MOST_CLASSES = 40_000
"""Most classes of a prior: its header holds their names, in at most as much JSON as yaml_and_json.py reads."""
LONGEST_NAMES = LARGEST_JSON - 100_000
"""Most characters of the class names as JSON; the rest is for the other entries of the header."""
PriorConfig = Annotated[GptConfig | PixelCnnConfig, Field(discriminator="kind")]


def build_prior(config: PriorConfig, shape: TokenShape, classes: int) -> Prior:
    """Build an untrained prior over the codes of a shape, for images of `classes` classes (0: unconditional)."""
    match config:
        case GptConfig():
            return Gpt(config, shape, classes)
        case PixelCnnConfig():
            return PixelCnn(config, shape, classes)
    assert_never(config)


class PriorHeader(Config):
    """The header of a prior's file: all that is needed to build the model and use its labels."""

    prior: PriorConfig
    shape: tuple[int, int, int, int]
    """Rows, columns, codes per position and codebook size (h, w, K, V) of the codes."""
    classes: tuple[str, ...] = Field(max_length=MOST_CLASSES)
    """Names of the classes in the order of their labels, fixed by the first training step."""
    tokenizer: str = Field(max_length=64)
    """Code fingerprint of the tokenizer whose codes the prior learns; in former versions that of all its weights."""

    def entries(self, data: DataConfig, tokenizer: LoadedTokenizer) -> dict[str, str]:
        """Return the entries of the file's header without the step, with the tokenizer's name if it has one."""
        source = {TOKENIZER_SOURCE: tokenizer.source} if find_name(tokenizer.path) else {}
        return {"config": self.model_dump_json(), "data": data.model_dump_json(), **source}


@dataclass(frozen=True)
class SavedPrior:
    """The content of a prior's file, without its tokenizer."""

    path: Path
    header: PriorHeader
    shape: TokenShape
    weights: dict[str, Tensor]
    data: Tree
    """The config of the data set that the prior was trained on."""
    step: int
    """Optimizer steps of the weights."""
    raw: Header
    """The header as it is in the file."""

    @property
    def fingerprint(self) -> str:
        """Hash of the config in the header and all weights."""
        return hash_weights(self.raw["config"], self.weights)

    @property
    def origin(self) -> Header:
        """Entries of the header about the project that the weights come from, if they were imported."""
        return {key: text for key, text in self.raw.items() if key.startswith(ORIGIN)}

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read a prior's file. Raise BadFileError if it is damaged, or is not a prior."""
        weights, raw = read_weights(file, kind="prior", importer=IMPORTER)
        header = config_from_json(PriorHeader, raw.get("config"), str(file))
        data, step = read_data_tree(raw, str(file)), read_step(raw, str(file))
        return cls(file, header, TokenShape(*header.shape), weights, data, step, raw)

    def build(self) -> Prior:
        """Build the model with these weights. Raise BadFileError if the weights do not fit the header."""
        header = self.header
        return rebuild(lambda: build_prior(header.prior, self.shape, len(header.classes)), self.weights, str(self.path))


def read_prior_config(file: Path) -> PriorConfig:
    """Read the config of the prior in a file's header. Raises BadFileError."""
    return config_from_json(PriorHeader, read_header(file, "prior", IMPORTER).get("config"), str(file)).prior


def open_source(path: str | None, config: PriorConfig, tokenizer: LoadedTokenizer) -> SavedPrior | None:
    """Read the prior that --init_from names, and check that a prior over a tokenizer's codes can start from it; None:
    it names none.

    Raises:
        ConfigError: there is no such file, its codes have another shape, or its architecture differs.
        BadFileError: the file is damaged or of another kind.
    """
    if not path:
        return None
    file = resolve_weights(path, PRIOR_FILE, "--init_from")
    source, shape = SavedPrior.read(file), tokenizer.tokenizer.shape
    if source.shape != shape:
        what, reason = "a grid", "a prior learns which row and column a position is in"
        if source.shape[2:] != shape[2:]:
            what, reason = "codes", "each code has weights of its own"
        raise ConfigError(
            f"--init_from {file}: is a prior over {source.shape.in_words}, but {tokenizer.path} makes "
            f"{shape.in_words}. A prior over {what} of another shape cannot start from it: {reason}. Give a tokenizer "
            f"with {source.shape.in_words} (the grid is data.image_size divided by its factor), or no --init_from"
        )
    with torch.device("meta"):
        planned = build_prior(config, shape, len(source.header.classes))
    check_initial(planned, source.weights, file, "Leave out the options of prior, which then are those of the file")
    return source


@torch.no_grad()
def start_from(prior: Prior, classes: tuple[str, ...], source: SavedPrior, tokenizer: LoadedTokenizer) -> str:
    """Load the weights of another prior, whose classes are matched by name; return a line that says so.

    A class that the other prior does not have keeps the random vectors that it was built with.
    """
    weights, known = dict(source.weights), source.header.classes
    rows = {label: known.index(name) for label, name in enumerate(classes) if name in known}
    rows[len(classes)] = len(known)  # "no class"
    for name, module in prior.named_modules():
        if isinstance(module, LabelEmbedding):
            vectors = module.weight.detach().clone()  # (classes + 1, width)
            vectors[list(rows)] = weights[f"{name}.weight"].to(vectors.device)[list(rows.values())]
            weights[f"{name}.weight"] = vectors
    load_strict(prior, weights, str(source.path))
    new, gone = [name for name in classes if name not in known], [name for name in known if name not in classes]
    text = f"starting from {source.path} (step {source.step:,}, {len(known)} classes)"
    if new:
        text += f"\nnote: the vectors of {len(new)} classes start anew, since it does not have them: {_list(new)}"
    if gone:
        text += f"\nnote: {len(gone)} of its classes are not in the data and are left out: {_list(gone)}"
    if not tokenizer.makes_codes_of(source.header.tokenizer):
        text += (
            f"\nnote: it learned the codes of another tokenizer ({source.header.tokenizer}); unless that one is a "
            "former state of this one, its weights are of little use"
        )
    return text


def _list(names: list[str]) -> str:
    """Return names as a list for messages, at most ten of them."""
    return ", ".join(map(shorten, names[:10])) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def read_saved_classes(folder: Path) -> tuple[str, ...]:
    """Read the classes of the prior in a run's folder, which its labels keep for good; () if there is no prior yet."""
    file = folder / PRIOR_FILE
    return SavedPrior.read(file).header.classes if file.exists() else ()


@dataclass(frozen=True)
class LoadedPrior(LoadedModel):
    """A trained prior and its tokenizer, in eval mode, without gradients."""

    model: Prior
    tokenizer: LoadedTokenizer
    classes: tuple[str, ...]
    """Names of the classes in the order of their labels; () if the prior is unconditional."""
    data: Tree
    """The config of the data set that the prior was trained on."""
    path: Path
    """The file prior.safetensors."""
    step: int
    """Optimizer steps of the weights."""


def _check_shape(shape: TokenShape, tokenizer: LoadedTokenizer, file: Path) -> None:
    """Raise BadFileError unless a prior's header and its tokenizer have the same shape of codes."""
    if tokenizer.tokenizer.bottleneck.depth == 0:
        raise BadFileError(
            f"{file}: is a prior over codes, but the tokenizer {tokenizer.path} has no codes; put the tokenizer of the "
            "prior's training beside it"
        )
    if shape != tokenizer.tokenizer.shape:
        raise BadFileError(
            f"{file}: its header says codes of h, w, K, V = {', '.join(map(str, shape))}, "
            f"but the codes of {tokenizer.path} have {', '.join(map(str, tokenizer.tokenizer.shape))}"
        )


def load_prior(path: str | Path | None = None, device: torch.device | str = "cpu") -> LoadedPrior:
    """Load a trained prior, and the tokenizer beside it.

    path: a run's folder or its `prior.safetensors`; hf:OWNER/NAME, or hf:OWNER/NAME@REVISION (hub.py); pretrained:NAME
        (pretrained.py); None: the newest run under runs/stage2, or pretrained:shapes, which a note says.

    Raises:
        ConfigError: the prior or the tokenizer does not exist.
        BadFileError: a file is damaged or of another kind, or they do not belong together.
    """
    file = find_prior_file(path)
    if path is None and find_name(file):
        print_note(f"there is no run under {RUNS}, so {DEFAULT} is used; --prior names another")
    saved = SavedPrior.read(file)
    tokenizer = LoadedTokenizer.load(file.parent, device, option="--prior")
    if not tokenizer.makes_codes_of(saved.header.tokenizer):
        raise BadFileError(
            f"{file} was trained on the codes of the tokenizer {saved.header.tokenizer}, but {tokenizer.path} is "
            f"{tokenizer.code_fingerprint} (encoder and bottleneck) or {tokenizer.fingerprint} (the whole); put the "
            "tokenizer.safetensors of its training beside the prior"
        )
    _check_shape(saved.shape, tokenizer, file)
    model = saved.build().requires_grad_(False).eval().to(device)
    return LoadedPrior(model, tokenizer, saved.header.classes, saved.data, file, saved.step)


def find_prior_file(given: str | Path | None) -> Path:
    """Find the weights of the prior that an option names; None: of the newest run, or of `DEFAULT` if there is none.

    Raises:
        ConfigError: there is no such prior.
    """
    if given is None and not list_runs() and DEFAULT in pretrained_names():
        given = str(DEFAULT)
    return resolve_weights(given or find_newest_run(), PRIOR_FILE, "--prior", beside=(TOKENIZER_FILE,))


def list_runs(folder: Path = RUNS) -> list[Path]:
    """List the folders of the runs that have a prior, the newest first."""
    files = sorted(folder.glob(f"*/{PRIOR_FILE}"), key=lambda file: file.stat().st_mtime, reverse=True)
    return [file.parent for file in files]


def find_newest_run(folder: Path = RUNS) -> Path:
    """Find the run whose prior was written last. Raise ConfigError if there is none."""
    runs = list_runs(folder)
    if not runs:
        raise ConfigError(
            f"there is no run to sample from: no {folder}/*/{PRIOR_FILE}; train a prior with "
            "`python stage2_prior/train.py --tokenizer runs/stage1/NAME`, or name one with --prior"
        )
    return runs[0]


def check_classes(classes: tuple[str, ...]) -> None:
    """Raise ConfigError if the classes are too many, or their names too long, for a prior's header."""
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


def match_labels(prior: LoadedPrior, classes: tuple[str, ...]) -> NDArray[np.int64]:
    """Return the prior's label for each label of a data set with these classes: (max(1, classes),) int64.

    Classes are matched by name. A class that the prior does not know gets the label "no class".

    Raises:
        ConfigError: a class needs the label "no class", which the prior has not learned (label_dropout 0).
    """
    if not prior.classes:
        return np.zeros(max(1, len(classes)), dtype=np.int64)
    null = prior.model.null_label
    labels = [prior.classes.index(name) if name in prior.classes else null for name in classes] or [null]
    if null in labels and prior.model.config.label_dropout == 0.0:
        unknown = [name for name in classes if name not in prior.classes]
        raise ConfigError(
            f"{'the class ' + unknown[0] if unknown else 'images without a class'}: this prior was trained on "
            f"{', '.join(prior.classes)} with label_dropout 0, so it has not learned images of other or no class; give "
            "images of these classes only"
        )
    return np.array(labels, dtype=np.int64)


def copy_tokenizer(tokenizer: LoadedTokenizer, folder: Path) -> None:
    """Copy the tokenizer's file into the prior's folder, so that the folder needs no other.

    Raises:
        BadFileError: the file has changed since it was loaded, as the file of a running training does.
    """
    copy = folder / TOKENIZER_FILE
    if copy.exists() and copy.samefile(tokenizer.path):
        return
    data = tokenizer.path.read_bytes()
    if not copy.exists() or copy.read_bytes() != data:
        write_file(copy, data)
    if LoadedTokenizer.load(copy).fingerprint != tokenizer.fingerprint:
        copy.unlink()
        raise BadFileError(
            f"{tokenizer.path}: has changed since it was loaded; is it still in training? Start again when it has ended"
        )


def count_parameters(module: nn.Module) -> int:
    """Return the number of trained numbers in a module."""
    return sum(parameter.numel() for parameter in module.parameters())

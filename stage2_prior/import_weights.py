"""Import a prior that another program has trained.   python -m stage2_prior.import_weights FILE --family llamagen_gpt \
    --tokenizer runs/stage1/NAME

    FILE (a pickle or safetensors) -> tensors and sizes -> checked against options and tokenizer -> prior.safetensors

Nothing in FILE is executed (`engine/foreign_files.py`). Writes runs/stage2/NAME with the prior and a copy of its
tokenizer; all commands take the folder as that of a training. The header of the prior names the source.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic_settings import CliPositionalArg
from torch import Tensor

from stage1_tokenizer.config.base import CommandConfig, Tree, merge, parse_command_line
from stage1_tokenizer.engine.checkpoint import write_weights
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.console import format_command, print_note
from stage1_tokenizer.engine.errors import ConfigError, shorten
from stage1_tokenizer.engine.foreign_files import read_foreign_file
from stage1_tokenizer.engine.lock import lock_folder
from stage1_tokenizer.engine.model_files import rebuild
from stage1_tokenizer.tokenizer import LoadedTokenizer
from stage2_prior.gpt.llamagen import (
    CHECKPOINT_KEYS,
    TRAINING_KEYS,
    LlamaGenConfig,
    config_of,
    convert,
    read_sizes,
)
from stage2_prior.prior import (
    PRIOR_FILE,
    PriorConfig,
    PriorHeader,
    build_prior,
    check_classes,
    copy_tokenizer,
    count_parameters,
)

LARGEST_NAMES = 4_000_000
"""Most bytes of the file of class names."""


class ImportPriorConfig(CommandConfig):
    """Import a prior that another program has trained. `--config FILE` reads the options of its code, too."""

    file: CliPositionalArg[str]
    """The checkpoint: gpt.pt, or safetensors with the same names. Nothing in it is executed."""
    family: Literal["llamagen_gpt"]
    """The program that wrote it. llamagen_gpt: LlamaGen's class-conditional GPT."""
    tokenizer: str
    """The tokenizer whose codes the prior was trained on: a stage-one run's folder, or its tokenizer.safetensors."""
    classes: str | None = None
    """Text file with the names of the classes, one per line, in the order of their labels; null: their numbers."""
    licence: str | None = None
    """Licence of the weights, for the header of the prior."""
    out: str | None = None
    """Folder of the new prior; null: runs/stage2/ and the name of FILE."""
    model: LlamaGenConfig = LlamaGenConfig()

    @classmethod
    def complete(cls, tree: Tree) -> Tree:
        """Return the tree with the options of LlamaGen's code, which stand at the top of its own files, under
        `model`."""
        theirs = {key: value for key, value in tree.items() if key in LlamaGenConfig.model_fields}
        rest = {key: value for key, value in tree.items() if key not in {*theirs, *TRAINING_KEYS}}
        default, given = LlamaGenConfig().tree(), rest.get("model", {})
        changed = {key: value for key, value in given.items() if key not in default or value != default[key]}
        return {**rest, "model": merge(merge(default, theirs), changed)}

    @property
    def folder(self) -> Path:
        """The folder of the new prior."""
        return Path(self.out) if self.out else Path("runs/stage2") / Path(self.file).stem


class ImportedPrior(NamedTuple):
    """A prior of another program, as one of ours."""

    config: PriorConfig
    codebook_size: int
    classes: int
    codes: int | None
    """Codes of an image; None: the file does not say."""
    weights: dict[str, Tensor]
    note: str
    """A line about converted numbers; "" if there are none."""


def main() -> None:
    """Read the file, check it, and write the prior's folder."""
    config = parse_command_line(ImportPriorConfig)
    source = Path(config.file)
    if not source.is_file():
        raise ConfigError(f"FILE {source}: there is no such file")
    check_folder(config.folder)
    tokenizer = LoadedTokenizer.load(config.tokenizer)
    foreign = read_foreign_file(source)
    imported = import_llamagen(foreign.read_state_dict(CHECKPOINT_KEYS), config.model, str(source))
    check_tokenizer(imported, tokenizer)
    classes = read_class_names(config.classes, imported.classes)
    check_classes(classes)
    shape = tokenizer.tokenizer.shape
    prior = rebuild(lambda: build_prior(imported.config, shape, len(classes)), imported.weights, str(source))

    folder = config.folder
    lock_folder(folder)
    copy_tokenizer(tokenizer, folder)
    origin = {"file": source.name, "family": config.family, "sha256": foreign.sha256, "licence": config.licence}
    header = PriorHeader(prior=imported.config, shape=shape, classes=classes, tokenizer=tokenizer.fingerprint)
    entries = {"config": header.model_dump_json(), "data": json.dumps(tokenizer.data), "source": json.dumps(origin)}
    write_weights(folder / PRIOR_FILE, prior, "prior", entries)
    if imported.note:
        print_note(imported.note)
    if config.classes is None:
        print_note(f"the classes have the names 0 to {len(classes) - 1}; give --classes NAMES.txt, one name per line")
    print(f"prior    {count_parameters(prior):,} parameters, {len(classes)} classes, {shape.in_words}")
    print(f"source   {source.name}, sha256 {foreign.sha256}, licence {config.licence or 'not given (--licence)'}")
    print(f"weights  {folder / PRIOR_FILE}, the tokenizer beside it")
    print(f"next     {format_command('sampling/generate.py', '-n', 16, '--prior', folder, '--guidance', 2)}")


def check_folder(folder: Path) -> None:
    """Raise ConfigError if the folder of the new prior exists and holds anything but hidden files."""
    if folder.is_dir():
        held = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        if held:
            raise ConfigError(f"--out {folder}: holds {shorten(held[0], 80)} already; give another --out")
    elif folder.exists():
        raise ConfigError(f"--out {folder}: is a file; give the name of a new folder")


def import_llamagen(tensors: Mapping[str, Tensor], options: LlamaGenConfig, source: str) -> ImportedPrior:
    """Convert the weights of LlamaGen's GPT.

    Raises:
        BadFileError: the weights are those of another model.
        ConfigError: the options do not fit them.
    """
    sizes = read_sizes(tensors, source)
    config = config_of(sizes, options)
    formats = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()} - {"float32"})
    note = f"{source}: weights in {' and '.join(formats)} are converted to float32" if formats else ""
    classes = sizes.labels - bool(config.label_dropout)
    weights = convert(tensors, sizes, config)
    return ImportedPrior(config, sizes.codebook_size, classes, options.block_size, weights, note)


def check_tokenizer(imported: ImportedPrior, tokenizer: LoadedTokenizer) -> None:
    """Raise ConfigError unless the prior can have learned the codes of this tokenizer."""
    shape, path = tokenizer.tokenizer.shape, tokenizer.path
    if shape.K != 1:
        raise ConfigError(f"--tokenizer {path}: has {shape.K} codes per position, and LlamaGen's priors have one")
    if imported.codebook_size != shape.V:
        raise ConfigError(
            f"--tokenizer {path}: has a codebook of {shape.V} codes, but the prior was trained on "
            f"{imported.codebook_size}"
        )
    if shape.h != shape.w or imported.codes not in (None, shape.length):
        wanted = f"{imported.codes} codes per image (block_size)" if imported.codes else "square grids"
        raise ConfigError(
            f"--tokenizer {path}: makes {shape.in_words}, but the prior was trained on {wanted}; import the tokenizer "
            "with the image size of the prior's training"
        )


def read_class_names(path: str | None, count: int) -> tuple[str, ...]:
    """Return the names of `count` classes from a text file, one per line; path None: "0", "1", ...

    Raises:
        ConfigError: the file cannot be read, or holds another number of names, an empty one, or one twice.
    """
    if path is None:
        return tuple(map(str, range(count)))
    try:
        with Path(path).open("rb") as file:
            text = file.read(LARGEST_NAMES + 1).decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"--classes {path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--classes {path}: is not text in UTF-8") from None
    names = tuple(line.strip() for line in text.rstrip().splitlines())
    if len(names) != count or len(text) > LARGEST_NAMES:
        raise ConfigError(f"--classes {path}: has {len(names)} lines, but the prior has {count} classes, one per line")
    seen: dict[str, int] = {}
    for line, name in enumerate(names, start=1):
        if not name or name in seen:
            reason = f"the same name as line {seen[name]}: {shorten(name, 80)}" if name else "no name"
            raise ConfigError(f"--classes {path}: line {line} has {reason}")
        seen[name] = line
    return names


if __name__ == "__main__":
    run_command(main)

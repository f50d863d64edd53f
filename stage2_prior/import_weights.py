"""Import a prior that another program has trained.   python -m stage2_prior.import_weights FILE --family llamagen_gpt \
    --tokenizer runs/stage1/NAME

    FILE (a pickle or safetensors) -> tensors and sizes -> checked against options and tokenizer -> prior.safetensors

Nothing in FILE is executed (`engine/foreign_files.py`). Writes runs/stage2/NAME with the prior and a copy of its
tokenizer; all commands take the folder as that of a training. The header of the prior names the source.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import PositiveInt
from pydantic_settings import CliPositionalArg
from torch import Tensor

from stage1_tokenizer.config.base import CommandConfig, parse_command_line, read_yaml
from stage1_tokenizer.config.field_facts import Mark
from stage1_tokenizer.engine.checkpoint import write_weights
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.console import format_command, print_note, say
from stage1_tokenizer.engine.errors import ConfigError, shorten
from stage1_tokenizer.engine.file_names import describe_path
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
    """Import a prior that another program has trained, exactly, or say what our GPT cannot express."""

    reads_config: ClassVar[bool] = False

    file: CliPositionalArg[str]
    """Checkpoint of torch (gpt.pt), or safetensors file with the same names. Nothing in it is executed."""
    family: Literal["llamagen_gpt"]
    """Program that wrote it. llamagen_gpt: the class-conditional GPT of LlamaGen."""
    tokenizer: str
    """Tokenizer whose codes the prior was trained on: a stage-one run's folder, or its tokenizer.safetensors."""
    config: Annotated[str | None, Mark.FREE] = None
    """YAML file with the options of LlamaGen's code (n_head, norm_eps, rope_base, ...), to be compared with the
    weights; null: those of the published models."""
    heads: PositiveInt | None = None
    """Attention heads, which the weights do not say; null: those of the config, or of the published model of this
    size."""
    classes: str | None = None
    """Text file with the names of the classes, one per line, in the order of their labels; null: their numbers."""
    licence: str | None = None
    """Licence of the weights, as their authors state it. It is kept in the file, and published with it."""
    out: str | None = None
    """Folder of the new prior; null: runs/stage2/ and the name of FILE."""

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
        raise ConfigError(f"FILE {describe_path(source)}: there is no such file")
    check_folder(config.folder)
    tokenizer = LoadedTokenizer.load(config.tokenizer)
    options = read_options(config.config, config.heads)
    foreign = read_foreign_file(source)
    imported = import_llamagen(foreign.read_state_dict(CHECKPOINT_KEYS), options, str(source))
    check_tokenizer(imported, tokenizer)
    classes = read_class_names(config.classes, imported.classes)
    check_classes(classes)
    shape = tokenizer.tokenizer.shape
    prior = rebuild(lambda: build_prior(imported.config, shape, len(classes)), imported.weights, str(source))

    folder = config.folder
    lock_folder(folder)
    copy_tokenizer(tokenizer, folder)
    header = PriorHeader(prior=imported.config, shape=shape, classes=classes, tokenizer=tokenizer.fingerprint)
    entries = {"config": header.model_dump_json(), "data": json.dumps(tokenizer.data), "step": "0"}
    entries |= {"source_file": source.name, "source_sha256": foreign.sha256}
    entries |= {"source_family": config.family, "source_licence": config.licence or "unknown"}
    write_weights(folder / PRIOR_FILE, prior, "prior", entries)
    for note in filter(None, (imported.note, *missing_options(config, len(classes)))):
        print_note(note)
    say(
        f"{folder / PRIOR_FILE}: {config.family}, {count_parameters(prior):,} parameters, {len(classes)} classes, "
        f"{shape.in_words}"
    )
    guidance = ("--guidance", 2) if imported.config.label_dropout else ()
    say(f"next: {format_command('sampling/generate.py', '-n', 16, '--prior', folder, *guidance)}")


def missing_options(config: ImportPriorConfig, classes: int) -> Iterator[str]:
    """Yield a line about each fact that only the user knows, and has not given."""
    if config.classes is None:
        yield f"the classes have the names 0 to {classes - 1}; --classes NAMES.txt gives others, one per line"
    if config.licence is None:
        yield "no licence was given; name it with --licence, so that whoever gets these weights knows it"


def read_options(path: str | None, heads: int | None) -> LlamaGenConfig:
    """Return the options of LlamaGen's code from a YAML file (None: those of the published models), and the heads.

    Raises:
        ConfigError: the file cannot be read, or has an unknown key or a wrong value.
    """
    tree = {key: value for key, value in (read_yaml(path) if path else {}).items() if key not in TRAINING_KEYS}
    return LlamaGenConfig.from_tree(tree | ({"n_head": heads} if heads else {}), f"config {path}")


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

"""Import a tokenizer of another project.   python -m stage1_tokenizer.import_weights FILE --family NAME --out RUN

    a checkpoint of torch, a safetensors file or a diffusers folder -> RUN/tokenizer.safetensors

All other commands then take RUN as `--tokenizer`. No code in the file runs; docs/weights.md.
"""

from pathlib import Path
from typing import Annotated, ClassVar

from pydantic_settings import CliPositionalArg

from stage1_tokenizer.config.base import CommandConfig, parse_command_line, read_yaml
from stage1_tokenizer.config.field_facts import Mark
from stage1_tokenizer.config.value_types import Size
from stage1_tokenizer.data.folder import FolderConfig
from stage1_tokenizer.engine.checkpoint import write_weights
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.console import format_command, print_note, say
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.file_names import describe_path
from stage1_tokenizer.engine.foreign_files import read_foreign_file
from stage1_tokenizer.import_weights.families import FAMILIES, FamilyName, recognise
from stage1_tokenizer.import_weights.family import Family, describe_names, find_folder_files
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer

IMAGE_SIZE = 256
"""Side of the images of a tokenizer whose config states none."""


class ImportConfig(CommandConfig):
    """Import the weights of a tokenizer of another project, exactly, or say which layer cannot be expressed."""

    reads_config: ClassVar[bool] = False

    file: CliPositionalArg[str]
    """Checkpoint of torch (.ckpt, .pt, .pth, .bin), safetensors file, or folder of diffusers."""
    family: FamilyName
    """Project and kind of the tokenizer."""
    config: Annotated[str | None, Mark.FREE] = None
    """Config of the model as its project wrote it (YAML, or JSON of diffusers), to be compared with the weights; null:
    sizes are read from the weights alone, and of a diffusers folder its config.json is used."""
    out: str
    """Folder of the new run, e.g. runs/stage1/NAME."""
    licence: str | None = None
    """Licence of the weights, as their authors state it. It is kept in the file, and published with it."""
    image_size: Size | None = None
    """Image size of later commands that work at one size; null: that of the config, or 256. The weights fit any."""
    root: str = "data"
    """Folder with images of your own, for later commands that use the data set of a tokenizer (analysis, evaluation,
    stage two). They take another one with --root or --data.root."""


def main() -> None:
    """Read the foreign weights, convert them, and write them as a run."""
    config = parse_command_line(ImportConfig)
    out = Path(config.out)
    check_is_free(out)
    weights, model_config = find_files(config)
    tree = None if model_config is None else read_yaml(model_config)
    family = FAMILIES[config.family](tree, str(model_config))
    foreign = read_foreign_file(weights)
    state = foreign.read_state_dict(family.state_keys, without=family.ignored)
    if config.family not in (found := recognise(state)):
        hint = f"its layers are those of {found}" if found else f"it has {describe_names(state)}"
        raise BadFileError(f"{weights}: is no {config.family} of {family.project}: {hint}. Give another --family")
    tokenizer = family.convert(state, choose_size(config, family), str(weights))
    write_run(out, tokenizer, config, {"source_file": weights.name, "source_sha256": foreign.sha256})
    describe(out, tokenizer, config)


def check_is_free(out: Path) -> None:
    """Raise ConfigError if a folder already has a tokenizer in it, or is a file."""
    if (out / TOKENIZER_FILE).exists() or out.is_file():
        raise ConfigError(f"--out {describe_path(out)}: there is a tokenizer or a file already; name another folder")


def find_files(config: ImportConfig) -> tuple[Path, Path | None]:
    """Return the file of the weights, and that of the project's config. Raises ConfigError: there are none."""
    path, given = Path(config.file), Path(config.config) if config.config else None
    if path.is_dir():
        weights, beside = find_folder_files(path)
        return weights, given or beside
    if not path.is_file():
        raise ConfigError(f"FILE {describe_path(path)}: there is no such file or folder")
    return path, given


def choose_size(config: ImportConfig, family: Family) -> object:
    """Return the image size: the given one, or that of the project's config, or a usual one."""
    size = config.image_size or family.image_size
    if size is None:
        print_note(f"no config states the image size, so it is {IMAGE_SIZE}; --image_size sets another")
    return IMAGE_SIZE if size is None else size


def write_run(out: Path, tokenizer: Tokenizer, config: ImportConfig, source: dict[str, str]) -> None:
    """Write the tokenizer with its origin in the header. Raises StorageError."""
    size, channels = tokenizer.config.image_size, tokenizer.config.image_channels
    data = FolderConfig(root=config.root, image_size=size, channels=channels)
    header = {"config": tokenizer.config.model_dump_json(), "data": data.model_dump_json(), "step": "0"}
    header |= source | {"source_family": config.family, "source_licence": config.licence or "unknown"}
    write_weights(out / TOKENIZER_FILE, tokenizer, "tokenizer", header)


def describe(out: Path, tokenizer: Tokenizer, config: ImportConfig) -> None:
    """Print what was imported, and commands that can follow."""
    count = sum(parameter.numel() for parameter in tokenizer.parameters())
    height, width = tokenizer.config.image_size
    codes = tokenizer.shape.in_words if tokenizer.bottleneck.depth else "a continuous latent"
    say(f"{out / TOKENIZER_FILE}: {config.family}, {count:,} parameters, images {height}x{width} -> {codes}")
    if config.licence is None:
        print_note("no licence was given; name it with --licence, so that whoever gets these weights knows it")
    say(f"next: {format_command('sampling/reconstruct.py', '--tokenizer', out)} IMAGES")


if __name__ == "__main__":
    run_command(main)

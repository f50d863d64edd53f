"""Train several presets for the same number of steps, and compare them in one table.

    python stage1_tokenizer/compare.py --presets cifar10_ae,cifar10_vqvae_ema --steps 300 -- --data.root PATH

    each preset -> train.py in a process of its own -> metrics on the validation split -> table and image grid

Options after ` -- ` go to every train.py. Writes runs/compare/PRESET (the run, and train.log), table.md, table.json and
reconstructions.png. The same command again continues: presets that are already trained are only measured.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from stage1_tokenizer.config.base import CommandConfig, parse_command_line, read_yaml
from stage1_tokenizer.diagnostics import comparison
from stage1_tokenizer.diagnostics.comparison import Failure, Row
from stage1_tokenizer.diagnostics.presets import find_presets, short_schedule
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.console import say, show_progress
from stage1_tokenizer.engine.errors import ConfigError, StorageError, UserError, shorten
from stage1_tokenizer.engine.lock import mark_folder
from stage1_tokenizer.perceptual import SMALLEST_SIDE, Perceptual, PerceptualConfig
from stage1_tokenizer.tokenizer import TOKENIZER_FILE

TRAIN = Path(__file__).resolve().parent / "train.py"
OWN_KEYS = ("config", "out", "steps", "batch_size")
"""Keys of train.py that this command sets."""


class CompareConfig(CommandConfig):
    """Train presets for the same number of steps and compare them. Options after ` -- ` go to every train.py."""

    presets: tuple[str, ...] = Field(min_length=1)
    """Presets to train, separated by commas: names of files in configs/stage1, or paths of YAML files. The table has
    this order."""
    steps: PositiveInt = 300
    """Optimizer steps of each preset; longer schedules (warm-up, start of the discriminator) are shortened to fit."""
    batch_size: PositiveInt = 64
    """Images per step of each preset, so that all presets see the same number of images."""
    out: str = "runs/compare"
    """Folder of the runs and the table."""
    lpips_net: Literal["alex", "vgg"] = "alex"
    """Backbone of LPIPS in the table."""
    lpips_weights: str | None = None
    """Path of the backbone's convolutions, a safetensors file as for perceptual.weights; null: download them."""
    pictures: NonNegativeInt = 8
    """Images per row of reconstructions.png; 0: do not write it."""


def main() -> None:
    """Train and measure each preset, then write the table; a preset that fails does not stop the others."""
    words, passed_on = split_arguments(sys.argv[1:])
    config = parse_command_line(CompareConfig, words)
    presets = find_presets(config.presets)
    lpips = load_lpips(config)
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        mark_folder(out)
    except OSError as error:
        raise StorageError(f"cannot write to {out}: {error.strerror}") from None

    rows: list[Row | Failure] = []
    reconstructions: list[comparison.PresetImages] = []
    for number, (name, preset) in show_progress(
        enumerate(presets.items(), start=1), len(presets), "preset", "comparing"
    ):
        begin = f"[{number}/{len(presets)}] {name}"
        try:
            command = training_command(preset, out / name, config, passed_on)
            if is_trained(out / name, command, preset):
                say(f"{begin}: trained already")
            else:
                say(f"{begin}: training")
                train(out / name, command, preset)
            smallest = SMALLEST_SIDE[config.lpips_net]
            row, images = comparison.measure_run(name, out / name, config.batch_size, lpips, smallest, config.pictures)
        except UserError as error:
            rows.append(Failure(name, " ".join(f"failed: {error}".split())))  # on one line, as a row of the table
            say(f"{begin}: failed: {error}")
            continue
        rows.append(row)
        reconstructions += [images] if images else []
        say(f"{begin}: PSNR {row.psnr:.2f} dB after {row.seconds:.0f} s")

    settings = {**config.tree(), "passed_on": passed_on}
    (out / "table.md").write_text(comparison.markdown_table(rows, table_caption(config, rows)), encoding="utf-8")
    (out / "table.json").write_text(comparison.json_table(rows, settings), encoding="utf-8")
    if reconstructions:
        comparison.write_image(reconstructions, out / "reconstructions.png")
    print(f"\n{comparison.console_table(rows)}\n\n{table_caption(config, rows)}\n\ntable: {out / 'table.md'}")
    failed = [row.preset for row in rows if isinstance(row, Failure)]
    if failed:
        raise UserError(f"{len(failed)} of {len(rows)} presets failed: {', '.join(failed)}; the table says why")


def split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """Split arguments at ` -- `: (arguments of this command, arguments for train.py).

    Raises:
        ConfigError: the second part sets a key that this command sets itself.
    """
    place = argv.index("--") if "--" in argv else len(argv)
    passed_on = argv[place + 1 :]
    for word in passed_on:
        if word.split("=")[0].removeprefix("--") in OWN_KEYS and word.startswith("--"):
            raise ConfigError(
                f"{word}: cannot follow ` -- `, because compare.py sets it; give --steps and --batch_size before ` -- `"
            )
    return argv[:place], passed_on


def load_lpips(config: CompareConfig) -> Perceptual | None:
    """Load LPIPS; return None, and print why, if its weights cannot be downloaded.

    Raises:
        ConfigError: the file `lpips_weights` does not exist.
        BadFileError: the file `lpips_weights` is damaged or does not fit.
    """
    wanted = PerceptualConfig(weight=1.0, net=config.lpips_net, weights=config.lpips_weights)
    try:
        return Perceptual(
            wanted, image_size=(256, 256)
        )  # large enough; each preset's own size is checked when it is measured
    except ConfigError as error:
        if config.lpips_weights is not None:
            raise
        print(f"LPIPS is not measured: {error}", flush=True)
        return None


def training_command(preset: Path, folder: Path, config: CompareConfig, passed_on: list[str]) -> list[str]:
    """Return the command that trains a preset for config.steps. Options in `passed_on` replace our own."""
    own_options = {
        "steps": config.steps,
        "batch_size": config.batch_size,
        "log_every": max(1, config.steps // 10),
        "validate_every": config.steps,  # only at the end, so that the measured speed is that of training
        "save_every": config.steps,
        **short_schedule(read_yaml(preset), config.steps),
    }
    given = {word.split("=")[0].removeprefix("--") for word in passed_on}
    options = [word for key, value in own_options.items() if key not in given for word in (f"--{key}", str(value))]
    return [sys.executable, str(TRAIN), "--config", str(preset), "--out", str(folder), *options, *passed_on]


def is_trained(folder: Path, command: list[str], preset: Path) -> bool:
    """Return True if the same command has finished before, and the preset's file has not changed since."""
    note = folder / "trained.json"
    if not ((folder / TOKENIZER_FILE).is_file() and note.is_file()):
        return False
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
    except ValueError:  # the file was cut off
        return False
    return bool(noted == finished_note(command, preset))


def train(folder: Path, command: list[str], preset: Path) -> None:
    """Run the command with its output in the folder's train.log. Raise UserError with its last message if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.log").open("a", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        text = (folder / "train.log").read_text(encoding="utf-8")
        raise UserError(f"exit code {code}: {last_error(text)} (see {folder / 'train.log'})")
    note = json.dumps(finished_note(command, preset), indent=2)
    (folder / "trained.json").write_text(note, encoding="utf-8")


def finished_note(command: list[str], preset: Path) -> dict[str, object]:
    """Return the content of trained.json, by which `is_trained` recognises a finished run."""
    return {"command": command[1:], "preset": preset.read_text(encoding="utf-8")}


def last_error(text: str) -> str:
    """Return the last error message in a command's output, or its last line; on one line, at most 300 characters."""
    starts = [match.start() for match in re.finditer(r"^[\w.]*(Error|Exception)\b", text, re.MULTILINE)]
    message = " ".join((text[starts[-1] :] if starts else text.strip().rpartition("\n")[2]).split())
    return shorten(message)


def table_caption(config: CompareConfig, rows: list[Row | Failure]) -> str:
    """Return the text under the table: budget, meaning of the columns, machine and devices."""
    devices = sorted({row.trained_on for row in rows if isinstance(row, Row)})
    warmup, start = config.steps // 10, config.steps // 2
    return (
        f"Each preset was trained for {config.steps:,} steps of {config.batch_size} images. Longer schedules were "
        f"shortened (warm-up to {warmup} steps, start of the discriminator and warm-up of the KL to {start}); other "
        "keys are those of the preset. Measured in float32 on the whole validation split. NMSE: mean squared error "
        f"divided by the variance of the data. LPIPS: backbone {config.lpips_net}. Per image: bits of its codes at "
        "log2 V bits per code, or numbers of a continuous latent. Images/s and seconds: training only, without "
        "validation and saving. "
        f"{', '.join(f'{name} {value}' for name, value in comparison.machine_facts().items())}; "
        f"{'; '.join(devices) or 'nothing was trained'}."
    )


if __name__ == "__main__":
    run_command(main)

"""Train presets for the same short budget, and compare them in one table.

    python stage1_tokenizer/compare.py --presets cifar10_ae,cifar10_vqvae_ema --steps 300 -- --data.root PATH

    each preset -> train.py, in a process of its own -> figures on the validation split -> table and picture

What follows ` -- ` goes to every run. Writes runs/compare/PRESET (the run, and train.log), table.md, table.json and
reconstructions.png. The same command again continues: what is trained already is only measured.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from stage1_tokenizer.config.base import CommandConfig, parse_command_line, read_yaml
from stage1_tokenizer.config.presets import find_presets, short_schedule
from stage1_tokenizer.diagnostics import comparison
from stage1_tokenizer.diagnostics.comparison import Failure, Row
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.console import counted, say
from stage1_tokenizer.engine.errors import ConfigError, StorageError, UserError
from stage1_tokenizer.engine.lock import mark_folder
from stage1_tokenizer.perceptual import SMALLEST, Perceptual, PerceptualConfig
from stage1_tokenizer.tokenizer import TOKENIZER_FILE

TRAIN = Path(__file__).resolve().parent / "train.py"
OWN_KEYS = ("config", "out", "steps", "batch_size")
LONGEST_MESSAGE = 300


class CompareConfig(CommandConfig):
    """Train presets for the same short budget and compare them. What follows ` -- ` goes to every run of train.py."""

    presets: tuple[str, ...] = Field(min_length=1)
    """Names of files in configs/stage1, or paths of YAML files: a,b,c. The table has their order."""
    steps: PositiveInt = 300
    """Optimizer steps of each; longer schedules (warm-up, the discriminator's start) are shortened to fit."""
    batch_size: PositiveInt = 64
    """Images per step of each, so that all of them see the same images."""
    out: str = "runs/compare"
    """The folder of the runs and the table."""
    lpips_net: Literal["alex", "vgg"] = "alex"
    """The backbone of the column LPIPS."""
    lpips_weights: str | None = None
    """Its convolutions, a safetensors file as for perceptual.weights; null: torchvision downloads them."""
    pictures: NonNegativeInt = 8
    """Images in a row of the picture; 0: no picture."""


def main() -> None:
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
    for number, (name, preset) in counted(enumerate(presets.items(), start=1), len(presets), "preset", "comparing"):
        begin = f"[{number}/{len(presets)}] {name}"
        try:
            command = training_command(preset, out / name, config, passed_on)
            if is_trained(out / name, command, preset):
                say(f"{begin}: trained already")
            else:
                say(f"{begin}: training")
                train(out / name, command, preset)
            smallest = SMALLEST[config.lpips_net]
            row, images = comparison.measure_run(name, out / name, config.batch_size, lpips, smallest, config.pictures)
        except UserError as error:
            rows.append(Failure(name, " ".join(f"failed: {error}".split())))  # on one line, as rows are
            say(f"{begin}: failed: {error}")
            continue
        rows.append(row)
        reconstructions += [images] if images else []
        say(f"{begin}: PSNR {row.psnr:.2f} dB after {row.seconds:.0f} s")

    settings = {**config.tree(), "passed_on": passed_on}
    (out / "table.md").write_text(comparison.markdown_table(rows, caption(config, rows)), encoding="utf-8")
    (out / "table.json").write_text(comparison.json_table(rows, settings), encoding="utf-8")
    if reconstructions:
        comparison.write_image(reconstructions, out / "reconstructions.png")
    print(f"\n{comparison.console_table(rows)}\n\n{caption(config, rows)}\n\ntable: {out / 'table.md'}")
    failed = [row.preset for row in rows if isinstance(row, Failure)]
    if failed:
        raise UserError(f"{len(failed)} of {len(rows)} presets failed: {', '.join(failed)}; the table says why")


def split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """(our own arguments, those after ` -- `, for train.py).

    Raises:
        ConfigError: among those for train.py is one that is ours to give.
    """
    place = argv.index("--") if "--" in argv else len(argv)
    passed_on = argv[place + 1 :]
    for word in passed_on:
        if word.split("=")[0].removeprefix("--") in OWN_KEYS and word.startswith("--"):
            raise ConfigError(f"{word}: is the same for all presets, or set for each; it cannot follow ` -- `")
    return argv[:place], passed_on


def load_lpips(config: CompareConfig) -> Perceptual | None:
    """LPIPS; None, with a line that says why, where the weights cannot be downloaded.

    Raises:
        ConfigError or BadFileError: `lpips_weights` names no fitting file.
    """
    wanted = PerceptualConfig(weight=1.0, net=config.lpips_net, weights=config.lpips_weights)
    try:
        return Perceptual(wanted, image_size=(256, 256))  # that of the data is looked at for each preset
    except ConfigError as error:
        if config.lpips_weights is not None:
            raise
        print(f"LPIPS is not measured: {error}", flush=True)
        return None


def training_command(preset: Path, folder: Path, config: CompareConfig, passed_on: list[str]) -> list[str]:
    """The command that trains a preset on the short budget. What the user passes on replaces what we would shorten."""
    ours = {
        "steps": config.steps,
        "batch_size": config.batch_size,
        "log_every": max(1, config.steps // 10),
        "validate_every": config.steps,  # at the end alone, so that the figures of speed are those of training
        "save_every": config.steps,
        **short_schedule(read_yaml(preset), config.steps),
    }
    given = {word.split("=")[0].removeprefix("--") for word in passed_on}
    options = [word for key, value in ours.items() if key not in given for word in (f"--{key}", str(value))]
    return [sys.executable, str(TRAIN), "--config", str(preset), "--out", str(folder), *options, *passed_on]


def is_trained(folder: Path, command: list[str], preset: Path) -> bool:
    """Whether this very command has finished before, on a preset that has not been edited since."""
    note = folder / "trained.json"
    if not ((folder / TOKENIZER_FILE).is_file() and note.is_file()):
        return False
    try:
        noted = json.loads(note.read_text(encoding="utf-8"))
    except ValueError:  # cut off, so it says nothing
        return False
    return bool(noted == finished_note(command, preset))


def train(folder: Path, command: list[str], preset: Path) -> None:
    """Run the command, its output in the folder's train.log; raises UserError with its message where it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "train.log").open("a", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        text = (folder / "train.log").read_text(encoding="utf-8")
        raise UserError(f"exit code {code}: {last_error(text)} (see {folder / 'train.log'})")
    note = json.dumps(finished_note(command, preset), indent=2)
    (folder / "trained.json").write_text(note, encoding="utf-8")


def finished_note(command: list[str], preset: Path) -> dict[str, object]:
    """What is remembered of a finished run."""
    return {"command": command[1:], "preset": preset.read_text(encoding="utf-8")}


def last_error(text: str) -> str:
    """The last error message of a command's output, on one line."""
    starts = [match.start() for match in re.finditer(r"^[\w.]*(Error|Exception)\b", text, re.MULTILINE)]
    message = " ".join((text[starts[-1] :] if starts else text.strip().rpartition("\n")[2]).split())
    return message if len(message) <= LONGEST_MESSAGE else message[: LONGEST_MESSAGE - 3] + "..."


def caption(config: CompareConfig, rows: list[Row | Failure]) -> str:
    """What was done, on what, and what the columns mean."""
    places = sorted({row.trained_on for row in rows if isinstance(row, Row)})
    warmup, start = config.steps // 10, config.steps // 2
    return (
        f"{config.steps:,} steps of {config.batch_size} images each: a short budget. Longer schedules are shortened to "
        f"it (warm-up to {warmup} steps, the discriminator's start and the KL's warm-up to {start}); all else is the "
        "preset's. Measured in float32 on the whole validation split. NMSE: mean squared error over the data's "
        f"variance. LPIPS: {config.lpips_net}. Per image: bits of its codes at a fixed length, or the numbers of a "
        "continuous latent. Images/s and seconds are of training alone. "
        f"{', '.join(f'{name} {value}' for name, value in comparison.machine_facts().items())}; "
        f"{'; '.join(places) or 'nothing was trained'}."
    )


if __name__ == "__main__":
    run_command(main)

"""Complete pictures: keep a part, make the rest.   python sampling/complete.py --keep top [--prior runs/stage2/NAME]

    --keep top, --box 8,8,16,16, --mask FILE    in-painting: what is kept; --invert makes just that part anew
    --grow.right 16 --grow.up 16                out-painting: pixels to add on any of the four sides

Writes, for each picture and each of its variants, OUT/000000-original.png, 000000-kept.png, 000000-0.png, ..., and
OUT/grid.png: a row for each picture, original and kept part first. Variant v of picture i follows from (seed, i, v). A
command that was interrupted, given again, makes only the variants that are missing.
"""

import hashlib
import time
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from sampling.completing import HIDDEN, Margins, Pictures, Task, complete, grow, kept_codes
from sampling.output import Output, close_output, open_output, picture_names, settings_of
from sampling.picture_files import read_png, rows_of, save_png, shape_of
from sampling.sampler import Sampler, SamplingConfig
from sampling.to_complete import ToComplete, read_pictures
from stage1_tokenizer.config.base import CommandConfig, Config, parse_command_line
from stage1_tokenizer.config.value_forms import Texts
from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.data.decode import decode
from stage1_tokenizer.data.order import parts_of, share
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.console import bar
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.launch import start_accelerator
from stage1_tokenizer.engine.names import located

GRID = "grid.png"


class GrowConfig(Config):
    """Pixels to add on each side; multiples of the tokenizer's factor."""

    up: NonNegativeInt = 0
    down: NonNegativeInt = 0
    left: NonNegativeInt = 0
    right: NonNegativeInt = 0


class CompleteConfig(CommandConfig, SamplingConfig):
    """Complete pictures: keep a part of each, let the prior make the rest; or grow them beyond their edges."""

    prior: str | None = None
    """A stage-two run's folder, or its prior.safetensors; null: the newest run under runs/stage2."""
    images: str | None = None
    """A picture, or a folder of pictures; null: the validation pictures of the prior's own data set."""
    n: PositiveInt = 8
    """Pictures to complete: the first ones."""
    keep: Literal["top", "bottom", "left", "right"] | None = None
    """Which half to keep; the default where nothing else is said is the top one."""
    box: tuple[NonNegativeInt, NonNegativeInt, PositiveInt, PositiveInt] | None = None
    """A box of pixels to keep: top, left, height, width."""
    mask: str | None = None
    """A picture of the size of the pictures: what is white in it is kept, what is black is made anew."""
    invert: bool = False
    """Make anew just what would have been kept, and keep the rest."""
    grow: GrowConfig = GrowConfig()
    variants: PositiveInt = 4
    """Completions of each picture."""
    paste: bool = True
    """Put the kept pixels back as they were; --no-paste shows them as the tokenizer has them, without a seam."""
    class_: Texts | None = Field(None, alias="class")
    """Name or number of the class of all pictures, or several that they have in turn; null: each one's own where the
    data set says it, else none."""
    seed: int = 0
    """Variant v of picture i follows from (seed, i, v)."""
    out: str | None = None
    """Folder for the pictures; default: a new numbered folder under completed/ in the prior's. Where the same settings
    were interrupted in it, or in the newest numbered one, only what is missing is made."""

    @property
    def margins(self) -> Margins:
        return Margins(self.grow.up, self.grow.down, self.grow.left, self.grow.right)

    @model_validator(mode="after")
    def _check(self) -> "CompleteConfig":
        given = [name for name in ("keep", "box", "mask") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} exclude each other: each says what is kept")
        if any(self.margins) and (given or self.invert):
            raise ValueError(f"grow keeps the whole picture, so {(given or ['invert'])[0]} means nothing beside it")
        return self


def main() -> None:
    config = parse_command_line(CompleteConfig)
    accelerator = start_accelerator()
    sampler = Sampler.load(config.prior, config, accelerator.device)
    margins = margins_in_codes(config.margins, sampler)
    chosen = read_pictures(sampler, config.images, config.n, config.class_, config.seed)
    keep = None if any(margins) else kept_pixels(config, sampler)
    kept = framed(chosen.pictures, keep, margins, sampler.factor)
    settings = settings_of(config.tree(), {**sampler.settings(), **described(chosen, kept)})
    names = picture_names(settings)
    made_of = dict.fromkeys(names, shape_of(kept[0]))
    out = open_output(accelerator, config.out, sampler.prior.path.parent / "completed", settings, made_of)
    named, where = one_line(str(sampler.prior.path)), one_line(str(out.path))
    accelerator.print(f"completing {len(chosen.pictures)} pictures with {named} in {config.precision} to {where}")

    began = time.monotonic()
    mine = out.missing[share(len(out.missing), accelerator.process_index, accelerator.num_processes)]
    total = len(mine) * config.candidates * codes_made(sampler, margins)
    shown = bar(total, "code", "completing")
    for part in parts_of(mine, config.batch_size):
        indices, variants = np.divmod(part, config.variants)
        task = Task(chosen.pictures[indices], indices, chosen.labels[indices], config.seed, variants)
        if keep is None:
            made = grow(sampler, task, margins, config.paste, shown.update)
        else:
            made = complete(sampler, task, keep, config.paste, shown.update)
        for place, picture in zip(part, made, strict=True):
            save_png(out.path / names[place], picture)
    shown.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        assemble(chosen.pictures, kept, config.variants, out)
        seconds, done = time.monotonic() - began, len(out.missing)
        print(f"{done} completions in {seconds:.1f} s ({done / max(seconds, 1e-9):.1f} a second): {where}/{GRID}")


def margins_in_codes(margins: Margins, sampler: Sampler) -> Margins:
    """Pixels to codes. Raises ConfigError where a side is no multiple of the tokenizer's factor."""
    factor = sampler.factor
    for name, pixels in margins._asdict().items():
        if pixels % factor:
            below = pixels // factor * factor
            raise ConfigError(
                f"grow.{name} {pixels}: a code of this tokenizer covers {factor}x{factor} pixels; the nearest that "
                f"fit are {below} and {below + factor}"
            )
    added = Margins(*(pixels // factor for pixels in margins))
    if any(added):
        height, width = sampler.grid
        sampler.check_size((height + added.up + added.down, width + added.left + added.right))
    return added


def kept_pixels(config: CompleteConfig, sampler: Sampler) -> NDArray[np.bool_]:
    """(H, W): what is kept.

    Raises:
        ConfigError: a box that leaves the picture, a mask that is not there or of another size, or nothing to do.
    """
    height, width = sampler.size
    kept = np.zeros((height, width), dtype=np.bool_)
    if config.mask is not None:
        path = Path(config.mask)
        if not path.is_file():
            raise ConfigError(f"mask {located(path)}: there is no such file")
        mask = decode(path, 1)[:, :, 0]
        if mask.shape != kept.shape:
            raise ConfigError(
                f"mask {path}: is {mask.shape[0]}x{mask.shape[1]} (height, width), but the pictures are "
                f"{height}x{width}"
            )
        kept = mask >= 128
    elif config.box is not None:
        top, left, high, wide = config.box
        if top + high > height or left + wide > width:
            raise ConfigError(
                f"box {top},{left},{high},{wide} (top, left, height, width) reaches to {top + high},{left + wide}, "
                f"beyond the pictures of {height}x{width}"
            )
        kept[top : top + high, left : left + wide] = True
    else:
        rows, columns = np.arange(height)[:, None], np.arange(width)[None, :]
        halves = {
            "top": rows < height // 2,
            "bottom": rows >= height // 2,
            "left": columns < width // 2,
            "right": columns >= width // 2,
        }
        kept |= halves[config.keep or "top"]
    kept = ~kept if config.invert else kept
    if kept.all():
        raise ConfigError("everything is kept, so there is nothing to complete; --invert makes the kept part anew")
    if not kept_codes(kept, sampler.factor).any():
        raise ConfigError(
            f"what is kept covers no code whole, so the prior would not see it: a code of this tokenizer covers "
            f"{sampler.factor}x{sampler.factor} pixels"
        )
    return kept


def framed(pictures: Pictures, keep: NDArray[np.bool_] | None, margins: Margins, factor: int) -> Pictures:
    """The pictures (n, H, W, C) with all grey that is not kept, or with a grey margin where they are to grow."""
    if keep is not None:
        return np.where(keep[None, :, :, None], pictures, np.uint8(HIDDEN))
    up, down, left, right = (codes * factor for codes in margins)
    return np.pad(pictures, ((0, 0), (up, down), (left, right), (0, 0)), constant_values=HIDDEN)


def codes_made(sampler: Sampler, margins: Margins) -> int:
    """Codes that a completion goes through: those of the grid, and of each of the grids that it grows to."""
    (height, width), depth, total = sampler.grid, sampler.prior.model.shape.K, 0
    for down, right in ((margins.down, margins.right), (0, margins.left), (margins.up, 0)):
        height, width = height + down, width + right
        total += height * width * depth if down or right else 0
    return total or sampler.codes_per_picture


def described(chosen: ToComplete, kept: Pictures) -> dict[str, object]:
    """What settings.json says of the pictures themselves, `kept` being what is shown of them."""
    digest = hashlib.sha256(chosen.pictures.tobytes() + kept.tobytes()).hexdigest()[:32]
    return {"labels": chosen.labels.tolist(), "sources": chosen.names, "pictures": digest}


def assemble(pictures: Pictures, kept: Pictures, variants: int, out: Output) -> None:
    """Write the originals, what is kept of them, and the grid, and say that all is finished."""
    for index, (picture, part) in enumerate(zip(pictures, kept, strict=True)):
        save_png(out.path / f"{index:06d}-original.png", picture)
        save_png(out.path / f"{index:06d}-kept.png", part)
    columns = ["original", "kept", *map(str, range(variants))]
    rows = [[f"{index:06d}-{what}.png" for what in columns] for index in range(len(pictures))]
    save_png(out.path / GRID, rows_of([[read_png(out.path / name) for name in row] for row in rows]))
    close_output(out, [GRID, *(name for row in rows for name in row)])


if __name__ == "__main__":
    run_command(main)

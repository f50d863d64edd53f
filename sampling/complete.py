"""Complete pictures: keep a part, make the rest.   python sampling/complete.py --keep top [--prior runs/stage2/NAME]

    --keep top, --box 8,8,16,16, --mask FILE    in-painting: what is kept; --invert makes just that part anew
    --grow.right 16 --grow.up 16                out-painting: pixels to add on any of the four sides

Writes, for each picture and each of its variants, OUT/000000-original.png, 000000-kept.png, 000000-0.png, ..., and
OUT/grid.png: a row for each picture, original and kept part first. Variant v of picture i follows from (seed, i, v). A
command that was interrupted, given again, makes only the variants that are missing.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sampling.completion import (
    CompleteConfig,
    ImageArrays,
    Margins,
    Originals,
    Task,
    codes_made,
    complete,
    framed,
    grow,
    kept_pixels,
    margins_in_codes,
    read_originals,
)
from sampling.output import Output, close_output, image_names, open_output, settings_of
from sampling.sampler import Progress, Sampler
from sampling.sampling_loop import GRID, make_missing
from sampling.saved_images import arrange_rows, read_png, save_png, shape_of
from stage1_tokenizer.config.base import parse_command_line
from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.launch import start_accelerator


@dataclass(frozen=True)
class CompletionSource:
    """Completions of pictures, by number: variant v of picture i has number i * variants + v."""

    sampler: Sampler
    config: CompleteConfig
    originals: Originals
    keep: NDArray[np.bool_] | None
    """(H, W): the pixels to keep; None: all, and the pictures grow."""
    margins: Margins
    """In codes."""

    doing, unit = "completing", "code"

    @property
    def units_per_image(self) -> int:
        return self.config.candidates * codes_made(self.sampler, self.margins)

    def sample(self, numbers: NDArray[np.int64], progress: Progress) -> ImageArrays:
        """The completions of these numbers, (n, H, W, C)."""
        sampler, config = self.sampler, self.config
        indices, variants = np.divmod(numbers, config.variants)
        task = Task(self.originals.pictures[indices], indices, self.originals.labels[indices], config.seed, variants)
        if self.keep is None:
            return grow(sampler, task, self.margins, config.paste, progress)
        return complete(sampler, task, self.keep, config.paste, progress)


def main() -> None:
    config = parse_command_line(CompleteConfig)
    accelerator = start_accelerator()
    sampler = Sampler.load(config.prior, config, accelerator.device)
    margins = margins_in_codes(config.margins, sampler)
    originals = read_originals(sampler, config.images, config.n, config.class_, config.seed)
    pictures, keep = originals.pictures, None if any(margins) else kept_pixels(config, sampler)
    kept = framed(pictures, keep, margins, sampler.factor)
    digest = hashlib.sha256(pictures.tobytes() + kept.tobytes()).hexdigest()[:32]
    found = {"labels": originals.labels.tolist(), "sources": originals.names, "pictures": digest}
    settings = settings_of(config, {**sampler.settings(), **found})
    wanted = dict.fromkeys(image_names(settings), shape_of(kept[0]))
    out = open_output(accelerator, config.out, sampler.prior.path.parent / "completed", settings, wanted)
    named, where = one_line(str(sampler.prior.path)), one_line(str(out.path))
    accelerator.print(f"completing {len(pictures)} pictures with {named} in {config.precision} to {where}")

    source = CompletionSource(sampler, config, originals, keep, margins)
    seconds = make_missing(accelerator, source, out, config.batch_size)
    if accelerator.is_main_process:
        assemble(pictures, kept, config.variants, out)
        done = len(out.missing)
        print(f"{done} completions in {seconds:.1f} s ({done / max(seconds, 1e-9):.1f} a second): {where}/{GRID}")


def assemble(pictures: ImageArrays, kept: ImageArrays, variants: int, out: Output) -> None:
    """Write the originals, what is kept of them, and the grid, and say that all is finished."""
    for index, (picture, part) in enumerate(zip(pictures, kept, strict=True)):
        save_png(out.path / f"{index:06d}-original.png", picture)
        save_png(out.path / f"{index:06d}-kept.png", part)
    columns = ["original", "kept", *map(str, range(variants))]
    rows = [[f"{index:06d}-{what}.png" for what in columns] for index in range(len(pictures))]
    save_png(out.path / GRID, arrange_rows([[read_png(out.path / name) for name in row] for row in rows]))
    close_output(out, [GRID, *(name for row in rows for name in row)])


if __name__ == "__main__":
    run_command(main)

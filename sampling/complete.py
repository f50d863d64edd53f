"""Complete images: keep a part, generate the rest.   python sampling/complete.py --keep top [--prior runs/stage2/NAME]

    --keep top, --box 8,8,16,16, --mask FILE    in-painting: the part to keep; --invert generates this part instead
    --grow.right 16 --grow.up 16                out-painting: pixels to add on any of the four sides

Writes for each image OUT/000000-original.png, 000000-kept.png and its variants 000000-0.png, ..., and OUT/grid.png with
one row per image: original, kept part, variants. Variant v of image i depends on (seed, i, v). If the command is
interrupted, the same command makes only the missing variants.
"""

from sampling.completion_source import CompleteConfig, CompletionSource
from sampling.output import Output, build_settings, close_output, image_names, open_output
from sampling.sampling_loop import GRID, make_missing
from sampling.saved_images import arrange_rows, read_png, save_png
from stage1_tokenizer.config.base import parse_command_line
from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.launch import start_accelerator


def main() -> None:
    """Complete the images and write the variants and the grid."""
    config = parse_command_line(CompleteConfig)
    accelerator = start_accelerator()
    source = CompletionSource.load(config, accelerator.device)
    prior = source.sampler.prior
    settings = build_settings(config, source.settings())
    shapes = dict.fromkeys(image_names(settings), source.image_shape)
    out = open_output(accelerator, config.out, prior.outputs / "completed", settings, shapes)
    weights, folder = one_line(prior.source), one_line(str(out.path))
    accelerator.print(
        f"completing {len(source.originals.images)} images with {weights} (step {prior.step}) in {config.precision} to "
        f"{folder}"
    )

    seconds = make_missing(accelerator, source, out, config.batch_size)
    if accelerator.is_main_process:
        finish_completions(source, out)
        n = len(out.missing)
        print(f"{n} completions in {seconds:.1f} s ({n / max(seconds, 1e-9):.1f} completions/s): {folder}/{GRID}")


def finish_completions(source: CompletionSource, out: Output) -> None:
    """Write the originals, their kept parts and the grid, and mark the folder as finished."""
    originals = source.originals.images
    for index, (original, kept) in enumerate(zip(originals, source.kept, strict=True)):
        save_png(out.path / f"{index:06d}-original.png", original)
        save_png(out.path / f"{index:06d}-kept.png", kept)
    columns = ["original", "kept", *map(str, range(source.config.variants))]
    rows = [[f"{index:06d}-{column}.png" for column in columns] for index in range(len(originals))]
    save_png(out.path / GRID, arrange_rows([[read_png(out.path / name) for name in row] for row in rows]))
    close_output(out, [GRID, *(name for row in rows for name in row)])


if __name__ == "__main__":
    run_command(main)

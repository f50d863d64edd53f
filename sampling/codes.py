"""Write the codes of images into a file for other programs, or decode such a file.

    python sampling/codes.py --tokenizer RUN IMAGES --out codes.npz      a folder of images -> codes
    python sampling/codes.py --tokenizer RUN codes.npz --out decoded     codes -> PNG files of the same names

codes.npz has codes (N, h, w, K), labels, names, classes, shape and the tokenizer's fingerprint; `--out codes.npy`
writes the codes alone, and the rest into codes.json. Files that cannot be read are named and left out, and the command
then ends with exit code 3. Nothing is overwritten.
"""

import time
from pathlib import Path

from pydantic_settings import CliPositionalArg

from sampling.code_files import EXTENSIONS, ImageCodes
from sampling.input_images import png_names
from sampling.saved_images import save_png
from stage1_tokenizer.config.base import CommandConfig, parse_command_line
from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.file_names import describe_path
from stage1_tokenizer.engine.launch import start_accelerator
from stage1_tokenizer.tokenizer import LoadedTokenizer


class CodesConfig(CommandConfig):
    """Write the codes of a folder of images, or decode a file of codes."""

    tokenizer: str
    """Folder of a stage-one run, its tokenizer.safetensors, hf:OWNER/NAME[@REVISION] or pretrained:NAME."""
    source: CliPositionalArg[str]
    """A folder of images to encode; or a file of codes to decode, .npz or .npy."""
    out: str
    """File to write the codes into, .npz or .npy; or folder for the images."""


def main() -> None:
    """Encode or decode, by the kind of source."""
    config = parse_command_line(CodesConfig)
    source, out = Path(config.source), Path(config.out)
    is_file = source.is_file()
    if not is_file and not source.is_dir():
        raise ConfigError(f"source {describe_path(source)}: there is no such file or folder")
    if (source if is_file else out).suffix not in EXTENSIONS:
        raise ConfigError(
            f"source {describe_path(source)}: is not a folder of images or a file of codes (.npz, .npy)"
            if is_file
            else f"--out {describe_path(out)}: codes are written as .npz or .npy, e.g. --out codes.npz"
        )
    for path in (out, out.with_suffix(".json")) if out.suffix == ".npy" else (out,):
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise ConfigError(f"--out {describe_path(path)}: is there already, and nothing is overwritten")
    accelerator = start_accelerator()
    if accelerator.num_processes > 1:
        raise ConfigError(f"this command runs in one process, but {accelerator.num_processes} were started")
    loaded = LoadedTokenizer.load(config.tokenizer, accelerator.device)
    start = time.monotonic()
    if is_file:
        decode_file(loaded, source, out)
    else:
        encode_folder(loaded, source, out)
    print(f"in {time.monotonic() - start:.1f} s")


def decode_file(loaded: LoadedTokenizer, source: Path, out: Path) -> None:
    """Write an image for each name in a file of codes."""
    encoded = ImageCodes.read(source)
    images = encoded.decode(loaded)
    targets = [out / name for name in png_names(encoded.names)]
    for target in targets:
        if not target.resolve().is_relative_to(out.resolve()):
            raise BadFileError(f"{source}: a name leads out of the folder: {one_line(str(target))}")
    for target, image in zip(targets, images, strict=True):
        save_png(target, image)
    print(f"decoded {len(images)} images from {encoded.shape.in_words} to {one_line(str(out))}", end=" ")


def encode_folder(loaded: LoadedTokenizer, source: Path, out: Path) -> None:
    """Write the codes of all images in a folder. Raises BadFileError: some images were left out."""
    encoded = ImageCodes.encode(loaded, source)
    paths = " and ".join(one_line(str(path)) for path in encoded.write(out))
    classes = f" in {len(encoded.classes)} classes" if encoded.classes else ""
    print(f"encoded {len(encoded.names)} images{classes} to {encoded.shape.in_words}: {paths}", end=" ")
    if encoded.left_out:
        for error in encoded.left_out:
            print(f"\nleft out: {one_line(error)}")
        raise BadFileError(f"{len(encoded.left_out)} images were left out, see the lines above")


if __name__ == "__main__":
    run_command(main)

"""Publish a run with a model card.   python sampling/publish.py RUN --to FOLDER --licence apache-2.0

    --to FOLDER            a new folder
    --to hf:OWNER/NAME     a repository of the Hugging Face Hub (needs `hf auth login`)
    --dtype bfloat16       half the bytes, rounded where no code depends on it
    --format diffusers     a tokenizer as a folder that diffusers.VQModel or diffusers.AutoencoderKL loads
    --format onnx          a tokenizer as encoder.onnx and decoder.onnx, for onnxruntime and others
    --format exported_program   the same as encoder.pt2 and decoder.pt2, for torch.export.load

    config.yaml  prior.safetensors  tokenizer.safetensors  README.md  samples.png

Others name the result where they would name a run: `--prior hf:OWNER/NAME`, `--tokenizer FOLDER`. The files contain
no absolute path of this machine. Nothing but the published folder is written.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from pydantic import Field, model_validator
from pydantic_settings import CliPositionalArg

from sampling.publishing.folder import Dtype, new_folder, write_folder
from sampling.publishing.push import HubTarget
from sampling.publishing.source import Source
from stage1_tokenizer.config.base import CommandConfig, parse_command_line
from stage1_tokenizer.data.bad_files import one_line
from stage1_tokenizer.diagnostics.report.run_folder import CONFIG
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.engine.console import print_note
from stage1_tokenizer.engine.hub import is_hub_name
from stage1_tokenizer.engine.pretrained import find_pretrained_name
from stage1_tokenizer.tokenizer import TOKENIZER_FILE


class PublishConfig(CommandConfig):
    """Publish the weights of a run as a folder or on the Hugging Face Hub."""

    run: CliPositionalArg[str]
    """Folder of a run of either stage, its tokenizer.safetensors or prior.safetensors, or pretrained:NAME."""
    to: str
    """A folder that does not exist yet, or hf:OWNER/NAME."""
    licence: str = Field(min_length=1, max_length=200)
    """Licence of the weights, for example apache-2.0. The data and imported weights may limit the choice."""
    format: Literal["tessera", "diffusers", "onnx", "exported_program"] = "tessera"
    """tessera: the files of this project. diffusers: a tokenizer with network vqgan and bottleneck vq or kl for the
    package diffusers. onnx, exported_program: encoder and decoder of any tokenizer as programs that run without this
    package (sampling/exporting/)."""
    dtype: Dtype = "float32"
    """Number format of the weights. bfloat16: half the bytes for a prior and for a tokenizer's decoder; encoder and
    codebook stay float32, so that no code changes. The card has PSNR and bits per token before and after rounding."""
    samples: int = Field(16, ge=0, le=256)
    """Samples in the model card, with the defaults of generate.py; a tokenizer's card shows the reconstructions that
    its training wrote last. 0: no images, for data that nobody may see."""
    private: bool = False
    """Make a new repository of the Hub private; an existing one stays as it is."""

    @model_validator(mode="after")
    def _check(self) -> "PublishConfig":
        if self.private and not is_hub_name(self.to):
            raise ValueError("--private has no effect on a folder; leave it out, or give --to hf:OWNER/NAME")
        if self.dtype != "float32" and self.format != "tessera":
            raise ValueError(f"--dtype {self.dtype}: --format {self.format} has float32 only; leave one of them out")
        return self


def main() -> None:
    """Write the folder, and push it if it is for the Hub."""
    config = parse_command_line(PublishConfig)
    target = HubTarget(config.to) if is_hub_name(config.to) else None  # no access is an error before any work
    source = Source.open(config.run)
    if source.run.is_in_use:
        print_note(f"{source.run.path} is in training; its weights of step {source.loaded.step:,} are published")
    if source.run.config_trouble and (source.run.path / CONFIG).exists():
        print_note(f"the config is not published: {one_line(source.run.config_trouble)}")
    if target is None:
        with new_folder(Path(config.to)) as folder:
            write_published(config, source, folder)
        print(f"published step {source.loaded.step:,} of {one_line(str(source.run.path))}: {one_line(config.to)}")
        return
    with TemporaryDirectory() as name:
        write_published(config, source, Path(name))
        pushed = target.push(Path(name), f"Step {source.loaded.step:,}", config.private)
    print(f"published step {source.loaded.step:,} of {one_line(str(source.run.path))}: {pushed}")


def write_published(config: PublishConfig, source: Source, folder: Path) -> None:
    """Write the files that the options ask for."""
    path = Path(config.to).absolute()
    target = config.to if is_hub_name(config.to) else str(find_pretrained_name(path / TOKENIZER_FILE) or path.name)
    write_folder(
        source, folder, target=target, licence=config.licence, format_=config.format, dtype=config.dtype,
        samples=config.samples,
    )  # fmt: skip


if __name__ == "__main__":
    run_command(main)

"""The files of a published folder: weights of ours, or those of another program, with config, images and model card."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from sampling.exporting.exported_program import write_exported_program
from sampling.exporting.onnx_file import write_onnx
from sampling.noise import NoiseSource
from sampling.prior_defaults import ALWAYS_SHOWN, describe_draw
from sampling.publishing.card import CARD, Written, model_card
from sampling.publishing.diffusers_format import CONFIG_FILE, WEIGHTS_FILE, to_diffusers
from sampling.publishing.rounding import describe_change, round_weights
from sampling.publishing.source import Source, published_config, published_data
from sampling.sampler import Sampler
from sampling.saved_images import arrange_grid, save_png
from stage1_tokenizer.config.base import write_yaml
from stage1_tokenizer.config.yaml_and_json import parse_json
from stage1_tokenizer.diagnostics.report.run_folder import CONFIG
from stage1_tokenizer.engine.checkpoint import read_weights, to_cpu, write_tensors
from stage1_tokenizer.engine.console import progress_bar, say
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.files import storage_error, write_file
from stage1_tokenizer.engine.initial_weights import hash_weights
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, LoadedTokenizer
from stage2_prior.prior import load_prior

Dtype = Literal["float32", "bfloat16"]
"""Number format of published weights."""
SAMPLES = "samples.png"
RECONSTRUCTIONS = "reconstructions.png"
SEED = 0
"""Seed of the samples in a published folder."""


def write_weights_files(source: Source, folder: Path, dtype: Dtype) -> Source:
    """Write weights and config. The tensors (rounded if `dtype` says so) and the config in the headers are those of the
    run; headers and config name no folder of this machine.

    Returns:
        The run with the weights that were written.

    Raises:
        BadFileError: the run's weights have changed since they were loaded.
    """
    for name, loaded_header in source.headers.items():
        tensors, header = read_weights(source.run.path / name, loaded_header["kind"])
        is_tokenizer = name == TOKENIZER_FILE
        changed = hash_weights(header["config"], tensors) != source.tokenizer.fingerprint if is_tokenizer else False
        if changed or header != loaded_header:
            raise BadFileError(
                f"{source.run.path}: its weights have changed since they were loaded; is it still in training? Publish "
                "it when it has ended"
            )
        if dtype == "bfloat16":
            tensors, header = round_weights(tensors, header, source)
        data = published_data(parse_json(header["data"]))
        write_tensors(folder / name, tensors, {**header, "data": json.dumps(data, separators=(",", ":"))})
    if source.run.config:
        write_yaml(folder / CONFIG, published_config(source.run))
    prior = load_prior(folder) if source.prior else None
    return replace(source, tokenizer=prior.tokenizer if prior else LoadedTokenizer.load(folder), prior=prior)


def check_is_tokenizer(source: Source, format_: str) -> None:
    """Raise ConfigError if the run is a prior's, for which a format has no model."""
    if source.prior is not None:
        raise ConfigError(
            f"--format {format_}: {source.run.path} is the run of a prior, and this format has no model for it; name "
            "its tokenizer.safetensors to publish the tokenizer"
        )


def write_diffusers_files(source: Source, folder: Path) -> str:
    """Write the tokenizer as a model of diffusers. Returns the name of its class.

    Raises:
        ConfigError: the run is a prior's, or diffusers cannot express a layer.
    """
    check_is_tokenizer(source, "diffusers")
    model = to_diffusers(source.tokenizer.tokenizer)
    write_tensors(folder / WEIGHTS_FILE, to_cpu(model.weights), {"format": "pt"})  # diffusers asks for this entry
    write_file(folder / CONFIG_FILE, model.config_json)
    return model.class_name


def write_images(source: Source, folder: Path, count: int) -> dict[str, str]:
    """Write a grid of samples, and the newest reconstructions of the training. Returns their captions by name."""
    captions = {}
    run, is_tokenizer = source.run, source.prior is None
    if source.prior is not None or source.tokenizer.tokenizer.config.bottleneck.kind == "kl":
        images, caption = sample_images(source, count)
        save_png(folder / SAMPLES, arrange_grid(list(images)))
        captions[SAMPLES] = caption
    logged = [(step, path) for step, path in run.logged_images("reconstructions") if step == source.tokenizer.step]
    if is_tokenizer and logged:
        write_file(folder / RECONSTRUCTIONS, logged[-1][1].read_bytes())
        captions[RECONSTRUCTIONS] = "Validation images and their reconstructions, in turn"
    return captions


def sample_images(source: Source, count: int) -> tuple[NDArray[np.uint8], str]:
    """Sample images (count, H, W, C) with the defaults of generate.py, and say how."""
    with progress_bar(count, "image", "sampling") as bar:
        if source.prior is None:
            noise = NoiseSource(source.tokenizer, torch.device("cpu"), SEED, temperature=1.0)
            return noise.sample(np.arange(count), bar.update), f"{count} samples, decoded from noise of seed {SEED}"
        sampler = Sampler(source.prior)
        images = sampler.sample(count, seed=SEED)
        bar.update(count)
    turn = ", the classes in turn" if source.prior.classes else ""
    options = sampler.config.defaults_beside({}) | {"guidance": sampler.guidance.scale}
    how = describe_draw(options, ALWAYS_SHOWN)
    return images, f"{count} samples of seed {SEED} with {how}{turn}; none was left out"


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that gets its name when the block ends without an error; otherwise nothing is left.

    Raises:
        ConfigError: there is a file or a folder that is not empty.
        StorageError: the folder cannot be written.
    """
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        if path.exists() and not (path.is_dir() and not any(path.iterdir())):
            raise ConfigError(f"--to {path}: is there already; name a new folder, or move it away")
        temporary.mkdir(parents=True)
        yield temporary
        if path.exists():
            path.rmdir()
        temporary.rename(path)
    except OSError as error:
        raise storage_error(path, error) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_folder(
    source: Source, folder: Path, *, target: str, licence: str, format_: str, dtype: Dtype, samples: int
) -> None:
    """Write all files. target: the name by which others load the folder. samples: 0 writes no images.

    Raises:
        ConfigError: the format cannot express the run.
        BadFileError: the run's weights have changed since they were loaded.
    """
    published, rounding, diffusers_class, exported = source, "", None, None
    match format_:
        case "diffusers":
            diffusers_class = write_diffusers_files(source, folder)
        case "onnx" | "exported_program":
            check_is_tokenizer(source, format_)
            write = write_onnx if format_ == "onnx" else write_exported_program
            exported = [path.name for path in write(source.tokenizer, folder)]
        case _:
            published = write_weights_files(source, folder, dtype)
    if dtype == "bfloat16":
        rounding = describe_change(source, published)
        say(f"rounded to bfloat16. {rounding}")
    images = write_images(published, folder, samples) if samples else {}
    written = Written(target, licence, images, published.tokenizer.fingerprint, rounding, diffusers_class, exported)
    write_file(folder / CARD, model_card(source, written))

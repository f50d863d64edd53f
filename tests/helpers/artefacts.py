"""Tiny artefacts with random weights: a tokenizer's file, a prior's folder, drawn images, image folders.

Grids are not square, and no two sizes are equal, so that a wrong order or size is noticed.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.bottlenecks.vq import VectorQuantizer, VqConfig
from stage1_tokenizer.data import DataConfig
from stage1_tokenizer.data.shapes import ShapesConfig
from stage1_tokenizer.engine.checkpoint import CHECKSUM_KEY, checksum, write_weights
from stage1_tokenizer.engine.seeds import draw_uniforms
from stage1_tokenizer.networks.sonnet import SonnetNetworkConfig
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, LoadedTokenizer, Tokenizer, TokenizerConfig, TokenShape
from stage2_prior.base import Prior
from stage2_prior.gpt.model import Gpt, GptConfig
from stage2_prior.pixelcnn.model import PixelCnn, PixelCnnConfig
from stage2_prior.prior import PRIOR_FILE, LoadedPrior, PriorHeader, load_prior

# On a busy machine, two threads wait for each other a hundred times longer than these tensors take to compute.
torch.set_num_threads(1)

IMAGE_SIZE = (8, 12)
CODES = VqConfig(codebook_size=16, kmeans_init=False)


def shapes(**options: Any) -> ShapesConfig:
    """Return a data set of 23 drawn images of 8x12 for training, and 7 for validation."""
    return ShapesConfig(**{"image_size": IMAGE_SIZE, "train_images": 23, "validation_images": 7, **options})


def write_tokenizer(
    folder: Path,
    seed: int = 0,
    factor: int = 4,
    channels: int = 3,
    bottleneck: BottleneckConfig = CODES,
    data: DataConfig | Mapping[str, Any] | None = None,
) -> LoadedTokenizer:
    """Write a tokenizer with random weights: 8x12 images, a grid of 2x3 (factor 4), 16 codes, nearly all in use."""
    torch.manual_seed(seed)
    network = SonnetNetworkConfig(
        factor=factor, channels=8, residual_channels=4, blocks=1, latent_channels=6, local=True
    )
    data = data or shapes()
    size = data["image_size"] if isinstance(data, Mapping) else data.image_size
    model = Tokenizer(TokenizerConfig(image_size=size, image_channels=channels, network=network, bottleneck=bottleneck))
    if isinstance(bottleneck, VqConfig):
        with torch.no_grad():  # codebook vectors are copies of latents
            z = model.encoder(torch.rand(64, channels, *size) * 2 - 1)
            assert isinstance(model.bottleneck, VectorQuantizer)
            model.bottleneck.codebook.weight.copy_(z.permute(0, 2, 3, 1).flatten(0, 2)[: bottleneck.codebook_size])
            model.decoder[-1].weight.mul_(20.0)  # type: ignore[operator]
    tree = dict(data) if isinstance(data, Mapping) else data.tree()
    header = {"config": model.config.model_dump_json(), "data": json.dumps(tree), "step": "7"}
    write_weights(folder / TOKENIZER_FILE, model, "tokenizer", header)
    return LoadedTokenizer.load(folder)


def gpt(shape: TokenShape, classes: int = 2, seed: int = 0, **options: Any) -> Gpt:
    """Build a GPT with random weights in eval mode; its distributions depend on label and context."""
    torch.manual_seed(seed)
    model = Gpt(GptConfig(**{"layers": 2, "width": 24, "heads": 2, **options}), shape, classes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "to_v" in name or "to_out" in name or "head.output" in name or ".ff." in name:
                parameter.mul_(3.0)
    return model.eval().requires_grad_(False)


def pixelcnn(shape: TokenShape, classes: int = 2, seed: int = 0, **options: Any) -> PixelCnn:
    """Build a PixelCNN with random weights in eval mode, whose context is all of a small grid; otherwise like `gpt`."""
    torch.manual_seed(seed)
    model = PixelCnn(PixelCnnConfig(**{"layers": 4, "width": 24, **options}), shape, classes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(20.0 if ".label." in name else 2.0)
    return model.eval().requires_grad_(False)


MAKERS: dict[str, Callable[..., Prior]] = {"gpt": gpt, "pixelcnn": pixelcnn}
"""Every kind of prior."""


def write_prior(
    folder: Path,
    classes: tuple[str, ...] = ("cat", "dog"),
    seed: int = 0,
    tokenizer: Mapping[str, Any] | None = None,
    kind: str = "gpt",
    **options: Any,
) -> LoadedPrior:
    """Write a prior with random weights and its tokenizer into a folder."""
    beside = write_tokenizer(folder, **(tokenizer or {}))
    shape = beside.tokenizer.shape
    model = MAKERS[kind](shape, len(classes), seed, **options)
    header = PriorHeader(prior=model.config, shape=shape, classes=classes, tokenizer=beside.fingerprint)
    described = {"config": header.model_dump_json(), "data": json.dumps(beside.data), "step": "9"}
    write_weights(folder / PRIOR_FILE, model, "prior", described)
    return load_prior(folder)


def noise_of(n: int, length: int, seed: int = 0) -> Tensor:
    """Draw uniform noise (n, length) in [0, 1), as `generate` takes it."""
    indices = np.arange(n)
    return torch.from_numpy(draw_uniforms(seed, "test", np.zeros_like(indices), indices, length))


def edit_weights(path: Path, **changed: Tensor) -> None:
    """Replace tensors in a safetensors file and keep its header, but renew the checksum, if there is one."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert changed.keys() <= tensors.keys()
    tensors |= changed
    if CHECKSUM_KEY in header:
        header[CHECKSUM_KEY] = checksum(tensors, header)
    save_file(tensors, path, header)


def write_image_folder(
    root: Path, classes: tuple[str, ...], per_class: int = 12, size: tuple[int, int] = IMAGE_SIZE
) -> None:
    """Write root/CLASS/00.png ...; the images of a class have a colour that depends on its name, and slight noise."""
    for name in classes:
        rng = np.random.default_rng(list(name.encode()))
        colour = rng.integers(30, 220, size=3)
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            image = (colour + rng.integers(-20, 20, size=(*size, 3))).astype(np.uint8)
            Image.fromarray(image).save(root / name / f"{number:02d}.png")


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, to find changes later."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pictures_of(out: Path) -> dict[str, bytes]:
    """Return the image files that generate.py wrote, by name."""
    return {path.name: path.read_bytes() for path in sorted(out.glob("0*.png"))}


def pixels_of(path: Path) -> NDArray[np.uint8]:
    """Read an image, (H, W, C), or (H, W) if it is grey."""
    with Image.open(path) as image:
        return np.asarray(image)

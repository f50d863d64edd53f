"""An imported tokenizer in all other commands: reconstruct, evaluate, analyze, check, stage two, sampling; options of
ours that imports need."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from stage1_tokenizer.bottlenecks import build_bottleneck
from stage1_tokenizer.bottlenecks.kl import KlConfig
from stage1_tokenizer.bottlenecks.vq import VqConfig
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.networks.vqgan import CornerDownsample, VqganEncoder, VqganNetworkConfig
from stage1_tokenizer.tokenizer import build_tokenizer
from tests.helpers.commands import names_of, run
from tests.helpers.foreign import FOREIGN, import_weights


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Import the fixture of LlamaGen. Return the run, and a folder with 24 images in two classes."""
    folder = tmp_path_factory.mktemp("imported")
    images = np.random.default_rng(0).integers(0, 255, (24, 40, 36, 3), dtype=np.uint8)
    for i, image in enumerate(images):
        path = folder / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    weights = FOREIGN / "llamagen_vq" / "vq.pt"
    words = ("--family", "llamagen_vq", "--image_size", 32, "--root", folder / "images", "--licence", "MIT")
    assert import_weights(weights, *words, "--out", folder / "run").code == 0
    return folder / "run", folder / "images"


def test_it_works_with_every_command(imported: tuple[Path, Path], tmp_path: Path) -> None:
    """Reconstructions, metrics, diagnostic images, a check of the files, a prior on its codes, and samples."""
    tokenizer, images = imported
    commands: list[tuple[object, ...]] = [
        ("sampling/reconstruct.py", "--tokenizer", tokenizer, images / "class0", "--out", tmp_path / "reconstructed"),
        ("sampling/evaluate.py", "--tokenizer", tokenizer, "--extractor.kind", "none", "--perceptual.weight", 0),
        ("stage1_tokenizer/analyze.py", "--tokenizer", tokenizer, "--images", 8, "--out", tmp_path / "analysis"),
        ("sampling/check.py", tokenizer),
        (
            "stage2_prior/train.py", "--tokenizer", tokenizer, "--out", tmp_path / "prior", "--steps", 2,
            "--batch_size", 4, "--prior.layers", 1, "--prior.width", 32, "--prior.heads", 2, "--samples", 0,
            "--no-report",
        ),
        ("sampling/generate.py", "--prior", tmp_path / "prior", "-n", 2, "--out", tmp_path / "samples"),
    ]  # fmt: skip
    for script, *words in commands:
        ended = run(names_of(str(script))["main"], *words)
        assert ended.code == 0, (script, ended)
    assert len(list((tmp_path / "reconstructed").glob("*.png"))) == 12
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 2


def test_corner_downsampling_is_a_kernel_of_four_with_a_row_of_zeros() -> None:
    """A kernel of 3 after padding at the corner equals one of 4 with padding 1 whose first row and column are 0."""
    torch.manual_seed(0)
    corner = CornerDownsample(5).double()
    plain = torch.nn.Conv2d(5, 5, 4, 2, padding=1).double()
    with torch.no_grad():
        plain.weight.zero_()[:, :, 1:, 1:] = corner.weight
        plain.bias.copy_(corner.bias)  # type: ignore[union-attr, arg-type]
    for size in ((8, 8), (7, 10), (13, 5)):
        x = torch.randn(2, 5, *size, dtype=torch.float64)
        assert torch.allclose(corner(x), plain(x), atol=1e-12)


def test_options_of_the_network() -> None:
    """norm_groups sets the groups of every norm, moments doubles the encoder's output alone."""
    config = VqganNetworkConfig(channels=24, multipliers=(1, 2), norm_groups=8, moments=True, latent_channels=3)
    encoder = VqganEncoder(3, config)
    norms = [module for module in encoder.modules() if isinstance(module, torch.nn.GroupNorm)]
    assert {norm.num_groups for norm in norms} == {8}
    assert encoder(torch.zeros(1, 3, 8, 8)).shape == (1, 6, 4, 4)
    tokenizer = build_tokenizer(config, KlConfig(project=True), (8, 8), 3)
    x_hat, bottlenecked = tokenizer(torch.zeros(1, 3, 8, 8))
    assert bottlenecked.z_q.shape == (1, 3, 4, 4)
    assert x_hat.shape == (1, 3, 8, 8)
    with pytest.raises(ConfigError, match=r"network\.moments is for bottleneck\.kind kl"):
        build_tokenizer(config, VqConfig(), (8, 8), 3)


def test_projection_at_equal_dimensions() -> None:
    """`project` puts convolutions around codebook and latent, which then learn."""
    z = torch.randn(2, 6, 3, 3)
    for config in (VqConfig(codebook_size=8, kmeans_init=False, project=True), KlConfig(project=True)):
        bottleneck = build_bottleneck(config, 6)
        assert (
            sum(module.kernel_size == (1, 1) for module in bottleneck.modules() if isinstance(module, torch.nn.Conv2d))
            == 2
        )
        bottleneck(z).z_q.sum().backward()
        assert all(parameter.grad is not None for name, parameter in bottleneck.named_parameters() if "out" in name)


def test_dot_product() -> None:
    """The code is the codebook vector with the greatest dot product, which the nearest one need not be."""
    config = VqConfig(codebook_size=40, update="gradient", dot_product=True, kmeans_init=False)
    bottleneck, z = build_bottleneck(config, 6), torch.randn(2, 6, 5, 3)
    book = bottleneck.codebooks()[0].mul_(torch.rand(40, 1) * 3)
    codes = bottleneck(z).codes
    assert codes is not None
    expected = torch.einsum("bdhw,vd->bhwv", z, book).argmax(-1)
    nearest = torch.cdist(z.permute(0, 2, 3, 1).reshape(-1, 6), book).argmin(-1)
    assert torch.equal(codes[..., 0], expected)
    assert not torch.equal(codes.flatten(), nearest)
    for options in ({"cosine": True, "update": "gradient"}, {"update": "ema"}):
        with pytest.raises(ValueError, match="dot_product: true needs"):
            VqConfig(dot_product=True, **options)

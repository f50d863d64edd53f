"""Imported tokenizers compute what the code of their projects computes: on the fixtures, and at odd sizes."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from stage1_tokenizer.bottlenecks.vq import VectorQuantizer
from stage1_tokenizer.engine.files import file_sha256
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, LoadedTokenizer, Tokenizer
from tests.helpers.foreign import (
    FOREIGN,
    Layout,
    Reference,
    import_weights,
    random_state,
    relative_error,
    write_checkpoint,
)

FILES = {"taming_vqgan": ("last.ckpt", "model.yaml"), "llamagen_vq": ("vq.pt", "config.yaml")}


def vectors_of(tokenizer: Tokenizer, x: Tensor) -> Tensor:
    """Encode images to the vectors before quantization (B, d, h, w)."""
    assert isinstance(tokenizer.bottleneck, VectorQuantizer)
    z: Tensor = tokenizer.bottleneck.space.project_in(tokenizer.encoder(x))
    return z


@pytest.mark.parametrize("with_config", [True, False], ids=["config", "no config"])
@pytest.mark.parametrize("family", FILES)
@torch.no_grad()
def test_fixtures_of_the_projects(family: str, with_config: bool, tmp_path: Path) -> None:
    """Latents and reconstructions differ by rounding (1e-5 of the largest value), codes not at all."""
    weights, config = (FOREIGN / family / name for name in FILES[family])
    words = ["--config", config] if with_config else ["--image_size", 64]
    ended = import_weights(weights, "--family", family, "--out", tmp_path / "run", "--licence", "MIT", *words)
    assert ended.code == 0, ended.err
    tokenizer = LoadedTokenizer.load(tmp_path / "run").tokenizer
    expected = load_file(FOREIGN / family / "expected.safetensors")
    z = vectors_of(tokenizer, expected["x"])
    x_hat, bottlenecked = tokenizer(expected["x"])
    assert bottlenecked.codes is not None
    assert relative_error(z, expected["z"]) < 1e-5
    assert relative_error(x_hat, expected["reconstruction"]) < 1e-5
    assert torch.equal(bottlenecked.codes[..., 0], expected["codes"])
    assert torch.equal(tokenizer.decode_codes(bottlenecked.codes), x_hat)


def test_the_header_names_the_source(tmp_path: Path) -> None:
    """Family, file, SHA-256 and licence travel with the weights."""
    weights = FOREIGN / "taming_vqgan" / "last.ckpt"
    assert import_weights(weights, "--family", "taming_vqgan", "--out", tmp_path, "--licence", "MIT (2020)").code == 0
    with safe_open(tmp_path / TOKENIZER_FILE, framework="pt") as file:
        header = file.metadata()
    assert header["source_family"] == "taming_vqgan"
    assert header["source_file"] == "last.ckpt"
    assert header["source_sha256"] == file_sha256(weights)
    assert header["source_licence"] == "MIT (2020)"


LAYOUTS = {
    "taming_vqgan": Layout(),
    "taming_vqgan, three levels": Layout(widths=(32, 32, 96), blocks=2, attention=(0, 2), latent=5, dim=3),
    "taming_vqgan, one level": Layout(widths=(32,), attention=()),
    "ibq": Layout(blocks=2, latent=6, dim=6),
    "llamagen_vq": Layout(llamagen=True, widths=(32, 64, 64), attention=(2,), latent=8, dim=4),
}


@pytest.mark.parametrize("name", LAYOUTS)
@torch.no_grad()
def test_equal_to_a_slow_reference(name: str, tmp_path: Path) -> None:
    """In float64 to 1e-10, at odd sizes that are not square; the codes are those of float32 too."""
    family, layout = name.partition(",")[0], LAYOUTS[name]
    kind = {"ibq": "product", "llamagen_vq": "sphere"}.get(family, "nearest")
    state = random_state(layout)
    path = write_checkpoint(tmp_path / "a.ckpt", state, "model" if layout.llamagen else "state_dict")
    ended = import_weights(path, "--family", family, "--out", tmp_path / "run", "--image_size", 32)
    assert ended.code == 0, ended.err
    tokenizer, reference = LoadedTokenizer.load(tmp_path / "run").tokenizer, Reference(state, layout)
    exact = copy.deepcopy(tokenizer).double()
    assert isinstance(exact.bottleneck, VectorQuantizer)
    for size in ((32, 32), (19, 26), (13, 41)):
        x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1)) * 2 - 1
        vectors = reference.vectors(x)
        codes = reference.codes(vectors, kind)
        assert len(set(codes.flatten().tolist())) > 8
        assert relative_error(vectors_of(exact, x.double()), vectors) < 1e-10
        assert torch.equal(tokenizer.encode_codes(x)[..., 0], codes)
        z_q = exact.bottleneck.codes_to_latents(codes[..., None])
        assert relative_error(exact.decode(z_q), reference.images(codes, kind)) < 1e-10


def test_averaged_weights_are_imported(tmp_path: Path) -> None:
    """Lightning files of SEED-Voken have weights of the last step beside averaged ones, which their code evaluates."""
    last, averaged = random_state(Layout(), 0), random_state(Layout(), 1)
    both = last | {f"model_ema.{name.replace('.', '')}": tensor for name, tensor in averaged.items()}
    both |= {"model_ema.decay": torch.tensor(0.999), "model_ema.num_updates": torch.tensor(5)}
    for name, state in (("both", both), ("averaged", averaged)):
        path = write_checkpoint(tmp_path / f"{name}.ckpt", state)
        assert import_weights(path, "--family", "ibq", "--out", tmp_path / name, "--image_size", 32).code == 0
    fingerprints = {LoadedTokenizer.load(tmp_path / name).fingerprint for name in ("both", "averaged")}
    assert len(fingerprints) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_formats_are_converted(dtype: torch.dtype, tmp_path: Path) -> None:
    """The weights are float32 with the same values, and the command says so."""
    state = {name: tensor.to(dtype) for name, tensor in random_state(Layout()).items()}
    path = write_checkpoint(tmp_path / "a.ckpt", state)
    ended = import_weights(path, "--family", "taming_vqgan", "--out", tmp_path / "run", "--image_size", 32)
    assert ended.code == 0
    assert f"in {str(dtype).removeprefix('torch.')} were converted to float32" in ended.err
    weights = load_file(tmp_path / "run" / TOKENIZER_FILE)
    assert torch.equal(weights["encoder.0.weight"], state["encoder.conv_in.weight"].float())
    assert torch.equal(weights["bottleneck.codebook.weight"], state["quantize.embedding.weight"].float())

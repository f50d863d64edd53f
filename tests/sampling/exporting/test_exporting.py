"""Tokenizers as programs of torch.export and as ONNX files, which compute what the tokenizer computes."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from sampling.exporting import exported_program, onnx_file
from sampling.exporting.exported_program import write_exported_program
from sampling.exporting.onnx_file import write_onnx
from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.bottlenecks.nearest import _find_nearest_exported, find_nearest
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.networks import NetworkConfig
from stage1_tokenizer.tokenizer import LoadedTokenizer, Tokenizer, TokenizerConfig, code_fingerprint, fingerprint
from tests.helpers.commands import ROOT
from tests.helpers.quantizers import EVERY_KIND, name_of

Tree = dict[str, Any]
SONNET: Tree = {"kind": "sonnet", "channels": 8, "residual_channels": 4, "blocks": 1, "latent_channels": 6}
VQGAN: Tree = {"kind": "vqgan", "channels": 8, "multipliers": [1, 2], "latent_channels": 6, "attention": [1]}
MLP: Tree = {"kind": "mlp", "hidden": [16], "factor": 4, "latent_channels": 6}
VQ: Tree = {"kind": "vq", "codebook_size": 16, "code_dim": 4}
FAST = ("vq-codebook_size=16", "fsq-levels=[4, 3, 5]", "kl-channels=3")
"""Kinds that the fast tests export."""
SIZES = ((1, 8, 12), (5, 4, 4), (2, 40, 28))
"""Numbers and sizes of images that are neither those of the recorded input nor those of the exporter's own check."""
WRITERS = (write_exported_program, write_onnx)


def loaded(network: Tree, bottleneck: Tree, image_size: tuple[int, int] = (8, 12)) -> LoadedTokenizer:
    """Return a tokenizer whose codebook has started from latents of noise."""
    torch.manual_seed(0)
    config = TokenizerConfig(
        image_size=image_size,
        image_channels=3,
        network=TypeAdapter[Any](NetworkConfig).validate_python(network),
        bottleneck=TypeAdapter[Any](BottleneckConfig).validate_python(bottleneck),
    )
    model = Tokenizer(config).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    images = torch.rand(16, 3, *image_size) * 2 - 1
    last = [layer for layer in model.encoder.children() if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear))][-1]
    assert last.bias is not None
    if isinstance(last, torch.nn.Conv2d):  # latents of mean 0 and spread 1, else most would have the same code
        z = model.encoder(images)
        spread, mean = torch.std_mean(z, dim=(0, 2, 3))
        last.weight.div_(spread[:, None, None, None])
        last.bias.sub_(mean).div_(spread)
    model.bottleneck.start(model.encoder(images))
    return LoadedTokenizer(model, Path("tokenizer.safetensors"), fingerprint(model), {}, 0, code_fingerprint(model))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedTokenizer, Path]:
    """Return a tokenizer, and a folder with both formats of it in sub-folders named after the functions."""
    folder, model = tmp_path_factory.mktemp("exported"), loaded(SONNET, VQ)
    for write in WRITERS:
        write(model, folder / write.__name__)
    return model, folder


def runs_from(folder: Path, half: str) -> Callable[[Tensor], Tensor]:
    """Return one half as its file runs: by torch.export.load, or by onnxruntime."""
    description = json.loads((folder / "export.json").read_text(encoding="utf-8"))[half]
    file = folder / description["file"]
    if file.suffix == ".pt2":
        program: Callable[[Tensor], Tensor] = torch.export.load(file).module()
        return program
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    name, result = description["input"]["name"], description["output"]["name"]
    return lambda x: torch.from_numpy(session.run([result], {name: x.numpy()})[0])


def check_agreement(
    tokenizer: Tokenizer, folder: Path, sizes: tuple[tuple[int, int, int], ...], tolerance: float = 1e-5
) -> None:
    """Compare files and tokenizer: all codes are equal, images and latents to a tolerance times the largest value."""
    encode, decode = runs_from(folder, "encoder"), runs_from(folder, "decoder")
    for batch, height, width in sizes:
        images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(height)) * 2 - 1
        encoded = tokenizer.encode(images)
        latents = encoded.z_q if encoded.codes is None else encoded.codes
        got = encode(images)
        assert got.dtype == latents.dtype
        if encoded.codes is None:
            torch.testing.assert_close(got, latents, rtol=0, atol=tolerance * float(latents.abs().max()))
        else:
            assert torch.equal(got, latents)
            assert height * width * batch < 100 or len({*got.flatten().tolist()}) > 3  # else any program would agree
        expected = tokenizer.decode(encoded.z_q)
        torch.testing.assert_close(decode(latents), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, id=name_of(kind), marks=[] if name_of(kind) in FAST else pytest.mark.slow)
        for kind in EVERY_KIND
    ],
)
def test_every_kind(kind: Tree, write: Callable[[LoadedTokenizer, Path], list[Path]], tmp_path: Path) -> None:
    model = loaded(SONNET, kind)
    paths = write(model, tmp_path)
    assert sorted(paths) == sorted(tmp_path.iterdir())
    check_agreement(model.tokenizer, tmp_path, SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("write", WRITERS)
def test_attention_and_upsampling(write: Callable[[LoadedTokenizer, Path], list[Path]], tmp_path: Path) -> None:
    """From 512 positions on, a VQGAN on a CPU folds its upsampling kernels; the exported programs do not."""
    model = loaded(VQGAN, VQ)
    write(model, tmp_path)
    check_agreement(model.tokenizer, tmp_path, ((1, 8, 8), (3, 36, 40)), tolerance=3e-5)


@pytest.mark.parametrize("write", WRITERS)
def test_a_network_of_one_size(write: Callable[[LoadedTokenizer, Path], list[Path]], tmp_path: Path) -> None:
    model = loaded(MLP, VQ)
    write(model, tmp_path)
    check_agreement(model.tokenizer, tmp_path, ((1, 8, 12), (7, 8, 12)))
    description = json.loads((tmp_path / "export.json").read_text(encoding="utf-8"))
    assert description["encoder"]["input"]["shape"] == ["B", 3, 8, 12]
    assert not description["any_image_size"]
    with pytest.raises((AssertionError, RuntimeError, onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument)):
        runs_from(tmp_path, "encoder")(torch.zeros(1, 3, 12, 8))  # as many pixels in another shape


def test_a_grid_of_one_position(tmp_path: Path) -> None:
    """torch.export fixes a side of 1, so the recorded input has a larger one."""
    model = loaded(SONNET, VQ, image_size=(4, 4))
    write_exported_program(model, tmp_path)
    check_agreement(model.tokenizer, tmp_path, SIZES)


def test_many_codes() -> None:
    """Above 2048 codes the exported search has several tiles."""
    vectors, codebook = torch.randn(300, 8), torch.randn(5000, 8)
    codebook[4000] = codebook[70]  # of two equal vectors the first is taken
    vectors[:5] = codebook[[70, 4999, 2048, 2047, 0]]
    codes = find_nearest(vectors, codebook)
    assert codes[:5].tolist() == [70, 4999, 2048, 2047, 0]
    assert torch.equal(_find_nearest_exported(vectors, codebook), codes)
    codes = find_nearest(vectors, codebook, dot_product=True)
    assert torch.equal(_find_nearest_exported(vectors, codebook, dot_product=True), codes)


def test_without_this_package(exported: tuple[LoadedTokenizer, Path]) -> None:
    """A process that imports nothing of this project runs both formats, with the results of this one."""
    model, folder = exported
    images = torch.rand(2, 3, 16, 20) * 2 - 1
    codes = model.tokenizer.encode_codes(images)
    np.savez(folder / "expected.npz", images=images, codes=codes, decoded=model.tokenizer.decode_codes(codes))
    script = """
import sys, numpy, onnxruntime, torch
expected = numpy.load("expected.npz")
codes = onnxruntime.InferenceSession("write_onnx/encoder.onnx").run(None, {"image": expected["images"]})[0]
image = onnxruntime.InferenceSession("write_onnx/decoder.onnx").run(None, {"codes": codes})[0]
assert (codes == expected["codes"]).all() and abs(image - expected["decoded"]).max() < 1e-5
codes = torch.export.load("write_exported_program/encoder.pt2").module()(torch.from_numpy(expected["images"]))
image = torch.export.load("write_exported_program/decoder.pt2").module()(codes)
assert (codes.numpy() == expected["codes"]).all() and abs(image.detach().numpy() - expected["decoded"]).max() < 1e-5
assert not any(name.partition(".")[0] in ("stage1_tokenizer", "stage2_prior", "sampling") for name in sys.modules)
print("same")
"""
    command = [sys.executable, "-I", "-W", "ignore", "-c", script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout == "same\n", done.stderr


def test_files_hold_only_what_they_need(exported: tuple[LoadedTokenizer, Path]) -> None:
    """No half has weights of the other half, running means of the codebook, or paths of this installation."""
    _, folder = exported
    for write in WRITERS:
        for path in (folder / write.__name__).iterdir():
            assert str(ROOT).encode() not in path.read_bytes()
            assert str(Path(torch.__file__).parent).encode() not in path.read_bytes()
    encoder, decoder = (
        torch.export.load(folder / "write_exported_program" / f"{half}.pt2").state_dict
        for half in ("encoder", "decoder")
    )
    codebook = "bottleneck.codebook.weight"
    assert codebook in encoder.keys() & decoder.keys()
    assert {name.partition(".")[0] for name in encoder} == {"encoder", "bottleneck"}
    assert {name.partition(".")[0] for name in decoder} == {"decoder", "bottleneck"}
    assert not any("sums" in name or "counts" in name for name in (*encoder, *decoder))
    assert "bottleneck.space.project_out.weight" not in encoder
    assert "bottleneck.space.project_in.weight" not in decoder


def test_the_tokenizer_stays_as_it_is(exported: tuple[LoadedTokenizer, Path]) -> None:
    model, _ = exported
    assert fingerprint(model.tokenizer) == model.fingerprint == fingerprint(loaded(SONNET, VQ).tokenizer)
    assert next(model.tokenizer.encoder.parameters()).is_contiguous(memory_format=torch.channels_last)


def test_names_of_sizes(exported: tuple[LoadedTokenizer, Path]) -> None:
    """Programs that read the ONNX file show B, h and w, not torch's numbered symbols."""
    encoder, decoder = (
        onnxruntime.InferenceSession(exported[1] / "write_onnx" / f"{half}.onnx", providers=["CPUExecutionProvider"])
        for half in ("encoder", "decoder")
    )
    assert encoder.get_inputs()[0].shape == decoder.get_outputs()[0].shape == ["B", 3, "4*h", "4*w"]
    assert encoder.get_outputs()[0].shape == decoder.get_inputs()[0].shape == ["B", "h", "w", 1]


def test_a_wrong_program_is_not_written(tmp_path: Path) -> None:
    def convert(half: exported_program.Half) -> tuple[bytes, exported_program.Program]:
        return b"", lambda x: half.module(x) + 1

    with pytest.raises(RuntimeError, match=r"only 0\.0% of the exported program's codes"):
        exported_program.write_halves(loaded(SONNET, VQ), tmp_path, "wrong", "bin", convert)
    with pytest.raises(RuntimeError, match="differs from the tokenizer by 1"):
        exported_program.write_halves(loaded(SONNET, {"kind": "kl"}), tmp_path, "wrong", "bin", convert)
    assert not [*tmp_path.iterdir()]


def test_onnx_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_file, "LARGEST_FILE", 100)
    with pytest.raises(ConfigError, match=r"bytes of weights, and an ONNX file holds at most 100; use --format exp"):
        write_onnx(loaded(SONNET, VQ), tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(ConfigError, match=r"needs onnxscript, which is not installed; type: pip install .*\[onnx\]"):
        write_onnx(loaded(SONNET, VQ), tmp_path)
    assert not [*tmp_path.iterdir()]

"""Training that starts from another tokenizer's weights: what stays equal, what is fresh, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from stage1_tokenizer.config.base import read_saved_yaml
from stage1_tokenizer.data.image_batches import normalise
from stage1_tokenizer.data.open_data import OpenData
from stage1_tokenizer.data.saved_config import parse_data_config
from stage1_tokenizer.discriminator import DISCRIMINATOR_FILE
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, LoadedTokenizer
from tests.helpers.artefacts import edit_weights
from tests.helpers.commands import ROOT, Ended, names_of, run
from tests.helpers.processes import run_processes
from tests.helpers.training import TINY, assert_close, checksums, log, part, train

SCRIPT = "stage1_tokenizer/train.py"
STATED = {key: value for key, value in TINY.items() if key.split(".")[0] not in {"network", "bottleneck"}}
STATED = {key: value for key, value in STATED.items() if "image_size" not in key and "discriminator" not in key}
"""Options of a tiny run without its architecture, which --init_from states."""
SOURCES: dict[str, dict[str, Any]] = {
    "vq": {"bottleneck.revive_below": 2.0},
    "vq_gradient": {"bottleneck.update": "gradient", "bottleneck.code_dim": 2},
    "vq_library": {"bottleneck.kind": "vq_library", "bottleneck.codebook_size": 8},
    "rvq": {"bottleneck.kind": "rvq", "bottleneck.codebook_size": 8, "bottleneck.temperature": 0.5},
    "simvq": {"bottleneck.kind": "simvq", "bottleneck.codebook_size": 8},
    "kl": {"bottleneck.kind": "kl", "bottleneck.warmup_steps": 50},
    "vqgan": {
        "network.kind": "vqgan",
        "network.channels": 4,
        "network.multipliers": "1,2",
        "network.latent_channels": 4,
        "network.dropout": 0.2,
    },
}


def fine_tune(out: Path, source: Path, **options: object) -> Ended:
    """Run the training in this process, from a source, with an option's two underscores for a dot."""
    given = {**STATED, "init_from": source, "out": out, **{key.replace("__", "."): v for key, v in options.items()}}
    words = []
    for key, value in given.items():
        words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return run(names_of(SCRIPT)["main"], *words)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with a discriminator."""
    folder = tmp_path_factory.mktemp("source")
    run_processes(1, train, folder, {"adversarial.start": 1})
    return folder


def images_of(loaded: LoadedTokenizer) -> Tensor:
    """Return all training images of a tokenizer's data set, (N, C, H, W)."""
    batches = OpenData(parse_data_config(loaded.data, "")).image_batches("train", 0)
    return normalise(batches.batch(np.arange(len(batches)))[0])


def encoded(folder: Path) -> Tensor:
    """Return the codes of all training images, or their latents where the bottleneck has no codes."""
    loaded = LoadedTokenizer.load(folder)
    bottlenecked = loaded.tokenizer.encode(images_of(loaded))
    return bottlenecked.z_q if bottlenecked.codes is None else bottlenecked.codes


@pytest.mark.parametrize("kind", SOURCES)
def test_only_the_decoder_learns(tmp_path: Path, kind: str) -> None:
    """Encoder and bottleneck, with running means, counters and revival, are equal to the last bit in weights, mean and
    file; the codes of all images are the same, and the decoder is another."""
    old, new = tmp_path / "source", tmp_path / "tuned"
    run_processes(1, train, old, {**SOURCES[kind], "adversarial.weight": 0.0})
    ended = fine_tune(new, old, train="decoder", adversarial__weight=0.0)
    assert ended.code == 0, ended.err
    theirs = load_file(old / TOKENIZER_FILE)
    for ours in (part(new, 4, "tokenizer"), part(new, 4, "ema"), load_file(new / TOKENIZER_FILE)):
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            if not name.startswith("decoder."):
                assert torch.equal(ours[name], tensor), name
        assert any(not torch.equal(ours[name], tensor) for name, tensor in theirs.items() if "decoder" in name)
    assert torch.equal(encoded(new), encoded(old))
    before, after = LoadedTokenizer.load(old), LoadedTokenizer.load(new)
    assert after.code_fingerprint == before.code_fingerprint
    assert after.fingerprint != before.fingerprint
    assert after.makes_codes_of(before.fingerprint), "a prior of a former version has this one in its header"
    assert not before.makes_codes_of(after.fingerprint)


def test_a_frozen_encoder_has_no_dropout(tmp_path: Path) -> None:
    """Otherwise the decoder would learn from codes that no image has."""
    run_processes(1, train, tmp_path / "source", {**SOURCES["vqgan"], "adversarial.weight": 0.0})
    modes: dict[str, set[bool]] = {"encoder": set(), "decoder": set()}
    names = names_of(SCRIPT)
    build = names["build_tokenizer"]

    def watched(*args: Any) -> nn.Module:
        tokenizer: nn.Module = build(*args)
        for name, seen in modes.items():
            getattr(tokenizer, name).register_forward_hook(
                lambda module, _, output, seen=seen: seen.add(module.training) if torch.is_grad_enabled() else None
            )
        return tokenizer

    names["build_tokenizer"] = watched
    words = [f"--{key}={value}" for key, value in STATED.items() if value is not True]
    words += ["--no-report", "--train=decoder", f"--init_from={tmp_path / 'source'}", f"--out={tmp_path / 'new'}"]
    ended = run(names["main"], *words, "--adversarial.weight=0")
    assert ended.code == 0, ended.err
    assert modes == {"encoder": {False}, "decoder": {True}}


def test_only_the_encoder_stays(source: Path, tmp_path: Path) -> None:
    """With `bottleneck_and_decoder` the codebook follows the images, so the code fingerprint is another."""
    assert fine_tune(tmp_path, source, train="bottleneck_and_decoder").code == 0
    ours, theirs = load_file(tmp_path / TOKENIZER_FILE), load_file(source / TOKENIZER_FILE)
    changed = {name.split(".")[0] for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)}
    assert changed == {"bottleneck", "decoder"}
    before, after = LoadedTokenizer.load(source), LoadedTokenizer.load(tmp_path)
    assert after.code_fingerprint != before.code_fingerprint
    assert not after.makes_codes_of(before.fingerprint)


def test_it_starts_from_the_mean_of_the_weights_and_the_discriminator(source: Path, tmp_path: Path) -> None:
    """With a learning rate of nearly 0, the first step leaves the weights of the source's file: not its last weights,
    no new ones, no k-means. The optimizer is fresh, and step 0 is the first."""
    options = {"optim.lr": 1e-30, "adversarial.start": 0, "steps": 1, "bottleneck.decay": 0.999999}
    ended = fine_tune(tmp_path, source, **options)
    assert ended.code == 0, ended.err
    assert f"the discriminator starts from {source / DISCRIMINATOR_FILE}" in ended.out
    ours, file, last = part(tmp_path, 1, "tokenizer"), load_file(source / TOKENIZER_FILE), part(source, 4, "tokenizer")
    learned = {name for name in file if not name.startswith("bottleneck.")}
    assert all(torch.equal(ours[name], file[name]) for name in learned)
    assert any(not torch.equal(last[name], file[name]) for name in learned)
    codebook = "bottleneck.codebook.weight"
    assert torch.allclose(ours[codebook], file[codebook], rtol=1e-4, atol=1e-5)
    theirs = part(source, 4, "discriminator")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in part(tmp_path, 1, "discriminator").items())
    assert part(tmp_path, 1, "optimizer")["0.step"] == 1
    assert log(tmp_path)[0]["step"] == 1


def test_the_discriminator_lies_beside_the_tokenizer(source: Path, tmp_path: Path) -> None:
    """Its file has the weights of the last state; without it a fine-tuning starts a new one, and says so."""
    saved, state = load_file(source / DISCRIMINATOR_FILE), part(source, 4, "discriminator")
    assert saved.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in saved.items())
    (tmp_path / "alone").mkdir()
    shutil.copy(source / TOKENIZER_FILE, tmp_path / "alone")
    options = {"adversarial.discriminator.channels": 4, "adversarial.discriminator.layers": 1}
    ended = fine_tune(tmp_path / "new", tmp_path / "alone" / TOKENIZER_FILE, **options)
    assert ended.code == 0, ended.err
    assert "so the discriminator starts from random weights" in ended.out
    checked = run(names_of("sampling/check.py")["main"], source)
    assert checked.code == 0, checked.out
    assert "the discriminator of step 4" in checked.out


def test_a_fine_tuning_resumes_exactly(source: Path, tmp_path: Path) -> None:
    """Trap 41 with a source: a stop and the same command give the weights of the uninterrupted run; config.yaml holds
    the source's fingerprint, and another source is refused."""
    options = {**STATED, "init_from": source, "train": "decoder"}
    options = {key: value for key, value in options.items() if key not in TINY}
    for name, stop in (("whole", None), ("halves", ("save", 2)), ("halves", None)):
        run_processes(1, train, tmp_path / name, options, stop)
    assert checksums(tmp_path / "halves", 4) == checksums(tmp_path / "whole", 4)
    assert log(tmp_path / "halves") == log(tmp_path / "whole")
    saved = read_saved_yaml(tmp_path / "whole" / "config.yaml")
    assert saved["init_from"] == LoadedTokenizer.load(source).fingerprint
    other = tmp_path / "other"
    shutil.copytree(source, other)
    tensors = load_file(other / TOKENIZER_FILE)
    edit_weights(other / TOKENIZER_FILE, **{"decoder.0.bias": tensors["decoder.0.bias"] + 1})
    ended = fine_tune(tmp_path / "whole", other, train="decoder", adversarial__start=3)
    assert ended.code == 2
    assert f'init_from: "{saved["init_from"]}" -> "{LoadedTokenizer.load(other).fingerprint}"' in ended.err


def test_two_processes_train_the_same_decoder(source: Path, tmp_path: Path) -> None:
    """DistributedDataParallel takes a frozen encoder and bottleneck, and leaves them as they are."""
    options = {"init_from": source, "train": "decoder", "adversarial.adaptive": False, "adversarial.start": 1}
    for number in (1, 2):
        run_processes(number, train, tmp_path / str(number), options)
    for name in ("tokenizer", "ema", "discriminator"):
        assert_close(part(tmp_path / "2", 4, name), part(tmp_path / "1", 4, name))
    theirs = load_file(source / TOKENIZER_FILE)
    ours = part(tmp_path / "2", 4, "tokenizer")
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items() if not name.startswith("decoder."))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"network.channels": 16}, ["another architecture", "encoder.0.weight is (4, ", "should be (8, ", "network"]),
        ({"bottleneck.code_dim": 2}, ["missing bottleneck.space.project_in.weight", "bottleneck.codebook.weight is"]),
        ({"bottleneck.kind": "fsq"}, ["unexpected bottleneck.codebook.weight"]),
        ({"adversarial.discriminator.channels": 8}, [DISCRIMINATOR_FILE, "layers.0.weight is (4, ", "copy of the"]),
        ({"train": "decoder", "bottleneck.beta": 0.5}, ["--train decoder keeps", "bottleneck.beta: 0.25 -> 0.5"]),
        ({"init_from": "nowhere"}, ["--init_from nowhere", "no such file"]),
        ({"init_from": "null", "train": "decoder"}, ["train decoder", "--init_from RUN"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(source: Path, tmp_path: Path, options: dict[str, Any], parts: list[str]) -> None:
    """One message with the tensors that differ, exit code 2, and nothing is written."""
    ended = fine_tune(tmp_path / "new", source, **options)
    assert ended.code == 2, ended.out
    for text in parts:
        assert text in ended.err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", [TOKENIZER_FILE, DISCRIMINATOR_FILE])
def test_a_damaged_source_is_refused(source: Path, tmp_path: Path, name: str) -> None:
    """Exit code 3, and nothing is written."""
    shutil.copytree(source, tmp_path / "source")
    file = tmp_path / "source" / name
    file.write_bytes(file.read_bytes()[:-9] + b"\0" * 9)
    ended = fine_tune(tmp_path / "new", tmp_path / "source")
    assert ended.code == 3
    assert str(file) in ended.err
    assert not (tmp_path / "new").exists()


def test_the_decoder_of_an_imported_tokenizer_learns(tmp_path: Path) -> None:
    """Weights of another project go on: its codes stay, and the entries about its source and licence stay with them."""
    model = ROOT / "tests" / "fixtures" / "foreign" / "taming_vqgan"
    words = [model / "last.ckpt", "--config", model / "model.yaml", "--family", "taming_vqgan", "--licence", "MIT"]
    imported = run(names_of("stage1_tokenizer/import_weights/__main__.py")["main"], *words, "--out", tmp_path / "old")
    assert imported.code == 0, imported.err
    options = {"steps": 1, "adversarial.weight": 0, "pictures": 0, "batch_size": 4}
    ended = fine_tune(tmp_path / "new", tmp_path / "old", train="decoder", **options)
    assert ended.code == 0, ended.err
    before, after = LoadedTokenizer.load(tmp_path / "old"), LoadedTokenizer.load(tmp_path / "new")
    assert after.code_fingerprint == before.code_fingerprint
    assert after.fingerprint != before.fingerprint
    assert after.tokenizer.origin == before.tokenizer.origin
    assert after.tokenizer.origin["source_licence"] == "MIT"
    pickle = fine_tune(tmp_path / "newer", model / "last.ckpt")
    assert pickle.code == 3
    assert "python -m stage1_tokenizer.import_weights" in pickle.err

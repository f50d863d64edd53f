"""Faults of what comes from outside: keys, pickles, files given for others, a metric's weights, odd paths."""

import json
import os
import pickle
import re
import subprocess
import sys
from http.client import IncompleteRead
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torchvision.models import alexnet

from stage1_tokenizer.config.base import config_from_json
from stage1_tokenizer.config.yaml_and_json import parse_yaml
from stage1_tokenizer.data import build_splits
from stage1_tokenizer.data.saved_config import parse_data_config
from stage1_tokenizer.engine import launch
from stage1_tokenizer.engine.errors import BadFileError, ConfigError, InterruptionError
from stage1_tokenizer.perceptual import DOWNLOADED
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, LoadedTokenizer
from stage2_prior.class_labels import parse_class
from stage2_prior.prior import PRIOR_FILE, PriorHeader, check_classes
from tests.helpers import prior_training
from tests.helpers.artefacts import files_of, write_image_folder, write_prior, write_tokenizer
from tests.helpers.commands import ROOT, Ended, names_of, run
from tests.helpers.prior_training import flags

TOKENIZER, PRIOR, SAMPLER = "stage1_tokenizer/train.py", "stage2_prior/train.py", "sampling/generate.py"
CODES = {2: "ConfigError: ", 3: "BadFileError: "}
LPIPS = ("--perceptual.weight", 1, "--data.train_images", 4, "--data.validation_images", 2)


def refused(ended: Ended, code: int, message: str) -> None:
    """One message, of the right kind, and no traceback."""
    assert ended.code == code, ended
    assert ended.err.startswith(CODES[code]), ended.err
    assert re.search(message, ended.err, re.DOTALL), ended.err
    assert "Traceback" not in ended.err
    assert len(ended.err) < 1500


MISTAKES = {
    # script, key, value, what the message says
    "unknown": (TOKENIZER, "optim.frobnicate", 1, "optim.frobnicate: there is no such"),
    "misspelt": (TOKENIZER, "bottleneck.codebok_size", 8, "did you mean (--)?bottleneck.codebook_size"),
    "misspelt, in a kind": (PRIOR, "prior.layer", 8, "did you mean (--)?prior.layers"),
    "of another kind": (TOKENIZER, "network.multipliers", 1, "network.multipliers: .* give --network.kind vqgan"),
    "wrong type": (TOKENIZER, "steps", "many", "steps: .*integer.*'many'"),
    "out of range": (PRIOR, "prior.dropout", 1.5, "prior.dropout.*less than 1.*1.5"),
    "beyond all use": (TOKENIZER, "network.channels", 10**9, "network.channels.*65536.*1000000000"),
    "not finite": (TOKENIZER, "optim.lr", "nan", "optim.lr.*finite"),
    "no kind": (TOKENIZER, "bottleneck.kind", "vae", "bottleneck.kind: 'vae' is not one of .* vq_library"),
    "a list": (TOKENIZER, "optim", [1], "optim: .*"),
}


@pytest.mark.parametrize("source", ["command line", "yaml"])
@pytest.mark.parametrize("name", MISTAKES)
def test_fault_31_a_mistake_in_the_config_costs_nothing(
    name: str, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 31: exit 2, the key and what was given, and before anything is written or any process joined.

    Not before torch is imported, as the table has it: a config class stands beside the module that it configures.
    """
    script, key, value, message = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    names = names_of(script)

    def begin(**_: object) -> None:
        raise AssertionError("the processes were joined")

    monkeypatch.setattr(launch, "Accelerator", begin)
    words: list[object] = ["--tokenizer", "x"] if script == PRIOR else []
    if source == "yaml":
        *parents, leaf = key.split(".")
        text = f"{leaf}: {'.nan' if value == 'nan' else value}"
        for parent in reversed(parents):
            text = f"{parent}: {{{text}}}"
        Path("c.yaml").write_text(text)
        words += ["--config", "c.yaml"]
    else:
        words += [f"--{key}", value]
    refused(run(names["main"], *words), 2, message)
    assert files_of(tmp_path).keys() <= {"c.yaml"}


class Evil:
    """A pickle of it writes a file when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.canary,)


@pytest.mark.parametrize("form", ["weights.pt", "zip.pt", "weights.safetensors"])
@pytest.mark.parametrize("option", ["--tokenizer", "--prior", "--perceptual.weights"])
def test_fault_33_a_pickle_is_never_opened(option: str, form: str, tmp_path: Path) -> None:
    """Fault 33: whatever it is called and however it is packed, it is refused unopened, and nothing that it holds
    runs."""
    canary, file = tmp_path / "canary", tmp_path / form
    if form == "zip.pt":
        torch.save({"x": Evil(canary)}, file)
    else:
        file.write_bytes(pickle.dumps(Evil(canary)))
        pickle.loads(file.read_bytes())
        canary.rmdir()  # so it does run where it is opened
    script = {"--tokenizer": PRIOR, "--prior": SAMPLER, "--perceptual.weights": TOKENIZER}[option]
    words = (*LPIPS, "--perceptual.net", "alex") if script == TOKENIZER else ()
    ended = run(names_of(script)["main"], option, file, *words, "--out", tmp_path / "out")
    refused(ended, 3, f"{re.escape(str(file))}.*only safetensors")
    assert not canary.exists()
    assert not (tmp_path / "out").exists()


def test_fault_34_a_file_given_for_another(tmp_path: Path) -> None:
    """Fault 34: a prior as tokenizer and a tokenizer as prior are told what they are, not what they lack."""
    write_prior(tmp_path)
    for script, option, name, message in (
        (PRIOR, "--tokenizer", PRIOR_FILE, "this is a prior, but a tokenizer is needed"),
        (SAMPLER, "--prior", TOKENIZER_FILE, "this is a tokenizer, but a prior is needed"),
    ):
        ended = run(names_of(script)["main"], option, tmp_path / name, "--out", tmp_path / "out")
        refused(ended, 3, f"{name}: {message}")
    assert not (tmp_path / "out").exists()


def test_fault_35_a_prior_beside_another_tokenizer(tmp_path: Path) -> None:
    """Fault 35: the fingerprint that the prior wants and the one that lies beside it, so that the right file can be
    found."""
    prior = write_prior(tmp_path)
    other = write_tokenizer(tmp_path, seed=1)
    ended = run(names_of(SAMPLER)["main"], "--prior", tmp_path, "--out", tmp_path / "out")
    refused(ended, 3, f"{prior.tokenizer.fingerprint}.*{other.fingerprint}")
    assert not (tmp_path / "out").exists()


def test_fault_37_a_tokenizer_trained_again_under_a_run(tmp_path: Path) -> None:
    """Fault 37: its tokens and its prior belong to the former one, so the run is not continued; nothing is touched."""
    before = write_tokenizer(tmp_path / "tok").code_fingerprint
    assert prior_training.train(tmp_path / "run", tmp_path / "tok", steps=1).code == 0
    after = write_tokenizer(tmp_path / "tok", seed=1).code_fingerprint
    files = files_of(tmp_path)
    ended = run(names_of(PRIOR)["main"], *flags(tmp_path / "run", tmp_path / "tok", steps=1))
    refused(ended, 2, f'tokenizer: "{before}" -> "{after}"')
    assert files_of(tmp_path) == files


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """AlexNet's convolutions in 16 bits, of random values."""
    layers: Any = alexnet(weights=None).features
    path = tmp_path_factory.mktemp("backbone") / "alex.safetensors"
    save_file({f"features.{name}": tensor.half() for name, tensor in layers.state_dict().items()}, path)
    return path


def test_fault_41_weights_of_the_metric_that_are_missing(tmp_path: Path) -> None:
    """Fault 41: exit 2 and the choices: a file, the download, or no LPIPS. Random weights are none of them."""
    ended = run(
        names_of(TOKENIZER)["main"],
        *LPIPS,
        "--perceptual.net",
        "alex",
        "--perceptual.weights",
        tmp_path / "x",
        "--out",
        tmp_path / "out",
    )
    refused(ended, 2, "x: there is no such file; give a local safetensors.*null.*downloaded.*perceptual.weight 0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("what", ["of another net", "without a layer", "whole numbers", "nan", "cut off", "flipped"])
def test_fault_41_weights_of_the_metric_that_do_not_fit(what: str, backbone: Path, tmp_path: Path) -> None:
    """Fault 41: lpips loads what fits and says nothing of the rest; here it is exit 3, with the file and the layer."""
    file, tensors, message = tmp_path / "w.safetensors", load_file(backbone), "is not alexnet: no fitting features.0"
    match what:
        case "of another net":
            tensors["features.0.weight"] = torch.zeros(64, 3, 3, 3)
        case "without a layer":
            del tensors["features.0.bias"]
        case "whole numbers":
            tensors["features.0.bias"] = tensors["features.0.bias"].to(torch.int8)
        case "nan":
            tensors["features.3.weight"][5, 0, 0, 1] = torch.nan
            message = "features.3.weight holds numbers that are not finite"
    save_file(tensors, file)
    if what in ("cut off", "flipped"):
        data = bytearray(file.read_bytes())
        data[7] ^= 0x40  # of the header's length
        file.write_bytes(data[: len(data) // 2] if what == "cut off" else data)
        message = "damaged or is not a safetensors"
    ended = run(
        names_of(TOKENIZER)["main"],
        *LPIPS,
        "--perceptual.net",
        "alex",
        "--perceptual.weights",
        file,
        "--out",
        tmp_path / "out",
    )
    refused(ended, 3, f"w.safetensors: .*{message}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_fault_41_a_download_of_another_hash(net: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 41: torchvision unpickles a file that it finds in its cache, without the check that it does at download."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / DOWNLOADED[net]
    file.parent.mkdir(parents=True)
    file.write_bytes(pickle.dumps(Evil(tmp_path / "canary")))
    ended = run(names_of(TOKENIZER)["main"], *LPIPS, "--perceptual.net", net, "--out", tmp_path / "out")
    refused(ended, 3, f"{DOWNLOADED[net]}: .*{file.stem.rpartition('-')[2]}.*delete it")
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fault",
    [RuntimeError('invalid hash value (expected "7be5be79")'), IncompleteRead(b""), OSError("no route")],
    ids=str,
)
def test_fault_41_a_download_that_fails(fault: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 41: without a network, cut off, or with another content than its name promises: exit 2 with the choices."""

    def fails(*_: object, **__: object) -> None:
        raise fault

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("torch.hub.download_url_to_file", fails)
    ended = run(names_of(TOKENIZER)["main"], *LPIPS, "--perceptual.net", "alex", "--out", tmp_path / "out")
    refused(ended, 2, "perceptual.net alex cannot be downloaded.*local safetensors file.*perceptual.weight 0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("net", "size", "least"), [("vgg", "12,64", 16), ("alex", "64,28", 31)])
def test_fault_42_images_too_small_for_the_metric(net: str, size: str, least: int, tmp_path: Path) -> None:
    """Fault 42: exit 2 with the least size that does, at the start, and not a crash in the midst of torchvision."""
    words = [*LPIPS, "--perceptual.net", net, "--data.image_size", size, "--out", tmp_path / "out"]
    shown = size.replace(",", "x")
    refused(run(names_of(TOKENIZER)["main"], *words), 2, f"perceptual.net {net}.*at least {least} pixels.*{shown}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (tuple(map(str, range(40_001))), "has 40,001 classes.*at most 40,000; is data.root"),
        (tuple(str(number) + "\u4e2d" * 75 for number in range(9_000)), "names .* characters as JSON.*shorten"),
    ],
    ids=["many", "long"],
)
def test_classes_that_no_header_holds(classes: tuple[str, ...], message: str) -> None:
    """A prior that was written with them could not be loaded. As many as are let through can."""
    with pytest.raises(ConfigError, match=message):
        check_classes(classes)
    most = tuple(f"{'x' * 88}{number:05}" for number in range(40_000))
    check_classes(most)
    tree = {"prior": {"kind": "gpt"}, "shape": (1, 1, 1, 2), "tokenizer": "", "classes": most}
    assert config_from_json(PriorHeader, json.dumps(tree), "x").classes == most


def test_names_in_a_tuple_are_looked_at() -> None:
    """Half a character among a header's classes would be an error much later, where they are written."""
    tree = {"prior": {"kind": "gpt"}, "shape": (1, 1, 1, 2), "tokenizer": "", "classes": ["cat", "\ud800"]}
    with pytest.raises(BadFileError, match=r"classes.*must be text in UTF-8"):
        config_from_json(PriorHeader, json.dumps(tree), "x")


@pytest.mark.parametrize("name", ["9" * 5000, "1" * 19, "-1", "\u00b2"])
def test_a_class_that_is_none(name: str) -> None:
    """Python makes no number of thousands of digits; and a thousand classes are not all listed."""
    with pytest.raises(ConfigError, match=r"no such class; the classes are: 0 c0, .*, 49 c49 and 950 more$") as caught:
        parse_class(name, tuple(f"c{label}" for label in range(1000)))
    assert len(str(caught.value)) < 2000
    assert parse_class("999", tuple(f"c{label}" for label in range(1000))) == 999


def test_fault_28_a_header_downloads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 28: a stranger's weights say which data they were trained on; nobody has asked to have these put into a
    folder of the stranger's choice."""
    monkeypatch.setattr("torchvision.datasets.mnist.MNIST.download", lambda _: (tmp_path / "MNIST").mkdir())
    data = parse_data_config({"kind": "mnist", "root": str(tmp_path), "download": True}, "x")
    with pytest.raises(ConfigError, match="does not hold it"):
        build_splits(data)["validation"]
    assert not [*tmp_path.iterdir()]


def test_fault_31_a_header_enlarges_nothing_without_end() -> None:
    """Fault 31: a picture's side, of which resizing would fill any memory, has a bound as all that is built has."""
    with pytest.raises(BadFileError, match="resize_to"):
        parse_data_config({"kind": "folder", "root": "x", "resize_to": 10**9}, "x")


def test_fault_03_a_signal_while_yaml_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 3: SIGTERM raises wherever the program is; nobody may take it for an error of the file."""

    def struck(*_: object) -> None:
        raise InterruptionError("asked to stop")

    monkeypatch.setattr("yaml.constructor.SafeConstructor.construct_document", struck)
    with pytest.raises(InterruptionError, match="asked to stop"):
        parse_yaml(b"a: 1")


def test_fault_52_left_out_names_of_any_bytes(tmp_path: Path) -> None:
    """Fault 52: a picture's name that is no UTF-8 can be said on a terminal that is strict about it."""
    write_tokenizer(tmp_path)
    write_image_folder(tmp_path / "photos", ("cat",), per_class=2)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/photos/caf\xe9.png")).write_bytes(b"")
    words = ("--tokenizer", tmp_path, "--out", tmp_path / "out", tmp_path / "photos")
    ended = run(names_of("sampling/reconstruct.py")["main"], *words)
    assert ended.code == 3
    assert "caf\\udce9.png: the file is empty" in ended.out
    ended.out.encode()


ODD = ["a b", "\u00fc\u4e2d\U0001f600", "line\nbreak", "-x 'y\" $z"]


@pytest.mark.parametrize("name", ODD)
def test_fault_52_paths_of_any_characters(name: str, tmp_path: Path) -> None:
    """Fault 52: spaces, other scripts, line breaks and quotes: from a tokenizer to pictures."""
    folder = tmp_path / name
    write_tokenizer(folder / "tok")
    assert prior_training.train(folder / "run", folder / "tok", steps=1).code == 0
    ended = run(names_of(SAMPLER)["main"], "-n", 2, "--prior", folder / "run", "--out", folder / "pictures")
    assert ended.code == 0, ended.err
    assert len(list((folder / "pictures").glob("0*.png"))) == 2
    assert (folder / "run" / "config.yaml").is_file()
    assert LoadedTokenizer.load(folder / "run").step == 7


@pytest.mark.parametrize(("text", "message"), [("not\udcffutf8", "out: must be text in UTF-8"), ("a\0b", "of code 0")])
def test_fault_52_names_that_no_file_can_have(text: str, message: str, tmp_path: Path) -> None:
    """Fault 52: neither safetensors nor TensorBoard opens a name that is not UTF-8, so a run would end at its first
    file."""
    words = ["--out", text] if "\0" not in text else ["--config", tmp_path / "c.yaml"]  # no command line holds that
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"out": text}))
    refused(run(names_of(TOKENIZER)["main"], *words), 2, message)


@pytest.mark.parametrize(
    ("script", "option"), [(PRIOR, "--tokenizer"), (SAMPLER, "--prior"), (TOKENIZER, "--perceptual.weights")]
)
def test_fault_52_a_name_longer_than_files_have(script: str, option: str, tmp_path: Path) -> None:
    """Fault 52: the operating system does not even look for it, and says so by an error of its own."""
    words = (*LPIPS, "--perceptual.net", "alex") if script == TOKENIZER else ()
    refused(
        run(names_of(script)["main"], *words, option, "x" * 3000, "--out", tmp_path / "out"), 2, f"{option[2:]} xxx"
    )


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "locale", "code"),
    [("a b\n\u00fc\u4e2d", {"LC_ALL": "C"}, 0), ("\u00fc", ASCII, 2)],
    ids=["c", "not ascii"],
)
def test_fault_52_a_run_in_the_locale_c(name: str, locale: dict[str, str], code: int, tmp_path: Path) -> None:
    """Fault 52: Python reads names as UTF-8 in the locale C too. Where it was told not to, what is not ASCII is refused
    with the way out: Python itself could open no such file."""
    words = (
        "--steps=1 --batch_size=4 --data.image_size=16 --data.train_images=8 --data.validation_images=4 --pictures=2"
    )
    sizes = "--network.channels=8 --network.latent_channels=4 --bottleneck.codebook_size=8"
    out = tmp_path / name
    command = [sys.executable, str(ROOT / TOKENIZER), "--out", str(out), *words.split(), *sizes.split()]
    environment = {key: value for key, value in os.environ.items() if key not in ASCII and key != "LANG"}
    environment |= {**locale, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False)
    assert ended.returncode == code, ended.stderr.decode(errors="replace")
    if code:
        assert b"set PYTHONUTF8=1" in ended.stderr
        assert not out.exists()
    else:
        assert LoadedTokenizer.load(out).step == 1

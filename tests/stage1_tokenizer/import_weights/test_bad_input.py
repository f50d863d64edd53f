"""Bad input of the import command: one message that names file, layer or key, exit code 2 or 3, nothing written."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from stage1_tokenizer.engine.errors import BadFileError
from stage1_tokenizer.tokenizer import LoadedTokenizer
from tests.helpers.commands import Ended
from tests.helpers.foreign import FOREIGN, Layout, State, import_weights, random_state, write_checkpoint

LAYER = "encoder.down.1.block.0.conv1.weight"
TAMING = FOREIGN / "taming_vqgan"


def refused(ended: Ended, code: int, message: str, out: Path) -> None:
    """Check that a command ended with one message, and wrote nothing."""
    assert ended.code == code, ended
    assert re.search(message, ended.err, re.DOTALL), ended.err
    assert "Traceback" not in ended.err
    assert len(ended.err) < 1500
    assert not out.exists()


def changed(**changes: Any) -> State:
    """Return a random checkpoint with layers changed; None: left out."""
    state = random_state(Layout()) | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in state.items() if value is not None}


WEIGHTS: dict[str, tuple[State, int, str]] = {
    "a missing layer": (changed(**{LAYER: None}), 3, f"does not fit: missing {re.escape(LAYER)}"),
    "a missing bias": (changed(**{"quant_conv.bias": None}), 3, r"does not fit: missing quant_conv\.bias"),
    "no codebook": (changed(**{"quantize.embedding.weight": None}), 3, r"quantize\.embedding\.weight is missing"),
    "an extra layer": (changed(**{"decoder.extra.weight": torch.ones(3)}), 3, r"unexpected decoder\.extra\.weight"),
    "another shape": (
        changed(**{"decoder.conv_out.weight": torch.ones(3, 33, 3, 3)}),
        3,
        r"decoder\.conv_out\.weight is \(3, 33, 3, 3\), should be \(3, 32, 3, 3\)",
    ),
    "integers": (
        changed(**{"encoder.conv_in.bias": torch.ones(32, dtype=torch.int64)}),
        3,
        r"encoder\.conv_in\.bias has numbers of the format int64",
    ),
    "Gumbel": (changed(**{"quantize.proj.weight": torch.ones(40, 6, 1, 1)}), 3, "quantize.proj: is a Gumbel model"),
    "renumbered codes": (changed(**{"quantize.used": torch.ones(4)}), 3, "quantize.used: .*remap"),
    "running means": (changed(**{"quantize.embedding.embed_avg": torch.ones(40, 6)}), 3, "unexpected quantize.emb"),
    "an image size that does not fit": (changed(), 2, "--image_size 33x33 is not divisible"),
    "another family": (
        random_state(Layout(llamagen=True)),
        3,
        "is no taming_vqgan of taming-transformers: its layers are those of llamagen_vq",
    ),
    "something else": ({"classifier.weight": torch.ones(3)}, 3, r"is no taming_vqgan.*it has classifier\.weight"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_do_not_fit(name: str, tmp_path: Path) -> None:
    """Missing, extra and misshapen layers are named, and so are kinds that cannot be imported."""
    state, code, message = WEIGHTS[name]
    path, size = write_checkpoint(tmp_path / "a.ckpt", state), 33 if code == 2 else 32
    ended = import_weights(path, "--family", "taming_vqgan", "--out", tmp_path / "out", "--image_size", size)
    refused(ended, code, message, tmp_path / "out")


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "n_embed": ({"n_embed": 97}, "n_embed is 97, the weights have 96"),
    "channels": ({"ddconfig.ch": 64}, r"levels\) is \[64, 128, 128\], the weights have \[32, 64, 64\]"),
    "attention": ({"ddconfig.attn_resolutions": [32]}, r"attn_resolutions is \[1\], the weights have \[2\]"),
    "blocks": ({"ddconfig.num_res_blocks": 3}, "num_res_blocks is 3, the weights have 2"),
    "without convolutions": ({"ddconfig.resamp_with_conv": False}, "resamp_with_conv is 'False'"),
    "remap": ({"remap": "x.npy"}, "remap is 'x.npy'"),
    "another model": ({"target": "src.IBQ.models.ibqgan.IBQ"}, "give --family ibq"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_does_not_fit(name: str, tmp_path: Path) -> None:
    """The message has the key, its value, and what the weights have."""
    changes, message = CONFIGS[name]
    tree = yaml.safe_load((TAMING / "model.yaml").read_text())
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        place = tree["model"] if key == "target" else tree["model"]["params"]
        for parent in parents:
            place = place[parent]
        place[leaf] = value
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(tree))
    words = ("--config", tmp_path / "model.yaml", "--family", "taming_vqgan", "--out", tmp_path / "out")
    refused(import_weights(TAMING / "last.ckpt", *words), 2, message, tmp_path / "out")


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    """Half a file, no file, an empty folder, a config that is no YAML, and an --out that is taken."""
    half = tmp_path / "half.ckpt"
    half.write_bytes((TAMING / "last.ckpt").read_bytes()[:3_000_000])
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.yaml").write_text("a: [")
    out = tmp_path / "out"
    words = ("--family", "taming_vqgan", "--out", out)
    refused(import_weights(half, *words), 3, r"half\.ckpt: is damaged or was cut off", out)
    refused(import_weights(tmp_path / "none.ckpt", *words), 2, r"none\.ckpt.*there is no such file", out)
    refused(import_weights(tmp_path / "empty", *words), 2, "holds no diffusion_pytorch_model.safetensors", out)
    bad = import_weights(TAMING / "last.ckpt", "--config", tmp_path / "bad.yaml", *words)
    refused(bad, 2, r"--config .*bad\.yaml: is not YAML", out)
    refused(import_weights(TAMING / "last.ckpt", "--family", "vqvae", "--out", out), 2, "family.*taming_vqgan", out)
    out.mkdir()
    (out / "tokenizer.safetensors").write_bytes(b"mine")
    taken = import_weights(TAMING / "last.ckpt", *words)
    assert taken.code == 2
    assert "name another folder" in taken.err
    assert (out / "tokenizer.safetensors").read_bytes() == b"mine"


class Evil:
    """An object whose pickle makes a folder when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.canary,)


def test_a_hostile_checkpoint_is_imported_without_its_code(tmp_path: Path) -> None:
    """The weights are there, the code beside them does not run."""
    canary, path = tmp_path / "canary", tmp_path / "a.ckpt"
    torch.save({"callbacks": {"x": Evil(canary)}, "state_dict": random_state(Layout())}, path)
    ended = import_weights(path, "--family", "taming_vqgan", "--out", tmp_path / "out", "--image_size", 32)
    assert ended.code == 0, ended.err
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists(), "the bait works"


def test_other_commands_name_the_import_command() -> None:
    """A checkpoint given as --tokenizer stays closed, and the message has the command that opens it."""
    message = "only safetensors are loaded; .* python -m stage1_tokenizer.import_weights"
    with pytest.raises(BadFileError, match=message):
        LoadedTokenizer.load(TAMING / "last.ckpt")

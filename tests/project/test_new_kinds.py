"""A new kind needs one file, one member of the union and one case.

A bottleneck, a network, a data set and a prior are added, as text, to a copy of the packages; every command works with
them.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.commands import ROOT, Ended


class Kind(NamedTuple):
    """An example kind: its file in tests/helpers/made_up, and the file with the union and the case."""

    file: str
    union: str
    config: str
    builds: str

    def add(self, house: Path) -> None:
        """Copy the file into the folder of its union, and edit the union and the `match`."""
        union = house / self.union
        shutil.copy(ROOT / "tests/helpers/made_up" / self.file, union.parent)
        module = ".".join((union.parent / self.file).relative_to(house).with_suffix("").parts)
        text = union.read_text(encoding="utf-8")
        names = sorted({self.config, *re.findall(r"(\w+)\(", self.builds)})
        text = re.sub(
            r"^from stage", f"from {module} import {', '.join(names)}\nfrom stage", text, count=1, flags=re.MULTILINE
        )
        text, members = re.subn(r'(,\s*Field\(discriminator="kind"\))', rf" | {self.config}\1", text, count=1)
        case = f"        case {self.config}():\n            return {self.builds}\n"
        text, cases = re.subn(
            r"^( *case _:\n)? *assert_never\(config\)", rf"{case}\g<0>", text, count=1, flags=re.MULTILINE
        )
        assert members == cases == 1
        union.write_text(text, encoding="utf-8")


KINDS = [
    Kind("coins.py", "stage1_tokenizer/bottlenecks/__init__.py", "CoinsConfig", "Coins(config, latent_channels)"),
    Kind(
        "patches.py",
        "stage1_tokenizer/networks/__init__.py",
        "PatchesConfig",
        "PatchesEncoder(image_channels, config), PatchesDecoder(image_channels, config)",
    ),
    Kind(
        "stripes.py",
        "stage1_tokenizer/data/__init__.py",
        "StripesConfig",
        "{split: Stripes(config, split) for split in SPLITS}",
    ),
    Kind("bag.py", "stage2_prior/prior.py", "BagConfig", "Bag(config, shape, classes)"),
]

DRIVER = """
import json, shutil, sys
from tests.helpers.commands import names_of, run
ended = []
for script, *words in json.loads(sys.argv[1]):
    ended.append(shutil.copytree(*words) if script == "copy" else run(names_of(script)["main"], *words))
print(json.dumps(ended))
"""

SCHEDULE = ["--steps", "4", "--batch_size", "8", "--save_every", "2", "--validate_every", "4", "--log_every", "1"]
TOKENIZER = [
    *("stage1_tokenizer/train.py", *SCHEDULE, "--data.kind", "stripes", "--data.image_size", "16"),
    *("--network.kind", "patches", "--bottleneck.kind", "coins", "--pictures", "2"),
]
PRIOR = ["stage2_prior/train.py", *SCHEDULE, "--tokenizer", "whole", "--prior.kind", "bag", "--prior.width", "8"]
SHAPE = ["--shape", "4,4,1,4", "--prior.kind", "bag", "--prior.width", "8"]
COMMANDS: dict[str, list[str]] = {
    "tokenizer": [*TOKENIZER, "--out", "whole"],
    "copy of the tokenizer": ["copy", "whole", "resumed"],
    "resumed": [*TOKENIZER, "--out", "resumed", "--resume", "step-00000002", "--data.haste", "1"],
    "another width": [*TOKENIZER, "--out", "whole", "--data.width", "2"],
    "key of another kind": [*TOKENIZER, "--out", "no", "--bottleneck.cosine"],
    "prior": [*PRIOR, "--samples", "2", "--out", "prior"],
    "copy of the prior": ["copy", "prior", "prior_resumed"],
    "prior resumed": [*PRIOR, "--samples", "2", "--out", "prior_resumed", "--resume", "step-00000002"],
    "sampled": ["sampling/generate.py", "--prior", "prior", "-n", "3", "--out", "samples"],
    "larger": ["sampling/generate.py", "--prior", "prior", "-n", "1", "--size", "24,32", "--out", "larger"],
    "reconstructed": ["sampling/reconstruct.py", "samples", "--tokenizer", "whole", "--out", "reconstructed"],
    "plan": ["stage2_prior/plan.py", *SHAPE, "--device", "1e9,1e9,1e-6"],
    "plan of a GPU": ["stage2_prior/plan.py", *SHAPE, "--device", "h100"],
    "analysis": ["stage1_tokenizer/analyze.py", "--tokenizer", "whole", "--out", "analysis"],
    "report": ["sampling/report.py", "whole", "--out", "one.html"],
}


class House(NamedTuple):
    """The copy of the packages, and the outcome of each command."""

    folder: Path
    ended: dict[str, Ended]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    folder = tmp_path_factory.mktemp("house")
    for name in ("stage1_tokenizer", "stage2_prior", "sampling", "tests/helpers"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "made_up"))
    shutil.copy(ROOT / "tests/__init__.py", folder / "tests")
    for kind in KINDS:
        kind.add(folder)
    words = [sys.executable, "-c", DRIVER, json.dumps(list(COMMANDS.values()))]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    return House(folder, {name: Ended(*each) for name, each in zip(COMMANDS, found, strict=True) if len(each) == 3})


WRONG = ("another width", "key of another kind")


@pytest.mark.parametrize("name", [name for name, words in COMMANDS.items() if words[0] != "copy" and name not in WRONG])
def test_the_command_works(house: House, name: str) -> None:
    assert house.ended[name].code == 0, house.ended[name].err


@pytest.mark.parametrize(("one", "other"), [
    ("whole/tokenizer.safetensors", "resumed/tokenizer.safetensors"),
    ("prior/prior.safetensors", "prior_resumed/prior.safetensors"),
])  # fmt: skip
def test_a_resume_is_bit_exact(house: House, one: str, other: str) -> None:
    ours, theirs = load_file(house.folder / one), load_file(house.folder / other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(theirs[key], tensor) for key, tensor in ours.items())


def test_its_marks_count(house: House) -> None:
    """`haste` is marked as free, so a resume may change it; `width` is not, so it is listed as a difference."""
    assert "continu" in house.ended["resumed"].out + house.ended["resumed"].err
    assert house.ended["another width"].code == 2
    assert "data.width: 4 -> 2" in house.ended["another width"].err
    assert "haste" not in house.ended["another width"].err


def test_messages_know_it(house: House) -> None:
    """The error about another kind's key names this kind."""
    assert "but the kind is coins" in house.ended["key of another kind"].err


def test_its_images_and_pages_are_there(house: House) -> None:
    assert len(list((house.folder / "samples").glob("0*.png"))) == 3
    assert len(list((house.folder / "larger").glob("0*.png"))) == 1
    for page, words in (("whole/report.html", ("coins", "patches", "stripes")), ("prior/report.html", ("bag",))):
        text = (house.folder / page).read_text(encoding="utf-8")
        assert all(word in text for word in words)


def test_its_cost_is_its_own(house: House) -> None:
    """The cache is 4x4 embeddings of 8 numbers of 4 bytes, and there is no copy of the weights."""
    assert "for weights, and 512.0 B per image" in house.ended["plan"].out
    assert "copy" not in house.ended["plan"].out

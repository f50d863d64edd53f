"""Runs of a former version: they load, and continue as in that version.

The fixture has a tiny run of each stage from version 0.1.0 of November 2026, before the modules were moved: a state
after 4 of 6 steps, the weights, and the weights of that version after the last two steps, in plain float32.
"""

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.helpers.commands import ROOT, names_of, run
from tests.helpers.training import log

FIXTURE = ROOT / "tests" / "fixtures" / "before_layout"


@pytest.fixture
def former(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy both runs, and set the arithmetic of the former version."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("TESSERA_FAST_PATHS", "-onednn,-packed,-bfloat16")
    shutil.copytree(FIXTURE, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_run_of_a_former_version_goes_on(former: Path, stage: str) -> None:
    """The run resumes from its state, and ends with the weights of the former version, up to rounding."""
    script = {"stage1": "stage1_tokenizer/train.py", "stage2": "stage2_prior/train.py"}[stage]
    folder = former / stage
    words = ["--config", folder / "config.yaml", "--out", folder, "--no-report"]
    if stage == "stage2":
        words += ["--tokenizer", former / "stage1"]
    before = log(folder)[:4]
    ended = run(names_of(script)["main"], *words)
    assert ended.code == 0, ended.err
    assert "from step 4" in ended.out
    expected = load_file(folder / "expected_after_6_steps.safetensors")
    found = load_file(folder / "state" / "step-00000006" / "ema.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():  # another version rounds otherwise, and Adam steps far by tiny gradients
        apart = (found[name] - tensor).double().abs()
        assert float(apart.mean()) < 5e-5, name
        assert float(apart.max()) < 1e-3, name
    assert log(folder)[: len(before)] == before
    assert log(folder)[-1]["step"] == 6


def test_weights_of_a_former_version_draw_images(former: Path) -> None:
    """The weights of the former version sample, and check.py accepts its folders."""
    ended = run(names_of("sampling/generate.py")["main"], "--prior", former / "stage2", "-n", "5")
    assert ended.code == 0, ended.err
    assert len(list((former / "stage2" / "generated" / "001").glob("0*.png"))) == 5
    for stage in ("stage1", "stage2"):
        (former / stage / "expected_after_6_steps.safetensors").unlink()
    checked = run(names_of("sampling/check.py")["main"], former / "stage1", former / "stage2")
    assert checked.code == 0, checked.out

"""The whole way on a CUDA device, in bfloat16: skipped where there is none."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.commands import ROOT

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SMALL = (
    "--data.train_images 64 --data.validation_images 16 --steps 6 --batch_size 16 "
    "--adversarial.weight 0.5 --adversarial.start 2"
)


def command(folder: Path, script: str, arguments: str) -> str:
    """What a script prints, run in `folder` by this Python; a failure shows what it printed."""
    words = [sys.executable, str(ROOT / script), *arguments.split()]
    ended = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_three_commands_run_on_a_gpu_and_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    """Device, autocast, discriminator and cache all stay on the GPU; the second call resumes at the end."""
    first = command(tmp_path, "stage1_tokenizer/train.py", SMALL)
    assert "device=cuda" in first
    assert "precision=bf16" in first
    assert "continuing" in command(tmp_path, "stage1_tokenizer/train.py", SMALL)
    command(tmp_path, "stage2_prior/train.py", "--tokenizer runs/stage1/shapes_vq --steps 4 --batch_size 16")
    command(tmp_path, "sampling/generate.py", "-n 5")
    assert len(list((tmp_path / "runs/stage2/shapes_vq_gpt/generated/001").glob("0*.png"))) == 5

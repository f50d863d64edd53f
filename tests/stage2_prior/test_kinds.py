"""Each kind of prior trains by train.py, with one or several codes per position; two processes equal one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stage1_tokenizer.bottlenecks.rvq import RvqConfig
from stage2_prior.prior import PRIOR_FILE, load_prior
from tests.helpers.artefacts import write_tokenizer
from tests.helpers.commands import names_of, run, run_script
from tests.helpers.processes import run_processes

KINDS = {
    "gpt": ("--prior.kind", "gpt", "--prior.layers", 1, "--prior.width", 16, "--prior.heads", 2),
    "pixelcnn": ("--prior.kind", "pixelcnn", "--prior.layers", 2, "--prior.width", 16),
}
RUN = ("--no-report", "--batch_size", 6, "--steps", 4, "--samples", 2, "--log_every", 1, "--prior.label_dropout", 0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 3])
def test_two_processes_are_one_and_the_prior_samples(tmp_path: Path, kind: str, depth: int) -> None:
    """Trap 41: gradients reach every weight on both ranks (DDP waits for each), also those of a head over the depth."""
    several = {} if depth == 1 else {"bottleneck": RvqConfig(codebook_size=16, depth=depth)}
    write_tokenizer(tmp_path / "tokenizer", **several)  # type: ignore[arg-type]
    words = ("--tokenizer", tmp_path / "tokenizer", *RUN, *KINDS[kind])
    for processes in (1, 2):
        run_processes(processes, run_script, "stage2_prior/train.py", *words, "--out", tmp_path / str(processes))
    one, two = (load_file(tmp_path / name / PRIOR_FILE) for name in "12")
    assert all(torch.allclose(one[name], tensor, atol=1e-4) for name, tensor in two.items())
    logs = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1]) for name in "12"]
    assert logs[0]["validation/bits_per_token"] == pytest.approx(logs[1]["validation/bits_per_token"], abs=1e-4)

    assert depth == load_prior(tmp_path / "1").model.shape.K
    sampled = run(names_of("sampling/generate.py")["main"], "--prior", tmp_path / "1", "-n", 3, "--out", tmp_path / "o")
    assert sampled.code == 0, sampled.err
    assert len(list((tmp_path / "o").glob("0*.png"))) == 3

"""Every kind of bottleneck in train.py itself: it trains, stops, goes on bit for bit, and its file can be opened."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stage1_tokenizer.tokenizer import TOKENIZER_FILE, LoadedTokenizer
from tests.helpers.commands import names_of, run
from tests.helpers.processes import run_processes
from tests.helpers.quantizers import EVERY_KIND, Tree
from tests.helpers.training import TINY, checksums, log, train

KINDS = list({tree["kind"]: tree for tree in reversed(EVERY_KIND)}.values())


def flags(tree: Tree) -> dict[str, object]:
    """A bottleneck's config as command-line options."""
    values = {key: ",".join(map(str, value)) if isinstance(value, list) else value for key, value in tree.items()}
    return {f"bottleneck.{key}": value for key, value in values.items()}


@pytest.mark.parametrize("tree", KINDS, ids=lambda tree: tree["kind"])
def test_every_kind_resumes_bit_for_bit(tmp_path: Path, tree: Tree) -> None:
    """Trap 41: all that a bottleneck has learned is in the state, and noise, revival and warm-up depend on the step."""
    options = {**flags(tree), "adversarial.weight": 0.0, "network.latent_channels": 8, "keep": 2}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_processes(1, train, whole, options)
    run_processes(1, train, resumed, options, ("save", 2))
    (seen,) = run_processes(1, train, resumed, options)
    assert len(seen["batches"]) == 2, "it continued, and did not begin again"
    assert checksums(resumed, 4) == checksums(whole, 4)
    assert log(resumed) == log(whole)
    ours, theirs = load_file(resumed / TOKENIZER_FILE), load_file(whole / TOKENIZER_FILE)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())

    tokenizer = LoadedTokenizer.load(whole).tokenizer
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.inference_mode():
        x_hat, bottlenecked = tokenizer(x)
        if bottlenecked.codes is not None:
            assert torch.equal(tokenizer.decode_codes(tokenizer.encode_codes(x)), x_hat)


@pytest.mark.parametrize("tree", KINDS, ids=lambda tree: tree["kind"])
def test_every_kind_gives_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tree: Tree) -> None:
    """A tokenizer gives new images by the commands: through a prior over its codes, by its own noise, or refused
    with a word of what would do."""
    monkeypatch.chdir(tmp_path)
    small = {key: value for key, value in TINY.items() if not key.startswith(("bottleneck", "adversarial"))}
    options = {**small, **flags(tree), "network.latent_channels": 8, "steps": 2}
    words = [
        word for key, value in options.items() for word in ([f"--{key}"] if value is True else [f"--{key}", value])
    ]
    trained = run(names_of("stage1_tokenizer/train.py")["main"], "--out", "tokenizer", *words)
    assert trained.code == 0, trained.err
    if tree["kind"] in ("none", "dictionary"):
        refused = run(names_of("sampling/generate.py")["main"], "--tokenizer", "tokenizer", "-n", 3)
        assert refused.code == 2
        assert "--bottleneck.kind kl" in refused.err
        return
    source = ["--tokenizer", "tokenizer"]
    if tree["kind"] != "kl":
        tiny = "--steps 2 --batch_size 8 --prior.layers 1 --prior.width 16 --prior.heads 2 --samples 0 --out prior"
        prior = run(names_of("stage2_prior/train.py")["main"], *source, "--no-report", *tiny.split())
        assert prior.code == 0, prior.err
        source = ["--prior", "prior"]
    sampled = run(names_of("sampling/generate.py")["main"], *source, "-n", 3, "--out", "pictures")
    assert sampled.code == 0, sampled.err
    assert len(list(Path("pictures").glob("0*.png"))) == 3

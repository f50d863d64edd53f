"""What several processes must agree on: figures, lambda, and the whole of a training run."""

import gc
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from stage1_tokenizer import validation
from stage1_tokenizer.bottlenecks.vq import VqConfig
from stage1_tokenizer.data.image_batches import ImageBatches, normalise
from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.data.shapes import ShapesConfig
from stage1_tokenizer.engine.command import run_command
from stage1_tokenizer.networks.sonnet import SonnetNetworkConfig
from stage1_tokenizer.objective import PixelConfig, adaptive_weight, reconstruction_loss
from stage1_tokenizer.tokenizer import Tokenizer, TokenizerConfig
from tests.helpers.commands import names_of
from tests.helpers.processes import RankFailedError, run_processes
from tests.helpers.training import TINY, assert_close, checksums, log, part, train


def failing_rank(accelerator: Accelerator, how: str) -> int:
    rank: int = accelerator.process_index
    if rank == 1:
        if how == "raise":
            raise KeyError("on rank 1")
        os._exit(3)
    accelerator.wait_for_everyone()
    return rank


@pytest.mark.parametrize(("how", "message"), [("raise", "KeyError: 'on rank 1'"), ("die", "rank [01]")])
def test_a_failing_rank_fails_the_test(how: str, message: str) -> None:
    """The tests below would pass on a harness that loses a rank, or hang with the others."""
    with pytest.raises(RankFailedError, match=message):
        run_processes(2, failing_rank, how, timeout=20.0)


def weigh(accelerator: Accelerator) -> float:
    """Lambda of a linear decoder on this rank's share of a batch of 8."""
    torch.manual_seed(0)
    x, h, W = torch.randn(8, 3), torch.randn(8, 5), torch.randn(3, 5, requires_grad=True)
    x, h = (tensor.chunk(accelerator.num_processes)[accelerator.process_index] for tensor in (x, h))
    x_hat = h @ W.T

    def average(gradient: Tensor) -> Tensor:
        mean: Tensor = accelerator.reduce(gradient, "mean")
        return mean

    return float(adaptive_weight((x_hat - x).square().mean(), -x_hat.tanh().mean(), W, average))


def test_ranks_have_one_lambda() -> None:
    """Trap 15: equal on both ranks, and that of the joint batch; `autograd.grad` goes past DDP."""
    (one,) = run_processes(1, weigh)
    first, second = run_processes(2, weigh)
    assert first == second
    assert first == pytest.approx(one, rel=1e-5)


def figures(accelerator: Accelerator, n: int) -> dict[str, float]:
    """What validation says of n pictures and a tokenizer whose codebook comes from other pictures."""
    data = ShapesConfig(image_size=(16, 16), validation_images=n, train_images=32)
    network = SonnetNetworkConfig(channels=8, residual_channels=4, latent_channels=6)
    vq = VqConfig(codebook_size=32)
    torch.manual_seed(0)
    model = Tokenizer(TokenizerConfig(image_size=(16, 16), image_channels=3, network=network, bottleneck=vq))
    model.bottleneck.start(model.encoder(all_of(open_data(data).image_batches("train", 0))))
    split = open_data(data).image_batches("validation", 0)
    distance = partial(reconstruction_loss, pixel=PixelConfig(), perceptual=None, perceptual_weight=0.0)
    result = validation.validate(accelerator, model.eval(), split, 6, 0.5, distance)
    if accelerator.num_processes == 1:
        with torch.no_grad():
            result["by hand"] = len(set(model.encode_codes(all_of(split)).flatten().tolist())) / 32
    return result


def all_of(pictures: ImageBatches) -> Tensor:
    return normalise(pictures.batch(np.arange(len(pictures)))[0])


def test_figures_are_of_the_whole_split() -> None:
    """Trap 13: 10 images over 1, 2 and 3 processes, each once: one usage and one perplexity, the same on every rank."""
    (one,) = run_processes(1, figures, 10)
    assert one["code_usage"] == one.pop("by hand")
    assert one["code_perplexity"] > 2
    for n in (2, 3):
        for rank in run_processes(n, figures, 10):
            assert rank == pytest.approx(one, rel=1e-5)


def test_a_split_smaller_than_the_processes_is_refused(tmp_path: Path) -> None:
    """A rank without a picture would not take part in the sums of validation, and the others would crash or hang."""
    with pytest.raises(RankFailedError, match="ConfigError: 1 validation images are fewer than the 2 processes"):
        run_processes(2, train, tmp_path, {"data.validation_images": 1})


JOINT: dict[str, Any] = {
    "bottleneck.revive_below": 1.5,
    "adversarial.start": 2,
    "optim.clip": 0.0,
}


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Traps 8, 15 and 42: the same pictures in the same steps, the same learning rates, and the same weights up to
    rounding, of an EMA codebook with k-means and revival and a discriminator with lambda too."""
    (one,) = run_processes(1, train, tmp_path / "1", JOINT)
    ranks = run_processes(2, train, tmp_path / "2", JOINT)
    for step in range(4):
        assert np.array_equal(np.concatenate([rank["batches"][step] for rank in ranks]), one["batches"][step])
    rates = [[entry["train/lr"] for entry in log(tmp_path / n) if "train/lr" in entry] for n in ("1", "2")]
    assert rates[0] == rates[1]
    assert len(set(rates[0])) > 2
    for name in ("tokenizer", "ema", "optimizer", "discriminator", "discriminator_optimizer"):
        assert_close(part(tmp_path / "2", 4, name), part(tmp_path / "1", 4, name))


def test_two_processes_resume_bit_for_bit(tmp_path: Path) -> None:
    """Trap 41: the random numbers of every rank and its share of the data come back too."""
    options = {"steps": 10, "save_every": 5, "bottleneck.revive_below": 2.0, "network.kind": "vqgan"}
    options |= {
        "network.channels": 4,
        "network.multipliers": "1,2",
        "network.latent_channels": 4,
        "network.dropout": 0.2,
    }
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    run_processes(2, train, whole, options)
    run_processes(2, train, resumed, options, ("save", 5))
    seen = run_processes(2, train, resumed, options)
    assert [len(rank["batches"]) for rank in seen] == [5, 5]
    assert checksums(resumed, 10) == checksums(whole, 10)
    assert log(resumed) == log(whole)


def modules_left(_: Accelerator, out: Path) -> dict[str, int]:
    """Train in a command of its own. Returns the number of DistributedDataParallel modules during the training, and
    when the group was left."""
    counts = {}

    def count(when: str) -> None:
        counts[when] = sum(isinstance(thing, DistributedDataParallel) for thing in gc.get_objects())

    names = names_of("stage1_tokenizer/train.py")
    validate_then, leave_then = validation.validate, torch.distributed.destroy_process_group

    def validated(*args: Any) -> Any:
        count("validating")
        return validate_then(*args)

    def left() -> None:
        count("leaving")
        leave_then()

    vars(validation)["validate"] = validated
    vars(torch.distributed)["destroy_process_group"] = left
    sys.argv = ["train.py", "--out", str(out), "--no-report", "--adversarial.start=0"]
    sys.argv += [f"--{key}={value}" for key, value in TINY.items() if not isinstance(value, bool)]
    run_command(names["main"])
    return counts


def test_a_command_leaves_the_group_after_its_models(tmp_path: Path) -> None:
    """A module that owns the group last waits, with the interpreter's lock, for threads that want it (torch 2.11)."""
    for rank in run_processes(2, modules_left, tmp_path):
        assert rank == {"validating": 2, "leaving": 0}

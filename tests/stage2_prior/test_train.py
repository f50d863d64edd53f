"""Training a prior: stops, micro-batches and processes change nothing; its metrics and its files are right."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor

from sampling import generate
from stage1_tokenizer.data.base import Split
from stage1_tokenizer.data.open_data import OpenData
from stage1_tokenizer.data.order import BatchOrder
from stage1_tokenizer.data.saved_config import parse_data_config
from stage1_tokenizer.engine.seeds import derive_seed
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, LoadedTokenizer
from stage2_prior.gpt.model import Gpt
from stage2_prior.likelihood import bigram_bits
from stage2_prior.prior import PRIOR_FILE, load_prior
from stage2_prior.tokens import TokenSet, load_or_encode
from stage2_prior.validation import validate
from tests.helpers.artefacts import gpt, shapes, write_tokenizer
from tests.helpers.commands import lone_accelerator, run, run_script
from tests.helpers.prior_training import SCRIPT, flags, train
from tests.helpers.processes import run_processes
from tests.helpers.training import checksums, log, part


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer, of 23 images with flips and crops, and 7 to validate on."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, data=shapes(flip=True, random_crop=True, resize_to=16))
    return folder


def test_a_stopped_run_ends_as_one_that_was_not(tokenizer: Path, tmp_path: Path) -> None:
    """Trap 41: ten steps are five, a stop, and five in a new process: weights, mean, optimizer, log, bit for bit."""
    assert train(tmp_path / "whole", tokenizer, views=2).code == 0
    assert train(tmp_path / "halves", tokenizer, stop_after=5, views=2).code == -9
    assert not (tmp_path / "halves" / "state" / "step-00000006").exists()
    run_processes(1, run_script, SCRIPT, *flags(tmp_path / "halves", tokenizer, views=2))
    for step in (5, 10):
        sums = checksums(tmp_path / "whole", step)
        parts = ("prior", "ema", "optimizer", "tally", "best", "best_weights")
        assert sums.keys() == {f"{name}.safetensors" for name in parts}
        assert checksums(tmp_path / "halves", step) == sums
    assert log(tmp_path / "halves") == log(tmp_path / "whole")
    assert [entry["step"] for entry in log(tmp_path / "whole")] == [*range(1, 6), 5, *range(6, 11), 10]
    weights = [load_file(tmp_path / run / PRIOR_FILE) for run in ("whole", "halves")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_the_saved_prior_is_the_mean_of_the_weights(tokenizer: Path, tmp_path: Path) -> None:
    """Trap 25: what is validated is what is saved and sampled from: the running mean, and not the last weights."""
    train(tmp_path, tokenizer, steps=3)
    saved, mean, last = load_file(tmp_path / PRIOR_FILE), part(tmp_path, 3, "ema"), part(tmp_path, 3, "prior")
    assert all(torch.equal(tensor, mean[name]) for name, tensor in saved.items())
    assert not all(torch.equal(tensor, last[name]) for name, tensor in saved.items())
    prior = load_prior(tmp_path)
    assert prior.step == 3
    assert prior.tokenizer.fingerprint == LoadedTokenizer.load(tokenizer).fingerprint


def test_the_bigram_stands_beside_each_validation(tokenizer: Path, tmp_path: Path) -> None:
    """A prior that does not beat it knows nothing of images; it follows from the tokens of both splits."""
    train(tmp_path, tokenizer, steps=4, validate_every=2, views=2)
    loaded, splits = LoadedTokenizer.load(tokenizer), []
    wanted_of: tuple[tuple[Split, int], ...] = (("train", 2), ("validation", 1))
    for split, views in wanted_of:
        data = parse_data_config(loaded.data, "")
        splits.append(load_or_encode(lone_accelerator(), loaded, OpenData(data), split, views, 0, tmp_path / "tokens"))
    validations = [entry for entry in log(tmp_path) if "validation/bits_per_token" in entry]
    assert [entry["step"] for entry in validations] == [2, 4]
    wanted = bigram_bits(splits[0], splits[1], codebook_size=16)
    assert [entry["validation/bigram_bits_per_token"] for entry in validations] == pytest.approx([wanted] * 2)


def test_micro_batches_make_the_same_step(tokenizer: Path, tmp_path: Path) -> None:
    """Trap 20: two micro-batches of three have the loss, gradient and step of one batch of six, without dropout."""
    for accumulation in (1, 2, 3):
        train(tmp_path / str(accumulation), tokenizer, accumulation=accumulation, steps=3, prior__dropout=0.0)
    for accumulation in (2, 3):
        for one, other in zip(log(tmp_path / "1"), log(tmp_path / str(accumulation)), strict=True):
            assert one == pytest.approx(other, rel=1e-4)
        weights = [part(tmp_path / str(number), 3, "prior") for number in (1, accumulation)]
        assert all(torch.allclose(tensor, weights[1][name], atol=1e-4) for name, tensor in weights[0].items())


def test_which_labels_are_withheld_depends_on_seed_epoch_and_index(tokenizer: Path, tmp_path: Path) -> None:
    """Traps 32 and 41: not on batch size, micro-batches or a resume; it is drawn anew in each epoch."""

    def withheld(batch_size: int, accumulation: int, seed: int = 0, stop_after: int | None = None) -> dict[Any, bool]:
        seen: list[Tensor] = []

        class Recording(Gpt):
            def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
                if self.training:
                    seen.append(labels == self.null_label)
                return super().forward(codes, labels)

        out, steps = tmp_path / f"{batch_size}-{accumulation}-{seed}-{stop_after}", 46 // batch_size
        options: dict[str, Any] = {"batch_size": batch_size, "accumulation": accumulation, "steps": steps, "seed": seed}
        options |= {"save_every": 1, "samples": 0, "validate_every": 100}
        for stop in [stop_after, None] if stop_after else [None]:
            train(out, tokenizer, stop, lambda names: names.update(build_prior=Recording), **options)
        order = BatchOrder(23, batch_size, seed)
        places = [zip(*order.indices(step), strict=True) for step in range(steps)]
        flat = [(int(epoch), int(index)) for step in places for index, epoch in step]
        return dict(zip(flat, torch.cat(seen).tolist(), strict=True))

    one = withheld(23, 1)
    assert len(one) == 46
    assert 12 <= sum(one.values()) <= 34, "half of 46, give or take three standard deviations"
    assert [one[0, i] for i in range(23)] != [one[1, i] for i in range(23)]
    assert withheld(2, 2) == one
    assert withheld(2, 1, stop_after=9) == one
    assert withheld(23, 1, seed=1) != one


def figures_on_a_rank(accelerator: Accelerator, folder: Path, weight: float) -> dict[str, float]:
    """Validate a prior, whose logits are scaled by `weight`, on random tokens."""
    tokenizer = LoadedTokenizer.load(folder)
    prior = gpt(tokenizer.tokenizer.shape, classes=5, label_dropout=0.9)
    dict(prior.named_parameters())["head.output.weight"].mul_(weight)
    return validate(accelerator, prior, random_tokens(), 4, tokenizer)


def random_tokens() -> TokenSet:
    """Eleven images of 2x3 codes, of two views."""
    generator = torch.Generator().manual_seed(derive_seed(0, "test"))
    codes = torch.randint(16, (11, 2, 2, 3, 1), generator=generator).int()
    return TokenSet(codes, torch.randint(5, (11,), generator=generator).int(), tuple("abcde"))


def test_uniform_logits_cost_log2_v_bits(tokenizer: Path) -> None:
    """Trap 35: a prior that knows nothing pays 4 bits for each of 16 codes; per colour value that is 4 L / (C H W)."""
    figures = figures_on_a_rank(lone_accelerator(), tokenizer, 0.0)
    assert figures["validation/bits_per_token"] == pytest.approx(4.0, abs=1e-6)
    assert figures["validation/nats_per_token"] == pytest.approx(math.log(16), abs=1e-6)
    assert figures["validation/code_bits_per_dim"] == pytest.approx(4.0 * 6 / (3 * 8 * 12), abs=1e-6)
    frequencies = np.bincount(random_tokens().codes[:, 0].flatten(), minlength=16) / 66
    entropy = -sum(p * math.log2(p) for p in frequencies if p)
    assert figures["validation/unigram_bits_per_token"] == pytest.approx(entropy, abs=1e-6)


def test_validation_is_the_mean_over_all_tokens(tokenizer: Path) -> None:
    """Traps 13 and 32: each image counts once, also on two processes, with its class, in its plain view."""
    figures = figures_on_a_rank(lone_accelerator(), tokenizer, 1.0)
    prior, tokens = gpt(LoadedTokenizer.load(tokenizer).tokenizer.shape, classes=5), random_tokens()
    codes = tokens.codes[:, 0].long()
    chances = prior(codes, tokens.labels.long()).double().log_softmax(-1)
    nats = -float(chances.gather(2, codes.flatten(1)[..., None]).mean())
    assert figures["validation/nats_per_token"] == pytest.approx(nats, rel=1e-5)
    for rank in run_processes(2, figures_on_a_rank, tokenizer, 1.0):
        assert rank == pytest.approx(figures, rel=1e-5)


def test_a_run_folder_is_all_that_sampling_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trap 25: a run that was moved elsewhere still samples when the run of its tokenizer, and its data, are gone."""
    write_tokenizer(tmp_path / "stage1")
    assert train(tmp_path / "run", tmp_path / "stage1", steps=2).code == 0
    shutil.rmtree(tmp_path / "stage1")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").rename(tmp_path / "elsewhere" / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    ended = run(generate.main, "-n", 2, "--prior", "moved")
    assert ended.code == 0, ended.err
    assert (tmp_path / "elsewhere" / "moved" / "generated" / "001" / "000001.png").is_file()
    assert (tmp_path / "elsewhere" / "moved" / TOKENIZER_FILE).is_file()

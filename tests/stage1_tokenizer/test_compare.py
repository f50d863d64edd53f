"""The comparison: its table says what the runs are, a finished run is kept, and a failed one does not stop the rest."""

import json
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import alexnet

from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.bottlenecks.kl import KlConfig
from stage1_tokenizer.bottlenecks.none import NoBottleneckConfig
from stage1_tokenizer.bottlenecks.rvq import RvqConfig
from stage1_tokenizer.bottlenecks.vq import VqConfig
from stage1_tokenizer.data.image_batches import normalise
from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.data.saved_config import parse_data_config
from stage1_tokenizer.diagnostics.comparison import (
    Failure,
    PresetImages,
    Row,
    console_table,
    count_latent_numbers,
    count_learned_numbers,
    image_rows,
    markdown_table,
    processor_model,
    row_cells,
)
from stage1_tokenizer.engine.errors import UserError
from stage1_tokenizer.networks.sonnet import SonnetNetworkConfig
from stage1_tokenizer.perceptual import Perceptual, PerceptualConfig
from stage1_tokenizer.tokenizer import LoadedTokenizer, Tokenizer, TokenizerConfig
from tests.helpers.commands import Ended, names_of, run

SCRIPT = "stage1_tokenizer/compare.py"
COMMON = """
data: {kind: shapes, image_size: 32, train_images: 40, validation_images: 10}
network: {kind: sonnet, channels: 8, residual_channels: 4, blocks: 1, latent_channels: 6}
"""
PRESETS = {
    "codes": "bottleneck: {kind: vq, codebook_size: 12, kmeans_iterations: 2}\noptim: {warmup_steps: 100}",
    "broken": "bottleneck: {kind: vq}\noptim: {warmup_stpes: 1}",
    "plain": "bottleneck: {kind: none}\noptim: {warmup_steps: 0}",
}
ROW = Row("name", "shapes", 1_234_567, 0.03456, 21.987, 0.12345, 0.98765, 1234.56, 576.0, None, 3210.4, 12.34, "cpu")


class Compared(NamedTuple):
    """A comparison that was made."""

    ended: Ended
    out: Path
    arguments: list[object]
    alex: Path
    table: dict[str, Any]
    """table.json and table.md as this comparison left them: later ones write over them."""
    markdown: str


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Compared:
    """Two presets that train and, between them, one that does not, by train.py in processes of their own."""
    folder = tmp_path_factory.mktemp("compare")
    for name, text in PRESETS.items():
        (folder / f"{name}.yaml").write_text(COMMON + text)
    torch.manual_seed(0)
    alex = folder / "alex.safetensors"
    save_file({f"features.{key}": tensor for key, tensor in alexnet(weights=None).features.state_dict().items()}, alex)
    arguments: list[object] = ["--presets", ",".join(str(folder / f"{name}.yaml") for name in PRESETS)]
    arguments += ["--steps", 20, "--batch_size", 4, "--out", folder / "out", "--lpips_weights", alex, "--pictures", 3]
    arguments += ["--", "--seed", 5, "--optim.lr=1e-3", "--no-report"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "passive")  # threads that wait would take the cores of a busy machine
        ended = run(names_of(SCRIPT)["main"], *arguments)
    out = folder / "out"
    return Compared(
        ended, out, arguments, alex, json.loads((out / "table.json").read_text()), (out / "table.md").read_text()
    )


@pytest.mark.parametrize("name", ["codes", "plain"])
def test_a_row_is_what_one_measures_by_hand(name: str, compared: Compared) -> None:
    """A row of the table equals the formulas, computed from the run's file on the whole validation split in float32."""
    row = next(row for row in compared.table["rows"] if row["preset"] == name)
    loaded = LoadedTokenizer.load(compared.out / name)
    data = parse_data_config(loaded.data, name)
    x = normalise(open_data(data).image_batches("validation", 0).batch(np.arange(10))[0])
    train = normalise(open_data(data).image_batches("train", 0).batch(np.arange(40))[0])
    with torch.no_grad():
        x_hat, bottlenecked = loaded.tokenizer(x)
        perceptual = Perceptual(PerceptualConfig(net="alex", weights=str(compared.alex)), (32, 32))(x, x_hat)
    assert row["nmse"] == pytest.approx(float((x - x_hat).square().mean() / train.var(correction=0)), rel=1e-4)
    each = ((x - x_hat.clamp(-1, 1)) / 2).square().flatten(1).mean(dim=1)
    assert row["psnr"] == pytest.approx(float((-10 * each.log10()).mean()), rel=1e-4)
    assert row["lpips"] == pytest.approx(float(perceptual), rel=1e-4)
    if bottlenecked.codes is None:
        assert row["floats"] == 8 * 8 * 6
        assert row["bits"] is row["usage"] is row["perplexity"] is None
    else:
        shares = torch.bincount(bottlenecked.codes.flatten(), minlength=12) / bottlenecked.codes.numel()
        used = shares[shares > 0].double()
        assert row["usage"] == pytest.approx(len(used) / 12)
        assert row["perplexity"] == pytest.approx(float(torch.exp(-(used * used.log()).sum())), rel=1e-4)
        assert row["bits"] == pytest.approx(8 * 8 * np.log2(12))
        assert row["floats"] is None


def test_a_run_had_the_short_budget(compared: Compared) -> None:
    """Steps and batch are the command's, a warm-up of 100 steps is cut to two of 20, and what was passed on arrived."""
    for name, warmup in (("codes", 2), ("plain", 0)):
        config = (compared.out / name / "config.yaml").read_text()
        for line in ("steps: 20", "batch_size: 4", "seed: 5", f"  warmup_steps: {warmup}", "  lr: 0.001"):
            assert re.search(rf"^{line}$", config, re.MULTILINE), line
        row = next(row for row in compared.table["rows"] if row["preset"] == name)
        assert row["seconds"] * row["images_per_second"] == pytest.approx(20 * 4)
        assert "precision=no" in row["trained_on"]


def test_a_failed_preset_has_a_row_and_the_others_go_on(compared: Compared) -> None:
    """A night's comparison is not lost to one typing error, and does not pass for complete."""
    assert compared.ended.code == 1
    assert "1 of 3 presets failed: broken" in compared.ended.err
    assert [row["preset"] for row in compared.table["rows"]] == ["codes", "broken", "plain"]
    message = compared.table["rows"][1]["message"]
    assert "did you mean warmup_steps" in message
    for text in (compared.ended.out, compared.markdown):
        assert [line for line in text.splitlines() if "broken" in line and "warmup_stpes" in line], "on one line"
    assert "[3/3] plain: PSNR" in compared.ended.out


def test_a_failed_training_says_why(tmp_path: Path) -> None:
    """Its exit code, its message and where the rest stands; and it does not pass for finished afterwards."""
    names, preset = names_of(SCRIPT), tmp_path / "p.yaml"
    preset.touch()
    command = [sys.executable, "-c", "print('DivergedError: train/total is nan'); raise SystemExit(4)"]
    with pytest.raises(UserError, match=r"exit code 4: DivergedError: train/total is nan \(see .*train\.log\)"):
        names["train"](tmp_path / "run", command, preset)
    assert not (tmp_path / "run" / "trained.json").exists()


def test_the_table_says_on_what_it_was_made(compared: Compared) -> None:
    """Figures of a short budget on some machine, which must not pass for anything else."""
    for word in (
        "20 steps of 4 images",
        "warm-up to 2 steps",
        "discriminator and warm-up of the KL to 10",
    ):
        assert word in compared.markdown
    assert torch.__version__ in compared.markdown
    assert compared.table["machine"]["torch"] == torch.__version__
    assert compared.table["settings"]["passed_on"] == ["--seed", "5", "--optim.lr=1e-3", "--no-report"]


def test_the_picture_has_a_row_for_each(compared: Compared) -> None:
    """The images, and the two presets that share them."""
    with Image.open(compared.out / "reconstructions.png") as image:
        pixels = np.asarray(image.convert("L"))
    assert pixels.shape[0] > 3 * 32
    assert pixels.min() < 50, "there is something on it"


def test_the_same_command_trains_nothing_again(compared: Compared) -> None:
    """A finished run is only measured, with the same metrics."""
    names = names_of(SCRIPT)
    trained: list[str] = []
    names["train"] = lambda folder, *_: trained.append(folder.name)
    ended = run(names["main"], *compared.arguments)
    assert trained == []
    assert ended.out.count("trained already") == 2
    assert json.loads((compared.out / "table.json").read_text()) == compared.table


def test_another_budget_is_another_run(compared: Compared) -> None:
    """Else the table's caption would be about a budget that nobody trained for."""
    names = names_of(SCRIPT)
    trained: list[str] = []

    def refuse(folder: Path, *_: object) -> None:
        trained.append(folder.name)
        raise names["UserError"]("another configuration")

    names["train"] = refuse
    ended = run(names["main"], *(30 if word == 20 else word for word in compared.arguments))
    assert trained == ["codes", "plain"]
    assert ended.code == 1
    assert "3 of 3 presets failed" in ended.err


def test_an_edited_preset_is_not_trained_already(compared: Compared) -> None:
    """The note of a finished run holds the preset as it was."""
    names = names_of(SCRIPT)
    path = compared.out.parent / "plain.yaml"
    command = json.loads((compared.out / "plain" / "trained.json").read_text())["command"]
    assert names["is_trained"](compared.out / "plain", ["python", *command], path)
    edited = compared.out.parent / "edited" / "plain.yaml"
    edited.parent.mkdir()
    edited.write_text(path.read_text() + "\n")
    assert not names["is_trained"](compared.out / "plain", ["python", *command], edited)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--presets", "cifar10_aee"], ["no cifar10_aee", "did you mean cifar10_ae?", "shapes64_vqgan"]),
        ([], ["presets: is required"]),
        (["--presets", "cifar10_ae", "--", "--steps", "3"], ["--steps", "cannot follow"]),
        (["--presets", "cifar10_ae", "--lpips_weights", "nowhere.safetensors"], ["nowhere.safetensors"]),
    ],
)
def test_a_mistake_is_found_before_anything_is_trained(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    """One message and exit code 2, within a second."""
    ended = run(names_of(SCRIPT)["main"], "--out", tmp_path / "out", *arguments)
    assert ended.code == 2
    assert [word for word in words if word not in ended.err] == []
    assert not (tmp_path / "out").exists()


def test_without_weights_there_is_no_lpips(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """If the weights cannot be downloaded, the column is empty and the reason is printed; the rest is measured."""
    names = names_of(SCRIPT)

    def offline(**_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("stage1_tokenizer.perceptual.lpips.LPIPS", offline)
    assert names["load_lpips"](names["CompareConfig"](presets=("a",))) is None
    assert "LPIPS is not measured" in capsys.readouterr().out


def test_numbers_are_written_for_people() -> None:
    """Numbers have units, "-" stands for a missing one, and digits that mean nothing are left out."""
    row = ["name", "1,234,567", "0.0346", "21.99", "0.1235", "98.8%", "1,234.6", "576 bits", "3,210", "12.3"]
    assert row_cells(ROW) == row
    fields = {**vars(ROW), "lpips": None, "usage": None, "perplexity": None, "bits": None, "floats": 16_384}
    fields |= {"images_per_second": 3.14159, "seconds": 21_723.4}
    assert row_cells(Row(**fields))[4:] == ["-", "-", "-", "16,384 f32", "3.14", "21,723"]


def test_the_tables_lines_are_as_wide_as_each_other() -> None:
    """Numbers stand under each other; a failure's message neither widens a column nor breaks Markdown's."""
    failure = Failure("a longer name", "failed: " + "x" * 200 + " | y")
    lines = console_table([ROW, failure]).splitlines()
    assert len(lines[0]) == len(lines[1]) < 150
    assert lines[2] == f"a longer name  {failure.message}"
    body = markdown_table([ROW, failure], "caption").split("\n\n")[0].splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in body} == {11}


@pytest.mark.parametrize(
    ("bottleneck", "codebook", "floats"),
    [
        (NoBottleneckConfig(), 0, 2 * 3 * 6),
        (KlConfig(channels=4), 0, 2 * 3 * 4),
        (VqConfig(codebook_size=16), 16 * 6, None),
        (VqConfig(codebook_size=16, update="gradient"), 0, None),  # a parameter already
        (RvqConfig(codebook_size=16, depth=3), 3 * 16 * 6, None),
        (RvqConfig(codebook_size=16, depth=3, shared=True), 16 * 6, None),
    ],
)
def test_learned_and_latent_numbers(bottleneck: BottleneckConfig, codebook: int, floats: int | None) -> None:
    """A codebook counts once however it is learned; a latent has as many numbers as are drawn or decoded."""
    network = SonnetNetworkConfig(channels=8, residual_channels=4, blocks=1, latent_channels=6)
    config = TokenizerConfig(image_size=(8, 12), image_channels=3, network=network, bottleneck=bottleneck)
    tokenizer = Tokenizer(config)
    assert count_learned_numbers(tokenizer) - sum(p.numel() for p in tokenizer.parameters()) == codebook
    if floats:
        assert count_latent_numbers(tokenizer) == floats


def test_presets_of_one_data_set_stand_under_its_images() -> None:
    """PresetImages of other images under a row of originals would be taken for very bad ones."""
    one, other = torch.zeros(2, 3, 4, 4), torch.ones(2, 1, 8, 8)
    measured = [PresetImages(ROW, images, images / 2) for images in (one, other, one)]
    rows = image_rows(measured)
    assert [len(images) for _, images in rows] == [2] * 5
    assert [images.shape[-1] for _, images in rows] == [4, 4, 4, 8, 8]
    assert [label for label, _ in rows][:2] == ["shapes, validation", "name\n21.99 dB"]


def test_the_last_error_is_found_in_a_log() -> None:
    """The newest message in the log of a continued run, on one line; without a message, the last line."""
    last_error = names_of(SCRIPT)["last_error"]
    assert (
        last_error("ConfigError: old\nstep 1\nDivergedError: train/total\n  is nan\n")
        == "DivergedError: train/total is nan"
    )
    assert last_error("step 1\nKilled\n") == "Killed"
    assert last_error("") == ""
    assert len(last_error("OSError: " + "x" * 900)) == 300


def test_the_processor_has_a_name(tmp_path: Path) -> None:
    """The name is from Linux's cpuinfo; elsewhere from Python."""
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Some CPU @ 3 GHz\n")
    assert processor_model(tmp_path / "cpuinfo") == "Some CPU @ 3 GHz"
    assert processor_model(tmp_path / "none")

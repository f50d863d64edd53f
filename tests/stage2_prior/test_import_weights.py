"""The command that imports a prior: what it writes is a prior like any other, and what it refuses leaves no trace."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from sampling.sampler import Sampler, SamplingConfig
from stage1_tokenizer.config.base import merge
from stage1_tokenizer.engine.checkpoint import read_weights
from stage1_tokenizer.engine.files import file_sha256
from stage2_prior.import_weights import main
from stage2_prior.prior import PRIOR_FILE, load_prior
from tests.helpers.artefacts import write_tokenizer
from tests.helpers.commands import ROOT, Ended, names_of, run
from tests.helpers.documents import blocks_of, commands_of
from tests.helpers.llamagen import CHECKPOINT, CONFIG, FIXTURE, checkpoint, expected, write_fitting_tokenizer

NAMES = ["tench", "gold fish", "kite, the bird", "Ähre", *"efghij"]


def import_prior(folder: Path, file: Path = CHECKPOINT, *more: object, config: Path | None = CONFIG) -> Ended:
    """Run the command on a file; the new run is folder/run."""
    if not (folder / "tokenizer").exists():
        write_fitting_tokenizer(folder / "tokenizer")
    words: list[object] = [file, "--family", "llamagen_gpt", "--tokenizer", folder / "tokenizer"]
    options = ["--config", config] if config else []
    return run(main, *words, "--out", folder / "run", *options, *more)


def assert_refused(ended: Ended, code: int, *parts: str) -> None:
    """One message without a traceback, and its exit code."""
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    for part in parts:
        assert part in ended.err


def test_an_imported_prior_is_a_prior(tmp_path: Path) -> None:
    """It loads with its classes, computes LlamaGen's logits, and all commands take its folder."""
    names = tmp_path / "names.txt"
    names.write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    ended = import_prior(tmp_path, CHECKPOINT, "--classes", names, "--licence", "MIT")
    assert ended.code == 0, ended.err
    assert "123,904 parameters, 10 classes, 8x8x1 codes of 128" in ended.out
    prior = load_prior(tmp_path / "run")
    codes, labels, logits = expected()
    assert prior.classes == tuple(NAMES)
    assert float((prior.model(codes, labels) - logits).abs().max()) < 1e-5
    _, header = read_weights(tmp_path / "run" / PRIOR_FILE, kind="prior")
    origin = {"file": "gpt.pt", "family": "llamagen_gpt", "sha256": file_sha256(CHECKPOINT), "licence": "MIT"}
    assert {name: header[f"source_{name}"] for name in origin} == origin

    images = Sampler(prior, SamplingConfig(guidance=2.0)).sample(3, classes="kite, the bird")
    assert images.shape == (3, 32, 32, 3)
    checked = run(names_of("sampling/check.py")["main"], tmp_path / "run")
    assert checked.code == 0, checked.out
    scored = run(names_of("stage2_prior/score.py")["main"], "--prior", tmp_path / "run", "-n", 3)
    assert scored.code == 0, scored.err
    drawn = run(names_of("sampling/generate.py")["main"], "--prior", tmp_path / "run", "-n", 2, "--class", "9")
    assert drawn.code == 0, drawn.err


def test_without_names_classes_are_numbers(tmp_path: Path) -> None:
    """It is said, and `--class 7` is the class of LlamaGen's label 7."""
    ended = import_prior(tmp_path)
    assert "0 to 9" in ended.out + ended.err
    assert load_prior(tmp_path / "run").classes == tuple(map(str, range(10)))


def test_heads_on_the_command_line_replace_a_config(tmp_path: Path) -> None:
    """The weights do not say their number. Another number computes something else."""
    ended = import_prior(tmp_path, CHECKPOINT, "--heads", 4, config=None)
    assert ended.code == 0, ended.err
    codes, labels, logits = expected()
    assert float((load_prior(tmp_path / "run").model(codes, labels) - logits).abs().max()) < 1e-5
    ended = import_prior(tmp_path, CHECKPOINT, "--heads", 2, "--out", tmp_path / "two")
    assert ended.code == 0, ended.err
    assert float((load_prior(tmp_path / "two").model(codes, labels) - logits).abs().max()) > 0.1
    assert_refused(import_prior(tmp_path, CHECKPOINT, "--out", tmp_path / "x", config=None), 2, "--heads NUMBER")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted_and_said(tmp_path: Path, dtype: torch.dtype) -> None:
    """The logits are those of the rounded weights; the same in a safetensors file."""
    halves = {name: tensor.to(dtype) for name, tensor in checkpoint().items()}
    torch.save({"model": halves, "steps": 7}, tmp_path / "half.pt")
    save_file(halves, tmp_path / "half.safetensors")
    made = []
    for file in ("half.pt", "half.safetensors"):
        ended = import_prior(tmp_path, tmp_path / file, "--out", tmp_path / f"run_{file}")
        assert ended.code == 0, ended.err
        assert f"{str(dtype).removeprefix('torch.')} are converted to float32" in ended.out + ended.err
        made.append(load_prior(tmp_path / f"run_{file}").model.state_dict())
    for name, tensor in made[0].items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, made[1][name])
    assert torch.equal(made[0]["start.weight"], halves["cls_embedding.embedding_table.weight"].float())


def write_config(folder: Path, change: dict[str, Any]) -> Path:
    """Write the fixture's config with changed keys."""
    path = folder / "model.yaml"
    path.write_text(yaml.safe_dump(merge(yaml.safe_load(CONFIG.read_text()), change)))
    return path


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"dim": 96, "n_layer": 12}, ["dim is 96, but 64", "(128, 64)", "n_layer is 12, but 2"]),
        ({"n_heads": 4}, ["n_heads", "did you mean"]),
        ({"block_size": 256}, ["8x8x1 codes of 128", "256 codes per image (block_size)"]),
        ({"norm_eps": "small"}, ["norm_eps", "small"]),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_is_refused(tmp_path: Path, change: dict[str, Any], parts: list[str]) -> None:
    """The message names the keys and the shapes, and nothing is written."""
    assert_refused(import_prior(tmp_path, config=write_config(tmp_path, change)), 2, *parts)
    assert not (tmp_path / "run").exists()


def test_files_that_are_no_llamagen_gpt_are_refused(tmp_path: Path) -> None:
    """Half a file, another model, no weights, no file: one message, exit code 2 or 3, nothing written."""
    half = tmp_path / "half.pt"
    half.write_bytes(CHECKPOINT.read_bytes()[:250_000])
    assert_refused(import_prior(tmp_path, half), 3, "half.pt", "damaged")
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.zeros(3, 3)}}, tmp_path / "vq.ckpt")
    assert_refused(
        import_prior(tmp_path, tmp_path / "vq.ckpt"), 3, "is not a GPT of LlamaGen", "encoder.conv_in.weight"
    )
    torch.save({"steps": 3}, tmp_path / "none.pt")
    assert_refused(import_prior(tmp_path, tmp_path / "none.pt"), 3, "holds no weights")
    assert_refused(import_prior(tmp_path, tmp_path / "gone.pt"), 2, "gone.pt", "no such file")
    wrong = run(main, CHECKPOINT, "--family", "taming", "--tokenizer", tmp_path / "tokenizer")
    assert_refused(wrong, 2, "family", "llamagen_gpt")
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_other_codes_is_refused(tmp_path: Path) -> None:
    """Another codebook size, another grid, and one that is not square."""
    for name, size, codes, parts in (
        ("codes", 32, 64, ["codebook of 64 codes", "128"]),
        ("grid", 64, 128, ["16x16x1 codes of 128", "64 codes per image"]),
    ):
        write_fitting_tokenizer(tmp_path / name, size, codes)
        assert_refused(import_prior(tmp_path, CHECKPOINT, "--tokenizer", tmp_path / name), 2, *parts)
    tensors = checkpoint()  # a prior of 16 codes, for a grid of 2x3
    for name in ("tok_embeddings.weight", "output.weight"):
        tensors[name] = tensors[name][:16].clone()
    torch.save({"model": tensors}, tmp_path / "small.pt")
    write_tokenizer(tmp_path / "oblong")
    words = ["--tokenizer", tmp_path / "oblong", "--heads", 4]
    assert_refused(import_prior(tmp_path, tmp_path / "small.pt", *words, config=None), 2, "2x3x1", "square grids")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"a\nb\n", "has 2 lines, but the prior has 10 classes"),
        ("\n".join([*NAMES[:9], "tench"]).encode(), "line 10 has the same name as line 1: tench"),
        ("\n".join(["a", "", *NAMES[2:]]).encode(), "line 2 has no name"),
        (b"\xff\xfe\x00", "is not text in UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_names_that_do_not_fit_are_refused(tmp_path: Path, text: bytes | None, message: str) -> None:
    names = tmp_path / "names.txt"
    if text is not None:
        names.write_bytes(text)
    assert_refused(import_prior(tmp_path, CHECKPOINT, "--classes", names), 2, "names.txt", message)
    assert not (tmp_path / "run").exists()


def test_the_commands_of_the_page_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/weights.md, "Import a prior", from the first command to the last, prints the lines that it shows."""
    page = (ROOT / "docs/weights.md").read_text(encoding="utf-8")
    section = page.split("## Import a prior\n")[1].split("\n## ")[0]
    blocks = blocks_of(section)
    commands = commands_of("".join(block.text for block in blocks if not block.language))
    assert len(commands) == 3
    monkeypatch.chdir(tmp_path)
    for file in (CHECKPOINT, CONFIG):
        shutil.copy(file, tmp_path)
    shutil.copy(FIXTURE.parent / "llamagen_vq/vq.pt", tmp_path)
    printed = ""
    for script, arguments in commands:
        ended = run(names_of(script)["main"], *arguments)
        assert ended.code == 0, ended.err
        printed += ended.out + ended.err
    for block in blocks:
        if block.language == "text":
            assert set(block.text.splitlines()) <= set(printed.splitlines())


def test_other_commands_open_no_pickle(tmp_path: Path) -> None:
    """Their refusal names this command."""
    write_fitting_tokenizer(tmp_path)
    (tmp_path / PRIOR_FILE).write_bytes(CHECKPOINT.read_bytes())
    ended = run(names_of("sampling/generate.py")["main"], "--prior", tmp_path, "-n", 1)
    assert_refused(ended, 3, "pickle", "python -m stage2_prior.import_weights")


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    """A run is never overwritten, not even by the same import."""
    assert import_prior(tmp_path).code == 0
    before = (tmp_path / "run" / PRIOR_FILE).read_bytes()
    assert_refused(import_prior(tmp_path), 2, "run", "give another --out")
    assert (tmp_path / "run" / PRIOR_FILE).read_bytes() == before

"""Trained models of the packages: named wherever a run is, the default without a run, stored as bfloat16."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hatchling.builders.wheel import WheelBuilder
from safetensors.torch import load_file

from sampling.sampler import Sampler
from stage1_tokenizer.bottlenecks.kl import KlConfig
from stage1_tokenizer.data.open_data import open_data
from stage1_tokenizer.engine import pretrained
from stage1_tokenizer.engine.checkpoint import read_header
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, LoadedTokenizer, fingerprint
from stage2_prior.prior import PRIOR_FILE, TOKENIZER_SOURCE, load_prior
from tests.helpers.artefacts import files_of, pictures_of, shapes, write_prior, write_tokenizer
from tests.helpers.commands import ROOT, Ended, names_of, run

NAMES = [name.name for name in pretrained.pretrained_names()]
LARGEST = 35 * 1024**2
"""Bytes of all models together at most."""
TINY = "--steps 1 --batch_size 4 --no-report"
NO_GAN = "--adversarial.weight 0 --perceptual.weight 0"
COMMANDS = {
    "sampling/generate.py": "--prior {} -n 2",
    "sampling/complete.py": "--prior {} -n 1 --variants 1",
    "stage2_prior/score.py": "--prior {} -n 3",
    "sampling/evaluate.py": "--tokenizer {} --extractor.kind none -n 4",
    "sampling/reconstruct.py": "--tokenizer {} -n 2",
    "stage1_tokenizer/analyze.py": "--tokenizer {} --images 4",
    "sampling/codes.py": "--tokenizer {} images --out codes.npz",
    "stage2_prior/plan.py": "--tokenizer {}",
    "sampling/check.py": "{}",
    "sampling/report.py": "{}",
    "sampling/publish.py": "{} --to folder --licence mit --samples 0",
    "stage1_tokenizer/train.py": f"--init_from {{}} {NO_GAN} {TINY} --data.kind shapes",
    "stage2_prior/train.py": f"--tokenizer {{}} --init_from {{}} --samples 0 {TINY}",
}
"""Each command that takes a run or its weights, with the options that name them."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty folder; return that of the models `shapes` (stored as bfloat16) and `vae` of a package."""
    models = tmp_path / "package"
    monkeypatch.setattr(pretrained, "FOLDER", models)
    write_prior(tmp_path / "runs" / "prior", ("disk", "star"), label_dropout=0.5)
    write_tokenizer(tmp_path / "runs" / "vae", bottleneck=KlConfig())
    assert publish(tmp_path / "runs" / "prior", models / "shapes", "--dtype", "bfloat16").code == 0
    assert publish(tmp_path / "runs" / "vae", models / "vae").code == 0
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return models


def publish(source: object, to: Path, *options: object) -> Ended:
    """Publish a run without images."""
    return run(
        names_of("sampling/publish.py")["main"], source, "--to", to, "--licence", "mit", "--samples", 0, *options
    )


def test_each_command_takes_a_name(folder: Path) -> None:
    """Each of them computes with the model, writes into runs/, and nothing into the package."""
    before = files_of(folder)
    assert run(names_of("sampling/generate.py")["main"], "--prior", "pretrained:shapes", "-n", 2, "--out", "images")
    for script, options in COMMANDS.items():
        ended = run(names_of(script)["main"], *options.format(*["pretrained:shapes"] * 2).split())
        assert ended.code == 0, (script, ended.err)
    assert files_of(folder) == before
    made = {path.name for path in Path("runs/pretrained/shapes").iterdir()}
    assert made == {"generated", "completed", "scores", "evaluation", "reconstructed", "analysis", "report.html"}
    settings = json.loads(Path("runs/pretrained/shapes/generated/001/settings.json").read_text())
    assert settings["prior"] == "pretrained:shapes"
    trained = Path("runs/stage2/shapes_gpt_from_shapes")
    assert read_header(trained / PRIOR_FILE, "prior")[TOKENIZER_SOURCE] == "pretrained:shapes"
    assert LoadedTokenizer.load(trained).fingerprint == LoadedTokenizer.load("pretrained:shapes").fingerprint
    assert Path("runs/stage1/shapes_vq_from_shapes", TOKENIZER_FILE).is_file()
    assert run(names_of("sampling/generate.py")["main"], "--tokenizer", "pretrained:vae", "-n", 2).code == 0
    assert len(pictures_of(Path("runs/pretrained/vae/generated/001"))) == 2


@pytest.mark.parametrize("script", [*COMMANDS, "sampling/app.py", "sampling/summary.py"])
def test_an_unknown_name(folder: Path, script: str) -> None:
    """One message that lists the names, exit code 2, and nothing is written."""
    (folder.parent / "here" / "images").mkdir()
    options = COMMANDS.get(script, "--prior {}")
    ended = run(names_of(script)["main"], *options.format(*["pretrained:cats"] * 2).split())
    assert ended.code == 2
    assert "pretrained:cats: there is no such trained model; give one of pretrained:shapes, pretrained:vae" in ended.err
    assert "Traceback" not in ended.err
    assert not Path("runs").exists()


def test_a_model_without_a_prior(folder: Path) -> None:
    """The message is that of a folder without one."""
    ended = run(names_of("sampling/generate.py")["main"], "--prior", "pretrained:vae")
    assert (ended.code, "the folder holds no prior.safetensors" in ended.err) == (2, True)


@pytest.mark.parametrize("script", ["sampling/generate.py", "sampling/complete.py", "stage2_prior/score.py"])
def test_without_a_run(folder: Path, script: str) -> None:
    """The model shapes is the default, which one line says; a run of one's own has precedence; no model is an error."""
    main = names_of(script)["main"]
    ended = run(main, "-n", 2)
    assert ended.code == 0, ended.err
    assert ended.err.count("note: there is no run under runs/stage2, so pretrained:shapes is used") == 1
    assert "pretrained:shapes (step 9)" in ended.out
    write_prior(Path("runs/stage2/own"))
    ended = run(main, "-n", 2)
    assert (ended.code, "runs/stage2/own" in ended.out, "pretrained" in ended.err) == (0, True, False)
    shutil.rmtree("runs")
    shutil.rmtree(folder)
    ended = run(main, "-n", 2)
    assert ended.code == 2
    assert "there is no run to sample from" in ended.err


def test_rounding_changes_no_code(folder: Path) -> None:
    """Encoder and codebook stay as they are; prior and decoder have values of bfloat16, and compute in float32."""
    source, rounded = load_prior(folder.parent / "runs" / "prior"), load_prior("pretrained:shapes")
    stored = load_file(folder / "shapes" / TOKENIZER_FILE) | load_file(folder / "shapes" / PRIOR_FILE)
    weights = source.tokenizer.tokenizer.state_dict() | source.model.state_dict()
    loaded = rounded.tokenizer.tokenizer.state_dict() | rounded.model.state_dict()
    assert stored.keys() == weights.keys() == loaded.keys()
    for name, weight in weights.items():
        is_kept = name.startswith(("encoder.", "bottleneck."))
        assert torch.equal(loaded[name], weight if is_kept else weight.bfloat16().float()), name
        assert stored[name].dtype == (weight.dtype if is_kept else torch.bfloat16)
        assert loaded[name].dtype == weight.dtype
    pixels, _ = open_data(shapes()).image_batches("validation", seed=0).batch(np.arange(7))
    x = pixels / 127.5 - 1
    assert torch.equal(source.tokenizer.tokenizer.encode_codes(x), rounded.tokenizer.tokenizer.encode_codes(x))
    assert source.tokenizer.code_fingerprint == rounded.tokenizer.code_fingerprint
    assert rounded.tokenizer.makes_codes_of(source.tokenizer.fingerprint)
    assert rounded.tokenizer.fingerprint == fingerprint(rounded.tokenizer.tokenizer) != source.tokenizer.fingerprint


def test_the_card_of_rounded_weights(folder: Path) -> None:
    """The card has PSNR and bits per token before and after, as score.py measures them."""
    card = (folder / "shapes" / "README.md").read_text()
    values = dict[str, float]()
    for name, prior in (("before", folder.parent / "runs" / "prior"), ("after", "pretrained:shapes")):
        assert run(names_of("stage2_prior/score.py")["main"], "--prior", prior, "--out", name).code == 0
        scores: Mapping[str, float] = json.loads((Path(name) / "scores.json").read_text())
        values |= {f"{key} {name}": scores[key] for key in ("psnr", "bits_per_token")}
    assert (
        f"On 7 validation images: PSNR {values['psnr before']:.3f} dB before and {values['psnr after']:.3f} dB after, "
        f"bits per token {values['bits_per_token before']:.4f} before and {values['bits_per_token after']:.4f} after."
    ) in card
    assert "python sampling/generate.py --prior pretrained:shapes\n" in card
    assert f"| Fingerprint of the tokenizer | {LoadedTokenizer.load('pretrained:shapes').fingerprint} |" in card


def test_rounding_without_the_images(tmp_path: Path) -> None:
    """The folder is written, a note says why nothing was measured, and the card names no folder."""
    write_tokenizer(tmp_path / "run", data={"kind": "folder", "root": str(tmp_path / "gone"), "image_size": [8, 12]})
    ended = publish(tmp_path / "run", tmp_path / "out", "--dtype", "bfloat16")
    assert ended.code == 0, ended.err
    assert "note: the change by rounding is not measured: " in ended.err
    card = (tmp_path / "out" / "README.md").read_text()
    assert "The change was not measured" in card
    assert str(tmp_path) not in card
    ended = publish(tmp_path / "run", tmp_path / "onnx", "--dtype", "bfloat16", "--format", "onnx")
    assert (ended.code, "--format onnx has float32 only" in ended.err) == (2, True)


def test_the_card_has_both_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Command, machine and seconds of the prior and, if its run is still there, of the tokenizer."""
    monkeypatch.chdir(tmp_path)
    write_prior(Path("runs/stage2/own"))
    Path("runs/stage1/own").mkdir(parents=True)
    shutil.copy(f"runs/stage2/own/{TOKENIZER_FILE}", "runs/stage1/own")
    for number in (1, 2):
        entry = {"step": 0, "command": ["python", f"stage{number}.py"], "processor": "Abacus, 2 cores", "device": "cpu"}
        log = [{"step": 10, "train/images_per_second": 4.0}, {"step": 20, "train/images_per_second": 8.0}]
        run_folder = Path(f"runs/stage{number}/own")
        (run_folder / "environment.jsonl").write_text(json.dumps(entry) + "\n")
        (run_folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        (run_folder / "config.yaml").write_text(f"batch_size: {16 * number}\n")
    assert publish("runs/stage2/own", Path("out")).code == 0
    card = Path("out/README.md").read_text()
    first, second = card.index("python stage1.py"), card.index("python stage2.py")
    assert first < card.index("Abacus, 2 cores, cpu; 60 seconds without validation and saving") < second
    assert "Abacus, 2 cores, cpu; 120 seconds" in card[second:]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_the_package(name: str) -> None:
    """It loads, its card is there, and the same seed gives the same four finite images."""
    text = f"{pretrained.PREFIX}{name}"
    assert (pretrained.FOLDER / name / "README.md").read_text(encoding="utf-8").startswith("---\n")
    sampler = Sampler.load(text)
    images = sampler.sample(4, seed=0)
    assert images.shape == (4, *sampler.image_shape)
    assert len({image.tobytes() for image in images}) == 4
    assert (images == Sampler.load(text).sample(4, seed=0)).all()
    codes = sampler.codes(np.arange(2), sampler.labels(np.arange(2)), seed=0)
    assert sampler.prior.tokenizer.tokenizer.decode_codes(codes).isfinite().all()


def test_the_models_are_small() -> None:
    """All together are a part of every clone and every wheel."""
    assert sum(path.stat().st_size for path in pretrained.FOLDER.rglob("*") if path.is_file()) <= LARGEST


def test_a_wheel_has_the_models(tmp_path: Path) -> None:
    """The build includes weights and cards, although git and hatchling ignore some files."""
    for name in ("pyproject.toml", ".gitignore", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for package in ("stage1_tokenizer", "stage2_prior", "sampling"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    model = tmp_path / "sampling" / "pretrained" / "shapes"
    model.mkdir(parents=True)
    for name in (PRIOR_FILE, TOKENIZER_FILE, "README.md", "samples.png", "config.yaml"):
        (model / name).write_bytes(b"x")
    included = {file.distribution_path for file in WheelBuilder(str(tmp_path)).recurse_included_files()}
    assert included >= {path.relative_to(tmp_path).as_posix() for path in model.iterdir()}


def test_a_summary_of_a_published_model(folder: Path) -> None:
    """Without metrics of a training, only the classifier's lines are printed; without both, there is an error."""
    main = names_of("sampling/summary.py")["main"]
    ended = run(main, "--prior", "pretrained:shapes", "--samples", 4, "--classifier_steps", 2)
    assert ended.code == 0, ended.err
    assert "classifier, right on held-out images" in ended.out
    assert "bits per token" not in ended.out
    assert "tensorboard" not in ended.out
    ended = run(main, "--prior", "pretrained:shapes", "--samples", 0)
    assert ended.code == 2
    assert "pretrained:shapes: has no metrics.jsonl with the training's metrics, and --samples is 0" in ended.err

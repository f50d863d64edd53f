"""What a user may get wrong: one message that says what was given and what to do, an exit code, and no file touched."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stage1_tokenizer.bottlenecks.none import NoBottleneckConfig
from stage1_tokenizer.engine import pretrained
from stage1_tokenizer.tokenizer import TOKENIZER_FILE
from stage2_prior.prior import PRIOR_FILE
from tests.helpers.artefacts import files_of, shapes, write_prior, write_tokenizer
from tests.helpers.commands import ROOT, Ended, names_of, run
from tests.helpers.prior_training import flags

TOKENIZER, PRIOR, SAMPLER = "stage1_tokenizer/train.py", "stage2_prior/train.py", "sampling/generate.py"
FEW = "--data.train_images 4 --data.validation_images 2"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Artefacts that are in order, and some that are not."""
    folder = tmp_path_factory.mktemp("world")
    write_tokenizer(folder / "tok")
    write_tokenizer(folder / "continuous", bottleneck=NoBottleneckConfig())
    write_prior(folder / "prior")
    write_prior(folder / "unguided", label_dropout=0.0)
    write_prior(folder / "unconditional", classes=())
    write_prior(folder / "mixed")
    write_tokenizer(folder / "mixed", seed=1)
    for name in (TOKENIZER_FILE, PRIOR_FILE):
        (folder / "text").mkdir(exist_ok=True)
        (folder / "text" / name).write_text("not weights at all, but long enough to hold a header of some kind")
    (folder / "list.yaml").write_text("- a\n- b\n")
    (folder / "broken.yaml").write_text("steps: [1\n")
    return folder


CASES: dict[str, tuple[str, str, int, str]] = {
    # name: script, arguments ({} is the world), exit code, what the message must hold (in this order)
    "wrong key": (TOKENIZER, "--optim.learning_rate 1", 2, "--optim.learning_rate: there is no such option"),
    "misspelt key": (PRIOR, "--tokenizer {}/tok --prior.layer 1", 2, "prior.layer: .*did you mean --prior.layers"),
    "wrong type": (TOKENIZER, "--steps many", 2, "steps: .*integer.*'many'"),
    "out of range": (PRIOR, "--tokenizer {}/tok --prior.dropout 1.5", 2, "prior.dropout.*less than 1.*1.5"),
    "wrong kind": (TOKENIZER, "--bottleneck.kind vae", 2, "bottleneck.kind: 'vae' is not one of .* vq_library"),
    "missing config": (TOKENIZER, "--config {}/no.yaml", 2, "--config .*no.yaml: cannot be read"),
    "broken config": (SAMPLER, "--config {}/broken.yaml", 2, "--config .*broken.yaml: is not YAML"),
    "config of another form": (PRIOR, "--config {}/list.yaml", 2, "--config .*list.yaml: is a list"),
    "size that is not divisible": (
        TOKENIZER,
        f"--data.image_size 30,44 {FEW}",
        2,
        "30x44 is not divisible .* factor 4.* 28x44 and 32x44",
    ),
    "batch that is not divisible": (
        PRIOR,
        "--tokenizer {}/tok --batch_size 7 --accumulation 2",
        2,
        "batch_size 7 .* 2 x 1",
    ),
    "no tokenizer given": (PRIOR, "--steps 1", 2, "tokenizer: is required .*--tokenizer"),
    "no such tokenizer": (PRIOR, "--tokenizer {}/nowhere", 2, "--tokenizer .*nowhere: there is no such file or folder"),
    "folder without tokenizer": (PRIOR, "--tokenizer {}", 2, f"--tokenizer .*holds no {TOKENIZER_FILE}"),
    "size that does not fit": (
        PRIOR,
        "--tokenizer {}/tok --data.kind shapes --data.image_size 16",
        2,
        "16x16.*8x12.*--data.image_size 8,12",
    ),
    "continuous tokenizer": (PRIOR, "--tokenizer {}/continuous", 2, "'none' .*no codes.*--bottleneck.kind vq"),
    "prior as tokenizer": (
        PRIOR,
        f"--tokenizer {{}}/prior/{PRIOR_FILE}",
        3,
        "this is a prior, but a tokenizer is needed",
    ),
    "text as tokenizer": (
        PRIOR,
        "--tokenizer {}/text",
        3,
        f"text/{TOKENIZER_FILE}: is damaged or is not a safetensors",
    ),
    "missing data set": (
        PRIOR,
        "--tokenizer {}/tok --data.kind cifar10 --data.image_size 8,12 --data.root {}/none",
        2,
        "cifar10: .*world.*none does not hold it.*--data.download.*--data.root",
    ),
    "missing image folder": (
        PRIOR,
        "--tokenizer {}/tok --data.kind folder --data.image_size 8,12 --data.root {}/none",
        2,
        "data.root .*none: there is no such folder",
    ),
    "no run": (SAMPLER, "", 2, "no run to sample from.*stage2_prior/train.py.*--prior"),
    "no such prior": (SAMPLER, "--prior {}/nowhere", 2, "--prior .*nowhere: there is no such file or folder"),
    "folder without prior": (SAMPLER, "--prior {}/tok", 2, f"--prior .*tok: the folder holds no {PRIOR_FILE}"),
    "tokenizer as prior": (
        SAMPLER,
        f"--prior {{}}/tok/{TOKENIZER_FILE}",
        3,
        "this is a tokenizer, but a prior is needed",
    ),
    "text as prior": (SAMPLER, "--prior {}/text", 3, f"text/{PRIOR_FILE}: is damaged or is not a safetensors"),
    "another tokenizer": (SAMPLER, "--prior {}/mixed", 3, "[0-9a-f]{32}, but .*tokenizer.safetensors is [0-9a-f]{32}"),
    "unknown class": (SAMPLER, "--prior {}/prior --class bird", 2, '"bird".* 0 cat, 1 dog'),
    "class of none": (SAMPLER, "--prior {}/unconditional --class 0", 2, "unconditional"),
    "no pictures": (SAMPLER, "--prior {}/prior -n 0", 2, "n: .*greater than 0.*0"),
    "k below 0": (SAMPLER, "--prior {}/prior --top_k=-1", 2, "top_k: .*greater than 0"),
    "min_p": (SAMPLER, "--prior {}/prior --min_p 1.5", 2, "min_p: .*less than or equal to 1.*1.5"),
    "temperature_end": (SAMPLER, "--prior {}/prior --temperature_end=-1", 2, "temperature_end: .*-1"),
    "guidance_schedule": (
        SAMPLER,
        "--prior {}/prior --guidance_schedule step",
        2,
        "guidance_schedule: .*'cosine'.*'step'",
    ),
    "guidance_interval": (
        SAMPLER,
        "--prior {}/prior --guidance_schedule interval --guidance_interval 0.7,0.2",
        2,
        r"guidance_interval \(0.7, 0.2\)",
    ),
    "an interval alone": (SAMPLER, "--prior {}/prior --guidance_interval 0.2,0.7", 2, "guidance_schedule interval and"),
    "interval without one": (SAMPLER, "--prior {}/prior --guidance_schedule interval", 2, "belong together"),
    "guidance 1": (
        SAMPLER,
        "--prior {}/prior --guidance 1 --guidance_schedule linear",
        2,
        "guidance_schedule linear: .*guidance 1",
    ),
    "infinite guidance": (SAMPLER, "--prior {}/prior --guidance inf", 2, "guidance: .*finite number, got.*inf"),
    "infinite temperature": (SAMPLER, "--prior {}/prior --temperature_end inf", 2, "temperature_end: .*finite"),
    "a way to nowhere": (SAMPLER, "--prior {}/prior --temperature_schedule cosine", 2, "temperature_end"),
    "one candidate": (SAMPLER, "--prior {}/prior --best_by class", 2, "best_by class: with one candidate"),
    "no size": (SAMPLER, "--prior {}/prior --size 0,12", 2, "size.*greater than 0"),
    "no window": (SAMPLER, "--prior {}/prior --window 0,1", 2, "window.*greater than 0"),
    "size": (SAMPLER, "--prior {}/prior --size 10,12", 2, "10x12 is not divisible.*factor 4.*8x12 and 12x12"),
    "window": (SAMPLER, "--prior {}/prior --size 16,24 --window 3,3", 2, "window 3x3.*2x3.*choose a window"),
    "stride": (SAMPLER, "--prior {}/prior --size 16,24 --stride 3", 2, "stride 3.*by 1 to 2"),
    "no candidates": (SAMPLER, "--prior {}/prior --candidates 0", 2, "candidates: .*greater than 0"),
    "larger candidates": (SAMPLER, "--prior {}/prior --size 16,24 --candidates 2", 2, "candidates 2.*candidates 1"),
    "best_by": (SAMPLER, "--prior {}/prior --candidates 2 --best_by psnr", 2, "best_by: .*'class'.*'psnr'"),
    "best class of none": (
        SAMPLER,
        "--prior {}/unconditional --candidates 2 --best_by class",
        2,
        "best_by class.*no classes.*best_by score",
    ),
    "guidance": (SAMPLER, "--prior {}/unguided --out x --guidance 2", 2, "guidance 2.0: .*label_dropout 0.*guidance 1"),
    "out is a file": (SAMPLER, "--prior {}/prior --out {}/list.yaml", 2, "--out .*list.yaml: is a file"),
    "out below a file": (SAMPLER, "--prior {}/prior --out {}/list.yaml/x", 5, "list.yaml"),
    "run in a file": (PRIOR, "--tokenizer {}/tok --out {}/list.yaml", 2, "--out .*list.yaml: is a file"),
}
REAL = ("wrong key",)


def check(ended: Ended, code: int, message: str) -> None:
    assert ended.code == code, ended
    assert re.search(message, ended.err, re.DOTALL), ended.err
    assert "Traceback" not in ended.err
    heads = [line for line in ended.err.splitlines() if re.match(r"\w+(Error|Exception|Warning): ", line)]
    assert [line.split(":")[0] for line in heads] == [{2: "ConfigError", 3: "BadFileError", 5: "StorageError"}[code]]
    assert len(ended.err) < 1500, "a wall of text is not a message"


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_message(name: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults 13, 27, 31-36: exit code, what was given, what is allowed, the way out; nothing is written over."""
    script, arguments, code, message = CASES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "none")
    before = files_of(world)
    ended = run(names_of(script)["main"], *arguments.replace("{}", str(world)).split())
    check(ended, code, message)
    assert files_of(world) == before
    assert not {path for path in files_of(tmp_path) if Path(path).name not in (".lock", TOKENIZER_FILE)}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_a_mistake_ends_the_script(name: str, world: Path, tmp_path: Path) -> None:
    """Fault 31: the same by `python SCRIPT`, from another folder: exit code and message are those of the process."""
    script, arguments, code, message = CASES[name]
    command = [sys.executable, str(ROOT / script), *arguments.replace("{}", str(world)).split()]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    check(Ended(ended.returncode, ended.stdout, ended.stderr), code, message)
    assert not files_of(tmp_path)


def train(world: Path, out: Path, **options: Any) -> Ended:
    return run(names_of(PRIOR)["main"], *flags(out, world / "tok", steps=2, **options))


def test_a_run_is_not_continued_as_another(world: Path, tmp_path: Path) -> None:
    """Fault 39: the keys that differ are listed with both values, and the run that is there stays as it is."""
    assert train(world, tmp_path / "run").code == 0
    before = files_of(tmp_path)
    ended = train(world, tmp_path / "run", optim__lr=0.5, seed=3)
    check(ended, 2, r"seed: 0 -> 3.*optim.lr: \S+ -> 0.5.*--out")
    assert "batch_size" not in ended.err
    assert files_of(tmp_path) == before
    write_tokenizer(tmp_path / "other", seed=1)
    ended = run(names_of(PRIOR)["main"], *flags(tmp_path / "run", tmp_path / "other", steps=2))
    check(ended, 2, r"tokenizer: \"[0-9a-f]{32}\" -> \"[0-9a-f]{32}\"")
    assert train(world, tmp_path / "run", log_every=2, keep=5).code == 0, "how often is no other run"


def test_a_tokenizer_of_an_unknown_data_set_is_a_bad_file(tmp_path: Path) -> None:
    """Fault 50: a header that this version cannot read, e.g. of a later one, is a file to name and not a traceback."""
    write_tokenizer(tmp_path / "tok", data={"kind": "imagenet", "image_size": shapes().image_size})
    check(run(names_of(PRIOR)["main"], *flags(tmp_path / "run", tmp_path / "tok")), 3, f"{TOKENIZER_FILE}.*imagenet")

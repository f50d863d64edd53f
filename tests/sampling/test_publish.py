"""Publishing: what is in the folder and in the card, that others load it, and what is pushed to the Hub."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from safetensors.torch import load_file

from sampling.publish import main
from sampling.sampler import Sampler
from stage1_tokenizer.bottlenecks.kl import KlConfig
from stage1_tokenizer.engine.checkpoint import read_weights
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, LoadedTokenizer
from stage2_prior.prior import PRIOR_FILE, TOKENIZER_SOURCE, load_prior
from tests.helpers.artefacts import edit_weights, files_of, pictures_of, pixels_of, write_prior, write_tokenizer
from tests.helpers.commands import ROOT, Ended, names_of, run
from tests.helpers.hub_server import client_of, fake_hub
from tests.helpers.prior_training import flags

SECRET = "/home/somebody/secret"
FOLDER_DATA = {"kind": "folder", "root": f"{SECRET}/flowers", "image_size": [8, 12]}


def write_run(folder: Path) -> Path:
    """Write the run of a prior with a log, a command, a config and two evaluations, one of other weights."""
    prior = write_prior(folder, tokenizer={"data": FOLDER_DATA})
    log = [{"step": 5, "validation/bits_per_token": 9.9}, {"step": 9, "validation/bits_per_token": 3.25}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    words = ["accelerate", "launch", "stage2_prior/train.py", "--tokenizer", f"{SECRET}/tok", f"--out={SECRET}/x"]
    (folder / "environment.jsonl").write_text(json.dumps({"step": 0, "command": words}) + "\n")
    (folder / "config.yaml").write_text(yaml.dump({"out": f"{SECRET}/x", "steps": 9, "data": FOLDER_DATA}))
    (folder / "evaluation").mkdir()
    for name, weights, value in (("ours", Sampler(prior).settings()["weights"], 12.5), ("other", "0" * 32, 77.7)):
        metric = {"name": "fid", "label": "FID", "value": value, "low": 12.0, "high": 13.0, "better": "lower"}
        reference = {"data": {"kind": "folder", "split": "train", "root": SECRET}}
        protocol = {"prior": {"weights": weights}, "samples": f"100 of 100 in {SECRET}", "reference": reference}
        tree = {"figures": [metric], "protocol": protocol, "warnings": ["only 100 samples"]}
        (folder / "evaluation" / f"{name}.json").write_text(json.dumps(tree))
    return folder


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a prior's run."""
    return write_run(tmp_path_factory.mktemp("priors") / "flowers_gpt")


@pytest.fixture(scope="module")
def published(prior: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published folder of this run."""
    out = tmp_path_factory.mktemp("published") / "flowers"
    ended = publish(prior, "--to", out, "--licence", "CC-BY-4.0")
    assert ended.code == 0, ended.err
    return out


def publish(path: Path, *arguments: object) -> Ended:
    """Run publish.py."""
    return run(main, path, *arguments)


def front_matter(card: str) -> dict[str, Any]:
    """Return the block at the top of a card, as the Hub reads it."""
    tree: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return tree


def test_the_folder(prior: Path, published: Path) -> None:
    """Exactly these files; tensors are the run's bit for bit, and so is the tokenizer's fingerprint."""
    names = {"README.md", "config.yaml", PRIOR_FILE, TOKENIZER_FILE, "samples.png"}
    assert {path.name for path in published.iterdir()} == names
    for name in (PRIOR_FILE, TOKENIZER_FILE):
        ours, theirs = load_file(prior / name), load_file(published / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert load_prior(published).tokenizer.fingerprint == load_prior(prior).tokenizer.fingerprint


def test_no_folder_of_this_machine_is_published(published: Path) -> None:
    """No file names a folder above the data, and what is needed is there still: the data's own name."""
    for name, content in files_of(published).items():
        assert SECRET.encode() not in content, name
        assert b"somebody" not in content, name
    assert load_prior(published).data["root"] == "flowers"
    assert yaml.safe_load((published / "config.yaml").read_text()) == {
        "steps": 9, "data": {"kind": "folder", "root": "flowers", "image_size": [8, 12]},
    }  # fmt: skip


def test_a_data_set_of_torchvision_is_named_where_it_is_downloaded_to(tmp_path: Path) -> None:
    """The folder of the machine that trained says nothing elsewhere."""
    write_prior(tmp_path / "run", tokenizer={"data": {"kind": "mnist", "root": SECRET, "image_size": [8, 12]}})
    ended = publish(tmp_path / "run", "--to", tmp_path / "p", "--licence", "CC-BY-4.0")
    assert ended.code == 0, ended.err
    assert load_prior(tmp_path / "p").data["root"] == "data"


def test_the_card(published: Path) -> None:
    """Licence and kinds for the Hub; the metrics of these weights and of no others; the command and the use."""
    card = (published / "README.md").read_text()
    assert front_matter(card)["license"] == "cc-by-4.0"
    assert front_matter(card)["tags"] == ["tessera", "image-tokenizer", "vq", "gpt"]
    assert "Bits per token | 3.250 |" in card  # of step 9, not of step 5
    assert "FID | 12.50 | 12 to 13 | lower is better" in card
    assert "100 of 100; compared with folder train" in card
    assert "> only 100 samples" in card
    assert "9.9" not in card
    assert "77.7" not in card  # an evaluation of other weights
    assert "accelerate launch stage2_prior/train.py --tokenizer tok --out=x" in card
    assert 'Sampler.load("flowers").sample(16, seed=0)' in card
    assert "cat, dog" in card
    assert "16 samples of seed 0" in card


def test_the_samples_are_those_of_seed_0(prior: Path, published: Path) -> None:
    """The grid has the images that the card says: not chosen ones."""
    first = Sampler.load(prior).sample(16, seed=0)[0]
    assert (pixels_of(published / "samples.png")[2:10, 2:14] == first).all()


def test_another_licence_and_no_images(prior: Path, tmp_path: Path) -> None:
    """A licence that the Hub does not know is `other` with its name; --samples 0 publishes no image."""
    assert publish(prior, "--to", tmp_path / "a", "--licence", "My own: free", "--samples", 0).code == 0
    tree = front_matter((tmp_path / "a" / "README.md").read_text())
    assert (tree["license"], tree["license_name"]) == ("other", "My own: free")
    assert not list((tmp_path / "a").glob("*.png"))


def test_a_fresh_process_loads_the_folder(prior: Path, published: Path, tmp_path: Path) -> None:
    """The story of a user who gets the folder: the same images as from the run."""
    code = (
        "import sys, numpy\nfrom sampling.sampler import Sampler\n"
        "numpy.save(sys.argv[2], Sampler.load(sys.argv[1]).sample(3, classes='dog', seed=4))"
    )
    words = [sys.executable, "-c", code, str(published), str(tmp_path / "images.npy")]
    subprocess.run(words, check=True, cwd=ROOT, timeout=120)
    wanted = Sampler.load(prior).sample(3, classes="dog", seed=4)
    assert (torch.from_numpy(wanted).numpy().tobytes()) == (tmp_path / "images.npy").read_bytes()[-wanted.nbytes :]


def test_commands_take_a_name_of_the_hub(
    prior: Path, published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """generate.py gives the run's images into runs/hub, keeps the commit, and writes nothing into the cache."""
    generate = names_of("sampling/generate.py")["main"]
    assert run(generate, "--prior", prior, "-n", 3, "--out", tmp_path / "wanted").code == 0
    monkeypatch.chdir(tmp_path)
    with fake_hub(tmp_path / "cache") as hub:
        commit = hub.commit("me/flowers", published)
        ended = run(generate, "--prior", "hf:me/flowers", "-n", 3)
        assert ended.code == 0, ended.err
        cached = files_of(tmp_path / "cache")
        assert not [name for name in cached if name.endswith((".png", ".json", ".npz"))]
    assert f"from hf:me/flowers@{commit} (step 9)" in ended.out
    out = tmp_path / "runs" / "hub" / f"me--flowers@{commit[:12]}" / "generated" / "000"
    out = out if out.is_dir() else next(out.parent.iterdir())
    assert pictures_of(out) == pictures_of(tmp_path / "wanted")
    assert json.loads((out / "settings.json").read_text())["prior"] == f"hf:me/flowers@{commit}"


def test_a_prior_keeps_the_name_of_its_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prior that is trained on a tokenizer of the Hub says which commit; its card says it too."""
    write_tokenizer(tmp_path / "tokenizer")
    monkeypatch.chdir(tmp_path)
    train = names_of("stage2_prior/train.py")["main"]
    with fake_hub(tmp_path / "cache") as hub:
        commit = hub.commit("me/shapes", tmp_path / "tokenizer")
        words = [word for word in flags(Path("unused"), Path("unused"), steps=2) if word != "unused"]
        words = [word for word in words if word not in ("--tokenizer", "--out")]
        ended = run(train, "--tokenizer", "hf:me/shapes@main", *words)
        assert ended.code == 0, ended.err
    folder = tmp_path / "runs" / "stage2" / "shapes_gpt"
    assert read_weights(folder / PRIOR_FILE, "prior")[1][TOKENIZER_SOURCE] == f"hf:me/shapes@{commit}"
    assert publish(folder, "--to", tmp_path / "out", "--licence", "mit").code == 0
    assert f"| Tokenizer from | hf:me/shapes@{commit} |" in (tmp_path / "out" / "README.md").read_text()


def test_a_vae_and_its_reconstructions(tmp_path: Path) -> None:
    """A tokenizer with a normal latent shows samples from noise, and the reconstructions of its last validation."""
    write_tokenizer(tmp_path / "run", bottleneck=KlConfig())
    (tmp_path / "run" / "samples").mkdir()
    for step, content in ((3, b"early"), (7, b"last")):
        (tmp_path / "run" / "samples" / f"reconstructions-{step:08d}.png").write_bytes(content)
    assert publish(tmp_path / "run", "--to", tmp_path / "out", "--licence", "mit", "--samples", 4).code == 0
    assert (tmp_path / "out" / "reconstructions.png").read_bytes() == b"last"
    assert pixels_of(tmp_path / "out" / "samples.png").shape == (2 * 10 + 2, 2 * 14 + 2, 3)
    assert "generate.py --tokenizer out" in (tmp_path / "out" / "README.md").read_text()
    assert LoadedTokenizer.load(tmp_path / "out").fingerprint == LoadedTokenizer.load(tmp_path / "run").fingerprint


class FakeApi:
    """The part of huggingface_hub.HfApi that a push uses; it keeps what it is given."""

    def __init__(self, **_: object) -> None:
        self.calls: list[tuple[str, Mapping[str, Any]]] = []
        self.pushed: dict[str, bytes] = {}

    def whoami(self) -> None:
        """Answer as for a user who is logged in."""

    def create_repo(self, repository: str, **options: Any) -> None:
        """Keep the name and the options."""
        self.calls.append((repository, options))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> SimpleNamespace:
        """Keep the files."""
        self.pushed = files_of(folder_path)
        self.calls.append((repo_id, {"message": commit_message}))
        return SimpleNamespace(oid="c" * 40)


def test_push(prior: Path, published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of a published folder are pushed in one commit, which is printed; the card names the repository."""
    api = FakeApi()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_: api)
    ended = publish(prior, "--to", "hf:me/flowers", "--licence", "cc-by-4.0", "--private")
    assert ended.code == 0, ended.err
    assert api.calls == [
        ("me/flowers", {"private": True, "exist_ok": True}), ("me/flowers", {"message": "Step 9"}),
    ]  # fmt: skip
    assert api.pushed.keys() == files_of(published).keys()
    assert all(content == files_of(published)[name] for name, content in api.pushed.items() if name != "README.md")
    assert 'Sampler.load("hf:me/flowers")' in api.pushed["README.md"].decode()
    assert f"hf:me/flowers@{'c' * 40}" in ended.out


def test_a_push_that_is_refused(prior: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not logged in, no network, a revision: one message and code 2."""
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no token"))
    words = ("--licence", "mit")
    with fake_hub(tmp_path / "cache"):
        ended = publish(prior, "--to", "hf:me/flowers", *words)
        assert (ended.code, ended.err.count("\n")) == (2, 1)
        assert "log in with `hf auth login`" in ended.err
    ended = publish(prior, "--to", "hf:me/flowers@v1", *words)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "leave @v1 out" in ended.err
    monkeypatch.setenv("HF_TOKEN", "hf_anything")
    with client_of("http://127.0.0.1:9", tmp_path / "cache"):
        ended = publish(prior, "--to", "hf:me/flowers", *words)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "the Hub cannot be reached" in ended.err


def test_what_is_not_published(prior: Path, tmp_path: Path) -> None:
    """No licence, an existing folder, no run, damaged weights: one message, and nothing is written."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("x")
    bad = write_prior(tmp_path / "bad").path.parent
    edit_weights(bad / PRIOR_FILE, **{name: torch.full_like(t, torch.nan) for name, t in first_of(bad).items()})
    strange = write_prior(tmp_path / "strange").path.parent
    write_tokenizer(strange, seed=5)
    licence, out = ("--licence", "mit"), tmp_path / "out"
    before = files_of(tmp_path)
    for path, words, code, message in (
        (prior, ("--to", out), 2, "licence: is required"),
        (prior, ("--to", tmp_path / "there", *licence), 2, "is there already"),
        (prior, ("--to", out, *licence, "--private"), 2, "--private has no effect"),
        (tmp_path / "none", ("--to", out, *licence), 2, "no such folder"),
        ("hf:me/x", ("--to", out, *licence), 2, "is published already"),
        (bad, ("--to", out, *licence), 3, "is not finite"),
        (strange, ("--to", out, *licence), 3, "belongs to the tokenizer"),
    ):
        ended = run(main, path, *words)
        assert ended.code == code, (path, ended)
        assert message in ended.err, ended.err
        assert "Traceback" not in ended.err
    assert files_of(tmp_path) == before


def first_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the first weight of a prior's file, by its name."""
    name, tensor = next(iter(load_file(folder / PRIOR_FILE).items()))
    return {name: tensor}

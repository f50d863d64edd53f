"""Priors that start from another prior's weights, priors whose tokenizer was fine-tuned, and longer runs."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from stage1_tokenizer.bottlenecks.vq import VqConfig
from stage1_tokenizer.config.base import read_saved_yaml
from stage1_tokenizer.data.folder import FolderConfig
from stage1_tokenizer.data.shapes import ShapesConfig
from stage1_tokenizer.networks.sonnet import SonnetNetworkConfig
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, LoadedTokenizer, Tokenizer, TokenizerConfig, save_tokenizer
from stage2_prior.base import LabelEmbedding
from stage2_prior.prior import PRIOR_FILE, SavedPrior, load_prior, start_from
from tests.helpers.artefacts import IMAGE_SIZE, MAKERS, edit_weights, write_image_folder, write_prior, write_tokenizer
from tests.helpers.commands import ROOT, Ended, names_of, run
from tests.helpers.prior_training import TINY, flags, train
from tests.helpers.training import checksums, part

SCRIPT = "stage2_prior/train.py"


def fine_tune(out: Path, tokenizer: Path, source: Path, **options: object) -> Ended:
    """Run the training in this process from a source, without options of the prior."""
    words = flags(out, tokenizer, init_from=source, **options)
    for key in TINY:
        if key.startswith("prior.") and key.replace(".", "__") not in options:
            place = words.index(f"--{key}")
            del words[place : place + 2]
    return run(names_of(SCRIPT)["main"], *words)


@pytest.mark.parametrize("kind", MAKERS)
def test_classes_are_matched_by_name(tmp_path: Path, kind: str) -> None:
    """A class of both priors and "no class" keep their vectors, whatever their labels are; a new class keeps the random
    vectors that it was built with; everything else is the source's. Both are said."""
    loaded = write_prior(tmp_path, classes=("cat", "dog", "owl"), kind=kind)
    source = SavedPrior.read(tmp_path / PRIOR_FILE)
    classes = ("owl", "ant", "cat")
    prior = MAKERS[kind](loaded.tokenizer.tokenizer.shape, len(classes), seed=5)
    built = {name: tensor.clone() for name, tensor in prior.state_dict().items()}
    text = start_from(prior, classes, source, loaded.tokenizer)
    assert "1 classes start anew, since it does not have them: ant" in text
    assert "1 of its classes are not in the data and are left out: dog" in text
    assert "another tokenizer" not in text
    tables = {f"{name}.weight" for name, part in prior.named_modules() if isinstance(part, LabelEmbedding)}
    assert tables
    for name, tensor in prior.state_dict().items():
        if name in tables:
            theirs = source.weights[name]
            assert torch.equal(tensor, torch.stack([theirs[2], built[name][1], theirs[0], theirs[3]]))
        else:
            assert torch.equal(tensor, source.weights[name]), name


def test_a_prior_of_other_classes_starts_from_another(tmp_path: Path) -> None:
    """The whole way through the command: the architecture is the source's, the first step is step 1 of a fresh
    optimizer, the classes are those of the data, and config.yaml has the source's fingerprint."""
    write_image_folder(tmp_path / "images", ("ant", "cat"))
    data = FolderConfig(root=str(tmp_path / "images"), image_size=IMAGE_SIZE)
    write_tokenizer(tmp_path / "tokenizer", data=data)
    write_prior(tmp_path / "source", classes=("cat", "dog"), tokenizer={"data": data}, layers=1)
    ended = fine_tune(tmp_path / "new", tmp_path / "tokenizer", tmp_path / "source", steps=1, optim__lr=1e-30)
    assert ended.code == 0, ended.err
    assert "start anew, since it does not have them: ant" in ended.out
    ours, theirs = part(tmp_path / "new", 1, "prior"), load_file(tmp_path / "source" / PRIOR_FILE)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():  # a weight of 0 has moved by the learning rate
        kept, wanted = (ours[name][1:], tensor[[0, 2]]) if name == "start.weight" else (ours[name], tensor)
        assert torch.allclose(kept, wanted, rtol=0.0, atol=1e-29), name
    assert part(tmp_path / "new", 1, "optimizer")["0.step"] == 1
    assert load_prior(tmp_path / "new").classes == ("ant", "cat")
    source = SavedPrior.read(tmp_path / "source" / PRIOR_FILE)
    assert read_saved_yaml(tmp_path / "new" / "config.yaml")["init_from"] == source.fingerprint
    again = fine_tune(tmp_path / "new", tmp_path / "tokenizer", tmp_path / "source", steps=1, optim__lr=1e-30)
    assert "is finished already" in again.out
    edit_weights(tmp_path / "source" / PRIOR_FILE, **{"start.weight": theirs["start.weight"] + 1})
    refused = fine_tune(tmp_path / "new", tmp_path / "tokenizer", tmp_path / "source", steps=1, optim__lr=1e-30)
    assert refused.code == 2
    assert f'init_from: "{source.fingerprint}" -> ' in refused.err


def test_another_shape_of_codes_is_refused(tmp_path: Path) -> None:
    """Another grid, another codebook size and another architecture: exit code 2, the reason, and nothing is written."""
    write_prior(tmp_path / "source")
    write_tokenizer(tmp_path / "grid", factor=2)
    write_tokenizer(tmp_path / "codes", bottleneck=VqConfig(codebook_size=8, kmeans_init=False))
    write_tokenizer(tmp_path / "same")
    for name, options, parts in (
        ("grid", {}, ["2x3x1 codes of 16", "4x6x1 codes of 16", "row and column", "image_size"]),
        ("codes", {}, ["2x3x1 codes of 8", "each code has weights"]),
        (
            "same",
            {"prior__width": 48, "prior__heads": 2},
            ["another architecture", "embedding.weight is (16, 24)"],
        ),
    ):
        ended = fine_tune(tmp_path / "new", tmp_path / name, tmp_path / "source", **options)
        assert ended.code == 2, ended.out
        assert all(text in ended.err for text in parts), ended.err
        assert not (tmp_path / "new").exists()


def test_a_prior_fits_a_tokenizer_with_a_fine_tuned_decoder(tmp_path: Path) -> None:
    """A run that is trained before the decoder is fine-tuned goes on after it: tokens are not encoded anew, the prior
    loads beside the new tokenizer, check.py finds nothing, and the weights are those of the run without the change."""
    for name in ("whole", "halves"):
        write_tokenizer(tmp_path / name / "tokenizer")
        train(tmp_path / name / "prior", tmp_path / name / "tokenizer", stop_after=5 if name == "halves" else None)
    old = LoadedTokenizer.load(tmp_path / "halves" / "tokenizer")
    with torch.no_grad():
        old.tokenizer.decoder.last_weight.mul_(1.5)
    weights = old.tokenizer.state_dict().items()
    edit_weights(old.path, **{name: value.contiguous() for name, value in weights if "decoder" in name})
    new = LoadedTokenizer.load(old.path)
    assert new.fingerprint != old.fingerprint
    assert new.code_fingerprint == old.code_fingerprint
    ended = train(tmp_path / "halves" / "prior", tmp_path / "halves" / "tokenizer")
    assert ended.code == 0, ended.err
    assert "from step 5" in ended.out
    assert "extracting" not in ended.out
    assert checksums(tmp_path / "halves" / "prior", 10) == checksums(tmp_path / "whole" / "prior", 10)
    assert load_prior(tmp_path / "halves" / "prior").tokenizer.fingerprint == new.fingerprint
    shutil.copy(new.path, tmp_path / "whole" / "prior" / TOKENIZER_FILE)
    assert load_prior(tmp_path / "whole" / "prior").tokenizer.fingerprint == new.fingerprint
    checked = run(names_of("sampling/check.py")["main"], tmp_path / "whole" / "prior")
    assert checked.code == 0, checked.out


def test_a_prior_of_a_former_version_fits_a_fine_tuned_decoder(tmp_path: Path) -> None:
    """Its header has the fingerprint of the whole tokenizer, which the fine-tuned one lists as one with its codes. A
    tokenizer that only has the same shape is still refused."""
    prior = write_prior(tmp_path)  # as former versions wrote it
    with safe_open(tmp_path / PRIOR_FILE, framework="pt") as file:
        assert prior.tokenizer.fingerprint in file.metadata()["config"]
    loaded = LoadedTokenizer.load(tmp_path)
    with torch.no_grad():
        loaded.tokenizer.decoder.last_weight.mul_(1.5)
    for same_codes, fits in (((loaded.fingerprint,), True), ((), False)):
        loaded.tokenizer.same_codes = same_codes
        data = FolderConfig(root="", image_size=IMAGE_SIZE)
        save_tokenizer(tmp_path / TOKENIZER_FILE, loaded.tokenizer, data, 1)
        assert LoadedTokenizer.load(tmp_path).makes_codes_of(prior.tokenizer.fingerprint) is fits
        ended = run(
            names_of("sampling/generate.py")["main"], "--prior", tmp_path, "-n", 1, "--out", tmp_path / str(fits)
        )
        assert ended.code == (0 if fits else 3), ended.err


@pytest.mark.parametrize("schedule", ["constant", "wsd"])
def test_a_prior_is_prolonged_exactly(tmp_path: Path, schedule: str) -> None:
    """Parts of the state with the best weights, bit for bit, where the short run's end is a validation of both."""
    write_tokenizer(tmp_path / "tokenizer")
    options: dict[str, Any] = {
        "optim__schedule": schedule,
        "optim__decay_share": 0.5,
        "validate_every": 4,
        "save_every": 4,
    }
    assert train(tmp_path / "long", tmp_path / "tokenizer", steps=16, **options).code == 0
    for steps in (8, 16):
        ended = train(tmp_path / "short", tmp_path / "tokenizer", steps=steps, **options)
        assert ended.code == 0, ended.err
    assert f"from step {4 if schedule == 'wsd' else 8}" in ended.out
    assert checksums(tmp_path / "short", 16) == checksums(tmp_path / "long", 16)


def test_an_imported_prior_is_trained_further(tmp_path: Path) -> None:
    """LlamaGen's fixture on drawn shapes, over a tokenizer of its codes: other classes, its own options of the GPT, and
    the licence of the source in the header of the result."""
    network = SonnetNetworkConfig(factor=4, channels=8, residual_channels=4, blocks=1, latent_channels=6, local=True)
    data, bottleneck = ShapesConfig(image_size=(32, 32), train_images=12), VqConfig(codebook_size=128)
    model = Tokenizer(TokenizerConfig(image_size=(32, 32), image_channels=3, network=network, bottleneck=bottleneck))
    save_tokenizer(tmp_path / TOKENIZER_FILE, model, data.model_copy(update={"validation_images": 6}), 1)
    foreign = ROOT / "tests" / "fixtures" / "foreign" / "llamagen_gpt"
    words = [foreign / "gpt.pt", "--family", "llamagen_gpt", "--config", foreign / "config.yaml", "--licence", "MIT"]
    words += ["--tokenizer", tmp_path, "--out", tmp_path / "old"]
    imported = run(names_of("stage2_prior/import_weights.py")["main"], *words)
    assert imported.code == 0, imported.err
    ended = fine_tune(tmp_path / "new", tmp_path, tmp_path / "old", steps=2)
    assert ended.code == 0, ended.err
    assert "5 classes start anew" in ended.out
    before, after = SavedPrior.read(tmp_path / "old" / PRIOR_FILE), SavedPrior.read(tmp_path / "new" / PRIOR_FILE)
    assert after.header.prior.model_dump(exclude={"dropout"}) == before.header.prior.model_dump(exclude={"dropout"})
    assert after.origin == before.origin
    assert after.origin["source_licence"] == "MIT"

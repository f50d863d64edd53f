"""A published tokenizer computes in diffusers what it computes here, and comes back from there as it was."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.bottlenecks.fsq import FsqConfig
from stage1_tokenizer.bottlenecks.kl import KlBottleneck, KlConfig
from stage1_tokenizer.bottlenecks.vq import VectorQuantizer, VqConfig
from stage1_tokenizer.engine.checkpoint import write_weights
from stage1_tokenizer.networks.vqgan import VqganNetworkConfig
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, LoadedTokenizer, Tokenizer, TokenizerConfig
from tests.helpers.artefacts import shapes, write_prior, write_tokenizer
from tests.helpers.commands import Ended, names_of, run
from tests.helpers.foreign import import_weights, relative_error
from tests.stage1_tokenizer.import_weights.test_diffusers import KL, VQ, images, saved

diffusers = pytest.importorskip("diffusers", reason="the extra bench is not installed")

SMALL: dict[str, Any] = {"channels": 16, "latent_channels": 6, "downsample": 3, "norm_groups": 8}
VQ_CASES: dict[str, tuple[dict[str, Any], VqConfig]] = {
    "attention at two levels": (
        {"multipliers": (1, 2, 3), "attention": (0, 2), "blocks": 2},
        VqConfig(codebook_size=40, kmeans_init=False),
    ),
    "factorized, cosine, no middle attention": (
        {"multipliers": (1, 2), "middle_attention": False},
        VqConfig(codebook_size=40, code_dim=4, cosine=True),
    ),
    "by gradient, convolutions of equal dimensions": (
        {"multipliers": (2, 1)},
        VqConfig(codebook_size=40, update="gradient", cosine=True, project=True),
    ),
    "one level, 4x4 is never used": ({"multipliers": (1,), "downsample": 4}, VqConfig(codebook_size=40)),
}
KL_CASES: dict[str, tuple[dict[str, Any], KlConfig]] = {
    "as many channels as the latent": ({"multipliers": (1, 2)}, KlConfig()),
    "moments, a convolution behind": ({"multipliers": (1, 2, 2), "moments": True}, KlConfig(project=True)),
}


def write_random(folder: Path, network: dict[str, Any], bottleneck: BottleneckConfig, channels: int = 3) -> Tokenizer:
    """Write a tokenizer with random weights, also in norms and biases, and return it."""
    torch.manual_seed(0)
    config = TokenizerConfig(
        image_size=(24, 32), image_channels=channels, network=VqganNetworkConfig(**{**SMALL, **network}),
        bottleneck=bottleneck,
    )  # fmt: skip
    model = Tokenizer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    data = shapes(image_size=(24, 32)).model_dump_json()
    header = {"config": config.model_dump_json(), "data": data, "step": "3"}
    write_weights(folder / TOKENIZER_FILE, model, "tokenizer", header)
    return LoadedTokenizer.load(folder).tokenizer


def publish(run_folder: Path, to: Path) -> Ended:
    """Run publish.py with --format diffusers."""
    main = names_of("sampling/publish.py")["main"]
    return run(main, run_folder, "--to", to, "--licence", "mit", "--format", "diffusers")


@pytest.mark.parametrize("name", VQ_CASES)
@torch.no_grad()
def test_vq_model(name: str, tmp_path: Path) -> None:
    """Codes are equal; latents and decoded codes are equal to 1e-10 in float64."""
    network, bottleneck = VQ_CASES[name]
    tokenizer = write_random(tmp_path / "run", network, bottleneck)
    ended = publish(tmp_path / "run", tmp_path / "out")
    assert ended.code == 0, ended.err
    model = diffusers.VQModel.from_pretrained(tmp_path / "out")
    ours, theirs = copy.deepcopy(tokenizer).double(), copy.deepcopy(model).double()
    assert isinstance(ours.bottleneck, VectorQuantizer)
    used = set[int]()
    for x in images(3):
        codes = tokenizer.encode_codes(x)[..., 0]
        latents = model.encode(x).latents
        assert torch.equal(model.quantize(latents)[2][2].view_as(codes), codes)
        assert relative_error(model.decode(latents).sample, tokenizer(x)[0]) < 1e-4  # rounding of both
        used |= set(codes.flatten().tolist())
        exact = ours.bottleneck.space.project_in(ours.encoder(x.double()))
        assert relative_error(theirs.encode(x.double()).latents, exact) < 1e-10
        vectors = theirs.quantize.embedding(codes).permute(0, 3, 1, 2)
        decoded = ours.decode(ours.bottleneck.space.project_out(vectors))
        assert relative_error(theirs.decode(vectors, True).sample, decoded) < 1e-10
    assert len(used) > 3


@pytest.mark.parametrize("name", KL_CASES)
@torch.no_grad()
def test_autoencoder_kl(name: str, tmp_path: Path) -> None:
    """Means, log variances and decoded noise are equal to 1e-10 in float64."""
    network, bottleneck = KL_CASES[name]
    tokenizer = write_random(tmp_path / "run", network, bottleneck, channels=1)
    ended = publish(tmp_path / "run", tmp_path / "out")
    assert ended.code == 0, ended.err
    model = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out")
    ours, theirs = copy.deepcopy(tokenizer).double(), copy.deepcopy(model).double()
    assert isinstance(ours.bottleneck, KlBottleneck)
    for x in images(1):
        assert relative_error(model.decode(model.encode(x).latent_dist.mode()).sample, tokenizer(x)[0]) < 1e-4
        moments = ours.bottleneck.project_in(ours.encoder(x.double()))
        assert relative_error(theirs.encode(x.double()).latent_dist.parameters, moments) < 1e-10
    noise = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    assert relative_error(theirs.decode(noise).sample, ours.decode(ours.bottleneck.sample(noise))) < 1e-10


@pytest.mark.parametrize(("kind", "name"), [("vq", name) for name in VQ] + [("kl", name) for name in KL])
def test_there_and_back(kind: str, name: str, tmp_path: Path) -> None:
    """A model of diffusers that is imported and published has the same bits, and the same keys in its config."""
    build, options = {"vq": (diffusers.VQModel, VQ), "kl": (diffusers.AutoencoderKL, KL)}[kind]
    theirs = saved(build, options[name], tmp_path / "theirs")
    assert import_weights(tmp_path / "theirs", "--family", f"diffusers_{kind}", "--out", tmp_path / "run").code == 0
    ended = publish(tmp_path / "run", tmp_path / "out")
    assert ended.code == 0, ended.err
    again = build.from_pretrained(tmp_path / "out")
    former, later = theirs.state_dict(), again.state_dict()
    identity = {"quant_conv.weight", "quant_conv.bias", "post_quant_conv.weight", "post_quant_conv.bias"}
    assert later.keys() - former.keys() <= identity  # where the former model had no such layers
    assert all(torch.equal(tensor, later[key]) for key, tensor in former.items())
    free = {"scaling_factor", "force_upcast", "use_quant_conv", "use_post_quant_conv", "vq_embed_dim", "sample_size"}
    free |= {"_name_or_path", "_diffusers_version", "_use_default_values"}
    given, back = (
        {key: tuple(value) if isinstance(value, list) else value for key, value in model.config.items()}
        for model in (theirs, again)
    )
    assert {key: given[key] for key in given if key not in free} == {key: back[key] for key in back if key not in free}


def test_our_own_training(tmp_path: Path) -> None:
    """A tokenizer that was trained here with `downsample 3` loads in diffusers, and comes back with the same codes."""
    ended = train("--out", tmp_path / "run", "--network.kind", "vqgan", "--network.downsample", 3)
    assert ended.code == 0, ended.err
    ended = publish(tmp_path / "run", tmp_path / "out")
    assert ended.code == 0, ended.err
    ended = import_weights(tmp_path / "out", "--family", "diffusers_vq", "--out", tmp_path / "back")
    assert ended.code == 0, ended.err
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    model = diffusers.VQModel.from_pretrained(tmp_path / "out")
    first, back = (LoadedTokenizer.load(tmp_path / name).tokenizer for name in ("run", "back"))
    with torch.no_grad():
        assert torch.equal(first.encode_codes(x), back.encode_codes(x))
        assert relative_error(model(x).sample, first(x)[0]) < 1e-4
    codebook = load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors")["quantize.embedding.weight"]
    assert torch.equal(codebook, first.bottleneck.codebooks()[0])


def train(*arguments: object) -> Ended:
    """Train a tiny tokenizer for two steps."""
    words = "--data.image_size 16 --data.train_images 20 --data.validation_images 6 --network.channels 8 "
    words += "--network.multipliers 1,2 --network.latent_channels 4 --network.norm_groups 8 --batch_size 8 --steps 2 "
    words += "--bottleneck.codebook_size 8 --adversarial.weight 0 --perceptual.weight 0 --pictures 2 --no-report"
    return run(names_of("stage1_tokenizer/train.py")["main"], *arguments, *words.split())


@pytest.mark.parametrize(
    ("network", "bottleneck", "wanted"),
    [
        ({"downsample": 4}, VqConfig(), ["layer encoder.2", "4x4", "--network.downsample 3"]),
        ({"norm_groups": 32}, VqConfig(), ["layer encoder.3.norm2", "32 groups", "16", "network.norm_groups"]),
        ({}, FsqConfig(levels=(4, 4)), ["bottleneck", "fsq", "only vq and kl"]),
        ({}, KlConfig(channels=3), ["layer bottleneck.project_out", "3 channels to 6", "bottleneck.channels"]),
        ({}, VqConfig(dot_product=True, update="gradient"), ["bottleneck", "dot_product"]),
    ],
)
def test_what_diffusers_cannot_express(
    network: dict[str, Any], bottleneck: BottleneckConfig, wanted: list[str], tmp_path: Path
) -> None:
    """One message that names the layer; nothing is written."""
    write_random(tmp_path / "run", {"multipliers": (1, 2), **network}, bottleneck)
    ended = publish(tmp_path / "run", tmp_path / "out")
    assert ended.code == 2
    assert ended.err.count("\n") == 1
    assert all(words in ended.err for words in wanted), ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_other_runs_are_refused(tmp_path: Path) -> None:
    """A prior has no counterpart, its tokenizer may have; a network of another kind has none."""
    write_prior(tmp_path / "prior")
    write_tokenizer(tmp_path / "sonnet")
    for folder, words in (("prior", "name its tokenizer.safetensors"), ("sonnet", "network: kind sonnet")):
        ended = publish(tmp_path / folder, tmp_path / "out")
        assert ended.code == 2
        assert words in ended.err
    assert not (tmp_path / "out").exists()


def test_the_card_and_the_config(tmp_path: Path) -> None:
    """The model card names class and licence; the config has no value that JSON readers refuse."""
    write_random(tmp_path / "run", {"multipliers": (1, 2)}, VqConfig(codebook_size=40))
    assert publish(tmp_path / "run", tmp_path / "out").code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert 'diffusers.VQModel.from_pretrained("out")' in card
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["_class_name"] == "VQModel"
    assert config["sample_size"] == [24, 32]

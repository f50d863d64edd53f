"""Imported VQModel and AutoencoderKL compute what diffusers itself computes, for several configs and at odd sizes."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stage1_tokenizer.bottlenecks.kl import KlBottleneck
from stage1_tokenizer.bottlenecks.vq import VectorQuantizer
from stage1_tokenizer.tokenizer import LoadedTokenizer
from tests.helpers.foreign import import_weights, relative_error

diffusers = pytest.importorskip("diffusers", reason="the extra bench is not installed")

DOWN, UP = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")


def blocks(*attention: int) -> dict[str, Any]:
    """Return the types of blocks of levels with (1) and without (0) attention, from the full resolution down."""
    return {
        "down_block_types": tuple(DOWN[level] for level in attention),
        "up_block_types": tuple(UP[level] for level in reversed(attention)),
    }


VQ: dict[str, dict[str, Any]] = {
    "one level": {"block_out_channels": (64,), "latent_channels": 3, "num_vq_embeddings": 64},
    "attention, factorized": {
        **blocks(0, 0, 1), "block_out_channels": (32, 48, 96), "norm_num_groups": 16, "layers_per_block": 2,
        "latent_channels": 8, "vq_embed_dim": 5, "num_vq_embeddings": 100,
    },
    "grey, no middle attention": {
        **blocks(0, 0), "in_channels": 1, "out_channels": 1, "block_out_channels": (32, 64), "norm_num_groups": 8,
        "latent_channels": 4, "mid_block_add_attention": False,
    },
}  # fmt: skip
KL: dict[str, dict[str, Any]] = {
    "like Stable Diffusion": {
        **blocks(0, 0, 0, 0), "block_out_channels": (32, 64, 64, 64), "layers_per_block": 2, "latent_channels": 4,
    },
    "no convolutions around the latent": {
        **blocks(0, 0), "block_out_channels": (32, 64), "latent_channels": 16, "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "attention at the top": {
        **blocks(1, 0), "block_out_channels": (64, 32), "latent_channels": 2, "use_post_quant_conv": False,
        "norm_num_groups": 4,
    },
}  # fmt: skip


def saved(build: Callable[..., Any], options: dict[str, Any], folder: Path) -> Any:
    """Build a model with random weights, also in norms and biases, and save it. Return it in eval mode."""
    torch.manual_seed(0)
    model = build(**options).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(0.3 * torch.randn_like(parameter))
        if "embedding" in name:
            parameter.normal_()
    model.save_pretrained(folder)
    return model


def images(channels: int) -> list[Tensor]:
    """Draw images of square, odd and oblong sizes."""
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(2, channels, *size, generator=generator) * 2 - 1 for size in ((32, 32), (37, 26), (24, 40))]


@pytest.mark.parametrize("name", VQ)
@torch.no_grad()
def test_vq_model(name: str, tmp_path: Path) -> None:
    """Latents and decoded codes to 1e-10 in float64; in float32 the codes are equal, and so are images up to 1e-4."""
    model = saved(diffusers.VQModel, VQ[name], tmp_path / "theirs")
    ended = import_weights(tmp_path / "theirs", "--family", "diffusers_vq", "--out", tmp_path / "ours")
    assert ended.code == 0, ended.err
    tokenizer = LoadedTokenizer.load(tmp_path / "ours").tokenizer
    ours, theirs = copy.deepcopy(tokenizer).double(), copy.deepcopy(model).double()
    assert isinstance(ours.bottleneck, VectorQuantizer)
    for x in images(model.config.in_channels):
        latents = model.encode(x).latents
        codes = model.quantize(latents)[2][2].view(len(x), *latents.shape[2:])
        assert torch.equal(tokenizer.encode_codes(x)[..., 0], codes)
        assert relative_error(tokenizer(x)[0], model.decode(latents).sample) < 1e-4  # rounding of both
        exact = theirs.encode(x.double()).latents
        assert relative_error(ours.bottleneck.space.project_in(ours.encoder(x.double())), exact) < 1e-10
        decoded = ours.decode(ours.bottleneck.codes_to_latents(codes[..., None]))
        assert relative_error(decoded, theirs.decode(theirs.quantize(exact)[0], True).sample) < 1e-10


@pytest.mark.parametrize("name", KL)
@torch.no_grad()
def test_autoencoder_kl(name: str, tmp_path: Path) -> None:
    """Means, log variances and decoded means: to 1e-10 in float64, and to 1e-4 in float32."""
    model = saved(diffusers.AutoencoderKL, KL[name], tmp_path / "theirs")
    ended = import_weights(tmp_path / "theirs", "--family", "diffusers_kl", "--out", tmp_path / "ours")
    assert ended.code == 0, ended.err
    tokenizer = LoadedTokenizer.load(tmp_path / "ours").tokenizer
    ours, theirs = copy.deepcopy(tokenizer).double(), copy.deepcopy(model).double()
    assert isinstance(ours.bottleneck, KlBottleneck)
    for x in images(3):
        mean = model.encode(x).latent_dist.mode()
        assert relative_error(tokenizer(x)[0], model.decode(mean).sample) < 1e-4
        parameters = theirs.encode(x.double()).latent_dist.parameters
        assert relative_error(ours.bottleneck.project_in(ours.encoder(x.double())), parameters) < 1e-10
        mean = parameters.chunk(2, dim=1)[0]
        assert relative_error(ours.decode(ours.bottleneck.project_out(mean)), theirs.decode(mean).sample) < 1e-10
        noise = torch.randn(2, model.config.latent_channels, 3, 5, dtype=torch.float64)
        assert relative_error(ours.decode(ours.bottleneck.sample(noise)), theirs.decode(noise).sample) < 1e-10


def test_a_single_file_and_the_old_names_of_attention(tmp_path: Path) -> None:
    """A safetensors file without its config gives the same tokenizer, also with the names before diffusers 0.15."""
    saved(diffusers.AutoencoderKL, {**blocks(0, 0), "block_out_channels": (32, 64)}, tmp_path / "theirs")
    file = tmp_path / "theirs" / "diffusion_pytorch_model.safetensors"
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in load_file(file).items():
        for new, former in renamed.items():
            name = name.replace(f".{new}.", f".{former}.")  # noqa: PLW2901
        old[name] = tensor
    save_file(old, tmp_path / "old.safetensors")
    words = ("--family", "diffusers_kl", "--image_size", 32)
    for source, name in ((tmp_path / "theirs", "a"), (file, "b"), (tmp_path / "old.safetensors", "c")):
        ended = import_weights(source, *words, "--out", tmp_path / name)
        assert ended.code == 0, ended.err
    assert len({LoadedTokenizer.load(tmp_path / name).fingerprint for name in "abc"}) == 1


REFUSED = {
    "spatial norm (MoVQ)": ("VQModel", {"norm_type": "spatial"}, "norm_layer|conv_y|norm_type"),
    "another activation": ("VQModel", {"act_fn": "gelu"}, "act_fn is 'gelu'"),
    "attention in the encoder only": (
        "AutoencoderKL",
        {**blocks(0, 0), "down_block_types": (DOWN[0], DOWN[1]), "block_out_channels": (32, 32)},
        r"only the encoder has encoder\.down_blocks\.1\.attentions\.0",
    ),
    "the other kind": ("AutoencoderKL", {}, "AutoencoderKL|codebook"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_our_network_cannot_express_is_refused(name: str, tmp_path: Path) -> None:
    """One message names the layer or the key, and nothing is written."""
    kind, options, message = REFUSED[name]
    options = {"latent_channels": 4, "block_out_channels": (32,), **options}
    saved(getattr(diffusers, kind), options, tmp_path / "theirs")
    family = "diffusers_kl" if kind == "AutoencoderKL" and name != "the other kind" else "diffusers_vq"
    ended = import_weights(tmp_path / "theirs", "--family", family, "--out", tmp_path / "ours")
    assert ended.code in (2, 3)
    assert "Traceback" not in ended.err
    assert re.search(message, ended.err), ended.err
    assert not (tmp_path / "ours").exists()

"""The contract between the stages: codes, their order, their way back to an image, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange

from stage1_tokenizer.bottlenecks.none import NoBottleneckConfig
from stage1_tokenizer.bottlenecks.vq import VectorQuantizer, VqConfig
from stage1_tokenizer.engine.checkpoint import write_weights
from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.networks.sonnet import SonnetNetworkConfig
from stage1_tokenizer.networks.vqgan import VqganNetworkConfig
from stage1_tokenizer.tokenizer import TOKENIZER_FILE, LoadedTokenizer, Tokenizer, TokenizerConfig, fingerprint

SONNET = SonnetNetworkConfig(channels=8, residual_channels=4, latent_channels=6, local=True)
VQGAN = VqganNetworkConfig(channels=4, multipliers=(1, 2, 2), latent_channels=6, dropout=0.5)
PLAIN = VqConfig(codebook_size=32)
PROJECTED = VqConfig(codebook_size=32, code_dim=3, cosine=True)
HEADER = {"data": '{"kind": "shapes"}', "step": "7"}


def tokenizer(**options: Any) -> Tokenizer:
    """Images of 16x24, a grid of 4x6, 32 codes that have been trained for two batches."""
    torch.manual_seed(0)
    default = {"image_size": (16, 24), "image_channels": 3, "network": SONNET, "bottleneck": PLAIN}
    config = TokenizerConfig(**{**default, **options})
    made = Tokenizer(config)
    for _ in range(2):
        made(torch.randn(4, config.image_channels, *config.image_size))
    return made.eval()


def saved(model: Tokenizer, path: Path) -> Path:
    write_weights(path, model, "tokenizer", {"config": model.config.model_dump_json(), **HEADER})
    return path


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("network", [SONNET, VQGAN], ids=lambda config: config.kind)
@pytest.mark.parametrize("bottleneck", [PLAIN, PROJECTED], ids=["plain", "projected"])
def test_codes_decode_to_exactly_the_reconstruction(network: Any, bottleneck: VqConfig, channels: int, B: int) -> None:
    """Trap 5: what stage two models is what stage one was judged by, bit for bit, also with dropout in the config."""
    model = tokenizer(network=network, bottleneck=bottleneck, image_channels=channels)
    x = torch.randn(B, channels, 16, 24)
    with torch.no_grad():
        codes = model.encode_codes(x)
        assert codes.shape == (B, *model.shape[:3])
        assert codes.dtype == torch.int64
        assert torch.equal(model.decode_codes(codes), model(x)[0])


def test_the_grid_is_row_major() -> None:
    """Trap 37: code (i, j) of a non-square grid is token i * w + j of the sequence, and comes back to (i, j)."""
    model = tokenizer()
    assert model.shape == (4, 6, 1, 32)
    assert model.shape.length == 24
    sequence = torch.arange(24)
    codes = rearrange(sequence, "(h w K) -> 1 h w K", h=4, w=6, K=1)
    assert isinstance(model.bottleneck, VectorQuantizer)
    vectors = model.bottleneck.codes_to_latents(codes)
    for i in range(4):
        for j in range(6):
            assert torch.equal(vectors[0, :, i, j], model.bottleneck.codebook.weight[i * 6 + j])
    back = model.bottleneck(vectors).codes
    assert back is not None
    assert torch.equal(rearrange(back, "1 h w K -> (h w K)"), sequence)


def test_a_code_belongs_to_its_place_in_the_image() -> None:
    """Trap 37: a change in one patch changes latents in its row and column of the grid, and none elsewhere."""
    model = tokenizer()
    x = torch.randn(1, 3, 16, 24)
    y = x.clone()
    y[:, :, 4:8, 16:20] += 1.0  # the patch in row 1, column 4
    moved = (model.encoder(x) != model.encoder(y)).any(dim=1)[0]
    assert moved[1, 4]
    assert moved.nonzero().min(0).values.tolist() == [0, 3]
    assert moved.nonzero().max(0).values.tolist() == [2, 5]


@pytest.mark.parametrize("bad", [-1, 32, 10**9])
def test_codes_out_of_range_are_refused(bad: int) -> None:
    """Indexing wraps a negative id around without a word, and the image of another code comes out."""
    codes = torch.zeros(1, 4, 6, 1, dtype=torch.int64)
    codes[0, 2, 3, 0] = bad
    with pytest.raises(ValueError, match=rf"0\.\.31.*{bad}"):
        tokenizer().decode_codes(codes)


def test_an_image_size_that_does_not_fit_is_refused() -> None:
    """A border would be cut off in the middle of training; the message has the sizes that would do."""
    with pytest.raises(ConfigError, match=r"18x25.*16x24 and 20x28"):
        tokenizer(image_size=(18, 25))
    with pytest.raises(ConfigError, match=r"3x4.*4x4 and 4x4"):
        tokenizer(image_size=(3, 4))


def test_a_continuous_latent_has_no_codes() -> None:
    """Asking for codes, or for a prior over them, says that there are none and what to do."""
    model = tokenizer(bottleneck=NoBottleneckConfig())
    x = torch.randn(1, 3, 16, 24)
    assert model(x)[1].codes is None
    codes = torch.zeros(1, 4, 6, 1, dtype=torch.int64)
    for ask in (lambda: model.shape, lambda: model.encode_codes(x), lambda: model.decode_codes(codes)):
        with pytest.raises(ConfigError, match=r"continuous.*--bottleneck\.kind vq"):
            ask()


def test_the_fingerprint_changes_with_every_weight() -> None:
    """Codes on disk are trusted by it, so no weight and no code vector may change behind its back."""
    model = tokenizer()
    before = fingerprint(model)
    for name, tensor in model.state_dict().items():
        kept = tensor.clone()
        tensor.view(-1)[-1].add_(1e-3 if tensor.is_floating_point() else 1)
        assert fingerprint(model) != before, name
        tensor.copy_(kept)
    assert fingerprint(model) == before


def test_the_fingerprint_changes_with_the_config() -> None:
    """Equal weights of another config need not mean the same codes."""
    model = tokenizer()
    other = Tokenizer(model.config.model_copy(update={"bottleneck": VqConfig(codebook_size=32, beta=0.5)}))
    other.load_state_dict(model.state_dict())
    assert fingerprint(other) != fingerprint(model)


def test_a_tokenizer_comes_back_from_disk_as_it_was(tmp_path: Path) -> None:
    """Same weights, same fingerprint, same images, frozen and in eval mode; by its file or by its folder."""
    model = tokenizer()
    file = saved(model, tmp_path / TOKENIZER_FILE)
    x = torch.randn(2, 3, 16, 24)
    for path in (file, tmp_path):
        loaded = LoadedTokenizer.load(path)
        assert loaded.fingerprint == fingerprint(model) == fingerprint(model.to(memory_format=torch.channels_last))
        assert (loaded.step, loaded.data, loaded.path) == (7, {"kind": "shapes"}, file)
        assert loaded.tokenizer.config == model.config
        assert not any(module.training for module in loaded.tokenizer.modules())
        assert not any(parameter.requires_grad for parameter in loaded.tokenizer.parameters())
        assert torch.equal(loaded.tokenizer(x)[0], tokenizer()(x)[0])


def test_a_path_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    """A mistake in the command, not a damaged file: another exit code, and the option is named."""
    for path in (tmp_path, tmp_path / "gone"):
        with pytest.raises(ConfigError, match="--tokenizer"):
            LoadedTokenizer.load(path)


def test_a_header_that_is_not_a_tokenizers_is_refused(tmp_path: Path) -> None:
    """The header comes from somebody else: what is missing in it is a bad file, not a crash."""
    model = tokenizer()
    for header in ({}, {"config": "{}", **HEADER}, {"config": model.config.model_dump_json(), "data": "[]"}):
        write_weights(tmp_path / "x.safetensors", model, "tokenizer", header)
        with pytest.raises(BadFileError, match="header"):
            LoadedTokenizer.load(tmp_path / "x.safetensors")


def test_the_public_surface() -> None:
    """Five methods and one property are all that stage two knows of a tokenizer."""
    public = {name for name in vars(Tokenizer) if not name.startswith("_")}
    assert public == {"forward", "encode", "decode", "encode_codes", "decode_codes", "shape"}
    assert isinstance(vars(Tokenizer)["shape"], property)

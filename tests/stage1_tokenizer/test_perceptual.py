"""LPIPS as a loss: frozen, the same in train mode, fed by a local file, and equal to the formula of its paper."""

from pathlib import Path
from typing import Literal
from urllib.error import URLError

import lpips
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import alexnet
from torchvision.models.vgg import cfgs, make_layers

from stage1_tokenizer.engine.errors import BadFileError, ConfigError
from stage1_tokenizer.engine.optim import OptimConfig, build_optimizer
from stage1_tokenizer.engine.state import save_state
from stage1_tokenizer.perceptual import Perceptual, PerceptualConfig

Net = Literal["alex", "vgg"]
FILES: dict[Net, str] = {"alex": "lpips_alex_features.safetensors", "vgg": "lpips_vgg16_features_fp16.safetensors"}
TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}  # the ReLUs in torchvision's `features` that LPIPS reads


def features(net: Net) -> nn.Sequential:
    layers: nn.Sequential = alexnet(weights=None).features if net == "alex" else make_layers(cfgs["D"])
    return layers


@pytest.fixture(scope="session")
def random_alex(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone file as it should be, of random weights: what is tested here does not depend on their values."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "alex.safetensors"
    save_file({f"features.{name}": tensor for name, tensor in features("alex").state_dict().items()}, path)
    return path


@pytest.fixture(scope="session")
def metric(random_alex: Path) -> Perceptual:
    return loaded(random_alex)


def loaded(path: Path, net: Net = "alex") -> Perceptual:
    return Perceptual(PerceptualConfig(weight=1.0, net=net, weights=str(path)), (64, 64))


def images(channels: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(2, channels, 64, 64, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_frozen_and_always_in_eval_mode(metric: Perceptual) -> None:
    """Trap 21: its dropout sleeps whatever the parent does, so the same pair has the same distance twice."""
    assert any(isinstance(module, nn.Dropout) for module in metric.modules()), "else there is nothing to test"
    parent = nn.Module()
    parent.add_module("metric", metric)
    parent.train()
    assert not any(module.training for module in metric.modules())
    assert torch.equal(metric(images(), images(seed=1)), metric(images(), images(seed=1)))
    assert not any(parameter.requires_grad for parameter in metric.parameters())


def test_the_gradient_reaches_the_image_and_nothing_else(metric: Perceptual) -> None:
    """Trap 21: it trains the decoder, and is not trained: no gradient stays in it and its state is as before."""
    before = {name: tensor.clone() for name, tensor in metric.state_dict().items()}
    x_hat = images(seed=1).requires_grad_()
    torch.autograd.backward(metric(images(), x_hat))
    assert x_hat.grad is not None
    assert x_hat.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in metric.parameters())
    assert all(torch.equal(metric.state_dict()[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("channels", [1, 3])
def test_value_and_gradient_are_the_packages(metric: Perceptual, channels: int) -> None:
    """The distance is taken here and not by lpips: 1e-6 of its value, and the gradient of autograd through it."""
    x, y = images(channels), images(channels, seed=1)
    mine, other = y.clone().requires_grad_(), y.clone().requires_grad_()
    distance, wanted = metric(x, mine), metric.lpips(x, other).mean()  # one channel is spread over three there too
    assert torch.allclose(distance, wanted, rtol=1e-6, atol=0)
    torch.autograd.backward([3.0 * distance, 3.0 * wanted])
    assert mine.grad is not None
    assert other.grad is not None
    assert (mine.grad - other.grad).norm() < 1e-5 * other.grad.norm()


def test_the_real_image_is_looked_at_without_gradient(metric: Perceptual) -> None:
    """It is data: its features need no graph, whoever asks for one."""
    x, y = images().requires_grad_(), images(seed=1)
    assert not metric(x, y).requires_grad
    assert metric(x, y.requires_grad_()).requires_grad


def test_under_autocast_the_distance_is_taken_in_float32(metric: Perceptual) -> None:
    """bf16 has three digits, and the features of a good reconstruction differ by less."""
    x, y = images(), images(seed=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        distance = metric(x, y)
    torch.autograd.backward(distance)
    assert distance.dtype == torch.float32
    assert torch.allclose(distance, metric(x, y), rtol=0.02)
    assert y.grad is not None
    assert y.grad.isfinite().all()


def test_distance_of_an_image_to_itself(metric: Perceptual) -> None:
    """LPIPS(x, x) = 0, symmetric, not negative, and a single number for a batch: its mean."""
    x, y = images(), images(seed=1)
    assert metric(x, x) == 0.0
    assert metric(x, y) > 0
    assert torch.allclose(metric(x, y), metric(y, x))
    assert torch.allclose(metric(x, y), (metric(x[:1], y[:1]) + metric(x[1:], y[1:])) / 2)


def test_grey_is_three_equal_channels(metric: Perceptual) -> None:
    """Trap 21: one channel is repeated for both images."""
    x, y = images(channels=1), images(channels=1, seed=1)
    assert torch.equal(metric(x, y), metric(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1)))


def test_it_is_in_no_optimizer_and_cannot_be_saved(metric: Perceptual, tmp_path: Path) -> None:
    """Trap 21: nothing of it is trainable; as a part of a state it would be refused, since its heads share memory."""
    parent = nn.Sequential(nn.Conv2d(3, 3, 1), metric)
    optimizer = build_optimizer(parent, OptimConfig())
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == 3 * 3 + 3
    with pytest.raises(RuntimeError, match="share memory"):
        save_state(tmp_path, 1, {"metric": metric}, {})


@pytest.mark.parametrize(("net", "smallest"), [("vgg", 16), ("alex", 31)])
def test_images_that_are_too_small_are_refused(net: Net, smallest: int) -> None:
    """Below it the network's pooling leaves nothing, and the crash is in the middle of torchvision."""
    with pytest.raises(ConfigError, match=f"at least {smallest} pixels.*64x{smallest - 1}"):
        Perceptual(PerceptualConfig(weight=1.0, net=net, weights="unread"), (64, smallest - 1))


def test_the_smallest_images_work(metric: Perceptual) -> None:
    """The stated minimum is the true one."""
    x = torch.rand(1, 3, 31, 31)
    assert metric(x, -x).isfinite()
    with pytest.raises(RuntimeError, match="too small"):
        metric(x[..., 1:], -x[..., 1:])


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    """A path that is mistyped, or a folder, is a mistake in the command."""
    for path in (tmp_path / "gone.safetensors", tmp_path):
        with pytest.raises(ConfigError, match=r"perceptual\.weights"):
            loaded(path)


def test_a_wrong_file_is_refused(random_alex: Path, tmp_path: Path) -> None:
    """lpips itself loads what fits and says nothing of the rest, and trains against random features."""
    good = load_file(random_alex)
    cut, other = dict(good), {**good, "features.3.weight": good["features.3.weight"][:, :1].contiguous()}
    del cut["features.10.bias"]
    for name, tensors in {"cut": cut, "other": other, "empty": {}}.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        with pytest.raises(BadFileError, match=r"no fitting features\."):
            loaded(path)
    for name, data in {"nothing": b"", "pickle": b"\x80\x04N.", "half": random_alex.read_bytes()[:1000]}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(BadFileError, match=r"is not a safetensors file.*only safetensors"):
            loaded(tmp_path / name)


def test_no_network_and_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the download fails, the message says which option takes a local file."""

    def offline(**_: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(lpips, "LPIPS", offline)
    with pytest.raises(ConfigError, match=r"cannot be downloaded.*perceptual\.weights"):
        Perceptual(PerceptualConfig(weight=1.0, net="alex"), (64, 64))


def reference(net: Net, weights: dict[str, Tensor], heads: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """LPIPS from its paper, equation 1: unit-length features, squared differences, weighted, averaged, summed: (B,)."""
    backbone = features(net)
    backbone.load_state_dict({name.removeprefix("features."): tensor.float() for name, tensor in weights.items()})
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    maps: list[list[Tensor]] = []
    for image in (x, y):
        hidden = (((image + 1) / 2 - mean[:, None, None]) / deviation[:, None, None]).float()
        maps.append([])
        for index, layer in enumerate(backbone):
            hidden = layer(hidden.clone())
            if index in TAPS[net]:
                maps[-1].append(hidden / (hidden.square().sum(1, keepdim=True).sqrt() + 1e-10))
    layers = zip(heads, *maps, strict=True)
    return torch.stack([((a - b).square() * head).sum(1).mean(dim=(1, 2)) for head, a, b in layers]).sum(0)


@pytest.mark.slow
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_real_weights_give_the_papers_distance(real_data: Path, net: Net) -> None:
    """Every layer of the file is in its place: images have the distance of a reference written out here."""
    metric = loaded(real_data / "weights" / FILES[net], net)
    paths = sorted((real_data / "flowers" / "rose").glob("*.jpg"))[:4]
    images = np.stack([np.asarray(Image.open(path).convert("RGB").resize((64, 64))) for path in paths])
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    heads = [head.model[-1].weight for head in metric.lpips.lins]
    assert all((head >= 0).all() for head in heads), "trained heads are not negative, random ones are"
    with torch.no_grad():
        expected = reference(net, load_file(real_data / "weights" / FILES[net]), heads, x[:2], x[2:])
        assert torch.allclose(metric(x[:2], x[2:]), expected.mean(), rtol=1e-3)
        assert torch.allclose(metric(x[2:], x[:2]), expected.mean(), rtol=1e-3)
        shifted, blurred = x.roll(1, dims=3), nn.functional.avg_pool2d(x, 5, stride=1, padding=2)
        assert metric(x, shifted) < metric(x, blurred) < metric(x, x.flip(0))

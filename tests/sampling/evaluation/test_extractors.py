"""Extractors: one resize, equal features in any batch, real weights classify, files that do not fit are refused."""

import hashlib
from pathlib import Path
from typing import Any
from urllib.error import URLError

import matplotlib as mpl
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torchvision.models import get_model, resnet18

from sampling.evaluation.extractors import build_extractor
from sampling.evaluation.extractors.base import Extractor
from sampling.evaluation.extractors.efficientnet_lite0 import EfficientNetLite0, EfficientNetLite0Config, SameConv
from sampling.evaluation.extractors.inception import InceptionConfig, InceptionV3
from sampling.evaluation.extractors.torchvision_models import TorchvisionConfig
from stage1_tokenizer.engine.errors import BadFileError, ConfigError


def images(n: int = 2, size: int = 32, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write good files of random weights, with BatchNorm statistics that change the result."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    with torch.device("meta"):  # because drawing Inception's initial values takes a second
        inception = InceptionV3()
    networks = {"lite": EfficientNetLite0(), "inception": inception, "resnet18": resnet18(weights=None)}
    for name, network in networks.items():
        weights = {}
        for key, tensor in network.state_dict().items():
            if key.endswith("num_batches_tracked"):
                continue
            fan = max(1, tensor[0].numel()) if tensor.dim() > 1 else 1
            values = (
                torch.randn(tensor.shape) * (2 / fan) ** 0.5 if tensor.dim() > 1 else 0.1 * torch.randn(tensor.shape)
            )
            one_around = key.endswith("running_var") or (tensor.dim() == 1 and key.endswith("weight"))
            weights[key] = values.abs() + 1 if one_around else values
        save_file(weights, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in networks}


@pytest.fixture(scope="module")
def extractors(files: dict[str, Path]) -> dict[str, Extractor]:
    return {
        "lite": build_extractor(EfficientNetLite0Config(weights=str(files["lite"])), "cpu"),
        "inception": build_extractor(InceptionConfig(weights=str(files["inception"])), "cpu"),
        "resnet18": build_extractor(TorchvisionConfig(model="resnet18", weights=str(files["resnet18"])), "cpu"),
    }


KINDS = ["lite", "inception", "resnet18"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_has_its_features_whatever_its_batch(extractors: dict[str, Extractor], kind: str) -> None:
    """Also in train mode; a grey image has the features of the same image in three channels."""
    extractor, x = extractors[kind], images(3)
    extractor.train()
    together = extractor(x)
    alone = extractor(x[1:2])
    assert together.features.shape == (3, extractor.dimension)
    assert together.features.dtype == torch.float32
    torch.testing.assert_close(alone.features[0], together.features[1], rtol=1e-4, atol=1e-4)
    assert together.features[0].sub(together.features[1]).abs().max() > 1e-2
    assert not together.features.requires_grad
    grey = x[:1, :1]
    torch.testing.assert_close(extractor(grey).features, extractor(grey.expand(-1, 3, -1, -1)).features)


@pytest.mark.parametrize("kind", KINDS)
def test_an_extractor_has_its_hash_and_name(
    files: dict[str, Path], extractors: dict[str, Extractor], kind: str
) -> None:
    extractor = extractors[kind]
    assert extractor.sha256 == hashlib.sha256(files[kind].read_bytes()).hexdigest()
    assert extractor.is_inception == (kind == "inception")
    assert f"{extractor.size[0]}x{extractor.size[1]}" in extractor.resize


def test_the_resize_is_pillows_and_happens_once(extractors: dict[str, Extractor]) -> None:
    """Antialiased bicubic on eight bits, as "clean-fid" recommends; an image of the right size stays unchanged."""
    extractor = extractors["lite"]
    for size in (32, 500):
        x = images(1, size)
        image = Image.fromarray(x[0].permute(1, 2, 0).numpy()).resize((224, 224), Image.Resampling.BICUBIC)
        wanted = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        apart = (extractor._resized(x)[0].int() - wanted.int()).abs()
        assert apart.max() <= 2
        assert apart.float().mean() < 0.05
    own = images(1, 224)
    assert torch.equal(extractor._resized(own), own)


def test_images_of_another_type_are_refused(extractors: dict[str, Extractor]) -> None:
    for wrong in (images().float(), images(channels=4), images()[0]):
        with pytest.raises(ValueError, match="uint8"):
            extractors["lite"](wrong)


def test_inception_is_torch_fidelitys(files: dict[str, Path], extractors: dict[str, Extractor], tmp_path: Path) -> None:
    """Features and logits equal those of the library's class for images of 299 pixels, which its resize leaves
    unchanged."""
    weights = load_file(files["inception"])
    var = "running_var"
    counts = {key.replace(var, "num_batches_tracked"): torch.tensor(0) for key in weights if key.endswith(var)}
    torch.save(weights | counts, tmp_path / "w.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.init, "kaiming_uniform_", lambda tensor, **_: tensor)  # drawn to be thrown away
        theirs: Any = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], str(tmp_path / "w.pth")
        )
    x = images(2, 299)
    features, logits = theirs(x)
    ours = extractors["inception"](x)
    assert ours.logits is not None
    assert torch.equal(ours.features, features)
    assert torch.equal(ours.logits, logits)


def test_torchvisions_features_are_before_the_last_layer(
    files: dict[str, Path], extractors: dict[str, Extractor]
) -> None:
    """For resnet18, logits = fc(features), with an input normalised as for ImageNet."""
    network = resnet18(weights=None)
    network.load_state_dict(load_file(files["resnet18"]), strict=False)
    network.eval()
    x = images(2, 224)
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        wanted = network((x / 255 - mean.view(3, 1, 1)) / deviation.view(3, 1, 1))
        extracted = extractors["resnet18"](x)
        assert extracted.logits is not None
        torch.testing.assert_close(extracted.logits, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(network.fc(extracted.features), wanted, rtol=1e-4, atol=1e-4)


def test_the_folded_network_is_the_one_of_the_file(files: dict[str, Path], extractors: dict[str, Extractor]) -> None:
    network = EfficientNetLite0()
    network.load_state_dict(load_file(files["lite"]), strict=False)
    x = images(2, 224)
    with torch.no_grad():
        features, logits = network.eval()((x.float() - 127) / 128)
    extracted = extractors["lite"](x)
    torch.testing.assert_close(extracted.features, features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(extracted.logits, logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kernel", "stride", "n"), [(3, 1, 7), (3, 2, 8), (3, 2, 7), (5, 2, 14), (5, 2, 9), (1, 1, 4)])
def test_same_padding_is_tensorflows(kernel: int, stride: int, n: int) -> None:
    """Position i of the output sees the input from i * stride - before on, where `before` is the smaller half of the
    padding for ceil(n / stride) positions (TensorFlow's documentation of tf.nn.convolution)."""
    torch.manual_seed(0)
    layer = SameConv(2, 3, kernel, stride)
    x = torch.randn(1, 2, n, n)
    out = layer(x)
    side = -(-n // stride)
    assert out.shape == (1, 3, side, side)
    before = max((side - 1) * stride + kernel - n, 0) // 2
    wide = F.pad(x, [kernel] * 4)  # zeros all around
    for i, j in ((0, 0), (side - 1, 0), (side // 2, side - 1)):
        top, left = i * stride - before + kernel, j * stride - before + kernel
        seen = wide[0, :, top : top + kernel, left : left + kernel]
        torch.testing.assert_close(out[0, :, i, j], (layer.weight * seen).sum(dim=(1, 2, 3)))


def test_real_weights_classify(real_data: Path) -> None:
    """matplotlib's portrait of Grace Hopper is a military uniform (652), and daisies are classified as daisies (985)
    more often than tulips are, although 128 pixels are few."""
    weights = real_data / "weights" / "efficientnet_lite0_fp16.safetensors"
    extractor = build_extractor(EfficientNetLite0Config(weights=str(weights)), "cpu")
    portrait = Image.open(Path(mpl.get_data_path()) / "sample_data" / "grace_hopper.jpg").convert("RGB")
    shares = {}
    assert _classes(extractor, [portrait]) == 652
    for flower in ("daisy", "tulip"):
        found = sorted((real_data / "flowers" / flower).iterdir())[:20]
        shares[flower] = _classes(extractor, [Image.open(path).convert("RGB") for path in found]) == 985
    assert shares["daisy"].float().mean() > shares["tulip"].float().mean() + 0.2


def _classes(extractor: Extractor, images: list[Image.Image]) -> Tensor:
    """Return the likeliest class of each image."""
    x = torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])
    logits = extractor(x).logits
    assert logits is not None
    return logits.argmax(dim=1)


def test_files_that_do_not_fit_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    """The error names the file and the key."""
    good = load_file(files["resnet18"])
    for change, message in (
        ({"fc.weight": None}, "no fc.weight"),
        ({"fc.weight": torch.zeros(10, 512)}, r"fc.weight is torch.float32 \(10, 512\), should be \(1000, 512\)"),
        ({"more": torch.zeros(1)}, "it has no more"),
        ({"fc.bias": torch.full((1000,), torch.nan)}, "fc.bias has numbers that are not finite"),
        ({"fc.bias": torch.zeros(1000, dtype=torch.int32)}, "fc.bias is torch.int32"),
    ):
        path = tmp_path / "changed.safetensors"
        save_file({key: value for key, value in {**good, **change}.items() if value is not None}, path)
        with pytest.raises(BadFileError, match=message) as refused:
            build_extractor(TorchvisionConfig(model="resnet18", weights=str(path)), "cpu", "features")
        assert f"features.weights {path}" in str(refused.value)


@pytest.mark.parametrize("model", ["mnasnet0_5", pytest.param("swin_t", marks=pytest.mark.slow)])
def test_models_with_versions_and_tables_are_read(tmp_path: Path, model: str) -> None:
    """mnasnet's layers have version numbers that a safetensors file lacks, and swin_t has integer tables."""
    torch.manual_seed(0)
    network = get_model(model, weights=None).eval()
    weights = network.state_dict()
    path = tmp_path / "weights.safetensors"
    save_file(weights, path)
    config = TorchvisionConfig(model=model, weights=str(path))
    extracted = build_extractor(config, "cpu")(images(1, 224))
    assert extracted.logits is not None
    assert extracted.logits.std() > 0
    for name, tensor in weights.items():
        if name.endswith("relative_position_index"):
            save_file({**weights, name: tensor + 10**6}, path)
            with pytest.raises(BadFileError, match="relative_position_index has other values"):
                build_extractor(config, "cpu")
            break


def test_half_precision_and_counts_of_batches_are_read(files: dict[str, Path], tmp_path: Path) -> None:
    good = load_file(files["resnet18"])
    path = tmp_path / "half.safetensors"
    save_file({key: value.half() for key, value in good.items()} | {"bn1.num_batches_tracked": torch.tensor(3)}, path)
    extractor = build_extractor(TorchvisionConfig(model="resnet18", weights=str(path)), "cpu")
    assert all(parameter.dtype == torch.float32 for parameter in extractor.parameters())


def test_missing_files_say_what_to_give() -> None:
    configs = (
        EfficientNetLite0Config(weights="nowhere"),
        InceptionConfig(weights="nowhere"),
        TorchvisionConfig(model="resnet18", weights="nowhere"),
    )
    for config in configs:
        with pytest.raises(ConfigError, match=r"weights nowhere .*: there is no such file; give .*safetensors"):
            build_extractor(config, "cpu")


def test_without_a_network_the_message_says_which_file_to_give(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    for config in (InceptionConfig(), TorchvisionConfig(model="resnet18")):
        with pytest.raises(ConfigError, match=r"cannot be downloaded .*no network.*; give .* extractor.weights"):
            build_extractor(config, "cpu")


def test_a_damaged_download_is_never_unpickled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hash of a file in torch's cache, or of a local .pth, is checked first."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("unpickled"))
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    path.write_bytes(b"other")
    with pytest.raises(BadFileError, match="SHA-256"):
        build_extractor(InceptionConfig(), "cpu")
    with pytest.raises(BadFileError, match="SHA-256"):
        build_extractor(InceptionConfig(weights=str(path)), "cpu")


def test_the_right_pth_is_read(monkeypatch: pytest.MonkeyPatch, files: dict[str, Path], tmp_path: Path) -> None:
    """A local .pth with the known hash is read (here the hash of a file of random weights)."""
    path = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    torch.save(load_file(files["inception"]), path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr("sampling.evaluation.extractors.inception.SHA256", found)
    extractor = build_extractor(InceptionConfig(weights=str(path)), "cpu")
    assert extractor.sha256 == found
    assert torch.equal(extractor.state_dict()["network.fc.bias"], load_file(files["inception"])["fc.bias"])


def test_an_unknown_model_is_told_the_nearest_names() -> None:
    with pytest.raises(ConfigError, match=r"extractor.model 'resnet5'.*resnet50"):
        build_extractor(TorchvisionConfig(model="resnet5"), "cpu")
    with pytest.raises(ConfigError, match="fcn_resnet50"):  # of segmentation
        build_extractor(TorchvisionConfig(model="fcn_resnet50"), "cpu")


def test_autocast_around_it_changes_nothing(extractors: dict[str, Extractor]) -> None:
    """Features are computed in float32, without autocast's bfloat16 and without TF32."""
    x, seen = images(), []
    extractor = extractors["resnet18"]
    layer = extractor.get_submodule("network.conv1")
    hook = layer.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = extractor(x).features
        assert torch.equal(inside, extractor(x).features)
    finally:
        hook.remove()
    assert seen == [False, False]
    assert torch.backends.cudnn.allow_tf32, "torch's default again"

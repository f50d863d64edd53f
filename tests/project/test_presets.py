"""The files in configs/: each names its source, has its values, builds, and takes a step on CPU."""

import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.models import alexnet
from torchvision.models.vgg import cfgs, make_layers

from stage1_tokenizer.bottlenecks import BottleneckConfig
from stage1_tokenizer.config.base import CommandConfig, Tree, merge, parse_command_line, read_yaml, write_yaml
from stage1_tokenizer.diagnostics.presets import PRESETS_FOLDER, find_presets, short_schedule
from stage1_tokenizer.engine.errors import ConfigError
from stage1_tokenizer.engine.run import Run
from tests.helpers.commands import ROOT, names_of, run

STAGE1 = sorted(PRESETS_FOLDER.glob("*.yaml"))
STAGE2 = sorted((ROOT / "configs" / "stage2").glob("*.yaml"))
LARGE = {"imagenet256_vqgan", "imagenet256_llamagen", "shapes64_vqgan"}  # more than five seconds

NOTEBOOK_NETWORK: dict[str, Any] = {
    "data.kind": "cifar10",
    "data.image_size": [32, 32],
    "network.kind": "sonnet",
    "network.factor": 4,
    "network.channels": 128,
    "network.residual_channels": 32,
    "network.blocks": 2,
    "network.local": False,
    "pixel.l1": 0.0,
    "perceptual.weight": 0.0,
    "adversarial.weight": 0.0,
    "optim.weight_decay": 0.0,
}
NOTEBOOK: dict[str, Any] = NOTEBOOK_NETWORK | {
    "optim.final_lr": 1.0,
    "optim.ema_decay": 0.0,
    "steps": 200_000,
    "batch_size": 256,
}
CODES = {"bottleneck.codebook_size": 512, "network.latent_channels": 64, "bottleneck.beta": 0.25}
LECTURE: dict[str, Any] = {
    "data.kind": "shapes",
    "data.image_size": [64, 64],
    "data.max_shapes": 5,
    "data.size": None,
    "data.palette": None,
    "data.holes": True,
    "data.train_images": 10_000,
    "network.latent_channels": 256,
    "network.middle_attention": False,
    "network.attention": [],
    "optim.lr": 1e-4,
}
MNIST: dict[str, Any] = {
    "data.kind": "mnist",
    "data.image_size": [28, 28],
    "network.kind": "mlp",
    "network.hidden": [300, 300],
    "network.factor": 7,
}
F16: dict[str, Any] = {
    "data.kind": "folder",
    "data.image_size": [256, 256],
    "data.random_crop": True,
    "data.flip": True,
    "network.kind": "vqgan",
    "network.channels": 128,
    "network.multipliers": [1, 1, 2, 2, 4],
    "network.blocks": 2,
    "network.attention": [4],  # level 4 of 256 pixels is the resolution 16
    "network.middle_attention": True,
    "bottleneck.kind": "vq",
    "bottleneck.update": "gradient",
    "bottleneck.beta": 0.25,
    "perceptual.weight": 1.0,
    "perceptual.net": "vgg",
    "adversarial.loss": "hinge",
    "adversarial.discriminator.layers": 3,
}
STATED: dict[str, dict[str, Any]] = {
    "cifar10_ae": NOTEBOOK | {"bottleneck.kind": "none", "network.latent_channels": 8},  # 8x8x8 = 512 numbers
    "cifar10_vae": NOTEBOOK | {"bottleneck.kind": "kl"},
    "cifar10_vqvae": NOTEBOOK | CODES | {"bottleneck.kind": "vq", "bottleneck.update": "gradient"},
    "cifar10_vqvae_ema": NOTEBOOK
    | CODES
    | {"bottleneck.kind": "vq", "bottleneck.update": "ema", "bottleneck.decay": 0.99},
    "cifar10_dictionary": NOTEBOOK_NETWORK
    | {"bottleneck.atoms": 512, "bottleneck.top": 100, "network.latent_channels": 256, "bottleneck.beta": 0.25},
    "cifar10_rvq": NOTEBOOK | CODES | {"bottleneck.kind": "rvq", "bottleneck.depth": 4, "bottleneck.shared": True},
    "cifar10_fsq": NOTEBOOK | {"bottleneck.kind": "fsq", "bottleneck.levels": [8, 8, 8]},
    "cifar10_lfq": NOTEBOOK | CODES | {"bottleneck.kind": "lfq"},
    "cifar10_simvq": NOTEBOOK | CODES | {"bottleneck.kind": "simvq"},
    "mnist_mlp_vq": MNIST | {"bottleneck.kind": "vq"},
    "mnist_mlp_vq_library": MNIST | {"bottleneck.kind": "vq_library"},
    "shapes64_ae": LECTURE | {"bottleneck.kind": "none"},
    "shapes64_vae": LECTURE | {"bottleneck.kind": "kl"},
    "shapes64_vqvae": LECTURE | {"bottleneck.kind": "vq", "bottleneck.codebook_size": 512},
    "shapes64_vqgan": LECTURE
    | {"bottleneck.kind": "vq", "bottleneck.codebook_size": 512, "perceptual.weight": 1.0, "adversarial.weight": 0.8},
    "imagenet256_vqgan": F16
    | {
        "bottleneck.codebook_size": 1024,
        "bottleneck.code_dim": None,
        "network.latent_channels": 256,
        "bottleneck.cosine": False,
        "adversarial.weight": 0.8,
        "adversarial.adaptive": True,
        "pixel.l1": 1.0,
        "pixel.l2": 0.0,
    },
    "imagenet256_llamagen": F16
    | {
        "bottleneck.codebook_size": 16_384,
        "bottleneck.code_dim": 8,
        "bottleneck.cosine": True,
        "adversarial.weight": 0.5,
        "adversarial.start": 20_000,
        "adversarial.adaptive": False,
        "pixel.l1": 0.0,
        "pixel.l2": 1.0,
        "optim.lr": 1e-4,
        "batch_size": 128,
    },
}


@pytest.fixture(scope="module")
def train_config() -> type[CommandConfig]:
    found: type[CommandConfig] = names_of("stage1_tokenizer/train.py")["TrainTokenizerConfig"]
    return found


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Make the convolutions of LPIPS with random weights, which are enough for a step."""
    folder = tmp_path_factory.mktemp("weights")
    nets: dict[str, nn.Module] = {"alex": alexnet(weights=None).features, "vgg": make_layers(cfgs["D"])}
    for name, net in nets.items():
        tensors = {f"features.{key}": tensor.half() for key, tensor in net.state_dict().items()}
        save_file(tensors, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in nets}


def resolved(train_config: type[CommandConfig], path: Path) -> Tree:
    return parse_command_line(train_config, ["--config", str(path)]).tree()


def value(tree: Tree, key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return tree


@pytest.mark.parametrize("path", STAGE1 + STAGE2, ids=lambda path: path.stem)
def test_names_its_source_and_its_command(path: Path) -> None:
    """The first line of a preset names the source of its values, and the command that trains it."""
    text = path.read_text(encoding="utf-8")
    if path in STAGE1:
        assert re.match(r"# Source: .+\n", text)
    assert f"/train.py --config {path.relative_to(ROOT).as_posix()}" in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_every_preset_is_in_the_table_of_stated_values() -> None:
    """A new preset needs a row. The presets named here have a size of our own."""
    ours = {"cifar10_vqgan", "cifar10_vqgan_gpu", "flowers_vqgan"}
    assert {path.stem for path in STAGE1 if not path.stem.startswith("pretrained_")} - ours == set(STATED)


@pytest.mark.parametrize("name", STATED)
def test_holds_what_its_source_states(name: str, train_config: type[CommandConfig]) -> None:
    """The values are compared in the complete config, so that a changed default cannot change a reproduction."""
    tree = resolved(train_config, PRESETS_FOLDER / f"{name}.yaml")
    assert {key: value(tree, key) for key in STATED[name]} == STATED[name]


def test_the_learning_rate_of_the_vqgan_is_its_base_rate_times_the_batch(train_config: type[CommandConfig]) -> None:
    """The code of Esser et al. multiplies 4.5e-6 by the batch size; our `lr` is the product."""
    tree = resolved(train_config, PRESETS_FOLDER / "imagenet256_vqgan.yaml")
    assert tree["optim"]["lr"] == pytest.approx(4.5e-6 * tree["batch_size"])


def test_the_two_mnist_presets_differ_in_the_quantizer_alone() -> None:
    """Their results can be compared only if nothing else differs."""
    ours, theirs = (read_yaml(PRESETS_FOLDER / f"{name}.yaml") for name in ("mnist_mlp_vq", "mnist_mlp_vq_library"))
    assert ours.pop("bottleneck") | {"kind": "vq_library"} == theirs.pop("bottleneck")
    assert ours == theirs


def test_every_kind_of_bottleneck_has_a_preset() -> None:
    """All but the grouped residual quantizer, which is `rvq` with one more key."""
    kinds = {kind.model_fields["kind"].default for kind in get_args(get_args(BottleneckConfig)[0])}
    assert kinds - {read_yaml(path)["bottleneck"]["kind"] for path in STAGE1} == {"grouped_rvq"}


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] if path.stem in LARGE else [], id=path.stem) for path in STAGE1],
)
def test_takes_a_step(
    path: Path,
    train_config: type[CommandConfig],
    backbones: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The script trains on a few images of the preset's size, with LPIPS and the discriminator if it has them."""
    tree = resolved(train_config, path)
    # The networks of the largest know no image size, and 256x256 would take minutes.
    height, width = (min(side, 128) for side in tree["data"]["image_size"])
    channels = 1 if tree["data"]["kind"] == "mnist" else 3
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(8):
        picture = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
        Image.fromarray(picture.squeeze()).save(tmp_path / "images" / f"{number}.png")
    few: Tree = {
        "out": str(tmp_path / "run"),
        "steps": 1,
        "batch_size": 2 if height <= 64 else 1,
        "pictures": 0,
        "data": {
            "kind": "folder",
            "root": str(tmp_path / "images"),
            "image_size": [height, width],
            "channels": channels,
            "validation_share": 0.4,
            "workers": 0,
        },
    }
    if tree["perceptual"]["weight"]:
        few["perceptual"] = {"weights": str(backbones[tree["perceptual"]["net"]])}
    if tree["adversarial"]["weight"]:
        few["adversarial"] = {"start": 0}
    write_yaml(tmp_path / "few.yaml", merge(read_yaml(path), few))
    names = names_of("stage1_tokenizer/train.py")
    # The states of the largest take a gigabyte, and are tested elsewhere.
    monkeypatch.setattr(Run, "_save_state", lambda *_: None)
    ended = run(names["main"], "--no-report", "--config", tmp_path / "few.yaml")
    assert ended.code == 0, ended.err
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert '"train/total"' in log
    assert ('"discriminator/total"' in log) == bool(tree["adversarial"]["weight"])
    (tmp_path / "run" / "tokenizer.safetensors").unlink()  # pytest keeps the folders of three sessions


@pytest.mark.parametrize("path", STAGE2, ids=lambda path: path.stem)
def test_a_prior_names_a_tokenizer_that_there_is(path: Path) -> None:
    """The tokenizer in its command is the run of a stage-one preset, or of the defaults."""
    config = parse_command_line(names_of("stage2_prior/train.py")["TrainPriorConfig"], ["--config", str(path)])
    defaults = parse_command_line(names_of("stage1_tokenizer/train.py")["TrainTokenizerConfig"], [])
    runs = {str(defaults.folder), *(f"runs/stage1/{preset.stem}" for preset in PRESETS_FOLDER.glob("*.yaml"))}
    assert config.tree()["tokenizer"] in runs


def test_presets_are_found_by_name_or_path(tmp_path: Path) -> None:
    """The order is that of the names; the message about a wrong name has the nearest name and all names."""
    own = tmp_path / "mine.yaml"
    own.touch()
    assert list(find_presets(["shapes64_ae", str(own), "cifar10_ae"])) == ["shapes64_ae", "mine", "cifar10_ae"]
    with pytest.raises(
        ConfigError, match=r"no cifar10_vqave; did you mean cifar10_vqvae\? .*cifar10_ae, .*shapes64_vae"
    ):
        find_presets(["cifar10_vqave"])
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        find_presets([str(tmp_path / "nowhere.yaml")])
    with pytest.raises(ConfigError, match="two have the name mine"):
        find_presets([str(own), str(own)])


def test_schedules_are_shortened_only_where_they_are_too_long() -> None:
    """In a short run, a term that starts after the last step would not be compared."""
    late: Tree = {
        "optim": {"warmup_steps": 200},
        "adversarial": {"weight": 0.5, "start": 5000},
        "bottleneck": {"kind": "kl", "warmup_steps": 1000},
    }
    assert short_schedule(late, 300) == {
        "optim.warmup_steps": 30,
        "adversarial.start": 150,
        "bottleneck.warmup_steps": 150,
    }
    assert short_schedule(late, 100_000) == {}
    assert short_schedule({"optim": {"warmup_steps": 0}, "bottleneck": {"kind": "vq"}}, 300) == {}
    assert short_schedule({}, 300) == {"optim.warmup_steps": 30}, "the default's warm-up is 50 steps"
    without = {"optim": {"warmup_steps": 0}, "adversarial": {"weight": 0.0, "start": 5000}}
    assert short_schedule(without, 300) == {}, "there is no discriminator that could start"

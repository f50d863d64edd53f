"""The plan: its counts equal those of the real model."""

import re
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from stage1_tokenizer.config.base import parse_command_line
from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.gpt.model import GptConfig
from stage2_prior.likelihood import token_loss
from stage2_prior.pixelcnn.model import PixelCnnConfig
from stage2_prior.plan import PlanConfig, count_disk, main
from stage2_prior.planning.costs import count_training
from stage2_prior.prior import PriorConfig, build_prior, count_parameters
from tests.helpers.artefacts import write_prior, write_tokenizer
from tests.helpers.commands import ROOT, run
from tests.helpers.prior_training import train

SHAPE = TokenShape(4, 6, 1, 32)
CONFIGS: list[PriorConfig] = [GptConfig(layers=2, width=32, heads=2), PixelCnnConfig(layers=3, width=24)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
@pytest.mark.parametrize("depth", [1, 3])
def test_parameters_and_state_are_those_of_the_model(config: PriorConfig, depth: int) -> None:
    """Four numbers per parameter: itself, Adam's two means, and the running mean of the weights."""
    shape = SHAPE._replace(K=depth)
    counted, made = count_training(config, shape, 7, micro_batch=2), build_prior(config, shape, 7)
    assert counted.parameters == count_parameters(made)
    assert counted.state_bytes == 4 * 4 * counted.parameters
    # The gradients are there at the end, and with them at least what waited for the backward pass of the first layer.
    assert counted.peak_bytes > max(4 * counted.parameters, counted.activation_bytes)
    assert counted.training_bytes == counted.state_bytes + counted.peak_bytes
    assert all(parameter.device.type == "cpu" for parameter in made.parameters())


def test_arithmetic_is_two_for_each_weight_and_token_and_the_attention() -> None:
    """Forward FLOPs of a GPT: 2 per weight of a matrix and token, 4 * width * L^2 per layer for attention."""
    config, length = GptConfig(layers=2, width=32, heads=2), SHAPE.length
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 128) + 32 * SHAPE.V
    counted = count_training(config, SHAPE, 7, micro_batch=3)
    assert counted.forward_flops == 2 * matrices * length + 2 * 4 * 32 * length**2
    assert counted.training_flops == pytest.approx(9 * counted.forward_flops, rel=0.02), (
        "a backward pass is two forwards"
    )


def test_the_products_of_a_trace_are_all_of_its_arithmetic() -> None:
    """torch's own counter, on the same step."""
    for config in CONFIGS:
        prior = build_prior(config, SHAPE, 7)
        codes = torch.zeros(2, *SHAPE[:3], dtype=torch.int64)
        with FlopCounterMode(display=False) as counter:
            token_loss(prior(codes, torch.zeros(2, dtype=torch.int64)), codes).backward()  # type: ignore[no-untyped-call]
        counted = count_training(config, SHAPE, 7, micro_batch=2)
        assert counted.training_flops == counter.get_total_flops()
    longer = count_training(CONFIGS[0], TokenShape(16, 16, 1, 32), 7, micro_batch=1)  # there attention is one operation
    assert sum(each.flops for each in longer.step if each.kind == "other") == 0


def test_checkpointing_keeps_little_and_computes_the_layers_again() -> None:
    """`checkpoint` needs a fraction of the memory and a third more arithmetic."""
    deep = GptConfig(layers=12, width=32, heads=2)
    kept, again = (count_training(deep.model_copy(update={"checkpoint": on}), SHAPE, 7, 8) for on in (False, True))
    assert again.activation_bytes < 0.2 * kept.activation_bytes
    assert again.peak_bytes < 0.5 * kept.peak_bytes
    # A third, but for the end of each layer, which nothing in its backward pass asks for.
    assert 1.2 < again.training_flops / kept.training_flops < 4 / 3


def test_activations_are_what_autograd_keeps() -> None:
    """The same count on real tensors, by their storage."""
    torch.manual_seed(0)
    model = build_prior(CONFIGS[0], SHAPE, 7)
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(torch.zeros(8, *SHAPE[:3], dtype=torch.int64), torch.zeros(8, dtype=torch.int64))
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    # The plan's step ends with the loss, whose log-probabilities are kept too.
    log_probabilities = 8 * SHAPE.length * SHAPE.V * 4
    assert count_training(CONFIGS[0], SHAPE, 7, 8).activation_bytes == pytest.approx(real + log_probabilities, rel=0.05)


@pytest.mark.parametrize(("size", "millions"), [("b", 111), ("l", 343), ("xl", 775), ("xxl", 1411)])
def test_the_llamagen_presets_have_llamagens_sizes(size: str, millions: int) -> None:
    """Sun et al. 2024, table 1: 111M, 343M, 775M and 1.4B parameters; nothing of that size is ever allocated."""
    preset = ROOT / f"configs/stage2/imagenet256_llamagen_{size}.yaml"
    config = parse_command_line(PlanConfig, ["--config", str(preset)])
    with FakeTensorMode():
        prior = build_prior(config.prior, TokenShape(16, 16, 1, 16384), 1000)
    assert count_parameters(prior) / 1e6 == pytest.approx(millions, rel=0.005)


@pytest.mark.slow
def test_the_command_counts_a_preset_of_that_size() -> None:
    """The whole way, and the plan's parameters are those of the prior."""
    preset = ROOT / "configs/stage2/imagenet256_llamagen_b.yaml"
    ended = run(main, "--config", preset, "--shape", "16,16,1,16384", "--classes", 1000, "--batch_size", 8)
    assert ended.code == 0, ended.err
    found = re.search(r"^parameters +([\d,]+)$", ended.out, flags=re.MULTILINE)
    assert found is not None
    assert int(found.group(1).replace(",", "")) / 1e6 == pytest.approx(111, rel=0.005)


def test_the_shape_comes_from_a_tokenizer_or_by_hand(tmp_path: Path) -> None:
    """Without a shape and a tokenizer, the message says how to give one."""
    write_prior(tmp_path)
    ended = run(main, "--tokenizer", tmp_path, "--prior.layers", 1)
    assert "2x3 positions, 1 of 16 each: 6 tokens" in ended.out
    assert run(main).code == 2
    ended = run(main, "--tokenizer", tmp_path / "none")
    assert ended.code == 2
    assert "--shape" in ended.err


def test_the_disk_is_that_of_a_run(tmp_path: Path) -> None:
    """Codes of all views, labels, weights, and the states that are kept, by the files of a real run."""
    tokenizer = write_tokenizer(tmp_path / "tokenizer").tokenizer
    out = tmp_path / "run"
    assert train(out, tmp_path / "tokenizer", views=3, keep=2, samples=0, steps=4).code == 0
    split = {name: len(labels_of(out, name)) for name in ("train", "validation")}
    config = PlanConfig(images=split["train"], validation_images=split["validation"], views=3, keep=2)
    parameters = numbers_in(out / "prior.safetensors") // 4
    wanted = count_disk(config, tokenizer.shape, parameters)
    assert sum(map(numbers_in, out.glob("tokens/*.safetensors"))) == wanted.tokens
    assert numbers_in(out / "prior.safetensors") == wanted.weights
    # AdamW keeps a step's number for each tensor too.
    assert sum(map(numbers_in, out.glob("state/*/*.safetensors"))) == pytest.approx(wanted.states, rel=0.01)


def numbers_in(path: Path) -> int:
    """Bytes of a safetensors file behind its header."""
    data = path.read_bytes()
    return len(data) - 8 - struct.unpack("<Q", data[:8])[0]


def labels_of(out: Path, split: str) -> torch.Tensor:
    """Read the labels of a split's tokens from a run's folder."""
    return torch.cat([load_file(path)["labels"] for path in sorted(out.glob(f"tokens/{split}-*.safetensors"))])

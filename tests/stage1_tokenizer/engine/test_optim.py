"""The learning-rate schedule, weight decay, and the running mean of the weights."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stage1_tokenizer.bottlenecks.vq import VectorQuantizer, VqConfig
from stage1_tokenizer.bottlenecks.vq_library import LibraryVectorQuantizer, VqLibraryConfig
from stage1_tokenizer.engine.optim import Ema, OptimConfig, build_optimizer, learning_rate, set_learning_rate
from stage1_tokenizer.networks.sonnet import SonnetNetworkConfig
from stage1_tokenizer.networks.vqgan import VqganNetworkConfig
from stage1_tokenizer.tokenizer import Tokenizer, TokenizerConfig


def tokenizer(network: Any = None, **bottleneck: Any) -> Tokenizer:
    torch.manual_seed(0)
    network = network or SonnetNetworkConfig(channels=8, residual_channels=4, latent_channels=6)
    vq = VqConfig(**{"codebook_size": 16, **bottleneck})
    return Tokenizer(TokenizerConfig(image_size=(16, 16), image_channels=3, network=network, bottleneck=vq))


def images(seed: int) -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_the_schedule() -> None:
    """Linear warm-up from above zero, the peak, half a cosine, and the configured share of the peak at the end."""
    config = OptimConfig(warmup_steps=10, final_lr=0.1)
    rates = [learning_rate(config, 2.0, step, 110) for step in range(111)]
    assert rates[:10] == [pytest.approx(0.2 * (step + 1)) for step in range(10)]
    assert rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(2.0 * (0.1 + 0.9 / 2))
    assert rates[35] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2))
    assert rates[110] == pytest.approx(0.2)
    assert all(later < earlier for earlier, later in pairwise(rates[10:]))


def test_the_schedules_edges() -> None:
    """No warm-up, a constant rate, a run shorter than its warm-up, and steps past the end give sensible rates."""
    assert learning_rate(OptimConfig(warmup_steps=0), 1.0, 0, 100) == 1.0
    constant = OptimConfig(warmup_steps=0, final_lr=1.0)
    assert [learning_rate(constant, 1.0, step, 10) for step in (0, 5, 9, 50)] == [1.0] * 4
    assert learning_rate(OptimConfig(warmup_steps=50), 1.0, 9, 10) == pytest.approx(0.2)
    assert learning_rate(OptimConfig(warmup_steps=50), 1.0, 60, 50) == pytest.approx(0.01)


def test_the_schedule_has_no_state() -> None:
    """Trap 42: the rate depends on the step only, so there is nothing to resume."""
    config = OptimConfig()
    order = [7, 3, 99, 3, 7]
    assert [learning_rate(config, 1.0, s, 100) for s in order] == [
        {s: learning_rate(config, 1.0, s, 100) for s in range(100)}[s] for s in order
    ]


def test_the_rate_reaches_every_group() -> None:
    """With weight decay there are two groups, and both follow the schedule."""
    optimizer = build_optimizer(tokenizer(), OptimConfig(weight_decay=0.1))
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]


def decayed(module: nn.Module) -> set[str]:
    optimizer = build_optimizer(module, OptimConfig(weight_decay=0.1))
    in_groups = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(in_groups) == sorted(id(p) for p in module.parameters() if p.requires_grad), "each exactly once"
    ids = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    return {name for name, parameter in module.named_parameters() if id(parameter) in ids}


def test_only_kernels_decay() -> None:
    """Biases, norms, embeddings and codebooks have no decay, which would pull the codebook vectors to zero."""
    vqgan = VqganNetworkConfig(channels=4, latent_channels=6)
    model = tokenizer(vqgan, update="gradient", code_dim=3)
    model.add_module("embedding", nn.Embedding(3, 2))
    assert decayed(model) == {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }
    assert isinstance(model.bottleneck, VectorQuantizer)
    assert {"bottleneck.codebook.weight", "embedding.weight"} <= dict(model.named_parameters()).keys()


def test_transposed_convolutions_are_convolutions() -> None:
    """The larger kernels of the sonnet decoder are those of transposed convolutions."""
    model = tokenizer()
    assert {name for name, p in model.named_parameters() if p.ndim == 4} == decayed(model)


def test_no_decay_is_one_group() -> None:
    """Torch refuses an empty group, and two equal groups would halve the speed of the fused step."""
    assert len(build_optimizer(tokenizer(), OptimConfig()).param_groups) == 1


def test_the_running_mean_is_the_closed_form() -> None:
    """mean = d * mean + (1 - d) * weight with d = min(decay, (1 + step) / (10 + step))."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema = Ema(model, decay=0.5)
    mean = 0.0
    for step in range(20):
        nn.init.constant_(model.weight, float(step + 1))
        ema.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * (step + 1)
        assert float(ema.module.weight) == pytest.approx(mean)
    assert not ema.module.weight.requires_grad
    assert not ema.module.training


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_decay_zero_is_the_model_itself(update: str) -> None:
    """Trap 23: buffers are copied too (an EMA codebook is a buffer), so the mean gives the same codes as the model."""
    model = tokenizer(update=update)
    ema = Ema(model, decay=0.0)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
    for step in range(3):
        x = images(step)
        x_hat, bottlenecked = model(x)
        ((x_hat - x).square().mean() + bottlenecked.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model, step)
    for name, tensor in model.state_dict().items():
        assert torch.equal(ema.module.state_dict()[name], tensor), name
    model.eval()
    assert torch.equal(ema.module.encode_codes(images(9)), model.encode_codes(images(9)))


def test_buffers_are_copied_and_not_averaged() -> None:
    """Trap 23: with any decay the codebook is equal to the model's."""
    model = tokenizer()
    ema = Ema(model, decay=0.9)
    for step in range(3):
        model(images(step))
        for parameter in model.parameters():
            nn.init.normal_(parameter)
        ema.update(model, step)
    for name, buffer in model.named_buffers():
        assert torch.equal(dict(ema.module.named_buffers())[name], buffer), name
    assert all(torch.any(mine != own) for mine, own in zip(ema.module.parameters(), model.parameters(), strict=True))


def test_the_mean_shares_nothing_with_the_model() -> None:
    """A copy with shared memory, or with a hook of the original, would be trained too."""
    model = tokenizer()
    ema = Ema(model, decay=0.9)
    theirs = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not theirs & {tensor.data_ptr() for tensor in ema.module.state_dict().values()}


def test_the_librarys_hooks_belong_to_the_copy() -> None:
    """The library calls back into the bottleneck that it was built for; in a copy this must be the copy."""
    mine = LibraryVectorQuantizer(VqLibraryConfig(codebook_size=4), latent_channels=4)
    copied = Ema(mine, decay=0.9).module
    codebook: Any = copied.library._codebook
    assert codebook.sample_fn.__self__ is codebook.replace_sample_fn.__self__ is copied

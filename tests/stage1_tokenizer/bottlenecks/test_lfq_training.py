"""Lookup-free quantization while training: the entropy terms spread the codes, and over all processes."""

from typing import Any

import torch
from accelerate import Accelerator
from einops import rearrange
from torch import nn

from stage1_tokenizer.bottlenecks.lfq import LfqConfig, LookupFreeQuantizer
from tests.helpers.processes import run_processes


def codes_in_use(entropy_weight: float, seed: int) -> int:
    """A linear encoder of a mixture of 16 groups, trained by the bottleneck's loss: the codes used at the end."""
    torch.manual_seed(seed)
    x = rearrange(torch.randn(16, 1, 4) + 0.1 * torch.randn(16, 8, 4), "k n C -> (k n) C 1 1")
    lfq = LookupFreeQuantizer(LfqConfig(codebook_size=64, entropy_weight=entropy_weight, inverse_temperature=0.5), 6)
    encoder = nn.Conv2d(4, 6, 1)
    with torch.no_grad():  # so that the latents of all groups begin in about one corner
        encoder.weight.mul_(0.5)
        nn.init.constant_(encoder.bias, 1.0)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.05)
    for _ in range(50):
        optimizer.zero_grad()
        lfq(encoder(x)).loss.backward()
        optimizer.step()
    return len(lfq(encoder(x)).codes.unique())


def test_the_entropy_terms_put_codes_to_use() -> None:
    """The entropy terms move the latents; without them they stay in the corners where they began."""
    for seed in (0, 1):
        assert codes_in_use(entropy_weight=0.0, seed=seed) <= 4
        assert codes_in_use(entropy_weight=1.0, seed=seed) >= 12


def step(accelerator: Accelerator) -> dict[str, Any]:
    """Loss, entropy and gradients of this rank's share of 8 images; gradients as DDP makes them, their mean."""
    rank, n = accelerator.process_index, accelerator.num_processes
    torch.manual_seed(0)
    lfq = LookupFreeQuantizer(LfqConfig(codebook_size=32, inverse_temperature=1.0), 3, processes=n)
    z = 0.5 * torch.randn(8, 3, 5, 3)
    z[4:] += 1.0  # the ranks' own means are unlike that of all
    out = lfq(z.chunk(n)[rank])
    out.loss.backward()
    gradients: dict[str, Any] = {
        name: accelerator.reduce(parameter.grad, "mean").numpy().tolist()
        for name, parameter in lfq.named_parameters()
        if parameter.grad is not None
    }
    loss = float(accelerator.reduce(out.loss.detach(), "mean"))
    if rank == 0:
        lfq.eval()(z)  # alone: where the ranks have unequal shares of a validation split, a sum would wait forever
    return {"loss": loss, "entropy": float(out.stats["codebook_entropy_bits"]), **gradients}


def test_two_ranks_are_one_with_the_joint_batch() -> None:
    """Trap 9: the spread of codes is that over all processes; the library's own drops the sum and halves the means."""
    first, second = run_processes(2, step)
    (joint,) = run_processes(1, step)
    assert first == second
    assert first.keys() == joint.keys() == {"loss", "entropy", "space.project_in.weight", "space.project_in.bias"}
    for name, value in joint.items():
        assert torch.allclose(torch.tensor(first[name]), torch.tensor(value), atol=1e-6), name

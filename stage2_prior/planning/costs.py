"""What a prior's training step and its decoding do, counted on the real code without computing anything.

Both run on fake tensors under a `Trace` (operations.py). What an operation takes on a device is `devices.py`'s matter.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stage1_tokenizer.tokenizer import TokenShape
from stage2_prior.base import Prior
from stage2_prior.generation import sample_softmax
from stage2_prior.likelihood import token_loss
from stage2_prior.planning.operations import Operation, Trace
from stage2_prior.prior import PriorConfig, build_prior, count_parameters

BYTES = 4
"""Of a number in float32."""
Precision = Literal["float32", "bf16"]
"""What training computes its products in."""


class TrainingCounts(NamedTuple):
    """What a prior costs in training and decoding, whatever it runs on."""

    parameters: int
    forward_flops: int
    """Multiplications and additions of a forward pass over one image."""
    training_flops: int
    """Of a micro-batch, forward and backward."""
    activation_bytes: int
    """What a micro-batch's forward pass keeps for the backward pass."""
    peak_bytes: int
    """Most that a step's gradients, activations and passing results take at once."""
    step: list[Operation]
    """A micro-batch's forward and backward pass."""
    update: Operation
    """Clipping, AdamW and the running mean of the weights, once in a training step."""

    @property
    def state_bytes(self) -> int:
        """Weights, Adam's two means and the running mean of the weights: what stays from step to step."""
        return 4 * BYTES * self.parameters

    @property
    def training_bytes(self) -> int:
        """Most that training takes at once."""
        return self.state_bytes + self.peak_bytes


class GenerationCounts(NamedTuple):
    """What drawing codes costs."""

    operations: list[Operation]
    """Of `positions` neighbouring positions in the middle of the grid, where the cache is half full: the average."""
    positions: int
    cache_bytes: int
    """What is kept per image beside the weights."""
    reread_bytes: int
    """What each position reads anew: the weights of all products, and half of a full cache of all images."""


def count_training(
    config: PriorConfig,
    shape: TokenShape,
    classes: int,
    micro_batch: int,
    precision: Precision = "float32",
) -> TrainingCounts:
    """Count a training step of a prior of this kind, shape and number of classes."""
    with FakeTensorMode():
        prior = build_prior(config, shape, classes)
        parameters = count_parameters(prior)
        with Trace() as forward, torch.no_grad():
            prior.eval()(*zero_batch(shape, 1))
        prior.train()
        batch = zero_batch(shape, micro_batch)
        kept = Kept(prior)
        with Trace() as step:
            with kept.counting(), autocast(precision):
                loss = token_loss(prior(*batch), batch[0])
            kept.release()
            loss.backward()  # type: ignore[no-untyped-call]
        tensors = len(list(prior.parameters()))
    return TrainingCounts(
        parameters,
        forward.flops,
        step.flops,
        kept.bytes,
        step.peak_bytes,
        step.operations,
        update(parameters, tensors),
    )


def update(parameters: int, tensors: int) -> Operation:
    """What follows the backward pass, by hand, for fake tensors take apart what is one call on real ones."""
    norm, clipping, adam, mean = 1, 2, 7, 3  # numbers read and written for each parameter
    calls = 3 * tensors  # all but AdamW's fused step call a kernel for each tensor
    return Operation("other", False, 0, (norm + clipping + adam + mean) * BYTES * parameters, parameters, 1, calls)


def autocast(precision: Precision) -> AbstractContextManager[object]:
    """What Accelerate wraps a forward pass in."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def count_generation(config: PriorConfig, shape: TokenShape, classes: int, batch: int) -> GenerationCounts:
    """Count how the codes of `batch` images are drawn, position by position, unfiltered and without guidance."""
    with FakeTensorMode(), torch.no_grad():
        prior = build_prior(config, shape, classes).eval()
        codes, labels = zero_batch(shape, batch)
        noise = torch.zeros(batch)
        decoding = prior.begin(labels)

        def position() -> None:
            for _ in range(shape.K):
                decoding.append(sample_softmax(decoding.logits(), noise))

        before = (shape.h // 2) * shape.w
        if before > 1:
            decoding.prefill(codes.flatten(1, 2)[:, : before - 1])
            position()
        positions = shape.w if config.generates_by_row else 1
        with Trace() as trace:
            for _ in range(positions):
                position()
        looked_up = sum(each.weight.numel() for each in prior.modules() if isinstance(each, nn.Embedding))
    cache = BYTES * config.cached_numbers((shape.h, shape.w))
    weights = BYTES * (count_parameters(prior) - looked_up)
    return GenerationCounts(trace.operations, positions, cache, weights + batch * cache // 2)


def zero_batch(shape: TokenShape, batch: int) -> tuple[Tensor, Tensor]:
    """Codes (B, h, w, K) and labels (B,), on the present device."""
    return torch.zeros(batch, *shape[:3], dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)


class Kept:
    """Adds up the tensors that autograd keeps, each storage once, and no parameter."""

    def __init__(self, prior: Prior) -> None:
        # What a forward pass keeps of the weights is there anyway.
        self._seen = {parameter.untyped_storage()._cdata for parameter in prior.parameters()}
        self._held: list[Tensor] = []  # alive, so that no later tensor gets the same address
        self.bytes = 0

    def counting(self) -> AbstractContextManager[None]:
        """TrainingCounts what a forward pass in this context keeps."""
        hooks: AbstractContextManager[None] = torch.autograd.graph.saved_tensors_hooks(self._count, lambda kept: kept)
        return hooks

    def release(self) -> None:
        """Let go, so that the backward pass frees what it is done with."""
        self._held.clear()

    def _count(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._held.append(tensor)
            self.bytes += storage.nbytes()
        return tensor

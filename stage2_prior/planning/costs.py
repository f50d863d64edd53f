"""The costs of a prior's training step and of its generation, counted on the real code without computing anything.

Both run with fake tensors in a `Trace` (operations.py). `devices.py` turns the operations into seconds.
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
"""Bytes of a float32 number."""
PlannedPrecision = Literal["float32", "bf16"]
"""Precision of the products of training."""


class TrainingCounts(NamedTuple):
    """The costs of training a prior, independent of the device."""

    parameters: int
    """Number of trained numbers."""
    forward_flops: int
    """Multiplications and additions of a forward pass over one image."""
    training_flops: int
    """Multiplications and additions of the forward and backward pass of a micro-batch."""
    activation_bytes: int
    """Bytes that the forward pass of a micro-batch keeps for the backward pass."""
    peak_bytes: int
    """Most bytes of gradients, activations and temporary results at one time in a step."""
    step: list[Operation]
    """The operations of the forward and backward pass of a micro-batch."""
    update: Operation
    """Clipping, AdamW and the running mean of the weights as one operation, once per training step."""

    @property
    def state_bytes(self) -> int:
        """Bytes that stay from step to step: weights, Adam's two means, and the running mean of the weights."""
        return 4 * BYTES * self.parameters

    @property
    def training_bytes(self) -> int:
        """Most bytes of training at one time."""
        return self.state_bytes + self.peak_bytes


class GenerationCounts(NamedTuple):
    """The costs of generating codes, independent of the device."""

    operations: list[Operation]
    """The operations of some neighbouring positions in the middle of the grid, where the cache is half full
    (average)."""
    positions: int
    """Number of these positions."""
    cache_bytes: int
    """Bytes of the cache of one image."""
    reread_bytes: int
    """Bytes that each position reads again: the weights of all products, and half of a full cache of all images."""


def count_training(
    config: PriorConfig,
    shape: TokenShape,
    classes: int,
    micro_batch: int,
    precision: PlannedPrecision = "float32",
) -> TrainingCounts:
    """Count a training step with `micro_batch` images per micro-batch."""
    with FakeTensorMode():
        prior = build_prior(config, shape, classes)
        parameters = count_parameters(prior)
        with Trace() as forward, torch.no_grad():
            prior.eval()(*zero_batch(shape, 1))
        prior.train()
        batch = zero_batch(shape, micro_batch)
        activations = SavedActivations(prior)
        with Trace() as step:
            with activations.counting(), autocast(precision):
                loss = token_loss(prior(*batch), batch[0])
            activations.release()
            loss.backward()  # type: ignore[no-untyped-call]
        tensors = len(list(prior.parameters()))
    return TrainingCounts(
        parameters,
        forward.flops,
        step.flops,
        activations.bytes,
        step.peak_bytes,
        step.operations,
        count_update(parameters, tensors),
    )


def count_update(parameters: int, tensors: int) -> Operation:
    """Count what follows the backward pass: clipping, AdamW and the running mean of the weights.

    It is counted by hand, since fake tensors split operations that are one call on real tensors.
    """
    norm, clipping, adam, mean = 1, 2, 7, 3  # numbers read and written per parameter
    calls = 3 * tensors  # all but AdamW's fused step run one kernel per tensor
    return Operation("other", False, 0, (norm + clipping + adam + mean) * BYTES * parameters, parameters, 1, calls)


def autocast(precision: PlannedPrecision) -> AbstractContextManager[object]:
    """Return the context in which Accelerate runs a forward pass."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def count_generation(config: PriorConfig, shape: TokenShape, classes: int, batch: int) -> GenerationCounts:
    """Count the generation of `batch` images at once, without filters and guidance."""
    with FakeTensorMode(), torch.no_grad():
        prior = build_prior(config, shape, classes).eval()
        codes, labels = zero_batch(shape, batch)
        noise = torch.zeros(batch)
        generation = prior.begin(labels)

        def generate_position() -> None:
            for _ in range(shape.K):
                generation.append(sample_softmax(generation.logits(), noise))

        before = (shape.h // 2) * shape.w
        if before > 1:
            generation.prefill(codes.flatten(1, 2)[:, : before - 1])
            generate_position()
        positions = shape.w if config.generates_by_row else 1
        with Trace() as trace:
            for _ in range(positions):
                generate_position()
        embeddings = sum(module.weight.numel() for module in prior.modules() if isinstance(module, nn.Embedding))
    cache = BYTES * config.cached_numbers((shape.h, shape.w))
    weights = BYTES * (count_parameters(prior) - embeddings)
    return GenerationCounts(trace.operations, positions, cache, weights + batch * cache // 2)


def zero_batch(shape: TokenShape, batch: int) -> tuple[Tensor, Tensor]:
    """Return codes (B, h, w, K) and labels (B,) of zeros, on the present default device."""
    return torch.zeros(batch, *shape[:3], dtype=torch.int64), torch.zeros(batch, dtype=torch.int64)


class SavedActivations:
    """The bytes that autograd keeps for the backward pass, without parameters; each storage counts once."""

    def __init__(self, prior: Prior) -> None:
        # Parameters need no extra memory when autograd keeps them.
        self._seen = {parameter.untyped_storage()._cdata for parameter in prior.parameters()}
        self._held: list[Tensor] = []  # kept alive, so that no later tensor gets the same address
        self.bytes = 0

    def counting(self) -> AbstractContextManager[None]:
        """Return a context that counts what a forward pass in it keeps."""
        hooks: AbstractContextManager[None] = torch.autograd.graph.saved_tensors_hooks(
            self._count, lambda tensor: tensor
        )
        return hooks

    def release(self) -> None:
        """Forget the tensors, so that the backward pass can free them."""
        self._held.clear()

    def _count(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd keeps, and return it."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._held.append(tensor)
            self.bytes += storage.nbytes()
        return tensor

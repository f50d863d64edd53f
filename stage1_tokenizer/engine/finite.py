"""The guard before each optimizer step: it skips a step whose loss or gradients are not finite, and names the cause.

    loss, gradients -> check -> optimizer step, codebook, EMA

Nothing has changed before the check: gradients are clipped after it, and a bottleneck learns in finish_step. If the
check fails, every process skips the step. After too many skipped steps in a row every process raises the same
DivergedError. The alarm and the error name the first tensor that is not finite, in the order of computation, and the
ranks on which it was found:

    input batch -> parameter or buffer -> output of a module -> term of the loss -> gradient of a parameter
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from safetensors.torch import save as serialise
from torch import Tensor, nn

from stage1_tokenizer.engine.checkpoint import to_cpu
from stage1_tokenizer.engine.errors import DivergedError, StorageError
from stage1_tokenizer.engine.files import write_file
from stage1_tokenizer.engine.state import list_states

SMALLEST_SCALE = 2.0**-14
"""Smallest normal number of float16. If a gradient overflows at a loss scale below this, the scale is not the cause,
and the gradient scaler would skip steps for ever."""
NOT_REPRODUCED = (
    "its loss or gradient (once; computed again, all is finite: an overflowing sum over ranks, or the device)"
)
NAME_BYTES = 240
"""Bytes of a tensor's name that processes exchange."""
BATCHES_KEPT = 8
"""Largest number of batches of skipped steps that a run saves; more could fill the disk."""


class Tally(nn.Module):
    """Counts of clipped and skipped steps since the last log entry, and of skipped steps in a row.

    It is a part of the state, so that a resumed run logs and stops exactly as an uninterrupted run. The counts are the
    same in all processes.
    """

    clipped: Tensor
    """() steps whose gradients were clipped, since the last call of `take_counts`."""

    skipped: Tensor
    """() skipped steps since the last call of `take_counts`."""

    in_a_row: Tensor
    """() skipped steps in a row of the tokenizer or prior."""
    critic_in_a_row: Tensor
    """() skipped steps in a row of the discriminator. States have this name, so it keeps the older word."""
    learned: Tensor
    """() optimizer steps since the start of the run that were not skipped."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("clipped", "skipped", "in_a_row", "critic_in_a_row", "learned"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def take_counts(self) -> dict[str, float]:
        """Return the numbers of clipped and of skipped steps for the log, and set them to 0."""
        counts = {"train/clipped": float(self.clipped), "train/skipped": float(self.skipped)}
        self.clipped.zero_()
        self.skipped.zero_()
        return counts


class CheckedStep(NamedTuple):
    """Result of the check of one step, the same in all processes."""

    norm: Tensor
    """() norm of the gradients before clipping."""
    is_finite: bool
    """True if loss and gradients are finite on all processes. False: skip the optimizer step."""
    must_stop: bool
    """True if any process was asked to stop."""


class NonFinite(NamedTuple):
    """The first tensor that is not finite on one rank. The smallest of several was computed first."""

    stage: int
    """INPUT, PARAMETER, OUTPUT, TERM or GRADIENT; UNKNOWN if the second computation found nothing."""

    position: int
    """Place of the tensor in the order of computation."""

    name: str
    """Name of the tensor, and what is wrong with its values, for messages."""


INPUT, PARAMETER, OUTPUT, TERM, GRADIENT, UNKNOWN = range(6)


class FiniteGuard:
    """A check of each step's loss and gradients before they are used. All processes must call it at the same steps."""

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        modules: Mapping[str, nn.Module],
        compute_loss: Callable[..., tuple[Tensor, dict[str, Tensor]]],
        tally: Tally,
        skips: int,
        alarm: Callable[[int, str, str], None],
        *,
        counter: Literal["in_a_row", "critic_in_a_row"] = "in_a_row",
    ) -> None:
        """Make the guard of one optimizer.

        folder: the folder of the run.
        modules: the module that learns, then the other modules of its loss.
        compute_loss: computes the loss (the total and its named parts) of one micro-batch, without
            DistributedDataParallel.
        skips: number of steps in a row that may be skipped.
        alarm: is called with (step, name, message) for each skipped step.
        counter: the count of the tally that this guard uses.
        """
        self._accelerator, self._folder, self._modules, self._compute_loss = accelerator, folder, modules, compute_loss
        self._tally, self._skips, self._alarm = tally, skips, alarm
        self._in_a_row: Tensor = getattr(tally, counter)
        self._name, self._module = next(iter(modules.items()))

    def check(
        self,
        done: int,
        loss: Tensor,
        inputs: Sequence[tuple[Any, ...]],
        seed: int,
        batch: Callable[[], dict[str, Tensor]],
        asked_to_stop: bool = False,
    ) -> CheckedStep:
        """Check in all processes that the loss and the norm of the gradients are finite.

        done: number of optimizer steps including this one, as in the log.
        loss: () the mean over the micro-batches.
        inputs: arguments of `compute_loss` for each micro-batch. With `seed`, the seed of this step, they find the
            cause.
        batch: returns the tensors to save if the step is skipped.
        asked_to_stop: True if this process was asked to stop; all processes hear of it in the result.

        Raises:
            DivergedError: in all processes, after more than `skips` skipped steps in a row.
        """
        self._accelerator.unscale_gradients()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._module.parameters() if p.grad is not None])
        # This waits for the device and for the other processes once per optimizer step. The discriminator needs a check
        # of its own, since under float16 the generator's step sets the scale of its gradients.
        bad = ~torch.stack([loss.detach().isfinite(), norm.isfinite()])
        flags = torch.cat([bad.int(), torch.full((1,), int(asked_to_stop), dtype=torch.int32, device=bad.device)])
        bad_losses, bad_norms, asked = self._accelerator.reduce(flags, "sum").tolist()
        if not bad_losses and not bad_norms:
            self._in_a_row.zero_()
            return CheckedStep(norm, is_finite=True, must_stop=bool(asked))
        if not bad_losses and self._is_scale_too_high():
            return self._skip(norm, bool(asked))
        first = self._find_first(inputs, seed)
        header = {"kind": "batch", "step": str(done), "seed": str(seed), "found": first.name}
        report = self._report(done, first, header, batch)
        self._in_a_row += 1
        in_a_row = int(self._in_a_row)
        if in_a_row > self._skips:
            raise DivergedError(self._describe_divergence(report, in_a_row))
        self._alarm(done, "not_finite", f"{report}. The step is skipped ({in_a_row} in a row, at most {self._skips})")
        return self._skip(norm, bool(asked))

    def _skip(self, norm: Tensor, asked: bool) -> CheckedStep:
        self._tally.skipped += 1
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.update()  # lowers the scale if the gradients overflowed
        return CheckedStep(norm, is_finite=False, must_stop=asked)

    def _is_scale_too_high(self) -> bool:
        """Return True if a high loss scale of float16 can explain the overflow, which is normal and needs no alarm."""
        scaler = self._accelerator.scaler
        return scaler is not None and scaler.get_scale() >= SMALLEST_SCALE

    def _find_first(self, inputs: Sequence[tuple[Any, ...]], seed: int) -> NonFinite:
        """Compute the step again and return the first tensor of this rank that is not finite.

        Every rank computes all of it, since a forward pass may wait for the other ranks.
        """
        found, positions = [NonFinite(UNKNOWN, 0, NOT_REPRODUCED)], count()

        def inspect(stage: int, name: str, value: Any) -> None:
            for tensor in _tensors_in(value):
                position, fault = next(positions), _describe_fault(tensor)
                if fault:
                    found.append(NonFinite(stage, position, name + fault))

        def inspect_output(name: str, module: nn.Module, _: Any, output: Any) -> None:
            inspect(OUTPUT, f"the output of {name} ({type(module).__name__})", output)

        inspect(INPUT, "the input batch", inputs)
        for prefix, module in self._modules.items():
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                inspect(PARAMETER, f"the parameter {prefix}.{name}", tensor)
        hooks = [
            part.register_forward_hook(partial(inspect_output, f"{prefix}.{name}".rstrip(".")))
            for prefix, module in self._modules.items()
            for name, part in module.named_modules()
        ]
        trained = [(name, parameter) for name, parameter in self._module.named_parameters() if parameter.requires_grad]
        hooks += [
            parameter.register_hook(  # type: ignore[no-untyped-call]
                partial(inspect, GRADIENT, f"the gradient of {self._name}.{name}")
            )
            for name, parameter in trained
        ]
        torch.manual_seed(seed)
        for micro_batch in inputs:
            total, parts = self._compute_loss(*micro_batch)
            for name, part in [(name, part) for name, part in parts.items() if name != "total"] + [("total", total)]:
                inspect(TERM, f"the loss's {name}", part)
            # These are the gradients of this rank; backward() would give those that DistributedDataParallel averages.
            torch.autograd.grad(total, [parameter for _, parameter in trained], allow_unused=True)
        for hook in hooks:
            hook.remove()
        return min(found)

    def _report(self, done: int, own: NonFinite, header: dict[str, str], batch: Callable[[], dict[str, Tensor]]) -> str:
        """Return the message, and save the batch of each rank where the first one was found.

        The message is the same in all processes, but a process that cannot save its batch adds the reason.
        """
        is_saved = len(list(self._folder.glob("nonfinite-*"))) < BATCHES_KEPT  # before any process writes one
        of_ranks = self._gather(own)
        first = min(of_ranks)
        # A bad value can reach another rank through a sum over ranks, but only at a later position.
        ranks = [rank for rank, found in enumerate(of_ranks) if found[:2] == first[:2]]
        files = {rank: self._folder / f"nonfinite-step-{done:08d}-rank-{rank}.safetensors" for rank in ranks}
        rank, failure = self._accelerator.process_index, ""
        if rank in files and is_saved:
            try:
                write_file(files[rank], serialise(to_cpu(batch()), header))
            except StorageError as error:
                failure = f" ({error})"
        self._accelerator.wait_for_everyone()  # a launcher may end a process that is still writing
        saved = (
            f"The batch is in {', '.join(map(str, files.values()))}"
            if is_saved
            else f"The batch is not saved, since the run has {BATCHES_KEPT} already"
        )
        return (
            f"step {done} of the {self._name}: {first.name} is not finite, on rank {', '.join(map(str, files))} of "
            f"{len(of_ranks)}. {saved}{failure}"
        )

    def _describe_divergence(self, report: str, in_a_row: int) -> str:
        newest = [state.name for state in reversed(list_states(self._folder / "state")[:3])]
        saved = f"what was saved before is intact ({', '.join(newest)})" if newest else "no state was saved yet"
        is_reduced = self._accelerator.mixed_precision != "no"
        precision = " or float32 (ACCELERATE_MIXED_PRECISION=no)" if is_reduced else ""
        times = f"It is step number {in_a_row} in a row. " if in_a_row > 1 else ""
        return (
            f"{report}. {times}The weights have not changed in this step, and {saved}. Lower optim.lr, or give a "
            f"smaller optim.clip{precision}, and start again in a new folder (--out). The same command would fail again"
        )

    def _gather(self, own: NonFinite) -> list[NonFinite]:
        """Return the results of all ranks, in the order of the ranks."""
        text = own.name.encode()[:NAME_BYTES].ljust(NAME_BYTES)
        row = torch.tensor([[own.stage, own.position, *text]], device=self._accelerator.device)
        rows = self._accelerator.gather(row).tolist()
        return [NonFinite(stage, position, bytes(text).decode().strip()) for stage, position, *text in rows]


def clip_gradients(module: nn.Module, largest: float, norm: Tensor, tally: Tally) -> None:
    """Scale the gradients to a norm of at most `largest`, and count the step if they were larger.

    largest: 0 leaves the gradients as they are. norm: () their present norm.
    """
    if largest:
        tally.clipped += norm > largest
        torch.nn.utils.clip_grads_with_norm_(module.parameters(), largest, norm)


def _describe_fault(tensor: Tensor) -> str:
    """Return how many values of a tensor are not finite; an empty text if all are finite."""
    bad = tensor.numel() - int(tensor.detach().isfinite().sum())
    kind = "NaN" if bool(tensor.detach().isnan().any()) else "infinite"
    return f" ({bad} of {tensor.numel()} values, {kind})" if bad else ""


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in the input or output of a module: a tensor, a tuple, or a dataclass such as Bottlenecked."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors_in(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors_in(getattr(value, field.name))

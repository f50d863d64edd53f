"""The guard before each optimizer step: what is not finite is never learned from, and its origin is named.

    loss, gradients -> check -> optimizer step, codebook, EMA

Until the check has passed, nothing has changed: gradients are not clipped yet, and a bottleneck learns in finish_step.
Where it fails, every process leaves the step out; after too many in a row, every process raises the same
DivergedError. Either names the first of these that is not finite, in the order in which they are computed, and the
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

from stage1_tokenizer.engine.checkpoint import write_file
from stage1_tokenizer.engine.errors import DivergedError, StorageError
from stage1_tokenizer.engine.state import states

SMALLEST_SCALE = 2.0**-14
"""float16's least normal number. A gradient that overflows although the loss was multiplied by less than this is no
matter of the scale, and the grad scaler would skip steps for ever."""
NOT_AGAIN = "its loss or gradient (once; computed again, all is finite: an overflowing sum over ranks, or the device)"
NAME_BYTES = 240
BATCHES_KEPT = 8
"""Batches that a run keeps of steps that it left out; the steps of a whole run would fill the disk."""


class Tally(nn.Module):
    """Counts of what was clipped and left out since the last log entry, and in a row. It is a part of the saved state,
    so that a resumed run logs, and gives up, as an uninterrupted one does. The same in all processes."""

    clipped: Tensor
    skipped: Tensor
    in_a_row: Tensor
    """() of the steps of the model that the run is about."""
    critic_in_a_row: Tensor
    """() of those of its discriminator."""
    learned: Tensor
    """() steps that were learned from."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("clipped", "skipped", "in_a_row", "critic_in_a_row", "learned"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def entry(self) -> dict[str, float]:
        """For the log: steps since the last call whose gradients were clipped, and that were left out."""
        counts = {"train/clipped": float(self.clipped), "train/skipped": float(self.skipped)}
        self.clipped.zero_()
        self.skipped.zero_()
        return counts


class Checked(NamedTuple):
    """What all processes agree on before they use a step's gradients."""

    norm: Tensor
    """() norm of the gradients before clipping."""
    finite: bool
    """Whether to learn from this step; else it is left out."""
    stop: bool
    """Whether a process was asked to stop."""


class Finding(NamedTuple):
    """The first tensor that is not finite on one rank; of several ranks' findings the least came first."""

    stage: int
    position: int
    name: str


INPUT, PARAMETER, OUTPUT, TERM, GRADIENT, UNKNOWN = range(6)


class FiniteGuard:
    """Looks at each step's losses and gradients before they are used. Every process must call it alike."""

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        modules: Mapping[str, nn.Module],
        again: Callable[..., tuple[Tensor, dict[str, Tensor]]],
        tally: Tally,
        skips: int,
        alarm: Callable[[int, str, str], None],
        *,
        counter: Literal["in_a_row", "critic_in_a_row"] = "in_a_row",
    ) -> None:
        """The first of `modules` is the one that learns, the others take part in its loss. `again` computes that loss
        (the total and its named parts) from one micro-batch, without DistributedDataParallel. `folder` is the run's.
        `skips`: steps in a row that may be left out; each is told to `alarm` as (step, name, message). `counter`: which
        of the tally's counts is this guard's."""
        self._accelerator, self._folder, self._modules, self._again = accelerator, folder, modules, again
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
    ) -> Checked:
        """Whether the step's loss () and the norm of its gradients are finite, in all processes.

        `done` counts this step too, as in the log. `asked_to_stop` travels with the answer. The rest is for naming what
        is not finite: `inputs` are `again`'s arguments for each micro-batch, `seed` that of the step's random numbers,
        `batch` gives the tensors to save.

        Raises:
            DivergedError: in all processes; more than `skips` steps in a row were not finite.
        """
        self._accelerator.unscale_gradients()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._module.parameters() if p.grad is not None])
        # One wait, for the device and the other processes, in each step of an optimizer: the price of never learning
        # from a NaN. (The discriminator's loss cannot be looked at together with the generator's, for under float16 the
        # generator's step sets the scale of its gradients.)
        bad = ~torch.stack([loss.detach().isfinite(), norm.isfinite()])
        flags = torch.cat([bad.int(), torch.full((1,), int(asked_to_stop), dtype=torch.int32, device=bad.device)])
        bad_losses, bad_norms, asked = self._accelerator.reduce(flags, "sum").tolist()
        if not bad_losses and not bad_norms:
            self._in_a_row.zero_()
            return Checked(norm, finite=True, stop=bool(asked))
        if not bad_losses and self._overflow_is_due():
            return self._left_out(norm, bool(asked))
        finding = self._locate(inputs, seed)
        header = {"kind": "batch", "step": str(done), "seed": str(seed), "found": finding.name}
        what = self._report(done, finding, header, batch)
        self._in_a_row += 1
        in_a_row = int(self._in_a_row)
        if in_a_row > self._skips:
            raise DivergedError(self._last_words(what, in_a_row))
        self._alarm(done, "not_finite", f"{what}. The step is left out ({in_a_row} in a row, at most {self._skips})")
        return self._left_out(norm, bool(asked))

    def _left_out(self, norm: Tensor, asked: bool) -> Checked:
        self._tally.skipped += 1
        if self._accelerator.scaler is not None:
            self._accelerator.scaler.update()  # it has seen the gradients; where they overflowed it lowers its scale
        return Checked(norm, finite=False, stop=asked)

    def _overflow_is_due(self) -> bool:
        """Under float16, gradients overflow now and then, until the scale is low enough: nothing to be told of."""
        scaler = self._accelerator.scaler
        return scaler is not None and scaler.get_scale() >= SMALLEST_SCALE

    def _locate(self, inputs: Sequence[tuple[Any, ...]], seed: int) -> Finding:
        """What this rank finds first. All ranks go all the way, since a forward pass may wait for the others."""
        found, looked_at = [Finding(UNKNOWN, 0, NOT_AGAIN)], count()

        def look(stage: int, name: str, value: Any) -> None:
            for tensor in _tensors_in(value):
                position, fault = next(looked_at), _fault(tensor)
                if fault:
                    found.append(Finding(stage, position, name + fault))

        def look_at_output(name: str, module: nn.Module, _: Any, output: Any) -> None:
            look(OUTPUT, f"the output of {name} ({type(module).__name__})", output)

        look(INPUT, "the input batch", inputs)
        for prefix, module in self._modules.items():
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                look(PARAMETER, f"the parameter {prefix}.{name}", tensor)
        hooks = [
            part.register_forward_hook(partial(look_at_output, f"{prefix}.{name}".rstrip(".")))
            for prefix, module in self._modules.items()
            for name, part in module.named_modules()
        ]
        trained = [(name, parameter) for name, parameter in self._module.named_parameters() if parameter.requires_grad]
        hooks += [
            parameter.register_hook(  # type: ignore[no-untyped-call]
                partial(look, GRADIENT, f"the gradient of {self._name}.{name}")
            )
            for name, parameter in trained
        ]
        torch.manual_seed(seed)
        for micro_batch in inputs:
            total, parts = self._again(*micro_batch)
            for name, part in [(name, part) for name, part in parts.items() if name != "total"] + [("total", total)]:
                look(TERM, f"the loss's {name}", part)
            # Not backward: this rank's gradients, not those that DistributedDataParallel has averaged.
            torch.autograd.grad(total, [parameter for _, parameter in trained], allow_unused=True)
        for hook in hooks:
            hook.remove()
        return min(found)

    def _report(self, done: int, own: Finding, header: dict[str, str], batch: Callable[[], dict[str, Tensor]]) -> str:
        """What happened, the same in all processes; those that are concerned save their batch first."""
        kept = len(list(self._folder.glob("nonfinite-*"))) < BATCHES_KEPT  # before any process writes one
        findings = self._gather(own)
        first = min(findings)
        # What one rank has spoilt may reach another through a sum over both, but only in a later place.
        found_on = [rank for rank, finding in enumerate(findings) if finding[:2] == first[:2]]
        files = {rank: self._folder / f"nonfinite-step-{done:08d}-rank-{rank}.safetensors" for rank in found_on}
        rank, trouble = self._accelerator.process_index, ""
        if rank in files and kept:
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in batch().items()}
            try:
                write_file(files[rank], serialise(tensors, header))
            except StorageError as error:
                trouble = f" ({error})"
        self._accelerator.wait_for_everyone()  # lest a launcher ends a process that is still writing
        where = f"The batch is in {', '.join(map(str, files.values()))}" if kept else f"{BATCHES_KEPT} are kept already"
        return (
            f"step {done} of the {self._name}: {first.name} is not finite, on rank {', '.join(map(str, files))} of "
            f"{len(findings)}. {where}{trouble}"
        )

    def _last_words(self, what: str, in_a_row: int) -> str:
        saved = [state.name for state in reversed(states(self._folder / "state")[:3])]
        intact = f"what was saved before is intact ({', '.join(saved)})" if saved else "no state was saved yet"
        reduced = self._accelerator.mixed_precision != "no"
        precision = " or float32 (ACCELERATE_MIXED_PRECISION=no)" if reduced else ""
        times = f"It is step number {in_a_row} in a row. " if in_a_row > 1 else ""
        return (
            f"{what}. {times}Nothing was learned from it, and {intact}. Lower optim.lr, or give a smaller "
            f"optim.clip{precision}, and start again in a new folder (--out): the same command would come here again"
        )

    def _gather(self, own: Finding) -> list[Finding]:
        """The findings of all ranks, in their order."""
        text = own.name.encode()[:NAME_BYTES].ljust(NAME_BYTES)
        row = torch.tensor([[own.stage, own.position, *text]], device=self._accelerator.device)
        rows = self._accelerator.gather(row).tolist()
        return [Finding(stage, position, bytes(text).decode().strip()) for stage, position, *text in rows]


def clip(module: nn.Module, largest: float, norm: Tensor, tally: Tally) -> None:
    """Scale the gradients, whose norm () is known, to a norm of at most `largest`, and count it; 0: leave them."""
    if largest:
        tally.clipped += norm > largest
        torch.nn.utils.clip_grads_with_norm_(module.parameters(), largest, norm)


def _fault(tensor: Tensor) -> str:
    """How much of a tensor is not finite; empty where all of it is."""
    bad = tensor.numel() - int(tensor.detach().isfinite().sum())
    kind = "NaN" if bool(tensor.detach().isnan().any()) else "infinite"
    return f" ({bad} of {tensor.numel()} values, {kind})" if bad else ""


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors of what a module takes or returns: a tensor, a tuple, or a dataclass such as Bottlenecked."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors_in(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors_in(getattr(value, field.name))

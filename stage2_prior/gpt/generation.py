"""Generation with a GPT: the arithmetic of `model.py`, with its weights, for one position after the other.

x-transformers' layers are written for whole sequences. Here the same sums are computed for the positions that are new,
with what is fixed taken out of the loop: keys and values lie in memory that is allocated once (`kv_cache.py`); query,
key and value are one product; the gains of RMSNorm are part of the weights behind it; rotations are looked up; the
weights lie as the processor reads them (`fast_linear.py`). A layer, for n new positions of B sequences and H heads of
width d:

    x (B*n, D) -> normalised -> query, key, value (B, n, 3 H, d) -> turned -> attention over the cache -> + x
               -> normalised -> up, gate (B*n, 2 inner)          -> up * silu(gate) -> down            -> + x

On a GPU the step for one position is captured once as a CUDA graph and replayed: its hundreds of small kernels take
longer to launch than to run.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_prior.base import Generation, Grid, PreparedPrior, Prior
from stage2_prior.fast_linear import Precision, Product, prepare
from stage2_prior.gpt.kv_cache import FixedKvCache, KvCache
from stage2_prior.gpt.layer import query_key_value_weight

TINY = 1e-12
"""A vector whose root mean square is smaller than this is not lengthened to one."""
Places = Callable[[Grid, torch.device], tuple[Tensor | None, Tensor | None]]
"""See Gpt.places."""


@dataclass(frozen=True)
class LayerWeights:
    """The products of one layer, and the gains of queries and keys (2 H, d), the scale of attention among them."""

    query_key_value: Product
    gains: Tensor
    out: Product
    up_gate: Product
    down: Product


def _prepare(branches: Any, precision: Precision) -> LayerWeights:
    """Arrange the weights of the two residual branches of one layer of x-transformers."""
    (norms, attention, _), (feed_norms, feed, _) = branches
    # The library's RMSNorm is F.normalize(x) * scale * (g + offset), with the root of D as scale: so is `normalised`.
    gain, feed_gain = (norm.g + norm.unit_offset for norm in (norms[0], feed_norms[0]))  # (D,)
    gains = torch.cat([attention.qk_norm_q_scale * attention.attend.scale, attention.qk_norm_k_scale])  # (2 H, 1, d)
    gains = gains * gains.shape[-1] ** -0.5  # queries and keys have length one
    expand, _, contract = feed.ff
    # A single head as wide as the model needs no projection behind it, and the library gives it none.
    single = isinstance(attention.to_out, nn.Identity)
    return LayerWeights(
        prepare(query_key_value_weight(attention) * gain, None, precision),
        gains[:, 0],
        attention.to_out if single else prepare(attention.to_out.weight, attention.to_out.bias, precision),
        prepare(expand.proj.weight * feed_gain, expand.proj.bias, precision),
        prepare(contract.weight, contract.bias, precision),
    )


class PreparedGpt(PreparedPrior):
    """The weights of a GPT, arranged for one precision."""

    def __init__(
        self,
        prior: Prior,
        precision: Precision,
        layers: Iterable[nn.Module],
        start: nn.Embedding,
        norm: nn.RMSNorm,
        places: Places,
    ) -> None:
        """Take the modules of a Gpt: its layers, the start vectors of its labels, its last norm, its places."""
        super().__init__(prior, precision)
        self.start, self.norm, self.places = start, norm, places
        self.dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        with torch.no_grad():
            self.layers = [_prepare(cast(Any, each).layers, precision) for each in layers]
        self.replays = start.weight.is_cuda
        """True: a step for one position is a fixed sequence of kernels, and on a GPU a replayed graph of them."""
        self._free: dict[tuple[int, Grid], list[Step]] = {}  # that no generation uses now, by batch and grid

    @torch.inference_mode()
    def _begin(self, labels: Tensor, grid: Grid) -> "GptGeneration":
        free = self._free.setdefault((len(labels), grid), [])
        step = free.pop() if free and self.replays else Step(self, len(labels), grid)
        generation = GptGeneration(self, labels, step)
        if self.replays:  # what was captured serves again
            weakref.finalize(generation, free.append, step)
        return generation


class GptGeneration(Generation):
    """A generation with a cache: what came in since the last context goes through the layers, all at once."""

    def __init__(self, prepared: PreparedGpt, labels: Tensor, step: "Step") -> None:
        super().__init__(prepared)
        self._step = step
        self._done = 0  # inputs that are in the cache
        self._waiting = [prepared.start(labels)[:, None]]  # (B, n, D) each

    @torch.inference_mode()
    def _next_context(self) -> Tensor:
        x = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting, dim=1)  # (B, n, D)
        context = self._step(x, self._done)
        self._done, self._waiting = self._done + x.shape[1], []
        return context

    def _take(self, embedded: Tensor) -> None:
        self._waiting.append(embedded)


class Step:
    """One step through the layers, from new inputs to the context that follows them, for a batch and a grid."""

    def __init__(self, gpt: PreparedGpt, batch: int, grid: Grid) -> None:
        self._gpt, device = gpt, gpt.start.weight.device
        learned, turns = gpt.places(grid, device)
        # (h*w, D) and (h*w, 1, d / 2) complex; None for what the GPT does not use.
        self._tables = learned, None if turns is None else torch.view_as_complex(turns)[:, None]
        D, H = gpt.start.embedding_dim, len(gpt.layers[0].gains) // 2
        like = torch.empty(D // H, dtype=gpt.dtype, device=device)
        kind = FixedKvCache if gpt.replays else KvCache
        self._cache = kind(len(gpt.layers), batch, H, grid[0] * grid[1], like)
        self._graph: torch.cuda.CUDAGraph | None = None
        if isinstance(self._cache, FixedKvCache):
            self._input = torch.zeros(batch, 1, D, device=device)
            self._output = self._capture() if device.type == "cuda" else self._input[:, 0]

    def __call__(self, x: Tensor, done: int) -> Tensor:
        """New inputs (B, n, D), after `done` others -> the context (B, D) of the last one's position."""
        n = x.shape[1]
        self._cache.places = slice(done, done + n)
        if n > 1 or not isinstance(self._cache, FixedKvCache):
            return self._compute(x, *(None if table is None else table[self._cache.places] for table in self._tables))
        self._input.copy_(x)
        self._cache.place.fill_(done)
        if self._graph is None:
            return self._compute_one()
        self._graph.replay()
        return self._output.clone()

    def _compute(self, x: Tensor, learned: Tensor | None, rotation: Tensor | None) -> Tensor:
        """New inputs x (B, n, D), what is added to them (n, D), what turns them (n, 1, d / 2) -> context (B, D)."""
        if learned is not None:
            x = x + learned
        x = x.to(self._gpt.dtype)
        B, n, D = x.shape
        x = x.reshape(B * n, D)
        for index, layer in enumerate(self._gpt.layers):
            heads, head_width = layer.gains.shape  # 2 H, d
            projected = layer.query_key_value(normalised(x)).view(B, n, -1, head_width)  # (B, n, 3 H, d)
            query_key = normalised(projected[:, :, :heads].float()).mul_(layer.gains)
            if rotation is not None:
                pairs = torch.view_as_complex(query_key.view(B, n, heads, -1, 2))  # neighbouring channels turn together
                pairs.mul_(rotation)
            query, key = query_key.to(x.dtype).chunk(2, dim=2)  # (B, n, H, d)
            seen = self._cache.attend(index, query, key, projected[:, :, heads:])
            x = x + layer.out(seen.reshape(B * n, D))
            up, gate = layer.up_gate(normalised(x)).chunk(2, dim=-1)
            x = layer.down(F.silu(gate).mul_(up)).add_(x)
        context: Tensor = self._gpt.norm(x.view(B, n, D)[:, -1].float())
        return context

    def _compute_one(self) -> Tensor:
        """Compute from fixed memory, at a place that is on the device."""
        assert isinstance(self._cache, FixedKvCache)
        place = self._cache.place
        return self._compute(
            self._input, *(None if table is None else table.index_select(0, place) for table in self._tables)
        )

    def _capture(self) -> Tensor:
        """Record the kernels of one step; returns the memory that its result will lie in."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # libraries allocate their work space in a first run, which must not be recorded
            for _ in range(2):
                self._compute_one()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self._compute_one()
        self._graph = graph
        return output


def normalised(x: Tensor) -> Tensor:
    """Vectors (..., D) scaled to a mean square of one, in the fewest calls, which is what counts for a few vectors."""
    D = x.shape[-1]
    if x.is_cuda:  # one kernel there; on a CPU it is a chain of operators that takes twice as long as this one
        return F.rms_norm(x, (D,), eps=TINY**2)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).mul_(D**-0.5).clamp_min_(TINY)

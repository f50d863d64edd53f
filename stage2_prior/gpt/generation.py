"""Generation with a GPT: one step per position, with a cache of keys and values.

The arithmetic is that of `model.py` and `layer.py`, for the new positions only. Everything fixed is computed once,
before the loop: keys and values lie in memory that is allocated once (`kv_cache.py`); query, key and value are one
product; the gains of the RMSNorms are multiplied into the weights of the next product; positions are looked up in
tables; weights are stored in the order that the processor reads (`fast_linear.py`). A layer, for n new positions of B
sequences, D channels and H heads of width d:

    x (B*n, D) -> RMS 1 -> query, key, value (B, n, 3 H, d) -> gains, rotate -> attention to the cache -> + x
               -> RMS 1 -> up, gate (B*n, 2 * inner)        -> up * silu(gate) -> down                 -> + x

On a GPU the step for one position is captured once as a CUDA graph and replayed, since launching its hundreds of small
kernels takes longer than running them.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_prior.base import Generation, Grid, PreparedPrior, Prior
from stage2_prior.fast_linear import Precision, Product, prepare
from stage2_prior.gpt.kv_cache import FixedKvCache, KvCache
from stage2_prior.gpt.layer import DecoderLayer, LayerWeights

PositionTables = Callable[[Grid, torch.device], tuple[Tensor | None, Tensor | None]]
"""The type of Gpt.position_tables."""
TINY = 1e-12
"""Smallest root mean square by which a vector is divided; smaller ones are divided by this."""


@dataclass(frozen=True)
class PreparedLayer:
    """The weights of one layer (LayerWeights), arranged for generation in one precision."""

    norm_eps: float
    has_qk_norm: bool
    gains: Tensor
    query_key_value: Product
    out: Product
    up_gate: Product
    down: Product

    @classmethod
    def of(cls, layer: DecoderLayer, precision: Precision) -> "PreparedLayer":
        """Arrange the weights of a layer."""
        weights = LayerWeights.of(layer)
        return cls(
            weights.norm_eps,
            weights.has_qk_norm,
            weights.gains,
            prepare(weights.query_key_value, None, precision),
            prepare(*weights.out, precision) if weights.out else lambda x: x,
            prepare(*weights.up_gate, precision),
            prepare(*weights.down, precision),
        )


def normalise_rms(x: Tensor, eps: float = 0.0) -> Tensor:
    """Scale vectors (..., D) to a mean square of 1, without a gradient, in as few calls as the device allows.

    eps: number added to the mean square; 0: none.
    """
    D = x.shape[-1]
    if x.is_cuda:  # one kernel on a GPU; on a CPU a chain of operators that takes twice as long as the line below
        return F.rms_norm(x, (D,), eps=eps or TINY**2)
    rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True).mul_(D**-0.5)
    return x / (rms.square_().add_(eps).sqrt_() if eps else rms.clamp_min_(TINY))


class PreparedGpt(PreparedPrior):
    """A GPT with its weights arranged for generation in one precision."""

    def __init__(
        self,
        prior: Prior,
        precision: Precision,
        layers: Iterable[nn.Module],
        start: nn.Embedding,
        norm: nn.RMSNorm,
        position_tables: PositionTables,
    ) -> None:
        """Take parts of a Gpt: its layers, the start vectors of its labels, its last norm, its position tables."""
        super().__init__(prior, precision)
        self.start, self.norm, self.position_tables = start, norm, position_tables
        # A CPU multiplies batches of bfloat16 matrices in half the speed of float32 (it copies the cache each time), so
        # there only the products with weights are in bfloat16: with one image a step takes 0.7 times as long.
        is_half = precision == "bfloat16" and start.weight.is_cuda
        self.dtype = torch.bfloat16 if is_half else torch.float32
        with torch.no_grad():
            self.layers = [PreparedLayer.of(cast(DecoderLayer, layer), precision) for layer in layers]
        self.replays = start.weight.is_cuda
        """True if the step for one position is a fixed sequence of kernels, which a GPU replays as a CUDA graph."""
        self._idle_steps: dict[tuple[int, Grid], list[Step]] = {}  # not in use, by batch size and grid

    @torch.inference_mode()
    def _begin(self, labels: Tensor, grid: Grid) -> "GptGeneration":
        idle = self._idle_steps.setdefault((len(labels), grid), [])
        step = idle.pop() if idle and self.replays else Step(self, len(labels), grid)
        generation = GptGeneration(self, labels, step)
        if self.replays:  # the next generation reuses the captured graph
            weakref.finalize(generation, idle.append, step)
        return generation


class GptGeneration(Generation):
    """The state of a generation with a GPT. All inputs since the last context go through the layers at once."""

    def __init__(self, prepared: PreparedGpt, labels: Tensor, step: "Step") -> None:
        super().__init__(prepared)
        self._step = step
        self._done = 0  # inputs whose keys and values are in the cache
        self._waiting = [prepared.start(labels)[:, None]]  # (B, n, D) each; inputs that are not in the cache yet

    @torch.inference_mode()
    def _next_context(self) -> Tensor:
        x = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting, dim=1)  # (B, n, D)
        context = self._step(x, self._done)
        self._done, self._waiting = self._done + x.shape[1], []
        return context

    def _add_positions(self, embedded: Tensor) -> None:
        self._waiting.append(embedded)


class Step:
    """One step through the layers, from new inputs to the next context, for one batch size and grid."""

    def __init__(self, gpt: PreparedGpt, batch: int, grid: Grid) -> None:
        self._gpt, device = gpt, gpt.start.weight.device
        learned, rotation = gpt.position_tables(grid, device)
        # (h*w, D) and complex (h*w, 1, d / 2); None for a kind of position that the GPT does not use.
        self._tables = learned, None if rotation is None else torch.view_as_complex(rotation)[:, None]
        D, H = gpt.start.embedding_dim, len(gpt.layers[0].gains) // 2
        like = torch.empty(D // H, dtype=gpt.dtype, device=device)
        kind = FixedKvCache if gpt.replays else KvCache
        self._cache = kind(len(gpt.layers), batch, H, grid[0] * grid[1], like)
        self._graph: torch.cuda.CUDAGraph | None = None
        if isinstance(self._cache, FixedKvCache):
            self._input = torch.zeros(batch, 1, D, device=device)
            self._output = self._capture() if device.type == "cuda" else self._input[:, 0]

    def __call__(self, x: Tensor, done: int) -> Tensor:
        """Run n new inputs (B, n, D), which follow `done` others -> the context (B, D) after the last one."""
        n = x.shape[1]
        new = slice(done, done + n)
        self._cache.new_positions = new
        if n > 1 or not isinstance(self._cache, FixedKvCache):
            return self._compute(x, *(None if table is None else table[new] for table in self._tables))
        self._input.copy_(x)
        self._cache.device_position.fill_(done)
        if self._graph is None:
            return self._compute_one_position()
        self._graph.replay()
        return self._output.clone()

    def _compute(self, x: Tensor, learned: Tensor | None, rotation: Tensor | None) -> Tensor:
        """Compute new inputs x (B, n, D) with position tables (n, D) and complex (n, 1, d / 2) -> context (B, D)."""
        if learned is not None:
            x = x + learned
        x = x.to(self._gpt.dtype)
        B, n, D = x.shape
        x = x.reshape(B * n, D)
        for index, layer in enumerate(self._gpt.layers):
            heads, head_width = layer.gains.shape  # 2 H, d
            projected = layer.query_key_value(normalise_rms(x, layer.norm_eps)).view(B, n, -1, head_width)
            query_key = projected[:, :, :heads].float()  # (B, n, 2 H, d) of (B, n, 3 H, d)
            query_key = normalise_rms(query_key).mul_(layer.gains) if layer.has_qk_norm else query_key * layer.gains
            if rotation is not None:
                pairs = torch.view_as_complex(query_key.view(B, n, heads, -1, 2))  # (B, n, 2 H, d / 2)
                pairs.mul_(rotation)
            query, key = query_key.to(x.dtype).chunk(2, dim=2)  # (B, n, H, d)
            attended = self._cache.attend(index, query, key, projected[:, :, heads:])  # (B, n, H, d)
            x = x + layer.out(attended.reshape(B * n, D))
            up, gate = layer.up_gate(normalise_rms(x, layer.norm_eps)).chunk(2, dim=-1)
            x = layer.down(F.silu(gate).mul_(up)).add_(x)
        context: Tensor = self._gpt.norm(x.view(B, n, D)[:, -1].float())
        return context

    def _compute_one_position(self) -> Tensor:
        """Compute the input in fixed memory, at the position whose index is on the device -> context (B, D)."""
        assert isinstance(self._cache, FixedKvCache)
        position = self._cache.device_position
        return self._compute(
            self._input, *(None if table is None else table.index_select(0, position) for table in self._tables)
        )

    def _capture(self) -> Tensor:
        """Capture the kernels of one step as a CUDA graph; return the memory of its result."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # the first run allocates libraries' work space, which must not be captured
            for _ in range(2):
                self._compute_one_position()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self._compute_one_position()
        self._graph = graph
        return output

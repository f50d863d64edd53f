"""The batch of all processes as one: sums, the vectors of everybody, and draws on which all agree."""

import torch
import torch.distributed
from torch import Tensor

from stage1_tokenizer.engine.precision import device_of_float64, float64


class Group:
    """`processes` that train together, each with an equal share of the batch."""

    def __init__(self, processes: int) -> None:
        self.processes = processes

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.processes > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """(N, ...) of each process -> (processes * N, ...), in the order of the batch."""
        if self.processes == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.processes)]
        torch.distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def agree(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, in place. (Sums on a GPU have no fixed order: computed alike is not quite alike.)"""
        if self.processes > 1:
            torch.distributed.broadcast(tensor, src=0)
        return tensor

    def draw(self, vectors: Tensor, weights: Tensor, n: int, seed: int) -> Tensor:
        """Up to n of the vectors (N, d) of all processes, without replacement, in proportion to weights (N,) >= 0."""
        mine = len(weights)
        chosen = draw(self.gather(weights), n, seed)  # places in the whole batch
        if self.processes == 1:
            return vectors[chosen]
        first = torch.distributed.get_rank() * mine
        own = (chosen >= first) & (chosen < first + mine)
        picked = vectors.new_zeros(len(chosen), vectors.shape[1])
        picked[own] = vectors[chosen[own] - first]
        return self.sum(picked)


def draw(weights: Tensor, n: int, seed: int) -> Tensor:
    """Up to n different places (n,) drawn in proportion to weights (N,) >= 0; those of weight 0 never.

    The first n arrivals of N Poisson processes (Efraimidis and Spirakis 2006), in float64 and from numbers that depend
    on the seed and the place alone, so that processes and devices agree.
    """
    generator = torch.Generator().manual_seed(seed)
    arrivals = torch.empty(len(weights), dtype=torch.float64).exponential_(generator=generator)
    arrivals = arrivals.to(device_of_float64(weights.device)) / float64(weights)  # weight 0: at infinity
    n = min(n, int((weights > 0).sum()))
    return arrivals.topk(n, largest=False).indices.to(weights.device)

"""The batch of all processes as one batch: sums, gathering, and random draws that are the same in every process."""

import torch
import torch.distributed
from torch import Tensor

from stage1_tokenizer.engine.precision import device_of_float64, to_float64


class ProcessGroup:
    """The processes that train one codebook together, each with an equal share of the batch."""

    def __init__(self, processes: int) -> None:
        self.processes = processes

    def sum(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes, in place, and return it."""
        if self.processes > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Concatenate the (N, ...) of each process to (processes * N, ...), in the order of the batch."""
        if self.processes == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.processes)]
        torch.distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def copy_from_main(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by that of rank 0, in place, and return it.

        Needed even for results of equal inputs: sums on a GPU have no fixed order, so they can differ in the last bits.
        """
        if self.processes > 1:
            torch.distributed.broadcast(tensor, src=0)
        return tensor

    def draw_vectors(self, vectors: Tensor, weights: Tensor, n: int, seed: int) -> Tensor:
        """Draw up to n vectors from those of all processes: vectors (N, d), weights (N,) >= 0 -> (n, d).

        Without replacement, in proportion to the weights, and the same in every process.
        """
        share = len(weights)
        chosen = draw_indices(self.gather(weights), n, seed)  # (n,) in the whole batch
        if self.processes == 1:
            return vectors[chosen]
        first = torch.distributed.get_rank() * share
        own = (chosen >= first) & (chosen < first + share)
        drawn = vectors.new_zeros(len(chosen), vectors.shape[1])
        drawn[own] = vectors[chosen[own] - first]
        return self.sum(drawn)


def draw_indices(weights: Tensor, n: int, seed: int) -> Tensor:
    """Draw up to n different indices (n,) in proportion to weights (N,) >= 0; a weight of 0 is never drawn.

    Exponential arrival times divided by the weights, of which the n smallest are taken (Efraimidis and Spirakis,
    "Weighted random sampling with a reservoir", 2006). They are float64 and depend only on seed and index, so all
    processes and devices draw the same.
    """
    generator = torch.Generator().manual_seed(seed)
    arrivals = torch.empty(len(weights), dtype=torch.float64).exponential_(generator=generator)
    arrivals = arrivals.to(device_of_float64(weights.device)) / to_float64(
        weights
    )  # (N,), infinite where a weight is 0
    n = min(n, int((weights > 0).sum()))
    return arrivals.topk(n, largest=False).indices.to(weights.device)

"""How large the largest tensor gets: what "never a matrix of vectors by codes" (Trap 14) means, without a clock.

with LargestTensor() as largest:
    quantizer(z).loss.backward()
assert largest.numel <= ...
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Watches every operation, forward and backward; `numel` is of the largest tensor that one of them returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if torch.is_tensor(leaf))])
        return out

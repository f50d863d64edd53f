"""Size of the largest tensor of a computation, to show that no matrix of vectors by codes is made (Trap 14).

with LargestTensor() as largest:
    quantizer(z).loss.backward()
assert largest.numel <= ...
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LargestTensor(TorchDispatchMode):
    """Watch every operation, forward and backward; `numel` is the size of the largest tensor that one returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(out) if torch.is_tensor(leaf))])
        return out

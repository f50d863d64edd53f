"""A trace of torch operations: the arithmetic, memory traffic and memory of each one.

A `Trace` records every operation that runs in its context. With fake tensors, which have a shape but no contents,
nothing is computed, so a model of any size can be traced on any machine.
"""

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

OperationKind = Literal[
    "product", "batched", "convolution", "convolution_backward", "function", "tanh", "draw", "moving", "other"
]
"""Kinds of operations. The speed of an operation depends on its kind and its size."""
KIND_OF_OPERATION: dict[str, OperationKind] = {
    **dict.fromkeys(("mm", "addmm", "linear"), "product"),
    **dict.fromkeys(("bmm", "baddbmm"), "batched"),
    "_scaled_dot_product_flash_attention_for_cpu": "batched",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "batched",
    "convolution": "convolution",
    "convolution_backward": "convolution_backward",
    **dict.fromkeys(("exp", "sigmoid", "sigmoid_", "silu", "silu_backward", "gelu", "gelu_backward"), "function"),
    **dict.fromkeys(("_softmax", "_log_softmax"), "function"),
    "tanh": "tanh",
    **dict.fromkeys(("bernoulli_", "native_dropout"), "draw"),
    **dict.fromkeys(("clone", "cat", "stack", "masked_fill", "constant_pad_nd", "slice_backward", "copy_"), "moving"),
    **dict.fromkeys(("sum", "embedding", "embedding_dense_backward", "select_backward"), "moving"),
}
"""The kind of each operation by its name in torch.ops.aten; all others are "other"."""


class Operation(NamedTuple):
    """One torch operation."""

    kind: OperationKind
    bf16: bool
    """True if an input is bfloat16."""
    flops: int
    """Multiplications and additions of matrix products and convolutions; for causal attention half of them."""
    bytes: int
    """Bytes read and written."""
    elements: int
    """Elements of the result."""
    matrices: int
    """Number of matrix products in a batched product, else 1."""
    calls: int
    """Kernels that run: 0 for a view, 1 for most operations."""


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context that records all operations that run in it, and the most bytes that live tensors take."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.peak_bytes = 0
        self._alive_bytes = 0
        self._alive: set[int] = set()

    @property
    def flops(self) -> int:
        """Multiplications and additions of all operations."""
        return sum(operation.flops for operation in self.operations)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run one operation and record it; torch calls this for each operation in the context."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # asks for a device and computes nothing
            return func(*args, **kwargs)
        with self:  # without autograd, composite operations arrive undivided: record their parts
            parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not written:
            return result
        known = {tensor.untyped_storage()._cdata for tensor in read}
        new = [tensor for tensor in written if tensor.untyped_storage()._cdata not in known]
        for tensor in new:
            self._watch(tensor.untyped_storage())
        is_in_place = func._schema.is_mutable
        packet = func._overloadpacket
        flops = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0
        if _is_causal(func, args, kwargs):  # its kernels skip later positions
            flops //= 2
        kind = KIND_OF_OPERATION.get(packet.__name__, "other")
        moved = 0
        if new or is_in_place:  # otherwise the result is a view
            # An in-place operation writes about as much as it reads.
            moved = sum(map(tensor_bytes, read)) * (2 if is_in_place else 1) + sum(map(tensor_bytes, new))
        self.operations.append(
            Operation(
                kind,
                any(tensor.dtype == torch.bfloat16 for tensor in read),
                flops,
                moved,
                max(tensor.numel() for tensor in written),
                written[0].shape[:-2].numel() if kind == "batched" else 1,
                int(bool(new) or is_in_place),
            )
        )
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        """Count a storage as live until it is freed."""
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self._alive_bytes += size
        self.peak_bytes = max(self.peak_bytes, self._alive_bytes)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self._alive_bytes -= size


def _is_causal(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Return True if the operation is causal attention."""
    names = [argument.name for argument in func._schema.arguments]
    if "is_causal" not in names:
        return False
    place = names.index("is_causal")
    return bool(args[place] if place < len(args) else kwargs.get("is_causal", False))


def tensor_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor in memory; an expanded tensor has only those of its storage."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())

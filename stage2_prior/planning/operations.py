"""What code does on its way to torch's kernels: each operation's arithmetic, traffic and memory.

A `Trace` sees every operation that runs in its context. On fake tensors, which have a shape and no contents, nothing is
computed and any size fits any machine.
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

Kind = Literal[
    "product", "batched", "convolution", "convolution_backward", "function", "tanh", "draw", "moving", "other"
]
"""What an operation's speed depends on, beside its size."""
KINDS: dict[str, Kind] = {
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


class Operation(NamedTuple):
    """One call into torch."""

    kind: Kind
    bf16: bool
    """Whether it computes in bfloat16."""
    flops: int
    """Multiplications and additions of matrix products and convolutions; of causal attention the half that counts."""
    bytes: int
    """Read and written."""
    elements: int
    """Of the result."""
    matrices: int
    """Products that a batched call consists of."""
    calls: int
    """Kernels that run: none for a view, one, or as many as there are parameters."""


class Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the operations that run in its context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.peak_bytes = 0
        self._alive_bytes = 0
        self._alive: set[int] = set()

    @property
    def flops(self) -> int:
        return sum(each.flops for each in self.operations)

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # a question, not an operation
            return func(*args, **kwargs)
        with self:  # without autograd, what consists of several operations comes in one piece
            parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        result = func(*args, **kwargs)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not written:
            return result
        known = {tensor.untyped_storage()._cdata for tensor in read}
        made = [tensor for tensor in written if tensor.untyped_storage()._cdata not in known]
        for tensor in made:
            self._watch(tensor.untyped_storage())
        changes = func._schema.is_mutable
        packet = func._overloadpacket
        flops = flop_registry[packet](*args, **kwargs, out_val=result) if packet in flop_registry else 0
        if _is_causal(func, args, kwargs):  # whose kernels leave out what lies after
            flops //= 2
        kind = KINDS.get(packet.__name__, "other")
        moved = 0
        if made or changes:  # else it is a view
            # A function that changes its arguments writes about as much as it reads.
            moved = sum(map(size_of, read)) * (2 if changes else 1) + sum(map(size_of, made))
        self.operations.append(
            Operation(
                kind,
                any(tensor.dtype == torch.bfloat16 for tensor in read),
                flops,
                moved,
                max(tensor.numel() for tensor in written),
                written[0].shape[:-2].numel() if kind == "batched" else 1,
                int(bool(made) or changes),
            )
        )
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
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
    names = [argument.name for argument in func._schema.arguments]
    if "is_causal" not in names:
        return False
    place = names.index("is_causal")
    return bool(args[place] if place < len(args) else kwargs.get("is_causal", False))


def size_of(tensor: Tensor) -> int:
    """Bytes that a tensor shows; one that repeats a smaller one has no more than that."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())

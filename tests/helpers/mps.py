"""A simulated Apple GPU: tensors with the device "mps" that are computed on the CPU, without float64.

    with simulated_mps():
        y = torch.ones(2, device="mps") * 2          .double() and operations on tensors of both devices are refused

The simulation does not know which operations Apple's kernels lack, or how they round.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_any, tree_leaves, tree_map_only

MPS = torch.device("mps")
WIDE = (torch.float64, torch.complex128)
M = TypeVar("M", bound=nn.Module)


class MpsTensor(Tensor):
    """A tensor with the device mps, which holds one on the CPU."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "MpsTensor":
        if inner.dtype in WIDE:
            raise TypeError(f"Cannot convert a MPS Tensor to {inner.dtype}: the MPS framework doesn't support it")
        made: MpsTensor = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("cpu"),  # for torch's own code, which has no mps here; Python's sees `device`
            requires_grad=inner.requires_grad,
        )
        made.on_cpu = inner.detach()
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return MPS

    def detach(self) -> Tensor:
        return MpsTensor(self.on_cpu)

    def cpu(self, *_: Any) -> Tensor:
        return self.on_cpu.clone()

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None or device.type == "mps":
            return super().to(dtype) if dtype is not None else self
        return self.on_cpu.to(device, dtype).clone()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Compute on the CPU. Results are on mps if the call asks for that, or else if an argument is."""
    asked = kwargs.get("device")
    here = tree_any(lambda x: isinstance(x, MpsTensor), (args, kwargs))
    for_mps = here if asked is None else torch.device(asked).type == "mps"
    if here and asked is None and func is not torch.ops.aten.copy_.default:
        # A number as a tensor without dimensions may come from anywhere.
        plain = [x for x in tree_leaves((args, kwargs)) if type(x) is Tensor and x.dim()]
        if plain and "index" not in func.__name__:
            raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but found mps and cpu")
    if asked is not None and for_mps:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    inner_args, inner_kwargs = tree_map_only(MpsTensor, lambda x: x.on_cpu, (args, kwargs))
    result = func(*inner_args, **inner_kwargs)
    if func._schema.is_mutable:  # in place, or into an argument
        name = func.__name__.split(".")[0]
        if name.endswith("_"):
            return args[0]
        if "out" in kwargs:
            return kwargs["out"]
    return tree_map_only(Tensor, MpsTensor, result) if for_mps else result


class _Factories(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Intercept operations that create tensors on mps."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class _Moves(TorchFunctionMode):
    """Intercept moves of tensors from the CPU to mps."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.to and not isinstance(args[0], MpsTensor):
            device, dtype, _, _ = torch._C._nn._parse_to(*args[1:], **kwargs)
            if device is not None and device.type == "mps":
                moved = args[0].detach()
                return MpsTensor(moved.to(dtype) if dtype is not None else moved.clone())
        return func(*args, **kwargs)


@contextmanager
def simulated_mps() -> Iterator[None]:
    """Allow tensors on mps."""
    with _Moves(), _Factories():  # type: ignore[no-untyped-call]
        yield


def on_mps(module: M) -> M:
    """Move a module's weights and buffers, in place. (Module.to would write into the memory of a tensor of the CPU.)"""
    for part in module.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    held[name] = MpsTensor(tensor.detach())  # type: ignore[assignment]
    return module

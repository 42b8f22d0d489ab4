"""A call of torch besides what it computes: modes that watch or replace it, transforms, traces.

A mode (FakeTensorMode, make_fx, FlopCounterMode, torch.device as a context ...) gets every call of a thread in its
hands. A transform (`torch.func`, forward-mode differentiation) calls a function with tensors that stand for others. A
trace writes a forward down, to be run later and elsewhere. A tensor without numbers has a shape alone. The one place
where torch is asked for them, mostly by private names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

__all__ = [
    "has_numbers",
    "is_compiled",
    "is_exported",
    "is_exported_to_onnx",
    "is_ordinary",
    "is_traced",
    "is_transformed",
    "is_under_mode",
    "is_wrapped",
]

_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.4 does not tell
_is_tracing: Callable[[], bool] = torch._C._is_tracing  # what torch.jit.is_tracing asks, at a tenth of its time
_functorch: Any = torch._C._functorch
# Modes under which a computation with ordinary tensors has no numbers either.
_SHAPES_ALONE: Any = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


def is_under_mode() -> bool:
    """Whether a mode or a transform has calls of this thread in its hands: what they make must not outlive it."""
    if torch._C._len_torch_dispatch_stack() or is_transformed():
        return True
    if not torch._C._len_torch_function_stack():
        return False

    # torch.device and set_default_device give a device to those that name none, and do nothing else.
    modes = torch.overrides._get_current_function_mode_stack()
    return not all(isinstance(mode, DeviceContext) for mode in modes)


def is_transformed() -> bool:
    """Whether this code runs in a transform of `torch.func`, or in forward-mode differentiation.

    A compiler has transforms of its own: under it, the answer is no.
    """
    if torch.compiler.is_compiling():
        return False
    return _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_wrapped(tensor: Tensor) -> bool:
    """Whether a transform of `torch.func` has put a tensor of its own in the place of this one."""
    return bool(_functorch.is_functorch_wrapped_tensor(tensor))


def has_numbers(tensor: Tensor) -> bool:
    """Whether somebody may look at the numbers of a tensor.

    Not of one on the meta device, of a fake one, of one that stands for several (`torch.func.vmap`), or while
    FakeTensorMode or make_fx has what is computed from it.
    """
    if tensor.is_meta or any(torch._C._get_dispatch_mode(mode) is not None for mode in _SHAPES_ALONE):
        return False

    while is_wrapped(tensor):
        if _functorch.is_batchedtensor(tensor):
            return False
        tensor = _functorch.get_unwrapped(tensor)
    return type(tensor) in (Tensor, torch.nn.Parameter) or not is_fake(tensor)


def is_ordinary() -> bool:
    """Whether tensors of this call are numbers: no compiler, transform or mode of torch stands between."""
    return not is_traced() and not is_under_mode()


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has this very module in its hands: a hook on it, or within, would be compiled, too."""
    return getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules


# ---- forwards that are written down


def is_traced() -> bool:
    """Whether this forward is being written down, by torch.compile, torch.export or torch.jit.trace."""
    return torch.compiler.is_compiling() or _is_tracing()


def is_exported() -> bool:
    """Whether it is written down as operators that run without us: by torch.export, torch.jit.trace, or to ONNX.

    Of what Python does on the way nothing is left: no autograd function of ours, no error, and no choice between
    kernels. torch.compile keeps all of it.
    """
    return _is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined]  # in words that a compiler knows


def is_exported_to_onnx() -> bool:
    """Whether it is written down for an ONNX file, which holds no statistics that move.

    In torch's strict export the answer is no; its exporter to ONNX comes to that only if the other one fails.
    """
    return is_exported() and torch.onnx.is_in_onnx_export()

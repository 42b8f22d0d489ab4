"""Is a forward run, or is it written down to be run later, and elsewhere?"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["is_exported", "is_exported_to_onnx", "is_traced"]

_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # torch 2.4 does not tell


def is_traced() -> bool:
    """Whether this forward is being written down, by torch.compile, torch.export or torch.jit.trace."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def is_exported() -> bool:
    """Whether it is written down as operators that run without us: by torch.export, torch.jit.trace, or to ONNX.

    Of what Python does on the way nothing is left: no autograd function of ours, no error, and no choice between
    kernels. torch.compile keeps all of it.
    """
    return _is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def is_exported_to_onnx() -> bool:
    """Whether it is written down for an ONNX file, which holds no statistics that move.

    In torch's strict export the answer is no; its exporter to ONNX comes to that only if the other one fails.
    """
    return is_exported() and torch.onnx.is_in_onnx_export()

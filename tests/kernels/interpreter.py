"""Triton's kernels on CPU tensors, under the interpreter of Triton itself, in a process that goes on without it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

KERNELS = "bnext.kernels.triton_kernels"


@contextmanager
def interpreted_kernels() -> Iterator[None]:
    """The kernels' module anew, as Triton makes it where TRITON_INTERPRET is set; afterwards it is imported again.

    Triton was imported without the variable, so that two functions of its language have to be made anew, too.
    """
    import triton
    import triton.language as tl
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang

    def patch_once(function: Any) -> Any:
        """Once for a kernel and all that it calls; each call anew takes most of the time, and leaves patches behind."""
        if not tl.core.is_builtin(tl.load):
            return interpreter._LangPatchScope()
        scope = patch_language(function)
        scope._changes += patch_language(tl.sum.fn)._changes
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in ("sum", "zeros"):
            patch.setattr(tl, name, triton.jit(getattr(tl, name).fn))
        forget_kernels()
        importlib.import_module(KERNELS)
        patch.delenv("TRITON_INTERPRET")
        patch.setattr(interpreter, "_patch_lang", patch_once)
        yield
    forget_kernels()


def forget_kernels() -> None:
    """Whoever needs the kernels next imports them."""
    if sys.modules.pop(KERNELS, None) is not None:
        del sys.modules["bnext.kernels"].triton_kernels

"""The writer of an output: one run at a time, by its main worker; readers, evaluations and other workers do not ask."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from detectron2.utils import comm

from bnext.errors import BNextError, LaunchError
from bnext.files import explain_os_error, find_local_file
from bnext.locks import holding

__all__ = ["holding_output"]


@contextlib.contextmanager
def holding_output(path: str, thing: str = "OUTPUT_DIR", *, is_folder: bool = True) -> Iterator[None]:
    """Hold an output within the block: the main worker does, and all learn it. A collective.

    Args:
        path: folder, made if it is missing, or file; an address of no disk is not held.
        thing: option or key that names it.
        is_folder: whether it is one.

    Raises:
        LaunchError: on every worker, another run holds it, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        refusal: BNextError | None = None
        if comm.is_main_process() and find_local_file(path) is not None:
            try:
                if is_folder:
                    os.makedirs(path, exist_ok=True)
                stack.enter_context(holding(path, thing))
            except BNextError as error:
                refusal = error
            except OSError as error:
                refusal = explain_os_error(error)
                if refusal is None:
                    raise

        message = comm.all_gather(str(refusal or ""))[0]
        if message:
            raise LaunchError(message)
        yield

"""A file that a command makes from a checkpoint: the input stays, and so does what is there already."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from bnext.checkpoints.checkpointer import find_missing_weights
from bnext.errors import BNextError, CheckpointError, ConfigError
from bnext.files import is_same_file

__all__ = ["check_output_file", "find_existing_faults", "find_folder_faults", "find_kept", "find_path_faults"]


def find_kept(args: argparse.Namespace) -> Callable[[], str]:
    """A function that tells what is left after Ctrl-C."""
    return lambda: "nothing is written"


def check_output_file(output: str, weights: str, endings: Sequence[str], *, report: str, overwrite: bool) -> None:
    """Raise the first of the faults that the other functions of this file know.

    Args:
        output, weights, endings: see `find_path_faults`.
        report: a file that is written beside the output.
        overwrite: whether files that exist are replaced.
    """
    for fault in find_path_faults(output, weights, endings):
        raise fault
    for fault in find_existing_faults((output, report), overwrite=overwrite):
        raise fault


def find_path_faults(output: str, weights: str, endings: Sequence[str]) -> Iterator[BNextError]:
    """The input is to be there and to stay, the output to be one that can be written.

    Args:
        output: of --output.
        weights: of MODEL.WEIGHTS, the input.
        endings: of file names that are allowed, such as ".pth".

    Raises:
        CheckpointError: no input is named.
    """
    if not weights:
        rule, remedy = "name the checkpoint that is read", "Give MODEL.WEIGHTS <file>."
        raise CheckpointError.of("MODEL.WEIGHTS", rule, got="''", remedy=remedy)
    missing = find_missing_weights(weights)
    if missing is not None:
        yield missing

    if Path(output).suffix not in endings:
        remedy = "The report is written beside it, .json."
        yield ConfigError.of("--output", f"end in {' or '.join(endings)}", got=repr(output), remedy=remedy)
    yield from find_folder_faults(output)

    if is_same_file(output, weights):
        rule = "be another file than MODEL.WEIGHTS, which is never changed"
        yield ConfigError.of("--output", rule, got=f"{output!r} for both", remedy="Choose another name.")


def find_folder_faults(path: str, option: str = "--output") -> Iterator[BNextError]:
    """The folder of a file is there, and takes it."""
    folder = Path(path).parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        rule, remedy = "be in a folder that exists and can be written to", f"Make {str(folder)!r}, or choose another."
        yield ConfigError.of(option, rule, got=repr(path), remedy=remedy)


def find_existing_faults(
    files: Sequence[str],
    *,
    overwrite: bool,
    option: str = "--output",
    rule: str = "not exist, nor the report beside it",
) -> Iterator[BNextError]:
    """Files that are there are kept, unless they are to be replaced; folders are never."""
    for path in files:
        is_folder = os.path.isdir(path)
        if is_folder or (os.path.lexists(path) and not overwrite):
            remedy = "Choose another name." if is_folder else "Choose another name, or give --overwrite."
            got = f"{path!r}, a folder" if is_folder else repr(path)
            yield ConfigError.of(option, rule, got=got, remedy=remedy)

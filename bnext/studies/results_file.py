"""results.json of a study: held by one run, whole after every write, kept or begun anew."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from detectron2.utils import comm

from bnext.engine.output import holding_output
from bnext.engine.screen import set_up_logging
from bnext.errors import ConfigError
from bnext.files import write_json

__all__ = ["ResultsFile", "keeping_results", "read_results", "show_results"]

logger = logging.getLogger(__name__)


class ResultsFile:
    """Results of a study until now.

    Args:
        path: of results.json.
        content: what it holds.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content

    def write(self) -> None:
        """Write it, whole; the main worker does."""
        if comm.is_main_process():
            write_json(self.path, self.content)


@contextlib.contextmanager
def keeping_results(output: str, empty: Mapping[str, Any], *, resume: bool = False) -> Iterator[ResultsFile]:
    """Hold a folder, with its log, for the results of a study. A collective.

    Args:
        output: the folder, made when it is missing; of the option --output.
        empty: content of a new study; one that goes on keeps what is there, and gets what it has not.
        resume: whether the results that are there are kept.

    Raises:
        LaunchError: another run holds the folder, or it cannot be written.
        ConfigError: what is there is no results.json.
    """
    with holding_output(output, "--output"):
        path = Path(output, "results.json")
        content = dict(empty)
        if resume and path.exists():
            content |= read_results(path)
        elif path.exists() and comm.is_main_process():
            words = "%s of an earlier study will be overwritten. Use --resume or another --output to keep it."
            logger.warning(words, path)

        comm.synchronize()  # every worker has read the file before one writes it
        set_up_logging(output)
        yield ResultsFile(path, content)


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a results.json.

    Raises:
        ConfigError: it cannot be read as one.
    """
    try:
        content = json.loads(Path(path).read_text())
        if isinstance(content, dict):
            return content
        got = f"a {type(content).__name__}"
    except (OSError, ValueError) as error:
        got = str(error)

    remedy = "Move it away, or name the results.json of a study."
    raise ConfigError.of("The results", "be a JSON object", got=got, where=str(path), remedy=remedy)


def show_results(path: str | os.PathLike[str], format_tables: Callable[[dict[str, Any]], str]) -> None:
    """Print the tables of a results.json.

    Args:
        path: of the file.
        format_tables: the study's.

    Raises:
        ConfigError: it is none, or of another study.
    """
    results = read_results(path)
    tables, got = "", "nothing that it has a table for"
    try:
        tables = format_tables(results)
    except (LookupError, TypeError, AttributeError, StopIteration) as error:
        got = f"{type(error).__name__}: {error}"

    if not tables.strip():
        remedy = "Name a results.json of this study."
        raise ConfigError.of("The results", "be of this study", got=got, where=str(path), remedy=remedy)
    print(tables, flush=True)

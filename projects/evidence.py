"""The evidence: the tables of all studies, made from the results that are committed beside them.

    python projects/evidence.py domains_table

prints one; the site's page of evidence has all of them. Each stands in its study's card, too, which a test compares.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bnext.studies.results_file import read_results

__all__ = ["EXHIBITS", "Exhibit", "show_exhibit"]

ROOT = Path(__file__).parent


class Exhibit(NamedTuple):
    """Tables of a study.

    Args:
        study: its folder.
        results: file of its results, in its folder "results".
        module: in its folder, whose function makes the tables.
        function: its name.
    """

    study: str
    results: str
    module: str
    function: str = "format_tables"

    @property
    def card(self) -> Path:
        """The card of the study."""
        return ROOT / self.study / "README.md"


EXHIBITS = {
    "leakage_classifier": Exhibit("Leakage", "classifier.json", "leak_tables"),
    "leakage_rcnn": Exhibit("Leakage", "rcnn.json", "rcnn_tables"),
    "table5": Exhibit("RethinkingBatchNorm", "table5.json", "table5", "format_table"),
    "nbs": Exhibit("NormalizationBatchSize", "digits.json", "size_tables"),
    "understanding": Exhibit("UnderstandingBatchNorm", "digits.json", "understanding_tables"),
    "understanding_110": Exhibit("UnderstandingBatchNorm", "depth110.json", "understanding_tables"),
    "smart_net": Exhibit("SmartBatchNorm", "net.json", "mode_tables"),
    "smart_detector": Exhibit("SmartBatchNorm", "detector.json", "mode_tables"),
    "gan": Exhibit("GenerativeAndReinforcement", "gan.json", "cases_tables"),
    "value": Exhibit("GenerativeAndReinforcement", "value.json", "cases_tables"),
    "domains_table": Exhibit("Domains", "table.json", "domain_table", "format_table"),
    "domains_targets": Exhibit("Domains", "targets.json", "domain_pictures", "format_targets"),
    "domains_stream": Exhibit("Domains", "stream.json", "domain_pictures", "format_stream"),
    "open_groups": Exhibit("OpenQuestions", "groups.json", "question_tables", "format_results"),
    "open_levels": Exhibit("OpenQuestions", "levels.json", "question_tables", "format_results"),
    "open_repair": Exhibit("OpenQuestions", "repair.json", "question_tables", "format_results"),
    "open_rois": Exhibit("OpenQuestions", "rois.json", "question_tables", "format_results"),
    "perils": Exhibit("Perils", "stories.json", "run"),
}


def show_exhibit(name: str) -> str:
    """The tables of an exhibit in Markdown.

    Args:
        name: of `EXHIBITS`.
    """
    exhibit = EXHIBITS[name]
    folder = str(ROOT / exhibit.study)
    if folder not in sys.path:
        sys.path.insert(0, folder)

    format_tables: Callable[[Any], str] = getattr(importlib.import_module(exhibit.module), exhibit.function)
    return format_tables(read_results(ROOT / exhibit.study / "results" / exhibit.results))


def main() -> None:
    """Print the tables that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "exhibits", nargs="*", choices=EXHIBITS, metavar="EXHIBIT", help=f"of {', '.join(EXHIBITS)} (default: all)"
    )
    for name in parser.parse_args().exhibits or EXHIBITS:
        print(f"{name}\n\n{show_exhibit(name)}\n")


if __name__ == "__main__":
    main()

"""The check of data sets alone: everything that is wrong with them, and what is in them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from bnext.cli.arguments import FILE_HELP, PAIRS_HELP
from bnext.config import load_config
from bnext.data.census import Census, count_records
from bnext.data.check_classes import check_classes
from bnext.data.check_coco import examine_dataset
from bnext.data.check_objects import Fault, Notice, Task
from bnext.data.classes import are_found_by_name, count_classes, read_classes
from bnext.data.listed_sets import KEY
from bnext.data.records import read_registered
from bnext.errors import BNextError, ConfigError
from bnext.evaluation.coco import build_evaluator
from bnext.evaluation.rehearsal import rehearse
from bnext.notices import without_warnings
from bnext.tables import format_rows

__all__ = ["DESCRIPTION", "add_arguments", "execute"]

DESCRIPTION = """Check data sets as a training does before it starts, and say what is in them.

    bnext check-data --config-file CONFIG.yaml
    bnext check-data --dataset my_train --dataset my_val --import my_module
    bnext check-data --json annotations.json --folder images

All faults are named, where a training ends at the first one; nothing is written. With a config, sets are checked for
its model; without one, for boxes."""
IS_INTERMIXED = True
_MOST_ROWS = 30  # of categories


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config-file", default="", metavar="FILE", help=f"whose DATASETS.TRAIN and TEST are checked: {FILE_HELP}")
    add("--dataset", action="append", default=[], metavar="NAME", help="a registered set, instead of all of the config")
    add("--json", metavar="FILE", help="annotations in COCO format, of a set that is not registered")
    add("--folder", metavar="FOLDER", help="of the pictures of --json")
    add("opts", nargs="*", metavar="KEY VALUE", help=PAIRS_HELP)


def execute(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        BNextError: the last fault; those before it are printed.
    """
    opts, names = [*args.opts], [*args.dataset]
    if (args.json is None) != (args.folder is None):
        remedy = "Give --json FILE --folder FOLDER."
        raise ConfigError.of("--json and --folder", "be given together", got="one of them", remedy=remedy)
    if args.json is not None:
        name = Path(args.json).stem
        opts += [KEY, repr([{"name": name, "json": args.json, "folder": args.folder}])]
        names.append(name)

    cfg = load_config(args.config_file, opts)
    if not names:
        names = list(dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)))
    if not names:
        remedy = "Give --config-file, --dataset, or --json and --folder."
        raise ConfigError.of("check-data", "be told of a data set", got="none", remedy=remedy)
    _check(cfg, names, for_model=bool(args.config_file))


def _check(cfg: CfgNode, names: Sequence[str], for_model: bool) -> None:
    errors: list[BNextError] = []
    for name in names:
        findings, notices = _examine(name, _choose_task(cfg, name, for_model))
        errors += findings
        census = None if findings else _count(name)
        print(format_report(name, census, notices, len(findings)), flush=True)

    if for_model and not errors:
        errors += _try_model(cfg, names)
    for error in errors[:-1]:
        print(f"error: {error}", file=sys.stderr)
    if errors:
        raise errors[-1]


def _choose_task(cfg: CfgNode, name: str, for_model: bool) -> Task:
    """The task of a set: it is trained on, unless the config only evaluates on it."""
    is_training = name in cfg.DATASETS.TRAIN or name not in cfg.DATASETS.TEST
    if not for_model:
        return Task.of(None, num_classes=None, is_training=is_training)

    _, num_classes = count_classes(cfg) or ("", None)
    if are_found_by_name(cfg, is_training=is_training):
        num_classes = None
    return Task.of(cfg, num_classes=num_classes, is_training=is_training)


def _examine(name: str, task: Task) -> tuple[list[BNextError], list[Notice]]:
    """All faults of a set, as errors, and what is left as it is."""
    errors: list[BNextError] = []
    notices: list[Notice] = []
    try:
        for dataset, finding in examine_dataset(name, task):
            if isinstance(finding, Fault):
                errors.append(dataset.error(finding))
            else:
                notices.append(finding)
    except BNextError as error:
        errors.append(error)
    except Exception:  # a rule that relied on what is at fault
        if not errors:
            raise
    return errors, notices


def _count(name: str) -> Census | None:
    with without_warnings():  # of detectron2's reader, which says again what the checks have found
        records = read_registered(name)
    return count_records(records) if isinstance(records, (list, tuple)) else None


def _try_model(cfg: CfgNode, names: Sequence[str]) -> list[BNextError]:
    """Faults of sets together, each without one: their classes, and the evaluation of their ground truth."""
    errors = []
    for check in (check_classes, lambda cfg: rehearse(cfg, build=build_evaluator)):
        try:
            if set(cfg.DATASETS.TRAIN) | set(cfg.DATASETS.TEST) <= set(names):
                check(cfg)
        except BNextError as error:
            errors.append(error)
    return errors


def format_report(name: str, census: Census | None, notices: Sequence[Notice], num_faults: int) -> str:
    """A set in a person's words: its numbers, a table of its categories, and what is to be known of it."""
    if num_faults:
        words = "a fault" if num_faults == 1 else f"{num_faults} faults, of which later ones may follow from the first"
        return f"{name}: {words}"

    lines = [f"{name}: no fault"]
    if census is not None:
        lines += _describe(census)
        classes = read_classes(name) or ()
        numbers = list(range(len(classes))) or list(census.categories)
        rows = [_format_row(census, number, classes) for number in numbers]
        lines += ["", format_rows(rows[:_MOST_ROWS], ["category", "objects", "images"])]
        if len(rows) > _MOST_ROWS:
            lines.append(f"and {len(rows) - _MOST_ROWS} more")
        lines.append("")

    lines += [f"  note: {each.count} of {each.total} {each.things} {each.words}" for each in notices]
    return "\n".join(lines)


def _describe(census: Census) -> list[str]:
    empty = f"{census.num_empty:,}" if census.num_empty else "none"
    images = f"  {census.num_images:,} images, {empty} of them without an object"
    if census.smallest:
        largest = f" to {census.largest}" if census.largest != census.smallest else ""
        images += f"; {census.smallest}{largest} pixels"
    sizes = ", ".join(f"{number:,} {size}" for size, number in census.sizes.items())
    objects = f"  {census.num_objects:,} objects by their boxes: {sizes} (from 32 x 32 and 96 x 96 pixels on)"

    parts = [(census.num_crowds, "crowds besides"), (census.num_masks, "with a mask")]
    parts.append((census.num_keypoints, "with keypoints"))
    others = ", ".join(f"{number:,} {words}" for number, words in parts if number)
    return [images, f"{objects}; {others}" if others else objects]


def _format_row(census: Census, number: int, classes: Sequence[str]) -> list[str]:
    objects, images = census.categories.get(number, (0, 0))
    return [classes[number] if number < len(classes) else str(number), f"{objects:,}", f"{images:,}"]

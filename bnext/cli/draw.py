"""Detections drawn: checkpoints, or kinds of statistics, side by side on images of a set."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from torch import nn

from bnext.checkpoints.checkpointer import find_missing_weights, load_model
from bnext.cli.arguments import FILE_HELP, PAIRS_HELP, take_pairs
from bnext.cli.output_file import find_existing_faults, find_folder_faults
from bnext.cli.run_command import load_config_to_reestimate
from bnext.cli.train import check_run
from bnext.config import load_config
from bnext.data.records import Record, has_labels, load_records
from bnext.engine.output import holding_output
from bnext.errors import ConfigError, check_choice
from bnext.evaluation.compare import check_domain, count_together, recompute_kind
from bnext.evaluation.detections import Examined, choose_images, examine
from bnext.evaluation.matching import OUTCOMES
from bnext.files import is_same_file
from bnext.notices import gathering_notices
from bnext.repair.kinds import KINDS, Kind, find_obstacle, use_kind
from bnext.scope import use_domain
from bnext.studies.bars import draw_bars
from bnext.studies.pictures import Layout, draw_detections
from bnext.tables import format_rows

__all__ = ["DESCRIPTION", "add_arguments", "describe_thresholds", "execute", "find_kept", "format_counts"]

DESCRIPTION = """Draw what checkpoints detect, each box as what it is: right, wrong class, duplicate, missed ...

    bnext draw --config-file CONFIG.yaml --weights model_final.pth --output boxes.png
    bnext draw --config-file CONFIG.yaml --weights a.pth b.pth --names before after --worst --output boxes.png
    bnext draw --config-file CONFIG.yaml MODEL.WEIGHTS a.pth --kinds moving_average per_level --output boxes.png

A column for each checkpoint and kind of statistics, a row for each image. What a box is, is decided by the rules of
COCO's evaluation at one IoU; it is printed, too. Checkpoints are only read."""
IS_INTERMIXED = True
_MOST_COLUMNS = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument

    add("--config-file", required=True, metavar="FILE", help=f"of the model of all checkpoints: {FILE_HELP}")
    add("--weights", nargs="+", metavar="FILE", help="checkpoints (default: MODEL.WEIGHTS)")
    add("--names", nargs="+", metavar="NAME", help="of the checkpoints, above their columns")
    add("--kinds", nargs="+", metavar="KIND", help=f"some of {', '.join(KINDS)} (default: as in the file)")
    add("--dataset", metavar="NAME", help="whose images are drawn (default: the first of DATASETS.TEST)")
    add("--domain", metavar="NAME", help="of all images, where norms have statistics or weights per domain")
    add("--domain-dataset", metavar="NAME", help="training images of that domain, for --kinds per_domain")

    add("--output", required=True, metavar="FILE", help="the PNG to write")
    add("--bars", metavar="FILE", help="a PNG with AP by size and class, of all images")
    add("--overwrite", action="store_true", help="replace pictures that exist")

    add("--num-images", type=int, default=4, metavar="N", help="(default: %(default)s, evenly from the set)")
    add("--images", nargs="+", metavar="IMAGE", help="ids or file names of the images to draw")
    add("--worst", action="store_true", help="images in which columns differ most; of one column: most errors")
    add("--seed", type=int, metavar="S", help="choose images at random")
    add("--crop", action="store_true", help="enlarge the part of each image that holds all boxes")

    add("--iou", type=float, default=0.5, metavar="T", help="with an object, of a right box (default: %(default)s)")
    add("--score", type=float, default=0.5, metavar="S", help="leave out boxes below it (default: %(default)s)")
    add("opts", nargs="*", metavar="KEY VALUE", help=PAIRS_HELP)


def execute(args: argparse.Namespace) -> None:
    """Run the command."""
    take_pairs(args, ("weights", "names", "kinds", "images"))
    _check_arguments(args)
    outputs = [args.output, *([args.bars] if args.bars else [])]
    kinds = [KINDS[name] for name in dict.fromkeys(args.kinds or ["moving_average"])]

    opts = [*args.opts, *(["DATASETS.TEST", repr((args.dataset,))] if args.dataset else [])]
    load = load_config_to_reestimate if any(kind.source != "file" for kind in kinds) else load_config
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())  # an evaluation's files
        cfg = load(args.config_file, [*opts, "OUTPUT_DIR", folder])
        checkpoints = _name_checkpoints(args.weights or [cfg.MODEL.WEIGHTS], args.names)
        if len(checkpoints) * len(kinds) > _MOST_COLUMNS:
            rule, got = f"make at most {_MOST_COLUMNS} columns", f"{len(checkpoints)} x {len(kinds)}"
            raise ConfigError.of("--weights and --kinds", rule, got=got, remedy="Draw them in several pictures.")

        inputs = [args.config_file, *checkpoints.values()]
        if args.bars and os.path.realpath(args.bars) == os.path.realpath(args.output):
            rule, got = "be another file than --output", repr(args.bars)
            raise ConfigError.of("--bars", rule, got=got, remedy="Choose another name.")
        for option, path in zip(("--output", "--bars"), outputs, strict=False):
            _check_output(option, path, inputs, args.overwrite)
        records = _check_run(cfg, list(checkpoints.values()), args, outputs)
        for path in outputs:
            stack.enter_context(holding_output(path, "--output", is_folder=False))
        stack.enter_context(gathering_notices())
        _draw(cfg, checkpoints, kinds, records, args)


def find_kept(args: argparse.Namespace) -> Callable[[], str]:
    """A function that tells what is left after Ctrl-C."""
    return lambda: "nothing is drawn"


def _check_arguments(args: argparse.Namespace) -> None:
    """Refuse values that can be known to be wrong before a config is read."""
    for kind in args.kinds or ():
        check_choice("--kinds", kind, tuple(KINDS), where="bnext draw")
    if not 0 < args.iou <= 1:
        raise ConfigError.of("--iou", "be above 0 and at most 1", got=args.iou, remedy="Use 0.5, or 0.75.")
    if not 0 <= args.score <= 1:
        raise ConfigError.of("--score", "be 0 to 1", got=args.score, remedy="Use 0.5, or 0.3 for more boxes.")
    if args.num_images < 1:
        raise ConfigError.of("--num-images", "be 1 or more", got=args.num_images, remedy="Use 4.")
    if args.seed is not None and args.seed < 0:
        raise ConfigError.of("--seed", "be 0 or more", got=args.seed, remedy="Use 0.")

    choices = {"--images": args.images, "--worst": args.worst, "--seed": args.seed is not None}
    given = [option for option, value in choices.items() if value]
    if len(given) > 1:
        got = " and ".join(given)
        raise ConfigError.of("The choice of images", "be made by one option", got=got, remedy="Leave out the others.")
    if "per_domain" in (args.kinds or ()) and not args.domain_dataset:
        rule, remedy = "name training images of the domain for --kinds per_domain", "Give --domain-dataset NAME."
        raise ConfigError.of("--domain-dataset", rule, got="none", remedy=remedy)


def _name_checkpoints(weights: Sequence[str], names: Sequence[str] | None) -> dict[str, str]:
    """Title -> checkpoint: the names that are given, else the parts of the paths that tell them apart."""
    if names is not None and (len(names) != len(weights) or len(set(names)) < len(names)):
        rule, remedy = f"name each of the {len(weights)} checkpoints", "Give as many names, all different."
        raise ConfigError.of("--names", rule, got=" ".join(names), remedy=remedy)
    if len(set(weights)) < len(weights):
        got, remedy = " ".join(weights), "Leave out the copies."
        raise ConfigError.of("--weights", "name each checkpoint once", got=got, remedy=remedy)

    titles = list(names or (Path(path).stem for path in weights))
    if len(set(titles)) < len(titles):
        titles = [f"{Path(path).parent.name}/{Path(path).stem}" for path in weights]
    if len(set(titles)) < len(titles):
        titles = list(weights)
    return dict(zip(titles, weights, strict=True))


def _check_output(option: str, path: str, inputs: Sequence[str], overwrite: bool) -> None:
    """A PNG in a folder that is there, which neither exists nor is read, unless it is to be replaced."""
    if Path(path).suffix.lower() != ".png":
        raise ConfigError.of(option, "end in .png", got=repr(path), remedy="Pictures are written as PNG.")
    for fault in find_folder_faults(path, option):
        raise fault
    for fault in find_existing_faults([path], overwrite=overwrite, option=option, rule="not exist"):
        raise fault
    _refuse_inputs(option, path, inputs)


def _refuse_inputs(option: str, path: str, inputs: Sequence[str]) -> None:
    for given in inputs:
        if os.path.lexists(path) and is_same_file(path, given):
            rule, got = "be another file than what is read", f"{path!r}, which is {given}"
            raise ConfigError.of(option, rule, got=got, remedy="Choose another name.")


def _check_run(cfg: CfgNode, weights: Sequence[str], args: argparse.Namespace, outputs: Sequence[str]) -> list[Record]:
    """The records of the set, when the run can be made as far as can be known."""
    if not cfg.DATASETS.TEST:
        raise ConfigError.of("DATASETS.TEST", "name a data set", got="none", remedy="Give --dataset NAME.")
    check_domain(cfg, args.domain)
    for path in weights:
        if not path:
            rule, remedy = "name a checkpoint", "Give --weights FILE, or MODEL.WEIGHTS FILE."
            raise ConfigError.of("--weights", rule, got="none", remedy=remedy)
        missing = find_missing_weights(path)
        if missing is not None:
            raise missing

    name = cfg.DATASETS.TEST[0]
    cfg.defrost()
    cfg.DATASETS.TEST, cfg.MODEL.WEIGHTS = (name,), weights[0]
    cfg.freeze()
    records = load_records(name, cfg)
    if has_labels(records):
        check_run(cfg, eval_only=True)
    else:
        needs = [option for option, value in (("--worst", args.worst), ("--bars", args.bars)) if value]
        if needs:
            rule, got = f"be annotated for {needs[0]}", f"{name!r} without annotations"
            raise ConfigError.of("The data set", rule, got=got, remedy=f"Leave out {needs[0]}, or name another set.")
        print(f"Data set {name!r} has no annotations: boxes are drawn without saying whether they are right.")

    if args.images:
        choose_images(records, 1, names=args.images)
    for path in outputs:
        if os.path.lexists(path):
            _refuse_inputs("--output", path, [str(record["file_name"]) for record in records])
    return records


def _draw(
    cfg: CfgNode,
    checkpoints: dict[str, str],
    kinds: Sequence[Kind],
    records: Sequence[Record],
    args: argparse.Namespace,
) -> None:
    is_whole = args.worst or args.bars is not None or any(kind.is_as_trained for kind in kinds)
    chosen = [] if args.worst else choose_images(records, args.num_images, names=args.images or (), seed=args.seed)

    columns = []
    for name, weights in checkpoints.items():
        model = load_model(cfg, weights)
        for kind in kinds:
            parts = [name] if len(checkpoints) > 1 else []
            parts += [kind.words] if len(kinds) > 1 or args.kinds else []
            title = ", ".join(parts or [name])
            with contextlib.nullcontext() if args.domain is None else use_domain(args.domain):
                columns.append(_examine(cfg, model, kind, None if is_whole else chosen, title, args))

    if args.worst:
        chosen = choose_images(records, args.num_images, columns=columns)
    note = describe_thresholds(cfg.DATASETS.TEST[0], args.score, args.iou if columns[0].matches else None)
    draw_detections(columns, chosen, args.output, note=note, layout=Layout(crop=args.crop))
    if args.bars:
        draw_bars(columns, args.bars, note=note)

    if columns[0].matches:
        print(f"{format_counts(columns)}\n")
    print("\n".join([args.output, *([args.bars] if args.bars else [])]))


def _examine(
    cfg: CfgNode,
    model: nn.Module,
    kind: Kind,
    records: Sequence[Record] | None,
    title: str,
    args: argparse.Namespace,
) -> Examined:
    """One column."""
    obstacle = find_obstacle(model, kind.name, cfg.SOLVER.IMS_PER_BATCH)
    if obstacle:
        got, remedy = f"{kind.name}: {obstacle}", "Leave it out, or choose another."
        raise ConfigError.of("--kinds", "apply to the model", got=got, remedy=remedy)

    data = {"training": None, "test": cfg.DATASETS.TEST[0], "domain": args.domain_dataset}
    size = count_together(cfg, model) if kind.is_as_trained else 1
    with use_kind(model, kind, data, partial(recompute_kind, cfg)) as (variant, _):
        return examine(cfg, variant, records, title=title, score=args.score, iou=args.iou, images_per_batch=size)


def describe_thresholds(dataset: str, score: float, iou: float | None) -> str:
    """The last line of a picture: whose images they are, and what its boxes are judged by; None: by nothing."""
    words = f"{dataset}; boxes of score {score:g} and above."
    if iou is None:
        return words
    return (
        f"{words} Right: the first to overlap a free object of its class by IoU {iou:g}, as COCO's evaluation counts."
    )


def format_counts(columns: Sequence[Examined]) -> str:
    """A table of what the boxes of each column are, and of AP where all images were examined."""
    rows = []
    for column in columns:
        counts: dict[str, Any] = column.count()
        ap = column.metrics.get("bbox/AP")
        rows.append([column.title, *(str(counts[name]) for name in OUTCOMES), "" if ap is None else f"{ap:.1f}"])
    headers = [f"boxes in {len(columns[0].matches)} images", *OUTCOMES.values(), "COCO AP"]
    return format_rows(rows, headers)

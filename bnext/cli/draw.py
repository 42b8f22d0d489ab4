"""Detections drawn: checkpoints, or kinds of statistics, side by side on images of a set."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from torch import nn

from bnext.checkpoints.checkpointer import find_missing_weights, load_model
from bnext.cli.arguments import FILE_HELP, PAIRS_HELP, take_pairs
from bnext.cli.output_file import find_existing_faults, find_folder_faults
from bnext.cli.run_command import load_config_to_reestimate
from bnext.cli.train import check_run
from bnext.config import load_config
from bnext.config.domains import check_domains
from bnext.data.domains import count_domains, select_sets
from bnext.data.records import Record, has_labels, load_records
from bnext.engine.output import holding_output
from bnext.errors import ConfigError, check_choice
from bnext.evaluation.compare import count_together, recompute_kind
from bnext.evaluation.conditions import Conditions
from bnext.evaluation.detections import Examined, choose_images, examine
from bnext.evaluation.matching import OUTCOMES
from bnext.files import is_same_file
from bnext.notices import gathering_notices
from bnext.repair.kinds import KINDS, Kind, find_obstacle, use_kind
from bnext.scope import use_domain
from bnext.studies.bars import draw_bars
from bnext.studies.pictures import Layout, Section, draw_sections
from bnext.tables import format_rows

__all__ = ["DESCRIPTION", "add_arguments", "describe_thresholds", "execute", "find_kept", "format_counts"]

DESCRIPTION = """Draw what checkpoints detect, each box as what it is: right, wrong class, duplicate, missed ...

    bnext draw --config-file CONFIG.yaml --weights model_final.pth --output boxes.png
    bnext draw --config-file CONFIG.yaml --weights a.pth b.pth --names before after --worst --output boxes.png
    bnext draw --config-file CONFIG.yaml MODEL.WEIGHTS a.pth --kinds moving_average per_level --output boxes.png
    bnext draw --config-file CONFIG.yaml MODEL.WEIGHTS a.pth --per-domain --output domains.png

A column for each checkpoint and kind of statistics, a row for each image; with --per-domain such a part for each
domain of the test sets. What a box is, is decided by the rules of
COCO's evaluation at one IoU; it is printed, too. Checkpoints are only read."""
IS_INTERMIXED = True
_MOST_COLUMNS = 6
_LEAST_CELL = 200  # pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument

    add("--config-file", required=True, metavar="FILE", help=f"of the model of all checkpoints: {FILE_HELP}")
    add("--weights", nargs="+", metavar="FILE", help="checkpoints (default: MODEL.WEIGHTS)")
    add("--names", nargs="+", metavar="NAME", help="of the checkpoints, above their columns")
    add("--kinds", nargs="+", metavar="KIND", help=f"some of {', '.join(KINDS)} (default: as in the file)")
    add("--dataset", metavar="NAME", help="whose images are drawn (default: the first of DATASETS.TEST)")
    add("--domain", metavar="NAME", help="of all images, where norms have domains (default: that of each image's set)")
    add("--per-domain", action="store_true", help="images of each domain of DATASETS.TEST, instead of one set")
    add("--domain-dataset", metavar="NAME", help="training images of that domain, for --kinds per_domain")

    add("--output", required=True, metavar="FILE", help="the PNG to write")
    add("--bars", metavar="FILE", help="a PNG with AP by size and class, of all images")
    add("--overwrite", action="store_true", help="replace pictures that exist")

    add("--num-images", type=int, default=4, metavar="N", help="of each part (default: %(default)s, evenly)")
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

    load = load_config_to_reestimate if any(kind.source != "file" for kind in kinds) else load_config
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())  # an evaluation's files
        cfg = load(args.config_file, [*args.opts, "OUTPUT_DIR", folder])
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
        parts = _check_run(cfg, list(checkpoints.values()), args, outputs)
        for path in outputs:
            stack.enter_context(holding_output(path, "--output", is_folder=False))
        stack.enter_context(gathering_notices())
        _draw(checkpoints, kinds, parts, args)


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
    without = {"--dataset": args.dataset, "--images": args.images, "--bars": args.bars}
    for option in (option for option, value in without.items() if args.per_domain and value):
        remedy = "Leave one of them out; `bnext evaluate` draws bars of domains."
        raise ConfigError.of("--per-domain", f"be without {option}", got="both", remedy=remedy)
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


class _Part(NamedTuple):
    """Images that are drawn together.

    Args:
        cfg: whose DATASETS.TEST is their set alone.
        records: to choose from.
        is_set: whether they are all of the set, so that they can be evaluated.
        title: their domain, or "".
    """

    cfg: CfgNode
    records: list[Record]
    is_set: bool = True
    title: str = ""


def _check_run(cfg: CfgNode, weights: Sequence[str], args: argparse.Namespace, outputs: Sequence[str]) -> list[_Part]:
    """List what is drawn, when the run can be made as far as can be known."""
    cfg.defrost()
    if args.dataset:
        select_sets(cfg, "TEST", [args.dataset])
    if not cfg.DATASETS.TEST:
        raise ConfigError.of("DATASETS.TEST", "name a data set", got="none", remedy="Give --dataset NAME.")
    cfg.MODEL.WEIGHTS = weights[0]
    if not args.per_domain:
        select_sets(cfg, "TEST", cfg.DATASETS.TEST[:1])
    cfg.freeze()

    check_domains(cfg, eval_only=True, domain=args.domain)
    for path in weights:
        if not path:
            rule, remedy = "name a checkpoint", "Give --weights FILE, or MODEL.WEIGHTS FILE."
            raise ConfigError.of("--weights", rule, got="none", remedy=remedy)
        missing = find_missing_weights(path)
        if missing is not None:
            raise missing

    parts = _find_parts(cfg) if args.per_domain else [_Part(cfg, load_records(cfg.DATASETS.TEST[0], cfg))]
    for part in parts:
        _check_part(part, args, outputs)
    return parts


def _find_parts(cfg: CfgNode) -> list[_Part]:
    """The images of each domain, of the first set that has some."""
    parts: dict[str, _Part] = {}
    for name in cfg.DATASETS.TEST:
        of_set = cfg.clone()
        of_set.defrost()
        select_sets(of_set, "TEST", [name])
        of_set.freeze()

        records = load_records(name, of_set)
        for domain in filter(None, count_domains(records)):
            chosen = [record for record in records if record.get("domain") == domain]
            parts.setdefault(domain, _Part(of_set, chosen, len(chosen) == len(records), domain))

    if not parts:
        rule, remedy = "have a domain for --per-domain", "Give them one in DATASETS.DOMAINS.TEST."
        raise ConfigError.of("Sets of DATASETS.TEST", rule, got="none", where=str(cfg.DATASETS.TEST), remedy=remedy)
    return list(parts.values())


def _check_part(part: _Part, args: argparse.Namespace, outputs: Sequence[str]) -> None:
    name = part.cfg.DATASETS.TEST[0]
    if has_labels(part.records):
        check_run(part.cfg, eval_only=True, conditions=Conditions(domain=args.domain))
    else:
        needs = [option for option, value in (("--worst", args.worst), ("--bars", args.bars)) if value]
        if needs:
            rule, got = f"be annotated for {needs[0]}", f"{name!r} without annotations"
            raise ConfigError.of("The data set", rule, got=got, remedy=f"Leave out {needs[0]}, or name another set.")
        print(f"Data set {name!r} has no annotations: boxes are drawn without saying whether they are right.")

    if args.images:
        choose_images(part.records, 1, names=args.images)
    for path in outputs:
        if os.path.lexists(path):
            _refuse_inputs("--output", path, [str(record["file_name"]) for record in part.records])


def _draw(checkpoints: dict[str, str], kinds: Sequence[Kind], parts: Sequence[_Part], args: argparse.Namespace) -> None:
    is_whole = args.worst or args.bars is not None or any(kind.is_as_trained for kind in kinds)
    options: dict[str, Any] = {"names": args.images or (), "seed": args.seed}
    chosen = [[] if args.worst else choose_images(part.records, args.num_images, **options) for part in parts]

    columns: list[list[Examined]] = [[] for _ in parts]
    for name, weights in checkpoints.items():
        model = load_model(parts[0].cfg, weights)
        for kind in kinds:
            words = [name] if len(checkpoints) > 1 else []
            words += [kind.words] if len(kinds) > 1 or args.kinds else []
            title = ", ".join(words or [name])
            for number, part in enumerate(parts):
                every = None if part.is_set else part.records
                with contextlib.nullcontext() if args.domain is None else use_domain(args.domain):
                    images = every if is_whole else chosen[number]
                    columns[number].append(_examine(part.cfg, model, kind, images, title, args))

    if args.worst:
        pairs = zip(parts, columns, strict=True)
        chosen = [choose_images(part.records, args.num_images, columns=of_part) for part, of_part in pairs]
    triples = zip(columns, chosen, parts, strict=True)
    sections = [Section(of_part, images, part.title) for of_part, images, part in triples]
    every_column = list(itertools.chain.from_iterable(columns))
    is_judged = all(column.matches for column in every_column)
    names = ", ".join(dict.fromkeys(part.cfg.DATASETS.TEST[0] for part in parts))
    note = describe_thresholds(names, args.score, args.iou if is_judged else None)

    draw_sections(sections, args.output, note=note, layout=_choose_layout(args, len(columns[0])))
    if args.bars:
        draw_bars(columns[0], args.bars, note=note)
    for section in sections:
        if section.columns[0].matches:
            print(f"{section.title}\n" * bool(section.title) + f"{format_counts(section.columns)}\n")
    print("\n".join([args.output, *([args.bars] if args.bars else [])]))


def _choose_layout(args: argparse.Namespace, num_columns: int) -> Layout:
    """Sizes of images; those of a domain stand beside each other, if they are not too small then."""
    layout = Layout(crop=args.crop)
    if not args.per_domain:
        return layout
    return replace(layout, cell=max(_LEAST_CELL, int((layout.page - 80) / (args.num_images * num_columns)) - 8))


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

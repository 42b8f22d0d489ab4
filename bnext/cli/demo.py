"""The main job: see a plain BN in a shared head fail, be told why, repair its checkpoint, see the difference."""

from __future__ import annotations

import argparse
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from bnext.checkpoints import load_model
from bnext.cli.draw import describe_thresholds, format_counts
from bnext.cli.train import check_run
from bnext.config import load_config
from bnext.config.files import get_config_file
from bnext.data.catalog import ensure_digits
from bnext.data.records import load_records
from bnext.diagnostics.diagnose import examine_facts
from bnext.diagnostics.facts import Origin
from bnext.diagnostics.reports.report_html import format_html
from bnext.engine import train
from bnext.engine.output import holding_output
from bnext.engine.screen import set_up_logging
from bnext.evaluation import evaluate_model
from bnext.evaluation.coco import flatten_metrics
from bnext.evaluation.detections import choose_images, examine
from bnext.evaluation.doctor import examine_detector
from bnext.evaluation.reestimate import repair_checkpoint
from bnext.files import replace_file, write_json
from bnext.studies.pictures import Layout, draw_detections
from bnext.studies.runner import find_final_model, prepare_folder, timed
from bnext.tables import format_rows

__all__ = ["DESCRIPTION", "add_arguments", "execute", "run_demo"]

DESCRIPTION = """The main job in five minutes: a BN in a RetinaNet head fails, and is repaired without training.

    bnext demo

Trains a plain BN in the shared head on the digits set (made on first use), asks the doctor what is wrong with it,
re-estimates its population statistics for each level, and writes results.json, doctor.html and detections.png."""

logger = logging.getLogger(__name__)

# COCO AP of the same two heads, RetinaNet R50-FPN, 3x; Wu and Johnson 2021, Table 5, rows 3 and 4.
PAPER_AP = {"trained": 34.1, "re-estimated": 39.1}
_UNWATCHED = ("SOLVER.BNEXT.DOCTOR.WARN", "False", "SOLVER.BNEXT.DOCTOR.PERIOD", "0")  # the doctor is asked afterwards
# Of the boxes that are drawn: where the statistics do not fit, they lie loosely on the objects.
SCORE, IOU = 0.4, 0.75


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output", default="output/demo", metavar="FOLDER", help="folder for the results (default: %(default)s)"
    )
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="pairs that override the config")


def execute(args: argparse.Namespace) -> None:
    """Run the command."""
    trained = get_config_file("Digits-Detection/retinanet_R_18_FPN_BN.yaml")
    repaired = get_config_file("Digits-Detection/retinanet_R_18_FPN.yaml")
    run_demo(trained, repaired, args.output, args.opts)


def run_demo(trained: str, repaired: str, output: str, opts: Sequence[str] = ()) -> None:
    """Train a plain BN, re-estimate its statistics per level, print both APs beside the paper's, and draw them.

    Args:
        trained: YAML file of the head that is trained: one population for all levels.
        repaired: YAML file of the same head with a population for each level.
        output: folder of results.json, detections.png, and of both models.
        opts: KEY VALUE pairs that override both configs.

    Raises:
        BNextError: what is wrong, before training starts wherever it can be known.
    """
    print(f"digits set: {ensure_digits()}", flush=True)

    configs = {}
    for name, config_file in (("trained", trained), ("re-estimated", repaired)):
        configs[name] = load_config(config_file, [*opts, *_UNWATCHED, "OUTPUT_DIR", str(Path(output, name))])
    check_run(configs["trained"])
    with holding_output(output, "--output"):
        _run(configs, output, Origin("config", trained, tuple(opts)))


def _run(configs: Mapping[str, CfgNode], output: str, origin: Origin) -> None:
    set_up_logging(output)
    for cfg in configs.values():
        prepare_folder(cfg)

    results: dict[str, Any] = {"AP": {}, "seconds": {}}
    seconds = results["seconds"]

    logger.info("Training: a plain BN in the head that all levels share.")
    with timed(seconds, "train"):
        metrics = train(configs["trained"])
    results["AP"]["trained"] = flatten_metrics(metrics)["bbox/AP"]

    page = _ask_doctor(configs["trained"], origin, Path(output, "doctor.html"))

    logger.info("The same weights: statistics re-estimated for each level, without training.")
    with timed(seconds, "re-estimate"):
        model = repair_checkpoint(configs["re-estimated"], find_final_model(configs["trained"]))
    with timed(seconds, "evaluate"):
        metrics = evaluate_model(configs["re-estimated"], model)
    results["AP"]["re-estimated"] = flatten_metrics(metrics)["bbox/AP"]

    file = Path(output, "results.json")
    write_json(file, results)
    picture = _draw(configs, Path(output, "detections.png"))
    print(f"\n{format_results(results)}\n\n{file}\n{page}\n{picture}")


def _ask_doctor(cfg: CfgNode, origin: Origin, page: Path) -> Path:
    """Say in three lines what the doctor finds first, and write all of it as a page."""
    weights = find_final_model(cfg)
    cfg = load_config(origin.config_file, [*origin.opts, "MODEL.WEIGHTS", weights])

    facts, _ = examine_detector(cfg, dataclasses.replace(origin, weights=weights))
    diagnosis = examine_facts(facts)
    replace_file(page, lambda file: file.write(format_html(diagnosis).encode()))
    for finding in diagnosis.findings[:1]:
        logger.info("The doctor: %s, %s %s.", finding.severity, finding.code, finding.check.title)
        logger.info("    it cost %s (%s)", finding.check.cost, finding.check.source)
        logger.info("    its remedy: %s", finding.evidence.remedy.command)
    return page


def _draw(configs: Mapping[str, CfgNode], path: Path) -> Path:
    """Both models on the same images, and what their boxes in all images are."""
    columns = []
    for name, cfg in configs.items():
        columns.append(examine(cfg, load_model(cfg, find_final_model(cfg)), title=name, score=SCORE, iou=IOU))
    print(f"\n{format_counts(columns)}")

    cfg = configs["re-estimated"]
    images = choose_images(load_records(cfg.DATASETS.TEST[0], cfg), 4)
    thresholds = describe_thresholds(cfg.DATASETS.TEST[0], SCORE, IOU)
    note = f"The same weights, with other statistics in the head. {thresholds}"
    return draw_detections(columns, images, path, note=note, layout=Layout(cell=204))


def format_results(results: Mapping[str, Any]) -> str:
    """Our AP beside the paper's, and how long the repair took."""
    rows = [[name, f"{ap:.1f}", f"{PAPER_AP[name]:.1f}"] for name, ap in results["AP"].items()]
    table = format_rows(rows, ["the same weights", "AP digits", "AP COCO (paper)"])

    before, after = results["AP"]["trained"], results["AP"]["re-estimated"]
    took = results["seconds"]["re-estimate"]
    return f"{table}\n\nBefore and after: {before:.1f} -> {after:.1f} AP; the re-estimation took {took:.1f} s."

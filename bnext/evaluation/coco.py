"""Evaluation on cfg.DATASETS.TEST with COCO's metrics.

`evaluate_model` works on a model in memory and is for own loops as well as for the trainer. Every evaluator is tried
before it is believed: see `bnext.evaluation.rehearsal`.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.samplers import InferenceSampler
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.utils import comm
from torch import nn

from bnext.data.batches import build_evaluation_batches
from bnext.data.listed_sets import register_listed_sets
from bnext.data.records import Record, load_records
from bnext.errors import ConfigError
from bnext.evaluation.coco_evaluator import COCOEvaluator
from bnext.evaluation.domain_report import draw_domains, format_domains
from bnext.evaluation.domains import (
    DOMAINS,
    Metrics,
    Share,
    describe_domains,
    find_parts,
    gather_domains,
    split_by_domain,
    summarize,
)
from bnext.evaluation.rehearsal import rehearse
from bnext.evaluation.result_table import format_results
from bnext.files import naming_file, write_json
from bnext.layers.counts import UnseenCount, describe_unseen, take_unseen_counts
from bnext.layers.single_element import explaining_single_values
from bnext.layers.unseen import beginning_streams
from bnext.notices import gathering_notices, tell_once
from bnext.progress import Tracked
from bnext.scope.model import setting
from bnext.text import name_folder

__all__ = [
    "build_evaluator",
    "check_evaluator",
    "evaluate_model",
    "evaluate_with",
    "flatten_metrics",
]


def check_evaluator(dataset_name: str) -> None:
    """Refuse a data set that is not evaluated with COCO's metrics.

    Args:
        dataset_name: a registered data set.

    Raises:
        ConfigError: names the data set and the kind of evaluation that its metadata asks for.
    """
    metadata = MetadataCatalog.get(dataset_name)
    kind = getattr(metadata, "evaluator_type", "coco" if hasattr(metadata, "json_file") else None)

    if kind != "coco":
        thing = "DATASETS.TEST"
        rule = "name data sets with COCO evaluation"
        remedy = "Register it with detectron2's register_coco_instances, set its metadata's evaluator_type to 'coco' "
        remedy += "where its records hold boxes, or override Trainer.build_evaluator."
        raise ConfigError.of(thing, rule, got=repr(dataset_name), where=f"evaluator_type {kind!r}", remedy=remedy)


def build_evaluator(cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
    """The evaluator of a data set.

    Args:
        cfg: OUTPUT_DIR is read, and what `COCOEvaluator` reads.
        dataset_name: a registered data set in COCO's format.
        output_folder: for the detections; None: OUTPUT_DIR/inference.

    Raises:
        ConfigError: see `check_evaluator`.
        DatasetError: see `COCOEvaluator`.
    """
    check_evaluator(dataset_name)
    return COCOEvaluator(cfg, dataset_name, output_folder or os.path.join(cfg.OUTPUT_DIR, "inference"))


def evaluate_model(
    cfg: CfgNode,
    model: nn.Module,
    output_folder: str | None = None,
    *,
    build: Callable[..., DatasetEvaluator] = build_evaluator,
    within: Callable[[str], contextlib.AbstractContextManager[object]] = lambda name: contextlib.nullcontext(),
    specialists: Mapping[str, Metrics] | None = None,
) -> OrderedDict[str, Any]:
    """COCO AP of a model on every data set of cfg.DATASETS.TEST, and of every domain of their images.

    Args:
        cfg: DATASETS.TEST, INPUT.*, DATALOADER.NUM_WORKERS and OUTPUT_DIR are read.
        model: a detection model; its mode is put back afterwards.
        output_folder: for the detections, `results.json` and, with several domains, `domains.png`; None:
            OUTPUT_DIR/inference.
        build: makes the evaluator from config, data set and folder.
        within: called with the name of a data set, opens the scope in which it is evaluated.
        specialists: domain -> metrics of the detector that was trained on it alone, see `read_specialists`.

    Returns:
        {"bbox": {"AP": ..., ...}, ...} on the main process, with AP from 0 to 100; with several data
        sets one such dictionary for each, by name. With images of several domains there is
        {"domains": {"<domain>": {"bbox": ...}, ..., "mean": ..., "worst": ...}} beside it, see `summarize`.
        Empty dictionaries on the other workers.

    Raises:
        DatasetError: see `rehearse`, which tries an evaluator before it is used for the first time.

    Note:
        A collective: every worker evaluates its share of the images.
    """
    register_listed_sets(cfg)
    rehearse(cfg, build=build)

    results: OrderedDict[str, Any] = OrderedDict()
    folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
    names = list(cfg.DATASETS.TEST)
    shares: list[Share] = []

    for name in names:
        # One folder each, as every evaluator writes the same file names.
        evaluator = build(cfg, name, folder if len(names) == 1 else os.path.join(folder, name_folder(name)))
        records = load_records(name, cfg)
        with naming_file(folder), within(name):
            results[name] = evaluate_with(cfg, model, name, evaluator, records=records)
        shares += split_by_domain(name, records, results[name], evaluator)

    if not names or not comm.is_main_process():
        return results[names[0]] if len(names) == 1 else results

    domains = gather_domains(shares, specialists)
    is_told = len(domains) > 1 or any(domain.specialist for domain in domains)
    described = {DOMAINS: describe_domains(domains)} if is_told else {}
    write_json(os.path.join(folder, "results.json"), {**results, **described})
    if is_told:
        picture = draw_domains(domains, os.path.join(folder, "domains.png"))
        logging.getLogger(__name__).info("%s\n\n%s", format_domains(domains), picture)

    answer = OrderedDict(results[names[0]] if len(names) == 1 else results)
    if len(domains) > 1:
        answer[DOMAINS] = summarize(domains)
    return answer


def evaluate_with(
    cfg: CfgNode,
    model: nn.Module,
    name: str,
    evaluator: DatasetEvaluator,
    images_per_batch: int = 1,
    *,
    records: Sequence[Record] | None = None,
) -> dict[str, Any]:
    """Results of one evaluator on one data set.

    Args:
        cfg, model: see `evaluate_model`.
        name: the data set.
        evaluator: takes in the detections.
        images_per_batch: that a worker evaluates together.
        records: of the set; None: they are loaded.

    Note:
        The results are logged as one table. What the evaluator prints (pycocotools: the same numbers) becomes a record
        for log.txt, of level DEBUG.
    """
    records = load_records(name, cfg) if records is None else records
    if isinstance(evaluator, COCOEvaluator):
        evaluator.parts = find_parts(records)
        evaluator.image_ids = [record["image_id"] for record in records]
        if len(records) < evaluator.num_listed:
            message = "Data set '%s' has %d of the %d images of its annotation file: it is evaluated on these."
            tell_once(logging.getLogger(__name__), name, message, name, len(records), evaluator.num_listed)
    batches = build_evaluation_batches(cfg, records, InferenceSampler(len(records)), images_per_batch)
    loader: Any = Tracked(batches, f"evaluating {name}", "batch", is_wanted=comm.is_main_process())
    begin = time.perf_counter()

    # The modes of all modules, which inference_on_dataset makes equal, and leaves in evaluation mode when it fails.
    with (
        gathering_notices(),
        setting(model.modules(), training=False),
        beginning_streams(model),
        _telling_unseen(model, name),
        _log_prints(),
        explaining_single_values(name),
    ):
        results = inference_on_dataset(model, loader, evaluator)

    if comm.is_main_process() and results:
        print_csv_format(results)  # which scripts read from log.txt
        engine, recalls = getattr(evaluator, "engine", ""), getattr(evaluator, "recalls", None)
        by = f", metrics by {engine}" if recalls else ""  # else nothing was detected
        head = f"Evaluation on {name}: {len(records):,} images in {time.perf_counter() - begin:.1f} s{by}."
        logging.getLogger(__name__).info("%s", format_results(head, results, recalls, "results.json"))
    return results


@contextlib.contextmanager
def _telling_unseen(model: nn.Module, name: str) -> Iterator[None]:
    """Say of the images in the block what those of domains that the model has not were taken for. A collective."""
    take_unseen_counts(model)
    yield

    counts: Counter[UnseenCount] = sum(comm.gather(take_unseen_counts(model)), Counter())
    for line in describe_unseen(counts):
        logging.getLogger(__name__).info("%s: %s.", name, line)


@contextlib.contextmanager
def _log_prints() -> Iterator[None]:
    """Log what is printed in the block as one record, for log.txt alone: no progress bar is garbled."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        text = printed.getvalue().strip("\n")
        if text:
            logging.getLogger(__name__).debug("Printed by the evaluation:\n%s", text)


def flatten_metrics(metrics: Mapping[str, Any], tasks: Sequence[str] = ("bbox",)) -> dict[str, float | None]:
    """{"bbox/AP": ...}; a model without a single detection has AP 0, a size without objects has none."""
    flat: dict[str, float | None] = {}

    for task in tasks:
        values = metrics.get(task, {})
        has_no_detections = all(math.isnan(value) for value in values.values())
        missing = 0.0 if has_no_detections else None
        for name, value in values.items():
            flat[f"{task}/{name}"] = missing if math.isnan(value) else value

    return flat

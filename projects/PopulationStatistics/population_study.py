"""The study of moving averages: along a training, and against the normalization batch size.

Each normalization batch size (NBS) is a training, which is read in three ways. Checkpoints along the first one are
evaluated with the moving average of the file, and with statistics re-estimated on more and more training images.
Tables and plot are in `population_tables`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from population_tables import MOVING_AVERAGE, draw_results, format_tables
from torch import nn

from bnext.checkpoints.checkpointer import load_model
from bnext.cli.train import check_run
from bnext.config.recipe import read_place
from bnext.data.batches import build_validation_batches
from bnext.data.check_coco import check_datasets
from bnext.data.records import load_records
from bnext.errors import ConfigError
from bnext.evaluation.coco import build_evaluator, evaluate_with, flatten_metrics
from bnext.evaluation.compare import read_three_ways
from bnext.evaluation.reestimate import recompute_statistics
from bnext.evaluation.validation_loss import compute_validation_loss
from bnext.layers import NormSpec
from bnext.repair.kinds import normalizing_evaluation_by_mini_batch
from bnext.scope.model import restoring
from bnext.studies.runner import check_rows, find_final_model, load_row, run_study, timed, train_row

__all__ = ["PARTS", "SAMPLES", "SIZES", "load_rows", "run_rows"]

PARTS = ("training", "nbs")
SIZES = (8, 4, 2)  # of the first one checkpoints are evaluated
SAMPLES = (8, 32, 128, 400)
_PLACES = ("RESNETS", "RETINANET")
_FRACTIONS = (8, 4, 2, 1)  # checkpoints at an eighth of the training, ...


def load_rows(
    config_files: Mapping[int, str],
    output: str,
    parts: Sequence[str] = PARTS,
    samples: Sequence[int] = SAMPLES,
    opts: Sequence[str] = (),
) -> dict[str, CfgNode]:
    """The configs of all rows, each with its own folder in `output`, checked before anything runs.

    Args:
        config_files: normalization batch size -> YAML file of its training; the first one for the checkpoints, too.
        output: folder of the study.
        parts: some of `PARTS`; without "nbs" the first size alone is trained.
        samples: training images of the re-estimations.
        opts: KEY VALUE pairs that override every config.

    Returns:
        "nbs_8" and so on, which are trained, and "iteration_100" and so on, checkpoints of the first.

    Raises:
        BNextError: a config, a data set, the folder or a number of images is wrong.
    """
    sizes = list(config_files) if "nbs" in parts else list(config_files)[:1]
    configs = {}
    for size in sizes:
        cfg = load_row(config_files[size], output, f"nbs_{size}", opts)
        _check_size(size, cfg, config_files[size])
        configs[f"nbs_{size}"] = cfg

    first = next(iter(configs.values()))
    if "training" in parts:
        for iteration in _find_iterations(first):
            row = f"iteration_{iteration}"
            configs[row] = load_row(config_files[sizes[0]], output, row, opts)

    check_rows(configs)
    check_run(first)
    check_datasets(first.DATASETS.TRAIN, cfg=first)
    _check_samples(first, samples)
    return configs


def _check_size(size: int, cfg: CfgNode, file: str) -> None:
    """All norms have the row's mini-batches, and a worker's batch holds whole ones."""
    for place in _PLACES:
        spec = read_place(cfg, place).norm
        given = spec.normalization_batch_size if isinstance(spec, NormSpec) else spec
        if given != size:
            thing = f"MODEL.BNEXT.{place}.NORMALIZATION_BATCH_SIZE"
            rule = f"be {size} in row nbs_{size}"
            remedy = f"Correct it, and let MODEL.{place}.NORM be BN."
            raise ConfigError.of(thing, rule, got=repr(given), where=f"--opts or {file}", remedy=remedy)

    total = cfg.SOLVER.IMS_PER_BATCH
    if total % size:
        rule = f"be a multiple of {size}, the images that are normalized together"
        remedy = f"Use {size * max(1, total // size)}."
        raise ConfigError.of("SOLVER.IMS_PER_BATCH", rule, got=total, where=f"row nbs_{size}", remedy=remedy)


def _find_iterations(cfg: CfgNode) -> list[int]:
    """At which checkpoints are evaluated."""
    longest, period, number = cfg.SOLVER.MAX_ITER, cfg.SOLVER.CHECKPOINT_PERIOD, max(_FRACTIONS)
    if longest != period * number:
        thing = "SOLVER.MAX_ITER"
        rule = f"be {number} times SOLVER.CHECKPOINT_PERIOD, as checkpoints at 1/8, 1/4, 1/2 and the end are evaluated"
        remedy = "Set both."
        raise ConfigError.of(thing, rule, got=f"{longest} and {period}", where="--parts training", remedy=remedy)
    return [longest // fraction for fraction in _FRACTIONS]


def _check_samples(cfg: CfgNode, samples: Sequence[int]) -> None:
    number, batch = sum(len(load_records(name, cfg)) for name in cfg.DATASETS.TRAIN), cfg.SOLVER.IMS_PER_BATCH
    for wanted in samples:
        if not 1 <= wanted <= number or wanted % batch:
            rule = f"be multiples of the {batch} images of a batch, at most the {number} training images"
            remedy = "Choose others."
            raise ConfigError.of("--samples", rule, got=wanted, where=", ".join(cfg.DATASETS.TRAIN), remedy=remedy)


def run_rows(
    configs: Mapping[str, CfgNode], output: str, title: str, samples: Sequence[int] = SAMPLES, resume: bool = False
) -> None:
    """Train, re-estimate and evaluate; print the tables, write `output`/results.json and, if it can be, training.png.

    Args:
        configs: of `load_rows`.
        output: folder of the study.
        title: heading of our numbers, for example "digits".
        samples: training images of the re-estimations.
        resume: go on with trainings that are under way; finished ones are evaluated again.

    Note:
        results.json: see `bnext.studies.runner.run_study`.
    """
    run_row = partial(_run_row, samples=samples)
    tasks = ("bbox", "reading", MOVING_AVERAGE, *(f"samples_{number}" for number in samples))
    show = partial(format_tables, title=title)
    run_study(configs, output, run_row, _describe, show, tasks=tasks, resume=resume)

    results = json.loads(Path(output, "results.json").read_text())
    if any(row.startswith("iteration_") for row in results["rows"]):
        draw_results(results, os.path.join(output, "training.png"))


def _describe(row: str) -> str:
    kind, number = row.split("_")
    if kind == "nbs":
        return f"mini-batches of {number} images in training; three readings"
    return f"statistics of the checkpoint of iteration {number}"


def _run_row(
    row: str, configs: Mapping[str, CfgNode], seconds: dict[str, float], resume: bool, samples: Sequence[int]
) -> Mapping[str, Any]:
    kind, number = row.split("_")
    cfg = configs[row]

    if kind == "nbs":
        metrics = train_row(f"_{row}", cfg, seconds, resume)
        with timed(seconds, f"read_row_{row}"):
            return {**metrics, "reading": _read(cfg, int(number))}

    trained = next(iter(configs.values()))
    weights = os.path.join(trained.OUTPUT_DIR, f"model_{int(number) - 1:07d}.pth")
    with timed(seconds, f"evaluate_row_{row}"):
        return _evaluate(cfg, weights, samples)


def _evaluate(cfg: CfgNode, weights: str, samples: Sequence[int]) -> dict[str, dict[str, float]]:
    """AP and loss of a checkpoint with the statistics of its file, and with those of so many training images."""
    model = load_model(cfg, weights)
    results = {MOVING_AVERAGE: {"samples": 0, **_measure(cfg, model, MOVING_AVERAGE)}}

    for number in samples:
        with restoring(model):
            report = recompute_statistics(cfg, model, num_batches=number, num_samples=number)
            results[f"samples_{number}"] = {
                "samples": report.num_samples,
                "standard_error": _as_number(max(estimate.error for estimate in report.reached)),
                "mean_shift": max(estimate.mean_shift for estimate in report.reached),
                **_measure(cfg, model, f"samples_{number}"),
            }

    return results


def _measure(cfg: CfgNode, model: nn.Module, folder: str) -> dict[str, float]:
    return {"AP": _compute_ap(cfg, model, folder), "loss": _compute_loss(cfg, model)}


def _compute_loss(cfg: CfgNode, model: nn.Module) -> float:
    batches = build_validation_batches(cfg, cfg.DATASETS.TEST[0])
    return _as_number(compute_validation_loss(model, batches, seed=max(cfg.SEED, 0))["total_loss"])


def _compute_ap(cfg: CfgNode, model: nn.Module, folder: str, images_per_batch: int = 1) -> float:
    name = cfg.DATASETS.TEST[0]
    evaluator = build_evaluator(cfg, name, os.path.join(cfg.OUTPUT_DIR, "inference", folder))
    metrics = evaluate_with(cfg, model, name, evaluator, images_per_batch)
    return flatten_metrics(metrics)["bbox/AP"] or 0.0


def _as_number(value: float) -> float:
    """NaN for a number that is not finite: it becomes null in results.json."""
    return value if math.isfinite(value) else math.nan


def _read(cfg: CfgNode, size: int) -> dict[str, float]:
    """Loss in three ways and AP in two; the population statistics are precise, of TEST.PRECISE_BN.NUM_ITER batches."""
    model = load_model(cfg, find_final_model(cfg))
    reading = {"normalization_batch_size": size, "moving_average_loss": _compute_loss(cfg, model)}

    recompute_statistics(cfg, model)
    ways = read_three_ways(cfg, model)
    for way in ("mini_batch_train", "mini_batch_val", "population_val"):
        reading[f"{way}_loss"] = _as_number(ways[way]["loss"])
    for part in ("generalization_gap", "inconsistency"):
        reading[part] = _as_number(ways[part])

    reading["population_val_AP"] = _compute_ap(cfg, model, "population")
    with normalizing_evaluation_by_mini_batch(model):  # so many images at once are a mini-batch, as in training
        reading["mini_batch_val_AP"] = _compute_ap(cfg, model, "mini_batch", images_per_batch=size)

    return reading

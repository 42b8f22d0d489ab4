"""Three questions about a head that levels share, each a trial: groups of levels, rows 2 and 3, the size of a repair.

Every function takes the trainings and a seed, and gives numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode
from level_populations import (
    Populations,
    load_with_levels,
    measure_distances,
    measure_errors,
    measure_levels,
    merge_batches,
    merge_levels,
    mix_populations,
    read_populations,
    remembering_features,
    write_populations,
)
from torch import nn
from trained_detectors import HEADS, Trainings, evaluate, list_groups

from bnext.checkpoints import load_model
from bnext.data.loader import build_train_loader

__all__ = ["ask_groups", "ask_levels", "ask_repair", "number_depths"]


# ---- partial sharing


def ask_groups(trainings: Trainings, seed: int) -> dict[str, Any]:
    """Every training, tested with the populations of every grouping.

    Returns:
        training -> "as trained" (its moving averages) or a grouping -> AP. All groupings are merged from one pass over
        training images, in which the mini-batches are those of the training.
    """
    groupings = {name: list_groups(trainings.load(name, seed)) for name in HEADS}

    numbers: dict[str, Any] = {}
    for name in HEADS:
        cfg, weights = trainings.find(name, seed)
        levels = merge_batches(_measure(cfg, weights, trainings.setting.num_batches))
        model = load_with_levels(cfg, weights)

        with remembering_features(model):
            numbers[name] = {"as trained": evaluate(cfg, model)}
            for grouping, groups in groupings.items():
                numbers[name][grouping] = _evaluate_with(cfg, model, merge_levels(levels, groups))
    return numbers


# ---- why row 2 collapses, and row 3 does not


def ask_levels(trainings: Trainings, seed: int) -> dict[str, Any]:
    """Rows 1 and 3, from the population that all levels share to one for each: rows 2 and 4.

    Returns:
        For each training ("shared", "per_level"): "distances", path -> level -> how far its population is from the
        shared one; and AP with the populations of the levels in place of the shared one: "shares" of the way there,
        "depths", in the first so many norms of each tower, "levels", at one level alone.
    """
    return {name: _ask_training(trainings, name, seed) for name in ("shared", "per_level")}


def _ask_training(trainings: Trainings, name: str, seed: int) -> dict[str, Any]:
    cfg, weights = trainings.find(name, seed)
    own_of_levels = merge_batches(_measure(cfg, weights, trainings.setting.num_batches))
    model = load_with_levels(cfg, weights)
    shared = read_populations(model)

    distances = measure_distances(own_of_levels, shared)
    numbers: dict[str, Any] = {
        "distances": {path: {k: v._asdict() for k, v in levels.items()} for path, levels in distances.items()}
    }
    depths = number_depths(own_of_levels)
    with remembering_features(model):
        numbers["shares"] = {}
        for share in trainings.setting.shares:
            mixed = mix_populations(shared, own_of_levels, share)
            numbers["shares"][f"{share:g}"] = _evaluate_with(cfg, model, mixed)

        numbers["depths"] = {}
        for depth in range(max(depths.values()) + 1):
            replaced = {path: (own_of_levels if depths[path] < depth else shared)[path] for path in shared}
            numbers["depths"][str(depth)] = _evaluate_with(cfg, model, replaced)

        numbers["levels"] = {}
        for level in cfg.MODEL.RETINANET.IN_FEATURES:
            alone = {path: {**of_path, level: own_of_levels[path][level]} for path, of_path in shared.items()}
            numbers["levels"][level] = _evaluate_with(cfg, model, alone)
    return numbers


def number_depths(populations: Populations) -> dict[str, int]:
    """Path of each norm -> how many are before it in its tower."""
    depths: dict[str, int] = {}
    towers: dict[str, int] = {}
    for path in populations:
        tower = path.rpartition(".")[0]
        depths[path] = towers.setdefault(tower, 0)
        towers[tower] += 1
    return depths


# ---- how many images a repair needs


def ask_repair(trainings: Trainings, seed: int) -> dict[str, Any]:
    """Row 3 -> row 4 from N images.

    Returns:
        "as trained" -> AP; "images" -> N -> lists over draws: "AP", "error", of each level's mean as it differs from
        that of twice the largest N (in standard deviations, mean over channels and norms), and "standard error", which
        is estimated from the draw alone and needs two batches.
    """
    cfg, weights = trainings.find("per_level", seed)
    model = load_with_levels(cfg, weights)
    numbers: dict[str, Any] = {"images": {}}

    num_images = 2 * max(trainings.setting.images)
    reference = merge_batches(_measure(cfg, weights, num_images // cfg.SOLVER.IMS_PER_BATCH))
    with remembering_features(model):
        numbers["as trained"] = evaluate(cfg, model)
        for number in trainings.setting.images:
            draws = []
            for draw in range(trainings.setting.num_draws):
                draws.append(_repair_from(_draw(cfg, number, 1 + draw), weights, model, number, reference))
            numbers["images"][str(number)] = {key: [of_draw[key] for of_draw in draws] for key in draws[0]}
    return numbers


def _repair_from(
    cfg: CfgNode, weights: str, model: nn.Module, num_images: int, reference: Populations
) -> dict[str, Any]:
    measured = _measure(cfg, weights, num_images // cfg.SOLVER.IMS_PER_BATCH)
    populations = merge_batches(measured)

    distances = measure_distances(populations, reference)
    errors = {}
    for level in cfg.MODEL.RETINANET.IN_FEATURES:
        errors[level] = sum(of_path[level].mean for of_path in distances.values()) / len(distances)
    standard_errors = measure_errors(measured) if len(measured) > 1 else None

    return {
        "AP": _evaluate_with(cfg, model, populations)["AP"],
        "error": errors,
        "standard error": standard_errors,
    }


def _draw(cfg: CfgNode, num_images: int, draw: int) -> CfgNode:
    """The config with another order of the images, in batches of at most so many."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED += 1000 * draw
    cfg.SOLVER.IMS_PER_BATCH = min(cfg.SOLVER.IMS_PER_BATCH, num_images)
    return cfg


def _measure(cfg: CfgNode, weights: str, num_batches: int) -> list[Populations]:
    batches: Iterator[Any] = itertools.islice(build_train_loader(cfg), num_batches)
    return measure_levels(load_model(cfg, weights), batches)


def _evaluate_with(cfg: CfgNode, model: nn.Module, populations: Populations) -> dict[str, Any]:
    write_populations(model, populations)
    return evaluate(cfg, model)

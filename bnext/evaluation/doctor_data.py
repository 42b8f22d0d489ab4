"""Facts for the doctor that the images of a config show: a few batches, or a pass over images and an evaluation.

A data set that cannot be read, or a forward that fails, becomes a sentence of the facts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import tempfile
from functools import partial
from typing import Any, Literal

from detectron2.config import CfgNode
from detectron2.evaluation import inference_on_dataset
from torch import nn

from bnext.config.keys import KEYS
from bnext.config.recipe import resolve_norms
from bnext.data.batches import build_evaluation_batches, build_validation_batches
from bnext.data.domains import find_domain, select_sets
from bnext.data.listed_sets import register_listed_sets
from bnext.data.loader import build_train_loader
from bnext.data.records import load_records
from bnext.diagnostics.collecting.depths import (
    Statistics,
    add_failure,
    examine_population,
    observe_batches,
    observe_images,
)
from bnext.diagnostics.facts import Facts
from bnext.evaluation.coco import build_evaluator, flatten_metrics
from bnext.evaluation.reestimate import recompute_statistics
from bnext.evaluation.validation_loss import compute_validation_loss
from bnext.heads import forward_sampled_rois
from bnext.heads.statistics import choose_forward
from bnext.notices import gathering_notices
from bnext.progress import Tracked
from bnext.scope.model import restoring, setting

__all__ = ["DEFAULT_IMAGES", "add_data_facts"]

DEFAULT_IMAGES = {"forward": 2, "full": 1000}  # half a minute of a R50-FPN on two cores; enough for statistics
_NUM_OF_DOMAIN = 4  # images that are run at least, so that what differs by chance is known
_NUM_PICTURES = 16  # that are read for their pixels alone
_SEED = 0


def add_data_facts(
    facts: Facts, cfg: CfgNode, model: nn.Module, depth: Literal["forward", "full"], num_images: int | None = None
) -> Facts:
    """Facts of a detector with those that its images show.

    Args:
        facts: see `examine_detector`.
        cfg: DATASETS.TRAIN, as the training reads it, and DATASETS.TEST.
        model: as it was afterwards.
        depth: "forward": a few training batches, in the size of a worker's, and the pixels of test images. "full": in
            addition a re-estimation on training images, and AP and loss of three kinds of statistics.
        num_images: of training that are run at depth "forward", or of training and of test at "full", at most; None:
            `DEFAULT_IMAGES`.
    """
    number = num_images or DEFAULT_IMAGES[depth]
    few = number if depth == "forward" else min(number, _count_images(facts))
    with gathering_notices(), restoring(model, seed=_SEED):
        facts = _observe_training(facts, cfg, model, few)
        facts = _observe_test(facts, cfg)

    if depth == "full":
        facts = _examine_fully(facts, cfg, model, number)
    return facts


# ---- depth "forward"


def _observe_training(facts: Facts, cfg: CfgNode, model: nn.Module, num_images: int) -> Facts:
    wanted = _count_images(facts)
    size = min(wanted, num_images)
    if size < wanted:
        cut = f"Batches of {size} images were run, where a worker has {wanted} in training (--num-images {wanted})."
        facts = dataclasses.replace(facts, failures=(*facts.failures, cut))

    try:
        domains = _find_domains(cfg)
        loader = build_train_loader(_with_batches_of(cfg, size))
    except Exception as error:
        return add_failure(facts, "Reading DATASETS.TRAIN", error)
    try:
        facts = observe_images(facts, "train", itertools.islice(loader, -(-_NUM_PICTURES // size)))  # of all domains
    except Exception as error:
        return add_failure(facts, "Reading training images", error)

    for domain, names in domains.items():
        part = cfg.clone()
        part.defrost()
        select_sets(part, "TRAIN", names)
        number = -(-max(num_images, _NUM_OF_DOMAIN if domain else 1) // size)
        facts = _observe_sets(facts, _with_batches_of(part, size), model, domain or None, number)
    if len(domains) > 1 and facts.training is not None:
        facts = dataclasses.replace(facts, training=dataclasses.replace(facts.training, mixes_domains=wanted > 1))
    return facts


def _observe_sets(facts: Facts, cfg: CfgNode, model: nn.Module, domain: str | None, num_batches: int) -> Facts:
    """Facts with batches of the training sets of one domain."""
    try:
        loader = build_train_loader(cfg)
    except Exception as error:
        return add_failure(facts, "Reading DATASETS.TRAIN", error)

    names = resolve_norms(cfg).domains
    if names and domain not in names:
        domain = None  # the fallback is taken, if there is one

    in_training = choose_forward(model, [norm.path for norm in facts.norms])
    forward = None if in_training is forward_sampled_rois else in_training
    options: dict[str, Any] = {"forward": forward, "forward_in_training": in_training, "progress": True}
    return observe_batches(facts, model, loader, num_batches=num_batches, domain=domain, **options)


def _observe_test(facts: Facts, cfg: CfgNode) -> Facts:
    if not cfg.DATASETS.TEST:
        return facts
    try:
        records = load_records(cfg.DATASETS.TEST[0], cfg)
        step = max(1, len(records) // _NUM_PICTURES)  # neighbours may be alike
        chosen = range(0, len(records), step)[:_NUM_PICTURES]
        return observe_images(facts, "test", build_evaluation_batches(_with_batches_of(cfg, 1), records, chosen))
    except Exception as error:
        return add_failure(facts, "Reading DATASETS.TEST", error)


def _find_domains(cfg: CfgNode) -> dict[str, tuple[str, ...]]:
    """Domain -> the training sets of it; "": all, unless each set has a domain and there are several."""
    register_listed_sets(cfg)
    names = tuple(cfg.DATASETS.TRAIN)
    of_sets = {name: find_domain(cfg, name) for name in names}
    domains = sorted(set(of_sets.values()))
    if not names or "" in domains:
        return {"": names}
    return {domain: tuple(name for name in names if of_sets[name] == domain) for domain in domains}


def _count_images(facts: Facts) -> int:
    """Images of a worker that go through the model together."""
    training = facts.training
    return 1 if training is None else training.images_per_worker or 1


def _change(cfg: CfgNode, **values: Any) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(list(itertools.chain.from_iterable(values.items())))
    return cfg


def _with_batches_of(cfg: CfgNode, size: int) -> CfgNode:
    """A config whose training batches have so many images, of whatever domain; this process reads them."""
    values = {"SOLVER.IMS_PER_BATCH": size, "SOLVER.BNEXT.ACCUMULATE": 1, "DATALOADER.NUM_WORKERS": 0}
    values |= {key.name: key.default for key in KEYS.values() if key.name.startswith("DATALOADER.BNEXT.")}
    return _change(cfg, **values)


# ---- depth "full"


def _examine_fully(facts: Facts, cfg: CfgNode, model: nn.Module, num_images: int) -> Facts:
    if facts.weights is None or not facts.weights.is_loaded:
        failure = "There are no trained weights on this machine (MODEL.WEIGHTS): nothing is evaluated."
        return dataclasses.replace(facts, failures=(*facts.failures, failure))

    cfg = _with_batches_of(cfg, _count_images(facts))
    recompute = partial(recompute_statistics, cfg, num_batches=-(-num_images // cfg.SOLVER.IMS_PER_BATCH))
    options: dict[str, Any] = {}
    if cfg.DATASETS.TEST:
        name = cfg.DATASETS.TEST[0]
        options["dataset"] = name
        options["loss"] = partial(_measure_loss, cfg, name, num_images)
        options["score"] = partial(_measure_ap, cfg, name, num_images)
    with gathering_notices(), restoring(model, seed=_SEED):
        return examine_population(facts, model, recompute, **options)


def _measure_loss(cfg: CfgNode, name: str, num_images: int, model: nn.Module, statistics: Statistics) -> float:
    number = -(-num_images // cfg.SOLVER.IMS_PER_BATCH)
    cfg = _change(cfg, **{"TEST.BNEXT.VALIDATION_LOSS.NUM_BATCHES": number})
    losses = compute_validation_loss(model, build_validation_batches(cfg, name), statistics=statistics, seed=_SEED)
    return losses["total_loss"]


def _measure_ap(cfg: CfgNode, name: str, num_images: int, model: nn.Module, statistics: Statistics) -> float:
    """COCO's box AP on the first images; with mini-batches as many together as in training."""
    records = load_records(name, cfg)[:num_images]
    size = cfg.SOLVER.IMS_PER_BATCH if statistics == "mini_batch" else 1

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        evaluator: Any = build_evaluator(cfg, name, folder)
        evaluator.evaluate = partial(evaluator.evaluate, img_ids=[record["image_id"] for record in records])
        batches = build_evaluation_batches(cfg, records, range(len(records)), size)
        loader: Any = Tracked(batches, f"evaluating {name}", "batch")
        silent = [getattr(evaluator, "_logger", None)]  # it says of a model that detects nothing that it does
        with setting(model.modules(), training=False), setting(silent, disabled=True):
            metrics = inference_on_dataset(model, loader, evaluator) or {}
    return flatten_metrics(metrics).get("bbox/AP") or 0.0

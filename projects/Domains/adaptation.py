"""When to adapt: a detector that was trained on clean images, tested on corrupted ones with each kind of statistics.

Section 5 of the paper on a detector: the statistics of the source, of N images of the target, of each image, a blend of
source and image, and a stream; and the clean set under the statistics of each target. Then a stream of images whose
domain changes, and comes back.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.evaluation import inference_on_dataset
from torch import nn

from bnext.checkpoints import load_model
from bnext.cli.train import check_run
from bnext.data.batches import build_evaluation_batches, build_shuffled_batches
from bnext.data.records import load_records
from bnext.engine.trainer import train
from bnext.evaluation.coco import build_evaluator, flatten_metrics
from bnext.evaluation.reestimate import recompute_statistics
from bnext.layers.unseen import applying_rule
from bnext.scope import use_domain
from bnext.scope.model import keeping_buffers
from bnext.studies.runner import find_final_model, load_row, timed

__all__ = [
    "CORRUPTIONS",
    "NUM_TARGET_IMAGES",
    "PHASES",
    "RULES",
    "describe",
    "measure_ap",
    "name_variant",
    "load_configs",
    "run_stream",
    "run_targets",
]

logger = logging.getLogger(__name__)

SOURCE = "clean"
# Name in a table -> suffix of the set's variant.
CORRUPTIONS = {
    "low contrast": "low_contrast_4",
    "invert": "invert_5",
    "Gaussian noise": "gaussian_noise_3",
    "fog": "fog_3",
    "motion blur": "motion_blur_3",
    "JPEG": "jpeg_compression_3",
}
NUM_TARGET_IMAGES = (8, 32, 128, 400)
# Rules for an image of an unseen domain, with what their weight is.
RULES: Mapping[str, dict[str, Any]] = {
    "source": {"unseen": "fallback", "fallback_domain": SOURCE},
    "each image": {"unseen": "mini_batch"},
    "blend": {"unseen": "blend"},
    "blend, 16 images": {"unseen": "blend", "source_images": 16},
    "stream": {"unseen": "stream"},
}
# Of a stream: clean, four corruptions in turn, three rounds, and clean again.
_TURNS = ("Gaussian noise", "fog", "low contrast", "invert")
PHASES = (SOURCE, *_TURNS * 3, SOURCE)


def load_configs(
    file: str, output: str, seeds: Sequence[int], opts: Sequence[str] = (), num_workers: int = 1
) -> dict[int, CfgNode]:
    """Seed -> the config of the detector of clean images, which is trained once for both parts; the first is checked.

    Args:
        file: YAML of one domain.
        output: folder of the study.
        seeds: of the trainings.
        opts: KEY VALUE pairs that override every config.
        num_workers: that will train.

    Raises:
        BNextError: a config, a data set or the folder is wrong.
    """
    configs = {seed: load_row(file, output, f"source_seed{seed}", ["SEED", str(seed), *opts]) for seed in seeds}
    check_run(next(iter(configs.values())), num_workers)
    return configs


def describe(seed: int) -> str:
    """A row of both parts in words, for the log."""
    return f"the detector of clean images with seed {seed}"


def load_source(cfg: CfgNode, seconds: dict[str, float]) -> nn.Module:
    """The detector of clean images, trained unless its file is there."""
    weights = find_final_model(cfg)
    if not os.path.exists(weights):
        with timed(seconds, f"train_seed{cfg.SEED}"):
            train(cfg, resume=True)
    return load_model(cfg, weights)


def run_targets(
    seed: int, configs: Mapping[int, CfgNode], seconds: dict[str, float], resume: bool
) -> dict[str, dict[str, float]]:
    """AP of every target with every kind of statistics; see `bnext.studies.runner.run_study`.

    Returns:
        Target -> kind -> AP from 0 to 100; and, as the target "clean under", corruption -> AP of the clean set.
    """
    cfg = configs[seed]
    model = load_source(cfg, seconds)
    with timed(seconds, f"targets_seed{seed}"):
        return _measure_targets(cfg, model)


def _measure_targets(cfg: CfgNode, model: nn.Module) -> dict[str, dict[str, float]]:
    train_set, test_set = cfg.DATASETS.TRAIN[0], cfg.DATASETS.TEST[0]
    results: dict[str, dict[str, float]] = {"clean under": {}}

    for target in (SOURCE, *CORRUPTIONS):
        name = name_variant(test_set, target)
        aps = results[target] = {}
        for rule, answers in RULES.items():
            with applying_rule(model, **answers):
                aps[rule] = measure_ap(cfg, model, name)

        for number in NUM_TARGET_IMAGES:
            with adapted(cfg, model, name_variant(train_set, target), number):
                aps[f"N = {number}"] = measure_ap(cfg, model, name, domain=SOURCE)
                if target != SOURCE and number == NUM_TARGET_IMAGES[-1]:
                    results["clean under"][target] = measure_ap(cfg, model, test_set, domain=SOURCE)
        logger.info("%s: %s.", target, ", ".join(f"{kind} {ap:.1f}" for kind, ap in aps.items()))
    return results


@contextlib.contextmanager
def adapted(cfg: CfgNode, model: nn.Module, name: str, num_images: int) -> Iterator[None]:
    """In this scope the population is that of so many images of a set, without labels."""
    batches = build_shuffled_batches(cfg, [name], domains=[SOURCE])
    with keeping_buffers(model.modules()):
        recompute_statistics(cfg, model, batches=batches, num_samples=num_images)
        yield


def measure_ap(
    cfg: CfgNode, model: nn.Module, name: str, *, domain: str | None = None, images: Sequence[int] | None = None
) -> float:
    """COCO AP on a set, or on some of its images by their index.

    Args:
        cfg: INPUT.* and OUTPUT_DIR are read.
        model: the detector.
        name: of the set.
        domain: of its images; None: one that the model has not.
        images: indices, in the order in which they come; None: all.
    """
    records = load_records(name, cfg)
    indices = range(len(records)) if images is None else images
    chosen = [{**records[index], "domain": domain or "target"} for index in indices]

    evaluator = build_evaluator(cfg, name, os.path.join(cfg.OUTPUT_DIR, "inference", name.replace("@", "_")))
    evaluator.evaluate = partial(evaluator.evaluate, img_ids=[record["image_id"] for record in chosen])
    batches: Any = build_evaluation_batches(cfg, chosen, range(len(chosen)))
    scope = use_domain(domain) if domain else contextlib.nullcontext()
    with scope, contextlib.redirect_stdout(io.StringIO()):
        metrics = inference_on_dataset(model, batches, evaluator)
    return flatten_metrics(metrics)["bbox/AP"] or 0.0


def run_stream(
    seed: int, configs: Mapping[int, CfgNode], seconds: dict[str, float], resume: bool
) -> dict[str, dict[str, float]]:
    """AP of each phase of a stream that changes domain, by rule; see `bnext.studies.runner.run_study`.

    Returns:
        Rule -> number of the phase -> AP on its images, a quarter of the set in turn. "own statistics": those of 400
        images of the phase's own domain.
    """
    cfg = configs[seed]
    model = load_source(cfg, seconds)
    train_set, test_set = cfg.DATASETS.TRAIN[0], cfg.DATASETS.TEST[0]
    order = np.random.default_rng(seed).permutation(len(load_records(test_set, cfg)))
    parts = np.array_split(order, 4)

    results: dict[str, dict[str, float]] = {}
    with timed(seconds, f"stream_seed{seed}"):
        for rule in ("source", "each image", "blend", "stream"):
            aps = results[rule] = {}
            with applying_rule(model, **RULES[rule]):
                for number, phase in enumerate(PHASES):
                    name = name_variant(test_set, phase)
                    aps[str(number)] = measure_ap(cfg, model, name, images=parts[number % len(parts)])
            logger.info("%s: %s.", rule, ", ".join(f"{ap:.1f}" for ap in aps.values()))

        results["own statistics"] = {}
        for phase in dict.fromkeys(PHASES):
            with adapted(cfg, model, name_variant(train_set, phase), NUM_TARGET_IMAGES[-1]):
                for number in (number for number, other in enumerate(PHASES) if other == phase):
                    images, name = parts[number % len(parts)], name_variant(test_set, phase)
                    ap = measure_ap(cfg, model, name, domain=SOURCE, images=images)
                    results["own statistics"][str(number)] = ap
    return results


def name_variant(base: str, target: str) -> str:
    """The set of a target: a corrupted variant, or the set itself."""
    return base if target == SOURCE else f"{base}@{CORRUPTIONS[target]}"

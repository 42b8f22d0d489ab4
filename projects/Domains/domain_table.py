"""The six rows of the paper's Table 5 with domains in the place of levels, and a specialist for each domain.

Rows 1, 3 and 5 are trained. Rows 2, 4 and 6 are their weights with population statistics re-estimated for each domain,
from training images, without training: running statistics have no part in a training's gradients.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode

from bnext.cli.train import check_run
from bnext.evaluation.coco import flatten_metrics
from bnext.layers import TABLE5_ROWS
from bnext.studies.runner import Training, load_row, reuse_row, train_row
from bnext.studies.spread import summarize
from bnext.tables import format_rows

__all__ = [
    "DOMAINS",
    "collect_rows",
    "describe",
    "format_table",
    "list_trainings",
    "load_configs",
    "name_row",
    "run",
]

DOMAINS = ("clean", "inverted", "low_contrast")
SPECIALISTS = "specialists"
# Row -> the row whose training it uses.
TRAINED_ROW = {1: 1, 2: 1, 3: 3, 4: 3, 5: 5, 6: 5}
_IN_WORDS = {
    1: "(a) one merged batch, everything shared",
    2: "(d) as (a), adapted to each domain afterwards",
    3: "(b) a mini-batch per domain, one moving average",
    4: "(c) mini-batch and population per domain",
    5: "(b) with an affine per domain",
    6: "(c) with an affine per domain",
}
_OF_LEVELS = {"shared": "per_level", "per_level": "per_level_and_domain"}  # of the head, whose levels stay apart


def list_trainings(seeds: Sequence[int]) -> list[Training]:
    """All of the study, in an order in which they can run: seed by seed."""
    return [Training(row, seed) for seed in seeds for row in (1, 2, 3, 4, 5, 6, *DOMAINS)]


def load_configs(
    file: str, output: str, trainings: Sequence[Training], opts: Sequence[str] = (), num_workers: int = 1
) -> dict[Training, CfgNode]:
    """The config of each training, with its own folder in `output`; the first is checked before anything runs.

    Args:
        file: YAML of three domains.
        output: folder of the study.
        trainings: see `list_trainings`.
        opts: KEY VALUE pairs that override every config.
        num_workers: that will train.

    Raises:
        BNextError: a config, a data set or the folder is wrong.
    """
    configs = {}
    for training in trainings:
        pairs = _list_answers(training.row) if isinstance(training.row, int) else _list_specialist(training.row)
        configs[training] = load_row(file, output, training.folder, [*pairs, "SEED", str(training.seed), *opts])
    check_run(next(iter(configs.values())), num_workers)
    return configs


def _list_answers(row: int) -> list[str]:
    """KEY VALUE pairs of a row: the backbone's answers of domains, and the head's, whose levels stay apart."""
    pairs = []
    for key, answer in zip(("STATISTICS", "POPULATION", "AFFINE"), TABLE5_ROWS[row], strict=True):
        of_backbone = "shared" if answer == "shared" else "per_domain"
        of_head = _OF_LEVELS[answer]
        if key == "AFFINE":
            of_head = of_backbone
        pairs += [f"MODEL.BNEXT.RESNETS.{key}", of_backbone, f"MODEL.BNEXT.RETINANET.{key}", of_head]
    return pairs


def _list_specialist(domain: str) -> list[str]:
    """KEY VALUE pairs of a training on one domain alone: as many of its images a step, in as many steps."""
    sets = ["DATASETS.TRAIN", f"('{domain}_train',)", "DATASETS.TEST", f"('{domain}_val',)"]
    return [*sets, "DATALOADER.BNEXT.BATCHES", "mixed", "DATALOADER.BNEXT.RATIOS", "[]", "SOLVER.IMS_PER_BATCH", "4"]


def run(
    training: Training, configs: Mapping[Training, CfgNode], seconds: dict[str, float], resume: bool
) -> dict[str, dict[str, float | None]]:
    """Train and evaluate, or re-estimate and evaluate what another row has trained; see `run_study`.

    Returns:
        Domain -> {"AP": ...}.
    """
    cfg = configs[training]
    trained = Training(TRAINED_ROW.get(training.row, training.row), training.seed)  # type: ignore[arg-type]
    if training == trained:
        metrics = train_row(str(training), cfg, seconds, resume)
    else:
        metrics = reuse_row(str(training), cfg, seconds, configs[trained])

    by_set = metrics if len(cfg.DATASETS.TEST) > 1 else {cfg.DATASETS.TEST[0]: metrics}
    return {name.removesuffix("_val"): _select_ap(by_set[name]) for name in cfg.DATASETS.TEST if by_set}


def _select_ap(metrics: Mapping[str, Any]) -> dict[str, float | None]:
    return {"AP": flatten_metrics(metrics)["bbox/AP"]} if metrics else {}


def describe(training: Training) -> str:
    """The training in words, for the log."""
    return _IN_WORDS.get(training.row, f"(e) trained on {training.row} alone")  # type: ignore[arg-type]


def collect_rows(results: Mapping[str, Any]) -> dict[int | str, dict[int, dict[str, float]]]:
    """Row -> seed -> domain -> AP; the specialists are one row, "specialists", of seeds that have all of them."""
    values: dict[str, dict[int, dict[str, float]]] = {}
    for name, metrics in results["rows"].items():
        row, seed = name.split(", seed ")
        of_row = values.setdefault(row, {})
        of_row[int(seed)] = {domain: metrics[f"{domain}/AP"] for domain in DOMAINS if f"{domain}/AP" in metrics}

    rows: dict[int | str, dict[int, dict[str, float]]] = {
        row: values[str(row)] for row in TRAINED_ROW if str(row) in values
    }
    seeds = set.intersection(*(set(values.get(domain, {})) for domain in DOMAINS))
    if seeds:
        rows[SPECIALISTS] = {
            seed: {domain: values[domain][seed][domain] for domain in DOMAINS} for seed in sorted(seeds)
        }
    return rows


def name_row(row: int | str) -> str:
    """A row in words."""
    return "(e) specialists" if row == SPECIALISTS else _IN_WORDS[row]  # type: ignore[index]


def format_table(results: Mapping[str, Any]) -> str:
    """AP of each row by domain, its mean over them and its worst: mean and standard deviation over seeds."""
    rows = []
    number = 0
    for row, by_seed in collect_rows(results).items():
        number = max(number, len(by_seed))
        columns = [[aps[domain] for aps in by_seed.values()] for domain in DOMAINS]
        means = [statistics.mean(aps.values()) for aps in by_seed.values()]
        worst = [min(aps.values()) for aps in by_seed.values()]
        rows.append([name_row(row), *(str(summarize(values)) for values in (*columns, means, worst))])
    return format_rows(rows, [f"AP, {number} seed(s)", *DOMAINS, "mean", "worst"], num_texts=1)

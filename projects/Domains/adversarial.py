"""Clean against adversarial training: copies that raise the loss, with shared statistics, or their own (AdvProp)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from adaptation import SOURCE, measure_ap, name_variant
from detectron2.config import CfgNode

from bnext.checkpoints import load_model
from bnext.cli.train import check_run
from bnext.evaluation.coco import flatten_metrics
from bnext.evaluation.under_attack import evaluate_under_attack
from bnext.studies.runner import find_final_model, load_row, timed, train_row
from bnext.studies.spread import summarize
from bnext.tables import format_rows

__all__ = ["TESTS", "Adversarial", "describe", "format_table", "list_trainings", "load_configs", "name_training", "run"]

TESTS = (SOURCE, "Gaussian noise", "motion blur", "JPEG", "attacked")
_IN_WORDS = {
    "clean": "clean images alone",
    "shared": "adversarial copies, statistics shared",
    "apart": "adversarial copies with norms of their own (AdvProp)",
}
_KIND = ["SOLVER.BNEXT.AUXILIARY.KIND", "adversarial"]
_ANSWERS = {
    "RESNETS": ("per_domain", "per_domain", "per_domain"),
    "RETINANET": ("per_level_and_domain", "per_level_and_domain", "per_domain"),
}


class Adversarial(NamedTuple):
    """One training.

    Args:
        row: a key of the table's rows.
        seed: of the training.
    """

    row: str
    seed: int

    def __str__(self) -> str:
        return f"{self.row}, seed {self.seed}"


def list_trainings(seeds: Sequence[int]) -> list[Adversarial]:
    """All of the part, seed by seed."""
    return [Adversarial(row, seed) for seed in seeds for row in _IN_WORDS]


def load_configs(
    file: str, output: str, trainings: Sequence[Adversarial], opts: Sequence[str] = (), num_workers: int = 1
) -> dict[Adversarial, CfgNode]:
    """The config of each training, with its own folder in `output`, checked before anything runs.

    Raises:
        BNextError: a config, a data set or the folder is wrong.
    """
    configs = {}
    for training in trainings:
        pairs = [] if training.row == "clean" else list(_KIND)
        for place, answers in _ANSWERS.items() if training.row == "apart" else ():
            for key, answer in zip(("STATISTICS", "POPULATION", "AFFINE"), answers, strict=True):
                pairs += [f"MODEL.BNEXT.{place}.{key}", answer]
        folder = f"adversarial_{training.row}_seed{training.seed}"
        configs[training] = load_row(file, output, folder, [*pairs, "SEED", str(training.seed), *opts])
        check_run(configs[training], num_workers)
    return configs


def describe(training: Adversarial) -> str:
    """The training in words, for the log."""
    return name_training(training.row)


def name_training(row: str) -> str:
    """A row in words."""
    return _IN_WORDS[row]


def run(
    training: Adversarial, configs: Mapping[Adversarial, CfgNode], seconds: dict[str, float], resume: bool
) -> dict[str, dict[str, float | None]]:
    """Train, and measure AP on clean, corrupted and attacked images; see `bnext.studies.runner.run_study`."""
    cfg = configs[training]
    train_row(str(training), cfg, seconds, resume)
    model = load_model(cfg, find_final_model(cfg))

    aps: dict[str, float | None] = {}
    with timed(seconds, f"test_{training}"):
        for target in TESTS[:-1]:
            aps[target] = measure_ap(cfg, model, name_variant(cfg.DATASETS.TEST[0], target), domain=SOURCE)
        attacked = evaluate_under_attack(cfg, model, epsilon=cfg.SOLVER.BNEXT.AUXILIARY.EPSILON)
        aps["attacked"] = flatten_metrics(attacked)["bbox/AP"]
    return {"AP": aps}  # type: ignore[dict-item]


def format_table(results: Mapping[str, Any]) -> str:
    """AP of each row on each kind of images: mean and standard deviation over seeds."""
    rows = []
    for row, words in _IN_WORDS.items():
        of_seeds = [values for name, values in results["rows"].items() if name.startswith(f"{row}, ")]
        if of_seeds:
            rows.append([words, *(summarize([values[f"AP/{test}"] for values in of_seeds]) for test in TESTS)])
    number = len({name.split(", seed ")[1] for name in results["rows"]})
    return format_rows(rows, [f"AP, {number} seed(s)", *TESTS], num_texts=1)

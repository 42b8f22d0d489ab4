"""The six rows of the paper's Table 5: train the heads that are needed, re-estimate the others, compare; for each seed.

Rows 1, 3 and 5 are trained. Rows 2, 4 and 6 are the same checkpoints with population statistics
re-estimated per level, without training.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from detectron2.config import CfgNode

from bnext.cli.train import check_run
from bnext.config.recipe import read_place
from bnext.errors import ConfigError
from bnext.evaluation.reestimate import is_level_norm
from bnext.layers import TABLE5_ROWS, NormSpec
from bnext.studies.runner import Training, check_rows, collect_values, load_row, reuse_row, run_study, train_row
from bnext.studies.spread import compare, summarize
from bnext.tables import format_rows

__all__ = ["PAPER_AP", "TRAINED_ROW", "format_table", "list_trainings", "load_rows", "run_rows"]

# COCO AP of RetinaNet R50-FPN, 3x; Wu and Johnson 2021, Table 5.
PAPER_AP = {1: 39.1, 2: 2.1, 3: 34.1, 4: 39.1, 5: 35.5, 6: 39.2}
# Row -> the row whose training it uses.
TRAINED_ROW = {1: 1, 2: 1, 3: 3, 4: 3, 5: 5, 6: 5}


def list_trainings(rows: Sequence[int], seeds: Sequence[int] = (1,)) -> list[Training]:
    """The rows to evaluate, seed by seed, each after the row that it is made from, which is added when missing."""
    wanted = sorted({*rows, *(TRAINED_ROW[row] for row in rows)})
    return [Training(row, seed) for seed in seeds for row in wanted]


def load_rows(
    folder: str, output: str, trainings: Sequence[Training], opts: Sequence[str] = (), num_workers: int = 1
) -> dict[Training, CfgNode]:
    """The configs of rows, each with its own folder in `output`, checked before anything runs.

    Args:
        folder: of a YAML file for each row, table5_row1.yaml and so on.
        output: folder of the study.
        trainings: see `list_trainings`.
        opts: KEY VALUE pairs that override every config.
        num_workers: that will train.

    Raises:
        BNextError: a config, a data set or the folder is wrong.
    """
    configs = {}
    for training in trainings:
        file = os.path.join(folder, f"table5_row{training.row}.yaml")
        pairs = ["SEED", str(training.seed), *opts]
        configs[training] = load_row(file, output, training.folder, pairs)
        _check_answers(training.row, configs[training], file)  # type: ignore[arg-type]

    check_rows(configs)
    check_run(next(iter(configs.values())), num_workers)
    return configs


def _check_answers(row: int, cfg: CfgNode, file: str) -> None:
    spec = read_place(cfg, "RETINANET").norm
    if not isinstance(spec, NormSpec) or spec.table5_row != row:
        thing = f"the config of row {row}"
        rule = f"have its three answers {NormSpec.from_table5_row(row)}"
        remedy = "Correct MODEL.RETINANET.NORM and MODEL.BNEXT.RETINANET."
        raise ConfigError.of(thing, rule, got=str(spec), where=file, remedy=remedy)


def run_rows(configs: Mapping[Training, CfgNode], output: str, title: str, resume: bool = False) -> None:
    """Train, re-estimate and evaluate rows; print the table and write `output`/results.json.

    Args:
        configs: of `load_rows`.
        output: folder for results.json.
        title: heading of our column, for example "digits".
        resume: go on with trainings that are under way; finished ones are evaluated again.

    Note:
        Runs in every worker. results.json is {"rows": {"1, seed 1": metrics, ...}, "seconds": {step: s}} and
        is written anew, whole, after every row.
    """
    run_study(configs, output, _run_row, describe_row, partial(format_table, title=title), resume=resume)


def _run_row(
    training: Training, configs: Mapping[Training, CfgNode], seconds: dict[str, float], resume: bool
) -> Mapping[str, Any]:
    trained = training._replace(row=TRAINED_ROW[training.row])  # type: ignore[index]
    label = f"{training.row}_seed{training.seed}"
    if training == trained:
        return train_row(label, configs[training], seconds, resume)
    return reuse_row(label, configs[training], seconds, configs[trained], layers=is_level_norm)


def describe_row(training: Training) -> str:
    """A row's three answers in words."""
    statistics, population, affine = (cell.replace("_", " ") for cell in TABLE5_ROWS[training.row])  # type: ignore[index]
    return f"mini-batch statistics {statistics}, population {population}, affine {affine}"


def format_table(results: Mapping[str, Any], title: str = "digits") -> str:
    """Our AP beside the paper's, row by row, and what each re-estimation changed: means and deviations over seeds."""
    aps = {row: collect_values(results, row, "bbox/AP") for row in TRAINED_ROW}

    rows = []
    for row, of_row in aps.items():
        if not of_row:
            continue

        trained = TRAINED_ROW[row]
        how, change, paper_change = "trained", "", ""
        if row != trained:
            how = f"row {trained} re-estimated"
            before = [aps[trained].get(seed) for seed in of_row]
            change = compare(list(of_row.values()), before).show(sign="+")
            paper_change = f"{PAPER_AP[row] - PAPER_AP[trained]:+.1f}"
        answers = [answer.replace("_", " ") for answer in TABLE5_ROWS[row]]
        ap, number = summarize(list(of_row.values())), str(len(of_row))
        rows.append([str(row), *answers, how, number, ap, change, f"{PAPER_AP[row]:.1f}", paper_change])

    headers = ["row", "mini-batch", "population", "affine", "how", "seeds", f"AP {title}", "change", "AP COCO (paper)"]
    return format_rows(rows, [*headers, "change"], num_texts=5)

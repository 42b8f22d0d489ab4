"""Statistics of a checkpoint compared."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.utils import comm

from bnext.checkpoints.checkpointer import Checkpointer
from bnext.cli.arguments import FILE_HELP, PAIRS_HELP, take_pairs
from bnext.cli.run_command import load_config_to_reestimate
from bnext.cli.train import check_run
from bnext.config.blame import building_from_config
from bnext.data.check_classes import check_classes
from bnext.data.check_coco import check_datasets
from bnext.data.domains import select_sets
from bnext.data.records import load_records
from bnext.engine.launch import launch
from bnext.engine.output import holding_output
from bnext.engine.screen import only_in_file, set_up_logging
from bnext.errors import ConfigError, LaunchError, check_choice
from bnext.evaluation.compare import compare_statistics
from bnext.evaluation.compare_report import describe_reading, describe_rows, draw_comparison, format_comparison
from bnext.evaluation.conditions import Conditions
from bnext.evaluation.verdict import judge_rows
from bnext.files import find_local_file, write_json
from bnext.heads.build_warnings import building_unwarned
from bnext.repair.kinds import KINDS
from bnext.statistics.observe import find_replaceable
from bnext.text import name_folder

__all__ = ["DESCRIPTION", "add_arguments", "execute", "find_kept", "run_comparison"]

DESCRIPTION = """Same checkpoint, which statistics? COCO AP with those of the file, precise ones, mini-batches and more.

    bnext compare --config-file CONFIG.yaml MODEL.WEIGHTS model_final.pth --output FOLDER
    bnext compare ... --kinds moving_average precise --target-dataset NAME --num-gpus 2
    bnext compare ... --target-dataset my_night_val --domain-dataset my_night_train

Writes FOLDER/statistics.json, statistics.png and log.txt; the checkpoint is only read. On a machine without GPUs
--num-gpus counts CPU workers."""
IS_INTERMIXED = True
_RESULTS = "statistics.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help=f"of the model of MODEL.WEIGHTS: {FILE_HELP}")
    add("--kinds", nargs="+", metavar="KIND", help=f"some of {', '.join(KINDS)} (default: all)")
    add("--output", metavar="FOLDER", help="(default: a new one, compare_..., beside the checkpoint, or in OUTPUT_DIR)")
    add("--target-dataset", metavar="NAME", help="evaluate on it, and adapt to it, instead of DATASETS.TEST")
    add("--domain", metavar="NAME", help="of all images, where norms have domains (default: that of each image's set)")
    add("--domain-dataset", metavar="NAME", help="training images of the domain that is evaluated, for per_domain")
    add("--num-gpus", type=int, default=1, metavar="N", help="workers")
    add("--overwrite", action="store_true", help="replace an earlier comparison in the folder")
    add("opts", nargs="*", metavar="KEY VALUE", help=PAIRS_HELP)


def execute(args: argparse.Namespace) -> None:
    """Run the command."""
    take_pairs(args, ("kinds",))
    kinds = args.kinds or [kind for kind in KINDS if kind != "per_domain" or args.domain_dataset]
    cfg = load_config_to_reestimate(args.config_file, args.opts)
    args.output = args.output or choose_folder(cfg, args.target_dataset, overwrite=args.overwrite)
    cfg.defrost()
    if args.target_dataset:
        select_sets(cfg, "TEST", [args.target_dataset])
    cfg.OUTPUT_DIR = args.output
    cfg.freeze()
    command = ["--config-file", args.config_file, *args.opts]
    run_comparison(cfg, kinds, args.num_gpus, args.overwrite, args.domain, args.domain_dataset, command)


def choose_folder(cfg: CfgNode, target: str | None = None, *, overwrite: bool = False) -> str:
    """A folder of the run whose checkpoint is compared: OUTPUT_DIR where one is named, else that of the checkpoint.

    Args:
        cfg: MODEL.WEIGHTS and OUTPUT_DIR are read.
        target: data set, if it is another than the config's.
        overwrite: whether an earlier comparison is to be replaced, not kept beside the new one.
    """
    weights = find_local_file(cfg.MODEL.WEIGHTS)
    folder = cfg.OUTPUT_DIR
    if folder == get_cfg().OUTPUT_DIR and weights and os.access(os.path.dirname(weights) or ".", os.W_OK):
        folder = os.path.dirname(weights)

    name = f"compare_{Path(cfg.MODEL.WEIGHTS.split('?')[0]).stem}"
    first = os.path.join(folder, f"{name}_on_{name_folder(target)}" if target else name)
    number, chosen = 1, first
    while not overwrite and os.path.lexists(os.path.join(chosen, _RESULTS)):
        number += 1
        chosen = f"{first}-{number}"
    return chosen


def run_comparison(
    cfg: CfgNode,
    kinds: Sequence[str] = tuple(KINDS),
    num_workers: int = 1,
    overwrite: bool = False,
    domain: str | None = None,
    domain_dataset: str | None = None,
    command: Sequence[str] = (),
) -> None:
    """Check everything, start the workers, compare, and write OUTPUT_DIR/statistics.json and statistics.png.

    Args:
        cfg: describes the model; MODEL.WEIGHTS is the checkpoint, which is only read.
        kinds: some of `KINDS`.
        num_workers: GPUs, or CPU cores on a machine without.
        overwrite: whether an earlier comparison in OUTPUT_DIR is replaced.
        domain: of all images, where norms have domains; None: that of each image's set.
        domain_dataset: see `compare_statistics`.
        command: options of the command line that name the config and override it, for the advice that is given.

    Raises:
        BNextError: what is wrong.

    Note:
        The JSON is written after each kind: what is measured stays if something fails later.
    """
    for kind in kinds:
        check_choice("--kinds", kind, tuple(KINDS), where="bnext compare")
    _check_outputs(cfg, overwrite)
    check_run(cfg, num_workers, eval_only=True, conditions=Conditions(domain=domain))
    if not cfg.DATASETS.TRAIN:
        rule, remedy = "name at least one data set", "Name one in the config."
        raise ConfigError.of("DATASETS.TRAIN", rule, got="none", remedy=remedy)
    check_datasets(cfg.DATASETS.TRAIN, cfg=cfg)
    check_classes(cfg, is_new=False)
    if domain_dataset is not None:
        load_records(domain_dataset, cfg)

    arguments = (cfg, tuple(kinds), overwrite, domain, domain_dataset, tuple(command))
    launch(_compare_and_write, num_workers, args=arguments, device=cfg.MODEL.DEVICE)


def _check_outputs(cfg: CfgNode, overwrite: bool) -> None:
    """Keep what an earlier comparison wrote, unless it is to be replaced; refuse a folder in the way."""
    for path in _outputs(cfg):
        if path.is_dir() or (os.path.lexists(path) and not overwrite):
            rule = "be a folder without an earlier comparison"
            remedy = "Choose another, or give --overwrite."
            if path.is_dir():
                rule, remedy = f"be a folder in which {path.name} can be written", "Move that folder away."
            raise ConfigError.of("--output", rule, got=repr(str(path)), remedy=remedy)


def _outputs(cfg: CfgNode) -> tuple[Path, Path]:
    return Path(cfg.OUTPUT_DIR, _RESULTS), Path(cfg.OUTPUT_DIR, "statistics.png")


def _compare_and_write(
    cfg: CfgNode,
    kinds: Sequence[str],
    overwrite: bool,
    domain: str | None,
    domain_dataset: str | None,
    command: Sequence[str],
) -> None:
    """In every worker."""
    with holding_output(cfg.OUTPUT_DIR, "--output"):
        _check_outputs(cfg, overwrite)  # another run may have ended since the first look
        _compare(cfg, kinds, domain, domain_dataset, command)


def _compare(
    cfg: CfgNode, kinds: Sequence[str], domain: str | None, domain_dataset: str | None, command: Sequence[str]
) -> None:
    if not logging.getLogger("bnext").isEnabledFor(logging.INFO):
        set_up_logging(cfg.OUTPUT_DIR)
    # A line for each kind; what an evaluation and a re-estimation say is in log.txt.
    with only_in_file("bnext.evaluation.coco"), only_in_file("bnext.evaluation.reestimate"):
        _measure(cfg, kinds, domain, domain_dataset, command)


def _measure(
    cfg: CfgNode, kinds: Sequence[str], domain: str | None, domain_dataset: str | None, command: Sequence[str]
) -> None:
    with building_from_config(), building_unwarned():
        model = build_model(cfg)
    checkpointer = Checkpointer(model)
    checkpointer.load(cfg.MODEL.WEIGHTS, checkpointables=[], complete=True, replaced=find_replaceable(model))

    results = compare_statistics(
        cfg,
        model.eval(),
        kinds,
        domain=domain,
        domain_dataset=domain_dataset,
        lost=checkpointer.left_out,
        on_kind=partial(_write, cfg),
    )

    if comm.is_main_process():
        results["command"] = list(command)
        verdict = judge_rows(results)
        results["verdict"] = {"winner": verdict.winner, "gain": verdict.gain}
        results["words"] = {
            **describe_rows(results),
            "reading": describe_reading(results),
            "verdict": verdict.words,
        }
        _write(cfg, results, with_plot=True)
        file, plot = _outputs(cfg)
        print(f"\n{format_comparison(results)}\n\n{file}\n{plot}", flush=True)


def _write(cfg: CfgNode, results: Mapping[str, Any], with_plot: bool = False) -> None:
    if not comm.is_main_process():
        return

    file, plot = _outputs(cfg)
    try:
        write_json(file, results)
        if with_plot:
            draw_comparison(results, plot)
    except OSError as error:
        rule, got = "be a folder that can be written to, on a disk with room", f"{type(error).__name__}: {error}"
        remedy = "What was written before is whole; choose another folder."
        raise LaunchError.of("--output", rule, got=got, where=cfg.OUTPUT_DIR, remedy=remedy) from error


def find_kept(args: argparse.Namespace) -> Callable[[], str]:
    """A function that tells what a comparison which begins now has left in its folder."""

    def find_results() -> Path | None:
        return Path(args.output, _RESULTS) if args.output else None  # it is not chosen yet

    def read_stamp() -> tuple[int, int] | None:
        path = find_results()
        return (path.stat().st_ino, path.stat().st_mtime_ns) if path is not None and path.is_file() else None

    before = read_stamp()
    return lambda: "nothing is written" if read_stamp() == before else f"what is measured so far is in {find_results()}"

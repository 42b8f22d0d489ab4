"""AP of a checkpoint by corruption and severity, mPC and rPC."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.utils import comm

from bnext.checkpoints.checkpointer import load_model
from bnext.cli.arguments import FILE_HELP, PAIRS_HELP, take_pairs
from bnext.cli.run_command import load_config_to_reestimate
from bnext.cli.train import check_run
from bnext.config import load_config
from bnext.config.check import flatten
from bnext.data.check_coco import check_datasets
from bnext.data.corrupted_sets import name_variant
from bnext.data.corruptions.names import COMMON, NAMES, SEVERITIES, check_corruption
from bnext.data.records import has_labels, load_records
from bnext.engine.launch import launch
from bnext.engine.output import holding_output
from bnext.engine.screen import only_in_file, set_up_logging
from bnext.errors import ConfigError, LaunchError, Refusal, check_choice
from bnext.evaluation.robustness import STATISTICS, is_as_published, measure_robustness, summarize
from bnext.evaluation.robustness_report import draw_robustness, format_robustness
from bnext.files import find_local_file, read_stamp, write_json
from bnext.heads.build_warnings import building_unwarned
from bnext.repair.kinds import KINDS, find_obstacle

__all__ = ["DESCRIPTION", "add_arguments", "execute", "find_kept", "run_benchmark"]

DESCRIPTION = """How robust is a checkpoint? COCO AP by corruption and severity, its mean mPC, and rPC = mPC / clean AP.

    bnext robustness --config-file CONFIG.yaml MODEL.WEIGHTS model_final.pth --output FOLDER
    bnext robustness ... --corruptions fog snow invert --severities 1 3 5
    bnext robustness ... --statistics adaptive    # estimated anew on the pictures of each variant, without labels

Without options over the fifteen corruptions and five severities of COCO-C, 76 evaluations; pictures are corrupted when
they are read. Writes FOLDER/robustness.json after each of them, robustness.png and log.txt; --resume goes on. On a
machine without GPUs --num-gpus counts CPU workers."""
IS_INTERMIXED = True
_RESULTS = "robustness.json"

_NO_SEVERITY = Refusal(ConfigError, "--severities", "be some of 1 to 5", "Give for instance --severities 1 3 5.")
_ONE_SET = Refusal(
    ConfigError, "DATASETS.TEST", "name one data set, with annotations", "Give DATASETS.TEST \"('my_val',)\"."
)
_CLEAN = Refusal(
    ConfigError, "DATASETS.TEST", "name a clean set, which is corrupted here", "Name the set that the variant is of."
)
_EARLIER = Refusal(
    ConfigError,
    "--output",
    "be a folder without an earlier benchmark",
    "Choose another, or give --resume to go on with it, or --overwrite.",
)
_OTHER = Refusal(
    ConfigError,
    "--resume",
    "go on with a benchmark of the same {thing}",
    "Choose another --output, or give --overwrite in place of --resume.",
)
_BROKEN = Refusal(ConfigError, "--resume", "find a whole " + _RESULTS, "Choose another --output, or give --overwrite.")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that is asked for.

    Args:
        corruptions: some of `NAMES`.
        severities: some of 1 to 5.
        statistics: one of `STATISTICS`.
        resume: keep what an earlier one has measured in OUTPUT_DIR.
        overwrite: replace an earlier one.
    """

    corruptions: tuple[str, ...] = COMMON
    severities: tuple[int, ...] = SEVERITIES
    statistics: str = "moving_average"
    resume: bool = False
    overwrite: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help=f"of the model of MODEL.WEIGHTS: {FILE_HELP}")
    add("--corruptions", nargs="+", metavar="NAME", help=f"some of {', '.join(NAMES)} (default: the first fifteen)")
    add("--severities", nargs="+", metavar="S", help="some of 1 to 5 (default: all)")
    add("--statistics", default="moving_average", metavar="KIND", help=f"one of {', '.join(STATISTICS)}")
    add("--output", required=True, metavar="FOLDER", help="for the results")
    add("--num-gpus", type=int, default=1, metavar="N", help="workers")
    add("--resume", action="store_true", help="go on with the benchmark in the folder")
    add("--overwrite", action="store_true", help="replace an earlier benchmark in the folder")
    add("opts", nargs="*", metavar="KEY VALUE", help=PAIRS_HELP)


def execute(args: argparse.Namespace) -> None:
    """Run the command."""
    take_pairs(args, ("corruptions", "severities"))
    benchmark = Benchmark(
        corruptions=tuple(dict.fromkeys(args.corruptions or COMMON)),
        severities=_read_severities(args.severities),
        statistics=args.statistics,
        resume=args.resume,
        overwrite=args.overwrite,
    )

    check_choice("--statistics", benchmark.statistics, STATISTICS, where="bnext robustness")

    load = load_config if KINDS[benchmark.statistics].source == "file" else load_config_to_reestimate
    cfg = load(args.config_file, [*args.opts, "OUTPUT_DIR", args.output])
    run_benchmark(cfg, benchmark, args.num_gpus)


def _read_severities(words: Sequence[str] | None) -> tuple[int, ...]:
    for word in words or ():
        if word not in map(str, SEVERITIES):
            raise _NO_SEVERITY.of(repr(word))
    return tuple(sorted({int(word) for word in words})) if words else SEVERITIES


def run_benchmark(cfg: CfgNode, benchmark: Benchmark, num_workers: int = 1) -> None:
    """Check everything, start the workers, measure, and write OUTPUT_DIR/robustness.json and robustness.png.

    Args:
        cfg: describes the model; MODEL.WEIGHTS is the checkpoint, which is only read.
        benchmark: what is measured.
        num_workers: GPUs, or CPU cores on a machine without.

    Raises:
        BNextError: what is wrong.

    Note:
        The JSON is written after each evaluation: what is measured stays if something fails later.
    """
    for corruption in benchmark.corruptions:
        check_corruption(corruption, benchmark.severities[0], "--corruptions")
    if len(cfg.DATASETS.TEST) != 1:
        raise _ONE_SET.of(cfg.DATASETS.TEST)

    check_run(cfg, num_workers, eval_only=True)
    name = str(cfg.DATASETS.TEST[0])
    records = load_records(name, cfg)
    if not has_labels(records):
        raise _ONE_SET.of(f"{name!r} without annotations")
    if any(record.get("corruption") for record in records):
        raise _CLEAN.of(repr(name))
    for corruption in [each for each in benchmark.corruptions if each in COMMON][:1]:  # all fifteen need the same size
        variant = name_variant(name, corruption, benchmark.severities[0])
        check_datasets([variant], check_images=False, training=False, cfg=cfg)

    _read_earlier(cfg, benchmark)
    launch(_measure_and_write, num_workers, args=(cfg, benchmark), device=cfg.MODEL.DEVICE)


# ---- the folder


def _outputs(cfg: CfgNode) -> tuple[Path, Path]:
    return Path(cfg.OUTPUT_DIR, _RESULTS), Path(cfg.OUTPUT_DIR, "robustness.png")


def _describe(cfg: CfgNode, benchmark: Benchmark) -> dict[str, Any]:
    """All that the numbers depend on."""
    plain, defaults = cfg.clone(), get_cfg()
    plain.defrost()
    plain.OUTPUT_DIR, plain.DATALOADER.NUM_WORKERS = defaults.OUTPUT_DIR, defaults.DATALOADER.NUM_WORKERS
    plain.MODEL.DEVICE, plain.MODEL.WEIGHTS = defaults.MODEL.DEVICE, ""

    file = find_local_file(cfg.MODEL.WEIGHTS)
    return {
        "weights": list(read_stamp(file)) if file else cfg.MODEL.WEIGHTS,
        "data set": str(cfg.DATASETS.TEST[0]),
        "statistics": benchmark.statistics,
        "config": hashlib.sha256(repr(sorted(flatten(plain).items())).encode()).hexdigest(),
    }


def _read_earlier(cfg: CfgNode, benchmark: Benchmark) -> dict[str, Any]:
    """Read what is measured already, to go on with it; an earlier benchmark that is not named is kept."""
    file, plot = _outputs(cfg)
    present = next((path for path in (file, plot) if os.path.lexists(path)), None)
    if present is None or benchmark.overwrite:
        return {}
    if not benchmark.resume:
        raise _EARLIER.of(repr(str(present)))
    if not file.is_file():
        return {}

    try:
        earlier = json.loads(file.read_text())
        before, measured = earlier["of"], {"clean": earlier["clean"], "corrupted": earlier["corrupted"]}
    except (ValueError, KeyError, TypeError) as error:
        raise _BROKEN.of(f"{type(error).__name__}: {error}", str(file)) from error

    for thing, value in _describe(cfg, benchmark).items():
        if before.get(thing) != value:
            raise _OTHER.of(f"{before.get(thing)}, now {value}", str(file), thing=thing)
    return measured


# ---- in every worker


def _measure_and_write(cfg: CfgNode, benchmark: Benchmark) -> None:
    with holding_output(cfg.OUTPUT_DIR, "--output"):
        measured = _read_earlier(cfg, benchmark)
        comm.synchronize()  # every worker has read the file before one writes it
        if not logging.getLogger("bnext").isEnabledFor(logging.INFO):
            set_up_logging(cfg.OUTPUT_DIR)

        with only_in_file("bnext.evaluation.coco"), only_in_file("bnext.evaluation.reestimate"):
            with building_unwarned():
                model = load_model(cfg, cfg.MODEL.WEIGHTS)
            obstacle = find_obstacle(model, benchmark.statistics, cfg.SOLVER.IMS_PER_BATCH)
            if obstacle:
                remedy = "Choose moving_average."
                raise ConfigError.of("--statistics", "apply to the model", got=obstacle, remedy=remedy)

            results = measure_robustness(
                cfg,
                model,
                benchmark.corruptions,
                benchmark.severities,
                statistics=benchmark.statistics,
                measured=measured,
                on_result=partial(_write, cfg, benchmark),
            )

        if comm.is_main_process():
            _write(cfg, benchmark, results, is_whole=True)
            table = format_robustness(results, benchmark.corruptions, benchmark.severities)
            print(f"\n{table}\n\n" + "\n".join(map(str, _outputs(cfg))), flush=True)


def _write(cfg: CfgNode, benchmark: Benchmark, results: Mapping[str, Any], is_whole: bool = False) -> None:
    if not comm.is_main_process():
        return

    corruptions, severities = benchmark.corruptions, benchmark.severities
    content: dict[str, Any] = {"of": _describe(cfg, benchmark), **results}
    if is_whole:
        metrics = [metric for metric in results["clean"] if metric.endswith("/AP")]
        content["summary"] = {metric: summarize(results, corruptions, severities, metric) for metric in metrics}
        content["summary"] |= {"corruptions": corruptions, "severities": severities}
        content["summary"] |= {"is_as_published": is_as_published(corruptions, severities)}

    file, plot = _outputs(cfg)
    try:
        write_json(file, content)
        if is_whole:
            note = f"{cfg.DATASETS.TEST[0]}; statistics: {KINDS[benchmark.statistics].words}"
            draw_robustness(results, corruptions, severities, plot, note=note)
    except OSError as error:
        rule, got = "be a folder that can be written to, on a disk with room", f"{type(error).__name__}: {error}"
        remedy = "What was written before is whole; choose another folder."
        raise LaunchError.of("--output", rule, got=got, where=cfg.OUTPUT_DIR, remedy=remedy) from error


def find_kept(args: argparse.Namespace) -> Callable[[], str]:
    """A function that tells what is left after Ctrl-C."""

    def describe() -> str:
        file = Path(args.output, _RESULTS)
        return f"what is measured so far is in {file}; --resume goes on" if file.is_file() else "nothing is written"

    return describe

"""Population statistics of a saved checkpoint, estimated anew without training: tools/recompute_statistics.py.

The input is only read. The output loads where the input does, and says of itself what was done.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from bnext.config import BATCH_NORMS, PLACES, get_norm_name, has_place
from bnext.config_check import check_config
from bnext.data.check import check_datasets
from bnext.engine.checkpoint import Checkpointer, check_eval_weights
from bnext.engine.kept_run import KeptRun
from bnext.engine.launch import count_workers, launch
from bnext.engine.recompute import build_batches, format_report, load_records, needs_labels, recompute_statistics
from bnext.engine.smart_batch_norm import count_batches
from bnext.errors import CheckpointError, ConfigError, StatisticsError
from bnext.files import replace_file
from bnext.layers.norm_specs import collect_norm_specs
from bnext.layers.spec import check_choice
from bnext.statistics import RecomputeReport

__all__ = ["POPULATIONS", "RecomputeRequest", "give_population", "recompute_checkpoint", "run_request"]

POPULATIONS = ("shared", "per_level", "per_domain")
# Of a training, or of how the input's names are to be read: they no longer hold of the output.
_LEFT_OUT = ("optimizer", "scheduler", "iteration", "trainer", "norm_specs", "matching_heuristics", "__author__")
_DONE = "recomputed_statistics"  # the output's key for what was done


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecomputeRequest:
    """What is wanted of a checkpoint.

    Args:
        output: the file to write, *.pth; a report is written beside it, *.json.
        population: whose statistics the output has: "shared", "per_level", "per_domain"; None: as the config says.
        datasets: images without labels, such as a target domain's (AdaBN); empty: DATASETS.TRAIN, as in training.
        domains: one for each data set, if norms have statistics per domain.
        num_samples: images that are enough; None: all of `datasets`, or TEST.PRECISE_BN.NUM_ITER training batches.
        source_samples: so many images do the statistics that are there count for; 0 replaces them.
        resume: go on with an interrupted run of the same request.
        overwrite: whether an output that exists is replaced.
    """

    output: str
    population: str | None = None
    datasets: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    num_samples: int | None = None
    source_samples: float = 0
    resume: bool = False
    overwrite: bool = False


def run_request(cfg: CfgNode, request: RecomputeRequest, num_workers: int = 1) -> None:
    """Check everything, start the workers, and do it.

    Args:
        cfg: describes the model; MODEL.WEIGHTS is the input.
        request: what is wanted.
        num_workers: GPUs, or CPU cores on a machine without.

    Raises:
        BNextError: what is wrong; then nothing is written.
        KeyboardInterrupt: says how to go on, if something is kept.
    """
    size = count_workers(num_workers, device=cfg.MODEL.DEVICE)
    _check_request(cfg, request)
    _check_files(cfg.MODEL.WEIGHTS, request)
    cfg = give_population(cfg, request.population, request.domains) if request.population else cfg
    _check_domains(cfg, request)
    if not request.datasets:
        check_datasets(cfg.DATASETS.TRAIN)
    for name in request.datasets:
        load_records(name, cfg)
    try:
        launch(recompute_checkpoint, num_workers, args=(cfg, request), device=cfg.MODEL.DEVICE)
    except KeyboardInterrupt:
        is_kept = bool(_find_run(cfg, request, size).find())
        raise KeyboardInterrupt(*["The same command with --resume goes on."] * is_kept) from None


def recompute_checkpoint(cfg: CfgNode, request: RecomputeRequest) -> RecomputeReport:
    """What every worker does: load MODEL.WEIGHTS, estimate, write.

    Args:
        cfg: of the output; see `give_population`.
        request: what is wanted.

    Returns:
        The report, equal on every worker.

    Raises:
        CheckpointError: the checkpoint does not fit the config's model.
        StatisticsError: the model has no batch norm, activations are not finite, or there are no images, also of one
            of the request's domains.
    """
    if not logging.getLogger("bnext").isEnabledFor(logging.INFO):
        setup_logger(distributed_rank=comm.get_rank(), name="bnext")
    model = build_model(cfg)
    others = Checkpointer(model).load(cfg.MODEL.WEIGHTS, checkpointables=[], complete=True)
    report = recompute_statistics(cfg, model, **_choose_images(cfg, model, request), **_keep_state(cfg, request))
    _check_reached(request, report)
    if comm.is_main_process():
        done = _describe(cfg, request, report)
        kept = {key: value for key, value in others.items() if key not in _LEFT_OUT and key != "model"}
        data = {"model": model.state_dict(), "norm_specs": collect_norm_specs(model), **kept, _DONE: done}
        replace_file(request.output, lambda file: torch.save(data, file))
        text = json.dumps({**done, "report": report.as_dict()}, indent=2, allow_nan=False)
        replace_file(Path(request.output).with_suffix(".json"), lambda file: file.write(f"{text}\n".encode()))
        print(f"{format_report(report)}\n{_say_fewer(request, report)}{_say_files(cfg, request)}", flush=True)
    comm.synchronize()
    return report


def _check_reached(request: RecomputeRequest, report: RecomputeReport) -> None:
    """A domain that was asked for is not to be written as it was."""
    for domain in dict.fromkeys(request.domains):
        own = [estimate for estimate in report.estimates if domain in estimate.levels]
        if own and not any(estimate.is_reached for estimate in own):
            names = [name for name, of in zip(request.datasets, request.domains, strict=True) if of == domain]
            raise StatisticsError(
                f"--domain must get images; got none for {domain!r} in {report.num_samples} images (--dataset "
                f"{', '.join(names)}); nothing is written. Use more images, --num-samples, or fewer workers."
            )


def _choose_images(cfg: CfgNode, model: nn.Module, request: RecomputeRequest) -> dict[str, Any]:
    arguments: dict[str, Any] = {"num_samples": request.num_samples, "source_samples": request.source_samples}
    if not request.datasets:
        return {**arguments, "num_batches": count_batches(cfg) if request.num_samples else None}
    labelled = needs_labels(cfg, model)
    batches = build_batches(cfg, request.datasets, domains=request.domains, labelled=labelled)
    return {**arguments, "batches": batches}


def _find_run(cfg: CfgNode, request: RecomputeRequest, num_workers: int) -> KeptRun:
    """What is kept of a run; a request that differs in anything that counts has other files."""
    same = dataclasses.replace(request, resume=False, overwrite=False)
    return KeptRun(request.output, cfg.MODEL.WEIGHTS, repr((cfg.dump(), same, num_workers)))


def _keep_state(cfg: CfgNode, request: RecomputeRequest) -> dict[str, Any]:
    path, begun = _find_run(cfg, request, comm.get_world_size()).begin(request.resume)
    is_kept = cfg.TEST.BNEXT.PRECISE_BN.ESTIMATOR != "layer_by_layer"
    return {"on_first_batch": begun, **({"state_file": path} if is_kept else {})}


def give_population(cfg: CfgNode, population: str, domains: Sequence[str] = ()) -> CfgNode:
    """A config whose norms have population statistics of another owner, wherever that can be.

    Args:
        cfg: of a model of bnext.
        population: "shared", "per_level" (heads that see several levels), or "per_domain" (everything else).
        domains: of "per_domain", where the config names none.

    Returns:
        A copy; only POPULATION of the places, and MODEL.BNEXT.DOMAINS.NAMES, differ.

    Raises:
        ConfigError: no place of the model can have it.
    """
    check_choice("--population", population, POPULATIONS, where="give_population")
    cfg = cfg.clone()
    cfg.defrost()
    places = [place for place in PLACES if has_place(cfg, place) and get_norm_name(cfg, place) in BATCH_NORMS]
    places = [place for place in places if population in PLACES[place].sources]
    if not places:
        raise ConfigError(
            f"--population must be of a model with batch norms that can have it; got {population!r} for "
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE!r} (give_population). Use an architecture of bnext, "
            f"such as BNextRetinaNet, which loads the same checkpoint, or leave --population out."
        )
    for place in places:
        cfg.MODEL.BNEXT[place].POPULATION = population
    if population == "per_domain" and not cfg.MODEL.BNEXT.DOMAINS.NAMES:
        cfg.MODEL.BNEXT.DOMAINS.NAMES = tuple(dict.fromkeys(domains))
    elif population == "shared" and not any("per_domain" in node.values() for node in cfg.MODEL.BNEXT.values()):
        cfg.MODEL.BNEXT.DOMAINS.NAMES, cfg.MODEL.BNEXT.DOMAINS.FALLBACK = (), ""
    check_config(cfg)
    cfg.freeze()
    return cfg


def find_keys(cfg: CfgNode) -> dict[str, Any]:
    """The keys that say whose population statistics the norms of a config have."""
    keys = {
        f"MODEL.BNEXT.{place}.POPULATION": cfg.MODEL.BNEXT[place].POPULATION
        for place in PLACES
        if has_place(cfg, place) and get_norm_name(cfg, place) in BATCH_NORMS
    }
    names = list(cfg.MODEL.BNEXT.DOMAINS.NAMES)
    return {**keys, "MODEL.BNEXT.DOMAINS.NAMES": names} if names else keys


def _check_request(cfg: CfgNode, request: RecomputeRequest) -> None:
    if request.resume and cfg.TEST.BNEXT.PRECISE_BN.ESTIMATOR == "layer_by_layer":
        raise ConfigError(
            "--resume must be of an estimator of which a run is kept; got 'layer_by_layer' "
            "(TEST.BNEXT.PRECISE_BN.ESTIMATOR), which begins anew. Leave --resume out, or use another."
        )
    if request.domains and len(request.domains) != len(request.datasets):
        raise ConfigError(
            f"--domain must be given once for each --dataset; got {len(request.domains)} for {len(request.datasets)} "
            f"data sets. Name the domain of every data set."
        )
    if request.num_samples is not None and request.num_samples < 1:
        raise ConfigError(f"--num-samples must be 1 or more; got {request.num_samples}. Use 1000 to 10000.")


def _check_domains(cfg: CfgNode, request: RecomputeRequest) -> None:
    names, fallback = tuple(cfg.MODEL.BNEXT.DOMAINS.NAMES), cfg.MODEL.BNEXT.DOMAINS.FALLBACK
    if names and not request.domains and not fallback:
        raise ConfigError(
            f"--domain must name the domain of each --dataset where norms have domains; got none of {names} "
            f"(MODEL.BNEXT.DOMAINS.NAMES). Give --dataset and --domain for each."
        )
    unknown = [name for name in request.domains if name not in names]
    if unknown:
        raise ConfigError(
            f"--domain must be one of the model's domains {names}; got {unknown[0]!r} (MODEL.BNEXT.DOMAINS.NAMES). "
            f"Correct it, or leave --domain out."
        )


def _check_files(weights: str, request: RecomputeRequest) -> None:
    """The input is there and stays; the output can be written."""
    check_eval_weights(weights)
    is_local = "://" not in weights
    if is_local and not os.path.isfile(weights):
        raise CheckpointError(
            f"MODEL.WEIGHTS must name a file; got {weights!r}, which does not exist. Correct the path."
        )
    output = Path(request.output)
    if output.suffix != ".pth":
        raise ConfigError(f"--output must end in .pth; got {request.output!r}. The report is written beside it, .json.")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise ConfigError(
            f"--output must be in a folder that exists and can be written to; got {request.output!r}. "
            f"Make {str(output.parent)!r}, or choose another."
        )
    if is_local and output.exists() and os.path.samefile(output, weights):
        raise ConfigError(
            f"--output must be another file than MODEL.WEIGHTS, which is never changed; got {request.output!r} for "
            f"both. Choose another name."
        )
    for path in (path for path in (output, Path(request.output).with_suffix(".json")) if os.path.lexists(path)):
        if path.is_dir() or not request.overwrite:
            raise ConfigError(
                f"--output must not exist, nor the report beside it; got {str(path)!r}. Choose another name, or give "
                f"--overwrite."
            )


def _describe(cfg: CfgNode, request: RecomputeRequest, report: RecomputeReport) -> dict[str, Any]:
    node = cfg.TEST.BNEXT.PRECISE_BN
    return {
        "weights": cfg.MODEL.WEIGHTS,
        "datasets": list(request.datasets or cfg.DATASETS.TRAIN),
        "domains": list(request.domains),
        "estimator": node.ESTIMATOR,
        "tolerance": node.TOLERANCE,
        "rois": node.ROIS,
        "source_samples": request.source_samples,
        "num_batches": report.num_batches,
        "num_samples": report.num_samples,
        "keys": find_keys(cfg),
    }


def _say_fewer(request: RecomputeRequest, report: RecomputeReport) -> str:
    has_stopped_early = report.tolerance is not None and not report.not_converged
    if request.num_samples is None or report.num_samples >= request.num_samples or has_stopped_early:
        return ""
    return f"Fewer images than asked: {report.num_samples} of {request.num_samples}; there are no more.\n"


def _say_files(cfg: CfgNode, request: RecomputeRequest) -> str:
    keys: Mapping[str, Any] = find_keys(cfg) if request.population else {}
    pairs = "".join(f"\n  {key}: {value}" for key, value in keys.items())
    load = f"\nTo load it, the config must say:{pairs}" if keys else ""
    return f"\n{request.output}\n{Path(request.output).with_suffix('.json')}{load}"

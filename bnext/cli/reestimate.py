"""Population statistics of a saved checkpoint, estimated anew without training: tools/recompute_statistics.py.

The input is only read. The output loads where the input does, and says of itself what was done.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from torch import nn

from bnext.checkpoints.checkpointer import Checkpointer
from bnext.cli.kept_run import KeptRun
from bnext.cli.reestimate_request import RecomputeRequest, check_domains, check_files, check_images, check_request
from bnext.config.places import PLACES
from bnext.config.recipe import resolve_norms
from bnext.data.batches import build_shuffled_batches
from bnext.engine.launch import count_workers, launch
from bnext.engine.population import count_batches
from bnext.errors import CheckpointError, ConfigError, LaunchError, StatisticsError, check_choice
from bnext.evaluation.reestimate import format_report, needs_labels, recompute_statistics
from bnext.files import replace_file
from bnext.statistics import RecomputeReport
from bnext.statistics.observe import find_replaceable
from bnext.surgery.stored_specs import collect_norm_specs

__all__ = ["POPULATIONS", "give_population", "recompute_checkpoint", "run_request"]

POPULATIONS = ("shared", "per_level", "per_domain")
# Of a training, or of how the input's names are to be read: they no longer hold of the output.
_LEFT_OUT = ("optimizer", "scheduler", "iteration", "trainer", "norm_specs", "matching_heuristics", "__author__")
_GO_ON = "The same command with --resume goes on."
_DONE = "recomputed_statistics"  # the output's key for what was done


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
    check_request(cfg, request)
    check_files(cfg.MODEL.WEIGHTS, request)
    cfg = give_population(cfg, request.population, request.domains) if request.population else cfg
    check_domains(cfg, request)
    check_images(cfg, request, size)
    kept = _find_run(cfg, request, size)
    try:
        launch(recompute_checkpoint, num_workers, args=(cfg, request), device=cfg.MODEL.DEVICE)
    except KeyboardInterrupt:
        kept.remove_halves()  # of workers that were ended while they wrote
        raise KeyboardInterrupt(*[_GO_ON] * bool(kept.find())) from None


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
        LaunchError: the output cannot be written.
    """
    if not logging.getLogger("bnext").isEnabledFor(logging.INFO):
        setup_logger(distributed_rank=comm.get_rank(), name="bnext")
    model = build_model(cfg)
    checkpointer = Checkpointer(model)
    begins_with_them = request.source_samples or cfg.TEST.BNEXT.PRECISE_BN.ESTIMATOR == "moving_average"
    replaced = [] if begins_with_them else find_replaceable(model)
    others = _load(checkpointer, cfg.MODEL.WEIGHTS, replaced)
    kept = _find_run(cfg, request, comm.get_world_size())
    images = _choose_images(cfg, model, request)
    report = recompute_statistics(cfg, model, **images, **_keep_state(cfg, kept, request.resume))
    _check_report(request, report, checkpointer.left_out, kept)
    if comm.is_main_process():
        done = _describe(cfg, request, report)
        others = {key: value for key, value in others.items() if key not in _LEFT_OUT and key != "model"}
        data = {"model": model.state_dict(), "norm_specs": collect_norm_specs(model), **others, _DONE: done}
        _write(request.output, data, {**done, "report": report.as_dict()}, _GO_ON if kept.find() else "")
    comm.synchronize()
    kept.remove()  # not before: it is all there is until the output is written
    if comm.is_main_process():
        print(f"{format_report(report)}\n{_say_fewer(request, report)}{_say_files(cfg, request)}", flush=True)
    return report


def _write(output: str, data: dict[str, Any], described: dict[str, Any], remedy: str) -> None:
    """The checkpoint, and its report beside it: both or, if there is no room, neither."""
    text = json.dumps(described, indent=2, allow_nan=False)

    def write_both(file: BinaryIO) -> None:
        file.write(f"{text}\n".encode())
        file.flush()
        replace_file(output, lambda inner: torch.save(data, inner))

    try:
        replace_file(Path(output).with_suffix(".json"), write_both)
    except OSError as error:
        raise LaunchError(
            f"--output must be on a disk with room, in a folder that can be written to; got {type(error).__name__}: "
            f"{error} ({output}); nothing is written. Mend it. {remedy}".rstrip()
        ) from error


def _load(checkpointer: Checkpointer, weights: str, replaced: Sequence[str]) -> dict[str, Any]:
    try:
        return checkpointer.load(weights, checkpointables=[], complete=True, replaced=replaced)
    except AssertionError as error:  # Detectron2 0.6 takes a query for a part of the name
        raise CheckpointError(
            f"MODEL.WEIGHTS must be a file that the installed Detectron2 finds; got {weights!r} and {error}. Leave out "
            f"what follows '?': later versions read it."
        ) from error


def _check_report(request: RecomputeRequest, report: RecomputeReport, left_out: Sequence[str], kept: KeptRun) -> None:
    try:
        _check_reached(request, report)
        _check_repaired(left_out, report)
    except StatisticsError:
        kept.remove()  # the same request would end so again
        raise


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


def _check_repaired(left_out: Sequence[str], report: RecomputeReport) -> None:
    """What was broken is not to be written with the values of a new norm."""
    for estimate in report.not_reached:
        if any(owner == estimate.path or owner.startswith(f"{estimate.path}.") for owner in left_out):
            raise StatisticsError(
                f"statistics that are not finite in MODEL.WEIGHTS must be reached by the images; got none for "
                f"{estimate.name} in {report.num_samples} images; nothing is written. Use more or larger images."
            )


def _choose_images(cfg: CfgNode, model: nn.Module, request: RecomputeRequest) -> dict[str, Any]:
    arguments: dict[str, Any] = {"num_samples": request.num_samples, "source_samples": request.source_samples}
    if not request.datasets:
        return {**arguments, "num_batches": count_batches(cfg) if request.num_samples else None}
    labelled = needs_labels(cfg, model)
    batches = build_shuffled_batches(cfg, request.datasets, domains=request.domains, labelled=labelled)
    return {**arguments, "batches": batches}


def _find_run(cfg: CfgNode, request: RecomputeRequest, num_workers: int) -> KeptRun:
    """What is kept of a run; a request that differs in anything that counts has other files."""
    same = dataclasses.replace(request, resume=False, overwrite=False)
    return KeptRun(request.output, cfg.MODEL.WEIGHTS, repr((cfg.dump(), same, num_workers)))


def _keep_state(cfg: CfgNode, kept: KeptRun, resume: bool) -> dict[str, Any]:
    path, begun = kept.begin(resume)
    is_kept = cfg.TEST.BNEXT.PRECISE_BN.ESTIMATOR != "layer_by_layer"
    return {"on_first_batch": begun, **({"state_file": path, "remove_state": False} if is_kept else {})}


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
    norms = resolve_norms(cfg).places
    places = [name for name, norm in norms.items() if norm.is_batch_norm and population in PLACES[name].sources]
    if not places:
        raise ConfigError(
            f"--population must be of a model with batch norms that can have it; got {population!r} for "
            f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE!r} (give_population). Use an architecture of bnext, "
            f"such as BNextRetinaNet, which loads the same checkpoint, or leave --population out."
        )
    cfg = cfg.clone()
    cfg.defrost()
    for place in places:
        cfg.MODEL.BNEXT[place].POPULATION = population
    if population == "per_domain" and not cfg.MODEL.BNEXT.DOMAINS.NAMES:
        cfg.MODEL.BNEXT.DOMAINS.NAMES = tuple(dict.fromkeys(domains))
    elif population == "shared" and not any("per_domain" in node.values() for node in cfg.MODEL.BNEXT.values()):
        cfg.MODEL.BNEXT.DOMAINS.NAMES, cfg.MODEL.BNEXT.DOMAINS.FALLBACK = (), ""
    resolve_norms(cfg)
    cfg.freeze()
    return cfg


def find_keys(cfg: CfgNode) -> dict[str, Any]:
    """The keys that say whose population statistics the norms of a config have."""
    norms = resolve_norms(cfg)
    keys: dict[str, Any] = {}
    for place, norm in norms.places.items():
        if norm.is_batch_norm:
            keys[f"MODEL.BNEXT.{place}.POPULATION"] = norm.spec.population

    if norms.domains:
        keys["MODEL.BNEXT.DOMAINS.NAMES"] = list(norms.domains)
    return keys


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

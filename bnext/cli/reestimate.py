"""Population statistics of a saved checkpoint, estimated anew without training.

The input is only read. The output loads where the input does, and says of itself what was done.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, get_args

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn

from bnext.checkpoints.checkpointer import RE_ESTIMATED, Checkpointer
from bnext.cli.arguments import FILE_HELP, PAIRS_HELP
from bnext.cli.output_file import find_existing_faults, find_kept, find_path_faults
from bnext.cli.run_command import load_config_to_reestimate
from bnext.config.blame import building_from_config
from bnext.config.domains import NAMES, count_set_domains
from bnext.config.keys import KEYS
from bnext.config.places import ARCHITECTURES, PLACES
from bnext.config.recipe import resolve_norms
from bnext.data.batches import build_shuffled_batches
from bnext.data.check_coco import check_datasets
from bnext.data.domains import find_domain, find_train_domains
from bnext.data.records import load_records
from bnext.engine.launch import count_workers, launch
from bnext.engine.output import holding_output
from bnext.engine.population import count_batches
from bnext.engine.screen import only_in_file, set_up_logging
from bnext.errors import BNextError, CheckpointError, ConfigError, LaunchError, StatisticsError, check_choice
from bnext.evaluation.reestimate import (
    check_repaired,
    format_report,
    give_head_levels,
    needs_labels,
    recompute_statistics,
)
from bnext.files import remove_partials, replace_file, write_json
from bnext.heads.build_warnings import building_unwarned
from bnext.layers.sources import is_per_domain, is_per_level
from bnext.layers.walk import find_bnext_norms
from bnext.lazy_config import is_lazy
from bnext.locks import holding
from bnext.statistics import RecomputeReport
from bnext.statistics.observe import find_replaceable
from bnext.statistics.recompute import Estimator
from bnext.surgery.convert_state import collect_norm_specs

__all__ = [
    "DESCRIPTION",
    "LEFT_OUT",
    "POPULATIONS",
    "RecomputeRequest",
    "add_arguments",
    "execute",
    "find_keys",
    "find_kept",
    "give_population",
    "recompute_checkpoint",
    "run_request",
]

DESCRIPTION = """Estimate the population statistics of a saved checkpoint anew, without training (PreciseBN, AdaBN).

    bnext reestimate --config-file CONFIG.yaml MODEL.WEIGHTS in.pth --output out.pth
    bnext reestimate ... --population per_level --num-samples 4000 --tolerance 0.01
    bnext reestimate ... --dataset NAME --source-samples 64    # a target domain, without labels

The config describes the model of in.pth, which is only read. On a machine without GPUs --num-gpus counts CPU
workers."""
IS_INTERMIXED = True
POPULATIONS = ("shared", "per_level", "per_domain")
# Of a training, or of how the input's names are to be read: they no longer hold of the output.
LEFT_OUT = (
    "model",
    "optimizer",
    "scheduler",
    "iteration",
    "trainer",
    "norm_specs",
    "matching_heuristics",
    "__author__",
)
_GIVE_BOTH = "Give --dataset and --domain for each, or the set a domain in DATASETS.DOMAINS."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument

    add("--config-file", required=True, metavar="FILE", help=f"of the model of MODEL.WEIGHTS: {FILE_HELP}")
    add("--output", required=True, metavar="FILE", help="the checkpoint to write, *.pth; its report is *.json")
    add("--population", help=f"whose statistics the output has: {', '.join(POPULATIONS)} (default: as the config says)")
    add("--dataset", action="append", default=[], metavar="NAME", help="instead of DATASETS.TRAIN; needs no labels")
    add(
        "--domain",
        action="append",
        default=[],
        metavar="NAME",
        help="of each --dataset, for statistics per domain (default: as the config or its registration says)",
    )

    add("--num-samples", type=int, metavar="N", help="images that are enough")
    add("--tolerance", type=float, metavar="T", help="stop at this standard error, such as 0.01")
    add("--estimator", help=f"one of {', '.join(get_args(Estimator))}")
    add("--source-samples", type=float, default=0, metavar="N", help="images that the old statistics count for")

    add("--num-gpus", type=int, default=1, metavar="N", help="workers")
    add("--resume", action="store_true", help=argparse.SUPPRESS)
    add("--overwrite", action="store_true", help="replace an output that exists")
    add("opts", nargs="*", metavar="KEY VALUE", help=PAIRS_HELP)


def execute(args: argparse.Namespace) -> None:
    """Run the command."""
    if args.resume:
        remedy = "A re-estimation takes minutes, and begins anew."
        raise ConfigError.of("--resume", "be left out", got="it", remedy=remedy)
    if args.tolerance is not None and not 0 <= args.tolerance < math.inf:
        remedy = "Use 0.01 for 1 %."
        raise ConfigError.of("--tolerance", "be 0 (none) or above", got=args.tolerance, remedy=remedy)

    opts = [*args.opts]
    for key, value in (("ESTIMATOR", args.estimator), ("TOLERANCE", args.tolerance)):
        if value is not None:
            opts += [f"TEST.BNEXT.PRECISE_BN.{key}", str(value)]
    cfg = load_config_to_reestimate(args.config_file, opts)

    request = RecomputeRequest(
        output=args.output,
        population=args.population,
        datasets=tuple(args.dataset),
        domains=tuple(args.domain),
        num_samples=args.num_samples,
        source_samples=args.source_samples,
        overwrite=args.overwrite,
    )
    run_request(cfg, request, args.num_gpus)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecomputeRequest:
    """The request: what is wanted of a checkpoint.

    Args:
        output: the file to write, *.pth; a report is written beside it, *.json.
        population: whose statistics the output has, see `give_population`; None: as the config says.
        datasets: images without labels, such as a target domain's (AdaBN); empty: DATASETS.TRAIN, as in training.
        domains: one for each data set, if norms have statistics per domain; empty: each image's own.
        num_samples: images that are enough; None: all of `datasets`, or TEST.PRECISE_BN.NUM_ITER training batches.
        source_samples: so many images do the statistics that are there count for; 0 replaces them.
        overwrite: whether an output that exists is replaced.
    """

    output: str
    population: str | None = None
    datasets: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    num_samples: int | None = None
    source_samples: float = 0
    overwrite: bool = False

    @property
    def report(self) -> str:
        """The report's file."""
        return str(Path(self.output).with_suffix(".json"))


def run_request(cfg: CfgNode, request: RecomputeRequest, num_workers: int = 1) -> None:
    """Check everything, start the workers, and do it.

    Args:
        cfg: describes the model; MODEL.WEIGHTS is the input.
        request: what is wanted.
        num_workers: GPUs, or CPU cores on a machine without.

    Raises:
        BNextError: what is wrong; then nothing is written.
        KeyboardInterrupt: nothing is written either.
    """
    size = count_workers(num_workers, device=cfg.MODEL.DEVICE)
    request = _find_domains(cfg, request)
    _raise_first(find_faults(cfg, request))
    _raise_first(find_file_faults(cfg.MODEL.WEIGHTS, request))
    if request.population:
        cfg = give_population(cfg, request.population, request.domains)
    _raise_first(find_data_faults(cfg, request, size))

    try:
        launch(recompute_checkpoint, num_workers, args=(cfg, request), device=cfg.MODEL.DEVICE)
    except KeyboardInterrupt:
        # Of workers that were ended while they wrote; not of another run, which holds the output.
        with contextlib.suppress(BNextError, OSError), holding(request.output, "--output"):
            remove_partials(request.report)
        raise


def _find_domains(cfg: CfgNode, request: RecomputeRequest) -> RecomputeRequest:
    """The request with the domain of each data set that it names, where all of them are known to have one."""
    is_asked = request.population == "per_domain" or resolve_norms(cfg).domains
    if request.domains or not is_asked:
        return request
    domains = tuple(find_domain(cfg, name) for name in request.datasets)
    return dataclasses.replace(request, domains=domains) if all(domains) else request


# ---- what is refused


def _raise_first(faults: Iterable[BNextError]) -> None:
    for fault in faults:
        raise fault


def find_faults(cfg: CfgNode, request: RecomputeRequest) -> Iterator[BNextError]:
    """Values of a request that do not go together."""
    datasets, domains = request.datasets, request.domains

    known = domains or resolve_norms(cfg).domains or (not datasets and find_train_domains(cfg))
    if request.population == "per_domain" and not known:
        rule = "be given the domain of each --dataset"
        yield ConfigError.of("--population per_domain", rule, got="none", remedy=_GIVE_BOTH)

    if domains and len(domains) != len(datasets):
        got = f"{len(domains)} for {len(datasets)} data sets"
        remedy = "Name the domain of every data set."
        yield ConfigError.of("--domain", "be given once for each --dataset", got=got, remedy=remedy)

    pairs = list(zip(datasets, domains or [""] * len(datasets), strict=False))
    for name, domain in pairs:
        if pairs.count((name, domain)) > 1:
            got = f"{name!r} twice" + (f" for --domain {domain}" if domain else "")
            remedy = "Leave one out: the same images again are no independent ones."
            yield ConfigError.of("--dataset", "name each data set once", got=got, remedy=remedy)

    if request.num_samples is not None and request.num_samples < 1:
        yield ConfigError.of("--num-samples", "be 1 or more", got=request.num_samples, remedy="Use 1000 to 10000.")


def find_file_faults(weights: str, request: RecomputeRequest) -> Iterator[BNextError]:
    """The input is to be there and to stay, the output to be one that can be written."""
    yield from find_path_faults(request.output, weights, (".pth",))
    yield from find_output_faults(request)


def find_output_faults(request: RecomputeRequest) -> Iterator[BNextError]:
    """Files that are there are kept, unless they are to be replaced."""
    yield from find_existing_faults((request.output, request.report), overwrite=request.overwrite)


def find_data_faults(cfg: CfgNode, request: RecomputeRequest, num_workers: int) -> Iterator[BNextError]:
    """The domain of every image is to be known, and each worker to have one.

    Args:
        cfg: of the output.

    Raises:
        DatasetError: a data set cannot be read.
    """
    norms = resolve_norms(cfg)
    names, where = norms.domains, NAMES

    for name in request.domains:
        if name not in names:
            rule, remedy = f"be one of the model's domains {names}", "Correct it, or leave --domain out."
            yield ConfigError.of("--domain", rule, got=repr(name), where=where, remedy=remedy)

    if not (request.datasets or cfg.DATASETS.TRAIN):
        remedy = "Name one in the config, or give --dataset."
        yield ConfigError.of("DATASETS.TRAIN", "name at least one data set", got="none", remedy=remedy)

    if not request.datasets:
        check_datasets(cfg.DATASETS.TRAIN, cfg=cfg)
    if names and not request.domains and norms.fallback_domain is None:
        for name in request.datasets or cfg.DATASETS.TRAIN:
            yield from _find_unknown_domains(cfg, name, names)
    for name in request.datasets:
        number = len(load_records(name, cfg))
        if number < num_workers:
            rule = f"have an image for each of the {num_workers} workers"
            remedy = "Use fewer workers, --num-gpus, or leave it out."
            yield ConfigError.of("--dataset", rule, got=f"{number} in {name!r}", remedy=remedy)


def _find_unknown_domains(cfg: CfgNode, dataset: str, names: Sequence[str]) -> Iterator[BNextError]:
    """Images of domains that the norms do not have, or without one."""
    for domain, number in count_set_domains(cfg, dataset).items():
        if domain not in names:
            rule = f"name the domain of each --dataset where norms have domains, one of {names}"
            got = f"{number} images of {domain!r}" if domain else f"{number} images without one"
            yield ConfigError.of("--domain", rule, got=f"{got} in {dataset!r}", where=NAMES, remedy=_GIVE_BOTH)


# ---- the config of the output


def give_population(cfg: CfgNode, population: str, domains: Sequence[str] = ()) -> CfgNode:
    """A config whose norms have population statistics of another owner, wherever that can be.

    Args:
        cfg: of a model of bnext.
        population: "shared", "per_level" (heads that see several levels), or "per_domain" (everything; in heads that
            have one for each level, one for each domain at each level).
        domains: of "per_domain", beside those of the training sets, where the config names none.

    Returns:
        A copy; only POPULATION of the places, and MODEL.BNEXT.DOMAINS.NAMES, differ. Of a model whose architecture is
        not bnext's, with "per_level", the same: what its head calls several times is seen when it is built.

    Raises:
        ConfigError: no place of the model can have it.
    """
    check_choice("--population", population, POPULATIONS, where="bnext reestimate")
    if population == "per_level" and is_foreign(cfg):
        return cfg

    norms = resolve_norms(cfg).places
    places = [name for name, norm in norms.items() if norm.is_batch_norm and population in PLACES[name].answers]
    if not places:
        got = f"{population!r} for MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE!r}"
        rule = "be of a model with batch norms that can have it"
        remedy = "Use an architecture of bnext, such as BNextRetinaNet, which loads the same file, or leave it out."
        if is_lazy(cfg):
            remedy = "Name the place in `norms`, such as norms.RETINANET.NORM=BN, or leave it out."
        if is_foreign(cfg):
            remedy += " Any architecture can have per_level, if its head is called on several levels."
        raise ConfigError.of("--population", rule, got=got, remedy=remedy)

    cfg = cfg.clone()
    cfg.defrost()
    nodes = cfg.LAZY.NORMS if is_lazy(cfg) else cfg.MODEL.BNEXT
    for place in places:
        is_by_level = population == "per_domain" and is_per_level(norms[place].spec.population)
        nodes[place].POPULATION = "per_level_and_domain" if is_by_level else population
    answers = itertools.chain.from_iterable(node.values() for node in nodes.values())
    start = "MODEL.BNEXT.DOMAINS."
    defaults = {name.removeprefix(start): key.default for name, key in KEYS.items() if name.startswith(start)}
    names = nodes.setdefault("DOMAINS", CfgNode(defaults))
    if population == "per_domain" and not names.get("NAMES"):
        names.NAMES = tuple(dict.fromkeys([*find_train_domains(cfg), *domains]))
    elif population == "shared" and not any(map(is_per_domain, answers)):
        names.update(defaults)

    resolve_norms(cfg)
    cfg.freeze()
    return cfg


def is_foreign(cfg: CfgNode) -> bool:
    """Whether the head is none of bnext's: that of detectron2's own architecture, or of somebody's."""
    has_levels = any(PLACES[place].levels for place in resolve_norms(cfg).places)
    return cfg.MODEL.META_ARCHITECTURE not in ARCHITECTURES and not has_levels


def find_keys(cfg: CfgNode) -> dict[str, Any]:
    """The keys that say whose population statistics the norms of a config have."""
    norms = resolve_norms(cfg)
    keys: dict[str, Any] = {}

    nodes = "norms" if is_lazy(cfg) else "MODEL.BNEXT"
    for place, norm in norms.places.items():
        if norm.is_batch_norm:
            keys[f"{nodes}.{place}.POPULATION"] = norm.spec.population
    if norms.domains:
        keys[f"{nodes}.DOMAINS.NAMES"] = list(norms.domains)
    return keys


# ---- what every worker does


def recompute_checkpoint(cfg: CfgNode, request: RecomputeRequest) -> RecomputeReport:
    """Load MODEL.WEIGHTS, estimate, and write: what every worker does.

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
        set_up_logging()

    with holding_output(request.output, "--output", is_folder=False), only_in_file("bnext.evaluation.reestimate"):
        _raise_first(find_output_faults(request))  # another run may have ended since the first look
        return _recompute(cfg, request)


def _recompute(cfg: CfgNode, request: RecomputeRequest) -> RecomputeReport:
    with building_from_config(), building_unwarned():
        model = build_model(cfg)

    checkpointer = Checkpointer(model)
    begins_with_them = request.source_samples or cfg.TEST.BNEXT.PRECISE_BN.ESTIMATOR == "moving_average"
    others = _load(checkpointer, cfg.MODEL.WEIGHTS, () if begins_with_them else tuple(find_replaceable(model)))

    entries = model.state_dict().keys()
    levels: dict[str, Any] = {}
    if request.population == "per_level" and is_foreign(cfg):
        levels = give_head_levels(cfg, model, _choose_images(cfg, model, request).get("batches"))

    images = _choose_images(cfg, model, request)
    report = recompute_statistics(cfg, model, source_samples=request.source_samples, **images)
    _check_reached(request, report, model)
    check_repaired(checkpointer.left_out, report)

    if comm.is_main_process():
        done = _describe(cfg, request, report, levels)
        changed = levels if model.state_dict().keys() != entries else {}
        others = {key: value for key, value in others.items() if key not in LEFT_OUT}
        data = {"model": model.state_dict(), "norm_specs": collect_norm_specs(model), **others, RE_ESTIMATED: done}
        _write(request, data, {**done, "report": report.as_dict()})
        print(f"{format_report(report)}\n{_say_fewer(request, report)}{_say_files(cfg, request, changed)}", flush=True)
    comm.synchronize()
    return report


def _load(checkpointer: Checkpointer, weights: str, replaced: Sequence[str]) -> dict[str, Any]:
    try:
        return checkpointer.load(weights, checkpointables=[], complete=True, replaced=replaced)
    except AssertionError as error:  # Detectron2 0.6 takes a query for a part of the name
        rule, remedy = "be a file that the installed Detectron2 finds", "Leave out what follows '?'."
        raise CheckpointError.of("MODEL.WEIGHTS", rule, got=f"{weights!r} and {error}", remedy=remedy) from error


def _choose_images(cfg: CfgNode, model: nn.Module, request: RecomputeRequest) -> dict[str, Any]:
    if not request.datasets:
        num_batches = count_batches(cfg) if request.num_samples else None
        return {"num_samples": request.num_samples, "num_batches": num_batches}

    labelled = needs_labels(cfg, model)
    batches = build_shuffled_batches(cfg, request.datasets, domains=request.domains, labelled=labelled)
    return {"num_samples": request.num_samples, "batches": batches}


def _check_reached(request: RecomputeRequest, report: RecomputeReport, model: nn.Module) -> None:
    """A domain that was asked for is not to be written as it was."""
    for domain in dict.fromkeys(request.domains):
        owners = _find_owners(model, domain)
        estimates = [estimate for estimate in report.estimates if (estimate.path, estimate.levels) in owners]
        if not estimates or any(estimate.is_reached for estimate in estimates):
            continue
        pairs = zip(request.datasets, request.domains, strict=True)
        names = ", ".join(name for name, its_domain in pairs if its_domain == domain)
        got = f"none for {domain!r} in {report.num_samples} images (--dataset {names}); nothing is written"
        remedy = "Use more images, --num-samples, or fewer workers."
        raise StatisticsError.of("--domain", "get images", got=got, remedy=remedy)


def _find_owners(model: nn.Module, domain: str) -> set[tuple[str, tuple[str, ...]]]:
    """Path of a norm and name of each of its populations that are a domain's own."""
    owners: set[tuple[str, tuple[str, ...]]] = set()
    for path, norm in find_bnext_norms(model).items():
        if is_per_domain(norm.spec.population):
            owners.update((path, (name,)) for name in norm.find_owners(domain))
    return owners


def _write(request: RecomputeRequest, data: dict[str, Any], described: dict[str, Any]) -> None:
    """The checkpoint, and its report beside it: both or, if there is no room, neither."""

    def write_both(file: BinaryIO) -> None:
        torch.save(data, file)  # and flushes
        write_json(request.report, described)

    try:
        replace_file(request.output, write_both)
    except OSError as error:
        rule = "be on a disk with room, in a folder that can be written to"
        got = f"{type(error).__name__}: {error} ({request.output}); nothing is written"
        raise LaunchError.of("--output", rule, got=got, remedy="Mend it.") from error


def _describe(
    cfg: CfgNode, request: RecomputeRequest, report: RecomputeReport, levels: Mapping[str, Any]
) -> dict[str, Any]:
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
        **levels,
    }


def _say_fewer(request: RecomputeRequest, report: RecomputeReport) -> str:
    has_stopped_early = report.tolerance is not None and not report.not_converged
    if request.num_samples is None or report.num_samples >= request.num_samples or has_stopped_early:
        return ""
    return f"Fewer images than asked: {report.num_samples} of {request.num_samples}; there are no more.\n"


def _say_files(cfg: CfgNode, request: RecomputeRequest, levels: Mapping[str, Any]) -> str:
    """The files; and how to load them, where the config alone does not say it.

    Args:
        levels: of the norms of a head of others whose entries are laid out otherwise than the input's.
    """
    keys = find_keys(cfg) if request.population else {}
    pairs = "".join(f"\n  {key}: {value}" for key, value in keys.items())
    load = f"\nTo load it, the config must say:{pairs}" if keys else ""

    if levels:
        number, (path, names) = len(levels["levels"]), next(iter(levels["levels"].items()))
        load = (
            f"\n{number} norms have entries for each level now ({path}.{names[0]}.running_mean, ...), as those of "
            "detectron2's RetinaNetHead(norm='BN') do.\n"
            "Commands of bnext load it as it is, with the same config. A program of yours gives its model such norms "
            "before it loads the weights:\n"
            f"  bnext.convert_norm(model, {{path: lambda channels: bnext.CycleBatchNormList({len(names)}, "
            "num_features=channels) for path in paths})\n"
            f"  bnext.count_levels(model, {tuple(levels['entry'])})\n"
            f"The paths are under levels in {request.report}."
        )
    return f"\n{request.output}\n{request.report}{load}"

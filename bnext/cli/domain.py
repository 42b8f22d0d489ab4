"""Domains of a trained detector: one more, one less, several as one, or one alone as a detector of its own.

The input is only read. The output is a folder with a checkpoint and the config that goes with it.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import ProposalNetwork, SemanticSegmentor, build_model
from torch import Tensor, nn

from bnext.checkpoints.checkpointer import RE_ESTIMATED, Checkpointer, find_missing_weights
from bnext.checkpoints.plain_detectron2 import make_plain_config, make_plain_model
from bnext.cli.arguments import FILE_HELP, PAIRS_HELP
from bnext.cli.export import choose_pictures, compare_detections, detect
from bnext.cli.output_file import find_folder_faults, find_kept
from bnext.cli.reestimate import LEFT_OUT, find_keys
from bnext.config import load_config
from bnext.config.blame import building_from_config
from bnext.config.keys import KEYS
from bnext.config.places import PLACES
from bnext.config.recipe import resolve_norms
from bnext.data.batches import build_shuffled_batches
from bnext.data.check_coco import check_datasets
from bnext.data.domains import find_domain
from bnext.data.picture_folder import register_folder
from bnext.data.records import has_labels, load_records
from bnext.engine.output import holding_output
from bnext.errors import CheckpointError, ConfigError, Refusal, check_choice, list_few
from bnext.evaluation.reestimate import format_report, needs_labels, recompute_statistics
from bnext.files import replace_file, write_folder, write_json
from bnext.heads.build_warnings import building_unwarned
from bnext.layers.sources import drop_domains, is_per_domain
from bnext.lazy_config import is_lazy
from bnext.scope.domain import use_domain
from bnext.statistics import RecomputeReport
from bnext.surgery.convert_state import ConversionReport, collect_norm_specs
from bnext.surgery.domains import (
    add_domain,
    drop_domain,
    find_domain_norms,
    list_domains,
    merge_domains,
    select_domain,
)

__all__ = ["ACTIONS", "DESCRIPTION", "DomainRequest", "add_arguments", "change_domains", "execute", "find_kept"]

DESCRIPTION = """Domains of a trained detector whose norms have them: add one, drop one, merge several, select one.

    bnext domain add night --images night_pictures/ --config-file CONFIG.yaml --output with_night MODEL.WEIGHTS in.pth
    bnext domain drop dusk --config-file CONFIG.yaml --output without_dusk MODEL.WEIGHTS in.pth
    bnext domain merge light --of day=5000 --of dusk=400 --config-file CONFIG.yaml --output merged MODEL.WEIGHTS in.pth
    bnext domain select night --config-file CONFIG.yaml --output night_alone MODEL.WEIGHTS in.pth

  add     statistics of a new domain from one pass over images without labels: a folder of pictures, or a registered set
  drop    a domain, and all that it owned, is left out
  merge   statistics of the union of several domains
  select  a detector of one domain alone, which detectron2 loads without bnext, and which gives the same detections

The output is a folder: model.pth, config.yaml to go with it (bnext evaluate --config-file FOLDER/config.yaml), and
report.json. Whatever belongs to the other domains, or to all, is bit for bit what it was."""
IS_INTERMIXED = True

ACTIONS = ("add", "drop", "merge", "select")
FORMS = ("detectron2", "bnext")
_PART = re.compile(r"(?P<name>.+?)(=(?P<number>\d+))?")  # of --of
_NUM_PICTURES = 4  # for which a selected detector is compared with the whole one

# Option -> the action that it is of.
_ACTIONS_OF = {"images": "add", "like": "add", "source_samples": "add", "of": "merge", "form": "select"}

OF_ANOTHER_ACTION = Refusal(ConfigError, "--{option}", "come with {action}", "Leave it out.")
WITHOUT_IMAGES = Refusal(ConfigError, "--source-samples", "come with --images", "Give both, or neither.")
NOT_TWO = Refusal(
    ConfigError,
    "--of",
    "name each of two or more domains to merge, as NAME or NAME=IMAGES for all",
    "Write --of day --of dusk; with the images that their statistics are of, --of day=5000 --of dusk=400.",
)
NO_DOMAINS = Refusal(
    ConfigError,
    "The config",
    "be of a detector whose norms have domains",
    "Give it the one that it was trained on, whose statistics those of the file then are: "
    "MODEL.BNEXT.DOMAINS.NAMES \"('day',)\" and POPULATION 'per_domain' of its places, such as "
    "MODEL.BNEXT.RESNETS.POPULATION (heads with levels: 'per_level_and_domain').",
)
LAZY = Refusal(
    ConfigError,
    "--config-file",
    "be YAML for this command, which writes a config",
    "In Python there are bnext.add_domain, drop_domain, merge_domains and select_domain, for any model.",
)
NO_INPUT = Refusal(CheckpointError, "MODEL.WEIGHTS", "name the checkpoint that is read", "Give MODEL.WEIGHTS <file>.")
TAKEN = Refusal(
    ConfigError,
    "--output",
    "be a new folder, or an empty one: nothing is overwritten, neither the input",
    "Choose another name.",
)
NO_FOLDER = Refusal(
    ConfigError, "--images", "be a folder of pictures, or the name of a registered data set", "Correct the path."
)
NOTHING_TO_ESTIMATE = Refusal(
    ConfigError,
    "--images",
    "go with population statistics per domain that are not frozen",
    "Leave it out, or give a place POPULATION 'per_domain' (bnext reestimate --population per_domain).",
)
OTHER_ENTRIES = Refusal(
    ConfigError,
    "The config of the output",
    "be of a model with the entries of its checkpoint",
    "Please report this one; nothing is written.",
)

COMPARED = "Compared with the whole detector on {pictures} pictures of {source}: {detections} detections, the same."
NOTHING_DETECTED = "Nothing was found in these pictures, by neither: name a set with objects in DATASETS.TEST."
NOT_COMPARED = "Outputs were not compared with the whole model's: it gives no detections."
AS_IT_BEGINS = "No images were given: train on it, or estimate its statistics (bnext reestimate --domain)."
TOP_SCORED = "Statistics of RoI heads are of the RoIs that score best, as the images have no labels."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("action", metavar="ACTION", help=f"one of {', '.join(ACTIONS)}")
    add("name", metavar="NAME", help="of the domain to add, drop or select, or of the merged one")
    add("--config-file", required=True, metavar="FILE", help=f"of the model of MODEL.WEIGHTS: {FILE_HELP}")
    add("--output", required=True, metavar="FOLDER", help="the folder to make")

    add("--images", metavar="FOLDER", help="add: a folder of pictures, or a registered set, labelled or not")
    add("--like", metavar="NAME", help="add: the domain that it begins as (default: the mixture of all)")
    add(
        "--source-samples", type=float, metavar="N", help="add: images that what it begins with counts for (default: 0)"
    )
    add("--of", action="append", metavar="NAME[=N]", help="merge: one of the domains, and its number of images")
    add("--form", metavar="FORM", help=f"select: the output is of {' (default) or '.join(FORMS)}")
    add("opts", nargs="*", metavar="KEY VALUE", help=PAIRS_HELP)


def execute(args: argparse.Namespace) -> None:
    """Run the command."""
    options = {name: value for name in _ACTIONS_OF if (value := getattr(args, name)) is not None}
    request = DomainRequest(args.action, args.name, args.output, **options)
    change_domains(load_config(args.config_file, args.opts), request)


@dataclasses.dataclass(frozen=True)
class DomainRequest:
    """The request: what is wanted of a checkpoint.

    Args:
        action: one of `ACTIONS`.
        name: of the domain to add, drop or select, or of the merged one.
        output: the folder to make.
        images: of the domain to add: a folder, or a registered set; None: it stays what it begins as.
        like: the domain that it begins as; None: the mixture of all.
        source_samples: so many images does that count for; 0 replaces it.
        of: domains to merge, as "day" or "day=5000".
        form: "detectron2": the selected detector needs no bnext; "bnext": it stays one of bnext.
    """

    action: str
    name: str
    output: str
    images: str | None = None
    like: str | None = None
    source_samples: float = 0
    of: Sequence[str] = ()
    form: str = FORMS[0]


def change_domains(cfg: CfgNode, request: DomainRequest) -> dict[str, Any]:
    """Load MODEL.WEIGHTS, change its domains, and write a folder of its own.

    Args:
        cfg: describes the model; MODEL.WEIGHTS is the input, which is only read.
        request: what is wanted.

    Returns:
        The content of report.json.

    Raises:
        BNextError: what is wrong; then nothing is written.
    """
    _check_request(cfg, request)
    images = None if request.images is None else _find_images(cfg, request.images)

    with holding_output(request.output, "--output", is_folder=False):
        _check_output(request.output)
        with building_from_config(), building_unwarned():
            model = build_model(cfg)
        rest = Checkpointer(model).load(cfg.MODEL.WEIGHTS, checkpointables=[], complete=True)

        change = {"add": _add, "drop": _drop, "merge": _merge, "select": _select}[request.action]
        changed = change(cfg, model.eval(), request, images)
        report = _write(cfg, request, changed, rest)

    print(_format(request, changed), flush=True)
    return report


@dataclasses.dataclass(frozen=True)
class _Changed:
    """A detector with other domains.

    Args:
        model, cfg: of the output; MODEL.WEIGHTS and OUTPUT_DIR are not set yet.
        changes: of the norms.
        estimates: of the statistics of a new domain.
        notes: what else is to be said.
    """

    model: nn.Module
    cfg: CfgNode
    changes: ConversionReport
    estimates: RecomputeReport | None = None
    notes: Sequence[str] = ()


# ---- what is refused


def _check_request(cfg: CfgNode, request: DomainRequest) -> None:
    check_choice("ACTION", request.action, ACTIONS, where="bnext domain")
    check_choice("--form", request.form, FORMS, where="bnext domain")

    defaults = {field.name: field.default for field in dataclasses.fields(DomainRequest)}
    for option, action in _ACTIONS_OF.items():
        if action != request.action and getattr(request, option) != defaults[option]:
            name = option.replace("_", "-")
            raise OF_ANOTHER_ACTION.of(f"it with {request.action}", option=name, action=action)
    if request.action == "merge":
        _read_parts(request)
    if request.source_samples and request.images is None:
        raise WITHOUT_IMAGES.of(f"{request.source_samples:g} without")

    if is_lazy(cfg):
        raise LAZY.of("a LazyConfig")
    if not resolve_norms(cfg).domains:
        raise NO_DOMAINS.of("none", "MODEL.BNEXT.DOMAINS.NAMES")

    if not cfg.MODEL.WEIGHTS:
        raise NO_INPUT.of("''")
    missing = find_missing_weights(cfg.MODEL.WEIGHTS)
    if missing is not None:
        raise missing
    _check_output(request.output)


def _check_output(output: str) -> None:
    for fault in find_folder_faults(os.path.abspath(output)):
        raise fault
    if os.path.lexists(output) and not (os.path.isdir(output) and not os.listdir(output)):
        raise TAKEN.of(f"{output!r}, which is there")


def _read_parts(request: DomainRequest) -> tuple[list[str], dict[str, float] | None]:
    """Domains to merge, and the number of images of each, if they are given."""
    parts = [_PART.fullmatch(word) for word in request.of]
    names = [part["name"] for part in parts if part]
    numbers = {part["name"]: float(part["number"]) for part in parts if part and part["number"]}

    if len(set(names)) < max(2, len(request.of)) or len(numbers) not in (0, len(names)):
        raise NOT_TWO.of(" ".join(request.of) or "none")
    return names, numbers or None


def _find_images(cfg: CfgNode, images: str) -> str:
    """The name of a data set, whose pictures were looked for."""
    name = images
    if images not in DatasetCatalog and (os.path.isdir(images) or os.sep in images):
        if not os.path.isdir(images):
            raise NO_FOLDER.of(repr(images))
        name = register_folder(images)

    check_datasets([name], training=False, cfg=cfg)
    return name


# ---- the four actions


def _add(cfg: CfgNode, model: nn.Module, request: DomainRequest, images: str | None) -> _Changed:
    changes = add_domain(model, request.name, request.like)
    new_cfg = _name_domains(cfg, list_domains(model), {})
    if images is None:
        return _Changed(model, new_cfg, changes, notes=[AS_IT_BEGINS])

    paths = _find_own_populations(model)
    if not paths:
        raise NOTHING_TO_ESTIMATE.of(repr(request.images))

    def is_of_domains(path: str, norm: nn.Module) -> bool:
        return path in paths

    notes = []
    labelled = needs_labels(cfg, model, is_of_domains)
    if labelled and not has_labels(load_records(images, cfg)):
        cfg, labelled = _with_top_scored_rois(cfg), False
        notes.append(TOP_SCORED)

    batches = build_shuffled_batches(cfg, [images], domains=[request.name], labelled=labelled)
    estimates = recompute_statistics(
        cfg, model, is_of_domains, batches=batches, domain=request.name, source_samples=request.source_samples
    )
    return _Changed(model, new_cfg, changes, _pick_estimates(estimates, model, request.name), notes)


def _find_own_populations(model: nn.Module) -> list[str]:
    """Paths of norms with population statistics per domain that can be estimated."""
    paths = []
    for path, norm in find_domain_norms(model).items():
        if is_per_domain(norm.spec.population) and not norm.spec.has_frozen_statistics:
            paths.append(path)
    return paths


def _with_top_scored_rois(cfg: CfgNode) -> CfgNode:
    cfg = cfg.clone()
    cfg.defrost()
    cfg.TEST.BNEXT.PRECISE_BN.ROIS = "top_scored"
    return cfg


def _pick_estimates(report: RecomputeReport, model: nn.Module, name: str) -> RecomputeReport:
    """The sets of one domain, without those of the others, which nothing was to reach."""
    norms = find_domain_norms(model)
    picked = []
    for estimate in report.estimates:
        if set(estimate.levels) & set(norms[estimate.path].find_owners(name)):
            picked.append(estimate)
    return dataclasses.replace(report, estimates=tuple(picked))


def _drop(cfg: CfgNode, model: nn.Module, request: DomainRequest, images: str | None) -> _Changed:
    changes = drop_domain(model, request.name)
    new_cfg = _name_domains(cfg, list_domains(model), {request.name: None})
    return _Changed(model, new_cfg, changes, notes=_tell_sets(cfg, new_cfg))


def _merge(cfg: CfgNode, model: nn.Module, request: DomainRequest, images: str | None) -> _Changed:
    names, numbers = _read_parts(request)
    changes = merge_domains(model, names, request.name, num_samples=numbers)
    cfg = _name_domains(cfg, list_domains(model), dict.fromkeys(names, request.name))
    return _Changed(model, cfg, changes)


@torch.no_grad()
def _select(cfg: CfgNode, model: nn.Module, request: DomainRequest, images: str | None) -> _Changed:
    """The selected detector, which was seen to detect what the whole one does."""
    whole, (pictures, source) = copy.deepcopy(model), choose_pictures(cfg, _NUM_PICTURES)
    changes = select_domain(model, request.name)
    cfg = _without_domains(cfg)
    if request.form == "detectron2":
        cfg = make_plain_config(cfg)
        model = make_plain_model(cfg, model)

    if isinstance(model, (ProposalNetwork, SemanticSegmentor)):
        return _Changed(model, cfg, changes, notes=[NOT_COMPARED])
    number = _compare(whole, model, pictures, request.name)
    notes = [COMPARED.format(pictures=len(pictures), source=source, detections=number)]
    return _Changed(model, cfg, changes, notes=notes if number else [*notes, NOTHING_DETECTED])


def _compare(whole: nn.Module, model: nn.Module, pictures: Sequence[Tensor], domain: str) -> int:
    """The number of detections of two detectors, which are the same; else it is refused."""
    device = next(model.parameters()).device
    number = 0
    for picture in pictures:
        inputs = [{"image": picture.to(device)}]
        with use_domain(domain):
            (expected,) = detect(whole, inputs)
        (instances,) = detect(model, inputs)

        compare_detections({name: getattr(v, "tensor", v) for name, v in instances.get_fields().items()}, expected)
        number += len(expected)
    return number


# ---- the config of the output


def _name_domains(cfg: CfgNode, names: Sequence[str], renamed: Mapping[str, str | None]) -> CfgNode:
    """A config whose norms have these domains, and whose sets are of these.

    Args:
        cfg: of the input.
        names: of all domains.
        renamed: name in the input -> name in the output; None: there is none, and sets of that domain are left out.
    """
    domains = {part: [find_domain(cfg, name) for name in cfg.DATASETS[part]] for part in ("TRAIN", "TEST")}
    cfg = cfg.clone()
    cfg.defrost()

    for part, before in domains.items():
        if not any(domain in renamed for domain in before):
            continue
        pairs = zip(cfg.DATASETS[part], before, strict=True)
        kept = {name: renamed.get(domain, domain) for name, domain in pairs}
        kept = {name: domain for name, domain in kept.items() if domain is not None}
        cfg.DATASETS[part], cfg.DATASETS.DOMAINS[part] = tuple(kept), tuple(kept.values())

    node = cfg.MODEL.BNEXT.DOMAINS
    node.NAMES, node.FALLBACK = tuple(names), renamed.get(node.FALLBACK) or node.FALLBACK
    cfg.freeze()
    return cfg


def _tell_sets(cfg: CfgNode, new_cfg: CfgNode) -> list[str]:
    """The sets that the config of the output no longer has."""
    notes = []
    for part in ("TRAIN", "TEST"):
        left_out = [name for name in cfg.DATASETS[part] if name not in new_cfg.DATASETS[part]]
        if left_out:
            notes.append(f"Left out of DATASETS.{part}, as they are of that domain: {list_few(left_out)}.")
    return notes


def _without_domains(cfg: CfgNode) -> CfgNode:
    """A config whose norms have none; what was of each domain is shared."""
    cfg = cfg.clone()
    cfg.defrost()

    for place in PLACES:
        node = cfg.MODEL.BNEXT[place]
        for key in ("STATISTICS", "POPULATION", "AFFINE"):
            node[key] = drop_domains(node[key])
    for key in cfg.MODEL.BNEXT.DOMAINS:
        cfg.MODEL.BNEXT.DOMAINS[key] = KEYS[f"MODEL.BNEXT.DOMAINS.{key}"].default
    cfg.freeze()
    return cfg


# ---- files


def _write(cfg: CfgNode, request: DomainRequest, changed: _Changed, rest: Mapping[str, Any]) -> dict[str, Any]:
    """Checkpoint, config and report in a folder, all or none."""
    new_cfg = changed.cfg.clone()
    new_cfg.defrost()
    new_cfg.MODEL.WEIGHTS = os.path.join(request.output, "model.pth")
    new_cfg.OUTPUT_DIR = os.path.join(request.output, "output")
    new_cfg.freeze()

    is_of_bnext = "BNEXT" in new_cfg.MODEL
    data: dict[str, Any] = {"model": changed.model.state_dict()}
    if is_of_bnext:
        _check_entries(new_cfg, changed.model)
        data |= {"norm_specs": collect_norm_specs(changed.model)}
        data |= {key: value for key, value in rest.items() if key not in LEFT_OUT}
    if is_of_bnext and isinstance(data.get(RE_ESTIMATED), dict):
        data[RE_ESTIMATED] = {**data[RE_ESTIMATED], "keys": find_keys(new_cfg)}

    estimates = changed.estimates
    report = {
        **dataclasses.asdict(request),
        "weights": cfg.MODEL.WEIGHTS,
        "domains": list(list_domains(changed.model)),
        "changes": [dataclasses.asdict(change) for change in changed.changes.changes],
        "keeps_outputs": changed.changes.keeps_outputs,
        "statistics": None if estimates is None else estimates.as_dict(),
    }

    def write(folder: str) -> None:
        replace_file(os.path.join(folder, "model.pth"), partial(torch.save, data))
        replace_file(os.path.join(folder, "config.yaml"), lambda file: file.write(new_cfg.dump().encode()))
        write_json(os.path.join(folder, "report.json"), report)

    write_folder(request.output, write)
    return report


def _check_entries(cfg: CfgNode, model: nn.Module) -> None:
    """Refuse a config whose model is not the one that is written."""
    with building_from_config(), building_unwarned():
        expected = build_model(cfg).state_dict()
    different = sorted(expected.keys() ^ model.state_dict().keys())
    if different:
        raise OTHER_ENTRIES.of(f"{different[0]} on one side alone", "bnext domain")


def _format(request: DomainRequest, changed: _Changed) -> str:
    lines = [str(changed.changes), *changed.notes]
    if changed.estimates is not None:
        lines = [format_report(changed.estimates), "", *lines]

    config = os.path.join(request.output, "config.yaml")
    lines += ["", os.path.join(request.output, "model.pth"), config, os.path.join(request.output, "report.json")]
    if request.action == "add":
        lines += ["", "Evaluate it on labelled images of the domain, if there are some:"]
        pairs = f"DATASETS.TEST \"('my_val',)\" DATASETS.DOMAINS.TEST \"('{request.name}',)\""
        lines += [f"  bnext evaluate --config-file {config} {pairs}"]
    return "\n".join(lines)

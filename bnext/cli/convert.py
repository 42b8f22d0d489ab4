"""A checkpoint in the form of another config's model: other norms, other names, norms merged into convolutions."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from bnext.checkpoints.checkpointer import RE_ESTIMATED, Checkpointer
from bnext.checkpoints.names import TORCHVISION_INPUT, rename_torchvision
from bnext.cli.arguments import FILE_HELP, PAIRS_HELP
from bnext.cli.export import fold_parts
from bnext.cli.output_file import check_output_file, find_existing_faults, find_kept
from bnext.config import load_config
from bnext.config.blame import building_from_config
from bnext.config.check import flatten
from bnext.engine.output import holding_output
from bnext.errors import CheckpointError, ConfigError, list_few
from bnext.files import replace_file, write_json
from bnext.layers.norm_state import MERGED_POPULATION
from bnext.surgery.convert_state import collect_norm_specs
from bnext.surgery.fold import FoldReport

__all__ = ["DESCRIPTION", "ConvertRequest", "add_arguments", "convert_checkpoint", "execute", "find_kept"]

DESCRIPTION = """A checkpoint in the form that the model of another config has.

    bnext convert --config-file TARGET.yaml MODEL.WEIGHTS in.pth --output out.pth
    bnext convert --config-file TARGET.yaml MODEL.WEIGHTS resnet50.pth --output r50.pth     # of torchvision or timm
    bnext convert --config-file TARGET.yaml MODEL.WEIGHTS in.pth --output out.pth --domain-map night=day
    bnext convert --config-file TARGET.yaml MODEL.WEIGHTS in.pth --output out.pth --fold

The config describes the model that is to load the output; in.pth, which is only read, may have been trained with other
norms in their places: plain, synchronized or frozen ones, with statistics or weights for each level or domain, or
detectron2's CycleBatchNormList. What was converted, and what was lost, is printed and written beside the output. A
folded output is for inference alone, and for a model on which bnext.fold_norms was called.

Nothing is estimated: see `bnext reestimate`."""
IS_INTERMIXED = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help=f"of the model that is to load the output: {FILE_HELP}")
    add("--output", required=True, metavar="FILE", help="the checkpoint to write, *.pth; its report is *.json")

    add(
        "--domain-map",
        action="append",
        default=[],
        metavar="NEW=OLD",
        help="a level or domain of the output starts from another one of the input; nothing before = or after it is "
        "what all share",
    )
    add("--fold", action="store_true", help="merge norms into the convolutions before them, wherever that can be")
    add("--domain", metavar="NAME", help="to fold for, where norms have statistics or weights per domain")
    add("--overwrite", action="store_true", help="replace an output that exists")
    add("opts", nargs="*", metavar="KEY VALUE", help=PAIRS_HELP)


def execute(args: argparse.Namespace) -> None:
    """Run the command."""
    request = ConvertRequest(
        output=args.output,
        domain_map=_read_map(args.domain_map),
        fold=args.fold,
        domain=args.domain,
        overwrite=args.overwrite,
    )
    convert_checkpoint(load_config(args.config_file, args.opts), request)


def _read_map(words: Sequence[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for word in words:
        new, equals, old = word.partition("=")
        if not equals or new in names:
            got = repr(word) if not equals else f"{new!r} twice"
            remedy = "Write night=day, where day is a name in the input."
            raise ConfigError.of("--domain-map", "be NEW=OLD, once for each NEW", got=got, remedy=remedy)
        names[new] = old
    return names


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertRequest:
    """The request: what is wanted of a checkpoint.

    Args:
        output: the file to write, *.pth; a report is written beside it, *.json.
        domain_map: name in the output -> name in the input; see `copy_norm_state`.
        fold: whether norms are merged into convolutions.
        domain: to fold for.
        overwrite: whether an output that exists is replaced.
    """

    output: str
    domain_map: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fold: bool = False
    domain: str | None = None
    overwrite: bool = False

    @property
    def report(self) -> str:
        """The report's file."""
        return str(Path(self.output).with_suffix(".json"))


def convert_checkpoint(cfg: CfgNode, request: ConvertRequest) -> dict[str, Any]:
    """Convert MODEL.WEIGHTS, and write it: what fits the model of the config, and nothing else.

    Args:
        cfg: of the model that is to load the output; MODEL.WEIGHTS is the input, which is only read.
        request: what is wanted.

    Returns:
        The report.

    Raises:
        BNextError: what is wrong; then nothing is written.
    """
    output, weights = request.output, cfg.MODEL.WEIGHTS
    check_output_file(output, weights, (".pth",), report=request.report, overwrite=request.overwrite)
    if request.domain is not None and not request.fold:
        raise ConfigError.of("--domain", "come with --fold", got=repr(request.domain), remedy="Give both, or neither.")

    with holding_output(output, "--output", is_folder=False):
        for fault in find_existing_faults((output, request.report), overwrite=request.overwrite):
            raise fault

        with building_from_config():
            model = build_model(cfg).eval()
        checkpointer = _Converter(model, request.domain_map)
        rest = checkpointer.load(weights, checkpointables=[])
        content, report = _convert(cfg, model, checkpointer, rest, request)
        _write(request, content, report)

    print(_format(report, request), flush=True)
    return report


class _Converter(Checkpointer):
    """The checkpointer, for files with other names, too; it remembers what it has left out."""

    def __init__(self, model: nn.Module, domain_map: Mapping[str, str]) -> None:
        super().__init__(model)
        self.domain_map = domain_map or None
        self.keys: list[str] = []
        self.left_out_of_file: list[str] = []
        self.is_of_torchvision = False

    def _load_file(self, filename: str) -> dict[str, Any]:
        checkpoint = super()._load_file(filename)
        renamed = rename_torchvision(checkpoint["model"])

        if renamed is not None and not any(key.startswith("backbone.bottom_up.") for key in checkpoint["model"]):
            checkpoint["model"], self.left_out_of_file = renamed
            checkpoint["matching_heuristics"], self.is_of_torchvision = True, True
        return checkpoint

    def _tell_changes(self) -> None:
        """Nothing: they are what the command prints."""

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """Nothing, as well."""


def _convert(
    cfg: CfgNode, model: nn.Module, checkpointer: _Converter, rest: Mapping[str, Any], request: ConvertRequest
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Content and report of the output."""
    changes, shapes = checkpointer.report, checkpointer.shapes
    entries = model.state_dict()
    loaded = [key for key, value in entries.items() if shapes.get(key) == tuple(value.shape)]
    mismatched = [key for key in entries if key in shapes and key not in loaded]
    missing = [key for key in entries if key not in shapes]
    left_out = [*checkpointer.left_out_of_file, *sorted(shapes.keys() - entries.keys())]

    folded: FoldReport | None = None
    if request.fold:
        if missing or mismatched:
            rule, remedy = "have all of the model to be folded", "Leave --fold out, or use a whole checkpoint."
            raise CheckpointError.of(
                "MODEL.WEIGHTS", rule, got=f"nothing for {list_few(missing + mismatched)}", remedy=remedy
            )
        folded = fold_parts(model, request.domain)
        entries = model.state_dict()
        loaded = list(entries)

    state = entries.copy()  # with torch's versions of the modules
    for key in (*missing, *mismatched):
        del state[key]

    report: dict[str, Any] = {
        "weights": cfg.MODEL.WEIGHTS,
        "changes": [dataclasses.asdict(change) for change in changes.changes],
        "keeps_outputs": changes.keeps_outputs,
        "entries": len(loaded),
        "left_out": left_out,
        "missing": missing,
        "of_another_shape": mismatched,
        "folded": folded.folded if folded else {},
        "norms_left": folded.left if folded else {},
        "settings": _find_settings(cfg) if checkpointer.is_of_torchvision else {},
    }
    content = {"model": state, "norm_specs": _collect_specs(model, checkpointer), "converted": json.dumps(report)}
    is_merged = any(change.text == MERGED_POPULATION for change in changes.changes)
    if RE_ESTIMATED in rest and not is_merged and not request.fold:
        content[RE_ESTIMATED] = rest[RE_ESTIMATED]
    report["texts"] = [str(changes), *([str(folded)] if folded else [])]
    return content, report


def _collect_specs(model: nn.Module, checkpointer: _Converter) -> dict[str, dict[str, Any]]:
    """Specs of the norms; how statistics came about in the training stays known, or unknown, as it was."""
    specs = {}
    for path, spec in collect_norm_specs(model).items():
        before = checkpointer.specs.get(path, {})
        if "statistics" in before:
            specs[path] = {**spec, "statistics": before["statistics"], "eps": before.get("eps", spec["eps"])}
    return specs


def _find_settings(cfg: CfgNode) -> dict[str, Any]:
    """Keys of the config that are not as these weights need them."""
    values = flatten(cfg)
    has_1x1 = cfg.MODEL.RESNETS.DEPTH >= 50

    settings = {}
    for key, value in TORCHVISION_INPUT.items():
        is_same = list(values[key]) == value if isinstance(value, list) else values[key] == value
        if not is_same and (has_1x1 or not key.endswith("STRIDE_IN_1X1")):
            settings[key] = value
    return settings


def _write(request: ConvertRequest, content: dict[str, Any], report: dict[str, Any]) -> None:
    """The checkpoint, and its report beside it: both or neither."""
    described = {key: value for key, value in report.items() if key != "texts"}

    def write_both(file: BinaryIO) -> None:
        torch.save(content, file)
        write_json(request.report, described)

    replace_file(request.output, write_both)


def _format(report: Mapping[str, Any], request: ConvertRequest) -> str:
    lines = list(report["texts"])

    if not report["keeps_outputs"]:
        lines.append("In evaluation mode outputs are not what they were. `bnext compare` tells by how much.")

    left_out = [key for key in report["left_out"] if not key.endswith("num_batches_tracked")]  # of frozen norms
    if left_out:
        lines.append(f"Left out, as the model has no place for it: {list_few(left_out)}.")
    if report["missing"]:
        lines.append(f"Not in the input, and so not in the output: {list_few(report['missing'])}.")
    if report["of_another_shape"]:
        lines.append(
            f"Of another shape than the model's, and so not in the output: {list_few(report['of_another_shape'])}."
        )

    if report["settings"]:
        pairs = ", ".join(f"{key}: {value}" for key, value in report["settings"].items())
        lines.append(f"Weights of torchvision and timm need other settings than the config has: {pairs}.")

    return "\n".join([*lines, "", f"{report['entries']} entries are written:", request.output, request.report])

"""A trained detector as a file that runs without bnext, and that was seen to compute what the detector does."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib
import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import Instances
from torch import Tensor, nn

from bnext.checkpoints import load_model
from bnext.cli.arguments import FILE_HELP, PAIRS_HELP
from bnext.cli.output_file import check_output_file, find_existing_faults, find_kept
from bnext.config import load_config
from bnext.config.domains import check_domains
from bnext.config.recipe import resolve_norms
from bnext.data.mapping import build_mapper
from bnext.data.records import load_records
from bnext.engine.output import holding_output
from bnext.errors import BNextError, ConfigError, StatisticsError
from bnext.files import replace_file, write_json
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.walk import find_bnext_norms
from bnext.packages import explain_missing
from bnext.scope.domain import use_domain
from bnext.surgery.domains import select_domain
from bnext.surgery.fold import FoldReport, fold_norms

__all__ = [
    "DESCRIPTION",
    "ExportRequest",
    "add_arguments",
    "choose_pictures",
    "compare_detections",
    "detect",
    "execute",
    "export_checkpoint",
    "find_kept",
    "fold_parts",
]

DESCRIPTION = """A trained detector as a file that runs without bnext; its ending says which.

    bnext export --config-file CONFIG.yaml MODEL.WEIGHTS model_final.pth --output model.onnx --fold
    bnext export --config-file CONFIG.yaml MODEL.WEIGHTS model_final.pth --output model.ts

  .ts    TorchScript, for torch with torchvision: a picture of any size -> its detections
  .onnx  ONNX, for ONNX Runtime and others: the same
  .pt2   a program of torch.export: the network of a one-stage detector, for a batch of one size -> scores and boxes of
         all anchors

A picture is float32, channels first, in the order of INPUT.FORMAT, 0 to 255, scaled as for a test. The file is written
when its outputs for some pictures of DATASETS.TEST (of noise, where there are none) are those of the model. Beside it
a file .json says what goes in and what comes out."""
IS_INTERMIXED = True

ENDINGS = (".ts", ".onnx", ".pt2")
OPSET = 17
_SIZES = ((96, 64), (64, 128), (160, 160))  # of noise
# Two runtimes round differently: of a box in pixels, of scores and other values between 0 and 1.
_PIXELS, _SCORES = 0.05, 1e-3
_OTHER_PARTS = 1e-3  # of raw outputs, relative to the largest
_FORMATS = {".ts": "TorchScript", ".onnx": "ONNX", ".pt2": "torch.export"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config-file", required=True, metavar="FILE", help=f"of the model of MODEL.WEIGHTS: {FILE_HELP}")
    add("--output", required=True, metavar="FILE", help="the file to write, *.ts, *.onnx or *.pt2")
    add("--fold", action="store_true", help="merge norms into the convolutions before them, wherever that can be")
    add("--domain", metavar="NAME", help="of all images, where norms have statistics or weights per domain")
    add("--num-images", type=int, default=4, metavar="N", help="pictures that are compared (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace an output that exists")
    add("opts", nargs="*", metavar="KEY VALUE", help=PAIRS_HELP)


def execute(args: argparse.Namespace) -> None:
    """Run the command."""
    request = ExportRequest(args.output, args.fold, args.domain, args.num_images, args.overwrite)
    export_checkpoint(load_config(args.config_file, args.opts), request)


@dataclasses.dataclass(frozen=True)
class ExportRequest:
    """The request: what is wanted of a checkpoint.

    Args:
        output: the file to write; its ending says which kind.
        fold: whether norms are merged into convolutions before.
        domain: of all images, where norms have domains.
        num_images: pictures for which outputs are compared.
        overwrite: whether an output that exists is replaced.
    """

    output: str
    fold: bool = False
    domain: str | None = None
    num_images: int = 4
    overwrite: bool = False

    @property
    def report(self) -> str:
        """The file that says what goes in and what comes out."""
        return f"{self.output}.json"

    @property
    def ending(self) -> str:
        return Path(self.output).suffix


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model that was exported.

    Args:
        content: of the file.
        run: gives its outputs for one input.
        names: of the outputs.
    """

    content: bytes
    run: Callable[[Tensor], list[Tensor]]
    names: tuple[str, ...]


def export_checkpoint(cfg: CfgNode, request: ExportRequest) -> dict[str, Any]:
    """Load MODEL.WEIGHTS, export, compare, and write.

    Args:
        cfg: describes the model; MODEL.WEIGHTS is the input.
        request: what is wanted.

    Returns:
        What the .json holds.

    Raises:
        BNextError: what is wrong, or the file would not compute what the model does; then nothing is written.
    """
    output = request.output
    check_output_file(output, cfg.MODEL.WEIGHTS, ENDINGS, report=request.report, overwrite=request.overwrite)
    _check_domain(cfg, request.domain)
    _check_request(request)
    _check_packages(request.ending)

    with holding_output(output, "--output", is_folder=False):
        for fault in find_existing_faults((output, request.report), overwrite=request.overwrite):
            raise fault
        model = load_model(cfg, cfg.MODEL.WEIGHTS)
        report = _export_model(cfg, model, request)
    print(_format(report, request), flush=True)
    return report


def _export_model(cfg: CfgNode, model: nn.Module, request: ExportRequest) -> dict[str, Any]:
    pictures, source = choose_pictures(cfg, request.num_images)
    export = export_network if request.ending == ".pt2" else export_detector

    with use_domain(request.domain) if request.domain else contextlib.nullcontext(), torch.no_grad(), _quiet():
        is_changed = request.fold or request.domain
        reference = copy.deepcopy(model) if is_changed else model  # compared with what it was before
        if request.domain:
            select_domain(model, request.domain)

        folded = fold_parts(model) if request.fold else None
        exported, compared = export(model, reference, pictures, request.ending)

    report = {
        "format": _FORMATS[request.ending],
        "weights": cfg.MODEL.WEIGHTS,
        "domain": request.domain,
        "input": {
            "name": "image" if export is export_detector else "images",
            "type": "float32",
            "layout": "CHW" if export is export_detector else "NCHW, normalized, padded",
            "channels": cfg.INPUT.FORMAT,
            "shortest_side": cfg.INPUT.MIN_SIZE_TEST,
            "longest_side": cfg.INPUT.MAX_SIZE_TEST,
            "pixel_mean": list(cfg.MODEL.PIXEL_MEAN),
            "pixel_std": list(cfg.MODEL.PIXEL_STD),
        },
        "outputs": list(exported.names),
        "folded": len(folded.folded) if folded else 0,
        "norms_left": sorted(folded.left) if folded else [],
        "compared": {"images": len(pictures), "of": source, **compared},
    }
    _write(request, exported.content, report)
    return {**report, "fold_report": str(folded) if folded else ""}


# ---- what is refused


def _check_domain(cfg: CfgNode, domain: str | None) -> None:
    """Raise ConfigError unless it is known of which domain the images are, where norms have domains."""
    norms = resolve_norms(cfg)
    names = norms.domains

    if domain is not None:
        check_domains(cfg, eval_only=True, domain=domain)
    elif names and norms.unseen == "error":
        rule = "name the domain of the images where norms have domains"
        remedy = "Give --domain NAME, or choose a rule for images without one, MODEL.BNEXT.DOMAINS.UNSEEN."
        raise ConfigError.of("--domain", rule, got=f"none of {names}", where="MODEL.BNEXT.DOMAINS.NAMES", remedy=remedy)


def _check_request(request: ExportRequest) -> None:
    if request.num_images < 1:
        rule, remedy = "be 1 or more", "A file whose outputs nobody has seen is not written."
        raise ConfigError.of("--num-images", rule, got=request.num_images, remedy=remedy)


def _check_packages(ending: str) -> None:
    """Refuse before the work what would be missed after it."""
    names = {".ts": ("detectron2.export",), ".onnx": ("detectron2.export", "onnx", "onnxruntime")}
    for name in names.get(ending, ()):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise explain_missing(error) or ConfigError.of(
                name, "be one that can be imported", got=str(error), remedy="Update detectron2, or write a .pt2."
            ) from error


def _refuse(model: nn.Module, ending: str, error: Exception) -> BNextError:
    """The error for what an exporter says of a model that it cannot take."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [""]
    rule = f"be one that can be exported as {_FORMATS[ending]}"
    others = " or ".join(other for other in ENDINGS if other != ending)
    remedy = f"Another kind of file may work: --output with {others}."
    got = f"{type(error).__name__}: {lines[0]}"
    return ConfigError.of(f"The model {type(model).__name__}", rule, got=got, remedy=remedy)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings of sizes that a trace takes for numbers: outputs are compared."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# ---- norms merged into convolutions


def fold_parts(model: nn.Module, domain: str | None = None) -> FoldReport:
    """Fold each part of a model that can be, and say what stays: norms whose levels differ serve all of them.

    Args:
        model: in evaluation mode; changed in place.
        domain: see `fold_norms`.
    """
    if isinstance(model, BatchNorm2d):
        return FoldReport({}, {"": "its levels or domains have statistics or weights of their own"}, domain)

    norms = find_bnext_norms(model).values()
    has_domain = any(domain in (*norm.levels, *norm.domains, *norm.sources) for norm in norms)
    try:
        return fold_norms(model, domain if has_domain else None)
    except (ConfigError, StatisticsError) as error:
        children = dict(model.named_children())
        if not children:
            return FoldReport({}, {"": str(error)}, domain)

    whole = FoldReport({}, {}, domain)
    for name, child in children.items():
        part = fold_parts(child, domain)
        whole.folded.update({f"{name}.{norm}": f"{name}.{conv}" for norm, conv in part.folded.items()})
        whole.left.update({f"{name}.{path}" if path else name: why for path, why in part.left.items()})
        whole.others.update({f"{name}.{path}" if path else name: kind for path, kind in part.others.items()})
    return whole


# ---- pictures


def choose_pictures(cfg: CfgNode, number: int) -> tuple[list[Tensor], str]:
    """Pictures as the model sees them in a test, of any sets that are there, else of noise; and whose they are."""
    for name in cfg.DATASETS.TEST:
        if name not in DatasetCatalog:
            continue
        try:
            records = load_records(name, cfg)[:number]
            mapper = build_mapper(cfg, False)
            return [mapper(record)["image"].float() for record in records], name  # type: ignore[index]
        except (BNextError, OSError):
            continue

    generator = torch.Generator().manual_seed(0)
    sizes = [_SIZES[index % len(_SIZES)] for index in range(number)]
    return [torch.rand(3, *size, generator=generator) * 255 for size in sizes], "noise"


# ---- a whole detector: a picture -> detections


def export_detector(
    model: nn.Module, reference: nn.Module, pictures: Sequence[Tensor], ending: str
) -> tuple[Exported, dict[str, Any]]:
    """A detector by detectron2's adapter of its inputs and outputs for a trace.

    Args:
        model: to export.
        reference: to compare with.
        pictures: the first is the example of the trace.
        ending: of the kind of file.

    Raises:
        ConfigError: it cannot be exported.
        StatisticsError: the file would give other detections.
    """
    from detectron2.export import TracingAdapter

    device = next(reference.parameters()).device
    pictures = [picture.to(device) for picture in pictures]
    (example,) = detect(reference, [{"image": pictures[0]}])

    adapter = TracingAdapter(model, [{"image": pictures[0]}], detect).eval()
    try:
        exported = _trace(adapter, pictures[0], example) if ending == ".ts" else _to_onnx(adapter, pictures[0], example)
    except Exception as error:  # whatever torch says of code that cannot be traced
        raise _refuse(model, ending, error) from error

    num_detections = 0
    for picture in pictures:
        (expected,) = detect(reference, [{"image": picture}])
        outputs = dict(zip(exported.names, exported.run(picture), strict=True))
        compare_detections(outputs, expected)
        num_detections += len(expected)
    return exported, {"detections": num_detections}


def detect(model: nn.Module, inputs: Sequence[dict[str, Any]]) -> list[Instances]:
    """Detections in the coordinates of the pictures; masks are not pasted into them."""
    if isinstance(model, GeneralizedRCNN):
        results = model.inference(inputs, do_postprocess=False)
    else:
        outputs = model(inputs)
        results = [output.get("instances") for output in outputs] if isinstance(outputs, list) else outputs

    if not isinstance(results, list) or not isinstance(results[0], Instances):
        rule, remedy = "give detections", "Export this one in your own code, with torch.jit.trace or torch.onnx."
        got = type(results[0] if isinstance(results, list) else results).__name__
        raise ConfigError.of(f"The model {type(model).__name__}", rule, got=got, remedy=remedy)
    return results


def _name_outputs(example: Instances) -> tuple[str, ...]:
    """The order in which detectron2's adapter gives them."""
    return (*sorted(example.get_fields()), "image_size")


def _trace(adapter: nn.Module, picture: Tensor, example: Instances) -> Exported:
    traced = torch.jit.trace(adapter, (picture,), check_trace=False)
    content = io.BytesIO()
    torch.jit.save(traced, content)
    content.seek(0)
    loaded = torch.jit.load(content, map_location=picture.device)
    return Exported(content.getvalue(), lambda picture: list(loaded(picture)), _name_outputs(example))


def _to_onnx(adapter: nn.Module, picture: Tensor, example: Instances) -> Exported:
    import onnxruntime

    names = _name_outputs(example)
    content = io.BytesIO()
    torch.onnx.export(
        adapter,
        (picture,),
        content,  # type: ignore[arg-type]
        dynamo=False,
        opset_version=OPSET,
        input_names=["image"],
        output_names=list(names),
        dynamic_axes={"image": {1: "height", 2: "width"}, **{name: {0: "detections"} for name in names[:-1]}},
    )
    session = onnxruntime.InferenceSession(content.getvalue(), providers=["CPUExecutionProvider"])

    def run(picture: Tensor) -> list[Tensor]:
        return [torch.from_numpy(output) for output in session.run(None, {"image": picture.cpu().numpy()})]

    return Exported(content.getvalue(), run, names)


def compare_detections(outputs: dict[str, Tensor], expected: Instances) -> None:
    """Refuse a file that finds something else; of equal scores the order may differ."""
    fields = {name: getattr(value, "tensor", value).cpu() for name, value in expected.get_fields().items()}
    outputs = {name: value.detach().cpu() for name, value in outputs.items()}
    if len(outputs["scores"]) != len(expected):
        _refuse_outputs(f"{len(outputs['scores'])} detections instead of {len(expected)}")
    if not len(expected):
        return

    boxes = (outputs["pred_boxes"][None] - fields["pred_boxes"][:, None]).abs().amax(2) / _PIXELS
    scores = (outputs["scores"][None] - fields["scores"][:, None]).abs() / _SCORES
    differs = torch.maximum(boxes, scores)
    differs[outputs["pred_classes"][None] != fields["pred_classes"][:, None]] = torch.inf
    worst, partner = differs.min(1)

    last = fields["scores"].min() + _SCORES  # those of the lowest score may have been chosen among equals
    is_wrong = (worst > 1) & (fields["scores"] > last)
    if bool(is_wrong.any()):
        _refuse_outputs(f"other boxes, classes or scores for {int(is_wrong.sum())} of {len(expected)} detections")

    for name in fields.keys() - {"pred_boxes", "scores", "pred_classes"}:
        difference = (outputs[name][partner] - fields[name]).abs()[worst <= 1]
        if difference.numel() and difference.max() > _SCORES * max(1.0, float(fields[name].abs().max())):
            _refuse_outputs(f"{name} that differ by {float(difference.max()):.3g}")


def _refuse_outputs(got: str) -> None:
    remedy = "Nothing is written. Another kind of file may do; please report this one."
    raise StatisticsError.of("The exported file", "compute what the model does", got=got, remedy=remedy)


# ---- the network of a one-stage detector: a batch of one size -> outputs for all anchors


class _Network(nn.Module):
    """The part of a one-stage detector before its detections are chosen."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone, self.head = model.backbone, model.head
        self.features = tuple(model.head_in_features)

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.backbone(images)
        outputs = self.head([features[name] for name in self.features])
        return [level for output in outputs for level in output]


def export_network(
    model: Any, reference: Any, pictures: Sequence[Tensor], ending: str
) -> tuple[Exported, dict[str, Any]]:
    """The network of a one-stage detector, for a batch of the first picture's size; see `export_detector`."""
    if not all(hasattr(model, name) for name in ("backbone", "head", "head_in_features", "preprocess_image")):
        rule, remedy = "be a one-stage detector for a .pt2", "Write a .ts or .onnx, which hold the whole detector."
        raise ConfigError.of("The model", rule, got=type(model).__name__, remedy=remedy)

    device = next(reference.parameters()).device
    batch = reference.preprocess_image([{"image": pictures[0].to(device)}]).tensor
    network, before = _Network(model).eval(), _Network(reference).eval()
    content = io.BytesIO()
    try:
        program = torch.export.export(network, (batch,), strict=False)
        torch.export.save(program, content)
    except Exception as error:  # whatever torch says of code that has no one graph
        raise _refuse(model, ending, error) from error

    content.seek(0)
    loaded = torch.export.load(content).module()
    inputs = [batch, *(torch.randn(batch.shape, device=device) for _ in pictures[1:])]
    for images in inputs:
        for output, expected in zip(loaded(images), before(images), strict=True):
            difference = float((output - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
            if not difference <= _OTHER_PARTS:
                _refuse_outputs(f"outputs that differ by {difference:.3g} of the largest")

    num_levels = len(model.head_in_features)
    number = len(before(batch))
    names = tuple(f"output{index // num_levels}_level{index % num_levels}" for index in range(number))
    return Exported(content.getvalue(), lambda images: list(loaded(images)), names), {"batch": list(batch.shape)}


# ---- files


def _write(request: ExportRequest, content: bytes, report: dict[str, Any]) -> None:
    """The file, and what is to be known of it: both or neither."""

    def write_both(file: BinaryIO) -> None:
        file.write(content)
        write_json(request.report, report)

    replace_file(request.output, write_both)


def _format(report: dict[str, Any], request: ExportRequest) -> str:
    compared = report["compared"]
    lines = [report["fold_report"]] if report["fold_report"] else []

    seen = f"{compared['detections']} detections" if "detections" in compared else f"a batch of {compared['batch']}"
    lines.append(f"{report['format']}: the file and the model agree on {compared['images']} pictures of ")
    lines[-1] += f"{compared['of']} ({seen}). Outputs: {', '.join(report['outputs'])}."
    if compared.get("detections") == 0:
        lines.append("Nothing was found in these pictures, by neither: name a set with objects in DATASETS.TEST.")
    return "\n".join([*lines, request.output, request.report])

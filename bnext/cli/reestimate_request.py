"""What is wanted of a checkpoint whose statistics are estimated anew, and whether it can be."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from detectron2.config import CfgNode

from bnext.checkpoints.checkpointer import check_eval_weights
from bnext.data.check_coco import check_datasets
from bnext.data.records import load_records
from bnext.errors import CheckpointError, ConfigError
from bnext.files import find_local_file, is_same_file

__all__ = ["RecomputeRequest", "check_domains", "check_files", "check_images", "check_request"]


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


def check_request(cfg: CfgNode, request: RecomputeRequest) -> None:
    """Raise ConfigError unless its values go together."""
    if request.resume and cfg.TEST.BNEXT.PRECISE_BN.ESTIMATOR == "layer_by_layer":
        raise ConfigError(
            "--resume must be of an estimator of which a run is kept; got 'layer_by_layer' "
            "(TEST.BNEXT.PRECISE_BN.ESTIMATOR), which begins anew. Leave --resume out, or use another."
        )
    names = request.domains or cfg.MODEL.BNEXT.DOMAINS.NAMES
    if request.population == "per_domain" and not names:
        raise ConfigError(
            "--population per_domain must be given the domain of each --dataset; got none. Give --dataset and --domain "
            "for each."
        )
    if request.domains and len(request.domains) != len(request.datasets):
        raise ConfigError(
            f"--domain must be given once for each --dataset; got {len(request.domains)} for {len(request.datasets)} "
            f"data sets. Name the domain of every data set."
        )
    named = list(zip(request.datasets, request.domains or [None] * len(request.datasets), strict=True))
    for name, domain in named:
        if named.count((name, domain)) > 1:
            of = f" for --domain {domain}" if domain is not None else ""
            raise ConfigError(
                f"--dataset must name each data set once; got {name!r} twice{of}. Leave one out: the same images again "
                f"are no independent ones."
            )
    if request.num_samples is not None and request.num_samples < 1:
        raise ConfigError(f"--num-samples must be 1 or more; got {request.num_samples}. Use 1000 to 10000.")


def check_domains(cfg: CfgNode, request: RecomputeRequest) -> None:
    """Raise ConfigError unless the domain of every image is known."""
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


def check_files(weights: str, request: RecomputeRequest) -> None:
    """Raise BNextError unless the input is there and stays, and the output can be written."""
    check_eval_weights(weights)
    file = find_local_file(weights)
    if file is not None and not os.path.isfile(file):
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
    if is_same_file(output, weights):
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


def check_images(cfg: CfgNode, request: RecomputeRequest, num_workers: int) -> None:
    """Raise BNextError unless there is an image for each worker."""
    if not request.datasets and not cfg.DATASETS.TRAIN:
        raise ConfigError(
            "DATASETS.TRAIN must name at least one data set; got none. Name one in the config, or give --dataset."
        )
    if not request.datasets:
        check_datasets(cfg.DATASETS.TRAIN)
    for name in request.datasets:
        if (number := len(load_records(name, cfg))) < num_workers:
            raise ConfigError(
                f"--dataset must have an image for each of the {num_workers} workers; got {number} in {name!r}. Use "
                f"fewer workers, --num-gpus, or leave it out."
            )

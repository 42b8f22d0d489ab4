"""The passes over features, by device: tensors in, tensors out; nothing here knows of layers or workers.

A pass takes all features of a call, each with the part that its samples belong to: a number, or a tensor [N] with that
of each sample. Vectors are [P, C], one for each part.

The files cpu.py, cuda.py and formula.py have the passes over one feature, which one_by_one.py makes into those here; a
new device is a file like cuda.py and its row in `_BY_DEVICE`. It may take what it does not do better from cpu.py
(torch's own kernels) or formula.py. The files triton_*.py have them for whole lists.

Shape letters in this folder: N samples, C channels, L features, P parts. A vector of a pass over one feature is [C], or
[N, C] where each sample has its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from bnext.dispatch import has_numbers, is_exported_to_onnx, is_traced, is_transformed
from bnext.errors import ConfigError, Refusal
from bnext.kernels import compiled, cpu, cuda, formula
from bnext.kernels.formula import in_format_of
from bnext.kernels.one_by_one import OneByOne, Part, is_one_part_each
from bnext.kernels.triton_passes import TritonPasses, is_triton_installed

__all__ = [
    "Part",
    "backward_sums",
    "feature_gradients",
    "feature_statistics",
    "group_statistics",
    "group_sums",
    "has_exact_batch_norm",
    "in_format_of",
    "joins_features",
    "replaces_batch_norm",
    "is_one_part_each",
    "sample_statistics",
    "scale_and_shift",
    "use_kernels",
]

UNKNOWN_KIND = Refusal(ConfigError, "kind", "be one of {kinds}", "Use 'torch', which every installation has.")
NO_COMPILER = Refusal(
    ConfigError,
    "a C++ compiler",
    "be installed for compiled kernels",
    "Install g++ or name one in CXX; or use 'torch'.",
)
NO_TRITON = Refusal(
    ConfigError,
    "triton",
    "be installed for its kernels, in a version whose kernels take tuples",
    "On Linux torch for CUDA brings it; update torch, or use 'torch'.",
)

Kind = Literal["torch", "compiled", "triton"]

# A device without a row gets the CPU's: right everywhere.
_BY_DEVICE = {"cpu": OneByOne(cpu), "cuda": cuda.CudaOneByOne(cuda)}
_BY_FORMULA = OneByOne(formula)
_COMPILED = OneByOne(compiled)
_TRITON = TritonPasses(cuda)
_kind: Kind = "torch"


def use_kernels(kind: Kind) -> contextlib.AbstractContextManager[object]:
    """Choose how the passes over features run, in all norms of this process: from now on, or in a `with` block.

    Args:
        kind: "torch": by torch's operators; "compiled": where it pays as loops that torch's compiler makes of several
            operators, for all sizes of images at once; "triton": on a GPU by kernels that take all levels, groups or
            domains of a norm at once, elsewhere as "torch".

    Raises:
        ConfigError: there is no such kind, or what it needs is not installed.

    Note:
        Numbers agree to rounding. A model in `torch.compile` is compiled whole, whatever is chosen here.

    Example:
        >>> with use_kernels("torch"):
        ...     pass
    """
    if kind not in get_args(Kind):
        raise UNKNOWN_KIND.of(repr(kind), "use_kernels", kinds=", ".join(get_args(Kind)))
    if kind == "compiled" and not torch.cuda.is_available() and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise NO_COMPILER.of("none", "use_kernels")
    if kind == "triton" and not is_triton_installed():
        raise NO_TRITON.of("none", "use_kernels")

    before = _kind
    _set_kind(kind)
    block = contextlib.ExitStack()
    block.callback(_set_kind, before)
    return block


def _set_kind(kind: Kind) -> None:
    global _kind
    _kind = kind


def _choose(feature: Tensor, *, fits_any_size: bool = False) -> OneByOne:
    """The passes for features like this one.

    What is traced gets the formula, which a compiler makes fast itself and other runtimes have; a transform, as it is
    to differentiate or to batch it; and a feature without numbers, since torch's kernels have no form for shapes alone.

    Args:
        feature: whose device counts.
        fits_any_size: whether the CPU's pass, noted for one size, is right for others.
    """
    is_kept = fits_any_size and _is_traced_for_inference(feature)
    if is_kept or not (is_traced() or is_transformed() or not has_numbers(feature)):
        if _kind == "compiled" and not is_kept:
            return _COMPILED
        if _kind == "triton" and not is_kept and _TRITON.takes(feature):
            return _TRITON
        return _BY_DEVICE.get(feature.device.type, _BY_DEVICE["cpu"])
    return _BY_FORMULA


def _is_traced_for_inference(feature: Tensor) -> bool:
    """Whether torch.jit.trace notes kernels that a CPU runs again."""
    if not torch.jit.is_tracing() or is_exported_to_onnx() or torch.is_grad_enabled():  # type: ignore[attr-defined]
        return False
    return feature.device.type == "cpu" and cpu.has_exact_batch_norm(feature)


def feature_statistics(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance (correction 0) of each channel of each feature over samples and positions.

    Args:
        features: L tensors [N, C, ...], any memory formats; may be empty.

    Returns:
        Mean and variance [L, C], float32 or wider; 0 where there is no element.
    """
    passes = _choose(features[0], fits_any_size=True)
    return passes.feature_statistics(features)


def sample_statistics(features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance (correction 0) of each sample and channel over positions.

    Args:
        features: L tensors [N, C, ...], any memory formats; may be empty.

    Returns:
        Mean and variance [sum of N, C], float32 or wider; 0 where there is no position.
    """
    return _choose(features[0]).sample_statistics(features)


def scale_and_shift(
    features: Sequence[Tensor], parts: Sequence[Part], mean: Tensor, scale: Tensor, shift: Tensor
) -> list[Tensor]:
    """scale * (x - mean) + shift, with the vectors of the part of each sample.

    Args:
        features: x, L tensors [N, C, ...], any memory formats; may be empty.
        parts: for each feature the part of all its samples, or a tensor [N] with that of each.
        mean, scale, shift: [P, C], float32 or wider.

    Returns:
        New tensors of the shapes, types and memory formats of the features, and no views of others: a ReLU may change
        them in place.
    """
    has_one_each = all(isinstance(part, int) for part in parts)
    passes = _choose(features[0], fits_any_size=has_one_each)
    return passes.scale_and_shift(features, parts, mean, scale, shift)


def backward_sums(features: Sequence[Tensor], grads: Sequence[Tensor], parts: Sequence[Part], mean: Tensor) -> Tensor:
    """sum dy and sum dy (x - mean), over the elements of each part.

    Args:
        features: x, L tensors [N, C, ...], any memory formats; may be empty.
        grads: dy, of the same shapes.
        parts: see `scale_and_shift`.
        mean: [P, C], float32 or wider.

    Returns:
        [2, P, C], in the type of `mean`.
    """
    return _choose(features[0]).backward_sums(features, grads, parts, mean)


def feature_gradients(
    features: Sequence[Tensor],
    grads: Sequence[Tensor],
    parts: Sequence[Part],
    mean: Tensor,
    scale: Tensor,
    slope: Tensor,
    offset: Tensor,
) -> list[Tensor]:
    """scale * dy + slope * (x - mean) + offset, with the vectors of the part of each sample: gradients of features.

    Args:
        features: x, L tensors [N, C, ...], any memory formats; may be empty.
        grads: dy, of the same shapes.
        parts: see `scale_and_shift`.
        mean, scale, slope, offset: [P, C], float32 or wider.

    Returns:
        Tensors of the shapes, types and memory formats of the features.
    """
    vectors = mean, scale, slope, offset
    return _choose(features[0]).feature_gradients(features, grads, parts, *vectors)


def group_statistics(
    count: Tensor, mean: Tensor, var: Tensor, groups: Tensor, num_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The statistics of groups of parts in one launch, always the same ones; where `joins_features`.

    Args:
        count: elements per channel of each part, [P].
        mean, var: [P, C].
        groups: [P], the group of each part, 0 to G - 1.
        num_groups: G.

    Returns:
        Count [G], mean and variance [G, C]; 0 for a group without parts.
    """
    return _TRITON.group_statistics(count, mean, var, groups, num_groups)


def group_sums(sums: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """The sums of groups of parts, likewise.

    Args:
        sums: [2, P, C].
        groups: [P], the group of each part, 0 to G - 1.
        num_groups: G.

    Returns:
        [2, G, C].
    """
    return _TRITON.group_sums(sums, groups, num_groups)


def has_exact_batch_norm(feature: Tensor) -> bool:
    """Whether torch's own `batch_norm` normalizes a feature by its mini-batch without losing digits on this device.

    Args:
        feature: [N, C, ...].
    """
    passes = _BY_DEVICE.get(feature.device.type, _BY_DEVICE["cpu"])
    return bool(passes.file.has_exact_batch_norm(feature))


def joins_features(feature: Tensor) -> bool:
    """Whether the passes take several features like this one in one launch, and so more quickly than one by one.

    Args:
        feature: [N, C, ...].
    """
    return _choose(feature) is _TRITON


def replaces_batch_norm(feature: Tensor) -> bool:
    """Whether statistics of ours and torch's other kernels normalize a feature by its mini-batch better than torch's
    own `batch_norm` does: faster, or with the digits that it loses.

    Args:
        feature: [N, C, ...].
    """
    passes = _choose(feature)
    return passes is not _BY_FORMULA and bool(passes.file.replaces_batch_norm(feature))

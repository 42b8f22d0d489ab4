"""State of norms in the conventions of Caffe, read into those of torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bnext.errors import CheckpointError

__all__ = ["read_caffe_state"]

StateDict = Mapping[str, Tensor]


def read_caffe_state(state_dict: StateDict, *, holds_inverse_std: bool, eps: float) -> dict[str, Tensor]:
    """State of norms in the conventions of Caffe, in those of torch.

        mean = running_mean / scale_factor;   var = running_var / scale_factor, or 1 / running_var^2 - eps

    Nothing is guessed: whether a buffer holds variances cannot be seen from its values.

    Args:
        state_dict: of one norm or of a whole model, under torch's names; a norm may have a `scale_factor` [1]
            beside them, by which Caffe divides mean and variance when it uses them. It is not changed.
        holds_inverse_std: the `running_var` buffers hold 1 / sqrt(var + eps) instead of var.
        eps: that is in them; without inverse standard deviations it has no effect.

    Returns:
        A new state dict, without scale factors; statistics in the type that they came in.

    Raises:
        CheckpointError: a scale factor that is not above 0 (never trained), or an inverse standard deviation
            that cannot be one with this eps.

    Note:
        An inverse standard deviation has few digits left of a variance below eps.

    Source:
        Caffe's batch_norm_layer: blobs mean, variance, and the sum of weights that both are divided by.
    """
    converted = {}

    for key, value in state_dict.items():
        prefix, dot, field = key.rpartition(".")
        if field == "scale_factor":
            continue
        converted[key] = value
        if field in ("running_mean", "running_var"):
            wide = value.double() / _read_scale_factor(state_dict, f"{prefix}{dot}scale_factor")
            if holds_inverse_std and field == "running_var":
                wide = _invert_std(wide, eps, key)
            converted[key] = wide.to(value.dtype)

    return converted


def _read_scale_factor(state_dict: StateDict, key: str) -> float:
    factor = float(state_dict[key]) if key in state_dict else 1.0

    if not 0 < factor < float("inf"):
        remedy = "The norm was never trained: use another checkpoint."
        raise CheckpointError.of(key, "be above 0 and finite", got=factor, where="read_caffe_state", remedy=remedy)
    return factor


def _invert_std(inverse: Tensor, eps: float, key: str) -> Tensor:
    """Variances; one that rounding made negative is 0."""
    var = inverse.square().reciprocal() - eps
    wrong = ~(torch.isfinite(var) & (var >= -1e-3 * eps) & (inverse > 0))

    if bool(wrong.any()):
        channel = int(wrong.nonzero()[0])
        most = eps**-0.5 if eps else float("inf")
        rule = f"hold 1 / sqrt(var + eps), so be above 0 and at most {most:g}"
        where = f"channel {channel}, read_caffe_state with eps={eps}"
        remedy = "Set holds_inverse_std=False if it holds variances, or the eps that it was computed with."
        raise CheckpointError.of(key, rule, got=f"{float(inverse[channel]):g}", where=where, remedy=remedy)
    return var.clamp(min=0)

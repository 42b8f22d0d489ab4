"""State of norms in the conventions of Caffe, read into those of torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bnext.errors import CheckpointError, Refusal

__all__ = ["read_caffe_state"]

NEVER_TRAINED = Refusal(
    CheckpointError, "{key}", "be above 0 and finite", "The norm was never trained: use another checkpoint."
)
NO_INVERSE_STD = Refusal(
    CheckpointError,
    "{key}",
    "hold 1 / sqrt(var + eps), so be above 0 and at most {most:g}",
    "Set holds_inverse_std=False if it holds variances, or the eps that it was computed with.",
)


def read_caffe_state(state_dict: Mapping[str, Tensor], *, holds_inverse_std: bool, eps: float) -> dict[str, Tensor]:
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
        field = key.rpartition(".")[2]
        if field in ("running_mean", "running_var"):
            factor_key = key.removesuffix(field) + "scale_factor"
            factor = float(state_dict.get(factor_key, 1.0))
            if not 0 < factor < float("inf"):
                raise NEVER_TRAINED.of(factor, "read_caffe_state", key=factor_key)

            wide = value.double() / factor
            if holds_inverse_std and field == "running_var":
                wide = _invert_std(wide, eps, key)
            converted[key] = wide.to(value.dtype)
        elif field != "scale_factor":
            converted[key] = value

    return converted


def _invert_std(inverse: Tensor, eps: float, key: str) -> Tensor:
    """Variances; one that rounding made negative is 0."""
    var = inverse.square().reciprocal() - eps
    wrong = ~(torch.isfinite(var) & (var >= -1e-3 * eps) & (inverse > 0))

    if bool(wrong.any()):
        channel = int(wrong.nonzero()[0])
        most = eps**-0.5 if eps else float("inf")
        where = f"channel {channel}, read_caffe_state with eps={eps}"
        raise NO_INVERSE_STD.of(f"{float(inverse[channel]):g}", where, key=key, most=most)
    return var.clamp(min=0)

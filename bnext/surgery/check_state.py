"""Whether the state of a model's norms is such that one can normalize with it.

What is checked are values: NaN, variances that cannot be, statistics that nobody wrote. Whether the
statistics are the right ones is a matter of diagnosis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from bnext.errors import CheckpointError, Refusal, list_few
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.forms import NormForm, find_forms, find_state_forms
from bnext.layers.norm_state import Fields, NormRecord, is_unit_affine, read_norm

__all__ = ["Finding", "check_norm_state", "check_variances", "is_unwritten", "find_unwritten_frozen_norms"]

Kind = Literal["mean", "variance", "affine", "channels", "unwritten", "eps"]
StateDict = Mapping[str, Tensor]

NO_STATISTIC = Refusal(
    CheckpointError,
    "{key}",
    "be {rule}finite",
    "Normalizing with it gives NaN: re-estimate the population statistics, or use another checkpoint.",
)

# The initial running variance is 1, or in detectron2's frozen norm 1 - 1e-5.
_INITIAL_SLACK = 2e-5


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that is wrong with the state of one norm.

    Args:
        path, kind, text: of the norm in the model, of the fault, and the fault itself with its channels.
        owner: the level or domain whose state it is; "" is what all share.
        channels: where it is so; empty: in all.
    """

    path: str
    kind: Kind
    text: str
    owner: str = ""
    channels: tuple[int, ...] = ()

    def __str__(self) -> str:
        owner = f" ({self.owner})" if self.owner else ""
        return f"{self.path or 'the norm'}{owner}: {self.text}"


def check_norm_state(model: nn.Module) -> list[Finding]:
    """Faults in the state of the norms of a model, in the order of its modules.

    Running variances must be above 0 and finite, means and affine finite, all of as many channels as the
    norm has, population statistics written at least once, and eps everywhere that of the spec.

    Args:
        model: with norms of any form, see `bnext.layers.forms`, and of torch for other dimensions; it is not changed.

    Returns:
        Nothing where all is well.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        >>> print(*check_norm_state(model))
        1: population statistics were never written: mean 0 and variance 1 in every channel, 0 mini-batches
    """
    findings: list[Finding] = []
    seen: set[nn.Module] = set()

    for path, norm, form in find_state_forms(model):
        if norm not in seen:
            seen.add(norm)
            findings += _check_norm(path, norm, form)

    return findings


def find_unwritten_frozen_norms(model: nn.Module) -> list[str]:
    """Paths of frozen norms of any form, with level or domain, whose population statistics nobody wrote.

    One whose affine was written is left out: the statistics of some old backbones are in their affine.
    """
    places = []

    for path, norm, form in find_forms(model):
        record = _read(path, norm, form)
        if record is None or not form.is_frozen:
            continue
        for owner, statistics in record.populations.items():
            affine = record.affines.get(owner, record.affines.get("", {}))
            if is_unwritten(statistics) and is_unit_affine(affine):
                places.append(f"{path}.{owner}" if owner else path)

    return places


def is_unwritten(fields: Mapping[str, Tensor]) -> bool:
    """Whether one set of population statistics says nothing.

    As it was made: mean 0, variance 1, and no mini-batch counted; or zero everywhere, as tools leave a norm that
    they did not reach.
    """
    mean, var, counter = (fields.get(name) for name in ("running_mean", "running_var", "num_batches_tracked"))
    if mean is None or var is None or var.numel() == 0 or bool(mean.any()):
        return False

    is_zero = not bool(var.any())
    is_counted = counter is not None and int(counter) > 0
    is_initial = bool(((var - 1).abs() <= _INITIAL_SLACK).all()) and bool((var == var[0]).all())
    return is_zero or (is_initial and not is_counted)


def check_variances(state_dict: StateDict, where: str) -> None:
    """Raise CheckpointError where a running variance is negative, or a statistic is not finite.

    Args:
        state_dict: of a model.
        where: the file that it is from, for the message.

    Source:
        facebookresearch/detectron2#2413, where such a checkpoint gave NaN.
    """
    for key, value in state_dict.items():
        name = key.rpartition(".")[2]
        if name not in ("running_mean", "running_var"):
            continue

        wrong = (~torch.isfinite(value) | ((value < 0) & (name == "running_var"))).flatten()
        if bool(wrong.any()):
            channels = _list_channels(wrong)
            got, place = f"{value.flatten()[channels[0]].item():g}", f"{_name_channels(channels)}; {where}"
            raise NO_STATISTIC.of(got, place, key=key, rule="0 or more and " * (name == "running_var"))


def _check_norm(path: str, norm: nn.Module, form: NormForm) -> Iterator[Finding]:
    record = _read(path, norm, form)
    if record is None:
        shapes = {key: list(value.shape) for key, value in norm.state_dict().items() if value.dim()}
        yield Finding(path, "channels", f"all state must be of its {form.num_features} channels; got {shapes}")
        return

    for owner, affine in record.affines.items():
        yield from _check_values(path, owner, "affine", affine)

    for owner, statistics in record.populations.items():
        mean, var = statistics["running_mean"], statistics["running_var"]
        yield from _check_values(path, owner, "mean", {"running_mean": mean})
        yield from _check_values(path, owner, "variance", {"running_var": var})
        if is_unwritten(statistics):
            counter = statistics.get("num_batches_tracked")
            count = "no counter" if counter is None else f"{int(counter)} mini-batches"
            values = f"mean 0 and variance {round(float(var[0]))} in every channel"
            yield Finding(path, "unwritten", f"population statistics were never written: {values}, {count}", owner)

    expected = norm.spec.eps if isinstance(norm, BatchNorm2d) else getattr(norm, "eps", None)
    for name, part in norm.named_modules():  # on its parts too, which others read
        own = getattr(part, "eps", expected)
        expected = own if expected is None else expected
        if own != expected:
            yield Finding(path, "eps", f"eps must be {expected}, as its spec or its other parts say; got {own}", name)


def _read(path: str, norm: nn.Module, form: NormForm) -> NormRecord | None:
    try:
        return read_norm(norm, form, path)
    except CheckpointError:
        return None


def _check_values(path: str, owner: str, kind: Kind, fields: Fields) -> Iterator[Finding]:
    for name, value in fields.items():
        wrong = ~torch.isfinite(value)
        if kind == "variance":
            wrong |= value <= 0
        if not bool(wrong.any()):
            continue

        channels = _list_channels(wrong)
        rule = "above 0 and finite" if kind == "variance" else "finite"
        text = f"{name} must be {rule}; got {value[channels[0]].item():g} ({_name_channels(channels)})"
        yield Finding(path, kind, text, owner, channels)


def _list_channels(wrong: Tensor) -> tuple[int, ...]:
    return tuple(int(channel) for channel in wrong.nonzero().flatten())


def _name_channels(channels: Sequence[int]) -> str:
    return f"channel{'s' * (len(channels) > 1)} {list_few(channels, 5)}"

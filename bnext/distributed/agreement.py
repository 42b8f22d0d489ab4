"""Whether all workers have the same of what must be the same: asked once, before they depend on it."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Mapping, Sequence

from torch import nn

from bnext.distributed.collectives import all_gather_objects
from bnext.distributed.groups import resolve_group
from bnext.errors import LaunchError, list_few

__all__ = ["check_agreement", "describe_parameters", "describe_values"]

_ABSENT = "absent"


def check_agreement(thing: str, values: Mapping[str, object], remedy: str) -> None:
    """Raise on every worker the same error where values differ between workers. A collective.

    Args:
        thing: what the values are, in the plural: "the configs".
        values: by name; they are compared as text.
        remedy: for the person who started the workers.

    Raises:
        LaunchError: names what differs, the values, and their workers.
    """
    group = resolve_group("all")
    if group is None:
        return

    texts = {name: repr(value) for name, value in values.items()}
    digest = hashlib.sha256(repr(sorted(texts.items())).encode()).hexdigest()
    digests = all_gather_objects(digest, group, f"comparing {thing}")
    if len(set(digests)) == 1:
        return

    every = all_gather_objects((socket.gethostname(), texts), group, f"comparing {thing}")
    names = dict.fromkeys(name for _, worker in every for name in worker)
    differences = [_describe_difference(name, every) for name in names]
    got = list_few([difference for difference in differences if difference])
    raise LaunchError.of(thing, f"be equal on all {len(every)} workers", got=got, remedy=remedy)


def _describe_difference(name: str, every: Sequence[tuple[str, Mapping[str, str]]]) -> str:
    """ "SOLVER.MAX_ITER 6 on worker 0 (host a), 8 on worker 2 (host b)"; "": there is none."""
    first: dict[str, str] = {}
    for rank, (host, values) in enumerate(every):
        first.setdefault(values.get(name, _ABSENT), f"worker {rank} ({host})")

    if len(first) == 1:
        return ""
    return f"{name} " + ", ".join(f"{value} on {worker}" for value, worker in first.items())


def describe_parameters(model: nn.Module) -> dict[str, str]:
    """Name -> shape and type of all parameters and buffers, and which are trained."""
    described = {}
    for name, parameter in model.named_parameters():
        kind = "" if parameter.requires_grad else ", frozen"
        described[name] = f"{tuple(parameter.shape)} {parameter.dtype}{kind}"
    for name, buffer in model.named_buffers():
        described[name] = f"{tuple(buffer.shape)} {buffer.dtype}"
    return described


def describe_values(model: nn.Module) -> dict[str, float]:
    """Name -> sum of the values of each parameter and buffer: whether workers loaded the same weights."""
    return {name: float(value.detach().double().sum()) for name, value in model.state_dict().items()}

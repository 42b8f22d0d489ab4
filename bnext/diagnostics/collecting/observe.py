"""A model that is run on batches while its norms are watched, and that is afterwards bit by bit as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.diagnostics.facts import Call, ForwardFacts
from bnext.functional import Moments, sample_moments
from bnext.scope.domain import use_domain
from bnext.scope.model import restoring
from bnext.scope.record import get_record
from bnext.statistics.data_pass import Forward

__all__ = ["observe_forward", "watching_calls"]

_SEED = 0  # of what the model draws meanwhile


def observe_forward(
    model: nn.Module,
    batch: Any,
    norms: Mapping[str, nn.Module],
    *,
    normalized_by: Literal["population", "mini_batch"] = "population",
    forward: Forward | None = None,
    num_images: int = 0,
    domain: str | Sequence[str] | None = None,
    is_noise: bool = False,
) -> ForwardFacts:
    """Run a model on one batch, everything of it in evaluation mode, and see what its norms get.

    Args:
        model: any module; it is as it was afterwards: modes, buffers, attributes, random numbers.
        batch: as the model, or `forward`, takes it.
        norms: path -> norm of any class.
        normalized_by: "mini_batch": batch norms that are in the mode of the model are in training mode meanwhile.
        forward: called as forward(model, batch); None: model(batch).
        num_images: of the batch.
        domain: of all its images or of each, see `use_domain`.
        is_noise: see `ForwardFacts`.

    Raises:
        Exception: what the model raises; it is as it was then, too.
    """
    alone = [norm for norm in norms.values() if isinstance(norm, _BatchNorm) and norm.training == model.training]

    with torch.no_grad(), restoring(model, seed=_SEED), watching_calls(norms) as calls:
        model.eval()
        if normalized_by == "mini_batch":
            for norm in alone:
                norm.train()
        with contextlib.nullcontext() if domain is None else use_domain(domain):
            if forward is None:
                model(batch)
            else:
                forward(model, batch)

    seen = {path: tuple(of_norm) for path, of_norm in calls.items()}
    return ForwardFacts(num_images, normalized_by, seen, is_noise, domain if isinstance(domain, str) else "")


@contextlib.contextmanager
def watching_calls(norms: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Call]]]:
    """Note in this scope what reaches norms; outputs, statistics and random numbers are as without it.

    Args:
        norms: path -> norm of any class. Features without channels at dimension 1 are passed over.

    Returns:
        Path -> its calls, filled while the model runs.
    """
    calls: dict[str, list[Call]] = {}
    with contextlib.ExitStack() as hooks:
        for path, norm in norms.items():
            see: Callable[..., None] = partial(_see, calls, path)
            hooks.enter_context(norm.register_forward_pre_hook(see, with_kwargs=True))
        yield calls


def _see(calls: dict[str, list[Call]], path: str, norm: nn.Module, args: Any, kwargs: Any) -> None:
    given = args[0] if args else next(iter(kwargs.values()), None)
    features = given if isinstance(given, Mapping) else {get_record().level or "": given}

    for number, (level, feature) in enumerate(features.items()):
        if isinstance(feature, Tensor) and feature.dim() >= 2:
            call = Call(str(level), tuple(feature.shape), _measure(feature), is_joint=number > 0)
            calls.setdefault(path, []).append(call)


def _measure(feature: Tensor) -> Moments:
    """Moments of each sample."""
    flat = feature.detach().flatten(2) if feature.dim() > 2 else feature.detach().unsqueeze(-1)
    moments = sample_moments((flat if flat.is_floating_point() else flat.float()).unsqueeze(-1))
    return Moments(*(field.double().cpu() for field in moments))

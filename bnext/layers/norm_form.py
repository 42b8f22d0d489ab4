"""The layout of one norm's state: who owns its affine and its population statistics, under which keys.

Which modules have which form is in `bnext.layers.forms`; how state goes from one to another is in
`bnext.layers.norm_state`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from bnext.layers.spec import NormSpec

__all__ = ["AFFINE", "POPULATION", "Layout", "NormForm", "form_of_spec"]

AFFINE = ("weight", "bias")
POPULATION = ("running_mean", "running_var", "num_batches_tracked")
Layout = Literal["shared", "owned", "none"]

_LAYOUTS: dict[str, Layout] = {"shared": "shared", "none": "none", "per_level": "owned", "per_domain": "owned"}


@dataclasses.dataclass(frozen=True)
class NormForm:
    """The layout of one norm's state.

    Args:
        num_features: channels C.
        affine, population: on the norm itself ("shared"), one for each of `owners`, or "none".
        owners: names of what owns something: levels or domains; numbers, if `is_numbered`.
        is_numbered: the owners have numbers for names, whose meaning is their order.
        has_counter: num_batches_tracked is kept.
        eps: added to the variance.
        inference: what normalizes in evaluation mode; norms for which this is equal, and affine,
            population and eps as well, have equal outputs.
        is_frozen: population statistics normalize in training too.
        has_bias: an affine is scale and shift; False: scale alone.
    """

    num_features: int
    affine: Layout
    population: Layout
    eps: float
    owners: tuple[str, ...] = ()
    is_numbered: bool = False
    has_counter: bool = True
    inference: tuple[object, ...] = ("population",)
    is_frozen: bool = False
    has_bias: bool = True

    @property
    def is_batch_norm(self) -> bool:
        """Whether it normalizes by a batch or by the population, and not each sample alone."""
        return self.inference[0] in ("population", "mini_batch")

    def list_keys(self) -> list[str]:
        """The keys of its state dict."""
        affine = AFFINE if self.has_bias else AFFINE[:1]
        population = POPULATION if self.has_counter else POPULATION[:2]
        keys = []

        for layout, fields in ((self.affine, affine), (self.population, population)):
            for owner in {"shared": ("",), "owned": self.owners, "none": ()}[layout]:
                keys += [f"{owner}.{field}" if owner else field for field in fields]

        return keys


def form_of_spec(
    spec: NormSpec, num_features: int, domains: Sequence[str], eps: float, has_bias: bool = True
) -> NormForm:
    """The form of a norm of bnext.

    Args:
        spec: its answers.
        num_features: its channels C.
        domains: names of its levels or domains.
        eps: added to its variance.
        has_bias: see `NormForm`.
    """
    inference: tuple[object, ...] = ("population",)
    if spec.inference == "mini_batch":
        inference = ("mini_batch", spec.statistics)
        inference += (tuple(domains),) if spec.statistics != "shared" else ()

    return NormForm(
        num_features=num_features,
        affine=_LAYOUTS[spec.affine],
        population=_LAYOUTS[spec.population],
        eps=eps,
        owners=tuple(domains),
        is_numbered=bool(domains) and tuple(domains) == tuple(str(index) for index in range(len(domains))),
        inference=inference,
        is_frozen=spec.has_frozen_statistics,
        has_bias=has_bias,
    )

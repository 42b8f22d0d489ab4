"""The module in the place of a norm that was folded into its convolution, and what it guards.

Folding itself is in `bnext.surgery.fold`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Tensor, nn

from bnext.errors import DomainError, Refusal, StatisticsError
from bnext.scope.domain import get_active_domain

__all__ = ["FoldedNorm"]

Features = TypeVar("Features", Tensor, Mapping[str, Tensor])

FOLDED_IN_TRAINING = Refusal(
    StatisticsError,
    "a folded norm",
    "not be trained",
    "Call model.eval(), train the model before it is folded, or fold with allow_training=True: gradient descent on "
    "folded weights is another optimization than that of a frozen norm.",
)
OTHER_LEVEL = Refusal(
    StatisticsError,
    "features",
    "be of the levels {allowed}, which were folded",
    "Fold a copy of the model for every level, or use the model that is not folded.",
)
OTHER_DOMAIN = Refusal(
    DomainError,
    "the active domain",
    "be {domain!r}, which was folded",
    "Fold a copy of the model for every domain, or use the model that is not folded.",
)


class FoldedNorm(nn.Module):
    """The identity, in the place of a norm that its convolution has taken in.

    Args:
        num_features: channels C.
        domain: the level or domain whose statistics and affine were folded; "": everything shares them.
        levels: names of the features that the norm took in one call; (): it took one feature map.
        domains: of a norm of one feature map, the names among which `domain` was chosen.
        fallback_domain: where an unknown domain is active, the one that the norm took in its place.
        allow_training: do not refuse training mode.
        path: where the norm was in its model, for messages.

    Note:
        It has no state, by which a strict `load_state_dict` tells folded checkpoints from others; for which domain one
        was folded it does not know.
    """

    def __init__(
        self,
        num_features: int,
        *,
        domain: str = "",
        levels: tuple[str, ...] = (),
        domains: tuple[str, ...] = (),
        fallback_domain: str | None = None,
        allow_training: bool = False,
        path: str = "",
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.domain, self.levels, self.domains = domain, levels, domains
        self.fallback_domain = fallback_domain
        self.allow_training = allow_training
        self.path = path

    def extra_repr(self) -> str:
        return f"{self.num_features}, domain={self.domain!r}" if self.domain else str(self.num_features)

    def forward(self, input: Features) -> Features:
        """The input: one feature map, or level name -> feature map.

        Raises:
            StatisticsError: in training mode, or for a level that was not folded.
            DomainError: another domain is active than the one that was folded.
        """
        if self.training and not self.allow_training:
            raise FOLDED_IN_TRAINING.of("training mode", self.path)

        if isinstance(input, Mapping):
            self._check_levels(input)
        elif self.domains:
            self._check_active_domain()
        return input

    def _check_levels(self, features: Mapping[str, Tensor]) -> None:
        allowed = (self.domain,) if self.domain else self.levels

        for level in features:
            if level not in allowed:
                raise OTHER_LEVEL.of(repr(level), self.path, allowed=allowed)

    def _check_active_domain(self) -> None:
        active = get_active_domain()
        names = (active,) if isinstance(active, str) else active or ()

        for name in names:
            domain = name if name in self.domains else self.fallback_domain
            if domain != self.domain:
                raise OTHER_DOMAIN.of(repr(name), self.path, domain=self.domain)

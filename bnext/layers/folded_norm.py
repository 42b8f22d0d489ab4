"""What is left in the place of a norm that was folded into its convolution, and what it guards.

Folding itself is in `bnext.surgery.fold`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bnext.errors import CheckpointError, DomainError, StatisticsError
from bnext.scope.domain import get_active_domain

__all__ = ["FoldedNorm", "check_mark", "is_folded", "is_marked"]

Features = TypeVar("Features", Tensor, Mapping[str, Tensor])

# A folded norm saves running statistics of no channels, a shape that no norm takes in its place, and its domain.
_MARK = "running_var"
_DOMAIN = "folded_domain"


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
        Its state dict holds a mark, so that neither a model with norms can take a folded checkpoint for
        its own, nor a folded model one with norms; both would be silently wrong otherwise.
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
        return ", ".join([str(self.num_features), *([f"domain={self.domain!r}"] if self.domain else [])])

    def forward(self, input: Features) -> Features:
        """The input: one feature map, or level name -> feature map.

        Raises:
            StatisticsError: in training mode, or for a level that was not folded.
            DomainError: another domain is active than the one that was folded.
        """
        if self.training and not self.allow_training:
            raise StatisticsError(
                f"a folded norm must not be trained; got training mode ({self._where}). Call model.eval(), train the "
                f"model before it is folded, or fold with allow_training=True: gradient descent on folded weights "
                f"is another optimization than that of a frozen norm."
            )
        if isinstance(input, Mapping):
            self._check_levels(input)
        elif self.domains:
            self._check_active_domain()
        return input

    @property
    def _where(self) -> str:
        return self.path or type(self).__name__

    def _check_levels(self, features: Mapping[str, Tensor]) -> None:
        allowed = (self.domain,) if self.domain else self.levels
        for level in features:
            if level not in allowed:
                raise StatisticsError(
                    f"features must be of the levels {allowed}, which were folded; got {level!r} ({self._where}). "
                    f"Fold a copy of the model for every level, or use the model that is not folded."
                )

    def _check_active_domain(self) -> None:
        active = get_active_domain()
        for name in () if active is None else (active,) if isinstance(active, str) else active:
            found = name if name in self.domains else self.fallback_domain
            if found != self.domain:
                raise DomainError(
                    f"the active domain must be {self.domain!r}, which was folded; got {name!r} ({self._where}). "
                    f"Fold a copy of the model for every domain, or use the model that is not folded."
                )

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + _MARK] = torch.empty(0)
        destination[prefix + _DOMAIN] = torch.tensor(list(self.domain.encode()), dtype=torch.uint8)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found = {key for key in state_dict if key.startswith(prefix)}
        if found:
            check_mark(self, state_dict, prefix)
        missing_keys += [prefix + name for name in (_MARK, _DOMAIN) if prefix + name not in found]


def is_folded(model: nn.Module) -> bool:
    """Whether some norm of a model was folded into its convolution."""
    return any(isinstance(module, FoldedNorm) for module in model.modules())


def is_marked(state_dict: Mapping[str, Any], prefix: str) -> bool:
    return prefix + _DOMAIN in state_dict


def check_mark(norm: FoldedNorm, state_dict: Mapping[str, Any], prefix: str) -> None:
    where = norm.path or prefix.rstrip(".")
    if not is_marked(state_dict, prefix):
        raise CheckpointError(
            f"a checkpoint of a model with norms must be loaded before it is folded; got the state of a norm for a "
            f"folded one ({where}), so that convolutions would lack their norms. Build the model anew, load, then "
            f"call fold_norms; what was loaded so far is not to be used."
        )
    domain = bytes(torch.as_tensor(state_dict[prefix + _DOMAIN]).tolist()).decode()
    if domain != norm.domain:
        raise CheckpointError(
            f"a folded checkpoint must be of the domain {norm.domain!r} of the model; got {domain!r} ({where}). "
            f"Fold the model for that domain, or load the other checkpoint."
        )

"""The module in the place of a norm that was folded into its convolution, and what it guards.

Folding itself is in `bnext.surgery.fold`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from bnext.errors import CheckpointError, DomainError, Refusal, StatisticsError
from bnext.scope.domain import get_active_domain

__all__ = ["FOLDED_FOR_A_NORM", "FoldedNorm", "is_marked_as_folded", "refuse_folded_state"]

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
NORM_FOR_A_FOLDED_ONE = Refusal(
    CheckpointError,
    "a checkpoint of a model with norms",
    "be loaded before it is folded",
    "Build the model anew, load, then call fold_norms.",
)
FOLDED_FOR_A_NORM = Refusal(
    CheckpointError,
    "a checkpoint of a folded model",
    "be loaded into a folded model",
    "Load the checkpoint that it was folded from, or, in code, call fold_norms on the model before it loads this one.",
)
# In the metadata of a state dict, which torch keeps beside it: the module itself has no state.
_MARK = "folded"


def is_marked_as_folded(metadata: Mapping[str, Any]) -> bool:
    """Whether a module's metadata in a state dict are those of a folded norm."""
    return bool(metadata.get(_MARK))


def refuse_folded_state(path: str, prefix: str, metadata: Mapping[str, Any], error_msgs: list[str]) -> None:
    """A step of a norm's load: refuse the state of a model in which it was folded.

    Args:
        path: of the norm.
        prefix, metadata, error_msgs: see `torch.nn.Module._load_from_state_dict`.
    """
    if is_marked_as_folded(metadata):
        error_msgs.append(str(FOLDED_FOR_A_NORM.of("a folded norm for one that is not", prefix[:-1] or path)))


class FoldedNorm(nn.Module):
    """The identity, in the place of a norm that its convolution has taken in.

    Args:
        num_features: channels C.
        domain: whose statistics and affine were folded; "": all domains share them.
        levels: whose were folded, of a norm that takes several features in one call; (): it took one feature map.
        domains: the names among which `domain` was chosen.
        fallback_domain: where an unknown domain is active, the one that the norm took in its place.
        allow_training: do not refuse training mode.
        path: where the norm was in its model, for messages.

    Note:
        It has no state, by which a strict `load_state_dict` tells folded checkpoints from others, and a mark in the
        metadata of a state dict, by which every one does; for which domain one was folded it does not know.
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
        names = {"levels": self.levels, "domain": self.domain}
        return ", ".join([str(self.num_features), *(f"{key}={value!r}" for key, value in names.items() if value)])

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata[_MARK] = True

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any) -> None:
        try:
            self.check_is_folded(state_dict, prefix, prefix[:-1] or self.path)
        except CheckpointError as error:
            error_msgs = args[-1]
            error_msgs.append(str(error))
        super()._load_from_state_dict(state_dict, prefix, *args)

    @staticmethod
    def check_is_folded(state_dict: Mapping[str, Tensor], prefix: str, where: str) -> None:
        """Raise CheckpointError where a state dict has the norm that was folded: it would be applied twice, or lost.

        Statistics of no channels are no norm: checkpoints of folded models had them once.
        """
        for key, value in state_dict.items():
            is_statistic = key.startswith(prefix) and key.endswith(("running_mean", "running_var"))
            if is_statistic and value.numel():
                raise NORM_FOR_A_FOLDED_ONE.of("a norm for a folded one", where)

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
        if self.domain:
            self._check_active_domain()
        return input

    def _check_levels(self, features: Mapping[str, Tensor]) -> None:
        for level in features:
            if level not in self.levels:
                raise OTHER_LEVEL.of(repr(level), self.path, allowed=self.levels)

    def _check_active_domain(self) -> None:
        active = get_active_domain()
        names = (active,) if isinstance(active, str) else active or ()

        for name in names:
            domain = name if name in self.domains else self.fallback_domain
            if domain != self.domain:
                raise OTHER_DOMAIN.of(repr(name), self.path, domain=self.domain)

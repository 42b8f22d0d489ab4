"""What a call of a norm knows besides its tensors."""

from bnext.scope.domain import use_domain
from bnext.scope.statistics import frozen_statistics

__all__ = ["frozen_statistics", "use_domain"]

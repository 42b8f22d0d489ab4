"""The record of what a call of a norm knows besides its tensors, and a model that is put into a state for a while."""

from bnext.scope.domain import use_domain
from bnext.scope.forward import count_levels, use_level
from bnext.scope.record import CallRecord, Scope, get_record
from bnext.scope.statistics import frozen_statistics

__all__ = ["CallRecord", "Scope", "count_levels", "frozen_statistics", "get_record", "use_domain", "use_level"]

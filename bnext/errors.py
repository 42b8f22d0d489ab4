"""The exceptions of bnext. Every message names the thing, the value, the rule and the remedy.

All of them are `ValueError`s as well, so that code which catches torch's or detectron2's
complaints about a bad value catches ours too.
"""

__all__ = [
    "BNextError",
    "CheckpointError",
    "ConfigError",
    "DatasetError",
    "DomainError",
    "LaunchError",
    "StatisticsError",
    "WorkerError",
]


class BNextError(ValueError):
    """A mistake that the user can mend; tools print its message without a traceback."""


class ConfigError(BNextError):
    """A config key has a value outside its set, or keys contradict one another."""


class StatisticsError(BNextError):
    """Statistics of a norm layer are missing, not finite, or cannot be computed."""


class DomainError(BNextError):
    """No domain, or an unknown one, is named where statistics or an affine belong to domains."""


class CheckpointError(BNextError):
    """A checkpoint does not fit the model that it is loaded into."""


class DatasetError(BNextError):
    """A data set is missing, incomplete, or contradicts its own description."""


class LaunchError(BNextError):
    """The machine cannot run what was asked: devices, workers, or the output directory."""


class WorkerError(BNextError):
    """Another worker has failed, or did not come to a layer that all workers share."""

"""The tiny data set, without labels too, and saved checkpoints."""

from tests.detector_fixtures import bnext_log, digits, loggers, unlabelled, weights  # noqa: F401

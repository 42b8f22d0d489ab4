"""The tiny data set and its trainings."""

from tests.detector_fixtures import bnext_log, digits, finished, loggers, unlabelled, weights  # noqa: F401

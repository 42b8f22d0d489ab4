"""The tiny data set and its trainings."""

from tests.detector_fixtures import digits, loggers  # noqa: F401

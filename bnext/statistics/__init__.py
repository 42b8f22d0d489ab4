"""Population statistics: what a norm remembers for inference, estimated anew on data."""

from bnext.statistics.recompute import recompute_population_statistics
from bnext.statistics.report import PopulationEstimate, RecomputeReport

__all__ = ["PopulationEstimate", "RecomputeReport", "recompute_population_statistics"]

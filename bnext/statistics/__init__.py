"""Population statistics of a trained model, estimated anew."""

from bnext.statistics.recompute import (
    PopulationEstimate,
    RecomputeReport,
    recompute_population_statistics,
)

__all__ = ["PopulationEstimate", "RecomputeReport", "recompute_population_statistics"]

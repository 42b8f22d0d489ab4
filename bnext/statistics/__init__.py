"""Population statistics: what a norm remembers for inference, estimated anew on data."""

from bnext.statistics.online import OnlineStatistics, following_stream
from bnext.statistics.recompute import recompute_population_statistics
from bnext.statistics.report import PopulationEstimate, RecomputeReport

__all__ = [
    "OnlineStatistics",
    "PopulationEstimate",
    "RecomputeReport",
    "following_stream",
    "recompute_population_statistics",
]

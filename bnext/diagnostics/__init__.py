"""The doctor: the norms of any torch model, what they see, and what is wrong with them.

`collecting` reads facts into one record (`facts`), `checks` read it, a file each (`registry` finds them, `measures` has
what several need), and `reports` write what they find. What needs detectron2 is collected in the rooms above.
"""

from bnext.diagnostics.collecting.watch_training import TrainingWatch
from bnext.diagnostics.diagnose import Diagnosis, diagnose
from bnext.diagnostics.inventory import (
    NormGroup,
    NormRecord,
    find_norm_groups,
    find_norm_records,
    format_norm_groups,
    group_norms,
)
from bnext.diagnostics.mini_batches import MiniBatch, describe_mini_batch, observing_mini_batches

__all__ = [
    "Diagnosis",
    "MiniBatch",
    "NormGroup",
    "NormRecord",
    "TrainingWatch",
    "describe_mini_batch",
    "diagnose",
    "find_norm_groups",
    "find_norm_records",
    "format_norm_groups",
    "group_norms",
    "observing_mini_batches",
]

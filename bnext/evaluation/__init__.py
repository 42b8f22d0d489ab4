"""A detector that is not trained: AP, validation loss, re-estimation, comparison of statistics, leakage."""

import bnext.config  # noqa: F401  first, as it says how to get detectron2
from bnext.evaluation.coco import build_evaluator, evaluate_model
from bnext.evaluation.conditions import Conditions

__all__ = ["Conditions", "build_evaluator", "evaluate_model"]

"""A detector that is not trained: AP, also under attack, validation loss, re-estimation, comparison, leakage."""

import bnext.config  # noqa: F401  first, as it says how to get detectron2
from bnext.evaluation.coco import build_evaluator, evaluate_model
from bnext.evaluation.conditions import Conditions
from bnext.evaluation.under_attack import evaluate_under_attack

__all__ = ["Conditions", "build_evaluator", "evaluate_model", "evaluate_under_attack"]

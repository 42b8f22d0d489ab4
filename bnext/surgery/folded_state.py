"""Whether a state dict and a model are folded alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bnext.errors import CheckpointError
from bnext.layers.folded_norm import FoldedNorm, check_mark, is_marked
from bnext.surgery.fold_pairs import is_population_norm

__all__ = ["check_folded_state"]


def check_folded_state(state_dict: Mapping[str, Any], model: nn.Module) -> None:
    """See that what is folded in a state dict is folded in the model, for the same domain, and nothing else.

    `load_state_dict` refuses as well, but a loader that leaves out what does not fit (fvcore's) has to ask first.

    Raises:
        CheckpointError: one of the two is folded where the other is not, or for another domain.
    """
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, FoldedNorm) and any(key.startswith(prefix) for key in state_dict):
            check_mark(module, state_dict, prefix)
        elif is_population_norm(module) and is_marked(state_dict, prefix):
            raise CheckpointError(
                f"a checkpoint of a folded model must be loaded into a model folded alike; got a norm in the model "
                f"({path}), which would be applied a second time. Call fold_norms on the model first, or load the "
                f"checkpoint that is not folded."
            )

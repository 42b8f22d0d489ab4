"""The keys of a config: the table of them, the places that have a norm, their checks, and how a file is loaded."""

import warnings

from bnext.packages import explain_missing

try:
    with warnings.catch_warnings():
        # fvcore and detectron2 script a few functions at import; users can do nothing about it.
        warnings.filterwarnings("ignore", r".torch\.jit\.script. is deprecated", FutureWarning)
        import detectron2.modeling  # noqa: F401
except ModuleNotFoundError as error:
    refusal = explain_missing(error)
    if refusal is None:
        raise
    raise ModuleNotFoundError(str(refusal), name=error.name) from error

from bnext.config.keys import add_bnext_config
from bnext.config.load import load_config
from bnext.config.recipe import NormRecipe, PlaceNorm, resolve_norms

__all__ = ["NormRecipe", "PlaceNorm", "add_bnext_config", "load_config", "resolve_norms"]

"""The keys of a config: the table of them, the places that have a norm, their checks, and how a file is loaded."""

import warnings

try:
    with warnings.catch_warnings():
        # fvcore and detectron2 script a few functions at import; users can do nothing about it.
        warnings.filterwarnings("ignore", r".torch\.jit\.script. is deprecated", FutureWarning)
        import detectron2.modeling  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "detectron2 must be installed for bnext's configs, heads, data and tools; got none. Run "
        "`python tools/install_detectron2.py`, or install it from its repository or from conda-forge. "
        "bnext's layers and statistics work without it."
    ) from error

from bnext.config.keys import add_bnext_config
from bnext.config.load import load_config
from bnext.config.recipe import NormRecipe, PlaceNorm, resolve_norms

__all__ = ["NormRecipe", "PlaceNorm", "add_bnext_config", "load_config", "resolve_norms"]

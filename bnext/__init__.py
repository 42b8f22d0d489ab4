"""bnext: batch normalization done right in object detection.

A name of `__init__.pyi` is imported when it is first used: `import bnext` costs nothing. The layers, their conversion
and the statistics need torch alone; what needs detectron2 first registers bnext's architectures and data sets.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any

import lazy_loader

__version__ = "0.1.0"

_get_lazily, _list_names, __all__ = lazy_loader.attach_stub(__name__, __file__)


def register() -> None:
    """Register bnext's architectures and data sets with detectron2.

    Importing bnext does it where detectron2 is imported already; else `add_bnext_config`, `bnext.heads` and every
    command do. A second call changes nothing.

    Raises:
        ModuleNotFoundError: there is no detectron2; its message says how to get one.
    """
    importlib.import_module("bnext.heads")
    importlib.import_module("bnext.data.catalog").register_datasets()


def __getattr__(name: str) -> Any:
    if name == "heads":
        register()
    if name in __all__:
        return _get_lazily(name)

    room = f"{__name__}.{name}"
    if not name.startswith("_") and importlib.util.find_spec(room) is not None:
        return importlib.import_module(room)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_list_names()})


if getattr(sys.modules.get("detectron2"), "__file__", None) is not None:  # a bare folder of that name has none
    register()

#!/usr/bin/env python
"""Install detectron2 into the environment of the running interpreter: `bnext install-detectron2`.

It needs nothing but Python and pip, so that it can run before torch is there. Usage: python tools/install_detectron2.py
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

INSTALLER = Path(__file__).resolve().parent.parent / "bnext" / "cli" / "install_detectron2.py"


def load_installer() -> ModuleType:
    """The file of the package, without the package around it, which needs others that may not be there yet."""
    spec = importlib.util.spec_from_file_location("bnext_install_detectron2", INSTALLER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    sys.exit(load_installer().main())

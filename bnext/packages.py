"""Packages that may not be installed, and how to get them."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

from bnext.errors import LaunchError

__all__ = ["explain_missing"]

_DETECTRON2 = (
    "Run `bnext install-detectron2` (in a checkout: `python tools/install_detectron2.py`), or install it from its "
    "repository or from conda-forge. bnext's layers and statistics work without it."
)
# Name of a module -> that of its package on the index, in groups of those that are needed together.
_OF_DETECTRON2: Mapping[str, str] = {
    "cloudpickle": "cloudpickle",
    "cv2": "opencv-python-headless",
    "fvcore": "fvcore",
    "hydra": "hydra-core",
    "iopath": "iopath",
    "matplotlib": "matplotlib",
    "omegaconf": "omegaconf",
    "pycocotools": "pycocotools",
    "tabulate": "tabulate",
    "tensorboard": "tensorboard",
    "termcolor": "termcolor",
    "torchvision": "torchvision",
    "yacs": "yacs",
}
_GROUPS: tuple[Mapping[str, str], ...] = (
    _OF_DETECTRON2,
    {"onnx": "onnx", "onnxruntime": "onnxruntime", "onnxscript": "onnxscript"},
    {"faster_coco_eval": "faster-coco-eval"},
    {"scipy": "scipy"},
    {"sklearn": "scikit-learn"},
    {"supervision": "supervision"},
    {"wandb": "wandb"},
)


def explain_missing(error: BaseException) -> LaunchError | None:
    """The line for a person who has not installed a package; None: the error is of something else.

    Args:
        error: as raised by an import, of detectron2 or of a package that a part of bnext needs.
    """
    if not isinstance(error, ImportError):
        return None
    if "libGL" in str(error):  # of OpenCV with windows, on a machine without a screen
        remedy = "Run `pip uninstall opencv-python` and `pip install opencv-python-headless`."
        return LaunchError.of("OpenCV", "be one that this machine can load", got=str(error), remedy=remedy)

    name = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError):
        return None
    if name == "detectron2":
        rule = "be installed for bnext's configs, heads, data and commands"
        return LaunchError.of(name, rule, got="none", remedy=_DETECTRON2)

    for group in _GROUPS:
        if name in group:
            missing = [package for module, package in group.items() if importlib.util.find_spec(module) is None]
            remedy = f"Run `pip install {' '.join(missing or [group[name]])}`."
            return LaunchError.of(group[name], "be installed for this", got="none", remedy=remedy)
    return None

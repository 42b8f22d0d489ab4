"""Detectron2's own configs, without its model_zoo: that of main needs pkg_resources, which setuptools 82 dropped."""

from pathlib import Path

import detectron2
from detectron2.config import LazyConfig, get_cfg

_PACKAGE = Path(detectron2.__file__).parent
FOLDER = next(folder for folder in (_PACKAGE / "model_zoo/configs", _PACKAGE.parent / "configs") if folder.is_dir())


def load_stock_config(name):
    """The config of a file: a CfgNode of YAML, a LazyConfig of Python."""
    if name.endswith(".py"):
        return LazyConfig.load(str(FOLDER / name))

    cfg = get_cfg()
    cfg.merge_from_file(str(FOLDER / name))
    return cfg

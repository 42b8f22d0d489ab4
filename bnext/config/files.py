"""The configs that come with the package, by their names."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from bnext.errors import ConfigError
from bnext.text import find_near

__all__ = ["CONFIGS", "find_config_file", "find_near_configs", "get_config_file", "name_config_file"]

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def find_config_file(path: str, folder: str = "") -> str:
    """The file that a command line or a `_BASE_` names: one of the user's, else the config of the package of that name.

    Args:
        path: of a file, an address, or such as "Digits-Detection/retinanet_R_18_FPN.yaml".
        folder: to which a path is relative; "": the working directory.

    Returns:
        A path that may lead nowhere: whoever reads the file says so.
    """
    if "://" in path:
        return path

    file, config = os.path.join(folder, path), os.path.join(CONFIGS, path)
    return config if not os.path.lexists(file) and os.path.isfile(config) else file


def name_config_file(path: str) -> str:
    """A path as a command line may name it: that of a config of the package by its name, where that leads to it.

    Args:
        path: of `find_config_file`.
    """
    if "://" in path or not os.path.isfile(path):
        return path
    file, configs = Path(path).resolve(), CONFIGS.resolve()  # a link, in a checkout
    if not file.is_relative_to(configs):
        return path
    name = str(file.relative_to(configs))
    return path if os.path.lexists(name) else name


def find_near_configs(path: str) -> list[str]:
    """The configs that may have been meant by a path that leads nowhere: of its folder, else of the package."""
    folder, name = os.path.split(path)
    with contextlib.suppress(OSError):
        files = [file for file in os.listdir(folder or ".") if file.endswith((".yaml", ".yml", ".py"))]
        near = find_near(name, sorted(files), most=1, cutoff=0.8)
        if near:
            return [os.path.join(folder, near[0])]

    tail = os.path.join(*Path(path).parts[-2:])  # a name of the package's has a folder, or none
    return find_near(tail, _list_names(), most=1, cutoff=0.8) or find_near(name, _list_names(), most=1, cutoff=0.8)


def get_config_file(name: str) -> str:
    """The path of a config of the package, in a checkout and in an installed package alike.

    Args:
        name: relative to configs/, such as "Digits-Detection/retinanet_R_18_FPN.yaml".

    Raises:
        ConfigError: there is none of that name.
    """
    path = CONFIGS / name
    if path.is_file():
        return str(path)

    names = _list_names()
    near = find_near(name, names, most=1)
    remedy = f"Did you mean {near[0]}?" if near else f"One is {names[0]}."
    raise ConfigError.of("The name", "be that of a config of bnext", got=repr(name), remedy=remedy)


def _list_names() -> list[str]:
    files = sorted([*CONFIGS.glob("**/*.yaml"), *CONFIGS.glob("**/*.py")])
    return [str(file.relative_to(CONFIGS)) for file in files]

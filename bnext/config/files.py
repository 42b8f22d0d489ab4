"""The configs that come with the package, by their names."""

from __future__ import annotations

from pathlib import Path

from bnext.errors import ConfigError
from bnext.text import find_near

__all__ = ["CONFIGS", "get_config_file"]

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


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

    names = [str(file.relative_to(CONFIGS)) for file in sorted(CONFIGS.glob("**/*.yaml"))]
    near = find_near(name, names, most=1)
    remedy = f"Did you mean {near[0]}?" if near else f"One is {names[0]}."
    raise ConfigError.of("The name", "be that of a config of bnext", got=repr(name), remedy=remedy)

"""The LazyConfig behind a CfgNode: its node LAZY says which file it is, and the nodes are found here.

`bnext.config.lazy` makes such a CfgNode. A worker, which is a fresh process, reads the file again; it must be the same.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable
from typing import Any

from detectron2.config import CfgNode
from omegaconf import DictConfig, ListConfig, OmegaConf

from bnext.errors import ConfigError, LaunchError, Refusal
from bnext.lazy_config.calls import locate_target
from bnext.lazy_config.read import read_lazy_file

__all__ = ["LAZY", "copy_node", "describe_values", "find_target", "is_lazy", "keep", "name_target"]

LAZY = "LAZY"
_NO_NODE = Refusal(ConfigError, "{name} in a LazyConfig", "be there {reason}", "Add it{example}.")
_CHANGED = Refusal(
    LaunchError,
    "A LazyConfig",
    "stay as it is until its command ends, as every worker reads it",
    "Start again, and leave the file and those that it imports alone.",
)

_configs: dict[tuple[str, ...], DictConfig] = {}  # by file and values


def is_lazy(cfg: CfgNode) -> bool:
    """Whether a config is that of a LazyConfig."""
    return LAZY in cfg


def keep(path: str, config: DictConfig) -> list[str]:
    """Keep what was read for `copy_node`: a file's code runs once in a process for each `load_config`.

    Returns:
        Its values, by which it is known, as `describe_values` has them.
    """
    values = describe_values(config)
    _configs[(path, *values)] = config
    return values


def copy_node(cfg: CfgNode, name: str = "", reason: str = "", example: str = "") -> Any:
    """A node of the LazyConfig of a config, as a copy that may be changed and instantiated.

    Args:
        cfg: see `is_lazy`.
        name: such as "dataloader.train.mapper"; "": all of it.
        reason: for which it must be there; "": it need not.
        example: how it is written, for the error.

    Returns:
        None if it is not there.

    Raises:
        ConfigError: it must be there.
        LaunchError: this is a worker, and the file is no longer what the command has read.
    """
    config = copy.deepcopy(_find_config(cfg))
    node = OmegaConf.select(config, name) if name else config
    if node is None and reason:
        example = f", such as {example}" if example else ""
        raise _NO_NODE.of("none", cfg[LAZY].FILE, name=name, reason=reason, example=example)
    return node


def _find_config(cfg: CfgNode) -> DictConfig:
    path, values = cfg[LAZY].FILE, list(cfg[LAZY].VALUES)
    if (path, *values) not in _configs:
        now = keep(path, read_lazy_file(path, cfg[LAZY].OVERRIDES, known=("*",)))
        if values != now:
            changed = sorted(set(values) ^ set(now))
            raise _CHANGED.of(f"another {changed[0].partition(' = ')[0]}", path)
    return _configs[(path, *values)]


def find_target(node: Any) -> Callable[..., Any] | None:
    """The function or class that a node calls; None: it is no call of one."""
    if not isinstance(node, DictConfig) or "_target_" not in node:
        return None
    return locate_target(node, "node")


def name_target(node: Any) -> str:
    """The name of the function or class that a node calls."""
    target = find_target(node)
    return "no call" if target is None else str(getattr(target, "__qualname__", target))


def describe_values(config: DictConfig) -> list[str]:
    """A line `name = value` for each value of a LazyConfig, in their order: readable, and equal in all processes."""
    lines: list[str] = []
    _describe(OmegaConf.to_container(config, resolve=False), "", lines)
    return lines


def _describe(value: Any, name: str, lines: list[str]) -> None:
    if isinstance(value, dict) and value:
        for key in value:
            _describe(value[key], f"{name}.{key}" if name else str(key), lines)
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        for index, item in enumerate(value):
            _describe(item, f"{name}[{index}]", lines)
    elif isinstance(value, list):
        lines.append(f"{name} = [{', '.join(_show(item) for item in value)}]")
    else:
        lines.append(f"{name} = {_show(value)}")


def _show(value: Any) -> str:
    if isinstance(value, functools.partial):
        keywords = [f"{key}={_show(item)}" for key, item in value.keywords.items()]
        return f"partial({', '.join([_show(value.func), *map(_show, value.args), *keywords])})"
    if callable(value) and hasattr(value, "__qualname__"):
        module = getattr(value, "__module__", None)
        return f"{module}.{value.__qualname__}" if module else str(value.__qualname__)
    if isinstance(value, (DictConfig, ListConfig)):
        value = OmegaConf.to_container(value, resolve=False)
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))  # the same in all processes

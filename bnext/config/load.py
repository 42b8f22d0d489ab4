"""The config of a YAML file and of the pairs that override it, checked."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import META_ARCH_REGISTRY

from bnext.config.check import check_values, flatten
from bnext.config.keys import KEYS, add_bnext_config
from bnext.config.recipe import resolve_norms
from bnext.errors import ConfigError, LaunchError

__all__ = ["load_config"]

# What yacs and detectron2 raise for a file or a pair that has not the form of a config.
_MALFORMED = (AssertionError, AttributeError, KeyError, RecursionError, TypeError, ValueError)


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """The config of a YAML file with bnext's keys, and the pairs that override it.

    Args:
        config_file: path; "" for Detectron2's defaults.
        opts: KEY VALUE KEY VALUE ...

    Returns:
        A frozen config whose MODEL.DEVICE this machine has: "cuda" becomes "cpu" where there is none.

    Raises:
        ConfigError: if the file is missing or no YAML, or a key or value is not allowed.
        LaunchError: if this machine does not have MODEL.DEVICE.
    """
    cfg = get_cfg()
    add_bnext_config(cfg)
    _merge(cfg, config_file, opts)

    _check_architecture(cfg.MODEL.META_ARCHITECTURE)
    resolve_norms(cfg)
    check_values([KEYS["SOLVER.OPTIMIZER"]], {"SOLVER.OPTIMIZER": cfg.SOLVER.OPTIMIZER})

    _choose_device(cfg)
    cfg.freeze()
    return cfg


def _merge(cfg: CfgNode, config_file: str, opts: Sequence[str]) -> None:
    options = [word for word in opts[::2] if word.startswith("--")]
    if options:
        got = f"{options[0]} among them"
        raise ConfigError.of(
            "Options", "come before the KEY VALUE pairs", got=got, where=" ".join(opts), remedy="Move it."
        )

    defaults = cfg.clone()
    try:
        if config_file:
            cfg.merge_from_file(config_file)
            _check_complete(cfg, defaults)
    except (*_MALFORMED, OSError, yaml.YAMLError) as error:
        raise ConfigError.of(
            "--config-file",
            "be a YAML file with keys of Detectron2 and bnext",
            got=_describe(error),
            where=config_file,
            remedy="Correct the path or the key.",
        ) from error

    try:
        cfg.merge_from_list(list(opts))
        _check_complete(cfg, defaults)
    except _MALFORMED as error:
        raise ConfigError.of(
            "KEY VALUE pairs",
            "name keys of Detectron2 and bnext, with values of their type",
            got=_describe(error),
            where=" ".join(opts),
            remedy="Correct the pair.",
        ) from error


def _check_complete(cfg: CfgNode, defaults: CfgNode) -> None:
    """Numbers have a value, and sections their keys: yacs lets None replace both."""
    values = flatten(cfg)
    for name, default in flatten(defaults).items():
        if name not in values or (values[name] is None and isinstance(default, (int, float))):
            raise ValueError(f"no value for {name}")


def _check_architecture(name: str) -> None:
    known = [registered for registered, _ in META_ARCH_REGISTRY]
    if name in known:
        return

    close = difflib.get_close_matches(str(name), known) or sorted(known)
    raise ConfigError.of(
        "MODEL.META_ARCHITECTURE",
        "name a registered architecture",
        got=repr(name),
        where="config",
        remedy=f"Did you mean {' or '.join(close)}? One of your own must be imported first.",
    )


def _describe(error: Exception) -> str:
    """The first line of a message of yacs, with the key, which it names at the end of a whole section."""
    text = str(error.args[0] if error.args else error)
    line = text.splitlines()[0] if text else type(error).__name__
    key = text.rpartition("for config key: ")[2] if "for config key: " in text else ""
    if key not in line:
        line = f"another type for {key}"
    return f"no mapping of names to values ({line})" if isinstance(error, (AttributeError, TypeError)) else line


def _choose_device(cfg: CfgNode) -> None:
    device = cfg.MODEL.DEVICE
    try:
        torch.device(device)
    except (RuntimeError, TypeError) as error:
        remedy = "Set it to 'cuda' or 'cpu'."
        raise ConfigError.of(
            "MODEL.DEVICE", "be a device of torch", got=repr(device), where="config", remedy=remedy
        ) from error

    if not device.startswith("cuda") or torch.cuda.is_available():
        return
    if device != "cuda":
        rule = "be a device of this machine, which has no CUDA"
        raise LaunchError.of("MODEL.DEVICE", rule, got=repr(device), remedy="Set it to 'cpu'.")
    logging.getLogger(__name__).info("This machine has no CUDA: MODEL.DEVICE is set to 'cpu'.")
    cfg.MODEL.DEVICE = "cpu"

"""The config of a file, YAML or a LazyConfig, and of what overrides it, checked."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.config.compat import downgrade_config, guess_version, upgrade_config

from bnext.config.check import check_values, flatten
from bnext.config.files import find_config_file
from bnext.config.keys import KEYS, add_bnext_config
from bnext.config.lazy import merge_lazy
from bnext.config.merge import merge_pairs, merge_values, split_pairs
from bnext.config.read import read_file
from bnext.config.recipe import resolve_norms
from bnext.config.rules import check_detectron2_keys
from bnext.data.domains import keep_domains
from bnext.data.listed_sets import register_listed_sets
from bnext.errors import ConfigError, LaunchError
from bnext.lazy_config import is_lazy, is_lazy_file
from bnext.lazy_config.nodes import LAZY

__all__ = ["finish_config", "load_config"]


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """The config of a file with bnext's keys, and the pairs that override it.

    Args:
        config_file: path of a YAML file, or of a LazyConfig (.py), whose code runs; or the name of a config of the
            package; "" for Detectron2's defaults.
        opts: KEY VALUE KEY VALUE ..., or KEY=VALUE ...; of a LazyConfig `key=value` as well, see `bnext.config.lazy`.

    Returns:
        A frozen config whose MODEL.DEVICE this machine has: "cuda" becomes "cpu" where there is none.

    Raises:
        ConfigError: if the file is missing, no YAML, or Python that raises, or a key or value is not allowed.
        LaunchError: if this machine does not have MODEL.DEVICE.
    """
    cfg = get_cfg()
    add_bnext_config(cfg)
    _check_options(opts)
    config_file = find_config_file(config_file)
    names = merge_lazy(cfg, config_file, opts) if is_lazy_file(config_file) else _merge(cfg, config_file, opts)
    return finish_config(cfg, names)


def finish_config(cfg: CfgNode, names: Mapping[str, str] | None = None) -> CfgNode:
    """A whole config, however it was made: checked, its sets registered, with a device of this machine, and frozen.

    Args:
        cfg: with bnext's keys; is left as it is.
        names: key -> the name by which the user knows it, where that is another.

    Raises:
        ConfigError, LaunchError: see `load_config`.
    """
    cfg = cfg.clone()
    cfg.defrost()

    check_detectron2_keys(flatten(cfg), names)
    norms = resolve_norms(cfg, says_unused=False)  # whoever builds the model says so, into the log of the training
    if not is_lazy(cfg):
        cfg.MODEL.BNEXT.DOMAINS.NAMES = norms.domains  # a config that is written says them, whatever sets it has later
    check_values([KEYS["SOLVER.OPTIMIZER"]], {"SOLVER.OPTIMIZER": cfg.SOLVER.OPTIMIZER})

    register_listed_sets(cfg)
    _choose_device(cfg)
    cfg.freeze()
    return cfg


def _check_options(opts: Sequence[str]) -> None:
    options = [str(word) for word in opts[::2] if str(word).startswith("--")]
    if options:
        got = f"{options[0]} among them"
        raise ConfigError.of(
            "Options", "come before the KEY VALUE pairs", got=got, where=" ".join(map(str, opts)), remedy="Move it."
        )


def _merge(cfg: CfgNode, config_file: str, opts: Sequence[str]) -> dict[str, str]:
    """Fill a config from a YAML file and pairs. Nobody knows a key by another name."""
    defaults = cfg.clone()
    if config_file:
        values = read_file(config_file)
        if LAZY in values:
            rule, remedy = "be that of a YAML config", "Give the .py file itself, with the overrides that stand there."
            raise ConfigError.of(config_file, rule, got="what a run of a LazyConfig has written", remedy=remedy)

        version = _find_version(values, cfg.VERSION, config_file)
        if version == cfg.VERSION:
            merge_values(cfg, values, defaults, config_file)
        else:
            old = downgrade_config(cfg, to_version=version)
            merge_values(old, values, old.clone(), config_file)
            cfg.update(upgrade_config(old))

    before, pairs = cfg.clone(), split_pairs(opts)
    merge_pairs(cfg, pairs, defaults)
    keep_domains(cfg, before, pairs[::2])
    return {}


def _find_version(values: Mapping[str, Any], latest: int, where: str) -> int:
    """The version of detectron2's keys in a file, which it may not say."""
    if "VERSION" not in values:
        return guess_version({key: value for key, value in values.items() if isinstance(value, Mapping)}, where)

    version = values["VERSION"]
    if type(version) is not int or not 1 <= version <= latest:
        remedy = f"Write {latest}, or remove the key."
        raise ConfigError.of("VERSION", f"be 1 to {latest}", got=repr(version), where=where, remedy=remedy)
    return version


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

"""A detector of bnext as plain detectron2 has it: a config without our keys, and a state that its model loads.

Its norms must be such as detectron2 knows: without domains (see `bnext.surgery.select_domain`), in a RetinaNet with one
affine for all levels, and with population statistics at inference.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch.build import META_ARCH_REGISTRY
from torch import Tensor, nn

from bnext.config.places import PLACES
from bnext.config.recipe import resolve_norms
from bnext.errors import ConfigError, Refusal
from bnext.layers.forms import find_forms
from bnext.surgery.convert_state import copy_norm_state

__all__ = ["make_plain_config", "make_plain_model"]

NO_ARCHITECTURE = Refusal(
    ConfigError,
    "MODEL.META_ARCHITECTURE",
    "be one that detectron2 has without bnext",
    "Keep it in the form of bnext, which gives the same outputs.",
)
NO_NORM_THERE = Refusal(
    ConfigError,
    "{key}",
    "be a norm that detectron2 knows",
    "Keep the detector in the form of bnext: detectron2 has no norm in this place.",
)
OTHER_OUTPUTS = Refusal(
    ConfigError,
    "The norms of the detector",
    "be such as detectron2's model of the same keys has",
    "Keep the detector in the form of bnext, which gives the same outputs.",
)
OTHER_KEYS = Refusal(
    ConfigError,
    "The weights of the detector",
    "be those of detectron2's model of the same keys",
    "Keep the detector in the form of bnext.",
)
NOT_BUILT = Refusal(
    ConfigError,
    "The config",
    "be one that detectron2 builds without bnext",
    "Keep the detector in the form of bnext.",
)


def make_plain_config(cfg: CfgNode) -> CfgNode:
    """The config of the same detector with detectron2's keys alone.

    Args:
        cfg: of an architecture of bnext, or of detectron2.

    Raises:
        ConfigError: detectron2 has no such architecture, or no norm in a place where this one has.
    """
    architecture = cfg.MODEL.META_ARCHITECTURE.removeprefix("BNext")
    if architecture not in META_ARCH_REGISTRY:
        raise NO_ARCHITECTURE.of(repr(cfg.MODEL.META_ARCHITECTURE), "config")
    for place, norm in resolve_norms(cfg).places.items():
        if PLACES[place].has_norm_of_ours and norm.name:
            raise NO_NORM_THERE.of(repr(norm.name), "config", key=PLACES[place].norm)

    plain = get_cfg()
    _take_values(plain, cfg)
    plain.MODEL.META_ARCHITECTURE = architecture
    plain.freeze()
    return plain


def _take_values(plain: CfgNode, cfg: CfgNode) -> None:
    for key, value in plain.items():
        if isinstance(value, CfgNode):
            _take_values(value, cfg[key])
        else:
            plain[key] = cfg[key]


@torch.no_grad()
def make_plain_model(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """Detectron2's own model with the weights and statistics of one of bnext, in evaluation mode.

    Args:
        cfg: of `make_plain_config`.
        model: the detector; it is not changed.

    Raises:
        ConfigError: detectron2 does not build it, or has other norms or weights than the detector.
    """
    try:
        plain = build_model(cfg).eval()
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise NOT_BUILT.of(f"{type(error).__name__}: {error}", "build_model") from error

    copied: set[str] = set()
    for path, norm, _ in find_forms(plain):
        source = _find_module(model, path)
        if source is None:
            raise OTHER_KEYS.of("no norm", path)
        report = copy_norm_state(source, norm, path)
        for change in report.changes:
            if not change.keeps_outputs:
                raise OTHER_OUTPUTS.of(change.text, path)
        copied |= {f"{path}.{key}" for key in norm.state_dict()}

    _copy_rest(model, plain, copied)
    return plain


def _find_module(model: nn.Module, path: str) -> nn.Module | None:
    with contextlib.suppress(AttributeError):
        return model.get_submodule(path)
    return None


def _copy_rest(model: nn.Module, plain: nn.Module, copied: set[str]) -> None:
    """The entries that are no norm's, which are to be the same on both sides."""
    entries: dict[str, Tensor] = plain.state_dict()
    sources: dict[str, Any] = model.state_dict()
    norms = [path for path, *_ in find_forms(model)]
    rest = {key for key in sources if not any(key.startswith(f"{path}.") for path in norms)}

    different = sorted(rest ^ (entries.keys() - copied))
    different += [key for key in sorted(rest & entries.keys()) if sources[key].shape != entries[key].shape]
    if different:
        raise OTHER_KEYS.of(f"{different[0]} on one side alone, or of another shape", type(plain).__name__)
    for key in rest:
        entries[key].copy_(sources[key])

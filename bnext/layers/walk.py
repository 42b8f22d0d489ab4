"""The one walk over a model to its batch norms, all of them or those of bnext, and the way into their places.

Norms of any form (GroupNorm, frozen norms, detectron2's lists), each at all its places, are found by
`bnext.layers.forms.find_forms`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.errors import ConfigError, Refusal
from bnext.layers.batch_norm import BatchNorm2d, DomainState

__all__ = ["Selection", "check_is_whole", "find_bnext_norms", "find_foreign_norms", "find_norms", "replace_modules"]

Selection = Callable[[str, nn.Module], bool]

SHARDED = Refusal(
    ConfigError,
    "model",
    "hold its parameters whole",
    "Change its norms before fully_shard or FullyShardedDataParallel: build the model, call {function}, shard it, load "
    "the sharded checkpoint.",
)
# Modules of torch, of this and of earlier versions, with the class of a parameter of which a worker has a part.
_SHARDING = ("torch.distributed.tensor", "torch.distributed._tensor")


def find_norms(model: nn.Module, select: Selection | None = None) -> dict[str, _BatchNorm]:
    """Path -> batch norm, in the order of the modules: of bnext, of torch, and subclasses of torch's.

    Args:
        model: any module; itself, if it is a norm, has the path "". A norm at several places comes once, with the
            first of them. What a level or domain owns is a part of its norm, and does not come.
        select: called as select(path, norm); those for which it is true. None: all.

    Example:
        >>> find_norms(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))).keys()
        dict_keys(['1'])
    """
    norms: dict[str, _BatchNorm] = {}

    for path, module in model.named_modules():
        is_norm = isinstance(module, _BatchNorm) and not isinstance(module, DomainState)
        if is_norm and (select is None or select(path, module)):
            norms[path] = module

    return norms


def find_bnext_norms(model: nn.Module) -> dict[str, BatchNorm2d]:
    """Path -> batch norm of bnext, see `find_norms`."""
    return {path: norm for path, norm in find_norms(model).items() if isinstance(norm, BatchNorm2d)}


def find_foreign_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Path -> batch norm that is not of bnext, see `find_norms`: it knows no spec, no domains and no groups."""
    return {path: norm for path, norm in find_norms(model).items() if not isinstance(norm, BatchNorm2d)}


def check_is_whole(model: nn.Module, function: str) -> None:
    """Refuse a model, or a part of one, whose parameters are sharded over workers: new ones would stay out of it.

    Args:
        function: that would replace norms, for the message.

    Raises:
        ConfigError: a module or a parameter is sharded.
    """
    modules = [sys.modules[path] for path in _SHARDING if path in sys.modules]  # whoever shards has imported them
    parts = tuple(module.DTensor for module in modules if hasattr(module, "DTensor"))

    for path, module in model.named_modules():
        if getattr(module, "_is_fsdp_managed_module", False):
            raise SHARDED.of("shards of FSDP", path or type(module).__name__, function=function)
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, parts):
                raise SHARDED.of("a DTensor", f"{path}.{name}".lstrip("."), function=function)


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules into the places of some: into all of them, where one has several."""
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, replacements[module])

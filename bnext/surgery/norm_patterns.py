"""Which norms of a model become what: by patterns of paths, or level norms by fields of their specs."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Mapping
from typing import cast

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bnext.errors import ConfigError
from bnext.layers.forms import NormForm
from bnext.layers.level_norm import LevelBatchNorm2d
from bnext.layers.spec import NormSpec

__all__ = ["NewNorm", "check_arguments", "choose_norms"]

NewNorm = NormSpec | str | Callable[[int], nn.Module]


def check_arguments(model: nn.Module, specs: object, changes: Mapping[str, object]) -> None:
    """Refuse what `convert_norm` cannot take, before anything is made."""
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ConfigError(
            f"model must not be in DistributedDataParallel; got {type(model).__name__} (convert_norm): it would not "
            f"exchange the gradients of the new parameters. Convert the model before it is wrapped."
        )
    if specs is not None and not (isinstance(specs, Mapping) and all(isinstance(pattern, str) for pattern in specs)):
        raise ConfigError(
            f"specs must map patterns to norms; got {specs!r} (convert_norm). Write {{'backbone': NormSpec(...)}}; "
            f"the pattern '' is the whole model."
        )
    wrong = {pattern: value for pattern, value in (specs or {}).items() if not _is_norm(value)}
    if wrong:
        raise ConfigError(
            f"specs must map patterns to norms; got {wrong!r} (convert_norm). Give NormSpecs, names, or functions that "
            f"make a norm of a number of channels."
        )
    known = [field.name for field in dataclasses.fields(NormSpec)]
    unknown = changes.keys() - known
    if unknown:
        raise ConfigError(
            f"changes must be fields of NormSpec; got {', '.join(sorted(unknown))} (convert_norm). They are "
            f"{', '.join(known)}."
        )


def _is_norm(value: object) -> bool:
    return isinstance(value, (NormSpec, str)) or callable(value)


def choose_norms(
    model: nn.Module,
    norms: list[tuple[str, nn.Module, NormForm]],
    specs: Mapping[str, NewNorm] | None,
    changes: dict[str, object],
) -> dict[str, NewNorm]:
    """Path -> new norm, of those that are to change.

    Raises:
        ConfigError: a pattern that matches none, no level norm for `changes`, or a norm at two places that would
            become two.
    """
    return _choose_levels(model, norms, specs, changes) or _choose(model, norms, specs or {})


def _choose_levels(
    model: nn.Module,
    norms: list[tuple[str, nn.Module, NormForm]],
    specs: Mapping[str, NewNorm] | None,
    changes: dict[str, object],
) -> dict[str, NewNorm]:
    """The new spec of every level norm, where fields were given and no patterns."""
    if specs is not None and changes:
        raise ConfigError(
            f"specs must say everything that changes; got patterns and {', '.join(changes)}= as well (convert_norm). "
            f"Put the fields into the specs."
        )
    if specs is not None:
        return {}
    chosen = {path: module.spec.replace(**changes) for path, module, _ in norms if isinstance(module, LevelBatchNorm2d)}
    if not chosen:
        raise ConfigError(
            f"model must have a level norm to convert; got {type(model).__name__} without one (convert_norm). Build "
            f"it with a head of bnext (MODEL.META_ARCHITECTURE BNextRetinaNet) and load the checkpoint into it; or "
            f'say which norms become what: convert_norm(model, {{"backbone": NormSpec(...)}}).'
        )
    return cast(dict[str, NewNorm], chosen)


def _choose(
    model: nn.Module, norms: list[tuple[str, nn.Module, NormForm]], specs: Mapping[str, NewNorm]
) -> dict[str, NewNorm]:
    """Path -> new norm, for the norms that a pattern matches."""
    chosen: dict[str, NewNorm] = {}
    paths = [path for path, *_ in norms]
    for pattern, value in specs.items():
        found = [path for path in paths if _matches(path, pattern)]
        if not found:
            raise _no_match(model, paths, pattern)
        chosen.update(dict.fromkeys(found, value))
    places: dict[nn.Module, set[str]] = {}
    for path, module, _ in norms:
        places.setdefault(module, set()).add(path)
    for same in places.values():
        values = [chosen.get(path) for path in sorted(same)]
        if any(value != values[0] for value in values):
            raise ConfigError(
                f"a norm at several places must become one norm; got {values} for {', '.join(sorted(same))} "
                f"(convert_norm). Use patterns that match all of its places."
            )
    return chosen


def _matches(path: str, pattern: str) -> bool:
    return not pattern or path == pattern or path.startswith(f"{pattern}.") or fnmatch.fnmatchcase(path, pattern)


def _no_match(model: nn.Module, paths: list[str], pattern: str) -> ConfigError:
    parents = {path[:index] for path in paths for index, letter in enumerate(path) if letter == "."}
    near = difflib.get_close_matches(pattern, [*sorted(parents), *paths], n=3, cutoff=0.4) or paths[:3]
    held = f"near it are {', '.join(near)}" if near else "the model has no norm at all"
    return ConfigError(
        f"specs must be of paths or globs that match a norm; got {pattern!r}, which matches none of the {len(paths)} "
        f"norms of {type(model).__name__} (convert_norm); {held}. Correct the pattern, or leave it out."
    )

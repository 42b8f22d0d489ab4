"""Names of norms as Detectron2, its projects and papers know them: what to write here instead."""

from __future__ import annotations

import re
from typing import Any

from bnext.config.places import PLACES
from bnext.errors import ConfigError
from bnext.layers.build import NORM_NAMES
from bnext.text import find_near

__all__ = ["check_norm_name"]

# Name, in small letters and digits alone -> the name to write.
_SAME = {
    "SyncBN": ("naivesyncbn", "nnsyncbn", "naivesyncbatchnorm", "syncbatchnorm", "msyncbn", "crossgpubn", "apexsyncbn"),
    "BN": ("batchnorm", "batchnorm2d", "batchnormalization", "bn2d", "torchbn", "naivebn"),
    "FrozenBN": ("frozenbatchnorm", "frozenbatchnorm2d", "fixedbn", "freezebn"),
    "GN": ("groupnorm", "groupnormalization", "gn32"),
    "LN": ("layernorm", "layernorm2d", "layernormalization"),
    "": ("none", "null", "no", "false", "identity", "nonorm"),
}
_NAMES = {name: new for new, names in _SAME.items() for name in (new.casefold(), *names)}
# Name -> the keys that give it, as a norm called BN.
_BY_KEYS = {
    "ghostbn": "{node}.NORMALIZATION_BATCH_SIZE to the number of samples that are normalized together",
    "ghostbatchnorm": "{node}.NORMALIZATION_BATCH_SIZE to the number of samples that are normalized together",
    "shufflebn": "{node}.SHUFFLE to statistics",
    "batchrenorm": "{node}.TRAINING to renorm",
    "brn": "{node}.TRAINING to renorm",
    "precisebn": "TEST.PRECISE_BN.ENABLED to True",
    "virtualbn": "SOLVER.BNEXT.VIRTUAL_IMAGES to a number of images",
    "cyclebn": "{node}.POPULATION and STATISTICS to per_level, which they are by default",
    "cyclebatchnormlist": "{node}.POPULATION and STATISTICS to per_level, which they are by default",
    "dsbn": "{node}.STATISTICS and POPULATION to {per_domain}",
    "domainbn": "{node}.STATISTICS and POPULATION to {per_domain}",
    "splitbn": "{node}.STATISTICS and POPULATION to {per_domain}",
}
_LEVELS_ONLY, _ROIS_ONLY = ("cyclebn", "cyclebatchnormlist"), ("shufflebn",)


def check_norm_name(place: str, name: Any) -> None:
    """Refuse a name of a norm that a place cannot have.

    Args:
        place: one of `PLACES`.
        name: the value of its NORM.

    Raises:
        ConfigError: names the key, and what to write.
    """
    if name in NORM_NAMES:
        return

    choices = ", ".join(map(repr, NORM_NAMES))
    remedy = _find_remedy(place, str(name))
    raise ConfigError.of(PLACES[place].norm, f"be one of {choices}", got=repr(name), where="config", remedy=remedy)


def _find_remedy(place: str, name: str) -> str:
    plain = re.sub(r"[\W_]", "", name.rpartition(".")[2]).casefold()  # without the module, such as torch.nn
    keys = _BY_KEYS.get(plain)
    is_of_levels = bool(PLACES[place].levels)
    is_elsewhere = (plain in _LEVELS_ONLY and not is_of_levels) or (plain in _ROIS_ONLY and not PLACES[place].sees_rois)
    if keys is not None and not is_elsewhere:
        per_domain = "per_level_and_domain" if is_of_levels else "per_domain"
        return f"Write BN, and set {keys.format(node=f'MODEL.BNEXT.{place}', per_domain=per_domain)}."
    if plain in _NAMES:
        return f"Write {_NAMES[plain] or repr('')}."

    near = [] if keys is not None or len(plain) < 3 else find_near(name, filter(None, NORM_NAMES), cutoff=0.75)
    return f"Write {near[0]}." if near else "Choose one of them."

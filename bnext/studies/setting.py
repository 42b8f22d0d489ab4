"""Settings of a study: a frozen dataclass, whose values come from a YAML file and the command line."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bnext.errors import ConfigError, check_choice
from bnext.studies.image_sets import IMAGE_SETS, StoredImages, load_image_set
from bnext.studies.images import Images
from bnext.text import suggest

__all__ = ["ImageSetting", "check_counts", "load_setting", "load_split", "read_setting"]

Setting = TypeVar("Setting")


@dataclasses.dataclass(frozen=True)
class ImageSetting:
    """Images of a study of classifiers, and where it is computed; its settings inherit from it, lists become tuples.

    Args:
        dataset: see `load_image_set`.
        root: its folder.
        side: of the pictures in pixels; None: as the set has them.
        limit: images of each split; None: all.
        device: of torch.
    """

    dataset: str = "digits"
    root: str = ""
    side: int | None = None
    limit: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # YAML and JSON give lists
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, tuple(value) if isinstance(value, list) else value)

        check_choice("dataset", self.dataset, IMAGE_SETS, where="the settings")
        check_counts(self, "side", "limit")
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            remedy = "Use cpu or cuda."
            raise ConfigError.of("device", "be one of torch", got=repr(self.device), remedy=remedy) from error
        if device.type == "cuda" and not torch.cuda.is_available():
            rule, remedy = "be one that this machine has", "Use device=cpu, or a machine with a GPU."
            raise ConfigError.of("device", rule, got=repr(self.device), remedy=remedy)


def check_counts(setting: object, *names: str) -> None:
    """Refuse numbers below 1 in fields of a setting; None is none.

    Raises:
        ConfigError: names the first of them.
    """
    for name in names:
        number = getattr(setting, name)
        if number is not None and number < 1:
            rule, remedy = "be 1 or more", "Leave it at its default."
            raise ConfigError.of(name, rule, got=number, where="the settings", remedy=remedy)


def load_split(setting: ImageSetting, split: str) -> Images | StoredImages:
    """Images of "train" or "val", on the setting's device unless they are read when they are needed."""
    options: dict[str, Any] = {"root": setting.root, "side": setting.side, "limit": setting.limit}
    images = load_image_set(setting.dataset, split, **options)
    return images.to(setting.device) if isinstance(images, Images) else images


def load_setting(kind: type[Setting], file: str | os.PathLike[str], pairs: Sequence[str] = ()) -> Setting:
    """Settings of a file, of which pairs change some; what neither names has its default.

    Args:
        kind: frozen dataclass, which may refuse values when it is made.
        file: YAML.
        pairs: KEY=VALUE.

    Raises:
        ConfigError: the file cannot be read; a key that there is not, or a value of another type.
    """
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for pair in pairs:
        key, equals, _ = pair.partition("=")
        if not equals or key not in names:
            remedy = suggest(key, names, otherwise=f"There are {', '.join(names)}.")
            raise ConfigError.of("KEY=VALUE", "name a setting of the study", got=repr(pair), remedy=remedy)

    try:
        given = OmegaConf.load(os.fspath(file))
        merged = OmegaConf.merge(OmegaConf.structured(kind), given, OmegaConf.from_dotlist(list(pairs)))
        setting: Any = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, yaml.YAMLError, OSError) as error:
        words = str(error).splitlines()[0]
        remedy = f"There are {', '.join(names)}."
        raise ConfigError.of("The settings", "fit the study", got=words, where=str(file), remedy=remedy) from error
    return setting


def read_setting(kind: type[Setting], results: Mapping[str, Any]) -> Setting:
    """The setting that results.json holds, on any machine.

    Args:
        kind: with a field `device`.
        results: of `bnext.studies.trials.run_trials`.
    """
    return kind(**{**results["setting"], "device": "cpu"})

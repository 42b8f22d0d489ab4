"""Conditions of an evaluation: which statistics normalize in it, whose the images are, and what it is compared with.

The kinds of statistics themselves are in `bnext.repair.kinds`. Nothing of a condition stays in the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, get_args

from detectron2.config import CfgNode
from torch import nn

from bnext.config.domains import count_set_domains
from bnext.config.recipe import resolve_norms
from bnext.errors import ConfigError, Refusal, check_choice, list_few
from bnext.evaluation.compare import recompute_kind
from bnext.evaluation.domains import read_specialists
from bnext.repair.kinds import KINDS, find_obstacle, use_kind
from bnext.scope import use_domain
from bnext.text import name_folder

__all__ = ["Conditions", "StatisticsAtTest", "check_conditions", "under_conditions"]

StatisticsAtTest = Literal["file", "mini_batch", "target"]
_KINDS = {"file": "moving_average", "mini_batch": "mini_batch", "target": "adaptive"}
NO_TARGET = Refusal(
    ConfigError,
    "--statistics target",
    "re-estimate statistics that there are: norms have those of the domains {names}",
    "Say with --domain NAME whose the images are to be taken for.",
)
DOES_NOT_APPLY = Refusal(ConfigError, "--statistics", "apply to the model", "Leave it out.")


@dataclass(frozen=True)
class Conditions:
    """An evaluation that differs from that of the file.

    Args:
        statistics: that normalize: those of the file, of each mini-batch, or of all images of each set, without
            their labels.
        domain: of which all images are taken to be, whatever their records say; None: as they say.
        unseen: the rule for images of other domains, where it is another one than the training's; the config has it
            already. "": it is that of the training.
        specialists: domain -> results.json of the detector that was trained on it alone, which changes nothing.
    """

    statistics: StatisticsAtTest = "file"
    domain: str | None = None
    unseen: str = ""
    specialists: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("--statistics", self.statistics, get_args(StatisticsAtTest), where="bnext evaluate")

    @property
    def folder(self) -> str:
        """Name of a folder for the results, which those of the file are not mixed up with; "": they are these.

        Example:
            >>> Conditions("target", "night").folder
            'target_as_night'
        """
        parts: list[str] = [self.statistics] if self.statistics != "file" else []
        parts += [f"as_{self.domain}"] if self.domain is not None else []
        parts += [f"unseen_{self.unseen}"] if self.unseen else []
        return name_folder("_".join(parts))


def check_conditions(cfg: CfgNode, conditions: Conditions) -> None:
    """Refuse what cannot be evaluated.

    Args:
        cfg: DATASETS.TEST and the domains of the norms are read; `check_domains` looks at the rest.

    Raises:
        ConfigError: the statistics of a domain are to be re-estimated, and norms have none of it; or the results of a
            specialist are not what they should be, see `read_specialists`.
    """
    read_specialists(cfg, conditions.specialists)
    norms = resolve_norms(cfg, says_unused=False)
    if conditions.statistics != "target" or conditions.domain is not None or not norms.domains:
        return

    for name in cfg.DATASETS.TEST:
        unknown = [domain for domain in count_set_domains(cfg, name) if domain not in norms.domains]
        if unknown:
            got = f"images of {unknown[0]!r}" if unknown[0] else "images without a domain"
            raise NO_TARGET.of(got, f"data set {name!r}", names=list_few(map(repr, norms.domains)))


@contextlib.contextmanager
def under_conditions(cfg: CfgNode, model: nn.Module, conditions: Conditions, name: str) -> Iterator[None]:
    """Put a model under conditions while a data set is evaluated; it is bit for bit as it was afterwards.

    Args:
        cfg: see `recompute_statistics`.
        model: the detector.
        name: of the data set.

    Raises:
        ConfigError: the statistics do not apply to the model.

    Note:
        A collective, where statistics are re-estimated.
    """
    kind = KINDS[_KINDS[conditions.statistics]]
    obstacle = find_obstacle(model, kind.name)
    if obstacle:
        raise DOES_NOT_APPLY.of(f"{conditions.statistics!r}, as {obstacle}")

    as_domain = contextlib.nullcontext() if conditions.domain is None else use_domain(conditions.domain)
    with as_domain, use_kind(model, kind, {kind.source: name}, partial(recompute_kind, cfg)):
        yield

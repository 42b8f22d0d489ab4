"""What tests of checks share about configs: the static facts of a tiny detector, and a remedy's keys."""

from __future__ import annotations

import dataclasses
import functools

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from bnext import load_config
from bnext.diagnostics.diagnose import collect_facts
from bnext.diagnostics.facts import Facts, Origin, WeightsFacts
from bnext.diagnostics.findings import Evidence, Remedy
from bnext.diagnostics.registry import find_checks
from bnext.heads.doctor_facts import add_config_facts
from tests import tiny

__all__ = ["RCNN", "RETINANET", "describe", "examine", "list_pairs"]

RETINANET, RCNN = str(tiny.CONFIG), str(tiny.RCNN)


def describe(file: str, *opts: object, num_workers: int = 1, is_loaded: bool = False) -> Facts:
    """Facts of a config, whose model is on the meta device: it has shapes and no numbers."""
    words = [str(word) for word in opts]
    cfg = load_config(file, ["MODEL.DEVICE", "meta", *words])
    model = _build(_Model(cfg.MODEL.dump(), cfg))
    origin = Origin("config", file, tuple(words), "trained.pth" if is_loaded else "")
    weights = WeightsFacts(cfg.MODEL.WEIGHTS, is_loaded=is_loaded)
    facts = dataclasses.replace(collect_facts(model), origin=origin, weights=weights)
    return add_config_facts(facts, cfg, model, num_workers)


@dataclasses.dataclass(frozen=True)
class _Model:
    """A config by what its model depends on."""

    text: str
    cfg: CfgNode = dataclasses.field(compare=False)


@functools.lru_cache(64)
def _build(model: _Model) -> nn.Module:
    return build_model(model.cfg).train()


def examine(code: str, facts: Facts) -> list[Evidence]:
    """The findings of one check."""
    return list(find_checks()[code].examine(facts))


def list_pairs(remedy: Remedy) -> list[str]:
    """Its keys as KEY VALUE ... of a command line."""
    words: list[str] = []
    for key, value in remedy.keys.items():
        words += [key, str(value)]
    return words

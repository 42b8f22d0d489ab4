"""Every form of norm that state is carried between, and how each is called on several named features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d as TorchvisionLayerNorm
from torchvision.ops.misc import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec, make_named_norm
from bnext.layers.forms import find_form
from bnext.scope import use_domain
from tests.cases import LEVELS, NUM_CHANNELS, PAIRED, ROWS, make_features, randomize

try:
    from detectron2.layers import CycleBatchNormList, FrozenBatchNorm2d, NaiveSyncBatchNorm
except ModuleNotFoundError:
    CycleBatchNormList = FrozenBatchNorm2d = NaiveSyncBatchNorm = None

__all__ = ["FORMS", "LAYOUTS", "call", "make", "pick_pairs"]

C = NUM_CHANNELS


def _own(**answers: object) -> Callable[[], nn.Module]:
    return lambda: BatchNorm2d(C, NormSpec(**answers))


def _domains(statistics: str, population: str, affine: str, **answers: object) -> Callable[[], nn.Module]:
    """Domains of the levels' names, so that they are each other's."""
    spec = NormSpec(statistics=statistics, population=population, affine=affine, domains=LEVELS, **answers)
    return lambda: BatchNorm2d(C, spec)


def _level(row: int) -> Callable[[], nn.Module]:
    return lambda: LevelBatchNorm2d(C, LEVELS, NormSpec.from_table5_row(row))


def _pairs(statistics: str, population: str, affine: str) -> Callable[[], nn.Module]:
    """Domains at levels."""
    spec = NormSpec(statistics=statistics, population=population, affine=affine, domains=PAIRED)
    return lambda: LevelBatchNorm2d(C, LEVELS, spec)


_BY_BATCH = {"population": "none", "inference": "mini_batch"}
FORMS: dict[str, Callable[[], nn.Module]] = {
    "torch": lambda: nn.BatchNorm2d(C),
    "torch_sync": lambda: nn.SyncBatchNorm(C),
    "torch_no_affine": lambda: nn.BatchNorm2d(C, affine=False),
    "torch_no_population": lambda: nn.BatchNorm2d(C, track_running_stats=False),
    "torch_other_eps": lambda: nn.BatchNorm2d(C, eps=1e-2),
    "torchvision_frozen": lambda: TorchvisionFrozenBatchNorm2d(C),
    "torchvision_frozen_no_eps": lambda: TorchvisionFrozenBatchNorm2d(C, eps=0.0),
    "group": lambda: nn.GroupNorm(2, C),
    "layer": lambda: make_named_norm("LN", C),
    "torchvision_layer": lambda: TorchvisionLayerNorm(C, eps=1e-6),
    "own": _own(),
    "own_all_workers": _own(workers="all"),
    "own_frozen": _own(frozen="both"),
    "own_no_affine": _own(affine="none"),
    "own_no_population": _own(**_BY_BATCH),
    "own_by_batch": _own(inference="mini_batch"),
    "domains_SSD": _domains("shared", "shared", "per_domain"),
    "domains_SDS": _domains("shared", "per_domain", "shared"),
    "domains_DSS": _domains("per_domain", "shared", "shared"),
    "domains_DDD": _domains("per_domain", "per_domain", "per_domain"),
    "domains_DDN": _domains("per_domain", "per_domain", "none"),
    "domains_DNS": _domains("per_domain", "none", "shared", inference="mini_batch"),
    "domains_SND": _domains("shared", "none", "per_domain", inference="mini_batch"),
    **{f"levels_row{row}": _level(row) for row in ROWS},
    "levels_domains": _pairs("per_level_and_domain", "per_level_and_domain", "per_level_and_domain"),
    "levels_domains_LD": _pairs("per_domain", "per_level", "per_domain"),
}
if CycleBatchNormList is not None:
    FORMS |= {
        "detectron2_frozen": lambda: FrozenBatchNorm2d(C),
        "detectron2_naive_sync": lambda: NaiveSyncBatchNorm(C),
        "detectron2_cycle": lambda: CycleBatchNormList(len(LEVELS), num_features=C),
        "detectron2_cycle_no_affine": lambda: CycleBatchNormList(len(LEVELS), num_features=C, affine=False),
    }


def _group_by_layout() -> list[list[str]]:
    """Names of forms that lay out their state, and normalize, in the same way."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, make_norm in FORMS.items():
        form = find_form(make_norm())
        key = (form.affine, form.population, form.is_numbered, form.has_counter, form.inference)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


_GROUPS = _group_by_layout()
LAYOUTS = tuple(group[0] for group in _GROUPS)


def pick_pairs(layout: str) -> list[tuple[str, str]]:
    """One way from a layout into each other one, and into itself; the forms of each take turns."""
    start = LAYOUTS.index(layout)
    group = _GROUPS[start]
    return [(group[index % len(group)], other[start % len(other)]) for index, other in enumerate(_GROUPS)]


def make(name: str, seed: int = 1) -> nn.Module:
    """A norm of one form, float64, evaluation mode, with random state."""
    return randomize(FORMS[name]().double(), seed).eval()


@torch.no_grad()
def call(norm: nn.Module, features: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Outputs for three named features, which are the levels or the domains of those norms that have any."""
    features = features or make_features()
    if isinstance(norm, LevelBatchNorm2d):
        with use_domain(PAIRED[0]):
            return norm(features)
    outputs = {}
    for name, feature in features.items():
        with use_domain(name):
            outputs[name] = norm(feature)
    return outputs

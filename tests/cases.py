"""Every norm that bnext can describe, as one table. A new layer or answer is a new row here.

A case says how a norm is built and called; `Case.call` takes and gives named tensors, whether the norm
sees one feature map or several levels, so that one battery serves both.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bnext.layers import TABLE5_ROWS, BatchNorm2d, LevelBatchNorm2d, NormSpec
from bnext.scope import use_domain

__all__ = [
    "CASES",
    "DOMAINS",
    "LEVELS",
    "NUM_CHANNELS",
    "ROWS",
    "SPECS",
    "Case",
    "make_features",
    "make_norm",
    "pick_cases",
    "randomize",
]

LEVELS = ("p3", "p4", "p5")
DOMAINS = ("day", "night", "fog")
NUM_CHANNELS = 4
SIZES = ((2, 6, 5), (2, 3, 3), (2, 2, 1))  # N, H, W of each level
SIZE = (5, 4, 3)  # of a single feature map
MIXED = ("night", "day", "night", "night", "day")  # of its samples; none is of the third domain
ROWS = tuple(TABLE5_ROWS)


def make_features(
    seed: int = 0,
    sizes: tuple[tuple[int, int, int], ...] = SIZES,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = False,
    names: tuple[str, ...] = LEVELS,
) -> dict[str, Tensor]:
    """Features by name; every one and every channel has a mean and a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    features = {}
    for index, (level, (n, h, w)) in enumerate(zip(names, sizes, strict=True)):
        feature = torch.randn(n, NUM_CHANNELS, h, w, generator=generator, dtype=torch.float64)
        scale = torch.rand(NUM_CHANNELS, 1, 1, generator=generator, dtype=torch.float64) + 0.5 * (index + 1)
        shift = torch.randn(NUM_CHANNELS, 1, 1, generator=generator, dtype=torch.float64) * 2 + index
        features[level] = (feature * scale + shift).to(dtype).requires_grad_(requires_grad)
    return features


def randomize(module: nn.Module, seed: int = 1) -> nn.Module:
    """Give affine and running statistics values that no default could stand in for."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if name.endswith("num_batches_tracked"):
                value.fill_(7)
            else:
                random = torch.rand(value.shape, generator=generator, dtype=torch.float64)
                value.copy_(random + 0.5 if name.endswith(("weight", "running_var")) else random - 0.5)
    return module


def make_norm(spec: NormSpec, dtype: torch.dtype = torch.float64, seed: int = 1) -> LevelBatchNorm2d:
    """A norm of `spec` over LEVELS with random state."""
    norm = LevelBatchNorm2d(NUM_CHANNELS, LEVELS, spec).to(dtype)
    randomize(norm, seed)
    return norm


@dataclasses.dataclass(frozen=True)
class Case:
    """A spec, the levels that the norm sees (none: one feature map), and the domain(s) of the samples."""

    spec: NormSpec
    levels: tuple[str, ...] = ()
    active: str | tuple[str, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return self.levels or ("x",)

    @property
    def is_normalized_by_population(self) -> bool:
        """In training, wholly or in part."""
        return self.spec.training != "mini_batch" or self.spec.has_frozen_statistics

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 1) -> BatchNorm2d:
        """A norm with random state."""
        if self.levels:
            return make_norm(self.spec, dtype, seed)
        norm = BatchNorm2d(NUM_CHANNELS, self.spec).to(dtype)
        randomize(norm, seed)
        return norm

    def inputs(
        self, seed: int = 0, dtype: torch.dtype = torch.float64, requires_grad: bool = False
    ) -> dict[str, Tensor]:
        sizes = SIZES if self.levels else (SIZE,)
        return make_features(seed, sizes, dtype, requires_grad, self.names)

    def call(self, norm: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by the names of the inputs."""
        if self.levels:
            return norm(inputs)
        with self.scope(len(inputs["x"])):
            return {"x": norm(inputs["x"])}

    @contextlib.contextmanager
    def scope(self, num_samples: int) -> Iterator[None]:
        if self.active is None:
            yield
            return
        with use_domain(self.active if num_samples or isinstance(self.active, str) else self.active[0]):
            yield

    def domains_of(self, inputs: dict[str, Tensor]) -> list[str]:
        """The level or domain of each sample, feature after feature; "" where the norm has none."""
        if self.levels:
            return [level for level in self.levels for _ in range(len(inputs[level]))]
        if isinstance(self.active, tuple):
            return list(self.active)
        known = self.active if self.active in self.spec.domains else self.spec.fallback_domain
        return [known or ""] * len(inputs["x"])

    def mini_batches_of(self, inputs: dict[str, Tensor], training: bool = True) -> list[object]:
        """Which mini-batch each sample belongs to."""
        own = self.domains_of(inputs)
        owners = [domain if self.spec.statistics != "shared" else "all" for domain in own]
        size = self.spec.normalization_batch_size
        if not training or size is None:
            return list(owners)
        keys: list[object] = []
        start = 0
        for name in self.names:  # groups are cut within a feature; the g-th groups of levels may be one mini-batch
            part = owners[start : start + len(inputs[name])]
            start += len(part)
            for index, owner in enumerate(part):
                total, rank = part.count(owner), part[:index].count(owner)
                num_groups = (total + size - 1) // size
                group = next(g for g in range(num_groups) if rank * num_groups < (g + 1) * total)
                keys.append((owner, group))
        return keys

    def moving_buffers(self, norm: BatchNorm2d) -> set[str]:
        """Names of the buffers that a call in training changes."""
        if self.spec.has_frozen_statistics or self.spec.population == "none":
            return set()
        present = set(self.domains_of(self.inputs()))
        owners = [norm.population_state(domain) for domain in present]
        return {
            f"{path}.{name}".lstrip(".")
            for path, module in norm.named_modules()
            if any(module is owner for owner in owners)
            for name, _ in module.named_buffers(recurse=False)
        }

    def used_parameters(self, norm: BatchNorm2d) -> list[nn.Parameter]:
        """Those that get a gradient."""
        if self.spec.affine == "none":
            return []
        states = {id(state): state for d in self.domains_of(self.inputs()) for state in [norm.affine_state(d)]}
        return [p for state in states.values() for p in (state.weight, state.bias) if p.requires_grad]


# The six rows, and the two combinations that the paper leaves out.
ANSWERS = {**{f"row{row}": cells for row, cells in TABLE5_ROWS.items()}}
ANSWERS["shared_batch_own_affine"] = ("shared", "shared", "per_level")
ANSWERS["shared_batch_own_rest"] = ("shared", "per_level", "per_level")


def _row(name: str, **changes: object) -> NormSpec:
    statistics, population, affine = ANSWERS[name]
    return NormSpec(statistics=statistics, population=population, affine=affine).replace(**changes)


_LEVEL_ROWS = {f"{name}-{workers}": _row(name, workers=workers) for name in ANSWERS for workers in ("one", "all")}
SPECS = [pytest.param(spec, id=name) for name, spec in _LEVEL_ROWS.items()]

_NO_POPULATION: dict[str, object] = {"population": "none", "inference": "mini_batch"}
# Changes of a spec that are tried on one feature map, on domains and on levels.
_ANY: dict[str, dict[str, object]] = {
    "ghost1": {"normalization_batch_size": 1},
    "ghost2": {"normalization_batch_size": 2},
    "train_by_population": {"training": "population"},
    "renorm": {"training": "renorm"},
    "cumulative": {"average": "cumulative"},
    "infer_by_batch": {"inference": "mini_batch"},
    "frozen_statistics": {"frozen": "statistics"},
    "frozen_both": {"frozen": "both"},
    "ghost2_renorm": {"normalization_batch_size": 2, "training": "renorm"},
    "ghost2_cumulative": {"normalization_batch_size": 2, "average": "cumulative"},
    "renorm_cumulative": {"training": "renorm", "average": "cumulative"},
}
_PLAIN: dict[str, dict[str, object]] = {
    "plain": {},
    "ghost3": {"normalization_batch_size": 3},
    "ghost4": {"normalization_batch_size": 4},
    "ghost9": {"normalization_batch_size": 9},
    "workers_node": {"workers": "node"},
    "workers_1": {"workers": 1},
    "workers_2": {"workers": 2},
    "workers_all": {"workers": "all"},
    "renorm_narrow": {"training": "renorm", "r_max": 1.2, "d_max": 0.1},
    "no_population": _NO_POPULATION,
    "no_population_ghost2": {**_NO_POPULATION, "normalization_batch_size": 2},
    "no_affine": {"affine": "none"},
    "no_affine_ghost2": {"affine": "none", "normalization_batch_size": 2},
    "frozen_affine": {"frozen": "affine"},
    "frozen_statistics_by_population": {"frozen": "statistics", "training": "population"},
    "single_element_by_population": {"single_element": "population"},
    "renorm_all": {"training": "renorm", "workers": "all"},
    "cumulative_infer_by_batch": {"average": "cumulative", "inference": "mini_batch"},
    **_ANY,
}


def _domain_spec(statistics: str, population: str, affine: str, **changes: object) -> NormSpec:
    return NormSpec(statistics=statistics, population=population, affine=affine, domains=DOMAINS, **changes)


def _list_domain_specs() -> dict[str, NormSpec]:
    sharing = ("shared", "per_domain")
    letters = {"shared": "S", "per_domain": "D", "none": "N"}
    combinations = [c for c in itertools.product(sharing, sharing, sharing) if "per_domain" in c]
    combinations.append(("per_domain", "per_domain", "none"))
    specs = {"".join(letters[cell] for cell in cells): _domain_spec(*cells) for cells in combinations}
    specs["DNS"] = _domain_spec("per_domain", "none", "shared", inference="mini_batch")
    specs["DDD_all"] = specs["DDD"].replace(workers="all")
    for name, changes in _ANY.items():
        specs[f"DDD_{name}"] = specs["DDD"].replace(**changes)
    for name in ("ghost2", "renorm", "cumulative", "train_by_population", "infer_by_batch"):
        specs[f"SDS_{name}"] = specs["SDS"].replace(**_ANY[name])
    specs["DSD_renorm"] = specs["DSD"].replace(training="renorm")
    return specs


def _list_cases() -> dict[str, Case]:
    cases = {name: Case(NormSpec(**changes)) for name, changes in _PLAIN.items()}
    for name, spec in _list_domain_specs().items():
        cases[f"domains_{name}-mixed"] = Case(spec, active=MIXED)
        if name.partition("_")[2] in ("", "all", "ghost2", "renorm", "frozen_both"):
            cases[f"domains_{name}-one"] = Case(spec, active="night")
    fallback = _domain_spec("per_domain", "per_domain", "per_domain", fallback_domain="fog")
    cases["domains_fallback"] = Case(fallback, active="rain")
    cases["domains_fallback_none_active"] = Case(fallback)
    for name, spec in _LEVEL_ROWS.items():
        cases[f"levels_{name}"] = Case(spec, LEVELS)
    for row, (name, changes) in itertools.product(("row1", "row6"), _ANY.items()):
        cases[f"levels_{row}_{name}"] = Case(_row(row, **changes), LEVELS)
    for name in ("renorm", "train_by_population", "ghost1"):
        cases[f"levels_row2_{name}"] = Case(_row("row2", **_ANY[name]), LEVELS)
    cases["levels_row1_no_affine"] = Case(_row("row1", affine="none"), LEVELS)
    cases["levels_row6_no_affine"] = Case(_row("row6", affine="none"), LEVELS)
    cases["levels_row5_no_population"] = Case(_row("row5", **_NO_POPULATION), LEVELS)
    return cases


_ALL = _list_cases()
CASES = [pytest.param(case, id=name) for name, case in _ALL.items()]


def pick_cases(*names: str) -> list[object]:
    """Some rows of the table, for tests that are too slow for all."""
    return [pytest.param(_ALL[name], id=name) for name in names]

"""Every norm that bnext can describe, as one table. A new layer or answer is a new row here.

A case says how a norm is built and called; `Case.call` takes and gives named tensors, whether the norm
sees one feature map or several levels, so that one battery serves both.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from bnext.layers import TABLE5_ROWS, BatchNorm2d, LevelBatchNorm2d, NormSpec
from bnext.scope import use_domain

__all__ = [
    "ANSWERS",
    "CASES",
    "DOMAINS",
    "LEVELS",
    "NUM_CHANNELS",
    "ROWS",
    "SPECS",
    "Case",
    "find_owner",
    "list_answers",
    "make_case",
    "make_features",
    "make_norm",
    "make_pairs",
    "pick_cases",
    "randomize",
]

LEVELS = ("p3", "p4", "p5")
DOMAINS = ("day", "night", "fog")
NUM_CHANNELS = 4
SIZES = ((2, 6, 5), (2, 3, 3), (2, 2, 1))  # N, H, W of each level
SIZE = (5, 4, 3)  # of a single feature map
MIXED = ("night", "day", "night", "night", "day")  # of its samples; none is of the third domain
PAIRED = ("night", "day")  # of the samples of every level
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


def join(level: str, domain: str) -> str:
    """The name of a level, a domain, or a pair."""
    return f"{domain}_{level}" if level and domain else domain or level


def find_owner(answer: str, level: str, domain: str, groups: Sequence[Sequence[str]] = ()) -> str:
    """The name of what owns something of a source by an answer; levels may go together in groups."""
    for group in groups:
        level = "-".join(group) if level in group else level
    return join(level if "level" in answer else "", domain if "domain" in answer else "")


@dataclasses.dataclass(frozen=True)
class Case:
    """A spec, the levels that the norm sees (none: one feature map), and the domain(s) of the samples of each."""

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
        with self.scope(max(map(len, inputs.values()))):
            return norm(inputs) if self.levels else {"x": norm(inputs["x"])}

    @contextlib.contextmanager
    def scope(self, num_samples: int) -> Iterator[None]:
        if self.active is None:
            yield
            return
        with use_domain(self.active if num_samples or isinstance(self.active, str) else self.active[0]):
            yield

    def sources_of(self, inputs: dict[str, Tensor]) -> list[tuple[str, str]]:
        """The level and the domain of each sample, feature after feature; "" where the norm has none."""
        sources = []
        for name in self.names:
            level, number = name if self.levels else "", len(inputs[name])
            active = self.active if self.active in self.spec.domains else self.spec.fallback_domain or ""
            domains = self.active if isinstance(self.active, tuple) and number else (active,) * number
            sources += [(level, domain) for domain in domains]
        return sources

    def domains_of(self, inputs: dict[str, Tensor]) -> list[str]:
        """The name of the source of each sample, as `night_p3`."""
        return [join(*source) for source in self.sources_of(inputs)]

    def owners_of(self, answer: str) -> list[str]:
        """Names of what owns something by an answer; "" is the norm itself."""
        levels, domains = self.levels or ("",), self.spec.domains or ("",)
        sources = [(level, domain) for domain in domains for level in levels]
        groups = self.spec.level_groups
        return (
            list(dict.fromkeys(find_owner(answer, *source, groups) for source in sources)) if answer != "none" else []
        )

    def mini_batches_of(self, inputs: dict[str, Tensor], training: bool = True) -> list[object]:
        """Which mini-batch each sample belongs to."""
        groups = self.spec.level_groups
        owners = [find_owner(self.spec.statistics, *source, groups) for source in self.sources_of(inputs)]
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


# Answers in which norms differ, and where their samples come from: a feature map without domains, of one domain, of
# several, or several levels. "own" is per_domain or per_level. Specs that differ in `workers` alone are the same code
# on one process.
ANSWERS: dict[str, tuple[object, ...]] = {
    "sources": ("none", "one", "mixed", "levels"),
    "statistics": ("shared", "own"),
    "population": ("shared", "own", "none"),
    "affine": ("shared", "own", "none"),
    "normalization_batch_size": (None, 1, 2),
    "training": ("mini_batch", "population", "renorm"),
    "average": ("moving", "cumulative"),
    "inference": ("population", "mini_batch"),
    "frozen": ("none", "statistics", "affine", "both"),
    "single_element": ("error", "population"),
}
PLAIN = {name: values[0] for name, values in ANSWERS.items()}
OWN = dict.fromkeys(("statistics", "population", "affine"), "own")


def make_case(answers: Mapping[str, object]) -> Case:
    """The case of some answers; the others are torch's.

    Raises:
        ConfigError: they contradict one another.
    """
    answers = {**PLAIN, **answers}
    sources = answers.pop("sources")
    owner = "per_level" if sources == "levels" else "per_domain"
    fields = {name: owner if value == "own" else value for name, value in answers.items()}
    domains = DOMAINS if sources in ("one", "mixed") else ()
    active = {"one": "night", "mixed": MIXED}.get(sources)
    return Case(NormSpec(**fields, domains=domains), LEVELS if sources == "levels" else (), active)


def _make_row(row: int) -> dict[str, object]:
    """One of the paper's six."""
    cells = ("own" if cell == "per_level" else cell for cell in TABLE5_ROWS[row])
    return {"sources": "levels", **dict(zip(OWN, cells, strict=True))}


_NAMED: dict[str, dict[str, object]] = {
    "plain": {},
    "ghost2": {"normalization_batch_size": 2},
    "renorm": {"training": "renorm"},
    "train_by_population": {"training": "population"},
    "frozen_statistics": {"frozen": "statistics"},
    "no_affine": {"affine": "none"},
    "domains-one": {"sources": "one", **OWN},
    "domains-mixed": {"sources": "mixed", **OWN},
    **{f"levels-row{row}": _make_row(row) for row in ROWS},
}
# With those above, every two answers that go together are in some row: test_cases.py counts them.
_PAIRS: list[tuple[object, ...]] = [
    ("one", "own", "own", "none", 1, "renorm", "cumulative", "mini_batch", "statistics", "population"),
    ("mixed", "shared", "none", "own", 1, "mini_batch", "cumulative", "mini_batch", "affine", "error"),
    ("mixed", "own", "shared", "shared", None, "population", "cumulative", "mini_batch", "both", "population"),
    ("levels", "shared", "own", "own", 2, "renorm", "moving", "mini_batch", "both", "population"),
    ("one", "own", "shared", "shared", 1, "mini_batch", "moving", "population", "affine", "population"),
    ("levels", "own", "none", "none", 2, "mini_batch", "cumulative", "mini_batch", "none", "error"),
    ("none", "shared", "shared", "shared", 1, "mini_batch", "cumulative", "population", "both", "error"),
    ("none", "shared", "none", "shared", None, "mini_batch", "moving", "mini_batch", "affine", "error"),
    ("one", "shared", "own", "own", None, "population", "moving", "population", "statistics", "error"),
    ("mixed", "shared", "own", "shared", 2, "renorm", "moving", "population", "affine", "error"),
    ("none", "shared", "shared", "shared", 1, "mini_batch", "moving", "population", "none", "population"),
    ("mixed", "shared", "own", "none", None, "population", "moving", "population", "statistics", "error"),
    ("levels", "shared", "shared", "shared", None, "population", "moving", "population", "affine", "error"),
    ("one", "shared", "shared", "own", 2, "mini_batch", "moving", "population", "statistics", "error"),
    ("levels", "shared", "shared", "shared", 1, "mini_batch", "moving", "population", "statistics", "error"),
    ("one", "shared", "shared", "own", None, "mini_batch", "moving", "population", "both", "error"),
    ("one", "shared", "none", "own", None, "mini_batch", "moving", "mini_batch", "none", "error"),
]


def make_pairs(
    statistics: str, population: str, affine: str, active: str | tuple[str, ...] = PAIRED, **changes: object
) -> Case:
    """Levels whose samples are of several domains, by three answers."""
    answers = {"statistics": statistics, "population": population, "affine": affine}
    return Case(NormSpec(domains=DOMAINS, **answers, **changes), LEVELS, active)


_BOTH = "per_level_and_domain"
_PAIRED = {
    "pairs": make_pairs(_BOTH, _BOTH, _BOTH),
    "pairs-one": make_pairs(_BOTH, "per_domain", "per_level", "night"),
    "pairs-renorm": make_pairs("per_domain", _BOTH, "per_level", training="renorm"),
    "pairs-1": make_pairs("per_level", "per_domain", _BOTH, normalization_batch_size=1, average="cumulative"),
}
_GROUPED = {
    "groups": Case(NormSpec(**dict.fromkeys(OWN, "per_level"), level_groups=(("p3", "p4"), ("p5",))), LEVELS),
    "groups-pairs": make_pairs(_BOTH, _BOTH, "per_level", level_groups=(("p3", "p5"),)),
}


def _list_cases() -> dict[str, Case]:
    cases = {name: make_case(answers) for name, answers in _NAMED.items()}
    for values in _PAIRS:
        answers = dict(zip(ANSWERS, values, strict=True))
        changed = [f"{value}" for name, value in answers.items() if value != PLAIN[name]]
        cases["-".join(changed)] = make_case(answers)
    return cases | _PAIRED | _GROUPED


_ALL = _list_cases()
CASES = [pytest.param(case, id=name) for name, case in _ALL.items()]
SPECS = [pytest.param(NormSpec.from_table5_row(row), id=f"row{row}") for row in ROWS]
# The two combinations that the paper leaves out.
SPECS += [
    pytest.param(NormSpec(affine="per_level"), id="shared_batch_own_affine"),
    pytest.param(NormSpec(population="per_level", affine="per_level"), id="shared_batch_own_rest"),
]


def list_answers() -> list[dict[str, object]]:
    """Answers of every case."""
    rows = [dict(zip(ANSWERS, values, strict=True)) for values in _PAIRS]
    return [{**PLAIN, **answers} for answers in _NAMED.values()] + rows


def pick_cases(*names: str) -> list[object]:
    """Some rows of the table, for tests that are too slow for all."""
    return [pytest.param(_ALL[name], id=name) for name in names]

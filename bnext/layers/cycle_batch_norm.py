"""The norm of a head that applies it to one level after the other, as most detectors' heads do.

`CycleBatchNormList` has the name and the state of detectron2's class. That one goes through its norms in a circle,
call by call, for ever: a level that is skipped, or a forward that fails half-way, shifts all levels of all forwards to
come, and nobody is told. Here the level is named by the caller, or is the number of the call within one forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnext.dispatch import is_exported, is_ordinary, is_traced
from bnext.errors import ConfigError, Refusal, StatisticsError
from bnext.layers.level_norm import LevelBatchNorm2d
from bnext.layers.ownership import Sources
from bnext.layers.sources import is_per_level
from bnext.layers.spec import NormSpec
from bnext.layers.together import Together
from bnext.scope.call import NormCall, read_call
from bnext.scope.forward import ForwardCalls, Size
from bnext.scope.record import get_record

__all__ = ["CycleBatchNormList", "SizeRatios", "write_sizes"]

OUTSIDE = Refusal(
    StatisticsError,
    "a norm that counts its levels",
    "be called within a forward of its model",
    "Name what is called from outside, a method or a module: bnext.count_levels(model, entry='inference'), or entry= "
    "of bnext.repair; or name each level: with bnext.use_level('{level}').",
)
OTHER_CALLS = Refusal(
    StatisticsError,
    "a head's norm",
    "be called once for each of its {number} levels {levels} in a forward",
    "Let the head go through all levels, empty ones too, in one order; or let it name them: with "
    "bnext.use_level('{level}'). {state}",
)
OTHER_SIZE = Refusal(
    StatisticsError,
    "features of a head",
    "come in the order of the levels {levels}, as in the first forwards",
    "Let the head go through all levels in one order; or let it name them: with bnext.use_level('{level}'). {state}",
)
UNKNOWN_LEVEL = Refusal(
    StatisticsError, "use_level", "name one of the levels {levels}", "Name the levels when the norm is built."
)
NO_LENGTH = Refusal(
    ConfigError,
    "length",
    "be the number of the levels, 1 or more, and that of their names",
    "Write CycleBatchNormList(5, num_features=256), or levels=('p3', 'p4').",
)
SHARED_STATISTICS = Refusal(
    ConfigError,
    "spec",
    "have statistics='per_level' or 'per_level_and_domain' in a norm that gets one level after the other",
    "Use it, or a head that gets all levels in one call, with LevelBatchNorm2d.",
)
NO_CLASS = Refusal(
    ConfigError,
    "bn_class",
    "be nn.BatchNorm2d or nn.SyncBatchNorm, whose statistics are of one or of all workers",
    "Choose one of them; other answers are in spec=NormSpec(statistics='per_level', population='per_level', ...).",
)

_WATCHED = 3  # forwards that say what sizes to expect
_WORKERS = {nn.BatchNorm2d: "one", nn.SyncBatchNorm: "all"}


class SizeRatios:
    """The sizes of the levels relative to the first one, as the first forwards showed them; images may differ.

    Of a level and the first, one is the finer. Their strides differ by a factor s, so that the sizes of the coarser are
    those of the finer divided by s, up or down to the next whole number: each forward says between which bounds s is.
    Which is the finer is open while their sizes are equal.

    Attributes:
        number: of forwards that were taken in.
    """

    def __init__(self) -> None:
        self.number = 0
        # (call, dimension, whether the level is finer than the first) -> least and largest s; None: it is not
        self._bounds: dict[tuple[int, int, bool], tuple[float, float] | None] = {}

    def fits(self, index: int, first: Size, size: Size) -> bool:
        """Whether features of a call can be of the level that this call had so far.

        Args:
            index: of the call in its forward.
            first, size: [H, W] of the first call and of this one.
        """
        for dimension, (length, whole) in enumerate(zip(size, first, strict=True)):
            is_coarser = self._fits_one((index, dimension, False), whole, length)
            if not is_coarser and not self._fits_one((index, dimension, True), length, whole):
                return False
        return True

    def _fits_one(self, key: tuple[int, int, bool], fine: int, coarse: int) -> bool:
        bounds = self._bounds.get(key, (0.0, float("inf")))
        if bounds is None or coarse > fine + 1:
            return False
        low, high = bounds
        return fine / high - 1 <= coarse and (not low or coarse <= fine / low + 1)

    def take_in(self, sizes: Sequence[Size]) -> None:
        """Learn from a forward whose calls all fit, [H, W] of each."""
        self.number += 1
        for index, size in enumerate(sizes):
            for dimension, (length, whole) in enumerate(zip(size, sizes[0], strict=True)):
                self._learn((index, dimension, False), whole, length)
                self._learn((index, dimension, True), length, whole)

    def _learn(self, key: tuple[int, int, bool], fine: int, coarse: int) -> None:
        bounds = self._bounds.get(key, (0.0, float("inf")))
        if bounds is None or not self._fits_one(key, fine, coarse):
            self._bounds[key] = None
            return
        low, high = bounds
        high = min(high, fine / (coarse - 1)) if coarse > 1 else high
        self._bounds[key] = (max(low, fine / (coarse + 1)), high)


class CycleBatchNormList(LevelBatchNorm2d):
    """Batch norms of several levels that come one after the other, each with statistics of its own; one affine.

        y_l = weight * ((x_l - mean_l) / sqrt(var_l + eps)) + bias,   l the number of the call in its forward

    Takes the arguments of detectron2's class of this name, loads its state and saves what loads into it. It keeps no
    counter: calls are counted within one forward of the model that `bnext.count_levels` (or `bnext.repair`) was told
    of, and compared at its end with what the first forwards showed, number and relative sizes. In
    `bnext.use_level("p3")` the level is named, and nothing is counted. A mapping of levels is taken as
    `LevelBatchNorm2d` does.

    Args:
        length: number of levels; None: that of `levels`.
        bn_class: torch's BatchNorm2d or SyncBatchNorm: statistics of one worker, or of all.
        num_features: channels C.
        levels: their names, in the order of the calls; None: "0", "1", ..., as detectron2's.
        spec: other answers, with statistics per level; it replaces bn_class and the arguments that follow.
        affine, eps, momentum, track_running_stats, device, dtype: torch's.

    Raises:
        ConfigError: no levels, a number that is not that of their names, or a spec with shared statistics.

    Note:
        A forward with other calls raises a StatisticsError that names them, and leaves the running statistics of these
        norms as they were before it; in torch.compile they have moved.

    Example:
        >>> from bnext.scope.forward import count_levels
        >>> class Head(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.norm = CycleBatchNormList(2, num_features=4)
        ...     def forward(self, features):
        ...         return [self.norm(feature) for feature in features]
        >>> head = Head()
        >>> handle = count_levels(head)
        >>> outputs = head([torch.randn(2, 4, 8, 8), torch.randn(2, 4, 4, 4)])
        >>> [int(head.norm.population_state(level).num_batches_tracked) for level in "01"]
        [1, 1]

    Source:
        Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021, section 5.2; detectron2's class of this name.
    """

    counts_calls = True

    def __init__(
        self,
        length: int | None = None,
        bn_class: type[nn.Module] = nn.BatchNorm2d,
        *,
        num_features: int,
        levels: Sequence[str] | None = None,
        spec: NormSpec | None = None,
        affine: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        number = length if levels is None else len(levels)
        is_number = isinstance(number, int) and not isinstance(number, bool) and number >= 1
        if not is_number or length not in (None, number):
            names = "" if levels is None else f" for the levels {tuple(levels)}"
            raise NO_LENGTH.of(f"{length!r}{names}", type(self).__name__)
        if bn_class not in _WORKERS:
            raise NO_CLASS.of(repr(bn_class), type(self).__name__)

        if spec is None:
            average: dict[str, Any] = {"average": "cumulative"} if momentum is None else {"momentum": momentum}
            population: dict[str, Any] = {"population": "per_level"} if track_running_stats else {"population": "none"}
            spec = NormSpec(
                statistics="per_level",
                workers=_WORKERS[bn_class],  # type: ignore[arg-type]
                affine="shared" if affine else "none",
                inference="population" if track_running_stats else "mini_batch",
                eps=eps,
                **average,
                **population,
            )
        if isinstance(spec, NormSpec) and not is_per_level(spec.statistics):
            raise SHARED_STATISTICS.of(f"statistics={spec.statistics!r}", type(self).__name__)

        if levels is None:
            levels = tuple(str(index) for index in range(number or 0))
        super().__init__(num_features, levels, spec, device=device, dtype=dtype)
        self.ratios = SizeRatios()

    def forward(self, input: Tensor | Mapping[str, Tensor], together: Together | None = None) -> Any:
        """Normalize the features of the level that comes next, [N, C, H, W]; or of several by name, see above.

        Args:
            input: of one level, or of several.
            together: see `LevelBatchNorm2d.forward`; for several levels.

        Raises:
            StatisticsError: the call is in no forward and of no named level; it is one too many; its size is not that
                of its level; an unknown level; and what `BatchNorm2d` raises.
        """
        if isinstance(input, Mapping):
            return super().forward(input, together)

        self.check_feature(input)
        calls = self._find_calls()
        level = self._find_level()
        if calls is not None:
            calls.add(self, input)
            self._check_call(calls)

        call = read_call(self, self._spec, self.where, level)
        if call.level is None:
            raise OUTSIDE.of("a call outside of one", self.where, level=self.levels[0])

        sources = self.find_sources(call.level, call.domain, input.shape[0], call.spec)
        if call.level == self.levels[0]:  # the same images at every level
            self.count_domains(call, input.shape[0])
        if calls is not None:
            self._keep(calls, sources, call)
        return self.normalize_features([input], [sources], call)[0]

    def list_features(
        self,
        given: Tensor | Mapping[str, Tensor],
        active: str | tuple[str, ...] | None,
        spec: NormSpec | None = None,
    ) -> tuple[list[Tensor], list[Sources]]:
        """The feature of the call that comes next, or those of several levels; see `BatchNorm2d.list_features`."""
        if isinstance(given, Mapping):
            return super().list_features(given, active, spec)

        level = self._find_level()
        if level is None:
            raise OUTSIDE.of("a call outside of one", self.where, level=self.levels[0])
        return [given], [self.find_sources(level, active, given.shape[0], spec)]

    def _keep(self, calls: ForwardCalls, sources: Sources, call: NormCall) -> None:
        """Remember the running statistics that a call moves."""
        indices = {sources} if isinstance(sources, int) else set(sources)
        names = self.name_sources([sources])
        moving = [names[index] for index in sorted(indices) if self.is_moving(names[index], call)]

        if moving and not is_ordinary():
            calls.is_kept = False
            return
        for source in moving:
            calls.keep(self.population_state(source))

    # ---- which level

    def _find_calls(self) -> ForwardCalls | None:
        """The calls of the forward that runs; None: levels are named, or it runs in no forward."""
        record = get_record()
        return record.calls.get(self) if record.level is None else None

    def _find_level(self) -> str | None:
        """The level of the call that comes next; None: it is not known."""
        record = get_record()
        if record.level is not None:
            if record.level not in self.levels:
                raise UNKNOWN_LEVEL.of(repr(record.level), self.where, levels=self.levels)
            return record.level

        calls = record.calls.get(self)
        if calls is None:
            return None
        number = len(calls.sizes.get(self, ()))
        if number >= len(self.levels):
            calls.put_back()
            raise self._refuse_number(
                f"call {number + 1}, with features of {write_sizes(calls.sizes[self])} before", calls
            )
        return self.levels[number]

    def _check_call(self, calls: ForwardCalls) -> None:
        """Refuse features whose size is that of another level, before anything is normalized by it."""
        sizes = calls.sizes[self]
        index, first, size = len(sizes) - 1, sizes[0], sizes[-1]
        is_compiled = is_traced() and not is_exported()
        if not (is_ordinary() or is_compiled) or self.ratios.fits(index, first, size):
            return

        calls.put_back()
        got = f"{write_sizes([size])} for {self.levels[index]}, after {write_sizes([first])} for {self.levels[0]}"
        words = {"levels": self.levels, "level": self.levels[0], "state": _describe_state(calls)}
        raise OTHER_SIZE.of(got, self.where, **words)

    def check_calls(self, calls: ForwardCalls) -> None:
        """Refuse a forward that has ended and has not called every level; one without any call did not see them.

        Raises:
            StatisticsError: there were fewer calls.
        """
        sizes = calls.sizes.get(self, [])
        if not sizes:
            return
        if len(sizes) < len(self.levels):
            calls.put_back()
            raise self._refuse_number(f"{len(sizes)} with features of {write_sizes(sizes)}", calls)
        if self.ratios.number < _WATCHED and is_ordinary():
            self.ratios.take_in(sizes)

    def _refuse_number(self, got: str, calls: ForwardCalls) -> Exception:
        words = {"number": len(self.levels), "levels": self.levels, "level": self.levels[0]}
        words["state"] = _describe_state(calls)
        return OTHER_CALLS.of(got, self.where, **words)


def _describe_state(calls: ForwardCalls) -> str:
    if calls.is_kept:
        return "Running statistics are as they were before this forward."
    return "Running statistics have moved, as the forward was compiled: load or estimate them anew."


def write_sizes(sizes: Sequence[Size]) -> str:
    return ", ".join(" x ".join(str(length) for length in size) for size in sizes)

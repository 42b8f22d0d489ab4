"""One pass over the data: batch by batch through the model, in lock-step with the other workers."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnext.distributed import LockStep, count_images
from bnext.errors import StatisticsError
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.shuffled import shares_work
from bnext.scope.domain import find_domains_of_batch, naming_domains, use_domain
from bnext.scope.model import drawing_from, setting
from bnext.scope.statistics import answering
from bnext.seeding import derive_seed
from bnext.statistics.collector import Collector
from bnext.statistics.observe import Features, watching

__all__ = ["DataPass", "Domain", "Forward", "collecting", "note_dependence"]

Forward = Callable[[nn.Module, Any], object]
Domain = str | Callable[[Any], str | Sequence[str]]
_WHERE = "recompute_population_statistics"


@dataclasses.dataclass(kw_only=True)
class DataPass:
    """Runs a model on data, as often as is asked.

    Args:
        model: its modes are as they are to be.
        device: for the numbers that workers exchange.
        data, forward, domain, num_batches, num_samples, seed: see `recompute_population_statistics`.
    """

    model: nn.Module
    device: torch.device
    data: Iterable[Any]
    forward: Forward | None
    domain: Domain | None
    num_batches: int | None
    num_samples: int | None
    seed: int | None = None
    _collectors: Sequence[Collector] = ()  # of this pass
    _images: dict[str, int] = dataclasses.field(default_factory=dict)  # domain -> images of the last batch; "": unknown

    def go(
        self,
        collectors: Sequence[Collector],
        *,
        call: Callable[[Any], object] | None = None,
        is_enough: Callable[[LockStep], bool] = lambda rounds: False,
    ) -> LockStep:
        """Go through the data once.

        Args:
            collectors: what the batches may fill; their batches end with those of the data.
            call: runs a batch; None: `run`.
            is_enough: called after each round; if it is true, the pass ends.

        Returns:
            The rounds that were gone through.

        Raises:
            StatisticsError: a worker has failed; on itself, its own error.
        """
        self._collectors = collectors
        rounds = LockStep(
            self.data,
            self.device,
            _WHERE,
            shares_work=shares_work(self.model),
            max_rounds=self.num_batches,
            enough_images=self.num_samples,
        )

        for batch, is_new in rounds:
            if is_new:
                with self._drawing(rounds.num_rounds):
                    rounds.run(partial(call or self.run, batch))
                for collector in collectors:
                    collector.end_batch(self._images)
            if is_enough(rounds):
                break
        return rounds

    def _drawing(self, number: int) -> contextlib.AbstractContextManager[None]:
        """Random numbers of a batch, such as those for the RoIs of an R-CNN: the same in every pass."""
        if self.seed is None:
            return contextlib.nullcontext()
        return drawing_from(self.model, derive_seed(self.seed, number))

    def run(self, batch: Any) -> None:
        """Run a batch through the model, in its domain: the one that is given, or those that its records say."""
        domain = self.domain(batch) if callable(self.domain) else self.domain
        scope = naming_domains(batch) if domain is None else use_domain(domain)
        if domain is None:
            domain = find_domains_of_batch(batch)
        is_one = domain is None or isinstance(domain, str)
        self._images = {str(domain or ""): count_images(batch)} if is_one else dict(collections.Counter(domain))

        with scope:
            if self.forward is not None:
                self.forward(self.model, batch)
                return
            try:
                self.model(batch)
            except (TypeError, AttributeError) as error:
                if any(collector.is_reached for collector in self._collectors):
                    raise  # the model has taken the batch
                raise explain_batch(batch, error, _WHERE) from error


def explain_batch(batch: Any, error: Exception, where: str) -> StatisticsError:
    """The refusal of a batch that a model does not take as it is.

    Args:
        batch: of any type.
        error: that model(batch) has raised.
        where: whose argument `forward` is.
    """
    return StatisticsError.of(
        "forward",
        "say how the model takes a batch, as model(batch) fails",
        got=f"a batch of type {type(batch).__name__} and {type(error).__name__}: {str(error).splitlines()[0]}",
        where=where,
        remedy="For (inputs, labels) use forward=lambda model, batch: model(batch[0]).",
    )


@contextlib.contextmanager
def collecting(
    norms: Mapping[str, _BatchNorm], collectors: Mapping[Any, Collector], *, training: bool = True
) -> Iterator[None]:
    """In this scope collectors, by state, get what reaches their norms, which must be in this mode."""

    def collect(path: str, norm: nn.Module, features: Features) -> None:
        if norm.training != training:
            got, remedy = f"training={norm.training}", "Do not call model.train() or model.eval() in it."
            raise StatisticsError.of("forward", "leave the mode of norms as it is", got=got, where=path, remedy=remedy)

        is_joint = not isinstance(norm, BatchNorm2d) or norm.spec.statistics == "shared"
        joint: dict[Collector, list[Tensor]] = {}
        for state, feature in features:
            collector = collectors[state]
            _check_has_variance(norm, feature, collector)
            if is_joint:
                joint.setdefault(collector, []).append(feature)
            else:
                collector.add([feature])

        for collector, mini_batch in joint.items():
            collector.add(mini_batch)

    with watching(norms, collect):
        yield


def note_dependence(
    data_pass: DataPass,
    norms: Mapping[str, _BatchNorm],
    collectors: Mapping[Any, Collector],
    batch: Any,
    *,
    training: bool = True,
) -> None:
    """Let collectors, by state, know whether features of an image are others in another batch, or each time.

    Tried on this batch: they depend on it if they change where the norms, which are in this mode, apply their running
    statistics, or if norms that are not among these normalize by mini-batches. They are random if they change with
    other random numbers.
    """
    ours = [norm for norm in norms.values() if isinstance(norm, BatchNorm2d)]
    is_coupled = _has_other_mini_batches(data_pass.model, norms)

    def run(training: bool, seed: int) -> dict[Any, list[Tensor]]:
        sums: dict[Any, list[Tensor]] = {}

        def add(path: str, norm: nn.Module, features: Features) -> None:
            for state, feature in features:
                sums.setdefault(state, []).append(feature.double().sum())

        as_either = answering(ours, training="mini_batch", inference="population")
        drawing = drawing_from(data_pass.model, seed)
        with as_either, drawing, setting(norms.values(), training=training), watching(norms, add):
            data_pass.run(batch)
        return sums

    behind, again, apart = run(training, 0), run(training, 1), run(False, 0)
    for state, collector in collectors.items():
        sums = behind.get(state)
        collector.is_dependent = is_coupled or sums is None or not _are_equal(sums, apart.get(state, []))
        collector.is_random = sums is not None and not _are_equal(sums, again.get(state, []))


def _has_other_mini_batches(model: nn.Module, norms: Mapping[str, _BatchNorm]) -> bool:
    """Whether batch norms of the model that are not among these normalize by mini-batches in evaluation mode."""
    selected = set(norms.values())
    others = [norm for norm in model.modules() if isinstance(norm, _BatchNorm) and norm not in selected]
    return any(
        norm.spec.inference != "population" if isinstance(norm, BatchNorm2d) else norm.running_mean is None
        for norm in others
    )


def _are_equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def _check_has_variance(norm: nn.Module, feature: Tensor, collector: Collector) -> None:
    """Torch's norms refuse a single element without saying which of them; others know what to do with it."""
    is_single = feature.numel() == feature.shape[1] and len(feature) > 0
    if norm.training and is_single and type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        rule, where = "hold more than 1 element per channel", f"{collector.where}, batch {collector.num_batches + 1}"
        spec = "convert_norm(model, {'': NormSpec(single_element='population')})"
        remedy = f"Use larger batches (drop_last=True for the last one), or convert the norm with {spec}."
        raise StatisticsError.of("a mini-batch", rule, got="1", where=where, remedy=remedy)

"""Facts of a model that is run: on a few batches (depth "forward"), and in a pass over images (depth "full").

Whatever fails becomes a sentence of the facts; the rest stays known.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn

from bnext.diagnostics.collecting.batches import list_images, measure_images, take_one
from bnext.diagnostics.collecting.observe import observe_forward
from bnext.diagnostics.collecting.read_norms import read_norms
from bnext.diagnostics.facts import EvaluationFacts, Facts, ForwardFacts, Population, StandardErrors, TrainingFacts
from bnext.distributed import count_images, unwrap_model
from bnext.functional import Moments, merge_moments
from bnext.progress import track
from bnext.scope.model import restoring
from bnext.statistics import RecomputeReport
from bnext.statistics.data_pass import Domain, Forward, explain_batch
from bnext.statistics.mini_batch_inference import normalizing_evaluation_by_mini_batch
from bnext.statistics.observe import find_replaceable
from bnext.statistics.report import PopulationEstimate

__all__ = ["Statistics", "add_failure", "examine_population", "observe_batches", "observe_images"]

Statistics = Literal["population", "mini_batch"]
Ways = Mapping[Statistics, Forward | None]
_SEED = 0  # of what the model draws meanwhile
_REFUSED = "Expected more than 1 value per channel"  # of a mini-batch, by torch
_NUM_SINGLES = 2  # images that are also run alone, where a norm sees several samples of each


def add_failure(facts: Facts, words: str, error: Exception) -> Facts:
    """Facts that say what could not be found out.

    Args:
        words: the deed, as "A forward by mini-batch statistics".
        error: that it ended with.
    """
    reason = " ".join(str(error).split()) or "no message"
    failure = f"{words} failed: {type(error).__name__}: {reason}"
    return dataclasses.replace(facts, failures=(*facts.failures, failure))


# ---- a few batches


def observe_batches(
    facts: Facts,
    model: nn.Module,
    data: Iterable[Any],
    *,
    forward: Forward | None = None,
    forward_in_training: Forward | None = None,
    num_batches: int = 4,
    domain: Domain | None = None,
    progress: bool = False,
) -> Facts:
    """Facts with what a few batches show, each by population and by mini-batch statistics.

    Args:
        facts: of the model.
        model: as it was afterwards.
        data: batches as in training; no more are taken than are used.
        forward: called as forward(model, batch); None: model(batch).
        forward_in_training: likewise, by mini-batch statistics, if other samples reach norms in training.
        num_batches: at most.
        domain: of all images, or called as domain(batch) for that of a batch or of each image.
        progress: whether a bar is shown.

    Note:
        Where a norm sees several samples of an image (RoIs), two images are also run alone. The first failure ends it.
    """
    model = unwrap_model(model)
    norms: Mapping[str, nn.Module] = {norm.path: model.get_submodule(norm.path) for norm in facts.norms}
    ways: Ways = {"population": forward, "mini_batch": forward_in_training or forward}
    by_domain: dict[str, dict[str, list[Moments]]] = {}
    pictures: list[torch.Tensor] = []
    sizes: list[int] = []
    mixes: list[bool] = []

    batches = track(itertools.islice(data, num_batches), "running batches", num_batches, "batch", is_wanted=progress)
    while True:
        try:
            batch = next(batches)
        except StopIteration:
            break
        except Exception as error:
            facts = add_failure(facts, "Loading a batch", error)
            break

        sizes.append(count_images(batch))
        pictures += list_images(batch)
        name = domain(batch) if callable(domain) else domain
        facts, is_whole = _run_by_both(facts, model, batch, norms, ways, name)
        if not is_whole:
            break
        if name is not None:
            mixes.append(not isinstance(name, str) and len(set(name)) > 1)
            _divide_by_domain(by_domain, facts.forwards[-2], name)

    training = facts.training or TrainingFacts()
    if training.images_per_worker is None and sizes:
        training = dataclasses.replace(training, images_per_worker=max(sizes) or None)
    if callable(domain) and mixes:
        training = dataclasses.replace(training, mixes_domains=any(mixes))
    facts = _add_domains(dataclasses.replace(facts, training=training), by_domain)

    if not sizes and not facts.failures:
        facts = dataclasses.replace(facts, failures=("There was no batch in the data.",))
    if sizes:
        facts = _observe_alone(facts, model, batch, norms, ways["mini_batch"], name)
    return facts if "train" in facts.images else _add_images(facts, "train", pictures)


def _run_by_both(
    facts: Facts,
    model: nn.Module,
    batch: Any,
    norms: Mapping[str, nn.Module],
    ways: Ways,
    domain: str | Sequence[str] | None,
) -> tuple[Facts, bool]:
    """Facts with a forward by population statistics and one by those of the mini-batch; whether none has failed."""
    for kind, way in ways.items():
        options: dict[str, Any] = {"normalized_by": kind, "num_images": count_images(batch), "domain": domain}
        try:
            added = observe_forward(model, batch, norms, forward=way, **options)
        except Exception as error:
            cause = error
            if way is None and isinstance(error, (TypeError, AttributeError)):
                cause = explain_batch(batch, error, "diagnose")
            return add_failure(facts, f"A forward by {kind.replace('_', '-')} statistics", cause), False
        facts = dataclasses.replace(facts, forwards=(*facts.forwards, added))
    return facts, True


def _observe_alone(
    facts: Facts,
    model: nn.Module,
    batch: Any,
    norms: Mapping[str, nn.Module],
    forward: Forward | None,
    domain: str | Sequence[str] | None,
) -> Facts:
    """Facts with forwards of single images of a batch, as in training, where a norm sees several samples of each."""
    number = count_images(batch)
    last = facts.forwards[-1] if facts.forwards else None
    if number < 2 or last is None or not _sees_parts(last):
        return facts

    for index in range(min(number, _NUM_SINGLES)):
        one = take_one(batch, index)
        if one is None:
            break
        of_one = domain if domain is None or isinstance(domain, str) else domain[index]
        options: dict[str, Any] = {"normalized_by": "mini_batch", "num_images": 1, "domain": of_one}
        try:
            added = observe_forward(model, one, norms, forward=forward, **options)
        except Exception as error:
            if _REFUSED in str(error):
                break  # a norm of the images themselves, which no training gives a single one
            return add_failure(facts, "A forward of a single image by mini-batch statistics", error)
        added = dataclasses.replace(added, is_alone=True)
        facts = dataclasses.replace(facts, forwards=(*facts.forwards, added))
    return facts


def _sees_parts(forward: ForwardFacts) -> bool:
    """Whether a norm sees more samples than there are images."""
    sizes = [call.size[0] for calls in forward.calls.values() for call in calls]
    return bool(sizes) and max(sizes) > forward.num_images


# ---- domains


def _divide_by_domain(
    by_domain: dict[str, dict[str, list[Moments]]], forward: ForwardFacts, names: str | Sequence[str]
) -> None:
    """Note what norms got of each domain; of a mixed batch where they see as many samples as there are images."""
    for path, calls in forward.calls.items():
        for call in calls:
            number = call.size[0]
            of_samples = [names] * number if isinstance(names, str) else list(names)
            if len(of_samples) != number:
                continue
            for name in sorted(set(of_samples)):
                chosen = torch.tensor([each == name for each in of_samples], dtype=torch.bool)
                part = Moments(*(field[chosen] for field in call.samples))
                by_domain.setdefault(name, {}).setdefault(path, []).append(part)


def _add_domains(facts: Facts, parts: Mapping[str, Mapping[str, list[Moments]]]) -> Facts:
    domains, errors = dict(facts.domains), dict(facts.domain_errors)
    for name, of_norms in parts.items():
        moments, of_means = dict(domains.get(name, {})), dict(errors.get(name, {}))
        for path, samples in of_norms.items():
            every = Moments(*(torch.cat(fields) for fields in zip(*samples, strict=True)))
            number = len(every.count)
            moments[path] = merge_moments(every)
            spread = every.mean.std(0) if number > 1 else torch.full_like(every.mean[0], torch.inf)
            of_means[path] = spread / number**0.5
        domains[name], errors[name] = moments, of_means
    return dataclasses.replace(facts, domains=domains, domain_errors=errors)


# ---- images


def observe_images(facts: Facts, part: Literal["train", "test"], batches: Iterable[Any]) -> Facts:
    """Facts with the pixels of the images of some batches, as the model gets them; nothing is run.

    Args:
        facts: of the model.
        part: whose they are.
        batches: in any form that `list_images` knows.
    """
    pictures: list[torch.Tensor] = []
    for batch in batches:
        pictures += list_images(batch)
    if not pictures:
        failure = f"No images [C, H, W] were seen in the batches of the {part} data."
        return dataclasses.replace(facts, failures=(*facts.failures, failure))
    return _add_images(facts, part, pictures)


def _add_images(facts: Facts, part: str, pictures: list[torch.Tensor]) -> Facts:
    moments = measure_images(pictures)
    if moments is None:
        return facts
    return dataclasses.replace(facts, images={**facts.images, part: moments})


# ---- a pass over images


def examine_population(
    facts: Facts,
    model: nn.Module,
    recompute: Callable[[nn.Module], RecomputeReport],
    *,
    loss: Callable[[nn.Module, Statistics], float] | None = None,
    score: Callable[[nn.Module, Statistics], float] | None = None,
    dataset: str = "",
) -> Facts:
    """Facts with the population statistics of training images, and what the model is worth with them.

    Args:
        facts: of the model.
        model: as it was afterwards.
        recompute: called as recompute(model), re-estimates its statistics in place.
        loss: called as loss(model, statistics), where norms are to normalize by these.
        score: likewise, in evaluation mode; from 0 to 100, the higher the better.
        dataset: on which both are measured.
    """
    model = unwrap_model(model)
    losses: dict[str, float] = {}
    scores: dict[str, float] = {}

    def measure(facts: Facts, kind: str) -> Facts:
        statistics: Statistics = "mini_batch" if kind == "mini_batch" else "population"
        try:
            if loss is not None:
                losses[kind] = float(loss(model, statistics))
            if score is not None:
                scores[kind] = _measure_score(model, score, statistics)
        except Exception as error:
            return add_failure(facts, f"An evaluation by {kind.replace('_', '-')} statistics", error)
        return facts

    if not find_replaceable(model):
        failure = "There is no norm with population statistics that are not frozen: none are re-estimated."
        return dataclasses.replace(facts, failures=(*facts.failures, failure))

    if loss is not None or score is not None:
        facts = measure(measure(facts, "population"), "mini_batch")
    with restoring(model, seed=_SEED):
        try:
            report = recompute(model)
        except Exception as error:
            facts = add_failure(facts, "A re-estimation of the population statistics", error)
        else:
            facts = _add_population(facts, model, report)
            facts = measure(facts, "precise") if losses or scores else facts

    if losses or scores:
        facts = dataclasses.replace(facts, evaluation=EvaluationFacts(losses, scores, dataset))
    return facts


def _measure_score(model: nn.Module, score: Callable[[nn.Module, Statistics], float], statistics: Statistics) -> float:
    with restoring(model, seed=_SEED), torch.no_grad():
        model.eval()
        if statistics == "population":
            return float(score(model, statistics))
        with normalizing_evaluation_by_mini_batch(model):
            return float(score(model, statistics))


def _add_population(facts: Facts, model: nn.Module, report: RecomputeReport) -> Facts:
    """Facts with the statistics that a model now has, those that the pass has reached."""
    now = {norm.path: norm.populations for norm in read_norms(model)}
    population, errors = dict(facts.population), dict(facts.population_errors)

    for estimate in report.reached:
        for one in _find_set(now.get(estimate.path, ()), estimate):
            count = float(estimate.count)
            var = one.var * (count - 1) / count  # theirs has correction 1
            population[estimate.path, one.owner] = Moments(one.mean.new_tensor(count), one.mean, var)
            known = StandardErrors(estimate.mean_error, estimate.var_error, estimate.num_batches)
            errors[estimate.path, one.owner] = known
    return dataclasses.replace(facts, population=population, population_errors=errors)


def _find_set(populations: tuple[Population, ...], estimate: PopulationEstimate) -> Iterator[Population]:
    """The statistics that an estimate is of."""
    is_alone = len(populations) == 1
    for one in populations:
        if is_alone or one.owner in estimate.levels:
            yield one

"""A story of a bug: numbers with the bug and after the doctor's remedy, what the doctor said, for each of some seeds.

The stories are in `mini_batch_stories`, `training_stories` and `detector_story`, tables and picture in
`perils_tables`.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import bnext
from bnext.diagnostics import Diagnosis
from bnext.seeding import seeded
from bnext.studies.results_file import keeping_results
from bnext.studies.trials import using_threads

__all__ = ["Extent", "Outcome", "Story", "find_misdiagnosed", "follow_remedy", "run_stories"]

logger = logging.getLogger("bnext.perils")  # the screen shows what bnext logs


@dataclasses.dataclass(frozen=True)
class Extent:
    """The extent of a training.

    Args:
        epochs: of a classifier.
        images: of its training and of its test, at most; None: all.
        iterations: of the detector.
        opts: KEY VALUE pairs that override its config.
    """

    epochs: int = 10
    images: int | None = None
    iterations: int = 400
    opts: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """A story with one seed.

    Args:
        before, after: the measured number with the bug, and when the remedy was applied.
        without: that of a model that never had the bug; None: none was trained.
        diagnosis, again: what the doctor said before and after the remedy.
        more: name -> another number that tells something.
    """

    before: float
    after: float
    without: float | None
    diagnosis: Diagnosis
    again: Diagnosis
    more: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Story:
    """A bug.

    Args:
        title: the bug as its author would tell it.
        code: of the finding that the doctor is to name first.
        measured: the number, with its unit and its images.
        tell: called as tell(seed, extent, folder).
        num_seeds: with which it is told at most; None: as many as are wanted.
        num_threads: of torch, as their number changes how it rounds; None: all that there are.
    """

    title: str
    code: str
    measured: str
    tell: Callable[[int, Extent, Path], Outcome]
    num_seeds: int | None = None
    num_threads: int | None = 1


def run_stories(
    stories: Mapping[str, Story],
    output: str,
    num_seeds: int = 3,
    extent: Extent | None = None,
    *,
    resume: bool = False,
) -> dict[str, Any]:
    """Tell stories with seeds 1, 2, ..., and write `output`/results.json after each of them.

    Args:
        stories: name -> story.
        output: folder.
        num_seeds: of each story.
        extent: None: that of the README.
        resume: keep the outcomes that are there.

    Returns:
        What results.json holds: {"stories": {name: {seed: {"before": ..., "findings": ["BN001 error", ...], ...}}}}.
    """
    with keeping_results(output, {"stories": {}}, resume=resume) as results:
        for number, (name, story) in enumerate(stories.items(), 1):
            logger.info("Story %d of %d, %s: %s.", number, len(stories), name, story.title)
            seen = results.content["stories"].setdefault(name, {})

            for seed in range(1, min(num_seeds, story.num_seeds or num_seeds) + 1):
                if str(seed) not in seen:
                    seen[str(seed)] = _tell(story, seed, extent or Extent(), Path(output, name))
                    results.write()
                logger.info("%s, seed %d: %s.", name, seed, _describe(story, seen[str(seed)]))
    return results.content


def _tell(story: Story, seed: int, extent: Extent, folder: Path) -> dict[str, Any]:
    start, cpu = time.perf_counter(), time.process_time()
    with using_threads(story.num_threads), seeded(seed):
        outcome = story.tell(seed, extent, folder)

    findings = outcome.diagnosis.findings
    first = findings[0] if findings else None
    remedy = first.evidence.remedy if first is not None else None
    return {
        "before": outcome.before,
        "after": outcome.after,
        "without": outcome.without,
        "more": dict(outcome.more),
        "findings": _list_findings(outcome.diagnosis),
        "findings_after": _list_findings(outcome.again),
        "evidence": first.evidence.text if first is not None else "",
        "remedy": "" if remedy is None else remedy.command or remedy.call or remedy.text,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
    }


def _list_findings(diagnosis: Diagnosis) -> list[str]:
    return [f"{finding.code} {finding.severity}" for finding in diagnosis.findings]


def _describe(story: Story, seen: Mapping[str, Any]) -> str:
    first = seen["findings"][0] if seen["findings"] else "nothing"
    words = f"{story.measured}: {seen['before']:.1f} with the bug, {seen['after']:.1f} after the remedy"
    return f"{words}; the doctor names {first} first, {seen['seconds']:.0f} s"


def follow_remedy(diagnosis: Diagnosis, **names: object) -> None:
    """Run the line of Python that the doctor's first finding gives, as its reader would.

    Args:
        diagnosis: of a model in Python.
        names: of the line: `model`, `data` and what else the reader has.
    """
    if not diagnosis.findings:
        return

    first = diagnosis.findings[0]
    try:
        exec(first.evidence.remedy.call, {"bnext": bnext, **names})
    except Exception as error:
        logger.warning("The remedy of %s failed: %s: %s", first.code, type(error).__name__, error)


def find_misdiagnosed(stories: Mapping[str, Story], results: Mapping[str, Any]) -> Sequence[str]:
    """First findings of the doctor where it is not the bug, in sentences."""
    wrong = []
    for name, story in stories.items():
        for seed, seen in results["stories"].get(name, {}).items():
            first = seen["findings"][0] if seen["findings"] else "nothing"
            if not first.startswith(story.code):
                wrong.append(f"{name}, seed {seed}: {first} instead of {story.code}")
            elif any(each.startswith(story.code) for each in seen["findings_after"]):
                wrong.append(f"{name}, seed {seed}: {story.code} after the remedy, too")
    return wrong

"""The verdict of a comparison of statistics: who wins, by how much, and how to get it, as the table says."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnext.files import find_local_file
from bnext.repair.kinds import KINDS

__all__ = ["NAMES", "TOO_LOW", "Verdict", "find_noise", "judge_losses", "judge_rows"]

NAMES = {"bbox/AP": "box AP", "segm/AP": "mask AP"}
TOO_LOW = 1.0  # an AP below says nothing at all
_NOISE = 0.5  # AP that mean nothing, on any set
_FILE = "moving_average"
_SMALL = 0.05  # a share of the training's loss that means nothing
_WITHOUT_LABELS = ("TEST.BNEXT.PRECISE_BN.ROIS", "top_scored")


@dataclass(frozen=True)
class Verdict:
    """The verdict on a table.

    Args:
        winner: the kind with the highest AP beyond noise; None: nothing can be said.
        gain: its AP minus that of the file's statistics; None: those are not in the table.
        words: whole sentences.
    """

    winner: str | None
    gain: float | None
    words: str


def find_noise(results: Mapping[str, Any]) -> float:
    """The difference of two APs that means nothing: 0.5, and what two objects more or less found make.

    Example:
        >>> find_noise({"num_objects": 100})
        2.0
    """
    number = results.get("num_objects")
    return max(_NOISE, 200 / number) if number else _NOISE


def judge_rows(results: Mapping[str, Any]) -> Verdict:
    """The winner of a table by its first metric.

    Args:
        results: of `compare_statistics`; of them "rows", and where they are there "num_objects", "weights", "command",
            "dataset", "domain_dataset" and "places".

    Example:
        >>> rows = {"moving_average": {"bbox/AP": 20.0}, "precise": {"bbox/AP": 31.5}}
        >>> verdict = judge_rows({"rows": rows})
        >>> verdict.winner, verdict.gain
        ('precise', 11.5)
    """
    verdicts = {}
    for key in NAMES:
        aps = {kind: row[key] for kind, row in results["rows"].items() if _is_number(row.get(key))}
        if aps:
            verdicts[key] = _judge_aps(results, aps, NAMES[key])
    if not verdicts:
        return Verdict(None, None, "Nothing can be said: no kind has an AP, as no object counts on the data set.")

    (_, first), *others = verdicts.items()
    words = first.words
    for key, other in others:
        if other.winner not in (None, first.winner):
            gain = "" if other.gain is None else f" ({other.gain:+.1f})"
            words += f" By {NAMES[key]} it is: {KINDS[other.winner].words}{gain}."
    return Verdict(first.winner, first.gain, words)


def _is_number(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _judge_aps(results: Mapping[str, Any], aps: Mapping[str, float], metric: str) -> Verdict:
    noise = find_noise(results)
    best = max(aps, key=lambda kind: aps[kind])

    if len(aps) == 1:
        return Verdict(None, None, f"Nothing is compared: {metric} of one kind alone is there, {KINDS[best].words}.")
    if aps[best] < TOO_LOW:
        words = f"Nothing can be said: the highest {metric} is {aps[best]:.1f}, too low to tell the statistics apart"
        return Verdict(None, None, f"{words}. No statistics repair this model: train it further, or check its weights.")

    base = aps.get(_FILE)
    if base is None and aps[best] - min(aps.values()) < noise:
        return Verdict(
            None, None, f"Nothing can be said: the kinds differ by less than {noise:.1f} AP, which is noise."
        )
    if base is not None and _NOISE <= aps[best] - base < noise:
        words = f"Nothing can be said: {KINDS[best].words} gains {aps[best] - base:.1f} {metric}, but so few objects"
        return Verdict(None, None, f"{words} are there that less than {noise:.1f} is noise. Compare on more images.")
    if base is not None and aps[best] - base < noise:
        words = f"Keep the statistics of the file ({metric} {base:.1f}): no other kind gains {noise:.1f} AP or more"
        return Verdict(_FILE, 0.0, f"{words}, and less is noise.")

    gain = None if base is None else aps[best] - base
    words = f"The winner is: {KINDS[best].words}, {metric} {aps[best]:.1f}"
    if gain is None:
        words += "; the statistics of the file are not in the table"
    else:
        words += f", {gain:+.1f} against the statistics of the file"
    equals = [KINDS[kind].words for kind, ap in aps.items() if kind != best and aps[best] - ap < noise]
    if equals:
        words += f"; as good within {noise:.1f} AP: {', '.join(equals)}"
    return Verdict(best, gain, f"{words}. {_advise(results, aps, best, noise)}")


def _advise(results: Mapping[str, Any], aps: Mapping[str, float], best: str, noise: float) -> str:
    """The way to the statistics of a kind."""
    kind = KINDS[best]
    if not kind.is_as_trained:
        return _say_how(results, best)

    words = "It tells that training and test differ, and cannot be had where images come one by one."
    base = aps.get(_FILE, -math.inf)
    usable = {name: ap for name, ap in aps.items() if not KINDS[name].is_as_trained and ap - base >= noise}
    usable.pop(_FILE, None)
    if usable:
        second = max(usable, key=lambda name: usable[name])
        return f"{words} The next is: {KINDS[second].words}, {usable[second]:.1f}. {_say_how(results, second)}"
    if "precise" not in aps:
        return f"{words} Compare it with --kinds moving_average precise mini_batch_as_trained."
    return f"{words} No other kind in the table gains {noise:.1f} AP or more."


def _say_how(results: Mapping[str, Any], name: str) -> str:
    """The command, or the keys, that give the statistics of a kind."""
    kind = KINDS[name]

    if kind.source == "file":
        return "The file has them."
    if kind.source == "mini_batch":
        pairs = ", ".join(f"MODEL.BNEXT.{place}.INFERENCE: mini_batch" for place in results.get("places", ()))
        return f"To get it, write into the config: {pairs}." if pairs else "No key gives it to norms of torch."

    weights = str(results.get("weights") or "model_final.pth")
    output = Path(find_local_file(weights) or Path(weights).name)
    options = ["--estimator", kind.estimator]
    if kind.population is not None:
        options += ["--population", kind.population]
    if kind.source == "test":
        options += ["--dataset", str(results.get("dataset")), *_WITHOUT_LABELS]
    if kind.source == "domain":
        options += ["--dataset", str(results.get("domain_dataset")), *_WITHOUT_LABELS]
        options += ["--domain", str(results["domain"])] if results.get("domain") else []

    command = ["bnext", "reestimate", *_complete(results, weights)]
    words = shlex.join([*command, "--output", str(output.with_name(f"{output.stem}_{name}.pth")), *options])
    honest = " An AP on the images that statistics are of flatters: take others of their domain." * (
        kind.source == "test"
    )
    return f"To get it: {words}{honest}"


def _complete(results: Mapping[str, Any], weights: str) -> Sequence[str]:
    """Config, overrides and weights of the comparison."""
    given = list(results.get("command") or ("--config-file", "CONFIG.yaml"))
    return given if "MODEL.WEIGHTS" in given else [*given, "MODEL.WEIGHTS", weights]


def judge_losses(fit: float, gap: float, inconsistency: float, results: Mapping[str, Any]) -> str:
    """The three losses of `read_three_ways` in words.

    Args:
        fit, gap, inconsistency: the loss on training images with mini-batch statistics, what validation images add to
            it, and what population statistics add to that.
        results: see `judge_rows`; advice is given where their table supports it.
    """
    if not math.isfinite(fit + gap + inconsistency):
        return "a loss is not finite; the activations of some layer have diverged with these statistics"

    small = _SMALL * abs(fit)
    generalization = f"validation images add {gap:+.3f} to the loss, which is a lack of generalization"
    if gap < -small:
        generalization = (
            f"validation images have a lower loss than training images ({gap:+.3f}): nothing is lost to them"
        )
    elif gap <= small:
        generalization = f"validation images add next to nothing to the loss ({gap:+.3f})"

    if inconsistency < -small:
        return f"population statistics have a lower loss than mini-batches ({inconsistency:+.3f}), and {generalization}"
    if inconsistency <= small:
        return f"population statistics have the loss of mini-batches ({inconsistency:+.3f}), and {generalization}"

    words = f"population statistics add {inconsistency:+.3f} to the loss of mini-batches, and {generalization}"
    if gap > 0:
        share = 100 * inconsistency / (gap + inconsistency)
        words += f"; {share:.0f} % of both comes from other statistics at test than in training"
    return f"{words}; {_say_repair(results)}"


def _say_repair(results: Mapping[str, Any]) -> str:
    """Whether other statistics mend an inconsistency, as far as the table tells."""
    verdict = judge_rows(results) if results.get("rows") else None
    if verdict is None or verdict.winner is None:
        return "whether other statistics mend it cannot be told from the APs"

    if verdict.winner == _FILE:
        return "in AP no other statistics that were measured mend it"
    return f"in AP the best statistics are: {KINDS[verdict.winner].words}"

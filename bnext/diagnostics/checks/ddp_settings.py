"""BN028: settings of DistributedDataParallel that do not go with how norms are called."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bnext.diagnostics.facts import Facts, NormFacts
from bnext.diagnostics.findings import Check, Evidence, Remedy
from bnext.diagnostics.measures.batch_sizes import has_many_samples

__all__ = ["CHECK"]


def _examine(facts: Facts) -> Iterator[Evidence]:
    training = facts.training
    if training is None or training.ddp is None:
        return
    yield from _find_several_forwards(facts, training.ddp, training.accumulation)
    yield from _find_statistics_apart(facts, training.ddp, training.num_workers)
    yield from _find_varying_calls(facts, training.ddp)


def _find_several_forwards(facts: Facts, ddp: Mapping[str, bool], accumulation: int) -> Iterator[Evidence]:
    """Forwards of a step between which buffers are written."""
    steps = facts.steps
    if steps is None or not steps.num_steps or not ddp.get("broadcast_buffers", False):
        return
    per_step = steps.num_forwards / steps.num_steps / accumulation
    norms = [norm for norm in facts.batch_norms if norm.populations]
    if per_step < 1.5 or not norms:
        return

    text = (
        f"There are {per_step:.2g} forwards for each backward pass, and broadcast_buffers writes the statistics of "
        f"{len(norms)} batch norms before each of them: torch without the fix of pytorch#175024 then refuses the "
        "backward pass (modified by an inplace operation)."
    )
    remedy = Remedy(
        "Run one forward on the batches joined, or write no buffers; then make them equal before an evaluation.",
        call="DistributedDataParallel(model, broadcast_buffers=False)",
    )
    paths = tuple(norm.path for norm in norms)
    yield Evidence("note", paths, text, remedy, {"forwards": per_step, "norms": float(len(norms))})


def _find_statistics_apart(facts: Facts, ddp: Mapping[str, bool], num_workers: int | None) -> Iterator[Evidence]:
    """Running statistics that nobody makes equal."""
    norms = [norm for norm in facts.batch_norms if norm.is_by_mini_batch and norm.is_training and norm.populations]
    alone = [norm for norm in norms if norm.record.workers in ("one", 1)]
    is_seen = any((facts.worker_differences or {}).values())  # which is another check's
    if ddp.get("broadcast_buffers", True) or not alone or (num_workers or 1) < 2 or is_seen:
        return

    text = (
        f"broadcast_buffers is False and {len(alone)} batch norms are of one worker: each of {num_workers} workers "
        "will have running statistics of its own, and those of worker 0 are saved."
    )
    remedy = Remedy(
        "Let one worker's statistics be those of all, or share mini-batches (SyncBN).",
        call="DistributedDataParallel(model, broadcast_buffers=True)",
    )
    yield Evidence("note", tuple(norm.path for norm in alone), text, remedy, {"norms": float(len(alone))})


def _find_varying_calls(facts: Facts, ddp: Mapping[str, bool]) -> Iterator[Evidence]:
    """Norms that some forwards call and others do not, so that their parameters have no gradient there."""
    forwards = [forward for forward in facts.forwards if not forward.is_noise]
    norms: list[NormFacts] = []
    for norm in facts.batch_norms:
        counts = {len(forward.calls.get(norm.path, ())) for forward in forwards}
        is_affected = len(counts) > 1 and (0 in counts or ddp.get("static_graph", False))
        # How many RoIs there are at inference, or whether any, says little of a training.
        is_trained = any(affine.is_trained for affine in norm.affines)
        if is_affected and is_trained and not has_many_samples(facts, norm):
            norms.append(norm)

    is_allowed = ddp.get("find_unused_parameters", False) and not ddp.get("static_graph", False)
    if not norms or is_allowed:
        return
    setting = "static_graph is True" if ddp.get("static_graph", False) else "find_unused_parameters is False"
    text = (
        f"{len(norms)} norms are not called equally often in all forwards, but {setting}: a step that leaves out their "
        "parameters ends in an error (Expected to have finished reduction)."
    )
    remedy = Remedy(
        "Let the graph differ from step to step; or call every norm in every forward.",
        call="DistributedDataParallel(model, find_unused_parameters=True, static_graph=False)",
    )
    yield Evidence("warning", tuple(norm.path for norm in norms), text, remedy, {"norms": float(len(norms))})


CHECK = Check(
    code="BN028",
    name="ddp-settings",
    title="settings of DistributedDataParallel do not fit the norms",
    explanation=(
        "broadcast_buffers copies the buffers of worker 0 to all others at the start of each forward. Of two forwards "
        "before one backward pass, as of a source and a target batch, the second writes what the first has saved. "
        "Without it plain norms of workers drift apart. A norm, or a domain's, that a step does not call has no "
        "gradient, which needs find_unused_parameters and forbids static_graph."
    ),
    cost="",
    source="pytorch#175024, pytorch#22095",
    depth="static",
    examine=_examine,
)

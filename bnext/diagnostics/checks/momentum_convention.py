"""BN017: a momentum that was meant in the convention of other frameworks."""

from __future__ import annotations

from collections.abc import Iterator

from bnext.diagnostics.facts import Facts
from bnext.diagnostics.findings import Check, Evidence, Remedy

__all__ = ["CHECK"]

_LEAST = 0.9  # in torch's sense; nobody wants a moving average of 1.1 batches


def _examine(facts: Facts) -> Iterator[Evidence]:
    momenta = {norm.path: norm.record.momentum for norm in facts.batch_norms if norm.is_by_mini_batch}
    wrong = {path: value for path, value in momenta.items() if value is not None and value >= _LEAST}
    if not wrong:
        return

    worst = max(wrong.values())
    meant = round(1 - worst, 6)
    text = (
        f"{len(wrong)} of {len(momenta)} batch norms have a momentum of up to {worst:g}: in torch it is the weight of "
        f"the new mini-batch, so the running statistics are those of the last {1 / worst:.2g} batches."
    )
    remedy = Remedy(
        f"Set it to {meant:g}, which is what {worst:g} means where momentum is the weight of the old value.",
        call=f"for norm in model.modules():\n    if hasattr(norm, 'momentum'):\n        norm.momentum = {meant:g}",
    )
    yield Evidence("error", tuple(wrong), text, remedy, {"momentum": worst, "norms": len(wrong)})


CHECK = Check(
    code="BN017",
    name="momentum-convention",
    title="momentum is in the convention of another framework",
    explanation=(
        "Torch updates `running = (1 - momentum) * running + momentum * mini_batch`; TensorFlow, Keras, JAX libraries "
        "and Caffe write the weight of the old value. A ported 0.9, 0.99 or 0.997 makes population statistics those of "
        "the last mini-batch, and evaluation noisy."
    ),
    cost="",
    source="",
    depth="static",
    examine=_examine,
)

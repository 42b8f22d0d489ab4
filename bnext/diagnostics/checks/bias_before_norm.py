"""BN031: a layer with a bias that the norm behind it takes away again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from bnext.diagnostics.facts import Facts, LayerFacts, NormFacts
from bnext.diagnostics.findings import Check, Evidence, Remedy
from bnext.errors import list_few

__all__ = ["CHECK"]

_CALL = """import torch
with torch.no_grad():
    for layer, norm in {pairs!r}:
        layer, norm = model.get_submodule(layer), model.get_submodule(norm)
        for name, mean in norm.named_buffers():
            if name.endswith("running_mean"):
                mean -= layer.bias
        layer.bias = None"""


def _examine(facts: Facts) -> Iterator[Evidence]:
    useless = {norm.path: norm.layer_before for norm in facts.batch_norms if norm.layer_before and _is_useless(norm)}
    if not useless:
        return

    layers = [layer.path for layer in useless.values()]
    text = (
        f"The layers before {len(useless)} of {len(facts.batch_norms)} norms have a bias ({list_few(layers)}), which "
        "the norm subtracts again with the mean: it changes no output, and costs memory and time."
    )
    yield Evidence("note", tuple(useless), text, _advise(facts, useless), {"norms": float(len(useless))})


def _is_useless(norm: NormFacts) -> bool:
    """Whether a mini-batch's mean takes the bias away; a detector's parts are as its builder and its weights need."""
    has_bias = norm.layer_before is not None and norm.layer_before.has_bias
    return has_bias and norm.is_by_mini_batch and not norm.place


def _advise(facts: Facts, useless: Mapping[str, LayerFacts]) -> Remedy:
    text = "Build these layers with bias=False. In a model that is trained, the running means take the biases in."
    if facts.origin.kind != "model":
        return Remedy(text)
    return Remedy(text, call=_CALL.format(pairs=[(layer.path, path) for path, layer in useless.items()]))


CHECK = Check(
    code="BN031",
    name="bias-before-norm",
    title="a bias that the norm behind it takes away",
    explanation=(
        "A batch norm subtracts the mean, and a bias with it; its own shift stands for the bias. The gradient of such "
        "a bias is rounding noise, which SGD ignores and Adam enlarges to steps of full size: the bias then wanders, "
        "and the running mean lags behind. It is harmless else. Only layers that a norm follows without a doubt count; "
        "heads that detectron2 builds with a bias, and checkpoints alone, are left alone."
    ),
    cost="",
    source="",
    depth="static",
    examine=_examine,
)

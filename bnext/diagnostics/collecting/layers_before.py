"""The layer whose output a norm gets, where the model itself shows it without a doubt."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from bnext.diagnostics.facts import LayerFacts
from bnext.scope.model import restoring
from bnext.surgery.fold_pairs import Pair, find_pairs

__all__ = ["find_layers_before"]


def find_layers_before(model: nn.Module, norms: Mapping[str, nn.Module]) -> dict[str, LayerFacts]:
    """Path of a norm -> the layer before it.

    Args:
        model: is not changed. Forwards are traced, not run, and only if a convolution of it has a bias.
        norms: path -> norm of any class.

    Returns:
        Norms that follow a layer in an `nn.Sequential`, and those that a trace shows to get a convolution's output and
        nothing else (`bnext.surgery.fold_pairs`); layers at several places of the model are passed over.
    """
    layers = _find_in_sequences(model, norms)

    has_bias = any(isinstance(module, _ConvNd) and module.bias is not None for module in model.modules())
    if has_bias and len(layers) < len(norms):
        for pair in _trace_pairs(model):
            if pair.norm_path in norms:
                layers.setdefault(pair.norm_path, (pair.conv_path, pair.conv))

    return {path: LayerFacts(place, layer.bias is not None) for path, (place, layer) in layers.items()}


def _trace_pairs(model: nn.Module) -> list[Pair]:
    """Convolutions and their norms, of forwards of which nothing is kept: no attribute, number drawn, or warning."""
    try:
        with warnings.catch_warnings(), restoring(model, seed=0):
            warnings.simplefilter("ignore")
            return find_pairs(model)[0]
    except Exception:  # whatever a foreign forward does with symbols: then it is not known
        return []


def _find_in_sequences(model: nn.Module, norms: Mapping[str, nn.Module]) -> dict[str, tuple[str, Any]]:
    places: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(path)

    paths = {norm: path for path, norm in norms.items()}
    layers: dict[str, tuple[str, Any]] = {}
    for module in places:
        if getattr(type(module), "forward", None) is not nn.Sequential.forward:  # a scripted one has none
            continue
        children = list(module.children())
        for layer, norm in zip(children, children[1:], strict=False):
            is_layer = isinstance(layer, (_ConvNd, nn.Linear)) and not any(layer.children())
            if is_layer and norm in paths and len(places[layer]) == len(places[norm]) == 1:
                layers[paths[norm]] = places[layer][0], layer
    return layers

"""The doctor of a detector: what its config, its weights and its images say."""

from __future__ import annotations

import dataclasses
import traceback
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from bnext.config.blame import building_from_config
from bnext.diagnostics.collecting.observe import observe_forward
from bnext.diagnostics.diagnose import collect_facts
from bnext.diagnostics.facts import Facts, Origin
from bnext.errors import BNextError, ConfigError
from bnext.evaluation.doctor_checkpoint import add_stored_statistics
from bnext.evaluation.doctor_weights import load_weights
from bnext.files import find_local_file
from bnext.heads.build_warnings import building_unwarned
from bnext.heads.doctor_facts import add_config_facts
from bnext.packages import explain_missing

__all__ = ["examine_detector"]

_NOISE_SIZE = 128  # pixels, of a picture whose way through the model shows which norm is called how often


def examine_detector(cfg: CfgNode, origin: Origin, num_workers: int | None = None) -> tuple[Facts, nn.Module]:
    """The static facts of a detector, and the model itself, in training mode.

    Args:
        cfg: of the model; MODEL.WEIGHTS is read if it is a file of this machine, and never fetched.
        origin: how the user came by it.
        num_workers: that train it.
    """
    model = _build(cfg)
    weights, failures = load_weights(cfg, model)
    facts = dataclasses.replace(collect_facts(model.train()), origin=origin, weights=weights, failures=failures)
    file = find_local_file(cfg.MODEL.WEIGHTS)
    if failures and file:
        facts = add_stored_statistics(facts, file)
    return _probe(add_config_facts(facts, cfg, model, num_workers), model), model


def _build(cfg: CfgNode) -> nn.Module:
    try:
        with building_from_config(), building_unwarned():
            return build_model(cfg)
    except (BNextError, MemoryError):
        raise
    except Exception as error:
        if explain_missing(error) is not None:
            raise
        line = traceback.extract_tb(error.__traceback__)[-1]
        reason = str(error).partition("\n")[0] or "no message"
        got, where = f"{type(error).__name__}: {reason}", f"{line.filename}, line {line.lineno}"
        remedy = "Correct the config, or the code there."
        raise ConfigError.of("The model", "be one that can be built", got=got, where=where, remedy=remedy) from error


def _probe(facts: Facts, model: nn.Module) -> Facts:
    """Facts with the calls of a forward of made-up pixels."""
    norms: dict[str, nn.Module] = {norm.path: model.get_submodule(norm.path) for norm in facts.norms}
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(256, (3, _NOISE_SIZE, _NOISE_SIZE), generator=generator).float()
    batch: list[dict[str, Any]] = [{"image": image, "height": _NOISE_SIZE, "width": _NOISE_SIZE}]

    names = next((norm.record.domains for norm in facts.norms if norm.record is not None and norm.record.domains), None)

    try:
        forward = observe_forward(model, batch, norms, num_images=1, domain=names[0] if names else None, is_noise=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else "no message"
        failure = f"A forward of made-up pixels failed: {type(error).__name__}: {reason}"
        return dataclasses.replace(facts, failures=(*facts.failures, failure))
    forward = dataclasses.replace(forward, image_size=(_NOISE_SIZE, _NOISE_SIZE), domain="")  # pixels of none
    return dataclasses.replace(facts, forwards=(*facts.forwards, forward))

"""The figures of the study as trials: what each measures, with batch norm and without."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from understanding_setting import (
    INITIALIZATIONS,
    UnderstandingSetting,
    build_model,
    compute_loss,
    draw_batches,
    load_images,
)

from bnext import (
    activations_by_depth,
    gradient_histogram,
    highest_learning_rate,
    loss_along_gradient,
    output_gradients,
)
from bnext.studies.classifiers import build_optimizer, measure_accuracy, train_classifier
from bnext.studies.images import Batches

__all__ = ["NORMS", "PARTS", "list_trials", "name_trial"]

PARTS = ("rates", "gradients", "steps", "depth", "outputs")
NORMS = {"bn": True, "none": False}

Trial = Callable[[int], Mapping[str, Any]]


def name_trial(part: str, norm: str, detail: object = "") -> str:
    """The name of a trial, such as gradients/bn/xavier."""
    return "/".join(filter(None, (part, norm, f"{detail}")))


def list_trials(setting: UnderstandingSetting, parts: tuple[str, ...] = PARTS) -> dict[str, Trial]:
    """Name -> trial, a function of the seed, of the parts that are wanted."""
    trials: dict[str, Trial] = {}
    for norm, has_norm in NORMS.items():
        if "rates" in parts:
            trials[name_trial("rates", norm)] = partial(search_rate, setting, has_norm)
            for rate in setting.rates:
                trials[name_trial("rates", norm, f"{rate:g}")] = partial(train_at, setting, has_norm, rate)

        if "gradients" in parts:
            for kind in INITIALIZATIONS:
                trials[name_trial("gradients", norm, kind)] = partial(measure_gradients, setting, has_norm, kind)
        if "steps" in parts:
            trials[name_trial("steps", norm)] = partial(measure_steps, setting, has_norm)

        if "depth" in parts:
            for kind in INITIALIZATIONS:
                trials[name_trial("depth", norm, kind)] = partial(measure_depth, setting, has_norm, kind)
        if "outputs" in parts:
            trials[name_trial("outputs", norm)] = partial(measure_outputs, setting, has_norm)
    return trials


# ---- figure 1


def search_rate(setting: UnderstandingSetting, has_norm: bool, seed: int) -> dict[str, Any]:
    """The highest rate that trains, by bisection, and what was tried."""
    search = highest_learning_rate(
        build_model(_make_shallow(setting), has_norm, seed),
        draw_batches(setting, seed),
        num_steps=setting.num_steps,
        low=setting.search_range[0],
        high=setting.search_range[1],
        num_trials=setting.num_trials,
        drop=setting.drop,
        forward=compute_loss,
        seed=seed,
    )
    tried = [[trial.rate, trial.trains] for trial in search.trials]
    return {"highest": search.highest, "lowest_failing": search.lowest_failing, "tried": tried}


def train_at(setting: UnderstandingSetting, has_norm: bool, rate: float, seed: int) -> dict[str, Any]:
    """Loss of the steps, and validation accuracy by epoch, of a training with momentum and a rate that stays."""
    model, val = build_model(_make_shallow(setting), has_norm, seed), load_images(setting, "val")
    batches = Batches(load_images(setting, "train"), setting.batch_size, setting.epochs, seed)
    per_epoch, accuracies = len(batches) // setting.epochs, []

    def measure(model: nn.Module, iteration: int) -> None:
        if (iteration + 1) % per_epoch == 0:
            accuracies.append(measure_accuracy(model.eval(), val))
            model.train()

    losses = train_classifier(
        model, batches, optimizer=build_optimizer(model, rate), decays=False, compute_loss=compute_loss,
        after_step=measure,
    )  # fmt: skip
    return {"accuracy": accuracies[-1], "accuracies": accuracies, "losses": losses}


def _make_shallow(setting: UnderstandingSetting) -> UnderstandingSetting:
    return dataclasses.replace(setting, depth=setting.trained_depth)


# ---- figures 2, 3, 5 and 6, at initialisation


def measure_gradients(setting: UnderstandingSetting, has_norm: bool, kind: str, seed: int) -> dict[str, Any]:
    """Histogram of the gradient of the convolution at mid depth, in units of its deviation."""
    model = build_model(setting, has_norm, seed, kind)
    batches = draw_batches(setting, seed, setting.num_batches)
    seen = next(iter(gradient_histogram(model, batches, forward=compute_loss, seed=seed).values()))

    limit = 10 * seen.deviation
    options: dict[str, Any] = {"num_bins": 81, "limit": limit} if limit > 0 and math.isfinite(limit) else {}
    again = gradient_histogram(model, batches, [seen.parameter], forward=compute_loss, seed=seed, **options)
    counts = again[seen.parameter].counts
    return {
        "deviation": seen.deviation,
        "largest": seen.largest,
        "excess_kurtosis": seen.excess_kurtosis,
        "not_finite": seen.num_not_finite,
        "density": (counts / max(seen.num_elements, 1)).tolist(),
    }


def measure_steps(setting: UnderstandingSetting, has_norm: bool, seed: int) -> dict[str, Any]:
    """Relative loss along the gradient, for mini-batches of the start."""
    model = build_model(setting, has_norm, seed)
    batches = draw_batches(setting, seed, setting.num_batches)
    result = loss_along_gradient(model, batches, list(setting.step_sizes), forward=compute_loss, seed=seed)
    good = result.largest_good_steps
    return {
        "largest_good_step": float(good.log().mean().exp()) if (good > 0).all() else 0.0,
        "gradient_norm": float(result.gradient_norms.mean()),
        "ratios": result.ratios.tolist(),
    }


def measure_depth(setting: UnderstandingSetting, has_norm: bool, kind: str, seed: int) -> dict[str, Any]:
    """Mean and standard deviation of the channels of the blocks' outputs, from the first layer to the last."""
    model = build_model(setting, has_norm, seed, kind)
    batches = draw_batches(setting, seed, setting.num_batches)
    blocks = type(model.backbone[-1])
    layers = activations_by_depth(model, batches, kinds=blocks, forward=compute_loss, seed=seed)

    means = [float(layer.means.abs().mean()) for layer in layers]
    deviations = [float(layer.deviations.mean()) for layer in layers]
    growth = deviations[-1] / deviations[0] if deviations[0] else math.nan
    return {"growth": growth, "means": means, "deviations": deviations}


def measure_outputs(setting: UnderstandingSetting, has_norm: bool, seed: int) -> dict[str, Any]:
    """Gradient of each output unit by image in the first mini-batch, and over all mini-batches of an epoch."""
    model = build_model(setting, has_norm, seed)
    batches = draw_batches(setting, seed)
    first = output_gradients(model, batches[:1], "head", forward=compute_loss, seed=seed)
    epoch = output_gradients(model, batches, "head", forward=compute_loss, seed=seed)

    pairs = zip(epoch.values.split(setting.batch_size), batches, strict=True)
    each = [float(dataclasses.replace(first, values=values).agreement) for values, _ in pairs]
    return {
        "agreement": float(torch.tensor(each).mean()),
        "largest_class": _count_largest(model, batches[0].pixels),
        "first": first.values.tolist(),
        "epoch_mean": epoch.mean.tolist(),
    }


@torch.no_grad()
def _count_largest(model: nn.Module, pixels: Tensor) -> float:
    """Share of the images that the untrained model gives to the class that it names most, in %."""
    answers = model(pixels).argmax(1)
    return 100 * float(answers.bincount().max()) / len(answers)

"""Pictures of the study, one for each figure of the source; single values are those of the first seed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from understanding_setting import INITIALIZATIONS, UnderstandingSetting
from understanding_tables import NORM_WORDS
from understanding_trials import NORMS, name_trial

from bnext.figures import COLORS, GREY, PLAIN, make_figure, save_figure, style_axes, to_points
from bnext.studies.setting import read_setting

__all__ = ["draw_all"]

_NORM_COLORS = {"bn": COLORS["blue"], "none": COLORS["vermillion"]}
_TEXT = 13  # pixels


def draw_all(results: Mapping[str, Any], folder: str | os.PathLike[str]) -> list[Path]:
    """Draw every figure whose trials are all there; files in a folder."""
    setting = read_setting(UnderstandingSetting, results)
    kinds = [name_trial("gradients", norm, kind) for norm in NORMS for kind in INITIALIZATIONS]
    figures = {
        "rates.png": (_draw_rates, [name_trial("rates", norm) for norm in NORMS]),
        "gradients.png": (_draw_gradients, kinds),
        "steps.png": (_draw_steps, [name_trial("steps", norm) for norm in NORMS]),
        "depth.png": (_draw_depth, [name.replace("gradients", "depth") for name in kinds]),
        "outputs.png": (_draw_outputs, [name_trial("outputs", norm) for norm in NORMS]),
    }

    paths = []
    for file, (draw, needed) in figures.items():
        if all(name in results["trials"] for name in needed):
            figure = draw(results["trials"], setting)
            for axes in figure.axes:
                style_axes(axes, pixels=_TEXT)
            paths.append(save_figure(figure, Path(folder, file)))
    return paths


def _draw_rates(trials: Mapping[str, Any], setting: UnderstandingSetting) -> Any:
    figure = make_figure(1100, 400)
    left, middle, right = figure.subplots(1, 3)

    for axes, norm in ((left, "bn"), (middle, "none")):
        for number, rate in enumerate(setting.rates):
            losses = [seen["losses"] for seen in trials[name_trial("rates", norm, f"{rate:g}")].values()]
            curve = np.array(losses, dtype=float).mean(0)
            smooth = np.convolve(curve, np.ones(9) / 9, mode="valid")
            axes.plot(np.arange(len(smooth)) + 5, smooth, color=PLAIN[number], label=f"{rate:g}")
        axes.set_ylim(0, 3.5)
        axes.set_title(f"{NORM_WORDS[norm]}, {setting.trained_depth} layers")
        axes.set_xlabel("step")
        axes.set_ylabel("training loss, mean of seeds")
        axes.legend(title="learning rate", fontsize=to_points(_TEXT), frameon=False)

    for place, norm in enumerate(NORMS):
        for seen in trials[name_trial("rates", norm)].values():
            rates, trains = zip(*seen["tried"], strict=True)
            colors = [_NORM_COLORS[norm] if each else "white" for each in trains]
            right.scatter([place] * len(rates), rates, c=colors, edgecolors=_NORM_COLORS[norm], s=36, alpha=0.7)
    right.set_yscale("log")
    right.set_xlim(-0.5, len(NORMS) - 0.5)
    right.set_xticks(range(len(NORMS)), [NORM_WORDS[norm] for norm in NORMS])
    right.set_ylabel("learning rate")
    right.set_title("search: trains (filled), does not (empty)")
    return figure


def _draw_gradients(trials: Mapping[str, Any], setting: UnderstandingSetting) -> Any:
    figure = make_figure(1100, 400)
    for axes, kind in zip(figure.subplots(1, 3), INITIALIZATIONS, strict=True):
        for norm in NORMS:
            seen = next(iter(trials[name_trial("gradients", norm, kind)].values()))
            edges = np.linspace(-10, 10, len(seen["density"]) + 1)
            words = f"{NORM_WORDS[norm]} (deviation {seen['deviation'] or math.nan:.1g})"
            axes.stairs(seen["density"], edges, color=_NORM_COLORS[norm], label=words, linewidth=1.6)
        axes.set_yscale("log")
        axes.set_title(f"{kind}, {setting.depth} layers")
        axes.set_xlabel("gradient at mid depth / its deviation")
        axes.set_ylabel("share of elements")
        axes.set_ylim(None, 3)
        axes.legend(fontsize=to_points(12), frameon=False, loc="upper center")
    return figure


def _draw_steps(trials: Mapping[str, Any], setting: UnderstandingSetting) -> Any:
    figure = make_figure(900, 400)
    for axes, norm in zip(figure.subplots(1, 2, sharey=True), NORMS, strict=True):
        for seen in trials[name_trial("steps", norm)].values():
            for ratios in seen["ratios"]:
                values = np.array(ratios, dtype=float)
                axes.plot(setting.step_sizes, values, color=_NORM_COLORS[norm], alpha=0.5, linewidth=1.2)

        axes.axhline(1, color=GREY, linewidth=1, linestyle="--")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(0.3, 100)
        axes.set_yticks([0.3, 1, 3, 10, 30, 100], ["0.3", "1", "3", "10", "30", "100"])
        axes.set_title(f"{NORM_WORDS[norm]}, {setting.depth} layers, {setting.initialization}")
        axes.set_xlabel("step size along the gradient")
        axes.set_ylabel("loss after the step / before")
    return figure


def _draw_depth(trials: Mapping[str, Any], setting: UnderstandingSetting) -> Any:
    figure = make_figure(1000, 420)
    for axes, key in zip(figure.subplots(1, 2), ("means", "deviations"), strict=True):
        for number, kind in enumerate(INITIALIZATIONS):
            for norm, style in (("bn", "-"), ("none", "--")):
                rows = [seen[key] for seen in trials[name_trial("depth", norm, kind)].values()]
                curve = np.array(rows, dtype=float).mean(0)
                places = range(1, len(curve) + 1)
                axes.plot(places, curve, style, color=PLAIN[number], label=f"{kind}, {NORM_WORDS[norm]}")

        axes.set_yscale("log")
        axes.set_xlabel(f"block (of a net of {setting.depth} layers)")
        axes.set_ylabel({"means": "magnitude of the channels' means", "deviations": "deviation of the channels"}[key])
        axes.grid(axis="y", alpha=0.3)

    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=to_points(_TEXT), frameon=False)
    return figure


def _draw_outputs(trials: Mapping[str, Any], setting: UnderstandingSetting) -> Any:
    figure = make_figure(1000, 620)
    for column, norm in enumerate(NORMS):
        seen = next(iter(trials[name_trial("outputs", norm)].values()))
        first, mean = np.array(seen["first"], dtype=float), np.array(seen["epoch_mean"], dtype=float)
        axes = figure.add_subplot(2, 2, 1 + column)
        bound = float(np.abs(first).max()) or 1.0
        shown = axes.imshow(first.T, aspect="auto", cmap="RdBu", vmin=-bound, vmax=bound, interpolation="nearest")
        axes.set_title(f"{NORM_WORDS[norm]}: one mini-batch")
        axes.set_xlabel("image")
        axes.set_ylabel("output unit (class)")
        figure.colorbar(shown, ax=axes, label="gradient")

        axes = figure.add_subplot(2, 2, 3 + column)
        axes.bar(range(len(mean)), mean, color=_NORM_COLORS[norm])
        axes.axhline(0, color=GREY, linewidth=1)
        axes.set_title(f"{NORM_WORDS[norm]}: mean over an epoch")
        axes.set_xlabel("output unit (class)")
        axes.set_ylabel("gradient")
    return figure

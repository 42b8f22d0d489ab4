"""Tables of the study of box heads, from what results.json holds, and the paper's numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rcnn_heads import ARMS
from rcnn_study import RcnnSetting, name_sets

from bnext.data.digits_images import DigitsRecipe
from bnext.studies.spread import Spread, compare, summarize
from bnext.studies.trials import collect
from bnext.tables import format_rows

__all__ = ["PAPER", "format_tables", "list_sets", "measure_loss"]

# Box AP of Mask R-CNN R50-FPN, 3x, one image per worker; Wu and Johnson 2021, Table 3: population, mini-batch.
PAPER = {"one_image": (30.7, 41.5), "dealt": (41.7, None), "all": (41.7, None), "gn": (41.4, None)}


def list_sets(results: Mapping[str, Any]) -> dict[str, DigitsRecipe]:
    """Name of each set -> its recipe, the least style first."""
    sets = name_sets(RcnnSetting(**results["setting"]))
    return dict(sorted(sets.items(), key=lambda item: item[1].image_style))


def _describe(recipe: DigitsRecipe) -> str:
    style = f"{recipe.image_style:g}"
    has_all = recipe.image_classes == DigitsRecipe().image_classes
    return style if has_all else f"{style}, {recipe.image_classes} class(es)"


def measure_loss(results: Mapping[str, Any], name: str, arm: str, kind: str = "population") -> Spread:
    """AP of a kind of statistics of an arm less that of per-worker BN of one image by population, over seeds."""
    aps = collect(results, f"{name}/{arm}", "none" if arm == "gn" else kind)
    return compare(aps, collect(results, f"{name}/one_image", "population"))


def format_tables(results: Mapping[str, Any]) -> str:
    """Box AP of each set and arm, and what per-worker BN of one image loses by population statistics."""
    rows = []
    for name, recipe in list_sets(results).items():
        for arm, words in ARMS.items():
            trial = f"{name}/{arm}"
            if trial not in results["trials"]:
                continue
            population = collect(results, trial, "none" if arm == "gn" else "population")
            mini_batch = "" if arm == "gn" else summarize(collect(results, trial, "mini_batch"))
            loss = measure_loss(results, name, arm)
            change = "" if arm == "one_image" else loss.show(sign="+")
            beyond = "" if arm == "one_image" else {True: "yes", False: "no"}[loss.is_beyond]
            rows.append([_describe(recipe), words, summarize(population), mini_batch, change, beyond, str(loss.number)])

    for arm, (population, mini_batch) in PAPER.items():
        change = "" if arm == "one_image" else f"{population - PAPER['one_image'][0]:+.1f}"
        shown = "" if arm == "gn" else f"{mini_batch or 'n.r.'}"
        rows.append(["COCO (paper)", ARMS[arm], f"{population}", shown, change, "n.r.", "3"])

    headers = ["style of the pictures", "norm of the box head", "box AP, population", "mini-batch of one image"]
    headers += ["above the first by population", "beyond two spreads", "seeds"]
    return "\n\n".join([format_rows(rows, headers, num_texts=2), _format_shares(results)])


def _format_shares(results: Mapping[str, Any]) -> str:
    rows = []
    for name, recipe in list_sets(results).items():
        trial = f"{name}/one_image"
        keys = list(next(iter(results["trials"][trial].values()))["share"])
        shares = [summarize(collect(results, trial, f"share/{key}")).show(2) for key in sorted(keys)]
        rows.append([_describe(recipe), *shares])
    names = {"pooled": "RoIs as they are pooled", "random": "random groups of these"}
    headers = [names.get(key, f"before {key}") for key in sorted(keys)]
    return format_rows(rows, ["share of the variance between images, by style", *headers])

"""COCO's metrics by faster-coco-eval against pycocotools: the same numbers, in which time.

    python -m bench.evaluation_speed

Boxes of a set of the digits' size and of one of COCO's, drawn at random: a third of the detections near an object of
their category. Both libraries load the detections, match, accumulate and summarize, as an evaluation asks for, and
are shown to give the same numbers. Times are processor time of this process, so that other programs on the same cores
do not count; neither library uses a second thread for boxes. The arms alternate; the figure is the median of the
ratios of pairs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from bench.record import write_figures
from bnext.cli.run_command import run_command
from bnext.errors import BNextError
from bnext.evaluation.coco_engine import find_fast_engine, measure
from bnext.progress import track
from bnext.tables import format_rows

TOLERANCE = 1e-12  # of numbers from 0 to 1
# images, objects, categories, detections of an image
SIZES = {"digits": (200, 500, 10, 30), "COCO": (5_000, 36_000, 80, 100)}


@dataclass(frozen=True)
class Figure:
    """Times of one size.

    Args:
        name: of the size.
        ours_s, other_s: medians of faster-coco-eval and of pycocotools, in seconds.
        median, lowest, highest: of pycocotools / faster-coco-eval, over pairs.
        difference: largest of any precision or recall.
    """

    name: str
    ours_s: float
    other_s: float
    median: float
    lowest: float
    highest: float
    difference: float


def draw_set(
    num_images: int, num_objects: int, num_categories: int, num_detections: int
) -> tuple[COCO, list[dict[str, Any]]]:
    """Ground truth and detections in pictures of 640 x 480."""
    rng = np.random.default_rng(0)
    images = [{"id": number, "height": 480, "width": 640} for number in range(1, num_images + 1)]
    categories = [{"id": number, "name": str(number)} for number in range(1, num_categories + 1)]

    annotations: list[dict[str, Any]] = []
    by_image: dict[int, list[dict[str, Any]]] = {image["id"]: [] for image in images}
    for number in range(1, num_objects + 1):
        box = [*rng.uniform(0, 400, 2).tolist(), *rng.uniform(8, 200, 2).tolist()]
        place = {
            "image_id": int(rng.integers(1, num_images + 1)),
            "category_id": int(rng.integers(1, num_categories + 1)),
        }
        crowd = int(rng.random() < 0.01)
        annotations.append({"id": number, **place, "bbox": box, "area": box[2] * box[3], "iscrowd": crowd})
        by_image[place["image_id"]].append(annotations[-1])

    detections = []
    for image, objects in by_image.items():
        for _ in range(num_detections):
            box = [*rng.uniform(0, 400, 2).tolist(), *rng.uniform(8, 200, 2).tolist()]
            category = int(rng.integers(1, num_categories + 1))
            if objects and rng.random() < 1 / 3:
                near = objects[rng.integers(len(objects))]
                box, category = np.abs(near["bbox"] + rng.normal(0, 5, 4)).tolist(), near["category_id"]
            detections.append({"image_id": image, "category_id": category, "bbox": box, "score": float(rng.random())})

    truth = COCO()
    truth.dataset = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth, detections


def compare(name: str, num_pairs: int) -> Figure:
    """Time both libraries on a set of one size.

    Raises:
        BNextError: their numbers differ, or faster-coco-eval is not installed.
    """
    if num_pairs < 1:
        raise BNextError.of("--pairs", "be 1 or more", got=num_pairs, remedy="Use 5.")
    engine = find_fast_engine()
    if engine is None:
        remedy = "pip install faster-coco-eval."
        raise BNextError.of("faster-coco-eval", "be installed", got="none that can be used", remedy=remedy)
    truth, detections = draw_set(*SIZES[name])

    seconds: dict[bool, list[float]] = {True: [], False: []}
    numbers: dict[bool, Any] = {}
    for index in track(range(num_pairs), name, unit="pair"):
        for is_fast in (True, False) if index % 2 == 0 else (False, True):
            gc.collect()  # what the other has left
            begin = time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):
                evaluation = measure(truth, detections, "bbox", engine=engine if is_fast else None)
            seconds[is_fast].append(time.process_time() - begin)
            numbers[is_fast] = evaluation.eval

    differences = [np.abs(numbers[True][key] - numbers[False][key]).max() for key in ("precision", "recall")]
    worst = float(max(differences))
    if not worst <= TOLERANCE:
        got = f"a difference of {worst:.2g}"
        raise BNextError.of("both libraries", "give the same numbers", got=got, where=name, remedy="Use pycocotools.")

    ratios = [slow / fast for fast, slow in zip(seconds[True], seconds[False], strict=True)]
    ours, other = statistics.median(seconds[True]), statistics.median(seconds[False])
    return Figure(name, ours, other, statistics.median(ratios), min(ratios), max(ratios), worst)


def format_figures(figures: Sequence[Figure]) -> str:
    rows = []
    for figure in figures:
        images, objects, categories, detections = SIZES[figure.name]
        size = f"{figure.name}: {images:,} images, {objects:,} objects of {categories} categories"
        size += f", {detections} detections each"
        ratio = f"{figure.median:.1f} ({figure.lowest:.1f} to {figure.highest:.1f})"
        rows.append([size, f"{figure.ours_s:.2f}", f"{figure.other_s:.2f}", ratio, f"{figure.difference:.0e}"])
    headers = ["boxes", "faster-coco-eval, s", "pycocotools, s", "ratio of pairs", "difference"]
    return format_rows(rows, headers)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 2 for a mistake that the user can mend."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m bench.evaluation_speed", description=__doc__, formatter_class=as_written
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--only", action="append", choices=list(SIZES), help="a size, may be repeated (default: all)")
    parser.add_argument("--pairs", type=int, default=5, metavar="N", help="of runs (default: %(default)s)")
    args = parser.parse_args(argv)
    return run_command(lambda: run(args.only or list(SIZES), args.pairs, args.json))


def run(names: Sequence[str], num_pairs: int, file: str | None) -> None:
    """Compare, print the table, and write it if a file is named."""
    figures = [compare(name, num_pairs) for name in names]
    print(format_figures(figures))
    if file is not None:
        write_figures(file, [asdict(figure) for figure in figures])


if __name__ == "__main__":
    sys.exit(main())

"""Seconds of whole runs besides what a GPU computes, and how they grow with records, norms and workers.

    python -m bench.whole_runs
    python -m bench.whole_runs --only records --only doctor --repeats 1

    commands      from the shell to the end of `--help`: what is imported
    records       the start of a training of RetinaNet R50-FPN on a set of COCO's shape (7 boxes an image, 80
                  categories; each picture is a link to the same one), with COCO's 5,000 images to evaluate:
                  checks; model and loader; the first batch of 2
    evaluation    COCO's metrics: records and evaluator; taking in 100 detections an image; the metrics
    doctor        the static doctor on that many norms, each behind a convolution: findings, and the text
    workers       gloo workers on loopback: start until all have met; that their configs, models and weights are the
                  same; norm buffers made equal
    collectives   kilobytes that a worker receives for the moments of as many groups as workers, 256 channels in
                  float32: gathered by all, or merged by the owner of each group; counted, nothing is run

Every measurement has a process of its own. Growth is the exponent of the size from one row to the next: 1 is linear.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench.record import write_figures
from bnext.cli.run_command import run_command
from bnext.errors import BNextError
from bnext.progress import track
from bnext.tables import format_rows

NUM_CATEGORIES, BOXES_PER_IMAGE, NUM_EVALUATED = 80, 7, 5_000
WIDTH, HEIGHT = 640, 480
NUM_CHANNELS = 256
Seconds = dict[str, float]  # stage -> its seconds


@dataclass(frozen=True)
class Figure:
    """Seconds of a stage.

    Args:
        name: what is measured.
        size: records, images, norms or workers; 0: it has none.
        stage: of it.
        median, lowest, highest: over processes; of collectives kilobytes, which are counted.
        growth: exponent of the size since the row before; None: there is none.
    """

    name: str
    size: int
    stage: str
    median: float
    lowest: float
    highest: float
    growth: float | None


class Clock:
    """Seconds of stages that follow one another."""

    def __init__(self) -> None:
        self.seconds: Seconds = {}

    @contextlib.contextmanager
    def timing(self, stage: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - begin


# ---- sets of COCO's shape


def write_pictures(folder: Path, number: int) -> None:
    """A picture and links to it."""
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.jpg")
    (folder / "pictures").mkdir()
    for index in range(number):
        os.symlink(folder / "picture.jpg", folder / "pictures" / f"{index:012d}.jpg")


def write_set(file: Path, num_images: int) -> None:
    """Annotations in COCO's format, drawn at random."""
    rng = np.random.default_rng(num_images)
    number = num_images * BOXES_PER_IMAGE
    corners, sides = rng.uniform(0, 380, (number, 2)), rng.uniform(8, 100, (number, 2))
    boxes = np.round(np.concatenate([corners, sides], 1), 2).tolist()
    owners, categories = rng.integers(num_images, size=number).tolist(), rng.integers(NUM_CATEGORIES, size=number)

    images = [{"id": i, "file_name": f"{i:012d}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(num_images)]
    annotations = []
    for index, (box, owner, category) in enumerate(zip(boxes, owners, categories.tolist(), strict=True)):
        place = {"id": index + 1, "image_id": owner, "category_id": category}
        annotations.append({**place, "bbox": box, "area": box[2] * box[3], "iscrowd": 0})
    names = [{"id": index, "name": f"category {index}"} for index in range(NUM_CATEGORIES)]
    file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": names}))


def load_cfg(folder: Path, train: int) -> Any:
    """RetinaNet on the sets of that many images and of those that are evaluated."""
    from bnext.config import load_config

    sets = []
    for name, number in (("coco_shaped_train", train), ("coco_shaped_val", NUM_EVALUATED)):
        file = folder / f"{number}.json"
        if not file.exists():
            write_set(file, number)
        sets.append({"name": name, "json": str(file), "folder": str(folder / "pictures")})

    values = {
        "DATASETS.BNEXT.COCO": repr(sets),
        "DATASETS.TRAIN": "('coco_shaped_train',)",
        "DATASETS.TEST": "('coco_shaped_val',)",
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "SOLVER.IMS_PER_BATCH": 2,
        "OUTPUT_DIR": str(folder / "output"),
    }
    return load_config("Base-RetinaNet.yaml", [str(word) for pair in values.items() for word in pair])


# ---- what is measured, in a process of its own: called as measure(size, folder)


def measure_records(size: int, folder: Path) -> Seconds:
    from bnext.cli.train import check_run
    from bnext.engine.trainer import Trainer

    cfg, clock = load_cfg(folder, size), Clock()
    with clock.timing("checks"):
        check_run(cfg)
    with clock.timing("model and loader"):
        trainer = Trainer(cfg)
    with clock.timing("first batch"):
        next(iter(trainer.data_loader))
    return clock.seconds


def measure_evaluation(size: int, folder: Path) -> Seconds:
    import torch
    from detectron2.structures import Boxes, Instances

    from bnext.data.listed_sets import register_listed_sets
    from bnext.data.records import load_records
    from bnext.evaluation.coco import build_evaluator

    cfg, clock = load_cfg(folder, size), Clock()
    register_listed_sets(cfg)
    with clock.timing("records and evaluator"):
        records = load_records("coco_shaped_train", cfg)
        evaluator = build_evaluator(cfg, "coco_shaped_train")
    evaluator.reset()

    torch.manual_seed(0)
    outputs = []
    for _ in records:
        corners = 380 * torch.rand(100, 2)
        instances = Instances((HEIGHT, WIDTH))
        instances.pred_boxes = Boxes(torch.cat([corners, corners + 100 * torch.rand(100, 2)], 1))
        instances.scores, instances.pred_classes = torch.rand(100), torch.randint(NUM_CATEGORIES, (100,))
        outputs.append({"instances": instances})

    with clock.timing("detections"):
        for record, output in zip(records, outputs, strict=True):
            evaluator.process([record], [output])
    with clock.timing("metrics"), contextlib.redirect_stdout(io.StringIO()):
        evaluator.evaluate()
    return clock.seconds


def measure_doctor(size: int, folder: Path) -> Seconds:
    from torch import nn

    from bnext.diagnostics.diagnose import diagnose

    blocks = [nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()) for _ in range(size)]
    model, clock = nn.Sequential(*blocks), Clock()
    with clock.timing("findings"):
        diagnosis = diagnose(model, depth="static")
    with clock.timing("text"):
        str(diagnosis)
    return clock.seconds


def measure_workers(size: int, folder: Path) -> Seconds:
    from torch.multiprocessing.spawn import start_processes

    begin = time.time()
    with tempfile.TemporaryDirectory() as place:
        start_processes(_work, (size, place, begin, load_cfg(folder, 1_000)), size, start_method="spawn")
        seconds: Seconds = json.loads(Path(place, "seconds").read_text())
    return seconds


def _work(rank: int, size: int, place: str, begin: float, cfg: Any) -> None:
    """One of the workers; the first writes its seconds."""
    import torch
    import torch.distributed as dist
    from detectron2.modeling import build_model

    from bnext.distributed.agreement import check_agreement, describe_parameters, describe_values
    from bnext.distributed.equal_buffers import equalize_buffers
    from bnext.engine.trainer import check_same_config

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=size)
    dist.barrier()
    clock = Clock()
    clock.seconds["start"] = time.time() - begin

    torch.manual_seed(0)
    model = build_model(cfg)
    dist.barrier()
    with clock.timing("same configs and models"):
        check_same_config(cfg)
        check_agreement("the models", describe_parameters(model), "")
    with clock.timing("same weights"):
        check_agreement("the weights", describe_values(model), "")
    with clock.timing("equal buffers"):
        equalize_buffers(model)

    if rank == 0:
        Path(place, "seconds").write_text(json.dumps(clock.seconds))
    dist.destroy_process_group()


# name -> sizes, and the function.
MEASURES: dict[str, tuple[tuple[int, ...], Callable[[int, Path], Seconds]]] = {
    "records": ((1_000, 10_000, 118_000), measure_records),
    "evaluation": ((500, NUM_EVALUATED), measure_evaluation),
    "doctor": ((10, 100, 1_000, 5_000), measure_doctor),
    "workers": ((2, 4), measure_workers),
}
COMMANDS = ((), ("train",), ("doctor",), ("check-data",))
NAMES = ("commands", *MEASURES, "collectives")


# ---- processes, and the table


def time_command(words: Sequence[str], num_repeats: int) -> list[Seconds]:
    """Seconds of `bnext ... --help`."""
    every = []
    for _ in range(num_repeats):
        begin = time.perf_counter()
        line = [sys.executable, "-m", "bnext", *words, "--help"]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        every.append({" ".join(line[2:]): time.perf_counter() - begin})
    return every


def time_processes(name: str, size: int, folder: Path, num_repeats: int) -> list[Seconds]:
    """Seconds of stages, from processes of their own."""
    every = []
    for _ in range(num_repeats):
        line = [sys.executable, "-m", "bench.whole_runs", "--measure", name, str(size), str(folder)]
        ended = subprocess.run(line, capture_output=True, text=True, check=False)
        if ended.returncode:
            got = " ".join(ended.stderr.strip().splitlines()[-1:])
            remedy = f"Run {' '.join(line[1:])}."
            raise BNextError.of("A measurement", "run to its end", got=got, where=f"{name} {size}", remedy=remedy)
        every.append(json.loads(ended.stdout.splitlines()[-1]))
    return every


def summarize(name: str, size: int, every: Sequence[Seconds], before: Sequence[Figure]) -> list[Figure]:
    """Figures of the stages of one size, with their growth since the last of them."""
    figures = []
    for stage in every[0]:
        seconds = [one[stage] for one in every]
        median = statistics.median(seconds)
        last = next((one for one in reversed(before) if (one.name, one.stage) == (name, stage)), None)
        growth = None if last is None else math.log(median / last.median) / math.log(size / last.size)
        figures.append(Figure(name, size, stage, median, min(seconds), max(seconds), growth))
    return figures


def count_collectives(num_workers: int) -> Seconds:
    """Kilobytes of both ways."""
    from bnext.distributed.moments import count_rows

    row = 4 * (2 * NUM_CHANNELS + 1) / 1000
    ways = {"gathered by all, KB": False, "by owners, KB": True}
    return {way: row * count_rows(num_workers, num_workers, by_owners=owners) for way, owners in ways.items()}


def format_figures(figures: Sequence[Figure]) -> str:
    rows = []
    for figure in figures:
        growth = "" if figure.growth is None else f"{figure.growth:.1f}"
        spread = "" if figure.lowest == figure.highest else f"{figure.lowest:.2f} to {figure.highest:.2f}"
        size = f"{figure.size:,}" if figure.size else ""
        rows.append([figure.name, figure.stage, size, f"{figure.median:.2f}", spread, growth])
    return format_rows(rows, ["run", "stage", "size", "seconds", "lowest to highest", "growth"], num_texts=2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status is 0, or 2 for a mistake that the user can mend."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench.whole_runs", description=__doc__, formatter_class=as_written)
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    parser.add_argument("--only", action="append", choices=NAMES, help="a run, may be repeated (default: all)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="of each (default: %(default)s)")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)

    if args.measure is not None:
        name, size, folder = args.measure
        print(json.dumps(MEASURES[name][1](int(size), Path(folder))))
        return 0
    return run_command(lambda: run(args.only or NAMES, args.repeats, args.json))


def run(names: Sequence[str], num_repeats: int, file: str | None) -> None:
    """Measure, print the table, and write it if a file is named."""
    if num_repeats < 1:
        raise BNextError.of("--repeats", "be 1 or more", got=num_repeats, remedy="Use 3.")

    figures: list[Figure] = []
    for words in COMMANDS if "commands" in names else ():
        figures += summarize("commands", 0, time_command(words, num_repeats), ())

    with tempfile.TemporaryDirectory(prefix="bnext-whole-runs-") as place:
        pairs = [(name, size) for name in MEASURES if name in names for size in MEASURES[name][0]]
        if pairs:
            write_pictures(Path(place), max(MEASURES["records"][0]))
        for name, size in track(pairs, "measuring", unit="size"):
            figures += summarize(name, size, time_processes(name, size, Path(place), num_repeats), figures)

    for size in (2, 4, 8, 16, 32, 64) if "collectives" in names else ():
        figures += summarize("collectives", size, [count_collectives(size)], figures)

    print(format_figures(figures))
    if file is not None:
        write_figures(file, [asdict(figure) for figure in figures])


if __name__ == "__main__":
    sys.exit(main())

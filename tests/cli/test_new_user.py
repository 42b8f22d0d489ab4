"""A new user: the wheel, pictures and a config of his own, a folder outside of this repository, and `bnext` alone."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image, ImageDraw

from tests.cli.installed import build, make_environment, run

SHAPES = ("square", "disc", "triangle")
CONFIG = """
_BASE_: Digits-Detection/retinanet_R_18_FPN_BN.yaml  # of the package
MODEL:
  FPN: {OUT_CHANNELS: 16}
  RETINANET: {NUM_CLASSES: 3, NUM_CONVS: 1, SCORE_THRESH_TEST: 0.01}
DATASETS:
  BNEXT:
    COCO:
      - {name: shapes_train, json: shapes/train.json, folder: shapes/train}
      - {name: shapes_val, json: shapes/val.json, folder: shapes/val}
  TRAIN: [shapes_train]
  TEST: [shapes_val]
INPUT: {MIN_SIZE_TRAIN: [64], MIN_SIZE_TEST: 64, MAX_SIZE_TRAIN: 96, MAX_SIZE_TEST: 96}
SOLVER: {IMS_PER_BATCH: 4, MAX_ITER: 30, WARMUP_ITERS: 5, CHECKPOINT_PERIOD: 15}
TEST: {PRECISE_BN: {NUM_ITER: 3}}
OUTPUT_DIR: output/mine
"""
LAZY_CONFIG = """
from detectron2.config import LazyConfig
from detectron2.layers import ShapeSpec

import bnext

base = LazyConfig.load(bnext.get_config_file("Digits-Detection/retinanet_R_18_FPN.py"))
model, dataloader, optimizer, lr_multiplier, train = (
    base[name] for name in ("model", "dataloader", "optimizer", "lr_multiplier", "train")
)

model.num_classes = 3
model.backbone.out_channels = 16
model.head.input_shape = [ShapeSpec(channels=16)] * 5
model.head.conv_dims = [16]
model.test_score_thresh = 0.01
norms = dict(RESNETS=dict(NORM="BN"), RETINANET=dict(NORM="BN", POPULATION="shared"))

dataloader.train.dataset.names, dataloader.test.dataset.names = "shapes_train", "shapes_val"
dataloader.train.total_batch_size = 4
for part in (dataloader.train, dataloader.test):
    part.mapper.augmentations[0].update(short_edge_length=64, max_size=96)

train.update(max_iter=30, output_dir="output/mine", checkpointer=dict(period=15))
keys = {
    "TEST.PRECISE_BN.NUM_ITER": 3,
    "DATASETS.BNEXT.COCO": [
        dict(name="shapes_train", json="shapes/train.json", folder="shapes/train"),
        dict(name="shapes_val", json="shapes/val.json", folder="shapes/val"),
    ],
}
"""


@dataclasses.dataclass(frozen=True)
class Door:
    """A kind of config: its file, where it trains, and how weights and the population of the head are given."""

    name: str
    text: str
    weights: str
    population: str
    pairs: str

    def load(self, file: str) -> list[str]:
        return f"{self.weights}{self.pairs}{file}".split(" ")

    def per_level(self) -> list[str]:
        return f"{self.population}{self.pairs}per_level".split(" ")


DOORS = (
    Door("mine.yaml", CONFIG, "MODEL.WEIGHTS", "MODEL.BNEXT.RETINANET.POPULATION", " "),
    Door("mine.py", LAZY_CONFIG, "train.init_checkpoint", "norms.RETINANET.POPULATION", "="),
)


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    return make_environment(folder / "environment", build("wheel", folder))


@pytest.fixture
def home(tmp_path):
    """A folder with pictures of drawn shapes."""
    for split, number in (("train", 24), ("val", 6)):
        draw_set(tmp_path / "shapes", split, number)
    return tmp_path


def draw_set(folder: Path, split: str, number: int) -> None:
    random = np.random.default_rng(len(split))
    (folder / split).mkdir(parents=True)
    images, annotations = [], []

    for index in range(number):
        noise = random.integers(0, 90, (64, 80, 3), dtype=np.uint8)
        picture = Image.fromarray(noise)
        for _ in range(3):
            shape, side = int(random.integers(3)), int(random.integers(12, 40))
            left, top = int(random.integers(80 - side)), int(random.integers(64 - side))
            draw_shape(ImageDraw.Draw(picture), SHAPES[shape], left, top, side)
            box = {"bbox": [left, top, side, side], "area": side * side, "iscrowd": 0}
            annotations.append({"id": len(annotations) + 1, "image_id": index, "category_id": shape + 1, **box})

        picture.save(folder / split / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "width": 80, "height": 64})

    categories = [{"id": index + 1, "name": name} for index, name in enumerate(SHAPES)]
    text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
    (folder / f"{split}.json").write_text(text)


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, left: int, top: int, side: int) -> None:
    corners = [left, top, left + side, top + side]
    if shape == "square":
        draw.rectangle(corners, fill=(220, 60, 60))
    elif shape == "disc":
        draw.ellipse(corners, fill=(60, 220, 60))
    else:
        draw.polygon([(left, top + side), (left + side, top + side), (left + side // 2, top)], fill=(60, 60, 220))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.name)
def test_from_training_to_export_by_one_command(programs, home, door):
    (home / door.name).write_text(door.text)
    final, repaired = "output/mine/model_final.pth", "repaired.pth"

    def bnext(command, *words, **options):
        return run(programs, home, "bnext", command, "--config-file", door.name, *words, **options)

    bnext("check-data")
    bnext("train")
    assert (home / final).is_file()
    assert "AP" in bnext("evaluate", *door.load(final))

    said = bnext("reestimate", "--population", "per_level", "--output", repaired, *door.load(final))
    assert "POPULATION" in said
    bnext("evaluate", *door.load(repaired), *door.per_level())

    kinds = ["--kinds", "moving_average", "per_level"]
    bnext("compare", "--output", "compared", *kinds, *door.load(final))
    assert {"statistics.json", "statistics.png"} <= {path.name for path in (home / "compared").iterdir()}

    bnext("draw", "--output", "boxes.png", "--score", "0.05", *kinds, *door.load(final))
    with Image.open(home / "boxes.png") as picture:
        assert picture.width > 100

    bnext("export", "--output", "model.onnx", "--fold", *door.load(repaired), *door.per_level())
    session = onnxruntime.InferenceSession(home / "model.onnx", providers=["CPUExecutionProvider"])
    boxes, *_ = session.run(None, {"image": np.zeros((3, 64, 96), np.float32)})
    assert [output.name for output in session.get_outputs()] == ["pred_boxes", "pred_classes", "scores", "image_size"]
    assert boxes.shape[1:] == (4,)

    bnext("convert", "--output", "plain.pth", *door.load(repaired))
    assert "head.cls_subnet.1.running_mean" in torch.load(home / "plain.pth")["model"]
    line = bnext("convert", "--output", "plain.pth", *door.load(repaired), status=2)
    assert "plain.pth" in line.splitlines()[-1]


def test_the_wheel_is_a_whole_package(programs, tmp_path):
    """Its configs, its types, the installer; and that what runs is the wheel, not this checkout."""
    code = textwrap.dedent("""
        import sys
        import bnext
        from importlib.resources import files

        assert "environment" in bnext.__file__, bnext.__file__
        assert "torch" not in sys.modules
        package = files("bnext")
        for name in ("py.typed", "__init__.pyi", "cli/install_detectron2.py", "configs/Base-RetinaNet.yaml",
                     "diagnostics/reports/page/report.js"):
            assert package.joinpath(name).is_file(), name
    """)
    run(programs, tmp_path, "python", "-c", code)
    assert "bnext" in run(programs, tmp_path, "bnext", "--version")


@pytest.mark.slow
def test_the_source_archive_can_be_tested(tmp_path):
    """From the unpacked archive, with the environment of these tests."""
    archive = build("sdist", tmp_path)
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    for name in ("constraints.txt", "CITATION.cff", "docs/index.md", "tools/train_net.py", "configs/README.md"):
        assert (source / name).is_file(), name
    assert not list(source.glob("**/*.pth"))

    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_import.py",
        "-k",
        "torch_only",
    ]
    variables = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run(command, cwd=source, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "1 passed" in done.stdout

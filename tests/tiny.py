"""A training in seconds: twelve small digit images and the RetinaNet of tiny.yaml, or the R-CNN of tiny_rcnn.yaml."""

import contextlib
import json
import os
from pathlib import Path

from detectron2.engine.hooks import CallbackHook

from bnext.config import load_config
from bnext.data.catalog import register_datasets
from bnext.data.digits import prepare_digits
from bnext.data.digits_images import DigitsRecipe
from bnext.engine import Trainer

CONFIG = Path(__file__).with_name("tiny.yaml")
RCNN = Path(__file__).with_name("tiny_rcnn.yaml")
LAZY = Path(__file__).with_name("tiny_lazy.py")
ROOT = Path(__file__).parents[1]
# Back to the defaults, for a head of tiny.yaml without a batch norm of bnext.
NO_LEVELS = ("MODEL.BNEXT.RETINANET.STATISTICS", "per_level", "MODEL.BNEXT.RETINANET.POPULATION", "per_level")
NO_LEVELS += ("MODEL.BNEXT.RETINANET.AFFINE", "shared")


def prepare(root):
    """Make the digits set in a folder and let the catalog point to it."""
    recipe = DigitsRecipe(num_train=12, num_val=4, image_side=64, max_objects=3, scale_range=(0.2, 0.9))
    prepare_digits(root, recipe, progress=False)
    register(root)


def register(root):
    """Let the catalog point to a folder of data sets."""
    os.environ["DETECTRON2_DATASETS"] = str(root)
    register_datasets()


def load(output, *opts, config=CONFIG):
    """The config of tiny.yaml, or of another file, with an output directory and overrides."""
    return load_config(str(config), ["OUTPUT_DIR", str(output), *map(str, opts)])


def read_metrics(output):
    """metrics.json without what depends on the clock."""
    lines = [json.loads(line) for line in Path(output, "metrics.json").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "time" not in key and "eta" not in key} for line in lines]


def train_until(cfg, iteration):
    """Train and stop before an iteration, as Ctrl-C would."""

    def stop(trainer):
        if trainer.iter == iteration:
            raise KeyboardInterrupt

    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.register_hooks([CallbackHook(before_step=stop)])
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train()

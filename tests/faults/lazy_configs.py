"""LazyConfigs that are damaged: lines that follow those of tests/tiny_lazy.py, refused, told, or trained."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import numpy as np

from tests import tiny
from tests.faults import use
from tests.faults.attempt import Attempt, Outcome

__all__ = ["LAZY_FAULTS", "make_attempt", "train_with"]


@dataclasses.dataclass(frozen=True)
class LazyFault:
    """Lines of a LazyConfig, the words that a message may name, and whether it must fail."""

    name: str
    lines: str
    words: tuple[str, ...]
    is_wrong: bool = True


LAZY_FAULTS = (
    LazyFault("no model", "del model", ("model",)),
    LazyFault("a model of another name", "modle = model\ndel model", ("modle",)),
    LazyFault("a model that is built", "from torch import nn\nmodel = nn.Linear(1, 1)", ("model",)),
    LazyFault("a model that is none of torch's", "model = L(ShapeSpec)(channels=1)", ("model", "ShapeSpec")),
    LazyFault("an argument", "model.head.nrom = 'BN'", ("model.head.nrom",)),
    LazyFault("an argument that is missing", "del model.head.conv_dims", ("conv_dims", "RetinaNetHead")),
    LazyFault("a target", "model.head._target_ = 'detectron2.modeling.RetinaHead'", ("model.head._target_",)),
    LazyFault("a value that is missing", "model.num_classes = '???'", ("num_classes",)),
    LazyFault("a reference to nothing", "model.head.num_classes = '${absent.key}'", ("model.head.num_classes",)),
    LazyFault("classes of another data set", "model.num_classes = 80", ("model.num_classes",)),
    LazyFault("no optimizer", "del optimizer", ("optimizer",)),
    LazyFault("an optimizer that is a number", "optimizer = dict(lr=0.1)", ("optimizer",)),
    LazyFault("no schedule", "lr_multiplier = dict(a=1)", ("lr_multiplier",)),
    LazyFault("no data", "del dataloader", ("dataloader", "DATASETS.TRAIN")),
    LazyFault("no mapper", "del dataloader.train.mapper", ("train.mapper",)),
    LazyFault("a mapper that fails", "dataloader.train.mapper._target_ = len", ("mapper", "len", "is_train")),
    LazyFault("a set", "dataloader.train.dataset.names = 'digits_trian'", ("digits_trian",)),
    LazyFault(
        "no iterations", "train.max_iter = None\ntrain.checkpointer.period = 'x'", ("train.checkpointer.period",)
    ),
    LazyFault("a place", "norms['HEAD'] = dict(NORM='BN')", ("HEAD",)),
    LazyFault("a place that it has not", "norms['RPN'] = dict(NORM='BN')", ("norms.RPN",)),
    LazyFault("a norm", "norms['RETINANET']['NORM'] = 'GhostBN'", ("GhostBN", "norms.RETINANET.NORM")),
    LazyFault("a key", "keys = {'SOLVER.BASE_LR': 0.1}", ("SOLVER.BASE_LR",)),
    LazyFault("an exception", "1 / 0", ("config.py", "ZeroDivisionError")),
    LazyFault("torn", "model = L(", ("config.py", "SyntaxError")),
    LazyFault("an unheeded key", "train.clip = 3", ("train.clip",)),
    LazyFault("nothing", "", (), is_wrong=False),
    LazyFault("a helper", "own = dict(a=[1, 2])\nfrom functools import partial", (), is_wrong=False),
)


def make_attempt(draw: np.random.Generator) -> Attempt:
    """A training with one of them."""
    fault = LAZY_FAULTS[int(draw.integers(len(LAZY_FAULTS)))]
    return Attempt(f"LazyConfig: {fault.name}", partial(train_with, fault))


def train_with(fault: LazyFault, folder: Path) -> Outcome:
    tiny.prepare(folder / "data")
    file = folder / "config.py"
    file.write_text(f"{tiny.LAZY.read_text()}\n{fault.lines}\n")

    run = use.train(folder / "output", config=str(file))
    return use.judge(run, folder / "output", fault.words, must_be_told=fault.is_wrong)

"""A training from Python with parts of one's own: each takes part, a resume is exact, and what is none is refused."""

import pickle
import sys

import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.events import EventWriter, get_event_storage

import bnext
from bnext.engine import Trainer
from bnext.engine.launch import pickle_work
from bnext.engine.own_parts import OwnParts
from bnext.errors import BNextError, ConfigError, LaunchError
from tests import tiny

SHORT = ("SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", 2)
BEST = ("TEST.EVAL_PERIOD", 2, "TEST.BNEXT.BEST.METRIC", "count/images")


class Mapper:
    """Random flips, and a count of the records."""

    def __init__(self, cfg):
        self.mapper = DatasetMapper(cfg, True, augmentations=[T.RandomFlip(), T.ResizeShortestEdge(48)])
        self.seen = []

    def __call__(self, record):
        self.seen.append(record["image_id"])
        return self.mapper(record)


class Doubts(HookBase):
    """Puts a scalar, and ends the training before a step."""

    def __init__(self, stop=None):
        self.stop = stop

    def before_step(self):
        if self.trainer.iter == self.stop:
            raise KeyboardInterrupt

    def after_step(self):
        get_event_storage().put_scalar("doubt", self.trainer.iter / 2, smoothing_hint=False)


class Notes(EventWriter):
    def __init__(self, lines):
        self.lines = lines

    def write(self):
        self.lines.append(get_event_storage().latest().get("doubt"))


class Counts(DatasetEvaluator):
    """The number of images, as a metric."""

    def __init__(self, unit=1.0):
        self.unit, self.number = unit, 0

    def reset(self):
        self.number = 0

    def process(self, inputs, outputs):
        self.number += len(inputs)

    def evaluate(self):
        return {"count": {"images": self.number * self.unit}}


class FastTrainer(Trainer):
    @classmethod
    def build_optimizer(cls, cfg, model):
        return torch.optim.SGD(model.parameters(), lr=0.01, nesterov=True, momentum=0.5)


def load_state(folder):
    return torch.load(folder / "model_final.pth")


def test_all_parts_take_part_and_a_resume_is_exact(digits, tmp_path):
    lines, states = [], []

    for name, stop in (("whole", None), ("resumed", 3)):
        cfg = tiny.load(tmp_path / name, *SHORT, *BEST)
        mapper = Mapper(cfg)
        parts = {"mapper": mapper, "trainer": FastTrainer, "evaluator": lambda cfg, name: Counts(len(name))}
        if stop is not None:
            with pytest.raises(KeyboardInterrupt, match="--resume goes on"):
                bnext.train(cfg, hooks=[Doubts(stop)], **parts)
        results = bnext.train(
            cfg, hooks=[lambda cfg: Doubts()], writers=[Notes(lines)], resume=stop is not None, **parts
        )
        states.append(load_state(tmp_path / name))

        assert results == {"count": {"images": 40}}  # 4 images, 10 letters in digits_val
        assert (tmp_path / name / "model_best.pth").exists()
        assert len(mapper.seen) >= 8
        assert [line["doubt"] for line in tiny.read_metrics(tmp_path / name) if "doubt" in line][-1] == 1.5

    assert set(lines) == {(1.5, 3)}
    whole, resumed = (state["model"] for state in states)
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []
    assert states[0]["trainer"]["_trainer"]["optimizer"]["param_groups"][0]["nesterov"]

    cfg = tiny.load(tmp_path / "evaluated", "MODEL.WEIGHTS", tmp_path / "whole/model_final.pth")
    assert bnext.evaluate(cfg, evaluator=Counts()) == {"count": {"images": 4}}, "an object evaluates, too"


@pytest.mark.parametrize(
    ("parts", "named"),
    [
        ({"mapper": Mapper}, "the class Mapper"),
        ({"mapper": 7}, "type int"),
        ({"hooks": Doubts()}, "type Doubts"),
        ({"hooks": [3]}, "type int"),
        ({"writers": [Doubts()]}, "type Doubts"),
        ({"writers": Notes([])}, "type Notes"),
        ({"evaluator": "coco"}, "type str"),
        ({"trainer": DefaultTrainer}, "the class DefaultTrainer"),
        ({"trainer": 3}, "type int"),
        ({"mapper": len, "trainer": type("Loads", (Trainer,), {"build_train_loader": staticmethod(len)})}, "Loads"),
        ({"evaluator": len, "trainer": type("Tests", (Trainer,), {"test": classmethod(len)})}, "Tests.test"),
    ],
)
def test_what_is_no_such_part_is_refused(parts, named):
    with pytest.raises(ConfigError) as refused:
        OwnParts(**parts)
    assert named in str(refused.value)


def test_what_a_function_makes_is_looked_at_before_training(digits, tmp_path):
    cfg = tiny.load(tmp_path, *SHORT)
    for parts in ({"writers": lambda cfg: [3]}, {"evaluator": lambda cfg, name: 3}):
        with pytest.raises(BNextError, match="type int"):
            bnext.train(cfg, **parts)
    assert not (tmp_path / "model_final.pth").exists()


def test_a_function_that_makes_an_evaluator_keeps_its_own_defaults():
    """The folder for detections is for a third argument that is one; it would be a unit here."""

    def build_folder(cfg, name, output_folder=None):
        return Counts(output_folder)

    def build_third(cfg, name, folder):
        return Counts(folder)

    functions = {lambda cfg, name, unit=3.0: Counts(unit): 3.0, build_folder: "out", build_third: "out"}
    for build, unit in functions.items():
        evaluator = OwnParts(evaluator=build).build_trainer().build_evaluator(None, "set", "out")
        assert evaluator.unit == unit


@pytest.mark.parametrize("part", [{"mapper": lambda record: record}, {"writers": [Notes(sys.stdout)]}])
def test_what_workers_cannot_be_given_is_refused(part):
    with pytest.raises(LaunchError, match="picklable"):
        pickle_work(print, (OwnParts(**part),))


def test_workers_are_given_what_can_be_pickled():
    _, main, args = pickle.loads(pickle_work(print, (OwnParts(hooks=[Doubts(3)]),)))
    assert main is print
    assert args[0].hooks[0].stop == 3


@pytest.mark.parametrize(("cfg", "named"), [("my.yaml", "bnext.load_config('my.yaml')"), (None, "bnext.load_config")])
def test_a_config_that_is_none_is_refused(cfg, named):
    with pytest.raises(ConfigError) as refused:
        bnext.train(cfg)
    assert named in str(refused.value)

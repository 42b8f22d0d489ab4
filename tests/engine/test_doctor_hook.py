"""The doctor in a training: what it sees, and what it says.

Whole trainings are elsewhere: bitwise the one without it in test_trainer.py, among other hooks in two_workers.py.
"""

import logging
import time

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.engine import hooks as d2_hooks
from detectron2.engine.hooks import CallbackHook
from torch import nn

from bnext import notices
from bnext.config.files import get_config_file
from bnext.diagnostics.diagnose import Diagnosis
from bnext.diagnostics.findings import Evidence, Finding, Remedy
from bnext.diagnostics.registry import find_checks
from bnext.engine import Trainer, doctor_hook
from bnext.engine.doctor_hook import DoctorHook
from tests import tiny


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    def forward(self, image):
        return {"loss": self.layers(image).square().mean()}


def make_data(number=30):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 4, 4, generator=generator) for _ in range(number)]


def run(*others, doctor=None, num_steps=25):
    """A training by detectron2's own loop, with the doctor after other hooks, as a user registers it."""
    model = Net()
    trainer = SimpleTrainer(model, make_data(), torch.optim.SGD(model.parameters(), 0.1))
    trainer.register_hooks([*others, doctor])
    trainer.train(0, num_steps)
    return model


@pytest.fixture
def said(bnext_log, monkeypatch):
    """Lines of the doctor, which has said nothing in this process yet."""
    monkeypatch.setattr(notices, "_told_names", set())
    bnext_log.set_level(logging.DEBUG, "bnext")
    return lambda: {r.getMessage() for r in bnext_log.records if r.name == doctor_hook.__name__}


def validate(trainer):
    """As people do: in training mode, for the losses."""
    if (trainer.iter + 1) % 10 == 0:
        with torch.no_grad():
            trainer.model(make_data(1)[0])


def test_sees_the_steps_of_any_trainer(said):
    doctor = DoctorHook()
    model = run(doctor=doctor)
    facts = doctor.diagnosis.facts

    assert (facts.steps.num_steps, facts.steps.num_forwards) == (25, 25)
    assert facts.steps.updates == {"layers.1": 25}
    assert facts.steps.changed_between == {}
    assert facts.training.weight_decay == {"layers.1": 0.0}
    assert said() == set()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert doctor.seconds > 0


def test_finds_a_validation_in_training_mode_whatever_the_order_of_hooks(said):
    doctor = DoctorHook()
    run(CallbackHook(after_step=validate), doctor=doctor)

    assert doctor.diagnosis.facts.steps.changed_between == {"layers.1": 9}
    (line,) = said()
    assert line.startswith("BN025: ")


def test_an_estimate_by_detectron2s_hook_is_on_purpose(said):
    model, doctor = Net(), DoctorHook()
    trainer = SimpleTrainer(model, make_data(), torch.optim.SGD(model.parameters(), 0.1))
    trainer.register_hooks([d2_hooks.PreciseBN(10, model, make_data(), num_iter=2), doctor])
    trainer.train(0, 25)

    assert doctor.diagnosis.facts.steps.changed_between == {}
    assert doctor.diagnosis.facts.steps.updates == {"layers.1": 25}
    assert said() == set()


def test_an_optimizer_that_tells_nothing_ends_its_steps_with_the_iteration():
    class Plain:
        def __init__(self):
            self.param_groups = []

        def zero_grad(self):
            pass

        def step(self):
            pass

    model, doctor = Net(), DoctorHook()
    trainer = SimpleTrainer(model, make_data(), Plain())
    trainer.register_hooks([doctor])
    trainer.train(0, 3)

    assert doctor.diagnosis.facts.steps.updates == {"layers.1": 3}


def test_looks_after_20_steps_then_every_period_and_at_the_end(monkeypatch):
    looks = []
    monkeypatch.setattr(DoctorHook, "_examine", lambda self, watch: looks.append(self.trainer.iter))
    run(doctor=DoctorHook(period=12), num_steps=30)

    assert looks == [11, 19, 23, 30]


def test_a_doctor_that_fails_ends_no_training(said, monkeypatch):
    monkeypatch.setattr(doctor_hook, "collect_facts", lambda *_, **__: 1 / 0)
    run(doctor=DoctorHook())

    assert said() == {"The doctor failed."}


def test_a_doctor_that_fails_leaves_nothing_in_the_training(monkeypatch):
    monkeypatch.setattr(doctor_hook, "collect_facts", lambda *_, **__: 1 / 0)
    hooked = []

    def see(trainer):
        modules = [module for module in trainer.model.modules() if module._forward_hooks or module._forward_pre_hooks]
        hooked.append((trainer.iter, len(modules), len(trainer.optimizer._optimizer_step_post_hooks)))

    run(CallbackHook(before_step=see), doctor=DoctorHook())

    assert hooked[1] == (1, 2, 1)
    assert hooked[20] == (20, 0, 0), "it has failed after 20 steps"


def test_says_the_same_of_other_norms_but_not_again_of_fewer(said, monkeypatch, bnext_log):
    """Whether a norm is past a threshold changes from look to look."""
    looks = iter([("a", "b"), ("a",), ("b", "c"), ("c", "a"), ("c",)])
    check = next(iter(find_checks().values()))

    def examine(facts):
        return Diagnosis(facts, (Finding(check, Evidence("warning", next(looks), "Tired.", Remedy("Rest."))),))

    monkeypatch.setattr(doctor_hook, "examine_facts", examine)
    run(doctor=DoctorHook(period=5), num_steps=20)

    assert len({id(r) for r in bnext_log.records if r.levelno == logging.WARNING}) == 2


@pytest.mark.slow
@pytest.mark.timeout(600)  # one thread, and maybe others on the same cores
def test_takes_2_percent_of_100_iterations_at_most(digits, tmp_path):
    """Those of the digits config, on few images."""
    opts = ("DATASETS.TRAIN", ("digits_train",), "DATASETS.TEST", (), "SOLVER.MAX_ITER", 100, "SOLVER.STEPS", ())
    config = get_config_file("Digits-Detection/retinanet_R_18_FPN_BN.yaml")
    trainer = Trainer(tiny.load(tmp_path, *opts, "SOLVER.IMS_PER_BATCH", 4, config=config))
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start

    (doctor,) = (hook for hook in trainer._hooks if isinstance(hook, DoctorHook))
    print(f"The doctor took {doctor.seconds:.2f} of {seconds:.0f} s.")
    assert 0 < doctor.seconds < 0.02 * seconds

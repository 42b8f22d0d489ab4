"""Adversarial images: against textbook PGD, within their bounds, and without a trace in the model."""

import copy
import random

import numpy as np
import pytest
import torch
from detectron2.structures import ImageList
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn import functional as F

from bnext import make_adversarial
from bnext.errors import BNextError, ConfigError, DatasetError, StatisticsError
from bnext.evaluation.adversarial import choose_step_size
from bnext.heads import tell_domains
from bnext.layers import BatchNorm2d, NormSpec
from bnext.scope.domain import get_active_domain, use_domain
from tests.heads.detectors import make_batch, make_detector, make_model
from tests.reference import ascend_projected

ARCHITECTURES = {
    "retinanet": lambda: make_detector("BNextRetinaNet"),
    "fcos": lambda: make_detector("BNextFCOS"),
    "rcnn": lambda: make_model(architecture="BNextGeneralizedRCNN"),
}


class Net(nn.Module):
    """Two losses of images that are normalized and padded as detectron2 does it, behind a norm."""

    def __init__(self, workers="one"):
        super().__init__()
        torch.manual_seed(0)
        norm = BatchNorm2d(4, NormSpec(workers=workers))
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), norm, nn.ReLU()).double()
        self.domains = []

    def forward(self, batch):
        images = [(record["image"] - 100) / 50 for record in batch]
        return self.compute_losses(ImageList.from_tensors(images).tensor, batch)

    def compute_losses(self, images, batch):
        self.domains.append(get_active_domain())
        outputs = self.backbone(images).mean((2, 3))
        targets = torch.stack([record["instances"] for record in batch])
        return {"loss_cls": (outputs[:, :2] - targets).square().mean(), "loss_box_reg": outputs[:, 2:].abs().mean()}


def make_records(*sides, seed=1):
    generator = torch.Generator().manual_seed(seed)
    records = []
    for side in sides:
        image = torch.rand(3, side, side, dtype=torch.float64, generator=generator) * 255
        records.append({"image": image, "instances": torch.rand(2, dtype=torch.float64, generator=generator)})
    return records


@pytest.mark.parametrize(("loss", "steps"), [("total", 1), ("classification", 3), ("localization", 3)])
def test_it_is_textbook_pgd(loss, steps):
    model, batch = Net().train(), make_records(5, 4)
    names = {"classification": ["loss_cls"], "localization": ["loss_box_reg"]}.get(loss, ["loss_cls", "loss_box_reg"])

    def compute_loss(images):
        padded = [F.pad((image - 100) / 50, (0, 5 - image.shape[2], 0, 5 - image.shape[1])) for image in images]
        losses = copy.deepcopy(model).compute_losses(torch.stack(padded), batch)
        return sum(losses[name] for name in names)

    expected = ascend_projected(compute_loss, [record["image"] for record in batch], 6, steps, 2.5)
    copies = make_adversarial(model, batch, epsilon=6, steps=steps, step_size=2.5, loss=loss)
    for record, right in zip(copies, expected, strict=True):
        torch.testing.assert_close(record["image"], right, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "kind", ["retinanet", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("fcos", "rcnn"))]
)
def test_the_loss_rises_within_the_bounds_and_nothing_else_changes(kind):
    model, batch = ARCHITECTURES[kind]().train(), make_batch((64, 96))
    batch[0]["image"] = batch[0]["image"].to(torch.uint8)
    with EventStorage():
        sum(model(batch).values()).backward()  # gradients and a moving average to be kept
    originals, attributes = copy.deepcopy(batch), [dict(vars(module)) for module in model.modules()]
    state, gradients = copy.deepcopy(model.state_dict()), [copy.deepcopy(p.grad) for p in model.parameters()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    expected = random.random(), np.random.rand(), float(torch.rand(()))  # noqa: NPY002
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002

    def measure(images):
        torch.manual_seed(3)
        with torch.no_grad(), EventStorage():
            return sum(float(loss) for loss in copy.deepcopy(model)(images).values())

    with EventStorage() as storage:
        copies = make_adversarial(model, batch, epsilon=3, steps=2)
        with pytest.raises(KeyError):
            make_adversarial(model, batch, forward=fail)
        assert not storage.histories()

    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected  # noqa: NPY002
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, state[name])] == []
    assert [dict(vars(module)) for module in model.modules()] == attributes
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert (parameter.grad is None and gradient is None) or torch.equal(parameter.grad, gradient)
    for record, original, moved in zip(batch, originals, copies, strict=True):
        assert torch.equal(record["image"], original["image"])
        assert record["image"].dtype == original["image"].dtype
        assert moved["instances"] is record["instances"]
        assert 0 < float((moved["image"] - record["image"]).abs().max()) <= 3.0001
        assert 0 <= float(moved["image"].min()) <= float(moved["image"].max()) <= 255
    assert measure(copies) > measure(batch)
    again = make_adversarial(model, batch, epsilon=3, steps=2)
    assert all(torch.equal(one["image"], other["image"]) for one, other in zip(copies, again, strict=True))


def fail(model, batch):
    model(batch)
    random.random(), np.random.rand(), torch.rand(())  # noqa: NPY002
    raise KeyError("on purpose")


def test_the_stronger_attack_is_the_one_with_the_larger_total():
    model, chosen = Net(), set()
    for seed in range(12):
        batch = make_records(4, 4, seed=seed)
        attacks = {kind: make_adversarial(model, batch, loss=kind) for kind in ("classification", "localization")}
        with torch.no_grad():
            totals = {kind: float(sum(copy.deepcopy(model)(images).values())) for kind, images in attacks.items()}
        best = max(totals, key=totals.get)
        stronger = make_adversarial(model, batch, loss="stronger")
        assert torch.equal(stronger[0]["image"], attacks[best][0]["image"])
        chosen.add(best)
    assert chosen == {"classification", "localization"}


def test_what_normalizes_in_the_attack():
    """The mini-batch, or the population; in the domain of the copies, or in that of the images."""
    model, batch = Net(), make_records(4, 4)
    model.backbone[1].running_mean += 3
    by_mini_batch, by_population = (
        make_adversarial(model, batch, statistics=kind)[0]["image"] for kind in ("mini_batch", "population")
    )
    assert not torch.equal(by_mini_batch, by_population)
    alone = make_adversarial(model, batch[:1], statistics="population")[0]["image"]
    assert torch.equal(alone, by_population)

    detector, domains = make_detector(), []
    tell_domains(detector)
    detector.backbone.register_forward_pre_hook(lambda *_: domains.append(get_active_domain()))
    records = [{**record, "domain": "day"} for record in make_batch()]
    assert [copy["domain"] for copy in make_adversarial(detector, records)] == ["day", "day"]
    with use_domain("night"):
        assert [copy["domain"] for copy in make_adversarial(detector, records, domain="attacked")] == ["attacked"] * 2
    assert domains == ["day", "attacked"]


def test_steps_reach_the_bound():
    assert [choose_step_size(4, steps) for steps in (1, 2, 5)] == [4, 2.5, 1]


@pytest.mark.parametrize(
    ("kind", "named", "changes"),
    [
        (ConfigError, "epsilon", {"epsilon": 0}),
        (ConfigError, "epsilon", {"epsilon": -1.0}),
        (ConfigError, "epsilon", {"epsilon": float("nan")}),
        (ConfigError, "steps", {"steps": 0}),
        (ConfigError, "step_size", {"step_size": 0}),
        (ConfigError, "loss", {"loss": "mask"}),
        (ConfigError, "statistics", {"statistics": "batch"}),
        (DatasetError, "instances", {"batch": [{"image": torch.zeros(3, 4, 4)}]}),
        (DatasetError, "pixel values", {"batch": [{"image": torch.full((3, 4, 4), -1.0), "instances": ()}]}),
        (DatasetError, "list of records", {"batch": []}),
        (StatisticsError, "backbone", {"model": nn.Sequential(nn.Identity())}),
        (StatisticsError, "dictionary of losses", {"forward": lambda model, batch: [model(batch)]}),
        (StatisticsError, "loss_score", {"forward": lambda model, batch: {"loss_score": model(batch)["loss_cls"]},
                                         "loss": "localization"}),
        (StatisticsError, "constant", {"forward": lambda model, batch: model(batch)["loss_cls"].detach()}),
        (StatisticsError, "for 2 images", {"forward": lambda model, batch: model(batch[:1])}),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(kind, named, changes):
    arguments = {"model": Net(), "batch": make_records(4, 4), **changes}
    with pytest.raises(kind, match=named) as caught:
        make_adversarial(arguments.pop("model"), arguments.pop("batch"), **arguments)
    assert isinstance(caught.value, BNextError)

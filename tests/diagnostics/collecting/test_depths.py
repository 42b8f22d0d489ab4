"""`diagnose` on data: any form of batches, nothing of the model changed, failures told."""

import pytest
import torch
import torchvision
from torch import nn

from bnext import NormSpec, diagnose
from bnext.diagnostics.collecting.batches import list_images, take_one
from bnext.errors import ConfigError, StatisticsError
from bnext.layers import BatchNorm2d


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(64, 2))


def make_pairs(number=6):
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 6, 6, generator=generator), torch.arange(8) % 2) for _ in range(number)]


def take_inputs(model, batch):
    return model(batch[0])


def measure_loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


class Counting:
    """An iterator that knows how many batches were taken of it, and that ends with an error."""

    def __init__(self, batches):
        self.batches, self.number = batches, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.number == len(self.batches):
            raise OSError("a broken picture")
        self.number += 1
        return self.batches[self.number - 1]


# ---- depth "forward"


def test_labels_are_told_how_to_be_left_out():
    diagnosis = diagnose(make_model(), make_pairs())

    (failure,) = diagnosis.failures
    assert "forward=lambda model, batch: model(batch[0])" in failure
    assert not diagnose(make_model(), make_pairs(), forward=take_inputs).failures


def test_no_more_batches_are_taken_than_are_used():
    data = Counting(make_pairs())

    facts = diagnose(make_model(), data, forward=take_inputs, num_batches=2).facts

    assert data.number == 2
    assert [(forward.normalized_by, forward.num_images) for forward in facts.forwards] == [
        ("population", 8),
        ("mini_batch", 8),
    ] * 2


def test_a_broken_loader_leaves_the_rest_known():
    diagnosis = diagnose(make_model(), Counting(make_pairs(1)), forward=take_inputs)

    assert len(diagnosis.facts.forwards) == 2
    assert diagnosis.failures == ("Loading a batch failed: OSError: a broken picture",)
    assert diagnose(make_model(), []).failures == ("There was no batch in the data.",)


def test_a_forward_that_fails_by_mini_batches_alone():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3))

    diagnosis = diagnose(model, [torch.randn(1, 3, 4, 4)])

    assert [forward.normalized_by for forward in diagnosis.facts.forwards] == ["population"]
    assert "mini-batch" in diagnosis.failures[0]


def test_detectors_of_torchvision():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=8), nn.BatchNorm2d(8), nn.ReLU())
    backbone.out_channels = 8
    anchors = torchvision.models.detection.rpn.AnchorGenerator(sizes=((16,),), aspect_ratios=((1.0,),))
    model = torchvision.models.detection.RetinaNet(
        backbone, num_classes=2, anchor_generator=anchors, min_size=48, max_size=64
    )
    images = [torch.rand(3, 48, 40), torch.rand(3, 40, 48)]
    targets = [{"boxes": torch.tensor([[2.0, 2, 20, 20]]), "labels": torch.tensor([1])}] * 2

    assert not diagnose(model, [images]).failures
    facts = diagnose(model, [(images, targets)], forward=take_inputs, loss=lambda model, batch: 0).facts
    assert not facts.failures
    assert {forward.num_images for forward in facts.forwards} == {2}
    assert float(facts.images["train"].count.sum()) == 2 * 48 * 40


def test_single_images_are_run_where_a_norm_sees_parts_of_them():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images):
            return self.norm(torch.cat([images[..., :3], images[..., 3:]]))

    facts = diagnose(Parts(), [torch.randn(4, 3, 6, 6)]).facts

    assert [forward.num_images for forward in facts.forwards] == [4, 4, 1, 1]
    assert [forward.calls["norm"][0].size[0] for forward in facts.forwards] == [8, 8, 2, 2]


def test_domains_of_norms_that_have_them():
    spec = NormSpec(population="per_domain", statistics="per_domain", domains=("day", "night"))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2d(4, spec))
    images = torch.randn(4, 3, 6, 6)

    facts = diagnose(model, domains={"day": [images], "night": [images + 1]}).facts

    assert facts.domains.keys() == {"day", "night"}
    assert {forward.domain for forward in facts.forwards} == {"day", "night"}
    mixed = diagnose(model, [images], domain=lambda batch: ["day", "day", "night", "night"]).facts
    assert float(mixed.domains["night"]["1"].count) == 2 * 16
    assert mixed.training.mixes_domains
    assert "dusk" in diagnose(model, [images], domain="dusk").failures[0]


# ---- depth "full"


@pytest.mark.parametrize("is_iterator", [False, True])
def test_a_pass_over_all_data(is_iterator):
    model = make_model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    data = iter(make_pairs()) if is_iterator else make_pairs()
    options = {"depth": "full", "forward": take_inputs, "num_batches": 2, "evaluate": lambda model: 50}

    measured = []

    def measure(model, batch):
        measured.append(len(batch))
        return measure_loss(model, batch)

    facts = diagnose(model, data, loss=measure, **options).facts

    assert not facts.failures
    assert len(measured) == 3 * (2 if is_iterator else 6)  # no more of an iterator are kept
    assert float(facts.population["1", ""].count) == 6 * 8 * 16
    assert facts.population_errors["1", ""].num_batches == 6
    assert facts.evaluation.ap == {"population": 50, "mini_batch": 50, "precise": 50}
    losses = facts.evaluation.losses
    assert losses["population"] != losses["precise"] == pytest.approx(losses["mini_batch"], rel=0.05)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training
    assert torch.equal(torch.get_rng_state(), generator)


def test_an_evaluation_that_fails_leaves_the_population_known():
    def evaluate(model):
        model[1].num_batches_tracked += 1
        raise OSError("no images")

    model = make_model()

    facts = diagnose(model, make_pairs(), depth="full", forward=take_inputs, evaluate=evaluate).facts

    assert facts.evaluation is None
    assert len(facts.population) == 1
    assert sum("no images" in failure for failure in facts.failures) == 2
    assert not model[1].num_batches_tracked


def test_no_norm_has_statistics_to_estimate():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))

    (failure,) = diagnose(model, make_pairs(1), depth="full", forward=take_inputs).failures

    assert "not frozen" in failure


def test_a_lazy_model_is_left_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LazyBatchNorm2d())

    assert "lazy" in diagnose(model, [torch.randn(2, 3, 6, 6)]).failures[0]
    assert isinstance(model[1], nn.LazyBatchNorm2d)


def test_a_single_image_that_a_norm_refuses_is_no_failure():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Flatten(0, 1), nn.BatchNorm1d(3), nn.Unflatten(0, (-1, 2)))
    model += nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6))

    assert not diagnose(model, [torch.randn(16, 2, 3)] * 2).failures


def test_a_model_without_values_is_not_run():
    with torch.device("meta"):
        model = make_model()

    assert "on the meta device" in diagnose(model, [torch.randn(2, 3, 6, 6)]).failures[0]


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_model_says_that_its_norms_are_not_seen():
    scripted = torch.jit.trace(make_model().eval(), torch.randn(2, 3, 6, 6))

    assert "scripted or traced" in diagnose(scripted, [torch.randn(2, 3, 6, 6)]).failures[0]


def test_arguments_that_are_none():
    with pytest.raises(ConfigError, match="model must be a module or a state dict; got str"):
        diagnose("model.pth")
    with pytest.raises(ConfigError, match="num_batches"):
        diagnose(make_model(), make_pairs(), num_batches=0)
    with pytest.raises(ConfigError, match="depth"):
        diagnose(make_model(), depth="deep")
    with pytest.raises(StatisticsError, match="test_data"):
        diagnose(make_model(), test_data=torch.randn(2, 3, 6, 6))
    assert not diagnose(make_model(), Counting(make_pairs(0)), depth="static").failures


# ---- forms of batches


IMAGES, LABELS = torch.randn(2, 3, 4, 5), torch.arange(2)


@pytest.mark.parametrize(
    "batch",
    [
        IMAGES,
        list(IMAGES),
        (IMAGES, LABELS),
        [IMAGES, LABELS],
        {"image": IMAGES, "label": LABELS},
        {"pixels": IMAGES, "label": LABELS},
        [{"image": image, "height": 4} for image in IMAGES],
        (tuple(IMAGES), ({"boxes": LABELS}, {"boxes": LABELS})),
    ],
)
def test_images_of_a_batch(batch):
    assert torch.equal(torch.stack(list_images(batch)), IMAGES)
    (image,) = list_images(take_one(batch, 1))
    assert torch.equal(image, IMAGES[1])


@pytest.mark.parametrize("batch", [None, "text", [], (), torch.randn(2, 5), {"label": LABELS}, [LABELS]])
def test_what_holds_no_images(batch):
    assert list_images(batch) == []

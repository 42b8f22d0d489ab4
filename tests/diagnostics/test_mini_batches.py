"""What norms see in a forward, against definitions in float64; and that looking changes nothing."""

import copy

import pytest
import torch
from torch import nn

from bnext.diagnostics import describe_mini_batch, observing_mini_batches
from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec, use_groups, virtual_samples
from bnext.layers.walk import find_norms
from bnext.scope import use_domain
from tests.workers import run_workers

EXACT = {"rtol": 1e-9, "atol": 1e-12}
DOMAINS = ("day", "night")


def make_images(number=5, side=4, shift=0.0):
    generator = torch.Generator().manual_seed(number + side)
    return torch.randn(number, 3, side, side, dtype=torch.float64, generator=generator) * 2 + shift


def prepare(norm):
    """With running statistics that are not those of a new norm."""
    norm = norm.double()
    for name, buffer in norm.named_buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.linspace(0.5, 1.5, 3) if "var" in name else torch.linspace(-1, 1, 3))
    return norm


def look(norm, call):
    with observing_mini_batches(find_norms(norm)) as seen:
        call(norm)
    return {name: value.item() for name, value in describe_mini_batch(seen[""]).items()}


def elements(images):
    return images.movedim(1, 0).flatten(1)


def distance_of(images, mean, var, eps=1e-5):
    x = elements(images)
    return ((x.mean(1) - mean).abs() / (var + eps).sqrt()).mean()


def ratio_of(images, var, eps=1e-5):
    q = (elements(images).var(1) + eps) / (var + eps)
    return torch.maximum(q, 1 / q).log().mean().exp()


def between(parts):
    """Share of the variance that lies between parts, by their elements one by one."""
    whole = torch.cat([elements(part) for part in parts], 1)
    means = torch.cat([elements(part).mean(1, keepdim=True).expand_as(elements(part)) for part in parts], 1)
    return (means.var(1, correction=0) / whole.var(1, correction=0)).mean()


def expect(found, **expected):
    torch.testing.assert_close(found, {name: float(value) for name, value in expected.items()}, **EXACT)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNorm2d])
def test_a_plain_norm(kind):
    norm, images = prepare(kind(3)), make_images()
    mean, var = norm.running_mean.clone(), norm.running_var.clone()
    expected = {"mean_distance": distance_of(images, mean, var), "var_ratio": ratio_of(images, var)}
    expect(look(norm, lambda norm: norm(images)), normalization_batch_size=5, **expected)


def test_groups_of_a_ghost_bn():
    images = make_images()
    norm = prepare(BatchNorm2d(3, NormSpec(normalization_batch_size=2)))
    found = look(norm, lambda norm: norm(images))
    assert found["normalization_batch_size"] == pytest.approx(5 / 3)
    assert found["between_groups"] == pytest.approx(float(between(images.split([2, 2, 1]))))
    assert found["mean_distance"] == pytest.approx(float(distance_of(images, *POPULATION)))


POPULATION = (torch.linspace(-1, 1, 3).double(), torch.linspace(0.5, 1.5, 3).double())


@pytest.mark.parametrize("row", [1, 2, 5, 6])
def test_levels(row):
    levels = {"p3": make_images(2, 6), "p5": make_images(2, 3, shift=3)}
    norm = prepare(LevelBatchNorm2d(3, ("p3", "p4", "p5"), NormSpec.from_table5_row(row)))
    found = look(norm, lambda norm: norm(levels))
    distances = [float(distance_of(images, *POPULATION)) for images in levels.values()]
    expect(
        {name: found[name] for name in ("mean_distance", "normalization_batch_size", "between_groups")},
        mean_distance=sum(distances) / 2,
        normalization_batch_size=2,
        between_groups=between([*levels.values()]),
    )


def test_calls_of_a_shared_norm_are_groups():
    """The fault of a head that is called once a level."""
    images, others = make_images(2, 6), make_images(2, 3, shift=3)

    def call(norm):
        norm(images)
        norm(others)

    found = look(prepare(nn.BatchNorm2d(3)), call)
    assert found["between_groups"] == pytest.approx(float(between([images, others])))
    assert found["between_groups"] > 0.2


def test_a_mixed_batch_of_domains():
    images = make_images()
    images[2:] += 3
    norm = prepare(BatchNorm2d(3, NormSpec(statistics="per_domain", population="per_domain", domains=DOMAINS)))
    with use_domain(["day", "day", "night", "night", "night"]):
        found = look(norm, lambda norm: norm(images))
    assert found["between_groups"] == pytest.approx(float(between([images[:2], images[2:]])))
    mean = (distance_of(images[:2], *POPULATION) + distance_of(images[2:], *POPULATION)) / 2
    assert found["mean_distance"] == pytest.approx(float(mean))


def test_groups_from_outside_and_virtual_samples():
    images, norm = make_images(), prepare(BatchNorm2d(3))
    with use_groups(norm, [0, 1, 0, 1, 1], 2):
        found = look(norm, lambda norm: norm(images))
    assert found["normalization_batch_size"] == 2.5
    assert found["between_groups"] == pytest.approx(float(between([images[[0, 2]], images[[1, 3, 4]]])))

    with virtual_samples(norm, make_images(3)):
        assert look(norm, lambda norm: norm(images))["normalization_batch_size"] == 8


@pytest.mark.parametrize(
    ("norm", "names"),
    [
        (BatchNorm2d(3, NormSpec(frozen="both")), {"mean_distance", "var_ratio"}),
        (nn.BatchNorm2d(3).eval(), {"mean_distance", "var_ratio"}),
        (BatchNorm2d(3, NormSpec(population="none", inference="mini_batch")), {"normalization_batch_size"}),
    ],
)
def test_there_are_only_numbers_that_mean_something(norm, names):
    assert look(norm.double(), lambda norm: norm(make_images())).keys() == names


@pytest.mark.parametrize("features", [{}, {"p3": torch.zeros(0, 3, 4, 4).double()}])
def test_nothing_is_known_of_nothing(features):
    norm = LevelBatchNorm2d(3, ("p3", "p4"), NormSpec.from_table5_row(4)).double()
    with observing_mini_batches(find_norms(norm)) as seen:
        norm(features)
    assert not seen


def test_looking_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), BatchNorm2d(3), nn.Dropout(), nn.BatchNorm2d(3)).double()
    other = copy.deepcopy(model)
    outputs = []
    for one in (model, other):
        torch.manual_seed(1)
        with observing_mini_batches(find_norms(one) if one is other else {}):
            output = one(make_images())
        output.square().sum().backward()
        outputs.append([output, *(parameter.grad for parameter in one.parameters()), *one.buffers()])
    assert all(torch.equal(first, second) for first, second in zip(*outputs, strict=True))
    assert not other[1]._forward_pre_hooks


def look_on_a_worker(rank):
    norm = BatchNorm2d(3, NormSpec(workers="all")).double()
    return look(norm, lambda norm: norm(make_images()))["normalization_batch_size"]


def test_workers_that_share_a_mini_batch_count():
    assert run_workers(look_on_a_worker, 2) == [10, 10]

import pytest
import torch
from torch import nn

from bnext import NormSpec, convert_norm, use_domain
from bnext.layers import BatchNorm2d
from tests.diagnostics.checks.diagnosing import find

NAMES = ("day", "night")


def make_domain(offset, seed, number=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 6, 6, generator=generator) + offset for _ in range(number)]


def make_domains(offset):
    return {"day": make_domain(0.0, 0), "night": make_domain(offset, 1)}


def make_model(norm=nn.BatchNorm2d):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 1), norm(8))


def make_separate():
    spec = NormSpec(statistics="per_domain", population="per_domain", domains=NAMES)
    return make_model(lambda channels: BatchNorm2d(channels, spec))


def train(model, domains):
    with torch.no_grad():
        for _ in range(10):
            for name, batches in domains.items():
                for batch in batches:
                    with use_domain(name):
                        model.train()(batch)
    return model


# ---- BN023


@pytest.mark.parametrize(("offset", "severities"), [(0.0, []), (0.2, []), (0.5, ["note"]), (4.0, ["warning"])])
def test_distance_between_domains_of_one_population(offset, severities):
    evidence = find("BN023", make_model(), domains=make_domains(offset))

    assert [one.severity for one in evidence] == severities


def test_statistics_of_their_own_are_the_remedy():
    model, domains = make_model(), make_domains(4.0)
    (evidence,) = find("BN023", model, domains=domains)

    assert evidence.layers == ("1",)
    exec(evidence.remedy.call, {"model": model})
    assert not find("BN023", model, domains=domains)


def test_mixed_mini_batches_are_on_purpose():
    """Of the domain of each image; then sharing is consistent."""
    day, night = make_domains(4.0).values()
    data = [torch.cat([one[:4], other[4:]]) for one, other in zip(day, night, strict=True)]

    (evidence,) = find("BN023", make_model(), data, domain=lambda batch: ["day"] * 4 + ["night"] * 4)

    assert evidence.severity == "note"


def test_a_few_images_differ_by_chance():
    generator = torch.Generator().manual_seed(3)

    def make_images(number):
        return [torch.randn(number, 3, 6, 6, generator=generator) + torch.randn(number, 3, 1, 1, generator=generator)]

    for number in (1, 4, 16):
        domains = {name: make_images(number) for name in NAMES}
        assert not find("BN023", make_model(), domains=domains)


def test_one_domain_is_apart_from_none():
    assert not find("BN023", make_model(), domains={"day": make_domain(4.0, 0)})
    assert not find("BN023", make_model(), make_domain(4.0, 0), domain="day")


# ---- BN024


def test_finds_domains_that_are_alike():
    model = train(make_separate(), make_domains(0.0))

    (evidence,) = find("BN024", model)

    assert evidence.severity == "note"
    assert evidence.layers == ("1",)
    exec(evidence.remedy.call, {"model": model})
    assert not find("BN024", model)


@pytest.mark.parametrize("offset", [0.5, 4.0])
def test_domains_that_differ_keep_their_statistics(offset):
    assert not find("BN024", train(make_separate(), make_domains(offset)))


def test_statistics_that_nobody_has_trained_say_nothing():
    model = train(make_model(), {"day": make_domain(0.0, 0)})
    convert_norm(model, {"": NormSpec(statistics="per_domain", population="per_domain", domains=NAMES)})

    assert not find("BN024", make_separate())
    assert not find("BN024", model)  # copies of one another

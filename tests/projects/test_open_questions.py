"""Populations of levels: merged, mixed, compared, measured; and the settings of the study."""

import pytest
import torch
from level_populations import measure_distances, measure_levels, merge_levels, mix_populations, write_populations
from trained_detectors import OpenSetting

from bnext.errors import ConfigError
from bnext.functional import batch_moments
from tests.heads.detectors import LEVELS, make_batch, make_detector


def make_populations():
    generator = torch.Generator().manual_seed(1)
    features = {level: torch.randn(2, 3, 4 - place, 2, generator=generator) for place, level in enumerate(("p3", "p4"))}
    return features, {"norm": {level: batch_moments(feature.double()) for level, feature in features.items()}}


def test_a_groups_population_is_that_of_all_its_elements():
    features, populations = make_populations()
    merged = merge_levels(populations, [["p3", "p4"]])["norm"]
    rows = torch.cat([feature.double().transpose(0, 1).flatten(1) for feature in features.values()], dim=1)
    for level in features:
        torch.testing.assert_close(merged[level].mean, rows.mean(1))
        torch.testing.assert_close(merged[level].var, rows.var(1, correction=0))
    assert merge_levels(populations, []) == populations


def test_a_mixture_is_between_its_ends():
    _, populations = make_populations()
    merged = merge_levels(populations, [["p3", "p4"]])
    half = mix_populations(merged, populations, 0.5)["norm"]["p3"]
    torch.testing.assert_close(half.mean, (merged["norm"]["p3"].mean + populations["norm"]["p3"].mean) / 2)
    assert measure_distances(populations, mix_populations(merged, populations, 1))["norm"]["p3"] == (0, 0)
    assert measure_distances(populations, merged)["norm"]["p3"].mean > 0


def test_measuring_leaves_the_model_as_it_was_and_writing_reaches_each_level():
    model = make_detector(row=4).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    measured = measure_levels(model, [make_batch()])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    path = next(iter(measured[0]))
    assert set(measured[0][path]) == set(LEVELS)
    write_populations(model, measured[0])
    for level in LEVELS:
        mean = model.get_submodule(path).get_submodule(level).running_mean
        torch.testing.assert_close(mean, measured[0][path][level].mean.float())


@pytest.mark.parametrize(
    ("name", "value"),
    [("trainings", "cifar"), ("num_batches", 1), ("shares", [2.0]), ("images", [1]), ("num_draws", 0)],
)
def test_wrong_settings_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        OpenSetting(**{name: value})

"""Statistics of a finite set of images: errors that fall to 0, and do not claim too much on the way."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from bnext import recompute_population_statistics
from bnext.errors import StatisticsError
from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec
from bnext.scope.record import get_record
from tests.cases import NUM_CHANNELS, randomize
from tests.statistics.models import assert_population

NUM_IMAGES, BATCH_SIZE = 48, 4


class Towers(nn.Module):
    """Two norms on the image, one of them called behind the norms of the other tower, and one behind its own."""

    def __init__(self):
        super().__init__()
        self.cls = nn.Sequential(nn.BatchNorm2d(NUM_CHANNELS), nn.ReLU(), nn.BatchNorm2d(NUM_CHANNELS))
        self.box = nn.BatchNorm2d(NUM_CHANNELS)

    def forward(self, x):
        return self.cls(x), self.box(2 * x)


def make_towers():
    return randomize(Towers().double())


def make_images(number=NUM_IMAGES):
    """Images that differ in brightness and contrast, [N, C, 3, 3]."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(number, NUM_CHANNELS, 3, 3, generator=generator, dtype=torch.float64)
    style = torch.randn(2, number, NUM_CHANNELS, 1, 1, generator=generator, dtype=torch.float64)
    return noise * (style[0] / 2).exp() + style[1] / 2


def shuffle(images, seed, number=NUM_IMAGES):
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:number]
    return list(images[order].split(BATCH_SIZE))


def errors_of(report):
    return {estimate.path: estimate.error for estimate in report.estimates}


def test_a_set_that_was_seen_is_known_but_for_how_it_falls_into_batches():
    images, towers, others = make_images(), make_towers(), make_towers()
    data = shuffle(images, seed=1)
    report = recompute_population_statistics(towers, data, population_size=NUM_IMAGES)
    drawn = recompute_population_statistics(others, data)
    assert_population(towers.cls[0], [images])
    assert_population(towers.box, [2 * images])
    assert all(torch.equal(value, others.state_dict()[key]) for key, value in towers.state_dict().items())
    known, unknown = errors_of(report), errors_of(drawn)
    assert known == {"cls.0": 0, "box": 0, "cls.2": pytest.approx(unknown["cls.2"] * (2 / BATCH_SIZE) ** 0.5)}
    assert min(unknown.values()) > 0.01
    assert "for the statistics of all 48 images" in str(report)
    assert "for the statistics" not in str(drawn)


def estimate_often(images, seeds, number=NUM_IMAGES):
    """Path -> means and variances of each order, [orders, 2, C], and the standard errors that the reports give."""
    towers = make_towers()
    values, errors = {}, {}
    for seed in seeds:
        report = recompute_population_statistics(towers, shuffle(images, seed, number), population_size=NUM_IMAGES)
        for estimate in report.estimates:
            norm = towers.get_submodule(estimate.path)
            values.setdefault(estimate.path, []).append(torch.stack([norm.running_mean, norm.running_var]))
            errors.setdefault(estimate.path, []).append(torch.tensor([estimate.mean_error, estimate.var_error]))
    return {path: torch.stack(each) for path, each in values.items()}, errors


def test_estimates_of_a_part_are_as_far_off_as_they_say():
    """40 orders of three quarters of the images, against the whole set, in 20 divisions into batches."""
    images = make_images()
    whole, _ = estimate_often(images, range(20))
    parts, errors = estimate_often(images, range(20, 60), number=36)

    for path, values in parts.items():
        mean, var = whole[path].mean(0)
        off = (values - torch.stack([mean, var])) / torch.stack([var.sqrt(), var])
        scores = off / torch.stack(errors[path]).unsqueeze(-1)
        assert 0.5 < float(scores.square().mean().sqrt()) < 1.1, path  # the errors are those of the worst channels
        assert float(scores.mean(0).abs().max()) < 0.5, path


def test_a_tolerance_needs_fewer_images_of_a_finite_set():
    images = make_images(400)
    numbers = []
    for options in ({}, {"population_size": 400}):
        data = list(images.split(BATCH_SIZE))
        numbers.append(recompute_population_statistics(make_towers(), data, tolerance=0.06, **options).num_samples)
    assert numbers[1] < 0.8 * numbers[0] < 400


def test_what_the_first_batch_does_not_show_to_be_independent_is_not():
    """A norm that comes later, one on random features, and averages of mini-batches, which forget or are divided."""
    images = make_images()
    calls = []

    def forward(towers, x):
        calls.append(x)
        towers.box(x + torch.rand(()))
        if len(calls) > 3:
            towers.cls[0](x)

    data = shuffle(images, seed=1)
    report = recompute_population_statistics(make_towers(), data, forward=forward, population_size=NUM_IMAGES)
    assert len(calls) == len(data) + 3
    assert all(estimate.error > 0 for estimate in report.reached)
    for estimator in ("moving_average", "mean_of_batches"):
        report = recompute_population_statistics(make_towers(), data, estimator=estimator, population_size=NUM_IMAGES)
        assert min(errors_of(report).values()) > 0
        assert report.population_size is None


def shares_of(model, **options):
    """Path -> what is left of the squared errors when all images were seen, to that of images that are drawn."""
    data = shuffle(make_images(), seed=1)
    known = errors_of(recompute_population_statistics(model, data, population_size=NUM_IMAGES, **options))
    unknown = errors_of(recompute_population_statistics(model, data, **options))
    return {path: (error / unknown[path]) ** 2 for path, error in known.items()}


@pytest.mark.parametrize("estimator", ["pooled", "layer_by_layer"])
def test_random_features_stay_unknown(estimator):
    class Random(nn.Module):
        def forward(self, x):
            return x + torch.rand(len(x), 1, 1, 1)

    model = nn.Sequential(nn.BatchNorm2d(NUM_CHANNELS), Random(), nn.BatchNorm2d(NUM_CHANNELS)).double()
    assert shares_of(model, seed=0, estimator=estimator) == {"0": 0, "2": pytest.approx(1)}


@pytest.mark.parametrize(("size", "share"), [(None, 2 / 4), (3, 1), (8, 2 / 4)])
def test_the_smallest_mini_batch_decides(size, share):
    """Batches of 4; those cut for 3 are halves, of which each other image is half."""
    first = BatchNorm2d(NUM_CHANNELS, spec=NormSpec(normalization_batch_size=size))
    model = nn.Sequential(first, nn.ReLU(), nn.BatchNorm2d(NUM_CHANNELS)).double()
    assert shares_of(model) == {"0": 0, "2": pytest.approx(share)}


@pytest.mark.parametrize("estimator", ["pooled", "layer_by_layer"])
@pytest.mark.parametrize("kind", ["torch", "bnext", "population"])
def test_mini_batches_of_norms_that_are_not_selected_count(kind, estimator):
    spec = NormSpec(inference="population" if kind == "population" else "mini_batch")
    first = BatchNorm2d(NUM_CHANNELS, spec=spec)
    if kind == "torch":
        first = nn.BatchNorm2d(NUM_CHANNELS, track_running_stats=False)
    model = nn.Sequential(first, nn.ReLU(), nn.BatchNorm2d(NUM_CHANNELS)).double()
    shares = shares_of(model, layers=lambda path, norm: path == "2", estimator=estimator)
    assert shares == {"2": pytest.approx(0 if kind == "population" else 2 / BATCH_SIZE)}


@pytest.mark.parametrize("kind", ["list", "loader"])
def test_more_images_than_there_are_is_refused(kind):
    images = make_images()
    data = shuffle(images, seed=1) if kind == "list" else DataLoader(images, BATCH_SIZE)
    pattern = r"population_size must be the number of all images .*; got 40 for 4[58]"
    with pytest.raises(StatisticsError, match=pattern):
        recompute_population_statistics(make_towers(), data, population_size=40)
    loader = DataLoader(images[:41], BATCH_SIZE)
    assert recompute_population_statistics(make_towers(), loader, population_size=41).num_samples == 41
    passes = iter(data)
    assert recompute_population_statistics(make_towers(), passes, population_size=40).num_samples == NUM_IMAGES


def test_layer_by_layer_and_levels_know_everything_in_the_end():
    images = make_images()
    data = shuffle(images, seed=1)
    report = recompute_population_statistics(
        make_towers(), data, estimator="layer_by_layer", population_size=NUM_IMAGES
    )
    assert errors_of(report) == {"cls.0": 0, "box": 0, "cls.2": 0}
    norm = LevelBatchNorm2d(NUM_CHANNELS, ("p3", "p4"), NormSpec.from_table5_row(1)).double()
    report = recompute_population_statistics(
        norm, data, forward=lambda m, x: m({"p3": x, "p4": x[..., :1, :1]}), population_size=NUM_IMAGES
    )
    assert errors_of(report) == {"": 0}


def test_what_a_forward_leaves_out_keeps_its_error():
    """As if the run had ended when it was last reached."""
    images = make_images(400)
    data = list(images.split(BATCH_SIZE))

    def forward(towers, x):
        wanted = get_record().wanted
        towers.cls(x)
        if not wanted or towers.box in wanted:
            towers.box(x.clamp(-1, 1))

    def run(data, **options):
        report = recompute_population_statistics(
            make_towers(), data, forward=forward, population_size=len(images), **options
        )
        return {estimate.path: estimate for estimate in report.estimates}

    ended = run(data, tolerance=0.05)
    number = ended["box"].num_batches
    assert number < ended["cls.0"].num_batches < len(data)
    assert ended["box"] == run(data[:number])["box"]

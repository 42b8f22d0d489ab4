"""Mini-batches of a pattern: what is in them, that they come again, and what cannot be drawn."""

import pytest
import torch

from bnext.errors import ConfigError
from bnext.studies.images import Images
from bnext.studies.patterns import Pattern, PatternedBatches, join_images

IMAGES = Images(torch.arange(400.0)[:, None, None, None].expand(400, 1, 2, 2), torch.arange(400) % 10)


def test_every_normalization_batch_has_the_pattern():
    batches = list(PatternedBatches(IMAGES, Pattern(5, 6), num_groups=4, num_steps=3, seed=1))
    for batch in batches:
        for labels in batch.labels.split(30):
            assert labels.bincount(minlength=10).sort().values.tolist() == [0] * 5 + [6] * 5
    assert len(batches[0].pixels.unique()) > 100
    classes = {tuple(labels.unique().tolist()) for batch in batches for labels in batch.labels.split(30)}
    assert len(classes) > 6, "drawn anew for each"


def test_they_come_again_and_depend_on_the_seed():
    first, second, other = (
        [batch.pixels for batch in PatternedBatches(IMAGES, Pattern(2, 4), num_steps=4, seed=seed, noise=0.1)]
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


def test_shuffled_groups_have_no_pattern_but_the_same_images():
    plain, shuffled = (
        next(iter(PatternedBatches(IMAGES, Pattern(1, 32), num_groups=4, seed=3, shuffled=value)))
        for value in (False, True)
    )
    assert torch.equal(plain.pixels.flatten(1).sort(0).values, shuffled.pixels.flatten(1).sort(0).values)
    assert len(plain.labels[:32].unique()) == 1 < len(shuffled.labels[:32].unique())


@pytest.mark.parametrize(("share", "least", "most"), [(1.0, 32, 32), (0.5, 16, 24), (0.0, 0, 12)])
def test_a_share_of_the_images_is_in_the_pattern(share, least, most):
    batches = PatternedBatches(IMAGES, Pattern(1, 32, share), num_steps=20, seed=1)
    counts = [int(batch.labels.bincount().max()) for batch in batches]
    assert least <= min(counts)
    assert max(counts) <= most


def test_pictures_of_two_digits_read_their_class():
    joined = join_images(IMAGES, 2, 250, seed=1)
    assert joined.pixels.shape == (250, 1, 2, 4)
    tens, ones = (joined.pixels[:, 0, 0, place].long() % 10 for place in (0, 2))
    assert torch.equal(10 * tens + ones, joined.labels)
    assert joined.labels.bincount().unique().tolist() == [2, 3]


@pytest.mark.parametrize(
    ("arguments", "named"), [((0, 2), "num_classes"), ((2, 0), "num_images"), ((2, 2, 1.5), "share")]
)
def test_a_pattern_that_cannot_be_is_refused(arguments, named):
    with pytest.raises(ConfigError, match=named):
        Pattern(*arguments)


@pytest.mark.parametrize("pattern", [Pattern(11, 2), Pattern(2, 41)])
def test_a_pattern_that_the_images_have_not_is_refused(pattern):
    with pytest.raises(ConfigError, match="classes"):
        PatternedBatches(IMAGES, pattern)

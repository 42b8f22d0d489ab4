"""The order of the images: a function of seed and iteration, whoever asks."""

from itertools import islice

import pytest

from bnext.data.sampling.samplers import BatchSampler, GroupedBatchSampler, aspect_ratio_groups
from bnext.errors import ConfigError

GROUPS = [0, 1, 1, 0, 1, 1, 1]


def take(number, *args, kind=BatchSampler, **options):
    return list(islice(kind(*args, **options), number))


def test_every_epoch_holds_every_image_once_in_another_order():
    indices = [index for batch in take(15, 10, 2, seed=3) for _, index in batch]
    epochs = [indices[first : first + 10] for first in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_run_over_the_end_of_an_epoch_and_positions_count_on():
    batches = take(5, 3, 4, seed=0)
    assert [position for batch in batches for position, _ in batch] == list(range(20))


def test_the_seed_decides():
    assert take(4, 20, 4, seed=1) == take(4, 20, 4, seed=1)
    assert take(4, 20, 4, seed=1) != take(4, 20, 4, seed=2)


@pytest.mark.parametrize(("kind", "images"), [(BatchSampler, 7), (GroupedBatchSampler, GROUPS)])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_later_start_gives_the_same_batches(kind, images, world_size):
    for rank in range(world_size):
        settings = {"kind": kind, "seed": 5, "rank": rank, "world_size": world_size}
        whole = take(12, images, 6, **settings)
        for start in (1, 7):
            assert take(12 - start, images, 6, start_iteration=start, **settings) == whole[start:]


def test_the_total_batch_does_not_depend_on_the_number_of_workers():
    alone = take(9, 10, 6, seed=5)
    shards = [take(9, 10, 6, seed=5, rank=rank, world_size=3) for rank in range(3)]
    assert [sum(parts, []) for parts in zip(*shards, strict=False)] == alone


def test_a_grouped_batch_holds_one_group_and_no_sample_twice():
    settings = {"kind": GroupedBatchSampler, "seed": 1, "world_size": 2}
    shards = [take(20, GROUPS, 4, rank=rank, **settings) for rank in range(2)]
    batches = [batch for shard in shards for batch in shard]
    assert all(len(batch) == 2 and len({GROUPS[index] for _, index in batch}) == 1 for batch in batches)
    positions = [position for batch in batches for position, _ in batch]
    assert len(set(positions)) == len(positions)


def test_groups_follow_the_orientation():
    assert aspect_ratio_groups([{"width": 3, "height": 2}, {"width": 2, "height": 3}]) == [0, 1]
    with pytest.raises(ConfigError, match="ASPECT_RATIO_GROUPING"):
        aspect_ratio_groups([{"width": 3}])


@pytest.mark.parametrize(("batch", "workers"), [(0, 1), (5, 2), (-4, 2)])
def test_a_batch_that_cannot_be_dealt_is_refused(batch, workers):
    with pytest.raises(ConfigError, match="SOLVER.IMS_PER_BATCH"):
        BatchSampler(10, batch, seed=0, world_size=workers)


def test_no_images_are_refused():
    with pytest.raises(ConfigError, match="DATASETS.TRAIN"):
        BatchSampler(0, 2, seed=0)

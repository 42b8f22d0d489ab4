"""Rounds of batches over workers that end early or fail, and how many images a batch has."""

import collections

import pytest
import torch

from bnext.distributed import LockStep, count_images
from bnext.errors import StatisticsError
from tests.workers import run_workers

CPU = torch.device("cpu")
IMAGE = torch.zeros(3, 4, 4)


@pytest.mark.parametrize(
    ("batch", "number"),
    [
        (torch.zeros(5, 3, 4, 4), 5),
        ([{"image": IMAGE}] * 6, 6),  # detectron2
        ([IMAGE] * 7, 7),
        ((torch.zeros(8, 3, 4, 4), torch.zeros(8)), 8),
        ([torch.zeros(8, 3, 4, 4), torch.zeros(8)], 8),  # torch's default_collate gives lists
        ((torch.zeros(32, 10), torch.zeros(32)), 32),
        ([torch.zeros(4, 3, 2, 4, 4), torch.zeros(4)], 4),  # videos
        (tuple(zip(*[(IMAGE, {"boxes": 0})] * 9, strict=True)), 9),  # torchvision's references
        ({"images": torch.zeros(3, 3, 4, 4), "labels": torch.zeros(3)}, 3),
        ([(IMAGE, 1)] * 2, 2),
        ([[IMAGE] * 8, [{"boxes": 0}] * 8], 8),
        ({"height": 480, "scale": torch.tensor(1.0), "image": torch.zeros(4, 3, 2, 2)}, 4),
        (None, 1),
        (collections.UserDict({"name": "a", "images": torch.zeros(3, 3, 4, 4)}), 3),
        (collections.deque([IMAGE] * 5), 5),
        ([], 0),
    ],
    ids=str,
)
def test_images_of_a_batch(batch, number):
    assert count_images(batch) == number


# ---- rounds


def go_through(rank, sizes, arguments):
    """What each round gives; the counts at the end."""
    rounds = LockStep([torch.ones(size, 2) for size in sizes[rank]], CPU, "test", **arguments)
    given = [(None if batch is None else len(batch), is_new) for batch, is_new in rounds]
    return given, (rounds.num_rounds, rounds.num_batches, rounds.num_images)


SIZES = [[1, 2, 3], [4, 5], []]


def test_all_data_are_used_and_a_last_batch_that_comes_again_does_not_count():
    results = run_workers(go_through, 3, SIZES, {})
    assert [given for given, _ in results] == [
        [(1, True), (2, True), (3, True)],
        [(4, True), (5, True), (5, False)],
        [(None, False)] * 3,
    ]
    assert [counts for _, counts in results] == [(3, 5, 15)] * 3


ENDS = [
    ({"shares_work": True}, (2, 4, 12)),
    ({"shares_work": True, "repeats_last": True}, (3, 5, 15)),
    ({"max_rounds": 1}, (1, 2, 5)),
    ({"enough_images": 5}, (1, 2, 5)),
    ({"enough_images": 6}, (2, 4, 12)),
    ({"max_rounds": 9, "enough_images": 99}, (3, 5, 15)),
]


def find_ends(rank):
    return [go_through(rank, SIZES, arguments)[1] for arguments, _ in ENDS]


def test_where_the_rounds_end():
    assert run_workers(find_ends, 2) == [[counts for _, counts in ENDS]] * 2


@pytest.mark.parametrize("is_enough", [{"max_rounds": 2}, {"enough_images": 3}])
def test_no_batch_is_loaded_after_the_last_one(is_enough):
    taken = []
    batches = (taken.append(size) or torch.ones(size, 2) for size in SIZES[0])
    assert len(list(LockStep(batches, CPU, "test", **is_enough))) == 2
    assert taken == [1, 2]


def repeat_without_a_batch(rank, sizes):
    with pytest.raises(StatisticsError, match="none on worker 1") as caught:
        go_through(rank, sizes, {"repeats_last": True})
    return str(caught.value)


def test_who_is_to_repeat_must_have_a_batch():
    first, second = run_workers(repeat_without_a_batch, 2, [[1], []])
    assert first == second
    assert run_workers(go_through, 2, [[], []], {"repeats_last": True}) == [([], (0, 0, 0))] * 2


def fail(rank, place):
    """Worker 1 fails in the second of two rounds: every worker learns of it, although no other round follows."""

    def load():
        yield torch.ones(2, 2)
        if rank == 1 and place == "loader":
            raise OSError("on purpose")
        yield torch.ones(2, 2)

    def step(number):
        if rank == 1 and place == "step" and number == 2:
            raise OSError("on purpose")
        return number

    rounds, results = LockStep(load(), CPU, "test", max_rounds=2), []
    try:
        for _ in rounds:
            results.append(rounds.run(lambda: step(rounds.num_rounds)))
    except (OSError, StatisticsError) as error:
        return results, type(error).__name__, str(error)
    return results, "", ""


@pytest.mark.parametrize("place", ["loader", "step"])
def test_a_failure_ends_the_rounds_of_all(place):
    first, second = run_workers(fail, 2, place)
    assert second[1:] == ("OSError", "on purpose")
    assert first[1] == "StatisticsError"
    assert "worker 1" in first[2]
    assert second[0] == [1] + [None] * (place == "step")


def test_alone_a_failure_is_raised_at_once():
    rounds = LockStep([1, 2], CPU, "test")
    next(iter(rounds))
    with pytest.raises(ZeroDivisionError):
        rounds.run(lambda: 1 / 0)


def test_a_batch_that_is_none_is_refused():
    with pytest.raises(StatisticsError, match="a batch"):
        list(LockStep([torch.ones(1, 2), None], CPU, "test"))

"""An interrupted re-estimation by several workers goes on from the last round of which each has a file."""

import contextlib
import logging
import os

import torch

from bnext import StatisticsError, recompute_population_statistics
from tests.statistics.test_kept_state import NUMBER, Forward, FullDisk, make_data, make_model, on_linux
from tests.workers import run_workers


def run_interrupted(rank, folder):
    """Both interrupted; then one fails in the twentieth round, which must not be kept; then to the end."""
    path = os.path.join(folder, "state")
    whole, parts = make_model(), make_model()
    recompute_population_statistics(whole, make_data(rank))
    kinds = []
    for forward in (Forward(20, RuntimeError("lost")) if rank == 1 else Forward(), Forward(33, KeyboardInterrupt())):
        try:
            recompute_population_statistics(parts, make_data(rank), forward=forward, state_file=path)
        except (RuntimeError, KeyboardInterrupt, StatisticsError) as error:
            kinds.append((type(error).__name__, os.path.exists(f"{path}.{rank}")))
    last = Forward()
    recompute_population_statistics(parts, make_data(rank), forward=last, state_file=path)
    equal = all(torch.equal(value, whole.state_dict()[key]) for key, value in parts.state_dict().items())
    return kinds, last.calls, equal, os.path.exists(f"{path}.{rank}")


def test_two_workers_go_on(tmp_path):
    first, second = run_workers(run_interrupted, 2, str(tmp_path))
    assert first == ([("StatisticsError", False), ("KeyboardInterrupt", True)], NUMBER - 20, True, False)
    assert second == ([("RuntimeError", False), ("KeyboardInterrupt", True)], NUMBER - 20, True, False)


def run_with_one_damaged(rank, folder):
    path = os.path.join(folder, "state")
    if rank == 1:
        with open(f"{path}.1", "w") as file:
            file.write("nonsense")
    try:
        recompute_population_statistics(make_model(), make_data(rank), state_file=path)
    except StatisticsError as error:
        return str(error)
    return ""


def test_a_damaged_file_of_one_worker_is_told_to_all(tmp_path):
    first, second = run_workers(run_with_one_damaged, 2, str(tmp_path))
    assert "state_file must be readable on every worker; got a failure on worker 1" in first
    assert "state_file must be of an interrupted run" in second


def read_rounds(path):
    files = [file for file in (path, f"{path}.previous") if os.path.exists(file)]
    return [torch.load(file, weights_only=True)["done"] for file in files]


def run_with_writes_apart(rank, folder):
    """One worker's disk is full at the second write, twice; then to the end."""
    path = os.path.join(folder, "state")
    whole, parts, seen = make_model(), make_model(), []
    recompute_population_statistics(whole, make_data(rank))
    for at in (30, 10):  # calls; the second time from round 20 on
        forward = FullDisk(f"{path}.{rank}", at) if rank == 1 else Forward()
        try:
            recompute_population_statistics(parts, make_data(rank), forward=forward, state_file=path)
        except StatisticsError as error:
            seen.append(("No space" in str(error), read_rounds(f"{path}.{rank}")))
    last = Forward()
    recompute_population_statistics(parts, make_data(rank), forward=last, state_file=path)
    equal = all(torch.equal(value, whole.state_dict()[key]) for key, value in parts.state_dict().items())
    return seen, last.calls, equal


@on_linux
def test_workers_whose_last_files_are_of_two_rounds_go_on_from_the_common_one(tmp_path):
    first, second = run_workers(run_with_writes_apart, 2, str(tmp_path))
    assert first == ([(False, [40, 20]), (False, [40, 20])], NUMBER - 20, True)
    assert second == ([(True, [20]), (True, [20])], NUMBER - 20, True)
    assert os.listdir(tmp_path) == []


def run_with_files_of(rank, folder, rounds):
    """What a run does whose file is of another round (none: 0): its calls, its error, and its log."""
    path, said = os.path.join(folder, "state"), []
    model, forward = make_model(), Forward()
    begun = Forward(45, KeyboardInterrupt())
    with contextlib.suppress(KeyboardInterrupt):
        recompute_population_statistics(model, make_data(rank), forward=begun, state_file=path)
    for file in (f"{path}.{rank}", f"{path}.{rank}.previous"):
        if rank == 1:
            state = torch.load(file, weights_only=True)
            os.remove(file)
    if rank == 1 and rounds:
        torch.save({**state, "done": rounds}, f"{path}.1")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("bnext").addHandler(handler)
    try:
        recompute_population_statistics(model, make_data(rank), forward=forward, state_file=path)
    except StatisticsError as error:
        said.append(str(error))
    finally:
        logging.getLogger("bnext").removeHandler(handler)
    return forward.calls, said


def test_without_the_file_of_a_worker_all_begin_anew(tmp_path):
    first, second = run_workers(run_with_files_of, 2, str(tmp_path), 0)
    assert (first[0], second[0]) == (NUMBER, NUMBER)
    assert "worker 1 has none" in first[1][0]
    assert "all begin anew" in first[1][0]
    assert second[1] == []
    assert os.listdir(tmp_path) == []


def test_files_without_a_common_round_are_refused(tmp_path):
    for calls, (said,) in run_workers(run_with_files_of, 2, str(tmp_path), 60):
        assert calls == 0
        assert "must be of a common round on every worker; got [[40, 20], [60, 0]]" in said
    assert sorted(os.listdir(tmp_path)) == ["state.0", "state.0.previous", "state.1"]

"""An interrupted re-estimation goes on from its file, and ends bitwise as one that was not interrupted."""

import contextlib
import logging
import os

import pytest
import torch
from torch import nn

from bnext import StatisticsError, recompute_population_statistics
from tests.cases import NUM_CHANNELS, randomize
from tests.statistics.models import assert_as_before, snapshot
from tests.workers import run_workers

NUMBER = 50


class Model(nn.Module):
    def __init__(self, channels=NUM_CHANNELS):
        super().__init__()
        self.conv = nn.Conv2d(NUM_CHANNELS, channels, 1)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x):
        return self.norm(self.conv(x))


def make_model(channels=NUM_CHANNELS, seed=1):
    return randomize(Model(channels).double(), seed).train()


def make_data(rank=0):
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(2 + rank, NUM_CHANNELS, 3, 3, generator=generator).double() for _ in range(NUMBER)]


class Forward:
    """Fails in a call."""

    def __init__(self, at=None, error=None):
        self.at, self.error, self.calls = at, error, 0

    def __call__(self, model, batch):
        self.calls += 1
        model(batch)  # the batch is in the collectors
        if self.calls == self.at:
            raise self.error


def interrupt(path, at=33, model=None, **arguments):
    with pytest.raises(KeyboardInterrupt):
        recompute_population_statistics(
            model or make_model(),
            make_data(),
            forward=Forward(at, KeyboardInterrupt()),
            state_file=path,
            **arguments,
        )


@pytest.mark.parametrize("estimator", ["pooled", "mean_of_batches", "moving_average"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("lost")])
def test_it_goes_on_and_ends_bitwise_as_without_interruption(tmp_path, estimator, error):
    path = tmp_path / "state"
    whole, parts = make_model(), make_model()
    expected = recompute_population_statistics(whole, make_data(), estimator=estimator)
    before = snapshot(parts)
    with pytest.raises(type(error)):
        recompute_population_statistics(
            parts, make_data(), forward=Forward(33, error), estimator=estimator, state_file=path
        )
    assert_as_before(parts, before)
    assert path.is_file()
    second = Forward(28, error)  # twenty of these are before the next write
    with pytest.raises(type(error)):
        recompute_population_statistics(parts, make_data(), forward=second, estimator=estimator, state_file=path)
    last = Forward()
    report = recompute_population_statistics(parts, make_data(), forward=last, estimator=estimator, state_file=path)
    assert last.calls == NUMBER - 40, "the first forty are loaded and passed over"
    assert report == expected
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in parts.state_dict().items())
    assert os.listdir(tmp_path) == []


def test_a_run_that_stops_by_its_tolerance_goes_on_too(tmp_path):
    whole, parts = make_model(), make_model()
    expected = recompute_population_statistics(whole, make_data(), tolerance=0.06)
    assert 24 <= expected.num_batches < NUMBER
    interrupt(tmp_path / "state", at=22, model=parts, tolerance=0.06)
    report = recompute_population_statistics(parts, make_data(), tolerance=0.06, state_file=tmp_path / "state")
    assert report == expected
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in parts.state_dict().items())


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (make_model(seed=2), {}, r"got 'weights \w+, estimator pooled' instead of 'weights \w+"),
        (make_model(channels=5), {}, "instead of"),
        (nn.Sequential(make_model()), {}, "got 1 sets, .'norm'. first"),
        (make_model(), {"estimator": "mean_of_batches"}, "instead of 'weights .*, estimator mean_of_batches'"),
        (make_model(), {"estimator": "moving_average", "momentum": 0.2}, "estimator moving_average, momentum 0.2"),
    ],
    ids=["weights", "channels", "names", "estimator", "momentum"],
)
def test_a_file_of_another_run_is_refused(tmp_path, model, arguments, message):
    path = tmp_path / "state"
    interrupt(path, **({"estimator": "moving_average"} if "momentum" in arguments else {}))
    content, before = path.read_bytes(), snapshot(model)
    with pytest.raises(StatisticsError, match=r"state_file must be of an interrupted run.*" + message) as caught:
        recompute_population_statistics(model, make_data(), state_file=path, **arguments)
    assert f"Remove {path} to begin anew" in str(caught.value)
    assert_as_before(model, before)
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"nonsense", None], ids=["empty", "nonsense", "half"])
def test_a_damaged_file_is_refused(tmp_path, content):
    path = tmp_path / "state"
    interrupt(path)
    path.write_bytes(path.read_bytes()[:500] if content is None else content)
    with pytest.raises(StatisticsError, match=r"state_file must be of an interrupted run.*got .*Error"):
        recompute_population_statistics(make_model(), make_data(), state_file=path)


def test_a_run_of_fewer_batches_than_the_file_is_refused(tmp_path):
    path = tmp_path / "state"
    interrupt(path)
    for data, limits in ((make_data(), {"num_batches": 10}), (make_data()[:19], {})):
        model = make_model()
        before = snapshot(model)
        with pytest.raises(StatisticsError, match=r"no more batches than there are; got 20 of 1\d"):
            recompute_population_statistics(model, data, state_file=path, **limits)
        assert_as_before(model, before)


class FullDisk(Forward):
    """Before a call, the disk of a file becomes full."""

    def __init__(self, path, at=30):
        super().__init__()
        self.path, self.full_at = f"{path}.partial", at

    def __call__(self, model, batch):
        if self.calls + 1 == self.full_at:
            os.symlink("/dev/full", self.path)
        super().__call__(model, batch)


on_linux = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")


@on_linux
def test_the_file_is_whole_at_any_time(tmp_path):
    """The second write fails half way; the first one's file stays."""
    path = tmp_path / "state"
    model = make_model()
    before = snapshot(model)
    with pytest.raises(StatisticsError, match=r"state_file must be .* with room; got OSError.*No space left.*goes on"):
        recompute_population_statistics(model, make_data(), state_file=path, forward=FullDisk(path))
    assert_as_before(model, before)
    assert os.listdir(tmp_path) == ["state"]
    assert torch.load(path, weights_only=True)["done"] == 20


@pytest.mark.parametrize("content", [b"nonsense", None], ids=["damaged", "gone"])
def test_the_file_of_the_round_before_is_kept_and_used(tmp_path, content):
    path, previous = tmp_path / "state", tmp_path / "state.previous"
    whole, parts, last = make_model(), make_model(), Forward()
    expected = recompute_population_statistics(whole, make_data())
    interrupt(path, at=45, model=parts)
    assert [torch.load(file, weights_only=True)["done"] for file in (path, previous)] == [40, 20]
    path.unlink() if content is None else path.write_bytes(content)
    report = recompute_population_statistics(parts, make_data(), forward=last, state_file=path)
    assert last.calls == NUMBER - 20
    assert report == expected
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in parts.state_dict().items())
    assert os.listdir(tmp_path) == []


def test_both_files_are_named_when_none_fits(tmp_path):
    path = tmp_path / "state"
    interrupt(path, at=45)
    with pytest.raises(StatisticsError, match=r"Remove \S+/state and \S+/state\.previous to begin anew"):
        recompute_population_statistics(make_model(seed=2), make_data(), state_file=path)
    assert sorted(os.listdir(tmp_path)) == ["state", "state.previous"]


def test_a_short_run_leaves_no_file(tmp_path):
    recompute_population_statistics(make_model(), make_data()[:3], state_file=str(tmp_path / "state"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("where", "message"),
    [("missing/state", "got a folder that does not exist"), ("", "got a folder ")],
)
def test_a_path_that_cannot_be_written_is_refused_at_once(tmp_path, where, message):
    forward = Forward()
    with pytest.raises(StatisticsError, match=r"state_file must be a file in a folder that exists; " + message):
        recompute_population_statistics(make_model(), make_data(), forward=forward, state_file=tmp_path / where)
    assert forward.calls == 0


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

"""An interrupted re-estimation goes on from its file, and ends bitwise as one that was not interrupted."""

import os

import pytest
import torch
from torch import nn

from bnext import StatisticsError, recompute_population_statistics
from tests.cases import NUM_CHANNELS, randomize
from tests.statistics.models import assert_as_before, snapshot

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
        (make_model(seed=2), {}, r"got 'weights \w+, estimator pooled, 1 worker.s.' instead of 'weights \w+"),
        (make_model(channels=5), {}, "instead of"),
        (nn.Sequential(make_model()), {}, "got 1 sets, .'norm'. first"),
        (make_model(), {"estimator": "mean_of_batches"}, "instead of .*, estimator mean_of_batches, 1 worker"),
        (make_model(), {"estimator": "moving_average", "momentum": 0.2}, "estimator moving_average, momentum 0.2"),
        (make_model(), {"domain": "night"}, r"1 worker.s.' instead of .*, 1 worker.s., domain night'"),
    ],
    ids=["weights", "channels", "names", "estimator", "momentum", "domain"],
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


def test_a_file_of_more_workers_or_of_no_round_is_refused(tmp_path):
    path = tmp_path / "state"
    interrupt(path)
    whole = torch.load(path)
    for changed, message in (
        ({"done": -3}, "got -3 rounds"),
        ({"run": whole["run"].replace("1 worker", "3 worker")}, r"3 worker.s.' instead of .* 1 worker"),
    ):
        torch.save({**whole, **changed}, path)
        with pytest.raises(StatisticsError, match=message):
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

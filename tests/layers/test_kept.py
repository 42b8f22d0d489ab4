"""Frozen statistics and other code, which resets, assigns, averages or writes them."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from bnext.errors import StatisticsError
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.level_norm import LevelBatchNorm2d
from bnext.layers.spec import NormSpec
from bnext.scope import use_domain
from bnext.statistics.online import following_stream
from bnext.surgery.convert import convert_norm
from bnext.surgery.freezing import freeze_norms, unfreeze_norms
from tests.workers import run_workers

DOMAINS = NormSpec(population="per_domain", affine="per_domain", domains=("day", "night"))
X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1


def call(model):
    with use_domain("day"):
        return model(X)


def make(spec=None):
    """A model in training whose norm has moved statistics, which are then frozen."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), BatchNorm2d(3, spec)).train()
    for _ in range(2):
        call(model)
    freeze_norms(model)
    return model


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_state(model, state):
    assert [key for key, value in model.state_dict().items() if not torch.equal(value, state[key])] == []


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def list_holders(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def reset(model):
    for module in list_holders(model):
        module.reset_running_stats()


def reset_all(model):
    for module in list_holders(model):
        module.reset_parameters()


def assign(model):
    for module in list_holders(model):
        if module.running_mean is not None:
            module.running_mean, module.running_var = torch.zeros(3), torch.ones(3)


def register(model):
    for module in list_holders(model):
        if module.running_mean is not None:
            module.register_buffer("running_var", torch.ones(3))


def average_of_weights(model):
    with use_domain("day"):
        update_bn([X, X], model)


@pytest.mark.parametrize("spec", [None, DOMAINS], ids=["plain", "domains"])
@pytest.mark.parametrize("reach", [reset, reset_all, assign, register, average_of_weights])
def test_frozen_statistics_are_kept_and_it_is_said_by_whom_they_were_reached(reach, spec, caplog):
    model = make(spec)
    before, output = state_of(model), call(model)
    reach(model)
    assert_state(model, before)
    assert torch.equal(call(model), output)
    del caplog.records[:]
    unfreeze_norms(model)
    reach(model)
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items()), "thawed: as ever"
    assert messages(caplog) == []


def test_it_is_said_once_for_each_place_in_the_code(caplog):
    models = [make(), make()]
    for model in models:
        model[1].running_mean = torch.zeros(3)
    said = messages(caplog)
    assert len(said) == 1
    assert "test_kept.py" in said[0]


def write_in_place(state):
    state.running_mean.fill_(2.0)


def write_through_data(state):
    state.running_var.data.copy_(torch.full((3,), 5.0))


def replace_buffer(state):
    state._buffers["running_mean"] = torch.full((3,), 2.0)


def reset_counter(state):
    state.num_batches_tracked.zero_()


def average_other_statistics(state):
    state.running_mean.lerp_(torch.zeros(3), 0.01)


@pytest.mark.parametrize(
    "write", [write_in_place, write_through_data, replace_buffer, reset_counter, average_other_statistics]
)
@pytest.mark.parametrize("spec", [None, DOMAINS], ids=["plain", "domains"])
def test_a_write_by_other_code_is_found_at_the_next_forward_and_said_once(write, spec, caplog):
    model = make(spec)
    state = model[1].population_state("day" if spec else "")
    write(state)
    assert messages(caplog) == []
    call(model)
    assert len(messages(caplog)) == 1
    assert "BatchNorm2d" in messages(caplog)[0]
    write_in_place(state)
    call(model.eval())
    assert len(messages(caplog)) == 1


def test_a_write_to_a_level_names_the_level(caplog):
    norm = LevelBatchNorm2d(3, ("p3", "p4"), NormSpec.from_table5_row(6)).train()
    norm({"p3": X, "p4": X})
    freeze_norms(norm)
    norm.p4.running_mean.add_(1)
    norm({"p3": X})
    assert messages(caplog) == []
    norm({"p4": X})
    assert ["p4" in message for message in messages(caplog)] == [True]


def rewrite_same_values(model):
    for buffer in model.buffers():
        buffer.copy_(buffer.clone())
    return model


def average_equal_values(model):
    """As averages of weights in timm and ultralytics: rounded, and over all of the state dict."""
    average = copy.deepcopy(model)
    for key, value in average.state_dict().items():
        if value.is_floating_point():
            value.mul_(0.9).add_(model.state_dict()[key] * 0.1)
    return average


def average_for_long(model):
    """Each step loses a digit more."""
    average = copy.deepcopy(model)
    for _ in range(1000):
        for value, new in zip(average.buffers(), model.buffers(), strict=True):
            if value.is_floating_point():
                value.mul_(0.999).add_(new * 0.001)
    return average


def average_by_torch(model):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(3):
        call(average)
        average.update_parameters(model)
    return average.module


def lend_other_tensors(model):
    """For one call, as ensembles and evaluations of averaged weights do."""
    other = {name: buffer + 1 for name, buffer in model.named_buffers()}
    with use_domain("day"):
        outputs = [functional_call(model, buffers, (X,)) for buffers in (other, {}, other)]
    assert not torch.equal(outputs[0], outputs[1])
    return model


def load(model):
    model.load_state_dict({key: value + 1 for key, value in model.state_dict().items()})
    return model


def load_by_assignment(model):
    model.load_state_dict({key: value + 1 for key, value in model.state_dict().items()}, assign=True)
    return model


def convert(model):
    convert_norm(model, {"1": NormSpec(frozen="statistics", affine="none")})
    return model


def follow(model):
    unfreeze_norms(model)
    with following_stream(model.eval()):
        freeze_norms(model)
        model(X)
    return model.train()


@pytest.mark.parametrize(
    "deed",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.double().float(),
        rewrite_same_values,
        average_equal_values,
        average_for_long,
        average_by_torch,
        lend_other_tensors,
        load,
        load_by_assignment,
        convert,
        follow,
    ],
)
def test_nothing_is_said_of_what_is_right(deed, caplog):
    model = deed(make())
    call(model)
    call(model.eval())
    assert messages(caplog) == []


@pytest.mark.parametrize("assign", [False, True])
def test_loading_writes_frozen_statistics(assign):
    model, other = make(), make()
    model.load_state_dict(other.state_dict(), assign=assign)
    assert_state(model, other.state_dict())
    model[1].reset_running_stats()
    assert_state(model, other.state_dict())


def test_a_norm_that_was_built_frozen_may_be_initialized(caplog):
    with torch.device("meta"):
        norm = BatchNorm2d(3, NormSpec(frozen="both"))
    norm.to_empty(device="cpu").reset_parameters()
    norm.running_mean = torch.ones(3)
    norm.running_var.fill_(4.0)
    expected = nn.functional.batch_norm(X, torch.ones(3), torch.full((3,), 4.0), eps=norm.eps)
    torch.testing.assert_close(norm(X), expected)
    norm.reset_parameters()
    torch.testing.assert_close(norm(X), expected)
    assert "reset" in messages(caplog)[0]


def test_statistics_that_were_taken_away_are_missed():
    """As test-time adaptation takes them."""
    for model in (make(), nn.Sequential(nn.Identity(), BatchNorm2d(3, NormSpec(frozen="both")))):
        model[1].running_mean = model[1].running_var = None
        with pytest.raises(StatisticsError, match=r"running_mean.*unfreeze_norms"):
            model(X)


def freeze_after_steps_of_their_own(rank):
    """Messages of a worker whose statistics differ from worker 0's, which DistributedDataParallel gives to all."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), BatchNorm2d(3)).train()
    model(X + rank)
    parallel = DistributedDataParallel(model)
    parallel(X + rank)
    freeze_norms(model, "statistics")

    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("bnext").addHandler(handler)
    try:
        parallel(X)
        before = len(messages)
        if rank == 0:
            model[1].running_mean.add_(1)
        parallel(X)
    finally:
        logging.getLogger("bnext").removeHandler(handler)
    return before, len(messages), model[1].running_mean


def test_worker_0_alone_says_what_reached_the_statistics_of_all():
    (before_0, after_0, mean_0), (before_1, after_1, mean_1) = run_workers(freeze_after_steps_of_their_own, 2)
    assert (before_0, after_0, before_1, after_1) == (0, 1, 0, 0)
    assert torch.equal(mean_0, mean_1)

"""Gradient accumulation: in float64 the gradient of one large batch, where no norm sees more than a micro-batch."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bnext.errors import StatisticsError
from bnext.layers import BatchNorm2d, NormSpec
from bnext.repair import accumulate_gradients, split_batch
from tests.workers import run_workers

EXACT = {"rtol": 1e-12, "atol": 1e-13}
NUMBER = 3
NORMS = {
    "frozen": lambda: BatchNorm2d(6, NormSpec(frozen="statistics")),
    "ghost": lambda: BatchNorm2d(6, NormSpec(normalization_batch_size=2)),
    "group": lambda: nn.GroupNorm(2, 6),
    "evaluation": lambda: nn.BatchNorm2d(6).eval(),
}


def make_model(norm="ghost"):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), NORMS[norm](), nn.ReLU(), nn.Conv2d(6, 1, 3)).double()
    nn.init.normal_(model[1].weight)
    return model


def make_data(number=6):
    return torch.randn(number, 3, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def compute_loss(model, images):
    return {"near": model(images).square().mean(), "far": model(images.flip(1)).abs().mean()}


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def differentiate_whole(model, images):
    losses = compute_loss(model, images)
    sum(losses.values()).backward()
    return gradients(model), {name: loss.detach() for name, loss in losses.items()}


@pytest.mark.parametrize("norm", NORMS)
def test_the_gradient_is_that_of_one_large_batch(norm):
    model, images = make_model(norm), make_data()
    expected, losses = differentiate_whole(copy.deepcopy(model), images)
    found = accumulate_gradients(model, split_batch(images, NUMBER), lambda batch: compute_loss(model, batch))
    torch.testing.assert_close(gradients(model), expected, **EXACT)
    torch.testing.assert_close(found, losses, **EXACT)
    assert not any(loss.requires_grad for loss in found.values())


def test_a_norm_of_the_whole_batch_sees_micro_batches():
    """What the equality is not: torch's norm in training."""
    model, images = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1)).double(), make_data()
    expected, _ = differentiate_whole(copy.deepcopy(model), images)
    accumulate_gradients(model, split_batch(images, NUMBER), lambda batch: compute_loss(model, batch))
    assert not torch.allclose(model[1].weight.grad, expected["1.weight"])
    assert model[0].num_batches_tracked == 2 * NUMBER


def test_micro_batches_weigh_as_many_samples_as_they_have():
    model, images = make_model("group"), make_data(7)
    expected, _ = differentiate_whole(copy.deepcopy(model), images)
    parts = images.split([1, 4, 2])
    accumulate_gradients(model, parts, lambda batch: compute_loss(model, batch))
    torch.testing.assert_close(gradients(model), expected, **EXACT)


def test_samples_are_not_counted_by_the_parts_of_a_batch():
    """A pair of images and labels is not two samples: micro-batches of 4 and 2 images would weigh the same."""
    model, images, labels = make_model("group"), make_data(), torch.zeros(6, dtype=torch.float64)

    def loss(images, labels):
        return (model(images).mean((1, 2, 3)) - labels).square().mean()

    pairs = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    kinds = [pairs, [[*pair] for pair in pairs], [dict(zip("xy", pair, strict=True)) for pair in pairs]]
    for batches in kinds:
        with pytest.raises(StatisticsError, match="num_samples="):
            accumulate_gradients(model, batches, lambda batch: loss(*batch))

    loss(images, labels).backward()
    expected = gradients(model)
    model.zero_grad()
    accumulate_gradients(model, pairs, lambda pair: loss(*pair), num_samples=lambda pair: len(pair[0]))
    torch.testing.assert_close(gradients(model), expected, **EXACT)


def test_a_micro_batch_without_samples_weighs_nothing():
    model, images = make_model("group"), make_data(4)
    expected, losses = differentiate_whole(copy.deepcopy(model), images)
    parts = [images[:3], images[:0], images[3:]]
    found = accumulate_gradients(model, parts, lambda batch: compute_loss(model, batch))
    torch.testing.assert_close(gradients(model), expected, **EXACT)
    torch.testing.assert_close(found, losses, **EXACT)


def test_gradients_are_added_to_those_that_are_there():
    model, images = make_model(), make_data()
    for _ in range(2):
        accumulate_gradients(model, split_batch(images, NUMBER), lambda batch: compute_loss(model, batch))
    twice = gradients(model)
    model.zero_grad()
    accumulate_gradients(model, split_batch(images, NUMBER), lambda batch: compute_loss(model, batch))
    torch.testing.assert_close(twice, {name: 2 * value for name, value in gradients(model).items()}, **EXACT)


@pytest.mark.parametrize("overflows", [False, True])
def test_a_scaler_steps_and_updates_once(overflows):
    """An overflow in one micro-batch skips the whole step, and halves the scale once."""
    model, images = make_model(), make_data()
    if overflows:
        images[3] = torch.inf
    before, scaler = copy.deepcopy(model.state_dict()), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    expected = None if overflows else differentiate_whole(copy.deepcopy(model), images)[0]

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    accumulate_gradients(
        model,
        split_batch(images, NUMBER),
        lambda batch: compute_loss(model, batch),
        backward=lambda loss: scaler.scale(loss).backward(),
    )
    scaler.step(optimizer)
    scaler.update()

    assert scaler.get_scale() == (2.0**9 if overflows else 2.0**10)
    for name, parameter in model.named_parameters():
        step = torch.zeros_like(parameter) if overflows else expected[name]
        torch.testing.assert_close(before[name] - parameter.detach(), step, **EXACT)


def accumulate_on_a_worker(rank):
    """Gradients of a worker, and how often gradients were exchanged."""
    torch.manual_seed(1)
    model = DistributedDataParallel(make_model())
    exchanges = []

    def exchange(state, bucket):
        exchanges.append(bucket.is_last())
        sums = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
        return sums.then(lambda future: future.value()[0] / 2)

    model.register_comm_hook(None, exchange)
    share = make_data(8)[rank * 4 : rank * 4 + 4]
    accumulate_gradients(model, split_batch(share, 2), lambda batch: compute_loss(model, batch))
    return gradients(model.module), exchanges


def test_workers_exchange_gradients_once_a_step():
    expected, _ = differentiate_whole(make_model(), make_data(8))
    for found, exchanges in run_workers(accumulate_on_a_worker, 2):
        torch.testing.assert_close(found, expected, **EXACT)
        assert exchanges == [True]


@pytest.mark.parametrize("batch", [[1, 2, 3], [], "four", iter([1, 2]), None, torch.zeros(3, 2), (1, 2)])
def test_a_batch_that_cannot_be_cut_is_refused(batch):
    with pytest.raises(StatisticsError, match="a batch must be a list"):
        split_batch(batch, 2)


@pytest.mark.parametrize("number", [0, -1, 2.0])
def test_a_number_that_is_none_is_refused(number):
    with pytest.raises(StatisticsError, match="number"):
        split_batch([1, 2], number)


@pytest.mark.parametrize("loss", [None, {}, 1.0, torch.zeros(2), {"near": torch.zeros(2)}, {"near": 1.0}])
def test_what_is_no_loss_is_refused(loss):
    with pytest.raises(StatisticsError, match="the loss of a micro-batch"):
        accumulate_gradients(make_model(), [make_data()], lambda batch: loss)


@pytest.mark.parametrize("batches", [[], [[]]])
def test_a_step_without_samples_is_refused(batches):
    with pytest.raises(StatisticsError, match="micro-batches must hold samples"):
        accumulate_gradients(make_model(), batches, lambda batch: torch.zeros((), requires_grad=True))

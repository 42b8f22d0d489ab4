"""Virtual samples enlarge every mini-batch, carry no gradient, and leave no trace."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bnext import StatisticsError, use_domain
from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec, virtual_samples
from tests import reference
from tests.cases import LEVELS, NUM_CHANNELS, make_features, randomize
from tests.record import assert_nothing_is_open
from tests.workers import run_workers

EXACT = {"rtol": 1e-11, "atol": 1e-11}


def make_images(seed, num_samples=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_samples, NUM_CHANNELS, 4, 5, generator=generator, dtype=torch.float64) * 2 + seed


def make_model(**answers):
    spec = NormSpec(**answers)
    norms = [BatchNorm2d(NUM_CHANNELS, spec) for _ in range(2)]
    conv = nn.Conv2d(NUM_CHANNELS, NUM_CHANNELS, 1)
    return randomize(nn.Sequential(norms[0], conv, nn.ReLU(), norms[1]).double())


def run_reference(model, own, virtual, conv):
    """The same model by concatenation: virtual samples are normalized by themselves, own ones by both."""
    for norm in (model[0], model[3]):
        alone = reference.concatenated_batch_norm([virtual], [norm.weight], [norm.bias], norm.eps)[0].detach()
        pair = reference.concatenated_batch_norm([own, virtual], [norm.weight] * 2, [norm.bias] * 2, norm.eps)
        own, virtual = pair[0], alone
        if norm is model[0]:
            own, virtual = conv(own).relu(), conv(virtual).relu().detach()
    return own


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_a_mini_batch_and_its_virtual_samples_are_normalized_as_one(mode):
    model = make_model(inference="mini_batch").train(mode == "training")
    images = [make_images(1).requires_grad_() for _ in range(2)]
    with virtual_samples(model, make_images(2, 7)):
        output = model(images[0])
    expected = run_reference(model, images[1], make_images(2, 7), model[1])
    torch.testing.assert_close(output, expected, **EXACT)
    factors = torch.randn_like(output)
    parameters = list(model.parameters())
    actual = torch.autograd.grad(output, [images[0], *parameters], factors)
    right = torch.autograd.grad(expected, [images[1], *parameters], factors)
    torch.testing.assert_close(actual, right, **EXACT)


def test_running_statistics_take_in_the_enlarged_mini_batch_once():
    model = make_model(momentum=1.0).train()
    with virtual_samples(model, make_images(2, 7)):
        model(make_images(1))
    count, mean, var = reference.moments_of([make_images(1), make_images(2, 7)])
    torch.testing.assert_close(model[0].running_mean, mean, **EXACT)
    torch.testing.assert_close(model[0].running_var, var * count / (count - 1), **EXACT)
    assert int(model[0].num_batches_tracked) == 8  # 7 from `randomize`


def test_each_group_of_a_ghost_batch_is_enlarged():
    norm = make_model(normalization_batch_size=2)[0].train()
    with virtual_samples(norm, make_images(2)):
        output = norm(make_images(1, 4))
    for start in (0, 2):
        own = make_images(1, 4)[start : start + 2]
        pair = reference.concatenated_batch_norm([own, make_images(2)], [norm.weight] * 2, [norm.bias] * 2, norm.eps)
        torch.testing.assert_close(output[start : start + 2], pair[0], **EXACT)


@pytest.mark.parametrize("row", [1, 6])
def test_levels_are_enlarged_by_their_own(row):
    norm = randomize(LevelBatchNorm2d(NUM_CHANNELS, LEVELS, NormSpec.from_table5_row(row)).double()).train()
    own, virtual = make_features(0), make_features(5, ((4, 6, 5), (4, 3, 3), (4, 2, 1)))
    with virtual_samples(norm, virtual):
        outputs = norm(own)
    for batch in [LEVELS] if row == 1 else [(level,) for level in LEVELS]:
        states = [norm.affine_state(level) for level in batch] * 2
        features = [own[level] for level in batch] + [virtual[level] for level in batch]
        affines = [[state.weight for state in states], [state.bias for state in states]]
        expected = reference.concatenated_batch_norm(features, *affines, norm.eps)
        for level, right in zip(batch, expected, strict=False):
            torch.testing.assert_close(outputs[level], right, **EXACT)


def test_a_single_image_at_test_time_no_longer_depends_on_itself_alone():
    model = make_model(inference="mini_batch").eval()
    alone = model(make_images(1, 1))
    with virtual_samples(model, make_images(2, 64)):
        enlarged = model(make_images(1, 1))
        together = model(make_images(1, 1))
    torch.testing.assert_close(enlarged, together, rtol=0, atol=0)
    assert (enlarged - alone).abs().max() > 0.1
    torch.testing.assert_close(model(make_images(1, 1)), alone, rtol=0, atol=0)


@pytest.mark.parametrize("fails", ["in the virtual forward", "in the scope"])
def test_nothing_is_left_after_an_exception(fails):
    model = make_model().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model.state_dict()
    wrong = torch.zeros(2, 3) if fails == "in the virtual forward" else make_images(2)
    with pytest.raises((StatisticsError, KeyError)), virtual_samples(model, wrong):
        raise KeyError("in the scope")
    assert all(torch.equal(expected[key], value) for key, value in before.items())
    assert_nothing_is_open()


def test_scopes_nest():
    norm = make_model()[0].train()
    with virtual_samples(norm, make_images(2)):
        outer = norm(make_images(1))
        with virtual_samples(norm, make_images(3)):
            inner = norm(make_images(1))
        assert torch.equal(norm(make_images(1)), outer)
    assert not torch.equal(inner, outer)


def enlarge(model, data, forward=None):
    with virtual_samples(model, data, forward=forward):
        pass


def test_what_cannot_be_enlarged_is_said():
    shared = make_model()[0].train()
    for text, arguments in {
        r"uses its mini-batch; got none \(Conv2d, training mode\)": (nn.Conv2d(1, 1, 1), 0),
        r"got none \(Sequential, evaluation mode\)": (make_model().eval(), make_images(1)),
        "Pass forward=": (make_model().train(), make_images(1), skip),
        "once; got a second call": (nn.Sequential(shared, shared), make_images(1)),
    }.items():
        with pytest.raises(StatisticsError, match=text):
            enlarge(*arguments)


def skip(model, data):
    """A forward that reaches no norm."""


def enlarged_over_workers(rank, virtual_samples_of):
    norm = make_model(workers="all")[0].train()
    with virtual_samples(norm, make_images(10 + rank, virtual_samples_of[rank])):
        return norm(make_images(rank, 2 + rank))


def test_workers_share_the_virtual_samples():
    outputs = run_workers(enlarged_over_workers, 2, (4, 0))
    norm = make_model()[0]
    own, extra = [make_images(0, 2), make_images(1, 3)], make_images(10, 4)
    expected = reference.concatenated_batch_norm([*own, extra], [norm.weight] * 3, [norm.bias] * 3, norm.eps)
    for output, right in zip(outputs, expected, strict=False):
        torch.testing.assert_close(output, right, **EXACT)


def test_a_domain_without_samples_of_its_own_does_not_move():
    spec = NormSpec(statistics="per_domain", population="per_domain", domains=("day", "night"))
    norm = BatchNorm2d(NUM_CHANNELS, spec).double().train()

    def run(model, images):
        with use_domain("night"):
            model(images)

    with virtual_samples(norm, make_images(2), forward=run), use_domain("day"):
        norm(make_images(1))
    assert (int(norm.day.num_batches_tracked), int(norm.night.num_batches_tracked)) == (1, 0)


def test_activations_that_are_computed_again_in_the_scope_are_enlarged_too():
    gradients = []
    for use_checkpoint in (False, True):
        model, images = make_model(normalization_batch_size=2).train(), make_images(1).requires_grad_()
        with virtual_samples(model, make_images(2)):
            output = checkpoint(model[3], images, use_reentrant=False) if use_checkpoint else model[3](images)
            output.pow(3).sum().backward()
        gradients.append(images.grad)
    torch.testing.assert_close(*gradients, **EXACT)


def test_the_population_counts_virtual_samples_once_however_many_groups_there_are():
    norm = make_model(normalization_batch_size=1, momentum=1.0)[0].train()
    with virtual_samples(norm, make_images(2, 4)):
        norm(make_images(1, 3))
    count, mean, var = reference.moments_of([make_images(1, 3), make_images(2, 4)])
    torch.testing.assert_close(norm.running_mean, mean, **EXACT)
    torch.testing.assert_close(norm.running_var, var * count / (count - 1), **EXACT)

"""Code of other people that takes a norm for torch's: it fills its fields, resets them, folds, freezes or rebuilds it.

Written here as torch, timm and Lightning have it, with the same reads and writes in the same order.
"""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from bnext import BatchNorm2d, LevelBatchNorm2d, NormSpec, use_domain
from bnext.errors import StatisticsError
from bnext.layers.owned_fields import OwnedField

C = 4
OWN_ALL = NormSpec(statistics="per_domain", population="per_domain", affine="per_domain", domains=("a", "b"))
OWN_AFFINE = NormSpec(affine="per_domain", domains=("a", "b"))
OWN_POPULATION = NormSpec(statistics="per_domain", population="per_domain", domains=("a", "b"))
every_owner = pytest.mark.parametrize(
    "spec", [OWN_ALL, OWN_AFFINE, OWN_POPULATION], ids=["all", "affine", "population"]
)


def make_model(spec):
    return nn.Sequential(nn.Conv2d(3, C, 1, bias=False), BatchNorm2d(C, spec))


def list_norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


# ---- initialisation


@pytest.mark.parametrize("spec", [NormSpec(), OWN_ALL, OWN_AFFINE, OWN_POPULATION])
def test_initialisation_reaches_every_affine(spec):
    model = make_model(spec)
    for norm in list_norms(model):
        nn.init.constant_(norm.weight, 3)
        nn.init.normal_(norm.bias)
        norm.bias.data.fill_(5)
        norm.weight.requires_grad = False
        norm.bias.requires_grad_(False)
    affine = dict(model[1].named_parameters())
    assert affine
    assert all((value == (3 if name.endswith("weight") else 5)).all() for name, value in affine.items())
    assert not any(value.requires_grad for value in affine.values())


@every_owner
def test_the_norm_alone_stands_for_all_owners(spec):
    norm = BatchNorm2d(C, spec)
    keys = list(norm.state_dict())
    norm.weight = nn.Parameter(torch.full((C,), 2.0))
    norm.running_mean = torch.full((C,), 7.0)
    norm.num_batches_tracked += 4
    assert list(norm.state_dict()) == keys
    right = {"weight": 2, "bias": 0, "running_mean": 7, "running_var": 1, "num_batches_tracked": 4}
    for key, value in norm.state_dict().items():
        assert (value == right[key.rpartition(".")[2]]).all()
    twin = pickle.loads(pickle.dumps(copy.deepcopy(norm)))
    assert list(twin.state_dict()) == keys


def test_a_field_of_several_is_written_described_and_imitated_but_not_read():
    norm = BatchNorm2d(C, OWN_ALL)
    field = norm.running_mean
    assert isinstance(field, OwnedField)
    assert (field.shape, field.dtype, torch.ones_like(field).sum()) == ((C,), torch.float32, C)
    for read in (
        lambda: field + 1,
        lambda: 2 * field,
        lambda: field[0],
        lambda: torch.sqrt(field),
        lambda: field.clone(),
    ):
        with pytest.raises(StatisticsError, match="running_mean"):
            read()
    assert BatchNorm2d(C, NormSpec(affine="none")).weight is None


# ---- statistics set anew


def reset_for_an_average(model):
    """As Lightning's StochasticWeightAveraging does before its last epoch."""
    momenta = {}
    for module in model.modules():
        if not isinstance(module, _BatchNorm):
            continue
        assert module.running_mean is not None
        module.running_mean = torch.zeros_like(
            module.running_mean, device=torch.device("cpu"), dtype=module.running_mean.dtype
        )
        assert module.running_var is not None
        module.running_var = torch.ones_like(
            module.running_var, device=torch.device("cpu"), dtype=module.running_var.dtype
        )
        momenta[module] = module.momentum
        module.momentum = None
        module.num_batches_tracked *= 0
    return momenta


@pytest.mark.parametrize("row", [1, 2, 4, 5, 6])
def test_an_average_over_weights_gets_the_statistics_of_its_epoch(row):
    norm = LevelBatchNorm2d(C, ("p3", "p4"), NormSpec.from_table5_row(row))
    fresh = LevelBatchNorm2d(C, ("p3", "p4"), NormSpec.from_table5_row(row).replace(average="cumulative"))
    batches = [{level: torch.randn(2, C, 3, 3) * 2 + index for level in ("p3", "p4")} for index in range(3)]
    norm(batches[0])
    momenta = reset_for_an_average(norm)
    for batch in batches:
        norm(batch), fresh(batch)
    torch.testing.assert_close(dict(norm.state_dict()), dict(fresh.state_dict()))
    for module, momentum in momenta.items():
        module.momentum = momentum
    assert norm.momentum == 0.1


@pytest.mark.parametrize(
    "spec",
    [NormSpec(), NormSpec(training="renorm"), OWN_POPULATION, NormSpec(training="population")],
)
@pytest.mark.parametrize("training", [True, False])
def test_without_statistics_the_mini_batch_normalizes_in_every_mode(spec, training):
    """Test-time adaptation, and torch.func.replace_all_batch_norm_modules_."""
    norm, x = BatchNorm2d(C, spec), torch.randn(3, C, 2, 2)
    for module in list_norms(norm):
        module.track_running_stats = False
        module.running_mean = module.running_var = None
    with use_domain("a"):
        output = norm.train(training)(x)
    torch.testing.assert_close(output, nn.BatchNorm2d(C, track_running_stats=False)(x))


def test_statistics_of_one_domain_alone_are_missed():
    norm = BatchNorm2d(C, OWN_POPULATION).eval()
    norm.b.running_mean = None
    with use_domain("b"), pytest.raises(StatisticsError, match="BatchNorm2d, b"):
        norm(torch.randn(3, C, 2, 2))


# ---- another thing in its place


def freeze_as_timm(norm):
    frozen = {}
    if norm.affine:
        frozen["weight"] = norm.weight.data.clone().detach()
        frozen["bias"] = norm.bias.data.clone().detach()
    frozen["running_mean"] = norm.running_mean.data
    return frozen


def synchronize_as_timm(norm):
    other = nn.SyncBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    if norm.affine:
        with torch.no_grad():
            other.weight, other.bias = norm.weight, norm.bias
    other.running_mean, other.running_var = norm.running_mean, norm.running_var
    return other


@every_owner
@pytest.mark.parametrize("rebuild", [freeze_as_timm, synchronize_as_timm])
def test_a_norm_with_owners_cannot_be_rebuilt_from_torchs_fields(spec, rebuild):
    with pytest.raises(StatisticsError, match="convert_norm"):
        rebuild(BatchNorm2d(C, spec))


@pytest.mark.parametrize(
    "spec",
    [OWN_ALL, OWN_AFFINE, OWN_POPULATION, NormSpec(inference="mini_batch")],
    ids=["all", "affine", "stats", "batch"],
)
def test_torchs_folding_refuses_what_it_would_fold_wrong(spec):
    with pytest.raises(StatisticsError, match="fold_norms"):
        fuse_conv_bn_eval(*make_model(spec).eval())


def test_torchs_folding_and_synchronizing_of_a_plain_norm_are_right():
    model, x = make_model(NormSpec()).eval(), torch.randn(2, 3, 3, 3)
    model[1].running_mean.uniform_()
    torch.testing.assert_close(fuse_conv_bn_eval(*model)(x), model(x))
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    assert type(synchronized[1]) is nn.SyncBatchNorm
    torch.testing.assert_close(synchronized(x), model(x))


@pytest.mark.parametrize(
    "spec",
    [
        OWN_ALL,
        OWN_POPULATION,
        NormSpec(frozen="both"),
        NormSpec(training="renorm"),
        NormSpec(normalization_batch_size=2),
    ],
)
def test_torchs_synchronizing_refuses_answers_that_it_would_lose(spec):
    with pytest.raises(StatisticsError, match="convert_norm"):
        nn.SyncBatchNorm.convert_sync_batchnorm(make_model(spec))

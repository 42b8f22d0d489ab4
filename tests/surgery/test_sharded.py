"""Models whose parameters are sharded over workers: their norms are changed before, or not at all."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Replicate, distribute_tensor

from bnext import BatchNorm2d, NormSpec, convert_norm, fold_norms, freeze_norms
from bnext.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:FSDP is switching to use .NO_SHARD.:UserWarning")
fully_shard = pytest.importorskip("torch.distributed.fsdp").fully_shard


@pytest.fixture(autouse=True)
def world():
    """Of one worker, which is enough to be sharded."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def make_model(norm):
    return nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), norm)


def shard(model, mesh):
    fully_shard(model[1], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def wrap(model, mesh):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=False)


def wrap_and_take_out(model, mesh):
    return wrap(model, mesh).module


def distribute(model, mesh):
    model[1].weight = nn.Parameter(distribute_tensor(model[1].weight.detach(), mesh, [Replicate()]))
    return model


@pytest.mark.parametrize("wrapper", [shard, wrap, wrap_and_take_out, distribute])
def test_norms_of_a_sharded_model_are_not_replaced(world, wrapper):
    for change in (lambda model: convert_norm(model, {"": NormSpec()}), fold_norms, freeze_norms):
        model = wrapper(make_model(nn.BatchNorm2d(4)), world).eval()
        modules = list(model.modules())
        with pytest.raises(ConfigError, match="before fully_shard"):
            change(model)
        assert list(model.modules()) == modules


@pytest.mark.parametrize("spec", [NormSpec(), NormSpec(normalization_batch_size=2), NormSpec(training="renorm")])
def test_our_norms_are_sharded_with_the_model(world, spec):
    whole, sharded = (make_model(BatchNorm2d(4, spec)) for _ in range(2))
    sharded.load_state_dict(whole.state_dict())
    shard(sharded, world)
    x = torch.randn(4, 3, 3, 3)
    for model in (whole, sharded):
        model(x).pow(3).sum().backward()
    for mine, other in zip(sharded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.full_tensor(), other.grad)
    torch.testing.assert_close(dict(sharded.named_buffers()), dict(whole.named_buffers()))
    torch.testing.assert_close(sharded.eval()(x), whole.eval()(x))

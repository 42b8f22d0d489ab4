"""What real training loops do with a norm: statistics move exactly once for every forward that is training."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from bnext.layers import BatchNorm2d, NormSpec
from bnext.scope import frozen_statistics, use_domain
from tests.cases import DOMAINS, NUM_CHANNELS
from tests.workers import run_workers

OWN = NormSpec(statistics="per_domain", population="per_domain", affine="per_domain", domains=DOMAINS)
SPECS = {
    "plain": NormSpec(),
    "ghost": NormSpec(normalization_batch_size=2),
    "renorm": NormSpec(training="renorm"),
    "population": NormSpec(training="population"),
    "cumulative": NormSpec(average="cumulative"),
    "sync": NormSpec(workers="all"),
    "domains": OWN,
    "domains_sync": OWN.replace(workers="all", statistics="shared"),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
NAMES = ["day", "night", "night", "day", "fog"]
EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Net(nn.Module):
    """A convolution, a norm, a ReLU in place, and once more; perhaps with activation checkpointing."""

    def __init__(self, spec, use_reentrant=None):
        super().__init__()
        torch.manual_seed(0)
        self.use_reentrant = use_reentrant
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, NUM_CHANNELS, 3, padding=1), BatchNorm2d(NUM_CHANNELS, spec), nn.ReLU(True))
            for c in (2, NUM_CHANNELS)
        )

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.use_reentrant is None else checkpoint(block, x, use_reentrant=self.use_reentrant)
        return x


def build(spec, use_reentrant=None):
    return Net(spec, use_reentrant).double().train()


def draw(seed, n=5):
    return torch.randn(n, 2, 5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


def loss_of(output):
    return output.square().mean() + output[:, 0].mean()


def counts_of(model):
    return {int(value) for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}


def buffers_of(model):
    return {key: value.clone() for key, value in model.named_buffers()}


def gradients_of(model):
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def assert_same_buffers(model, expected):
    assert all(torch.equal(value, expected[key]) for key, value in model.named_buffers())


# ---- one worker


@every_spec
def test_gradient_accumulation_is_one_update_per_forward(spec):
    """Each micro-batch is a mini-batch of its own: two forwards before a step are two updates, as torch's."""
    model, other = build(spec), build(spec)
    with use_domain(NAMES):
        for seed in (0, 1):
            loss_of(model(draw(seed))).backward()
        assert counts_of(model) == {2}
        for seed in (0, 1):
            other(draw(seed))
    assert_same_buffers(model, buffers_of(other))


@every_spec
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_is_one_update_per_step(spec, use_reentrant):
    """pytorch#96136, YOLO-Master#262."""
    model, plain = build(spec, use_reentrant), build(spec)
    for step in range(2):
        for net in (model, plain):
            net.zero_grad()
            with use_domain(NAMES):
                loss_of(net(draw(step).requires_grad_())).backward()
        assert counts_of(model) == {step + 1}
        assert_same_buffers(model, buffers_of(plain))
        if spec.training == "mini_batch":
            torch.testing.assert_close(gradients_of(model), gradients_of(plain), **EXACT)


@every_spec
def test_an_average_of_weights_and_buffers(spec):
    """U2PL#64, cosmix-uda#21: a teacher without buffers."""
    model = build(spec)
    teacher = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = None
    for step in range(3):
        optimizer.zero_grad()
        with use_domain(NAMES):
            loss_of(model(draw(step))).backward()
        optimizer.step()
        before = buffers_of(model)
        teacher.update_parameters(model)
        assert_same_buffers(model, before)
        state = {k: v.clone() for k, v in model.state_dict().items() if v.is_floating_point()}
        expected = state if expected is None else {k: 0.75 * expected[k] + 0.25 * v for k, v in state.items()}
    assert counts_of(model) == {3}
    averaged = {k: v for k, v in teacher.module.state_dict().items() if v.is_floating_point()}
    torch.testing.assert_close(averaged, expected, **EXACT)
    student = build(spec)
    student.load_state_dict(teacher.module.state_dict())
    with use_domain(NAMES):
        torch.testing.assert_close(teacher.eval()(draw(9)), student.eval()(draw(9)), **EXACT)


def make_discriminators():
    naive = pytest.importorskip("detectron2.layers").NaiveSyncBatchNorm
    own = {name: lambda spec=spec: BatchNorm2d(NUM_CHANNELS, spec) for name, spec in SPECS.items()}
    return {
        **own,
        "torch": lambda: nn.BatchNorm2d(NUM_CHANNELS),
        "torch_sync": lambda: nn.SyncBatchNorm(NUM_CHANNELS),
        "detectron2_naive": lambda: naive(NUM_CHANNELS),
    }


def build_discriminator(name):
    torch.manual_seed(0)
    make = make_discriminators()[name]
    return nn.Sequential(nn.Conv2d(2, NUM_CHANNELS, 3), make(), nn.LeakyReLU(0.1), make()).double().train()


@pytest.mark.parametrize("name", make_discriminators())
def test_a_discriminator_learns_from_the_fake_without_remembering_it(name):
    """pytorch#22095, #175024: real and fake images through one norm, one backward through both."""
    model, only_real, both = (build_discriminator(name) for _ in range(3))
    real, fake = draw(0), (draw(1) * 3).requires_grad_()
    with use_domain(NAMES):
        on_real = model(real)
        with frozen_statistics(model):
            on_fake = model(fake)
        (loss_of(on_real) - loss_of(on_fake)).backward()
        only_real(real)
        twin = fake.detach().clone().requires_grad_()
        right = both(real), both(twin)
        if name not in ("renorm", "population"):  # normalized by what the real images moved, either way
            torch.testing.assert_close((on_real, on_fake), right, **EXACT)
        (loss_of(right[0]) - loss_of(right[1])).backward()
    torch.testing.assert_close(dict(model.named_buffers()), dict(only_real.named_buffers()), rtol=0, atol=0)
    torch.testing.assert_close(fake.grad, twin.grad, **EXACT)
    torch.testing.assert_close(gradients_of(model), gradients_of(both), **EXACT)


def penalize(model, x):
    """A gradient penalty: the gradient of a gradient."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
    return torch.autograd.grad(slope.square().sum(), [x, *model.parameters()])


@pytest.mark.parametrize("training", [True, False])
def test_a_second_derivative_of_the_plain_norm_is_torchs(training):
    ours, torchs = BatchNorm2d(2).double().train(training), nn.BatchNorm2d(2).double().train(training)
    torch.testing.assert_close(penalize(ours, draw(0)), penalize(torchs, draw(0)), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["ghost", "renorm", "cumulative", "domains_sync"])
def test_a_second_derivative_elsewhere_is_refused(name):
    norm = BatchNorm2d(2, SPECS[name]).double().train()
    with (
        pytest.raises(RuntimeError, match=r"differentiated once; got a second derivative.*plain batch norm"),
        use_domain(NAMES),
    ):
        penalize(norm, draw(0))


# ---- two workers


def train_ddp(rank, spec, options, use_reentrant, steps):
    model = build(spec, use_reentrant)
    if spec.statistics == "per_domain" or spec.affine == "per_domain":
        options = {"find_unused_parameters": not options.get("static_graph"), **options}
    net = DistributedDataParallel(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = []
    for step in range(steps):
        optimizer.zero_grad()
        with use_domain(NAMES):
            x = draw(10 * step + rank).requires_grad_(use_reentrant is True)  # who checkpoints so needs it
            loss_of(net(x)).backward()
        history.append((buffers_of(model), {k: v.clone() for k, v in gradients_of(model).items()}))
        optimizer.step()
    return history


def train_alone(spec, steps, world_size, broadcast):
    """The same by one process: a copy of the model for each worker, buffers copied and gradients averaged by hand."""
    models = [build(spec.replace(workers="one")) for _ in range(world_size)]
    history = []
    for step in range(steps):
        start = [buffers_of(models[0])] * world_size if broadcast else [buffers_of(model) for model in models]
        for rank, model in enumerate(models):
            model.zero_grad()
            for key, value in model.named_buffers():
                value.copy_(start[rank][key])
            with use_domain(NAMES):
                loss_of(model(draw(10 * step + rank))).backward()
        mean = {k: sum(gradients_of(m)[k] for m in models) / world_size for k in gradients_of(models[0])}
        history.append([(buffers_of(model), mean) for model in models])
        with torch.no_grad():
            for model in models:
                for name, parameter in model.named_parameters():
                    parameter -= 0.1 * mean[name]
    return history


@pytest.mark.parametrize("broadcast_buffers", [True, False])
@pytest.mark.parametrize("name", ["plain", "ghost", "renorm", "population", "cumulative", "domains"])
def test_data_parallel_training_moves_statistics_once_per_step(name, broadcast_buffers):
    options = {"broadcast_buffers": broadcast_buffers}
    results = run_workers(train_ddp, 2, SPECS[name], options, None, 3)
    expected = train_alone(SPECS[name], 3, 2, broadcast_buffers)
    for step, right in enumerate(expected):
        torch.testing.assert_close([history[step] for history in results], right, **EXACT)
    final = results[0][-1][0]
    assert {int(v) for k, v in final.items() if k.endswith("num_batches_tracked")} == {3}


def train_whole(spec, steps, world_size):
    model = build(spec.replace(workers="one"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = []
    for step in range(steps):
        optimizer.zero_grad()
        with use_domain(NAMES * world_size):
            loss_of(model(torch.cat([draw(10 * step + rank) for rank in range(world_size)]))).backward()
        history.append((buffers_of(model), {k: v.clone() for k, v in gradients_of(model).items()}))
        optimizer.step()
    return history


@pytest.mark.parametrize("options", [{"broadcast_buffers": True}, {"broadcast_buffers": False}], ids=str)
@pytest.mark.parametrize("name", ["sync", "domains_sync"])
def test_data_parallel_training_with_shared_mini_batches_is_one_process_on_the_whole_batch(name, options):
    expected = train_whole(SPECS[name], 3, 2)
    for history in run_workers(train_ddp, 2, SPECS[name], options, None, 3):
        torch.testing.assert_close(history, expected, **EXACT)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["plain", "ghost", "sync", "domains_sync"])
def test_activation_checkpointing_within_data_parallel_training(name, use_reentrant):
    options = {"static_graph": True} if use_reentrant else {}
    expected = run_workers(train_ddp, 2, SPECS[name], {}, None, 2)
    actual = run_workers(train_ddp, 2, SPECS[name], options, use_reentrant, 2)
    torch.testing.assert_close(actual, expected, **EXACT)


def train_discriminator(rank, spec, broadcast_buffers):
    model = build(spec)
    only_real = copy.deepcopy(model)
    net = DistributedDataParallel(model, broadcast_buffers=broadcast_buffers)
    with use_domain(NAMES):
        on_real = net(draw(rank))
        with frozen_statistics(model):
            on_fake = net(draw(10 + rank) * 3)
        (loss_of(on_real) - loss_of(on_fake)).backward()
        only_real(draw(rank))
    return buffers_of(model), buffers_of(only_real)


@pytest.mark.parametrize("broadcast_buffers", [True, False])
@pytest.mark.parametrize("name", ["plain", "ghost", "sync", "renorm"])
def test_a_discriminator_in_data_parallel_training(name, broadcast_buffers):
    """pytorch#22095, #175024: a broadcast of buffers before the second forward changed what the first had saved."""
    for actual, expected in run_workers(train_discriminator, 2, SPECS[name], broadcast_buffers):
        torch.testing.assert_close(actual, expected, **EXACT)

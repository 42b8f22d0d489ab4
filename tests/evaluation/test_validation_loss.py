"""The validation loss: against its definition, and without a trace in model, training or random numbers."""

import copy
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import SimpleTrainer
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from bnext.config import load_config
from bnext.data.batches import build_validation_batches
from bnext.distributed import all_gather_numbers, resolve_group
from bnext.engine import Trainer, train
from bnext.engine.validation_hook import ValidationLoss
from bnext.errors import ConfigError, StatisticsError
from bnext.evaluation.validation_loss import compute_validation_loss
from bnext.layers import BatchNorm2d, NormSpec
from tests import tiny
from tests.workers import run_workers

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
RCNN = tiny.RCNN
LOSS = "TEST.BNEXT.VALIDATION_LOSS"


class Careless(nn.BatchNorm2d):
    """A subclass that writes to its statistics in training mode, whatever torch's switches say."""

    def forward(self, input):
        if self.training:
            self.running_mean += 1
            self.num_calls = getattr(self, "num_calls", 0) + 1
        return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class Net(nn.Module):
    """Two losses of labelled images; norms of three kinds, dropout, a counter, random numbers, a buffer made anew."""

    def __init__(self, norm=None):
        super().__init__()
        kinds = [nn.BatchNorm2d(4), Careless(4), BatchNorm2d(4, NormSpec(momentum=0.3)), nn.Dropout(0.5)]
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), *(kinds if norm is None else [norm]))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, batch):
        images, labels = batch
        if self.training:
            self.seen = self.seen + len(images)
            self.count += 1
            self.register_buffer("extra", torch.ones(2))
        outputs = self.body(images).mean((2, 3))
        if not self.training:
            return outputs
        noise = torch.rand(()) + random.random() + np.random.rand()  # noqa: NPY002
        return {"loss_fit": (outputs - labels).square().mean(), "loss_noise": noise + 0 * outputs.sum()}


def make_batches(*sizes):
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(n, 3, 5, 5, generator=generator) + 2, torch.randn(n, 4, generator=generator)) for n in sizes]


def copy_buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same(model, before):
    after = dict(model.named_buffers())
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(after[name], before[name])] == []


def read_randomness():
    return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002


@pytest.mark.parametrize("statistics", ["population", "mini_batch"])
def test_it_is_the_mean_over_images_of_the_losses(statistics):
    torch.manual_seed(0)
    model, batches = Net(nn.BatchNorm2d(4)), make_batches(4, 4, 1)
    model.body[1].running_mean += 0.5
    losses = compute_validation_loss(model, batches, statistics=statistics)
    expected = 0.0
    for images, labels in batches:
        features = model.body[0](images)
        norm = model.body[1]
        mean, var = norm.running_mean, norm.running_var
        if statistics == "mini_batch":
            mean, var = features.mean((0, 2, 3)), features.var((0, 2, 3), correction=0)
        normal = (features - mean[:, None, None]) / (var[:, None, None] + norm.eps).sqrt()
        expected += len(images) * float((normal.mean((2, 3)) - labels).square().mean().detach()) / 9
    assert losses["loss_fit"] == pytest.approx(expected, rel=1e-5)
    assert losses["total_loss"] == pytest.approx(losses["loss_fit"] + losses["loss_noise"], rel=1e-12)


@pytest.mark.parametrize("statistics", ["population", "mini_batch"])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_of_it(statistics, fails):
    torch.manual_seed(0)
    model, batches = Net(), make_batches(4, 3)
    model.train()
    model.body[2].eval()
    model(batches[0])["loss_fit"].backward()
    before, modes = copy_buffers(model), [module.training for module in model.modules()]
    objects = [id(buffer) for buffer in model.buffers()]
    attributes = [sorted(vars(module)) for module in model.modules()]
    gradient = model.body[0].weight.grad.clone()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    expected = read_randomness()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
    if fails:
        with pytest.raises(RuntimeError, match="size"):
            compute_validation_loss(model, [*batches, (batches[0][0], batches[1][1])], statistics=statistics)
    else:
        first = compute_validation_loss(model, batches, statistics=statistics)
        assert first == compute_validation_loss(model, batches, statistics=statistics)
    assert read_randomness() == expected
    assert_same(model, before)
    assert [id(buffer) for buffer in model.buffers()] == objects
    assert [module.training for module in model.modules()] == modes
    assert [sorted(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(model.body[0].weight.grad, gradient)
    assert model.body[0].weight.grad_fn is None


class Augmented(Dataset):
    """Images with augmentations in this process; the last one cannot be read, if `fails`."""

    def __init__(self, fails):
        self.fails = fails

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if self.fails and index == 5:
            raise OSError("on purpose")
        noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002
        return torch.ones(3, 5, 5) * noise, torch.zeros(4)


@pytest.mark.parametrize("fails", [False, True])
def test_an_ordinary_loader_leaves_the_random_numbers_alone(fails):
    """Without a generator of its own it draws a seed for its workers from the global one, and an order."""
    model, loader = Net(nn.BatchNorm2d(4)), DataLoader(Augmented(fails), batch_size=4, shuffle=True)
    results = []
    for seed in (1, 2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)  # noqa: NPY002
        expected = read_randomness()
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)  # noqa: NPY002
        if fails:
            with pytest.raises(OSError, match="on purpose"):
                compute_validation_loss(model, loader)
        else:
            results.append(compute_validation_loss(model, loader, seed=3))
        assert read_randomness() == expected
    if not fails:
        assert results[0] == results[1] != compute_validation_loss(model, loader, seed=4)


def test_the_usual_way_contaminates_the_norms():
    """detectron2#810 and #1857, DeepForest#477: a forward in training mode under no_grad, for its losses."""
    model, batches = Net(nn.BatchNorm2d(4)), make_batches(4)
    before = copy_buffers(model)
    compute_validation_loss(model, batches)
    assert_same(model, before)
    with torch.no_grad():
        model.train()(batches[0])
    assert not torch.equal(model.body[1].running_mean, before["body.1.running_mean"])


def test_dropout_is_off():
    model = Net(nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.9)))
    losses = [compute_validation_loss(model, make_batches(4), seed=seed)["loss_fit"] for seed in (0, 1)]
    assert losses[0] == losses[1]


def test_without_images_there_is_no_loss():
    with pytest.raises(StatisticsError, match=r"at least one image; got none \(compute_validation_loss"):
        compute_validation_loss(Net(), [])


@pytest.mark.parametrize(("batches", "seed", "message"), [(None, 0, "batches must be"), ([], -1, "seed must be")])
def test_arguments_that_cannot_be(batches, seed, message):
    with pytest.raises(StatisticsError, match=message):
        compute_validation_loss(nn.Sequential(nn.BatchNorm2d(2)), batches, seed=seed)


def test_a_model_that_gives_no_losses_is_refused():
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(StatisticsError, match=r"dictionary of losses, or one, in training mode; got Tensor"):
        compute_validation_loss(model, [torch.randn(2, 3, 4, 4)])
    with pytest.raises(ConfigError, match="statistics must be one of 'population', 'mini_batch'; got 'batch'"):
        compute_validation_loss(model, [], statistics="batch")


class Closed:
    """A loader that cannot begin."""

    def __init__(self, batches, fails):
        self.batches, self.fails = batches, fails

    def __iter__(self):
        if self.fails:
            raise ValueError("on purpose")
        return iter(self.batches)


def fail_on_one_worker(rank, where):
    batches = make_batches(4, 4, 4)
    model = nn.Sequential(nn.Linear(3, 1))

    def forward(model, batch):
        if where == "forward" and rank == 1 and batch is batches[1]:
            raise ValueError("on purpose")
        return model(batch[0].mean((2, 3))).mean()

    def give():
        for number, batch in enumerate(batches):
            if where == "loader" and rank == 1 and number == 1:
                raise ValueError("on purpose")
            yield batch

    with pytest.raises(ValueError, match="on purpose" if rank == 1 else "a failure on worker 1"):
        compute_validation_loss(model, Closed(give(), where == "begin" and rank == 1), forward=forward)
    return all_gather_numbers([rank], resolve_group("all"), torch.device("cpu"), "afterwards")


@pytest.mark.parametrize("where", ["forward", "loader", "begin"])
def test_a_failure_on_one_worker_ends_it_on_all(where):
    assert run_workers(fail_on_one_worker, 2, where) == [[[0], [1]]] * 2


def load(kind, output, *opts):
    if kind == "retinanet":
        return tiny.load(output, *opts)
    return load_config(str(RCNN), ["OUTPUT_DIR", str(output), *map(str, opts)])


@pytest.mark.parametrize("kind", ["retinanet", "rcnn"])
def test_of_a_detector(digits, tmp_path, kind):
    """Against detectron2's losses of a copy in training mode; pictures and moving foreground counts are left out."""
    cfg = load(kind, tmp_path, "VIS_PERIOD", 1, "SOLVER.IMS_PER_BATCH", 2)
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    batches = list(build_validation_batches(cfg, "digits_val"))
    assert sum(len(batch) for batch in batches) == len(DatasetCatalog.get("digits_val"))
    attributes, before = [dict(vars(module)) for module in model.modules()], copy_buffers(model)
    losses = compute_validation_loss(model, batches, statistics="mini_batch")
    assert [vars(module).keys() for module in model.modules()] == [own.keys() for own in attributes]
    assert_same(model, before)
    again = compute_validation_loss(model, batches[::-1], statistics="mini_batch")
    if kind == "retinanet":
        assert again == pytest.approx(losses, rel=1e-5), "the order of images has no influence"
        expected = 0.0
        for batch in batches:
            own = copy.deepcopy(model).train()
            own.vis_period = 0
            with torch.no_grad(), EventStorage():
                expected += sum(float(loss) for loss in own(batch).values()) * len(batch) / 4
        assert losses["total_loss"] == pytest.approx(expected, rel=1e-5)
    assert compute_validation_loss(model, batches)["total_loss"] != losses["total_loss"]


def read_losses(output):
    lines = [json.loads(line) for line in Path(output, "metrics.json").read_text().splitlines()]
    found = [{k: v for k, v in line.items() if k.startswith("validation_loss/")} for line in lines]
    return {line["iteration"]: own for line, own in zip(lines, found, strict=True) if own}


ON = (f"{LOSS}.PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 3)


@pytest.fixture(scope="module")
def validated(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("validated")
    train(tiny.load(folder, *ON))
    return folder


def weights(folder):
    return torch.load(Path(folder, "model_final.pth"))["model"]


def test_a_training_is_bitwise_the_one_without_it(validated, finished):
    cfg, _ = finished
    first, second = weights(validated), weights(cfg.OUTPUT_DIR)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    lines = [tiny.read_metrics(folder) for folder in (validated, cfg.OUTPUT_DIR)]
    losses = [[line["total_loss"] for line in own if "total_loss" in line] for own in lines]
    assert losses[0] == losses[1] != []


def test_metrics_have_it_by_name(validated, digits, tmp_path):
    found = read_losses(validated)
    assert 5 in found
    assert set(found[5]) == {f"validation_loss/{name}" for name in ("loss_cls", "loss_box_reg", "total_loss")}
    cfg = tiny.load(tmp_path, *ON)
    model = build_model(cfg)
    model.load_state_dict(weights(validated))
    model.loss_normalizer = torch.load(Path(validated, "model_final.pth"))["trainer"]["bnext"]["workers"][0][""]
    losses = compute_validation_loss(model, build_validation_batches(cfg, "digits_val"), seed=cfg.SEED)
    assert {f"validation_loss/{name}": value for name, value in losses.items()} == found[5]


def test_a_resumed_training_has_the_values_of_an_uninterrupted_one(validated, tmp_path):
    cfg = tiny.load(tmp_path, *ON)
    tiny.train_until(cfg, 4)
    train(cfg, resume=True)
    assert read_losses(tmp_path)[5] == read_losses(validated)[5]


def test_the_hook_works_in_a_trainer_of_detectron2():
    """Which has no seed; its values are then those of seed 0."""
    model, (batch,) = Net(nn.BatchNorm2d(4)), make_batches(4)
    trainer = SimpleTrainer(model, itertools.repeat(batch), torch.optim.SGD(model.parameters(), lr=0.1))
    trainer.register_hooks([ValidationLoss(2, {"own": [batch]})])
    trainer.train(0, 2)
    found = {name: value for name, (value, _) in trainer.storage.latest().items() if name.startswith("validation")}
    expected = compute_validation_loss(model, [batch], seed=0)
    assert found == {f"validation_loss/{name}": value for name, value in expected.items()}


def test_several_data_sets_are_told_apart(digits, tmp_path):
    opts = ("DATASETS.TEST", ("digits_val", "digits_train"), "SOLVER.MAX_ITER", 2, f"{LOSS}.NUM_BATCHES", 1)
    cfg = tiny.load(tmp_path, *ON, *opts)
    trainer = Trainer(cfg)
    trainer._hooks = [hook for hook in trainer._hooks if "Eval" not in type(hook).__name__]
    trainer.train()
    names = set(read_losses(tmp_path)[1])
    assert {f"validation_loss/{name}/total_loss" for name in cfg.DATASETS.TEST} <= names

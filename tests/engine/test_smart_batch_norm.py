"""Smart batch norm: mini-batches normalize until the end, then one epoch estimates what is saved and evaluated."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from bnext.config import load_config
from bnext.data.batches import build_validation_batches
from bnext.engine import Trainer
from bnext.engine.launch import count_cores
from bnext.engine.smart_batch_norm import SmartBatchNorm, count_batches, normalizing_by_mini_batch, validating
from bnext.engine.validation_hook import build_validation_loss
from bnext.errors import ConfigError
from bnext.layers import BatchNorm2d, NormSpec
from tests import tiny
from tests.engine.two_workers_population import Watcher

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
RCNN = tiny.RCNN
SMART = ("TEST.BNEXT.SMART_BATCH_NORM", True)


@pytest.fixture(scope="module")
def watched(digits, tmp_path_factory):
    """A training with the switch, and what it evaluated."""
    cfg = tiny.load(tmp_path_factory.mktemp("smart"), *SMART, "TEST.EVAL_PERIOD", 2)
    trainer = Watcher(cfg)
    trainer.train()
    return cfg, trainer


def test_mini_batches_normalize_all_evaluations_but_the_last(watched):
    _, trainer = watched
    assert [inference for inference, _ in trainer.evaluated] == [{"mini_batch"}, {"mini_batch"}, {"population"}]


def test_what_is_saved_last_is_the_estimate_of_one_epoch_and_is_what_is_evaluated(watched):
    cfg, trainer = watched
    final = torch.load(Path(cfg.OUTPUT_DIR, "model_final.pth"))
    evaluated = trainer.evaluated[-1][1]
    assert [name for name, value in final["model"].items() if not torch.equal(value, evaluated[name])] == []
    assert count_batches(cfg) == 3
    counters = {int(value) for name, value in final["model"].items() if name.endswith("num_batches_tracked")}
    assert counters == {3}
    assert {own["inference"] for own in final["norm_specs"].values()} == {"population"}


def test_weights_are_those_of_a_training_without_it(watched, finished):
    cfg, _ = watched
    first, second = (torch.load(Path(own.OUTPUT_DIR, "model_final.pth"))["model"] for own in (cfg, finished[0]))
    kinds = {name.rpartition(".")[2] for name in first if not torch.equal(first[name], second[name])}
    assert kinds == {"running_mean", "running_var", "num_batches_tracked"}


def test_rois_of_each_image_are_a_mini_batch(digits, tmp_path):
    cfg = load_config(str(RCNN), ["OUTPUT_DIR", str(tmp_path), *map(str, SMART)])
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    records = [record for batch in build_validation_batches(cfg, "digits_val") for record in batch][:2]
    outputs = []
    model.roi_heads.box_head.conv1.norm.register_forward_hook(lambda norm, args, output: outputs.append(output))
    for iteration in (0, cfg.SOLVER.MAX_ITER - 1):
        with torch.no_grad(), validating(cfg, model, iteration):
            model(records)
    by_mini_batch, by_population = (output.split(len(output) // 2) for output in outputs)
    assert len(by_mini_batch) == 2
    for own, other in zip(by_mini_batch, by_population, strict=True):
        torch.testing.assert_close(own.mean((0, 2, 3)), torch.zeros(16), rtol=0, atol=1e-5)
        assert float(other.mean((0, 2, 3)).abs().max()) > 0.01


def test_the_validation_loss_is_by_mini_batches_until_the_end(digits, tmp_path):
    cfg = tiny.load(tmp_path, *SMART, "TEST.BNEXT.VALIDATION_LOSS.PERIOD", 2)
    hook = build_validation_loss(cfg)[0]
    assert [hook._statistics(iteration) for iteration in (1, 3, 5)] == ["mini_batch", "mini_batch", "population"]


def test_the_scope_ends_also_by_an_exception():
    model = nn.Sequential(*(BatchNorm2d(3, spec) for spec in (NormSpec(), NormSpec(training="renorm"))))
    model.append(BatchNorm2d(3, NormSpec(frozen="statistics")))
    seen = []

    def fail():
        seen.extend(norm.spec.inference for norm in model)
        raise KeyError

    with pytest.raises(KeyError), normalizing_by_mini_batch(model):
        fail()
    assert seen == ["mini_batch", "population", "population"]
    assert {norm.spec.inference for norm in model} == {"population"}


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (nn.Sequential(BatchNorm2d(3), nn.BatchNorm2d(3)), "another at 1"),
        (nn.Sequential(BatchNorm2d(3, NormSpec(frozen="both"))), "none"),
        (nn.BatchNorm2d(3), "another at its root"),
    ],
)
def test_models_without_norms_that_it_could_change_are_refused(model, got):
    with pytest.raises(ConfigError, match=f"and no others; got {got} "), normalizing_by_mini_batch(model):
        pass


def test_a_config_without_batch_norm_is_refused_before_training(digits, tmp_path):
    opts = ("MODEL.RESNETS.NORM", "GN", "MODEL.RESNETS.STEM_OUT_CHANNELS", 32, "MODEL.RETINANET.NORM", "GN")
    opts += ("MODEL.FPN.OUT_CHANNELS", 32, "MODEL.RESNETS.WIDTH_PER_GROUP", 64)
    reset = [word for key in ("STATISTICS", "POPULATION", "AFFINE") for word in (f"MODEL.BNEXT.RETINANET.{key}",)]
    values = ("per_level", "per_level", "shared")
    pairs = [item for pair in zip(reset, values, strict=True) for item in pair]
    with pytest.raises(ConfigError, match="got none"):
        Trainer(tiny.load(tmp_path, *SMART, *opts, *pairs))


def test_without_the_switch_there_is_no_such_hook(digits, tmp_path):
    hooks = [[type(hook) for hook in Trainer(tiny.load(tmp_path, *opts))._hooks] for opts in (SMART, ())]
    assert [SmartBatchNorm in kinds for kinds in hooks] == [True, False]


@pytest.mark.skipif(count_cores() < 2 or torch.cuda.is_available(), reason="two workers need two cores, and use GPUs")
def test_two_workers(digits, tmp_path):
    """Also of PreciseBN and the validation loss, in one spawn."""
    (tmp_path / "datasets").symlink_to(digits)
    command = [sys.executable, "-m", "tests.engine.two_workers_population", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, cwd=tiny.ROOT)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert {path.name for path in tmp_path.glob("*.passed")} == {"worker0.passed", "worker1.passed"}

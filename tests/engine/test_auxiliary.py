"""Copies of the images of a step in a domain of their own: in the loss, the norms, a resume, and what is refused."""

from pathlib import Path

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.engine.hooks import CallbackHook
from torch import nn

from bnext.cli.train import check_run
from bnext.data.records import load_train_records
from bnext.data.sampling.shares import read_domains
from bnext.data.strong_augmentation import augment_strongly
from bnext.engine import Trainer, train
from bnext.engine.accumulation import AccumulatingTrainer
from bnext.engine.auxiliary import AuxiliaryImages
from bnext.engine.start_lines import describe_training
from bnext.errors import ConfigError
from bnext.evaluation.adversarial import make_adversarial
from bnext.evaluation.under_attack import evaluate_under_attack
from bnext.layers import BatchNorm2d
from tests import tiny
from tests.heads.detectors import make_batch

KEY = "SOLVER.BNEXT.AUXILIARY"
SHORT = ("SOLVER.MAX_ITER", 4, "SOLVER.STEPS", "()", "SOLVER.CHECKPOINT_PERIOD", 2, "DATASETS.TEST", "()")
ATTACKED = (*SHORT, f"{KEY}.KIND", "adversarial")
APART = ("MODEL.BNEXT.RESNETS.STATISTICS", "per_domain", "MODEL.BNEXT.RESNETS.POPULATION", "per_domain")
STEM = "backbone.bottom_up.stem.conv1.norm"


def weights(folder, name="model_final"):
    return torch.load(Path(folder, f"{name}.pth"))["model"]


def test_the_images_of_a_step_come_first_and_statistics_are_apart(digits, tmp_path):
    """Clean, the attack, which moves nothing, and the copies."""
    trainer, forwards = Trainer(tiny.load(tmp_path, *ATTACKED, *APART, "SOLVER.MAX_ITER", 2)), []
    norm = trainer.model.get_submodule(STEM)

    def note(module, args):
        counters = [int(norm.get_submodule(name).num_batches_tracked) for name in norm.domains]
        forwards.append((args[0][0]["domain"], *counters))

    trainer.model.register_forward_pre_hook(note)
    trainer.train()
    assert norm.domains == ("clean", "adversarial")
    assert forwards == [
        *(("clean", 0, 0), ("adversarial", 1, 0), ("adversarial", 1, 0)),
        *(("clean", 1, 1), ("adversarial", 2, 1), ("adversarial", 2, 1)),
    ]
    assert not torch.equal(norm.clean.running_mean, norm.adversarial.running_mean)
    losses = {f"{prefix}{name}" for prefix in ("", "adversarial/") for name in ("loss_cls", "loss_box_reg")}
    assert losses <= tiny.read_metrics(tmp_path)[-1].keys()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adversarial", "augmented"])
def test_a_resumed_training_is_the_uninterrupted_one(digits, tmp_path, kind):
    whole, resumed = (tiny.load(tmp_path / name, *ATTACKED, *APART, f"{KEY}.KIND", kind) for name in ("whole", "again"))
    train(whole)
    tiny.train_until(resumed, 3)
    train(resumed, resume=True)
    states = [weights(cfg.OUTPUT_DIR) for cfg in (whole, resumed)]
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []
    assert tiny.read_metrics(whole.OUTPUT_DIR)[-1] == tiny.read_metrics(resumed.OUTPUT_DIR)[-1]


@pytest.mark.slow
def test_clean_statistics_of_the_first_step_are_those_without_copies(digits, tmp_path):
    buffers = []
    for name, opts, path in (("with", (*ATTACKED, *APART), f"{STEM}.clean"), ("without", SHORT, STEM)):
        trainer, seen = Trainer(tiny.load(tmp_path / name, *opts)), []
        state = trainer.model.get_submodule(path)
        trainer.register_hooks(
            [CallbackHook(after_step=lambda _, seen=seen, state=state: seen.append(state.running_var.clone()))]
        )
        trainer.max_iter = 1
        trainer.train()
        buffers.append(seen[0])
    assert torch.equal(*buffers)


class MeanLoss(nn.Module):
    """A loss that is a mean over a list of records, behind a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(3, 2, 1), BatchNorm2d(2)).double()

    def forward(self, batch):
        outputs = self.backbone(torch.stack([record["image"] for record in batch]) / 50)
        return {"loss_cls": (outputs.abs() ** 3).mean()}


@pytest.mark.parametrize("number", [1, 3])
def test_a_step_is_down_the_gradient_of_both_losses(number):
    """Of each micro-batch its own copies, made with the weights of the step."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(6, 3, 4, 4, dtype=torch.float64, generator=generator) * 255
    batch = [{"image": image, "instances": (), "domain": "clean"} for image in images]

    def attack(model, records, forward, seed):
        return make_adversarial(model, records, epsilon=5, steps=2, forward=forward, seed=seed)

    model, expected = MeanLoss(), MeanLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = AccumulatingTrainer(model, [batch], optimizer, number, AuxiliaryImages("attacked", 0.5, attack))
    trainer.train(0, 1)

    size, total = 6 // number, 0.0
    for start in range(0, 6, size):
        part = batch[start : start + size]
        copies = make_adversarial(expected, part, epsilon=5, steps=2)
        total = total + (expected(part)["loss_cls"] + 0.5 * expected(copies)["loss_cls"]) / number
    gradients = torch.autograd.grad(total, list(expected.parameters()))
    for parameter, start, gradient in zip(model.parameters(), expected.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter, start - 0.1 * gradient, rtol=1e-12, atol=1e-12)
    assert trainer.storage.history("total_loss").latest() == pytest.approx(float(total.detach()))
    assert {"loss_cls", "attacked/loss_cls"} <= trainer.storage.histories().keys()


def test_strong_augmentation_leaves_boxes_and_is_a_function_of_its_seed():
    batch = [{**record, "image": record["image"].to(torch.uint8)} for record in make_batch()]
    first, again, other = (augment_strongly(batch, seed) for seed in (1, 1, 2))
    assert all(record["instances"] is copy["instances"] for record, copy in zip(batch, first, strict=True))
    assert all(copy["image"].shape == record["image"].shape for record, copy in zip(batch, first, strict=True))
    assert all(torch.equal(one["image"], two["image"]) for one, two in zip(first, again, strict=True))
    assert not torch.equal(first[0]["image"], other[0]["image"])
    assert not torch.equal(first[0]["image"], batch[0]["image"])


def test_augmented_copies_that_share_all_statistics(digits, tmp_path):
    """Shared norms and no evaluation: the images of each step twice, and the first line says that nothing is apart."""
    cfg = tiny.load(tmp_path, *SHORT, "SOLVER.MAX_ITER", 1, f"{KEY}.KIND", "augmented", f"{KEY}.DOMAIN", "strong")
    trainer = Trainer(cfg)
    trainer.train()
    assert int(trainer.model.get_submodule(STEM).num_batches_tracked) == 2
    assert "strong/loss_cls" in trainer.storage.histories()
    assert "share all statistics" in describe_training(cfg, trainer.data_loader)
    assert "share all" not in describe_training(tiny.load(tmp_path, *ATTACKED, *APART), trainer.data_loader)


@pytest.mark.slow
def test_ap_under_attack_is_of_the_sets_with_their_labels(finished, tmp_path):
    """The model is asked with moved images, one for each of the set, and is as before."""
    cfg, _ = finished
    trainer = Trainer(cfg)
    model, seen = trainer.model.eval(), []
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.register_forward_pre_hook(lambda model, args: seen.append((model.training, args[0][0]["image"])))
    assert set(evaluate_under_attack(cfg, model, str(tmp_path), epsilon=8)) == {"bbox"}
    assert [training for training, _ in seen] == [True, False] * 4
    clean, moved = (seen[index][1].float() for index in (0, 1))
    assert 0 < float((clean - moved).abs().max()) <= 8.001
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("opts", "named"),
    [
        ((*ATTACKED, f"{KEY}.EPSILON", 0.0), "EPSILON"),
        ((*ATTACKED, f"{KEY}.LOSS", "mask"), "LOSS"),
        ((*ATTACKED, f"{KEY}.WEIGHT", -1.0), "WEIGHT"),
        ((*SHORT, f"{KEY}.STEPS", 3), "KIND"),
        ((*SHORT, f"{KEY}.KIND", "augmented", f"{KEY}.LOSS", "stronger"), "LOSS"),
        ((*ATTACKED, *APART, "MODEL.BNEXT.DOMAINS.NAMES", "('clean',)"), "'adversarial'"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_training(digits, tmp_path, opts, named):
    with pytest.raises(ConfigError, match=named):
        check_run(tiny.load(tmp_path, *opts))


def test_samplers_deal_out_the_images_alone(digits, tmp_path):
    """Copies have a domain in the norms, and no images in the data; images of a set without a domain are clean."""
    cfg = tiny.load(tmp_path, *ATTACKED, *APART)
    assert read_domains(cfg, load_train_records(cfg)) == ["clean"] * 12
    assert cfg.MODEL.BNEXT.DOMAINS.NAMES == ("clean", "adversarial")


def test_without_the_key_steps_are_detectron2s(digits, tmp_path):
    assert type(Trainer(tiny.load(tmp_path))._trainer) is SimpleTrainer
    check_run(tiny.load(tmp_path, *ATTACKED, *APART))

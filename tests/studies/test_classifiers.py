"""Small classifiers of digits: their images, mini-batches, training and accuracy."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from bnext.errors import ConfigError
from bnext.layers import NormSpec
from bnext.layers.batch_norm import BatchNorm2d
from bnext.studies.classifiers import (
    ResidualClassifier,
    build_classifier,
    build_optimizer,
    compute_cross_entropy,
    measure_accuracy,
    measure_error,
    train_classifier,
)
from bnext.studies.images import DOMAINS, Batches, Images, load_images


def load(split="train", **options):
    return load_images(split, **{"side": 8, "limit": 128, **options})


def test_domains_show_the_same_digits():
    scans, negatives, photographs = (load(domain=domain) for domain in DOMAINS)
    assert scans.pixels.shape == (128, 1, 8, 8)
    assert torch.equal(scans.labels, photographs.labels)
    assert torch.corrcoef(torch.stack([scans.pixels.flatten(), negatives.pixels.flatten()]))[0, 1] < -0.99
    assert 0 <= float(photographs.pixels.min()) < float(photographs.pixels.max()) <= 1.2
    assert torch.equal(load_images("train", "photographs", 8, 20).pixels, photographs.pixels[:20])


def test_training_and_test_have_other_digits():
    train, val = load_images("train", side=8), load_images("val", side=8)
    assert (len(train), len(val)) == (1437, 360)
    assert not (train.pixels[:, None] == val.pixels[:50]).flatten(2).all(2).any()


@pytest.mark.parametrize("words", [("test", "scans"), ("train", "paintings")])
def test_other_splits_and_domains_are_refused(words):
    with pytest.raises(ConfigError, match=words[0] if words[0] == "test" else words[1]):
        load_images(*words)


def test_batches_are_whole_and_come_again():
    batches = Batches(load(), size=50, epochs=3, seed=1)
    first, second = list(batches), list(batches)
    assert len(batches) == len(first) == 6
    assert all(torch.equal(one.pixels, other.pixels) for one, other in zip(first, second, strict=True))
    epoch = torch.cat([batch.pixels for batch in first[:2]])
    assert len(epoch.flatten(1).unique(dim=0)) == 100, "no image twice"
    assert not torch.equal(first[0].labels, list(Batches(load(), size=50, seed=2))[0].labels)


def test_batches_of_one_class():
    batches = list(Batches(load(), size=8, epochs=1, composition="one_class"))
    assert all(len(batch.labels.unique()) == 1 for batch in batches)
    order = [int(batch.labels[0]) for batch in batches]
    assert len(set(order)) > 5
    assert order != sorted(order)


@pytest.mark.parametrize(("size", "composition"), [(0, "mixed"), (129, "mixed"), (60, "one_class"), (8, "sorted")])
def test_batches_that_there_are_not_are_refused(size, composition):
    with pytest.raises(ConfigError, match="size|composition"):
        Batches(load(), size, composition=composition)


def test_a_training_is_a_function_of_its_seed_and_learns():
    train, val = load_images("train", side=8), load_images("val", side=8)
    models = []
    for seed in (1, 1, 2):
        torch.rand(seed)  # random numbers of others do not count
        model = build_classifier(seed, channels=(8, 16)).train()
        losses = train_classifier(model, Batches(train, size=32, epochs=2, seed=seed))
        models.append(model)
    one, same, other = (model.head.weight for model in models)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert losses[-1] < 0.9 * losses[0]
    assert measure_accuracy(models[0].eval(), val) > 30


def test_a_study_brings_its_parts():
    seen = []

    @contextlib.contextmanager
    def around(iteration):
        seen.append(("step", iteration))
        yield
        seen.append(("stepped", iteration))

    def compute_loss(model, batch):
        seen.append(("loss", len(batch)))
        return compute_cross_entropy(model, batch)

    def after(model, iteration):
        seen.append(("after", iteration))

    model = build_classifier(channels=(4,))
    model.backbone.requires_grad_(False)
    before, optimizer = copy.deepcopy(model), build_optimizer(model, 0.5)
    train_classifier(
        model,
        iter([load(limit=4), load(limit=6)]),
        num_steps=2,
        optimizer=optimizer,
        compute_loss=compute_loss,
        around_step=around,
        after_step=after,
    )
    step = [("step", 0), ("loss", 4), ("stepped", 0), ("after", 0)]
    assert seen == step + [("step", 1), ("loss", 6), ("stepped", 1), ("after", 1)]
    assert torch.equal(model.backbone[0][0].weight, before.backbone[0][0].weight)
    assert not torch.equal(model.head.weight, before.head.weight)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)


def test_norms_are_those_that_were_asked_for():
    model = build_classifier(norm=lambda channels: BatchNorm2d(channels, NormSpec(momentum=0.3)), channels=(4, 8))
    assert [block[1].spec.momentum for block in model.backbone] == [0.3, 0.3]
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 10)


def test_accuracy_leaves_the_model_as_it_was():
    class Knows(nn.Module):
        """A model that is right for the first of each batch."""

        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, pixels):
            self.norm(pixels)
            scores = torch.zeros(len(pixels), 10)
            scores[0, 3] = 1
            scores[1:, 4] = 1
            return scores

    images, model = Images(torch.rand(8, 1, 4, 4), torch.full((8,), 3)), Knows().train()
    assert measure_accuracy(model, images, batch_size=4) == 25
    assert measure_accuracy(model, images, batch_size=1) == 100
    assert measure_accuracy(model, images, forward=lambda model, pixels: -model(pixels)) == 0
    assert int(model.norm.num_batches_tracked) == 0
    assert model.training


@pytest.mark.parametrize("depth", [8, 20])
def test_a_residual_net_has_as_many_layers_as_its_depth_says(depth):
    model = build_classifier(1, ResidualClassifier, depth=depth, channels=(4, 8, 16), in_channels=3)
    weights = [each for each in model.modules() if isinstance(each, nn.Conv2d | nn.Linear)]
    shortcuts = [each for each in weights if getattr(each, "kernel_size", None) == (1, 1)]
    assert len(weights) - len(shortcuts) == depth
    assert len(shortcuts) == 2
    assert model(torch.rand(2, 3, 16, 16)).shape == (2, 10)


def test_a_residual_net_without_norms_has_biases():
    model = build_classifier(1, ResidualClassifier, depth=8, norm=None)
    assert all(each.bias is not None for each in model.modules() if isinstance(each, nn.Conv2d))


def test_a_depth_without_whole_blocks_is_refused():
    with pytest.raises(ConfigError, match="depth"):
        ResidualClassifier(depth=10)


def test_error_and_accuracy_are_complements_and_a_rate_that_stays_is_another_training():
    train, val = load(), load("val")
    errors = []
    for decays in (True, False):
        model = build_classifier(1, channels=(8, 16)).train()
        train_classifier(model, Batches(train, size=32, epochs=3), decays=decays)
        errors.append(measure_error(model.eval(), val))
        assert errors[-1] == 100 - measure_accuracy(model, val)
    assert errors[0] != errors[1]

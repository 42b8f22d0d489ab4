import copy

import pytest
import torch
from detectron2.layers import NaiveSyncBatchNorm
from torch import nn
from torch.utils.checkpoint import checkpoint

from bnext import LevelBatchNorm2d, NormSpec, TrainingWatch


class Net(nn.Module):
    """A norm that is called once, one that is called on three features, and one that is never reached."""

    def __init__(self):
        super().__init__()
        self.once, self.thrice, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, image):
        feature = self.once(image)
        return feature + sum(self.thrice(feature * k) for k in (1, 2, 3))


def make_image():
    return torch.randn(2, 3, 4, 4, requires_grad=True)


def run(watch, num_steps=3, num_forwards=1):
    for _ in range(num_steps):
        with watch.step():
            for _ in range(num_forwards):
                watch.model(make_image()).sum().backward()


def test_counts_steps_forwards_updates_and_calls():
    watch = TrainingWatch(Net())
    run(watch, num_steps=3, num_forwards=2)
    seen = watch.collect()

    assert (seen.num_steps, seen.num_forwards) == (3, 6)
    assert seen.updates == {"once": 6, "thrice": 18, "unused": 0}
    assert seen.calls == {"once": 1, "thrice": 3}
    assert seen.changed_between == {}


def test_a_recomputation_updates_without_a_call_of_the_model():
    class Checkpointed(Net):
        def forward(self, image):
            return checkpoint(self.once, image, use_reentrant=False)

    watch = TrainingWatch(Checkpointed())
    run(watch)
    seen = watch.collect()

    assert seen.updates["once"] == 6
    assert (seen.num_forwards, seen.calls["once"]) == (3, 1)


@pytest.mark.parametrize("is_checked", [True, False])
def test_finds_forwards_between_steps(is_checked):
    watch = TrainingWatch(Net())
    run(watch, 2)
    watch.model.train(is_checked)
    with torch.no_grad():
        watch.model(make_image())
    watch.model.train()
    run(watch, 2)
    seen = watch.collect()

    assert seen.changed_between == ({"once": 1, "thrice": 1} if is_checked else {})
    assert (seen.num_steps, seen.num_forwards, seen.updates["once"]) == (4, 4, 4)


def test_finds_a_forward_before_the_first_step():
    watch = TrainingWatch(Net())
    watch.model(make_image())
    run(watch)

    assert watch.collect().changed_between == {"once": -1, "thrice": -1}
    assert watch.collect().updates["once"] == 3


def test_writes_that_are_accepted_restored_or_loaded_are_none():
    watch = TrainingWatch(Net())
    run(watch)
    before = {name: value.clone() for name, value in watch.model.state_dict().items()}

    watch.model(make_image())
    watch.accept()
    run(watch)
    watch.model(make_image())
    watch.model.load_state_dict(before)  # of an earlier iteration
    run(watch)
    with torch.no_grad():
        for buffer in watch.model.buffers():
            buffer.copy_(buffer.clone())
    run(watch)

    assert watch.collect().changed_between == {}
    assert watch.collect().updates["once"] == 12


def test_norms_that_do_not_count_are_seen_by_their_values():
    for norm in (nn.BatchNorm2d(3), NaiveSyncBatchNorm(3)):
        if isinstance(norm, NaiveSyncBatchNorm):
            norm.forward = lambda x, norm=norm: norm.running_mean.add_(x.detach().mean((0, 2, 3))).sum() + x
        else:
            norm.num_batches_tracked = None
        watch = TrainingWatch(nn.Sequential(norm))
        run(watch)
        assert watch.collect().updates == {}, "how often is not known"
        watch.model(make_image())
        run(watch)
        assert watch.collect().changed_between == {"0": 2}


def test_the_last_of_several_ends_of_a_step_counts():
    watch = TrainingWatch(Net())
    for _ in range(2):
        watch.start_step()
        for _ in range(2):  # two optimizers
            watch.model(make_image())
            watch.end_step()
    seen = watch.collect()

    assert (seen.num_steps, seen.num_forwards, seen.updates["once"]) == (2, 4, 4)
    assert seen.changed_between == {}


def test_takes_levels_and_norms_without_statistics():
    levels = LevelBatchNorm2d(3, ("p3", "p4"), NormSpec(statistics="per_level", population="per_level"))
    model = nn.ModuleDict(
        {"levels": levels, "group": nn.GroupNorm(1, 3), "none": nn.BatchNorm2d(3, track_running_stats=False)}
    )
    model.add_module("lazy", nn.LazyBatchNorm2d())
    model.add_module("meta", nn.BatchNorm2d(3, device="meta"))
    watch = TrainingWatch(model)
    for _ in range(3):
        with watch.step():
            levels({"p3": torch.randn(2, 3, 4, 4), "p4": torch.randn(2, 3, 2, 2)})
            model["lazy"](torch.randn(2, 3, 4, 4))
    seen = watch.collect()

    assert seen.num_steps == 2, "it begins when the lazy norm is there"
    assert (seen.updates["levels"], seen.updates["lazy"]) == (2, 2)


def test_of_a_compiled_model_neither_forwards_nor_calls_are_counted():
    model = Net()
    model.compile(backend="eager")
    watch = TrainingWatch(model)
    with watch.step():
        model(torch.randn(2, 3, 4, 4))
    seen = watch.collect()

    assert (seen.num_forwards, seen.calls) == (0, {})
    assert seen.updates["once"] == 1


def test_changes_nothing_of_the_training_and_leaves_no_hook():
    states = []
    for is_watched in (True, False):
        torch.manual_seed(0)
        watch = TrainingWatch(Net())
        optimizer = torch.optim.SGD(watch.model.parameters(), lr=0.1)
        for _ in range(3):
            with watch.step() if is_watched else torch.enable_grad():
                optimizer.zero_grad()
                watch.model(make_image()).square().sum().backward()
                optimizer.step()
        watch.collect()
        watch.close()
        states.append([*watch.model.state_dict().values(), torch.get_rng_state()])
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in watch.model.modules())

    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_its_diagnosis_knows_the_steps():
    watch = TrainingWatch(Net())
    run(watch)
    optimizer = torch.optim.SGD(watch.model.parameters(), lr=0.1, weight_decay=0.1)
    facts = watch.diagnose(optimizer=optimizer).facts

    assert facts.steps.num_steps == 3
    assert facts.training.weight_decay["once"] == 0.1


def test_a_model_that_is_watched_can_be_copied_and_saved_whole(tmp_path):
    """As hooks of users do, for an average or a snapshot; what they run counts for nobody."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    watch = TrainingWatch(model)
    with watch.step():
        model(torch.randn(2, 3, 4, 4))

    torch.save(model, tmp_path / "model.pth")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pth", weights_only=False)):
        with watch.step():
            other(torch.randn(2, 3, 4, 4))

    assert watch.collect().num_forwards == 1

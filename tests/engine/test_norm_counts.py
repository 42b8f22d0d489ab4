"""What norms count in a training: mini-batches left out go to the metrics, domains without samples end it."""

import re

import pytest
import torch
from detectron2.engine import HookBase, SimpleTrainer
from torch import nn

from bnext.checkpoints.checkpointer import Checkpointer
from bnext.engine import Trainer
from bnext.engine.norm_counts import METRIC, TellNormCounts, build_norm_counts
from bnext.evaluation.validation_loss import compute_validation_loss
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.counts import counts_of
from bnext.layers.spec import NormSpec
from bnext.scope import use_domain
from bnext.statistics import recompute_population_statistics
from tests import tiny
from tests.heads.detectors import make_batch, make_model, run_step

DOMAINS = NormSpec(population="per_domain", domains=("day", "night"))


class Model(nn.Module):
    """A norm that gets images, and in some models their domain."""

    def __init__(self, spec):
        super().__init__()
        self.norm = BatchNorm2d(2, spec)

    def forward(self, batch):
        images, domain = batch
        if domain is None:
            return {"loss": self.norm(images).nan_to_num().square().sum()}
        with use_domain(domain):
            return {"loss": self.norm(images).square().sum()}


def train(spec, batches, hooks=None, start=0):
    """Train over batches of pixels and domains; the hook that counts, its trainer, and what was in the metrics."""
    model = Model(spec)
    trainer = SimpleTrainer(model, batches, torch.optim.SGD(model.parameters(), 0.01))
    hooks = build_norm_counts(model, 2) if hooks is None else hooks(model)
    trainer.register_hooks(hooks)
    metrics = []

    class Remember(HookBase):
        def after_step(self):
            if METRIC in self.trainer.storage.histories():
                metrics.append(self.trainer.storage.history(METRIC).latest())

    trainer.register_hooks([Remember()])
    try:
        trainer.train(start, len(batches))
    finally:
        trainer.metrics = metrics
    return hooks[0], trainer


def images(value=0.0):
    return torch.randn(3, 2, 4, 4) + value


def warnings_of(log):
    records = dict.fromkeys(log.records)  # the log may get each twice
    return [record.getMessage() for record in records if record.levelname == "WARNING"]


def make_batches(*domains, value=0.0):
    return [(images(value), domain) for domain in domains]


def test_mini_batches_that_were_left_out_are_in_the_metrics_and_said_once(bnext_log):
    finite, overflow = make_batches(None)[0], make_batches(None, value=float("inf"))[0]
    _, trainer = train(None, [finite, overflow, finite, finite, overflow, overflow])
    assert trainer.metrics == [1, 1, 1, 1, 3]  # every second iteration
    assert len(warnings_of(bnext_log)) == 1
    assert "norm" in warnings_of(bnext_log)[0]


def test_a_domain_without_samples_is_said_at_the_end_with_counts(bnext_log):
    counts, _ = train(DOMAINS, make_batches("day", "day", "night"))
    assert counts.domains == {"day": 6, "night": 3}
    assert not warnings_of(bnext_log)
    train(DOMAINS, make_batches("day"))
    assert re.search(r"'night'.*3 of 'day'", warnings_of(bnext_log)[-1])


def test_the_fallback_is_counted_at_the_end(bnext_log):
    train(DOMAINS.replace(fallback_domain="day"), make_batches(None, None))
    said = [message for message in warnings_of(bnext_log) if message.startswith("6 samples")]
    assert len(said) == 1
    assert "norm" in said[0]


def test_a_training_that_failed_is_not_blamed_on_domains():
    with pytest.raises(KeyError, match="broken"):
        train(DOMAINS, [*make_batches("day"), (KeyError("broken"), "day"), *make_batches("day")], hooks=with_a_failure)


def with_a_failure(model):
    class Fail(HookBase):
        def before_step(self):
            if self.trainer.iter == 1:
                raise KeyError("broken")

    return [*build_norm_counts(model, 2), Fail()]


def test_domains_of_before_a_resume_count():
    first, _ = train(DOMAINS, make_batches("day", "night"))

    def resumed(model):
        counts, last = build_norm_counts(model, 2)
        counts.load_state_dict(first.state_dict())
        return [counts, last]

    counts, _ = train(DOMAINS, make_batches("day", "day", "day"), hooks=resumed, start=2)
    assert counts.domains == {"day": 6, "night": 3}


def test_images_of_a_re_estimation_and_of_a_validation_loss_are_none_of_a_training():
    class Measure(HookBase):
        def after_step(self):
            others = make_batches("day", "night")
            run = {"forward": lambda model, batch: model(batch)}
            recompute_population_statistics(self.trainer.model, others, **run)
            compute_validation_loss(self.trainer.model, others, statistics="mini_batch", **run)

    counts, _ = train(DOMAINS, make_batches("day"), hooks=lambda model: [*build_norm_counts(model, 2), Measure()])
    assert counts_of(counts.with_domains["norm"]).domains == {"day": 3}


def test_images_are_counted_where_rois_are_more():
    own = [f"MODEL.BNEXT.{place}.POPULATION" for place in ("RESNETS", "ROI_BOX_HEAD")]
    pairs = [item for key in own for item in (key, "per_domain")]
    norms = ("MODEL.RESNETS.NORM", "BN", "MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.BNEXT.DOMAINS.NAMES", ("day", "night"))
    for place, number in ((pairs, 1), (pairs[2:], 8)):
        model = make_model(*norms, *place, "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 8)
        counts, _ = build_norm_counts(model, 2)
        counts.before_train()
        with use_domain(["day", "night"]):
            run_step(model, make_batch())
        assert set(counts._count_domains().values()) == {number}


def test_levels_are_no_domains_and_a_model_without_norms_has_no_hook():
    assert build_norm_counts(nn.Linear(2, 2), 2) == []
    assert TellNormCounts(Model(None), 2).with_domains == {}


def test_saving_says_what_was_left_out(tmp_path, bnext_log):
    model = Model(None).train()
    model((images(float("nan")), None))
    for name in ("a", "b"):
        Checkpointer(model, str(tmp_path)).save(name)
    assert len([message for message in warnings_of(bnext_log) if "left out of running statistics" in message]) == 1


def test_the_order_in_a_training(digits, tmp_path):
    kinds = [type(hook).__name__ for hook in Trainer(tiny.load(tmp_path))._hooks]
    assert kinds.index("TellNormCounts") < kinds.index("PeriodicCheckpointer") < kinds.index("PeriodicWriter")
    assert kinds[-1] == "TellDomains"

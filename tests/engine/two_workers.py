"""Trainings on two gloo workers, all checks in one spawn; run by test_two_workers.py in a process of its own.

python -m tests.engine.two_workers FOLDER
"""

import contextlib
import copy
import logging
import os
import sys
from functools import partial
from pathlib import Path

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.engine.hooks import CallbackHook
from detectron2.modeling import build_model
from detectron2.utils import comm
from torch import nn

import bnext
from bnext.data.batches import build_validation_batches
from bnext.data.check_coco import check_datasets
from bnext.distributed.equal_buffers import equalize_buffers, norm_buffers
from bnext.distributed.groups import count_cores
from bnext.engine import Trainer, launch, train
from bnext.engine.doctor_hook import DoctorHook
from bnext.errors import DatasetError, StatisticsError
from bnext.evaluation import evaluate_model
from bnext.evaluation.adversarial import make_adversarial
from bnext.evaluation.conditions import Conditions, under_conditions
from bnext.evaluation.validation_loss import compute_validation_loss
from bnext.user_modules import import_modules
from tests import tiny
from tests.evaluation.test_adversarial import Net, make_records
from tests.record import note_groups

SHORT = ("SOLVER.STEPS", "()", "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2, "TEST.EVAL_PERIOD", 2)
NO_TEST = ("DATASETS.TEST", "()")
SYNC = ("MODEL.RETINANET.NORM", "SyncBN", "MODEL.BNEXT.RETINANET.STATISTICS", "shared")
VALIDATION_LOSS = ("TEST.BNEXT.VALIDATION_LOSS.PERIOD", 3)


class Watcher(Trainer):
    """Keeps what each step begins with, and what is evaluated."""

    def __init__(self, cfg):
        self.steps, self.evaluated = [], []
        super().__init__(cfg)
        self.register_hooks([CallbackHook(before_step=lambda trainer: self.steps.append(copy_state(trainer.model)))])

    def test(self, cfg, model, evaluators=None):
        self.evaluated.append(copy_state(model))
        return {}


def watch(cfg):
    trainer = Watcher(cfg)
    trainer.train()
    comm.synchronize()
    return trainer


def check_doctor(trainer, num_steps, num_forwards):
    """On the main worker alone: no hook of bnext changes statistics between steps, and updates are those of steps."""
    doctors = [hook for hook in trainer._hooks if isinstance(hook, DoctorHook)]
    assert len(doctors) == (1 if comm.is_main_process() else 0)
    for doctor in doctors:
        facts = doctor.diagnosis.facts
        assert (facts.steps.num_steps, facts.steps.num_forwards) == (num_steps, num_forwards)
        assert facts.steps.changed_between == {}
        assert facts.steps.updates["backbone.bottom_up.stem.conv1.norm"] == num_forwards
        assert facts.training.ddp is not None
        assert facts.training.num_workers == 2
        assert set(facts.training.weight_decay.values()) == {0.0}
        assert facts.weights.is_loaded
        assert not {finding.code for finding in doctor.diagnosis.findings} & {
            "BN015",
            "BN016",
            "BN025",
            "BN027",
            "BN028",
        }


def copy_state(model):
    return {name.removeprefix("module."): value.clone() for name, value in model.state_dict().items()}


def load_state(folder, name):
    return torch.load(Path(folder, f"{name}.pth"))["model"]


def differ(first, second):
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]


def are_equal_on_workers(state):
    return [differ(state, other) for other in comm.all_gather(state)] == [[], []]


def check_world(folder):
    assert (comm.get_world_size(), comm.get_local_size()) == (2, 2)
    assert comm.get_local_rank() == comm.get_rank()
    assert torch.get_num_threads() == max(1, count_cores() // 2)
    assert comm.all_gather(comm.get_rank()) == [0, 1]


def check_data(folder):
    check_datasets(["digits_train"], num_classes=10)


def check_equal_buffers(folder):
    """Merged as parts of one population, against the definition; a frozen or equal layer is left alone.

    facebookresearch/detectron2#1297, open-mmlab/mmdetection#2539: elsewhere every worker evaluates with its own.
    """
    rank = comm.get_rank()
    model = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(2))
    means = torch.tensor([[0.0, 1.0, 5.0], [2.0, 1.0, -5.0]])
    variances = torch.tensor([[1.0, 4.0, 0.5], [3.0, 4.0, 0.25]])
    model[0].running_mean.copy_(means[rank])
    model[0].running_var.copy_(variances[rank])
    model[1].running_var.fill_(1 / 3)
    spread = equalize_buffers(model)
    assert torch.equal(model[0].running_mean, means.mean(0))
    assert torch.equal(model[0].running_var, variances.mean(0) + means.var(0, correction=0))
    assert torch.equal(model[1].running_var, torch.full((2,), 1 / 3))
    assert spread == {"0.running_mean": 10.0, "0.running_var": 2.0}


def check_saved_is_evaluated(folder):
    """Each worker evaluates with the buffers that worker 0 saved, re-estimated or not, in the middle and at the end.

    The steps of each worker are bitwise those without estimates.
    """
    steps = []
    for name, opts in (("moving", ()), ("precise", ("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 1))):
        trainer = watch(tiny.load(folder / name, *SHORT, *opts))
        assert len(trainer.evaluated) == 2
        check_doctor(trainer, num_steps=4, num_forwards=4)
        for evaluated, file in zip(trainer.evaluated, ("model_0000001", "model_final"), strict=True):
            assert differ(evaluated, load_state(folder / name, file)) == []
            assert are_equal_on_workers(evaluated)
        steps.append(trainer.steps)

    without, with_estimates = steps
    assert differ(without[1], with_estimates[1]) == []
    assert not are_equal_on_workers(with_estimates[3]), "each worker has averages of its own between checkpoints"


def check_freezing(folder):
    """From iteration 2 on statistics and affines are bitwise constant and equal, and everything else trains."""
    opts = ("SOLVER.CHECKPOINT_PERIOD", 0, "SOLVER.BNEXT.FREEZE.ITER", 2, "SOLVER.WEIGHT_DECAY_NORM", 0.01)
    trainer = watch(tiny.load(folder / "frozen", *SHORT, *NO_TEST, *opts))
    first, frozen, last = trainer.steps[1], trainer.steps[2], copy_state(trainer.model)

    norms = {name for name in last if ".norm." in name or "_subnet.1." in name}
    assert norms & set(differ(frozen, last)) == set()
    moved = {name for name in norms & set(differ(first, frozen)) if "num_batches" not in name}
    assert len(moved) > len(norms) / 2, "until then they train"

    trained = {name.removeprefix("module.") for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained - norms <= set(differ(frozen, last))
    assert are_equal_on_workers(last)


def check_resume(folder):
    """Bit by bit, with a normalizer of each worker's own, and a head that shares its mini-batch over both."""
    whole, resumed = folder / "whole", folder / "resumed"
    train(tiny.load(whole, *SYNC, *VALIDATION_LOSS))
    cfg = tiny.load(resumed, *SYNC, *VALIDATION_LOSS)
    tiny.train_until(cfg, 4)
    results = train(cfg, resume=True)
    comm.synchronize()

    first, second = (torch.load(path / "model_final.pth") for path in (whole, resumed))
    assert differ(first["model"], second["model"]) == []
    normalizers = [worker[""] for worker in first["trainer"]["bnext"]["workers"]]
    assert len(set(normalizers)) == 2, "each worker has an average of its own"
    last, again = ([line for line in tiny.read_metrics(p) if line["iteration"] == 5] for p in (whole, resumed))
    assert last == again != []
    assert "validation_loss/total_loss" in last[0]
    assert bool(results) == comm.is_main_process()


def check_lazy_config(folder):
    """Each worker reads the file for itself: the same images, steps and statistics as from YAML are saved."""
    trainer = watch(tiny.load(folder / "from_lazy", "train.max_iter=2", *NO_TEST, config=tiny.LAZY))
    file = load_state(folder / "from_lazy", "model_final")
    assert differ(copy_state(trainer.model), file) == []
    assert are_equal_on_workers(copy_state(trainer.model))
    assert differ(trainer.steps[0], file) != []


def check_smart_batch_norm(folder):
    """The one estimate is of an epoch over both workers, saved and evaluated."""
    opts = (*SHORT, *SYNC, "TEST.BNEXT.SMART_BATCH_NORM", True)
    evaluated = watch(tiny.load(folder / "smart", *opts)).evaluated
    file = load_state(folder / "smart", "model_final")
    assert len(evaluated) == 2
    assert differ(evaluated[1], file) == []
    assert are_equal_on_workers(evaluated[1])
    counters = {int(value) for name, value in file.items() if name.endswith("num_batches_tracked")}
    assert counters == {6}, "12 images, 2 on each worker per batch"


def check_validation_loss(folder):
    """Equal on the workers, of all images once, with merged statistics, whatever share each worker has."""
    cfg = tiny.load(folder / "loss", *SYNC, "SOLVER.IMS_PER_BATCH", 2)
    torch.manual_seed(0)
    model, rank = build_model(cfg), comm.get_rank()
    for _, buffer in norm_buffers(model):
        buffer.add_(rank)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}

    every = comm.all_gather(list(build_validation_batches(cfg, "digits_val")))
    all_batches = [batch for batches in every for batch in batches]
    assert len({batch[0]["file_name"] for batch in all_batches}) == 4
    share = all_batches[:3] if rank == 0 else all_batches[3:]
    merged = copy.deepcopy(model)
    equalize_buffers(merged)

    for statistics in ("population", "mini_batch"):
        losses = compute_validation_loss(model, share, statistics=statistics)
        assert len(set(comm.all_gather(tuple(losses.values())))) == 1
        if statistics == "population":  # every image twice: the same mean
            expected = compute_validation_loss(merged, all_batches)
            assert abs(losses["total_loss"] - expected["total_loss"]) < 1e-5 * expected["total_loss"]
        assert differ(dict(model.named_buffers()), before) == []

    try:
        compute_validation_loss(model, share if rank == 0 else [])
    except StatisticsError as error:
        assert "worker 1" in str(error)  # noqa: PT017
    else:
        raise AssertionError("a worker without images must be told")


class Scripted(Watcher):
    """Gets no better from the first evaluation on, of which worker 0 alone knows."""

    def test(self, cfg, model, evaluators=None):
        super().test(cfg, model)
        return {"mine": {"score": 1.0}} if comm.is_main_process() else {}


def check_around(folder):
    """Micro-batches, an average whose statistics are equal, metrics of norms, and an end that all workers come to."""
    opts = ("SOLVER.BNEXT.ACCUMULATE", 2, "SOLVER.BNEXT.EMA.ENABLED", True, "SOLVER.BNEXT.NORM_METRICS.PERIOD", 1)
    opts += ("TEST.BNEXT.BEST.METRIC", "mine/score", "TEST.BNEXT.BEST.PATIENCE", 1, "TEST.EVAL_PERIOD", 1)
    trainer = Scripted(tiny.load(folder / "around", *SHORT, *SYNC, *opts))
    trainer.train()
    comm.synchronize()

    assert (trainer.iter, len(trainer.steps), len(trainer.evaluated)) == (3, 3, 6)
    check_doctor(trainer, num_steps=3, num_forwards=6)
    assert all(are_equal_on_workers(state) for state in trainer.evaluated)
    weights, average = trainer.evaluated[-2:]
    assert differ(weights, load_state(folder / "around", "model_final")) == []
    assert differ(average, load_state(folder / "around", "model_ema")) == []
    assert differ(trainer.evaluated[0], load_state(folder / "around", "model_best")) == []
    assert differ(weights, average) != []
    sizes = {value for name, value in tiny.read_metrics(folder / "around")[-1].items() if name.endswith("batch_size")}
    assert sizes <= {1.0, 2.0}


# RoIs that are dealt out; the same records as digits_train, every other one without its objects.
HEADS = ("MODEL.BNEXT.ROI_BOX_HEAD", "MODEL.BNEXT.ROI_MASK_HEAD")
SHUFFLED = (
    "DATASETS.TRAIN",
    ("digits_some_empty",),
    *(word for head in HEADS for word in (f"{head}.SHUFFLE", "statistics")),
)
SHUFFLED_NORMS = ("roi_heads.box_head.conv1.norm", "roi_heads.mask_head.mask_fcn1.norm")


def register_some_empty():
    def load():
        records = copy.deepcopy(DatasetCatalog.get("digits_train"))
        return [{**record, "annotations": record["annotations"] * (i % 2)} for i, record in enumerate(records)]

    DatasetCatalog.register("digits_some_empty", load)
    classes = MetadataCatalog.get("digits_train").thing_classes
    MetadataCatalog.get("digits_some_empty").set(thing_classes=classes, json_file="")


def record_groups(cfg, stop=None, resume=False):
    """Train; for each step the groups of the box head's and the mask head's RoIs on this worker."""
    trainer, steps = Trainer(cfg), []
    trainer.resume_or_load(resume=resume)
    norms = [trainer.model.module.get_submodule(path) for path in SHUFFLED_NORMS]
    noted = note_groups(trainer.model)

    def end(trainer):
        groups = [noted.pop(norm, None) for norm in norms]
        assert all(dealt is None or dealt.num_groups <= 2 for dealt in groups)
        steps.append([[] if dealt is None else dealt.numbers.tolist() for dealt in groups])
        if trainer.iter + 1 == stop:
            raise KeyboardInterrupt

    trainer.register_hooks([CallbackHook(after_step=end)])
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train()
    comm.synchronize()
    return steps


def check_shuffling(folder):
    """Deals are of both workers' RoIs and differ from step to step, also where a worker has none; resumed exactly."""
    register_some_empty()
    whole, resumed = (tiny.load(folder / n, *SHORT, *NO_TEST, *SHUFFLED, config=tiny.RCNN) for n in ("deals", "again"))
    steps = record_groups(whole)
    every = list(zip(*comm.all_gather(steps), strict=True))
    assert len(steps) == 4
    for workers in every:
        for head in (0, 1):
            dealt = [number for worker in workers for number in worker[head]]
            assert abs(dealt.count(0) - dealt.count(1)) <= 1
    without_masks = [[not worker[1] for worker in workers] for workers in every]
    assert [True, False] in without_masks or [False, True] in without_masks
    boxes = {tuple(step[0]) for step in steps}
    assert len(boxes) == 4

    first = record_groups(resumed, stop=3)
    rest = record_groups(resumed, resume=True)
    assert (first, rest) == (steps[:3], steps[2:])  # again from the checkpoint after step 2 on
    assert differ(load_state(folder / "deals", "model_final"), load_state(folder / "again", "model_final")) == []


# Code of a user's own: a module that is imported by its path, another that detectron2 runs, and a mapper in the first.
REGISTER = """from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog

DatasetCatalog.register("{name}_train", lambda: [])


class Mapper(DatasetMapper):
    def __call__(self, record):
        record = super().__call__(record)
        return {{**record, "domain": MetadataCatalog.get("listed_train").domain}}


def setup_environment():
    pass
"""
LISTED = "[{{name: listed_{0}, json: digits/annotations/instances_{0}.json, folder: digits/{0}, domain: night}}]"
OWN = ("DATASETS.TRAIN", "('listed_train',)", "DATASETS.BNEXT.COCO", LISTED.format("train"))
own_mapper = []  # what this worker was given


class Domains(HookBase):
    """Remembers the domains of the images of a step."""

    def __init__(self):
        self.seen = []

    def before_train(self):
        load, batches = self.trainer.model.forward, self.seen

        def forward(batch):
            batches.append([record["domain"] for record in batch])
            return load(batch)

        self.trainer.model.forward = forward


def check_own_code(folder):
    """Whatever a user registers is there before anything is unpickled; his mapper runs in processes that load."""
    assert {"listed_train", "imported_train", "environment_train"} <= set(DatasetCatalog)
    (mapper,) = own_mapper
    hook = Domains()

    cfg = tiny.load(folder / "own", *SHORT, *NO_TEST, *OWN, "DATALOADER.NUM_WORKERS", 1)
    assert bnext.train(cfg, mapper=mapper, hooks=[hook]) == {}
    assert hook.seen == [["night", "night"]] * 4
    assert are_equal_on_workers(load_state(folder / "own", "model_final"))

    tiny.load(folder / "others")
    assert "listed_train" not in DatasetCatalog


LISTED_IN = "{{name: {1}_train, json: digits/annotations/instances_{0}.json, folder: digits/{0}, domain: {1}}}"
DAY_AND_NIGHT = f"[{LISTED_IN.format('train', 'day')}, {LISTED_IN.format('val', 'night')}]"
COMPOSED = ("DATASETS.BNEXT.COCO", DAY_AND_NIGHT, "DATASETS.TRAIN", "('day_train', 'night_train')")
COMPOSED += ("DATALOADER.BNEXT.BATCHES", "composed", "DATALOADER.BNEXT.RATIOS", "[[day, 3], [night, 1]]")


def check_domain_batches(folder):
    """Each batch of both workers has its composition, and a resume goes on at the exact sample."""
    whole, first, rest = Domains(), Domains(), Domains()
    opts = (*SHORT, *NO_TEST, *COMPOSED)
    bnext.train(tiny.load(folder / "composed", *opts), hooks=[whole])
    bnext.train(tiny.load(folder / "continued", *opts, "SOLVER.MAX_ITER", 2), hooks=[first])
    bnext.train(tiny.load(folder / "continued", *opts), resume=True, hooks=[rest])
    comm.synchronize()
    assert differ(load_state(folder / "composed", "model_final"), load_state(folder / "continued", "model_final")) == []
    assert first.seen + rest.seen == whole.seen

    workers = comm.all_gather(whole.seen)
    assert [sorted(mine + others) for mine, others in zip(*workers, strict=True)] == [["day"] * 3 + ["night"]] * 4
    assert all(["day", "night"] in map(sorted, seen) for seen in workers), "both workers see both domains"


ATTACKED = ("SOLVER.BNEXT.AUXILIARY.KIND", "adversarial", "SOLVER.BNEXT.AUXILIARY.LOSS", "stronger")
ATTACKED += ("MODEL.RESNETS.NORM", "SyncBN", "MODEL.BNEXT.RESNETS.STATISTICS", "per_domain")
ATTACKED += ("MODEL.BNEXT.RESNETS.POPULATION", "per_domain", "SOLVER.MAX_ITER", 2)


def check_auxiliary_domain(folder):
    """Adversarial copies of each worker's images: attacks come to the shared mini-batches in step."""
    trainer = watch(tiny.load(folder / "attacked", *SHORT, *NO_TEST, *SYNC, *ATTACKED))
    stem = trainer.model.module.backbone.bottom_up.stem.conv1.norm
    assert [int(state.num_batches_tracked) for state in (stem.clean, stem.adversarial)] == [2, 2]
    assert not torch.equal(stem.clean.running_mean, stem.adversarial.running_mean)
    assert are_equal_on_workers(copy_state(trainer.model))
    for doctor in [hook for hook in trainer._hooks if isinstance(hook, DoctorHook)]:
        steps = doctor.diagnosis.facts.steps
        assert (steps.num_steps, steps.num_forwards, steps.changed_between) == (2, 4, {})


def check_attack(folder):
    """With synchronized norms the mini-batch of an attack is that of both workers."""
    records, rank = make_records(4, 4, 4, 4), comm.get_rank()
    share = records[rank::2]

    images = []
    for net, batch in ((Net(), records), (Net(), share), (Net("all"), share)):
        images.append([record["image"] for record in make_adversarial(net, batch, epsilon=6, steps=3)])
    whole, alone, shared = images
    torch.testing.assert_close(shared, whole[rank::2], rtol=0, atol=1e-9)
    assert not torch.allclose(alone[0], shared[0])


def check_evaluation_by_domain(folder):
    """The first worker has the domains, and says what became of the images of both that are of an unseen one."""
    records = [dict(each) for each in DatasetCatalog.get("digits_val")]
    for record, domain in zip(records, ("day", "fog", "fog", "night"), strict=True):
        record["domain"] = domain
    DatasetCatalog.register("mixed_val", lambda: records)
    MetadataCatalog.get("mixed_val").set(
        thing_classes=MetadataCatalog.get("digits_val").thing_classes, evaluator_type="coco"
    )
    opts = ("MODEL.FPN.NORM", "BN", "MODEL.BNEXT.FPN.POPULATION", "per_domain", "DATASETS.TEST", "('mixed_val',)")
    opts += ("MODEL.BNEXT.DOMAINS.NAMES", "('day', 'night')", "MODEL.BNEXT.DOMAINS.UNSEEN", "mixture")
    cfg = tiny.load(folder / "by_domain", *opts, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0)

    said, logger = [], logging.getLogger("bnext.evaluation.coco")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    model = Trainer.build_model(cfg)
    conditions = Conditions("target", "night")
    results = evaluate_model(cfg, model, within=partial(under_conditions, cfg, model, conditions))
    assert not any("of the domain" in line for line in said), "all are taken for the night"
    results = evaluate_model(cfg, model)
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)

    if comm.is_main_process():
        assert list(results["domains"]) == ["day", "fog", "night", "mean", "worst"]
        assert any("mixed_val: 2 images of the domain 'fog'" in line for line in said)
    else:
        assert results == {}


CHECKS = {
    "own_code": check_own_code,
    "evaluation_by_domain": check_evaluation_by_domain,
    "world": check_world,
    "data": check_data,
    "equal_buffers": check_equal_buffers,
    "validation_loss": check_validation_loss,
    "saved_is_evaluated": check_saved_is_evaluated,
    "smart_batch_norm": check_smart_batch_norm,
    "freezing": check_freezing,
    "resume": check_resume,
    "around": check_around,
    "shuffling": check_shuffling,
    "lazy_config": check_lazy_config,
    "attack": check_attack,
}
SLOW_CHECKS = {"domain_batches": check_domain_batches, "auxiliary_domain": check_auxiliary_domain}


def prepare_own_code(folder):
    """The cases of `check_own_code` in the process that starts the workers; the mapper."""
    tiny.register(folder / "datasets")
    (folder / "imported.py").write_text(REGISTER.format(name="imported"))
    import_modules([str(folder / "imported.py")])

    cfg = tiny.load(folder / "own", *OWN)
    return sys.modules["imported"].Mapper(cfg, True)


def work(folder, mapper, checks):
    """Checks, each of which leaves a file; then a failure of one worker alone."""
    own_mapper.append(mapper)
    tiny.register(folder / "datasets")
    for name, check in checks.items():
        check(folder)
        (folder / f"{name}{comm.get_rank()}.passed").touch()

    if comm.get_rank() == 1:
        raise DatasetError("worker 1 failed on purpose")
    comm.synchronize()  # never answered


def look(folder):
    check_world(folder)
    (folder / f"torchrun{comm.get_rank()}.passed").touch()


if __name__ == "__main__":
    where = Path(sys.argv[1])
    if "RANK" in os.environ:
        launch(look, 1, args=(where,))
        assert not torch.distributed.is_initialized()
    else:
        checks = SLOW_CHECKS if "slow" in sys.argv[2:] else CHECKS
        launch(work, 2, args=(where, prepare_own_code(where), checks))

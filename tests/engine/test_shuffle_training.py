"""SHUFFLE in whole trainings: on two workers, of which one has no object; resumed; evaluated otherwise.

python -m tests.engine.test_shuffle_training FOLDER is what the two workers do, in one spawn.
"""

import contextlib
import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine.hooks import CallbackHook
from detectron2.utils import comm

from bnext.engine import Trainer, launch, train
from bnext.engine.launch import count_cores
from tests import tiny
from tests.record import note_groups
from tests.workers import run_workers

# Of detectron2's mapper, for masks that pycocotools has decoded.
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
BOX, MASK = "MODEL.BNEXT.ROI_BOX_HEAD", "MODEL.BNEXT.ROI_MASK_HEAD"
SHUFFLED = (f"{BOX}.SHUFFLE", "statistics", f"{MASK}.SHUFFLE", "statistics")
NORMS = ("roi_heads.box_head.conv1.norm", "roi_heads.mask_head.mask_fcn1.norm")
NUM_STEPS = 4
# The same records, every other one without its objects.
SOME_EMPTY = ("DATASETS.TRAIN", ("digits_some_empty",), "DATASETS.TEST", ())


def load(output, *opts):
    return tiny.load(output, *opts, config=tiny.RCNN)


def register_some_empty():
    def give():
        records = copy.deepcopy(DatasetCatalog.get("digits_train"))
        return [{**record, "annotations": record["annotations"] * (i % 2)} for i, record in enumerate(records)]

    if "digits_some_empty" not in DatasetCatalog.list():
        DatasetCatalog.register("digits_some_empty", give)
    classes = MetadataCatalog.get("digits_train").thing_classes
    MetadataCatalog.get("digits_some_empty").set(thing_classes=classes, json_file="")


def record_groups(cfg, stop=None, resume=False):
    """Train; for each step the groups of the box head's and the mask head's RoIs on this worker."""
    trainer, steps = Trainer(cfg), []
    trainer.resume_or_load(resume=resume)
    model = getattr(trainer.model, "module", trainer.model)
    noted = note_groups(model)

    def end(trainer):
        steps.append([noted.pop(model.get_submodule(path), None) for path in NORMS])
        if trainer.iter + 1 == stop:
            raise KeyboardInterrupt

    trainer.register_hooks([CallbackHook(after_step=end)])
    with contextlib.suppress(KeyboardInterrupt):
        trainer.train()
    assert all(groups is None or groups.num_groups <= 2 for step in steps for groups in step)
    return [[[] if groups is None else groups.numbers.tolist() for groups in step] for step in steps]


def check_steps(steps):
    """Deals are of both workers' RoIs, differ from step to step; some worker had no RoI for the mask head."""
    every = comm.all_gather(steps)
    assert len(steps) == NUM_STEPS
    for own in zip(*every, strict=True):  # a step on all workers
        for head in (0, 1):
            dealt = [number for worker in own for number in worker[head]]
            assert abs(dealt.count(0) - dealt.count(1)) <= 1
    empty = [[not worker[1] for worker in own] for own in zip(*every, strict=True)]
    assert [True, False] in empty or [False, True] in empty
    boxes = [tuple(step[0]) for step in steps]
    assert len(set(boxes)) == len(boxes)


def work(folder):
    tiny.register(Path(folder, "datasets"))
    register_some_empty()
    whole, resumed = Path(folder, "whole"), Path(folder, "resumed")
    opts = (*SHUFFLED, *SOME_EMPTY, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.MAX_ITER", NUM_STEPS)
    steps = record_groups(load(whole, *opts))
    check_steps(steps)
    first = record_groups(load(resumed, *opts), stop=3)
    comm.synchronize()
    rest = record_groups(load(resumed, *opts), resume=True)
    assert (first, rest) == (steps[:3], steps[2:])  # again from the checkpoint after step 2 on
    comm.synchronize()
    expected, state = (torch.load(Path(path, "model_final.pth"))["model"] for path in (whole, resumed))
    assert [name for name in expected if not torch.equal(expected[name], state[name])] == []
    Path(folder, f"worker{comm.get_rank()}.passed").touch()


@pytest.mark.skipif(count_cores() < 2 or torch.cuda.is_available(), reason="two workers need two cores, and use GPUs")
def test_two_workers_of_which_one_has_no_object(digits, tmp_path):
    (tmp_path / "datasets").symlink_to(digits)
    command = [sys.executable, "-m", "tests.engine.test_shuffle_training", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=tiny.ROOT)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert {path.name for path in tmp_path.glob("*.passed")} == {"worker0.passed", "worker1.passed"}


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A training in one process, of four groups."""
    folder = tmp_path_factory.mktemp("trained")
    groups = (f"{BOX}.SHUFFLE_GROUPS", 4, f"{MASK}.SHUFFLE_GROUPS", 2)
    cfg = load(folder, *SHUFFLED, *groups, "SOLVER.MAX_ITER", 2)
    return cfg, train(cfg)


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # detectron2 leaves the config's file open
def test_a_checkpoint_is_evaluated_with_other_statistics_by_a_key_alone(trained, tmp_path):
    import train_net  # pytest has its folder in the path

    cfg, results = trained
    assert {"bbox", "segm"} <= results.keys()
    final = Path(cfg.OUTPUT_DIR, "model_final.pth")
    command = ["--config-file", tiny.RCNN, "--eval-only", "OUTPUT_DIR", tmp_path, "MODEL.WEIGHTS", final]
    found = {}
    for inference in ("mini_batch", "population"):
        keys = [item for node in (BOX, MASK) for item in (f"{node}.INFERENCE", inference)]
        assert train_net.main([*map(str, command), *keys]) == 0
        found[inference] = Path(tmp_path, "inference/coco_instances_results.json").read_text()
    assert found["mini_batch"] != found["population"]
    expected = Path(cfg.OUTPUT_DIR, "inference/coco_instances_results.json").read_text()
    assert found["population"] == expected


def fail_on_one(rank):
    from tests.heads.detectors import make_batch, make_model, run_step, shuffle_pairs

    pairs = ("MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.ROI_BOX_HEAD.NUM_CONV", 2)
    model = make_model(*pairs, *shuffle_pairs("statistics", "ROI_BOX_HEAD"))
    if rank == 1:
        conv = model.roi_heads.box_head.conv2
        conv.register_forward_pre_hook(lambda *args: (_ for _ in ()).throw(OSError("worker 1 failed on purpose")))
    run_step(model, make_batch(seed=rank))


def test_a_failure_in_the_head_of_one_worker_ends_the_other():
    with pytest.raises(AssertionError) as failure:
        run_workers(fail_on_one, 2)
    first, second = str(failure.value).split("worker 1:\n", 1)
    assert "WorkerError: every worker must take part in what workers share; got a failure on worker 0 of 2" in first
    assert "(roi_heads.box_head.conv2.norm: " in first
    assert "OSError: worker 1 failed on purpose" in second


if __name__ == "__main__":
    launch(work, 2, args=(sys.argv[1],))

"""SHUFFLE in whole trainings: evaluated otherwise, and a worker that fails; see two_workers.py for the rest."""

from pathlib import Path

import pytest

from bnext.engine import train
from tests import tiny
from tests.workers import run_workers

# Of detectron2's mapper, for masks that pycocotools has decoded.
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
BOX, MASK = "MODEL.BNEXT.ROI_BOX_HEAD", "MODEL.BNEXT.ROI_MASK_HEAD"
SHUFFLED = (f"{BOX}.SHUFFLE", "statistics", f"{MASK}.SHUFFLE", "statistics")


def load(output, *opts):
    return tiny.load(output, *opts, config=tiny.RCNN)


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

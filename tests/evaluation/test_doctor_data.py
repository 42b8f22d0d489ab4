"""The doctor on images of a detector: what is run, what is found out, and that nothing of the model changes."""

import pytest
import torch
from PIL import Image

from bnext.diagnostics.diagnose import examine_facts
from bnext.diagnostics.facts import Origin
from bnext.evaluation.doctor import examine_detector
from bnext.evaluation.doctor_data import add_data_facts
from tests import tiny

# Of detectron2's mapper, for masks that pycocotools has decoded.
pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")


def examine(cfg, depth="forward", num_images=None):
    facts, model = examine_detector(cfg, Origin("config", "tiny.yaml"))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes, generator = [module.training for module in model.modules()], torch.get_rng_state()

    facts = add_data_facts(facts, cfg, model, depth, num_images)

    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), generator)
    return facts


def list_forwards(facts):
    return [(forward.normalized_by, forward.num_images) for forward in facts.forwards if not forward.is_noise]


def test_a_few_batches_as_a_worker_has_them(digits, tmp_path):
    facts = examine(tiny.load(tmp_path / "out"), num_images=4)

    assert list_forwards(facts) == [("population", 4), ("mini_batch", 4)]
    assert not facts.failures
    assert facts.images.keys() == {"train", "test"}
    assert 20 < float(facts.images["train"].mean.mean()) < 230  # pixels as the mapper gives them
    assert not (tmp_path / "out").exists()  # nothing is written


def test_pixels_that_are_made_up_are_of_a_domain_of_the_norms(digits, tmp_path):
    own = [item for key in ("STATISTICS", "POPULATION") for item in (f"MODEL.BNEXT.RESNETS.{key}", "per_domain")]
    cfg = tiny.load(tmp_path, *own, "MODEL.BNEXT.DOMAINS.NAMES", "('day', 'night')")
    facts, _ = examine_detector(cfg, Origin("config", "tiny.yaml"))

    assert not facts.failures
    assert [(forward.is_noise, forward.domain) for forward in facts.forwards] == [(True, "")]


def test_rois_of_single_images_as_in_training(digits, tmp_path):
    facts = examine(tiny.load(tmp_path, "SOLVER.IMS_PER_BATCH", 4, config=tiny.RCNN))

    assert list_forwards(facts) == [("population", 2), ("mini_batch", 2), ("mini_batch", 1), ("mini_batch", 1)]
    sizes = [forward.calls["roi_heads.box_head.conv1.norm"][0].size[0] for forward in facts.forwards[2:]]
    assert sizes == [32, 16, 16]
    assert any("2 images" in failure for failure in facts.failures)  # what is cut is told
    assert facts.training.images_per_worker == 4


def test_training_sets_of_several_domains_are_run_apart(digits, tmp_path):
    entry = {"json": str(next(digits.rglob("*train*.json"))), "folder": str(next(digits.rglob("*train*/")))}
    sets = [{"name": f"digits_{domain}", "domain": domain, **entry} for domain in ("day", "night")]
    opts = ["DATASETS.BNEXT.COCO", sets, "DATASETS.TRAIN", ("digits_day", "digits_night")]

    facts = examine(tiny.load(tmp_path, *opts), num_images=2)

    assert facts.domains.keys() == {"day", "night"}
    assert facts.domains["day"].keys() == {norm.path for norm in facts.norms}
    assert facts.training.mixes_domains
    assert not [finding for finding in examine_facts(facts).findings if finding.code == "BN023"]  # the same images


def test_pixels_of_training_are_those_of_all_domains(digits, tmp_path):
    """Else test images would be compared with those of the first domain alone."""
    file, folder = next(digits.rglob("*train*.json")), next(digits.rglob("*train*/"))
    (tmp_path / "white").mkdir()
    for image in folder.iterdir():
        Image.new("RGB", (64, 64), "white").save(tmp_path / "white" / image.name)
    sets = [
        {"name": f"digits_of_{domain}", "domain": domain, "json": str(file), "folder": str(images)}
        for domain, images in (("night", folder), ("snow", tmp_path / "white"))
    ]
    opts = ["DATASETS.BNEXT.COCO", sets, "DATASETS.TRAIN", ("digits_of_night", "digits_of_snow")]

    facts = examine(tiny.load(tmp_path, *opts), num_images=2)

    means = facts.images["train"].mean.mean(1)
    assert 0 < (means == 255).sum() < len(means)


def test_what_cannot_be_found_out_leaves_the_rest_known(digits, tmp_path):
    cfg = tiny.load(tmp_path, "DATASETS.TRAIN", ("unknown",), "DATASETS.TEST", ("unknown",))

    facts = examine(cfg, "full", 2)

    assert len(facts.norms) == 23
    assert facts.evaluation is None
    words = ["Batches of 2", "Reading DATASETS.TRAIN failed", "Reading DATASETS.TEST failed", "There are no trained"]
    assert len(facts.failures) == len(words)
    for failure, beginning in zip(facts.failures, words, strict=True):
        assert failure.startswith(beginning)


def test_a_pass_over_images_and_an_evaluation(finished, tmp_path):
    cfg, _ = finished
    cfg = tiny.load(tmp_path / "out", "MODEL.WEIGHTS", f"{cfg.OUTPUT_DIR}/model_final.pth")

    facts = examine(cfg, "full", 8)

    assert not facts.failures
    assert {path for path, _ in facts.population} == {norm.path for norm in facts.norms}
    assert {error.num_batches for error in facts.population_errors.values()} == {2}
    kinds = {"population", "mini_batch", "precise"}
    assert facts.evaluation.ap.keys() == facts.evaluation.losses.keys() == kinds
    assert len(set(facts.evaluation.losses.values())) == 3
    assert facts.evaluation.dataset == "digits_val"
    assert not (tmp_path / "out").exists()
    codes = [finding.code for finding in examine_facts(facts).findings]
    assert codes[0] == "BN001"  # its cause before what follows from it

"""Two sets of two domains in a config: from their records to the norms, the metric and the files."""

import itertools
import json

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor

from bnext.cli.train import check_run
from bnext.config import load_config
from bnext.data.domains import find_domain
from bnext.data.loader import build_train_loader
from bnext.engine import Trainer
from bnext.errors import ConfigError, DomainError
from bnext.evaluation.reestimate import recompute_statistics
from bnext.scope import use_domain
from tests import tiny

SETS = ("DATASETS.TRAIN", "('digits_train', 'night_train')", "DATASETS.TEST", "('digits_val', 'night_val')")
DOMAINS = ("DATASETS.DOMAINS.TRAIN", "('day', 'night')", "DATASETS.DOMAINS.TEST", "('day', 'night')")
NORMS = ("MODEL.FPN.NORM", "BN", "MODEL.BNEXT.FPN.STATISTICS", "per_domain", "MODEL.BNEXT.FPN.POPULATION", "per_domain")


@pytest.fixture
def load(digits, tmp_path):
    """A config of two sets: the digits, and the same pictures under another name."""
    sets = []
    for part in ("train", "val"):
        metadata = MetadataCatalog.get(f"digits_{part}")
        sets.append({"name": f"night_{part}", "json": metadata.json_file, "folder": metadata.image_root})

    def load(*opts):
        return tiny.load(tmp_path / "out", "DATASETS.BNEXT.COCO", sets, *SETS, *opts)

    return load


def test_the_domain_goes_from_the_config_to_the_norms_and_stays_in_the_files(load, tmp_path):
    best = ("TEST.EVAL_PERIOD", 2, "TEST.BNEXT.BEST.METRIC", "domains/mean/bbox/AP")
    cfg = load(*DOMAINS, *NORMS, *best, "SOLVER.MAX_ITER", 3, "SOLVER.IMS_PER_BATCH", 6)
    check_run(cfg)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()

    images = [0, 0]
    loader = iter(build_train_loader(trainer.cfg))
    for _ in range(3):
        for record in next(loader):
            images[record["dataset_source"]] += 1
            assert record["domain"] == ("day", "night")[record["dataset_source"]]

    norm = trainer.model.backbone.fpn_lateral3.norm
    assert norm.domains == ("day", "night")
    assert norm.day.num_batches_tracked + norm.night.num_batches_tracked >= 4
    assert not torch.equal(norm.day.running_mean, norm.night.running_mean)
    results = json.loads((tmp_path / "out/inference/results.json").read_text())
    assert set(results) == {"digits_val", "night_val", "domains"}
    keys = {f"{name}/bbox/AP" for name in ("digits_val", "night_val", "domains/day", "domains/night", "domains/worst")}
    assert keys | {"domains/mean/bbox/AP"} <= tiny.read_metrics(tmp_path / "out")[-1].keys()
    assert [each["iteration"] for each in json.loads((tmp_path / "out/best.json").read_text())["evaluations"]] == [1, 2]

    # Written, the config says the domains, whatever sets it is used with later.
    assert cfg.MODEL.BNEXT.DOMAINS.NAMES == ("day", "night")

    predictor, image = DefaultPredictor(cfg), np.zeros((64, 64, 3), dtype=np.uint8)
    with pytest.raises(DomainError):
        predictor(image)
    with use_domain("night"):
        assert "instances" in predictor(image)


@pytest.mark.slow
def test_statistics_of_each_domain_are_re_estimated_and_each_set_has_its_validation_loss(load, tmp_path):
    precise = ("TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 3, "TEST.BNEXT.VALIDATION_LOSS.PERIOD", 2)
    cfg = load(*DOMAINS, *NORMS, *precise, "SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 6)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()

    metrics = dict(itertools.chain.from_iterable(line.items() for line in tiny.read_metrics(tmp_path / "out")))
    assert all(metrics[f"validation_loss/{name}/total_loss"] > 0 for name in ("digits_val", "night_val"))
    estimated = {name: value.clone() for name, value in trainer.model.state_dict().items() if "running_mean" in name}
    report = recompute_statistics(trainer.cfg, trainer.model)
    assert all(
        torch.equal(value, estimated[name]) for name, value in trainer.model.state_dict().items() if name in estimated
    )

    images = {
        name: [each.num_samples for each in report.reached if each.levels == (name,)] for name in ("day", "night")
    }
    assert all(len(set(numbers)) == 1 and len(numbers) == 6 for numbers in images.values())
    assert images["day"][0] + images["night"][0] == report.num_samples == 18


@pytest.mark.parametrize(
    ("opts", "named"),
    [
        (("DATASETS.DOMAINS.TRAIN", "('day',)"), "DATASETS.DOMAINS.TRAIN"),
        (("DATASETS.DOMAINS.TRAIN", "('day', 'night')"), "night_val|digits_val"),
        (("DATASETS.DOMAINS.TRAIN", "('day', '')", "DATASETS.DOMAINS.TEST", "('day', 'day')"), "night_train"),
        ((*DOMAINS[:3], "('day', 'fog')"), "fog"),
        ((*DOMAINS, "MODEL.BNEXT.DOMAINS.NAMES", "('day',)"), "'night'"),
        ((), "DATASETS.DOMAINS.TRAIN"),
        ((*DOMAINS, "TEST.EVAL_PERIOD", 2, "TEST.BNEXT.BEST.METRIC", "domains/fog/bbox/AP"), "domains/day"),
    ],
)
def test_what_does_not_fit_is_refused_before_a_training(load, opts, named):
    with pytest.raises(ConfigError, match=named):
        check_run(load(*NORMS, *opts))


@pytest.mark.parametrize(
    ("sets", "domains"),
    [
        (("night_val", "digits_val"), ("night", "day")),
        (("night_val",), ("night",)),
        (("digits_val@invert_5", "night_train"), ("day", "night")),
        (("other_val", "night_val"), ("", "night")),
        (("other_val", "another_val"), ()),
    ],
)
def test_sets_that_a_command_line_names_anew_keep_their_domains(load, tmp_path, sets, domains):
    path = tmp_path / "domains.yaml"
    path.write_text(load(*DOMAINS, *NORMS).dump())

    cfg = load_config(str(path), ["DATASETS.TEST", repr(sets)])
    assert domains == cfg.DATASETS.DOMAINS.TEST
    assert cfg.DATASETS.DOMAINS.TRAIN == ("day", "night")

    said = ("fog",) * len(sets)
    cfg = load_config(str(path), ["DATASETS.DOMAINS.TEST", repr(said), "DATASETS.TEST", repr(sets)])
    assert said == cfg.DATASETS.DOMAINS.TEST


def test_a_corrupted_variant_has_the_domain_of_its_set(load):
    cfg = load(*DOMAINS, *NORMS)
    assert find_domain(cfg, "night_val@invert_5") == "night"

    own = ("DATASETS.TEST", "('night_val', 'night_val@invert_5')", "DATASETS.DOMAINS.TEST", "('night', 'inverted')")
    assert find_domain(load(*DOMAINS[:2], *own), "night_val@invert_5") == "inverted"


def test_a_name_that_no_image_has_is_said(load, bnext_log):
    check_run(load(*NORMS, *DOMAINS, "MODEL.BNEXT.DOMAINS.NAMES", "('day', 'night', 'fog')"))
    assert any("'fog'" in record.getMessage() for record in bnext_log.records)


def test_sets_may_share_a_domain(load):
    same = ("DATASETS.DOMAINS.TRAIN", "('day', 'day')", "DATASETS.DOMAINS.TEST", "('day', 'day')")
    cfg = load(*NORMS, *same)
    check_run(cfg)
    assert cfg.MODEL.BNEXT.DOMAINS.NAMES == ("day",)

"""The sampler that a config chooses, from the records of registered sets to batches."""

from itertools import islice

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog

from bnext import add_bnext_config
from bnext.data.loader import TrainLoader, build_train_loader
from bnext.data.sampling.build import check_domain_batches
from bnext.data.sampling.domain_batches import DomainBatchSampler
from bnext.data.sampling.samplers import BatchSampler
from bnext.engine.start_lines import describe_training
from bnext.errors import ConfigError, DatasetError
from bnext.evaluation.reestimate import _with_batches_for_statistics

OBJECT = {"bbox": [0, 0, 5, 5], "bbox_mode": 1, "category_id": 0}
SIZES = {"sampling_day": 80, "sampling_night": 20}


def list_records(name, number):
    portrait = {"width": 5, "height": 7}
    return [{"file_name": f"{name}/{i}.png", "image_id": i, **portrait, "annotations": [OBJECT]} for i in range(number)]


@pytest.fixture
def cfg():
    for name, number in SIZES.items():
        DatasetCatalog.register(name, lambda name=name, number=number: list_records(name, number))
    cfg = get_cfg()
    add_bnext_config(cfg)
    cfg.DATASETS.TRAIN, cfg.DATASETS.DOMAINS.TRAIN = tuple(SIZES), ("day", "night")
    cfg.DATALOADER.NUM_WORKERS, cfg.SOLVER.IMS_PER_BATCH, cfg.SEED = 0, 8, 0
    cfg.DATALOADER.BNEXT.BATCHES, cfg.DATALOADER.BNEXT.RATIOS = "composed", [["day", 6], ["night", 2]]

    yield cfg
    for name in SIZES:
        DatasetCatalog.remove(name)


def keep_even(record):
    return None if record["image_id"] % 2 else record


def test_batches_have_their_composition_also_where_a_mapper_refuses_images(cfg):
    batches = islice(build_train_loader(cfg, keep_even), 3)
    domains = [sorted(record["domain"] for record in batch) for batch in batches]
    assert domains == [["day"] * 6 + ["night"] * 2] * 3


def test_a_training_says_what_a_batch_holds(cfg):
    def describe():
        return describe_training(cfg, build_train_loader(cfg)).splitlines()[1]

    epochs = "Iterations of an epoch of the 80 images of day 13.3, of the 20 images of night 10."
    assert describe() == f"Batches of 8: 6 day, 2 night. {epochs}"

    cfg.DATALOADER.BNEXT.BATCHES = "alternating"
    assert describe() == f"Batches of 8, each of one domain in turn, by shares 0.75 day, 0.25 night. {epochs}"

    cfg.DATALOADER.BNEXT.BATCHES, cfg.DATALOADER.BNEXT.RATIOS = "composed", []
    cfg.DATALOADER.BNEXT.TEMPERATURE = 2.0
    assert describe().startswith("Batches of 8: on average 5.33 day, 2.67 night. ")

    cfg.DATALOADER.BNEXT.BATCHES = "mixed"
    assert "\n" not in describe_training(cfg, build_train_loader(cfg))


def test_orientations_are_told_where_they_are_not_kept_apart(cfg, caplog, monkeypatch):
    monkeypatch.setattr("bnext.notices._told_names", set())
    build_train_loader(cfg)
    assert "ASPECT_RATIO" not in caplog.text

    DatasetCatalog.remove("sampling_night")
    landscape = [{**record, "width": 9} for record in list_records("sampling_night", 20)]
    DatasetCatalog.register("sampling_night", lambda: landscape)
    build_train_loader(cfg)
    assert "DATALOADER.ASPECT_RATIO_GROUPING has no effect" in caplog.text


def test_statistics_are_estimated_on_every_domain(cfg):
    """In micro-batches, and in turn where a training draws."""
    cfg.DATALOADER.BNEXT.BATCHES, cfg.SOLVER.BNEXT.ACCUMULATE = "random_domain", 2
    cfg.DATALOADER.BNEXT.RATIOS = [["day", 1], ["night", 1]]
    sampler = build_train_loader(_with_batches_for_statistics(cfg)).sampler
    assert [{sampler.domains[index] for _, index in batch} for batch in islice(sampler, 2)] == [{"day"}, {"night"}]
    assert sampler.batch_size == 4


def test_what_no_batch_can_have_is_refused_before_a_training(cfg):
    check_domain_batches(cfg)
    cfg.SOLVER.IMS_PER_BATCH = 6
    with pytest.raises(ConfigError, match="DATALOADER.BNEXT.RATIOS"):
        check_domain_batches(cfg)

    cfg.DATASETS.DOMAINS.TRAIN, cfg.DATALOADER.BNEXT.RATIOS = ("day", ""), []
    with pytest.raises(DatasetError, match="20 without one"):
        check_domain_batches(cfg)

    cfg.DATALOADER.BNEXT.BATCHES = "mixed"
    check_domain_batches(cfg)


def test_a_config_without_the_keys_has_mixed_batches(cfg):
    del cfg.DATALOADER["BNEXT"]
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    loader = build_train_loader(cfg)
    assert isinstance(loader, TrainLoader)
    assert isinstance(loader.sampler, BatchSampler)
    assert not isinstance(loader.sampler, DomainBatchSampler)

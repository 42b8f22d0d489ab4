"""The training loader: same images, same augmentations, whoever loads and wherever it starts."""

import logging
import random
from itertools import islice

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog

from bnext.data.loader import TrainLoader, build_train_loader, share_seed
from bnext.data.sampling.samplers import BatchSampler, GroupedBatchSampler
from bnext.errors import DatasetError
from bnext.seeding import derive_seed, seeded

RECORDS = [{"index": index} for index in range(7)]


def augment(record):
    """A mapper that draws from all three generators."""
    return {"index": record["index"], "draws": (random.random(), np.random.rand(), torch.rand(()).item())}  # noqa: NPY002


def pick(record):
    return augment(record) if record["index"] == 3 else None


def reject(record):
    return None


def batches(number, start=0, num_loader_workers=0, mapper=augment):
    sampler = BatchSampler(len(RECORDS), 4, seed=1)
    loader = TrainLoader(RECORDS, mapper, sampler, num_loader_workers)
    sampler.start_iteration = start
    return list(islice(loader, number))


def global_state():
    numpy_state = np.random.get_state()  # noqa: NPY002
    return (
        random.getstate(),
        (numpy_state[0], tuple(numpy_state[1]), *numpy_state[2:]),
        tuple(torch.get_rng_state().tolist()),
    )


def test_a_later_start_repeats_images_and_augmentations():
    assert batches(3, start=4) == batches(7)[4:]


def test_the_number_of_loading_processes_has_no_influence():
    assert batches(5, num_loader_workers=2) == batches(5)


def test_images_of_several_or_unknown_sizes_are_not_alike():
    def is_of_one_size(*sizes):
        records = [{"height": height, "width": width} for height, width in sizes]
        return TrainLoader(records, augment, BatchSampler(len(sizes), 1, seed=1)).is_of_one_size

    assert is_of_one_size((4, 6), (4, 6))
    assert not is_of_one_size((4, 6), (6, 4))
    assert not TrainLoader(RECORDS, augment, BatchSampler(len(RECORDS), 4, seed=1)).is_of_one_size


def test_augmentations_differ_from_sample_to_sample():
    draws = [sample["draws"] for batch in batches(7) for sample in batch]
    assert len(set(draws)) == len(draws)


def test_the_global_generators_are_left_alone():
    before = global_state()
    batches(2)
    batches(2, num_loader_workers=1)
    assert global_state() == before


def draw_and_fail():
    with seeded(3):
        augment(RECORDS[0])
        raise RuntimeError("on purpose")


def test_they_are_left_alone_by_a_failing_mapper_too():
    before = global_state()
    with pytest.raises(RuntimeError, match="on purpose"):
        draw_and_fail()
    assert global_state() == before


def test_seeds_differ_by_every_number():
    seeds = [
        derive_seed(*numbers) for numbers in [(0,), (1,), (0, 1), (1, 0), (1, 1), (2**31, 1), (2**32, 1), (0, 1, 1)]
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_rejected_images_are_replaced_the_same_way_each_time():
    picked = batches(3, mapper=pick)
    assert {sample["index"] for batch in picked for sample in batch} == {3}
    assert batches(1, start=2, mapper=pick) == picked[2:]


def test_a_mapper_that_rejects_all_is_an_error():
    with pytest.raises(DatasetError, match="100 images in a row"):
        batches(1, mapper=reject)


def test_a_negative_seed_is_drawn():
    assert share_seed(4) == 4
    drawn = {share_seed(-1) for _ in range(4)}
    assert len(drawn) > 1
    assert min(drawn) >= 0


@pytest.fixture
def cfg():
    name = "bnext_test_loader"
    annotation = {"bbox": [0, 0, 5, 5], "bbox_mode": 1, "category_id": 0}
    record = {"file_name": "a.png", "image_id": 0, "width": 5, "height": 5, "annotations": [annotation]}
    DatasetCatalog.register(name, lambda: [record])
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = (name,)
    cfg.DATALOADER.NUM_WORKERS = 0

    yield cfg
    DatasetCatalog.remove(name)


def test_the_config_chooses_the_sampler(cfg):
    assert isinstance(build_train_loader(cfg).sampler, GroupedBatchSampler)
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = False
    assert type(build_train_loader(cfg).sampler) is BatchSampler


def test_other_samplers_are_detectron2s_and_warn_about_the_resume(cfg, caplog):
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    with caplog.at_level(logging.WARNING, "bnext"):
        loader = build_train_loader(cfg)
    assert not isinstance(loader, TrainLoader)
    assert "RepeatFactorTrainingSampler" in caplog.text
    assert "resume" in caplog.text


def test_a_set_without_annotations_is_an_error(cfg):
    DatasetCatalog.register("bnext_test_empty", lambda: [{"file_name": "a.png", "annotations": []}])
    cfg.DATASETS.TRAIN = ("bnext_test_empty",)
    try:
        with pytest.raises(DatasetError, match="FILTER_EMPTY_ANNOTATIONS"):
            build_train_loader(cfg)
    finally:
        DatasetCatalog.remove("bnext_test_empty")


def pick_odd(record):
    return augment(record) if record["index"] % 2 else None


@pytest.mark.parametrize("num_loader_workers", [0, 2])
def test_images_that_a_mapper_refuses_are_counted_and_said(caplog, num_loader_workers):
    batches(5, mapper=pick_odd, num_loader_workers=num_loader_workers)
    said = [record.getMessage() for record in caplog.records if "refused" in record.getMessage()]
    assert len(said) == 2
    assert all(f"refused {number} image(s)" in text for number, text in zip((1, 10), said, strict=True))
    assert "record " in said[0]

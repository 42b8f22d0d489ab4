"""Evaluation on one and on several data sets."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator

from bnext.engine.trainer import Trainer
from bnext.errors import ConfigError
from bnext.evaluation import build_evaluator, evaluate_model
from tests import tiny
from tests.markdown import read_tables


@pytest.fixture(scope="module")
def model(finished):
    cfg = finished[0]
    model = Trainer.build_model(cfg)
    model.test_score_thresh = 0.0  # so that there is something to evaluate
    return model


def test_several_sets_have_a_dictionary_and_a_folder_each(model, digits, tmp_path):
    cfg = tiny.load(tmp_path, "DATASETS.TEST", "('digits_val', 'digits_train')")
    model.train()
    results = evaluate_model(cfg, model)
    assert model.training
    assert list(results) == ["digits_val", "digits_train"]
    assert all(0 <= result["bbox"]["AP"] <= 100 for result in results.values())
    names = ("digits_val", "digits_train")
    detections = [Path(tmp_path, "inference", name, "coco_instances_results.json") for name in names]
    images = [{detection["image_id"] for detection in json.loads(path.read_text())} for path in detections]
    assert [len(ids) for ids in images] == [4, 12]
    stored = json.loads(Path(tmp_path, "inference", "results.json").read_text())
    assert stored["digits_val"]["bbox"]["AP"] == results["digits_val"]["bbox"]["AP"]
    assert stored["digits_val"]["bbox"]["APl"] is None  # no large object in images of 64 pixels: NaN is no JSON


def test_the_name_of_a_set_leads_to_no_other_folder(digits, tmp_path):
    names = ("digits_val", "../../night", "/night", "..")
    for name in names[1:]:
        DatasetCatalog.register(name, lambda: DatasetCatalog.get("digits_val"))
        MetadataCatalog.get(name).set(thing_classes=MetadataCatalog.get("digits_val").thing_classes)
        MetadataCatalog.get(name).evaluator_type = "coco"

    folders = []
    try:
        evaluate_model(tiny.load(tmp_path, "DATASETS.TEST", names), torch.nn.Identity(), build=Keeping(folders))
    finally:
        for name in names[1:]:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    used = [path for path in folders if Path(path).is_relative_to(tmp_path)]  # the others are of the rehearsal
    assert len(set(used)) == 4
    assert {Path(path).parent for path in used} == {tmp_path / "inference"}


class Keeping:
    """Builds evaluators that do nothing, and keeps their folders."""

    def __init__(self, folders):
        self._folders = folders

    def __call__(self, cfg, name, folder):
        self._folders.append(os.path.normpath(folder))
        return DatasetEvaluator()


def test_an_evaluation_is_one_table_and_what_is_printed_is_for_the_file(model, digits, tmp_path, bnext_log, capsys):
    bnext_log.set_level(logging.DEBUG, "bnext")
    results = evaluate_model(tiny.load(tmp_path), model)
    assert "Average Precision" not in capsys.readouterr().out
    (record,) = {record for record in bnext_log.records if "Average Precision" in record.getMessage()}
    assert (record.name, record.levelname) == ("bnext.evaluation.coco", "DEBUG")
    assert "Accumulating evaluation results" in record.getMessage()

    (record,) = {record for record in bnext_log.records if "| bbox |" in record.getMessage()}
    assert "digits_val: 4 images" in record.getMessage().splitlines()[0]
    ((names, numbers),) = read_tables(record.getMessage())
    cells = dict(zip(names, numbers, strict=True))
    assert cells["AP"] == f"{results['bbox']['AP']:.1f}"
    assert list(cells)[-6:] == ["AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
    assert cells["APl"] == "-"


def test_the_mode_of_every_module_is_put_back_when_the_model_fails(finished, tmp_path):
    class Failing(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = torch.nn.BatchNorm2d(3)

        def forward(self, inputs):
            raise RuntimeError("on purpose")

    failing = Failing().train()
    failing.frozen.eval()
    with pytest.raises(RuntimeError, match="on purpose"):
        evaluate_model(tiny.load(tmp_path), failing)
    assert failing.training
    assert not failing.frozen.training


def test_other_kinds_of_data_sets_are_refused(digits, tmp_path):
    DatasetCatalog.register("bnext_test_lvis", list)
    MetadataCatalog.get("bnext_test_lvis").evaluator_type = "lvis"
    try:
        with pytest.raises(ConfigError, match="bnext_test_lvis"):
            build_evaluator(tiny.load(tmp_path), "bnext_test_lvis")
    finally:
        DatasetCatalog.remove("bnext_test_lvis")
        MetadataCatalog.remove("bnext_test_lvis")

"""A LazyConfig as a CfgNode: detectron2's names under the keys that everything reads, and what has no effect."""

import os
from pathlib import Path

import pytest
import yaml

from bnext.config import load_config, resolve_norms
from bnext.config.differences import find_differences
from bnext.config.lazy import _split, tell_unheeded
from bnext.config.merge import split_pairs
from bnext.data.classes import count_classes
from bnext.errors import ConfigError
from tests import tiny
from tests.detector_fixtures import bnext_log  # noqa: F401  the fixture
from tests.stock import FOLDER

LAZY = str(tiny.LAZY)
STOCK = sorted(FOLDER.glob("*-*/*.py")) + sorted(FOLDER.glob("new_baselines/*_50ep*.py"))
NO_MODEL = "train = dict(max_iter=3)\n"


def refuse(*words, file=LAZY):
    with pytest.raises(ConfigError) as error:
        load_config(str(file), words)
    assert str(error.value).isprintable()
    return str(error.value)


def write(folder, text):
    path = folder / "config.py"
    path.write_text(text)
    return path


def test_names_of_the_convention_are_under_their_keys():
    cfg = load_config(LAZY, ["train.output_dir=out", "train.max_iter=8", "train.init_checkpoint=a.pth"])
    assert (cfg.OUTPUT_DIR, cfg.SOLVER.MAX_ITER, cfg.MODEL.WEIGHTS, cfg.SEED) == ("out", 8, "a.pth", 7)
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (("digits_train",), ("digits_val",))
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.DATALOADER.NUM_WORKERS) == (4, 2, 0)
    assert (cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TEST) == ((48, 64), 96)

    assert load_config(LAZY, ["model.pixel_std=[2.0, 2.0, 2.0]"]).MODEL.PIXEL_STD == [2.0, 2.0, 2.0]
    assert load_config(LAZY, ["model.pixel_std=x"]).MODEL.PIXEL_STD == [1.0, 1.0, 1.0], "whatever the model takes"
    assert count_classes(cfg) == ("model.num_classes", 10)
    assert (cfg.MODEL.MASK_ON, cfg.MODEL.KEYPOINT_ON) == (False, False)
    assert resolve_norms(cfg).places["RETINANET"].spec.population == "shared"


def test_pairs_stand_beside_overrides_and_are_stronger_than_the_file():
    pairs = ["TEST.BNEXT.PRECISE_BN.ROIS", "top_scored", "TEST.PRECISE_BN.NUM_ITER=7"]
    cfg = load_config(LAZY, ["train.max_iter=8", *pairs, "SOLVER.MAX_ITER", "9", "dataloader.train.num_workers", "1"])
    assert (cfg.SOLVER.MAX_ITER, cfg.TEST.PRECISE_BN.NUM_ITER, cfg.DATALOADER.NUM_WORKERS) == (9, 7, 1)
    assert cfg.LAZY.OVERRIDES == ["train.max_iter=8", "dataloader.train.num_workers=1"]
    assert load_config("", ["SOLVER.MAX_ITER=9"]).SOLVER.MAX_ITER == 9


def test_words_are_split_by_their_case():
    words = ["a.b=1", "A.B", "x=y", "C.D=[1, 2]", "e.f", "2"]
    assert _split(words) == (["a.b=1", "e.f=2"], ["A.B", "x=y", "C.D", "[1, 2]"])
    assert split_pairs(["A.B", "x=y", "C=1"]) == ["A.B", "x=y", "C", "1"]


def test_the_keys_of_a_file_are_weaker_than_pairs(tmp_path):
    text = Path(LAZY).read_text()
    path = write(
        tmp_path, text + 'keys = {"TEST.PRECISE_BN.NUM_ITER": 5, "SOLVER": {"BNEXT": {"VIRTUAL_IMAGES": 2}}}\n'
    )
    cfg = load_config(str(path), ["SOLVER.BNEXT.VIRTUAL_IMAGES", "4"])
    assert (cfg.TEST.PRECISE_BN.NUM_ITER, cfg.SOLVER.BNEXT.VIRTUAL_IMAGES) == (5, 4)
    assert "keys must be a dict" in refuse("+keys=3")
    assert "TEST.PRECISE_BN.NUM_ITER" in refuse(file=write(tmp_path, text + 'keys = {"TEST.PRECISE_BM.NUM_ITER": 5}\n'))


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("train.max_iter=0", "train.max_iter must be a whole number"),
        ("train.max_iter=abc", "train.max_iter must be a whole number"),
        ("dataloader.train.total_batch_size=0", "dataloader.train.total_batch_size must"),
        ("train.max_iters=1", "train.max_iter?"),
        ("model.head.nrom=BN", "model.head.norm"),
        ("model._target_=detectron2.modeling.RetinaNett", "RetinaNet'?"),
        ("norms.RETINANETS.NORM=BN", "'RETINANET'"),
        ("norms.FPN.NROM=BN", "'NORM'"),
        ("norms=3", "norms must be a dict"),
        ("model=null", "must have a `model`"),
        ("model.num_classes", "model.num_classes"),  # a value is missing
    ],
)
def test_a_wrong_override_is_named_as_the_user_knows_it(word, words):
    assert words in refuse(word)


@pytest.mark.parametrize(
    ("pair", "instead"),
    [
        (("SOLVER.BASE_LR", "0.1"), "optimizer."),
        (("MODEL.RETINANET.NORM", "BN"), "model."),
        (("MODEL.BNEXT.RETINANET.EPS", "0.1"), "norms.<PLACE>"),
        (("INPUT.MIN_SIZE_TEST", "64"), "dataloader.test.mapper"),
    ],
)
def test_a_pair_that_has_no_effect_is_refused_with_what_has(pair, instead):
    message = refuse(*pair)
    assert pair[0] in message
    assert instead in message


def test_a_file_without_a_model_or_with_loaders_of_its_own_is_refused(tmp_path):
    assert "train" in refuse(file=write(tmp_path, NO_MODEL))
    assert "Did you mean modle?" in refuse(file=write(tmp_path, NO_MODEL + "modle = dict(a=1)\n"))
    assert "no call" in refuse(file=write(tmp_path, NO_MODEL + "model = dict(a=1)\n"))
    own = refuse(file=FOLDER / "Misc/torchvision_imagenet_R_50.py")
    assert "build_data_loader" in own
    assert "DatasetCatalog.register" in own
    no_data = refuse("DATASETS.TEST", "('digits_val',)", file=FOLDER / "common/models/retinanet.py")
    assert "dataloader.test.mapper" in no_data


def test_what_has_no_effect_is_told_by_name(bnext_log, tmp_path):  # noqa: F811
    text = f"{Path(LAZY).read_text()}\ntrain.clip = 3\ndataloader.train.sampler = dict(b=1)\noptimiser = optimizer\n"
    tell_unheeded(load_config(str(write(tmp_path, f"{text}del optimizer\n"))))
    said = bnext_log.text
    assert "train.clip, dataloader.train.sampler.b" in said
    assert "optimiser of " in said
    assert "Did you mean optimizer?" in said
    assert "log_period" not in said
    bnext_log.clear()
    tell_unheeded(load_config(str(FOLDER / "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.py")))
    assert "SemSegEvaluator, COCOPanopticEvaluator" in bnext_log.text


def test_every_lazy_config_of_detectron2_is_read():
    """All but the one of other loaders; nothing of them is unheeded but what their evaluators and clusters ask for."""
    assert len(STOCK) >= 8
    for path in STOCK:
        cfg = load_config(str(path))
        name = Path(path).stem
        assert name.startswith(("mask_rcnn", "panoptic")) == cfg.MODEL.MASK_ON
        assert name.startswith("keypoint") == cfg.MODEL.KEYPOINT_ON
        assert cfg.DATASETS.TRAIN


def test_a_config_that_a_run_has_written_leads_to_its_file(tmp_path):
    cfg = load_config(LAZY, ["train.max_iter=8"])
    path = tmp_path / "config.yaml"
    path.write_text(cfg.dump())
    written = yaml.safe_load(path.read_text())["LAZY"]
    assert (written["FILE"], written["OVERRIDES"]) == (os.path.realpath(LAZY), ["train.max_iter=8"])
    assert "train.max_iter = 8" in written["VALUES"]
    with pytest.raises(ConfigError, match=r"Give the \.py file"):
        load_config(str(path))


def test_a_run_shows_the_overrides_and_not_the_whole_file():
    base, differences = find_differences(load_config(LAZY, ["train.max_iter=8"]), LAZY)
    assert base == "Detectron2's defaults"
    assert differences["train.max_iter"] == ("8", "as the file has it")
    assert differences["SOLVER.MAX_ITER"] == (8, 40000)
    assert not any(key.startswith("LAZY.") for key in differences)

"""A config as it differs from its base."""

from bnext.config import load_config
from bnext.config.differences import describe_differences, find_differences
from tests import tiny
from tests.markdown import read_tables

DIGITS = tiny.ROOT / "configs/Digits-Detection/retinanet_R_18_FPN.yaml"


def test_the_differences_are_those_of_the_file_and_of_the_command_line():
    base, differences = find_differences(load_config(str(DIGITS), ["SOLVER.MAX_ITER", "100"]), str(DIGITS))
    assert base.endswith("configs/Base-RetinaNet-Digits.yaml")
    differences.pop("MODEL.DEVICE", None)  # of this machine
    assert differences == {"MODEL.RETINANET.NORM": ("BN", ""), "SOLVER.MAX_ITER": (100, 800)}


def test_a_file_without_a_base_is_compared_with_the_defaults(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("VERSION: 2\nINPUT: {MIN_SIZE_TRAIN: [800]}\nDATASETS: {TRAIN: ['a|b']}\n")
    cfg = load_config(str(path), ["MODEL.DEVICE", "cpu"])
    base, differences = find_differences(cfg, str(path))
    assert "defaults" in base
    assert differences.keys() == {"DATASETS.TRAIN", "MODEL.DEVICE"}, "a list of a file is a tuple of the defaults"
    assert ["DATASETS.TRAIN", "('a|b',)", "()"] in read_tables(describe_differences(cfg, str(path)))[0]
    text = describe_differences(cfg, str(path), ["MODEL.DEVICE"], most=1)
    assert "1 of 2 keys" in text
    ((_, row),) = read_tables(text)
    assert row[:2] == ["MODEL.DEVICE", "cpu"], "what the command line asks for comes first"
    assert "defaults" in describe_differences(cfg)

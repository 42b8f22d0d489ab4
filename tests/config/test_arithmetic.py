import pytest
from detectron2.model_zoo import get_config_file

from bnext import load_config
from bnext.config.arithmetic import compute


def test_computes_the_anchors_of_detectron2():
    cfg = load_config(get_config_file("COCO-Detection/retinanet_R_50_FPN_3x.yaml"))

    assert [
        [x, x * 2 ** (1.0 / 3), x * 2 ** (2.0 / 3)] for x in [32, 64, 128, 256, 512]
    ] == cfg.MODEL.ANCHOR_GENERATOR.SIZES


@pytest.mark.parametrize("text", ["[-1, (2, 3.5)]", "7 // 2 - 1 / 4", "[[y * x for y in [1, 2]] for x in [3, 4]]"])
def test_computes_as_python_does(text):
    assert compute(text) == eval(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "len([1])",
        "x",
        "'a' * 9",
        "[1] * 10 ** 9",
        "9 ** 9 ** 9",
        "1 / 0",
        "[x for x in [1] if x]",
        "[x for x in 5]",
        "(lambda: 1)()",
        "[" * 500,
        "1" * 2000,
        "True.real",
        "",
    ],
)
def test_refuses_all_else(text):
    with pytest.raises(ValueError, match="."):
        compute(text)

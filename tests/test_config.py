"""Config keys: defaults, and every value or combination that is refused, by key, value and remedy."""

import pytest

pytest.importorskip("detectron2")

from detectron2.config import get_cfg

from bnext import add_bnext_config
from bnext.config import LEVEL_ARCHITECTURES, check_config, get_head_norm
from bnext.errors import BNextError, ConfigError
from bnext.layers import TABLE5_ROWS, NormSpec

KEYS = ("STATISTICS", "POPULATION", "AFFINE")


def make_cfg(architecture="BNextRetinaNet", norm="BN", **answers):
    cfg = get_cfg()
    add_bnext_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.RETINANET.NORM = norm
    for key, value in answers.items():
        cfg.MODEL.BNEXT.RETINANET[key] = value
    return cfg


def refusal(cfg):
    with pytest.raises(ConfigError) as error:
        check_config(cfg)
    assert isinstance(error.value, BNextError)
    return str(error.value)


def test_defaults_leave_detectron2_as_it_is():
    cfg = make_cfg(architecture="GeneralizedRCNN", norm="")
    check_config(cfg)
    before = get_cfg()
    del cfg.MODEL["BNEXT"]
    assert cfg.SOLVER.pop("OPTIMIZER") == "SGD"
    cfg.MODEL.META_ARCHITECTURE = before.MODEL.META_ARCHITECTURE
    assert cfg == before
    assert get_head_norm(make_cfg()).table5_row == 4


@pytest.mark.parametrize(("norm", "workers"), [("BN", "one"), ("SyncBN", "all")])
@pytest.mark.parametrize("row", TABLE5_ROWS)
@pytest.mark.parametrize("architecture", LEVEL_ARCHITECTURES)
def test_six_rows_by_keys_alone(architecture, row, norm, workers):
    cfg = make_cfg(architecture, norm, **dict(zip(KEYS, TABLE5_ROWS[row], strict=True)))
    check_config(cfg)
    assert get_head_norm(cfg) == NormSpec.from_table5_row(row, workers=workers)


@pytest.mark.parametrize("norm", ["GN", "", "FrozenBN"])
def test_other_norms_are_detectron2s(norm):
    cfg = make_cfg(norm=norm)
    check_config(cfg)
    assert get_head_norm(cfg) == norm


@pytest.mark.parametrize("norm", ["naiveSyncBN", "nnSyncBN", "batchnorm"])
def test_a_norm_that_would_be_shared_silently_or_is_unknown(norm):
    assert refusal(make_cfg(norm=norm)).startswith("MODEL.RETINANET.NORM must be BN, SyncBN")


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", ["per-level", "SHARED", "", "none"])
def test_a_value_outside_its_set(key, value):
    text = refusal(make_cfg(**{key: value}))
    assert text == (
        f"MODEL.BNEXT.RETINANET.{key} must be one of 'shared', 'per_level'; got {value!r} (config). Choose one of them."
    )


@pytest.mark.parametrize(
    ("key", "value"), [("STATISTICS", "shared"), ("POPULATION", "shared"), ("AFFINE", "per_level")]
)
@pytest.mark.parametrize("architecture", ["GeneralizedRCNN", "RetinaNet"])
def test_rows_asked_for_a_model_without_levels(architecture, key, value):
    text = refusal(make_cfg(architecture, **{key: value}))
    assert text.startswith(f"MODEL.BNEXT.RETINANET.{key} must keep its default")
    assert f"got {value!r} (MODEL.META_ARCHITECTURE is {architecture!r})" in text
    assert "Set MODEL.META_ARCHITECTURE to one of BNextRetinaNet, BNextFCOS" in text


@pytest.mark.parametrize(
    ("key", "value"), [("STATISTICS", "shared"), ("POPULATION", "shared"), ("AFFINE", "per_level")]
)
@pytest.mark.parametrize("norm", ["", "GN", "FrozenBN"])
def test_rows_asked_for_a_head_without_batch_norm(norm, key, value):
    text = refusal(make_cfg(norm=norm, **{key: value}))
    assert text.startswith(f"MODEL.BNEXT.RETINANET.{key} must keep its default where the head has no batch norm")
    assert f"(MODEL.RETINANET.NORM is {norm!r})" in text
    assert "Set MODEL.RETINANET.NORM to one of BN, SyncBN" in text


def test_rows_asked_for_a_single_level():
    cfg = make_cfg(STATISTICS="shared")
    cfg.MODEL.RETINANET.IN_FEATURES = ["p3"]
    text = refusal(cfg)
    assert text.startswith("MODEL.BNEXT.RETINANET.STATISTICS must keep its default where the head sees a single level")
    assert "(MODEL.RETINANET.IN_FEATURES is ['p3'])" in text


def test_a_config_without_our_keys_names_the_missing_call():
    text = refusal(get_cfg())
    assert text.startswith("MODEL.BNEXT must be in the config")
    assert "Call bnext.add_bnext_config(cfg) after get_cfg() and before merge_from_file" in text


@pytest.mark.parametrize("architecture", LEVEL_ARCHITECTURES)
def test_building_a_model_checks_first(architecture):
    from detectron2.modeling import build_model

    cfg = make_cfg(architecture, STATISTICS="both")
    cfg.MODEL.DEVICE = "cpu"
    with pytest.raises(ConfigError, match=r"MODEL\.BNEXT\.RETINANET\.STATISTICS must be one of"):
        build_model(cfg)


def test_an_unknown_key_is_refused_on_merging():
    cfg = make_cfg()
    with pytest.raises((AssertionError, KeyError), match=r"MODEL\.BNEXT\.RETINANET\.STATISTIC"):
        cfg.merge_from_list(["MODEL.BNEXT.RETINANET.STATISTIC", "shared"])
    with pytest.raises(ValueError, match="Type mismatch"):
        cfg.merge_from_list(["MODEL.BNEXT.RETINANET.STATISTICS", 3])

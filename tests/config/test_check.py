"""Config keys: defaults, and every value or combination that is refused, by key, value and remedy."""

import pytest

pytest.importorskip("detectron2")

from detectron2.config import get_cfg

from bnext import add_bnext_config
from bnext.config.check import check_config
from bnext.config.places import LEVEL_ARCHITECTURES, PLACES, get_head_norm, get_place_norm
from bnext.errors import BNextError, ConfigError
from bnext.layers import TABLE5_ROWS, NormSpec

KEYS = ("STATISTICS", "POPULATION", "AFFINE")
NORMS = "'BN', 'SyncBN', 'FrozenBN', 'GN', 'LN', ''"
SWITCHES = {"MODEL.MASK_ON": True, "MODEL.KEYPOINT_ON": True}
DOMAINS = {"MODEL.BNEXT.DOMAINS.NAMES": ("day", "night")}


def make_cfg(architecture="BNextRetinaNet", norm="BN", **answers):
    cfg = get_cfg()
    add_bnext_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.RETINANET.NORM = norm
    for key, value in answers.items():
        cfg.MODEL.BNEXT.RETINANET[key] = value
    return cfg


def make_whole(architecture="BNextPanopticFPN", **changes):
    """A config with a BN at every place that it has, and changes of keys."""
    norms = {what.norm: "BN" for what in PLACES.values() if architecture in what.architectures}
    return make_of(architecture, {**norms, **SWITCHES, **changes})


def make_of(architecture, pairs):
    cfg = get_cfg()
    add_bnext_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3"]
    cfg.merge_from_list([item for pair in pairs.items() for item in pair])
    return cfg


def place_of(architecture):
    return [name for name, place in PLACES.items() if architecture in place.architectures]


def refusal(cfg):
    with pytest.raises(ConfigError) as error:
        check_config(cfg)
    assert isinstance(error.value, BNextError)
    return str(error.value)


def test_defaults_leave_detectron2_as_it_is():
    cfg = make_cfg(architecture="GeneralizedRCNN", norm="")
    check_config(cfg)
    before = get_cfg()
    del cfg.MODEL["BNEXT"], cfg.SOLVER["BNEXT"], cfg.TEST["BNEXT"]
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
    assert refusal(make_cfg(norm=norm)) == (
        f"MODEL.RETINANET.NORM must be one of {NORMS}; got {norm!r} (config). Choose one of them."
    )


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("value", ["per-level", "SHARED", "", "per_domain"])
def test_a_value_outside_its_set(key, value):
    text = refusal(make_cfg(**{key: value}))
    allowed = "'shared', 'per_level'" if key == "STATISTICS" else "'shared', 'per_level', 'none'"
    assert text == f"MODEL.BNEXT.RETINANET.{key} must be one of {allowed}; got {value!r} (config). Choose one of them."


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
    assert text.startswith(f"MODEL.BNEXT.RETINANET.{key} must keep its default where there is no batch norm of bnext")
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


@pytest.mark.parametrize("place", PLACES)
def test_every_place_has_the_same_keys(place):
    """RoI heads have those of their shuffle besides."""
    node = make_cfg().MODEL.BNEXT[place]
    shuffle = {"SHUFFLE", "SHUFFLE_GROUPS"}
    assert place.startswith("ROI_") == (shuffle <= set(node))
    assert set(node) - {"NORM"} - shuffle == {
        *("STATISTICS", "NORMALIZATION_BATCH_SIZE", "WORKERS", "TRAINING", "R_MAX", "D_MAX", "POPULATION", "AVERAGE"),
        *("MOMENTUM", "INFERENCE", "AFFINE", "FROZEN", "SINGLE_ELEMENT", "EPS"),
    }
    assert ("NORM" in node) == (place in ("RPN", "ROI_KEYPOINT_HEAD"))
    assert set(node) - {"WORKERS", "NORM"} - shuffle <= {field.upper() for field in vars(NormSpec())}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["BN", "SyncBN"])
def test_default_nodes_are_the_norm_of_the_name(place, name):
    cfg = make_of("BNextRetinaNet" if place == "RETINANET" else "BNextPanopticFPN", {})
    spec = get_place_norm(cfg, place, name)
    row = 4 if place in ("RETINANET", "RPN") else 1
    assert spec == NormSpec.from_table5_row(row, workers="all" if name == "SyncBN" else "one")


VALUES = {
    "NORMALIZATION_BATCH_SIZE": 2,
    "WORKERS": 2,
    "TRAINING": "renorm",
    "POPULATION": "shared",
    "AVERAGE": "cumulative",
    "MOMENTUM": 0.3,
    "INFERENCE": "mini_batch",
    "AFFINE": "none",
    "FROZEN": "affine",
    "SINGLE_ELEMENT": "population",
    "EPS": 0.25,
}


@pytest.mark.parametrize("architecture", ["BNextPanopticFPN", "BNextFCOS"])
@pytest.mark.parametrize("key", VALUES)
def test_every_key_reaches_the_spec_of_its_place(architecture, key):
    for place in place_of(architecture):
        cfg = make_whole(architecture, **{f"MODEL.BNEXT.{place}.{key}": VALUES[key]})
        check_config(cfg)
        assert getattr(get_place_norm(cfg, place), key.lower()) == VALUES[key]
        for other in set(place_of(architecture)) - {place}:
            assert get_place_norm(cfg, other) == get_place_norm(make_whole(architecture), other)


def test_limits_of_renorm_and_numbers_of_workers_as_on_a_command_line():
    changes = {"TRAINING": "renorm", "R_MAX": "2.0", "D_MAX": "1.0", "WORKERS": "4"}
    cfg = make_whole(**{f"MODEL.BNEXT.FPN.{key}": value for key, value in changes.items()})
    check_config(cfg)
    spec = get_place_norm(cfg, "FPN")
    assert (spec.r_max, spec.d_max, spec.workers) == (2.0, 1.0, 4)


@pytest.mark.parametrize("place", ["RESNETS", "FPN", "ROI_BOX_HEAD", "SEM_SEG_HEAD"])
def test_domains_are_named_once_for_every_place(place):
    key = f"MODEL.BNEXT.{place}.POPULATION"
    cfg = make_whole(**DOMAINS, **{key: "per_domain", "MODEL.BNEXT.DOMAINS.FALLBACK": "night"})
    check_config(cfg)
    spec = get_place_norm(cfg, place)
    assert (spec.population, spec.domains, spec.fallback_domain) == ("per_domain", ("day", "night"), "night")
    assert get_place_norm(cfg, "ROI_MASK_HEAD") == NormSpec()


REFUSED = [
    ("FPN.STATISTICS", "per_level", "must be one of 'shared', 'per_domain'; got 'per_level'"),
    ("FPN.STATISTICS", "none", "must be one of 'shared', 'per_domain'; got 'none'"),
    ("RPN.AFFINE", "per_domain", "must be one of 'shared', 'per_level', 'none'; got 'per_domain'"),
    ("FPN.TRAINING", "batch", "must be one of 'mini_batch', 'population', 'renorm'; got 'batch'"),
    ("FPN.AVERAGE", "ema", "must be one of 'moving', 'cumulative'; got 'ema'"),
    ("FPN.INFERENCE", "batch", "must be one of 'population', 'mini_batch'; got 'batch'"),
    ("FPN.FROZEN", "all", "must be one of 'none', 'statistics', 'affine', 'both'; got 'all'"),
    ("FPN.SINGLE_ELEMENT", "skip", "must be one of 'error', 'population'; got 'skip'"),
    ("FPN.WORKERS", "two", "must be one of 'one', 'node', 'all', a number of workers, or None"),
    ("FPN.WORKERS", True, "must be one of 'one', 'node', 'all', a number of workers, or None"),
    ("FPN.R_MAX", 2.0, "must keep its default unless TRAINING is 'renorm'; got 2.0 (TRAINING is 'mini_batch')"),
    ("FPN.D_MAX", 2.0, "must keep its default unless TRAINING is 'renorm'"),
]


@pytest.mark.parametrize(("key", "value", "rule"), REFUSED)
@pytest.mark.parametrize("architecture", ["BNextPanopticFPN", "GeneralizedRCNN"])
def test_values_outside_their_sets_in_any_architecture(architecture, key, value, rule):
    cfg = make_of(architecture, {f"MODEL.BNEXT.{key}": value})
    assert refusal(cfg).startswith(f"MODEL.BNEXT.{key} {rule}")


def test_a_momentum_of_a_cumulative_average():
    cfg = make_whole(**{"MODEL.BNEXT.FPN.MOMENTUM": 0.3, "MODEL.BNEXT.FPN.AVERAGE": "cumulative"})
    assert refusal(cfg).startswith("MODEL.BNEXT.FPN.MOMENTUM must keep its default unless AVERAGE is 'moving'; got 0.3")


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"WORKERS": 0}, "workers must be one of"),
        ({"NORMALIZATION_BATCH_SIZE": -1}, "normalization_batch_size must be 1 or more"),
        ({"NORMALIZATION_BATCH_SIZE": 2, "WORKERS": "all"}, "normalization_batch_size must be None where"),
        ({"MOMENTUM": 0.0}, "momentum must be above 0"),
        ({"EPS": 0.0}, "eps must be above 0"),
        ({"POPULATION": "none"}, "inference must not be 'population'"),
        ({"POPULATION": "per_domain"}, "domains must name the domains"),
    ],
)
def test_contradictions_name_the_place(changes, start):
    cfg = make_whole(**{f"MODEL.BNEXT.SEM_SEG_HEAD.{key}": value for key, value in changes.items()})
    assert refusal(cfg).startswith(f"MODEL.BNEXT.SEM_SEG_HEAD: {start}")


def test_ghost_batch_norm_by_the_name_of_sync_bn_is_a_contradiction():
    cfg = make_whole(**{"MODEL.FPN.NORM": "SyncBN", "MODEL.BNEXT.FPN.NORMALIZATION_BATCH_SIZE": 2})
    assert refusal(cfg).startswith("MODEL.BNEXT.FPN: normalization_batch_size must be None")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("norm", ["", "GN", "LN", "FrozenBN"])
def test_keys_of_a_place_without_batch_norm(place, norm):
    architecture = "BNextRetinaNet" if place == "RETINANET" else "BNextPanopticFPN"
    cfg = make_whole(architecture, **{PLACES[place].norm: norm, f"MODEL.BNEXT.{place}.EPS": 0.1})
    assert refusal(cfg) == (
        f"MODEL.BNEXT.{place}.EPS must keep its default where there is no batch norm of bnext; got 0.1 "
        f"({PLACES[place].norm} is {norm!r}). Set {PLACES[place].norm} to one of BN, SyncBN, or remove the key."
    )


@pytest.mark.parametrize("place", PLACES)
def test_an_unknown_norm_at_any_place(place):
    architecture = "BNextRetinaNet" if place == "RETINANET" else "BNextPanopticFPN"
    text = refusal(make_whole(architecture, **{PLACES[place].norm: "nnSyncBN"}))
    assert text == f"{PLACES[place].norm} must be one of {NORMS}; got 'nnSyncBN' (config). Choose one of them."


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("architecture", ["GeneralizedRCNN", "RetinaNet", "PanopticFPN"])
def test_keys_for_detectron2s_own_architectures(architecture, place):
    text = refusal(make_of(architecture, {f"MODEL.BNEXT.{place}.EPS": 0.1}))
    assert text.startswith(f"MODEL.BNEXT.{place}.EPS must keep its default in a model without this place of bnext; got")
    assert f"Set MODEL.META_ARCHITECTURE to one of {', '.join(PLACES[place].architectures)}" in text


def test_a_norm_of_ours_for_detectron2s_own_architecture():
    for place in ("RPN", "ROI_KEYPOINT_HEAD"):
        text = refusal(make_of("GeneralizedRCNN", {f"MODEL.BNEXT.{place}.NORM": "BN"}))
        assert text.startswith(f"MODEL.BNEXT.{place}.NORM must keep its default in a model without this place of bnext")


@pytest.mark.parametrize(
    ("architecture", "place"),
    [
        ("BNextRetinaNet", "RPN"),
        ("BNextGeneralizedRCNN", "RETINANET"),
        ("BNextGeneralizedRCNN", "SEM_SEG_HEAD"),
        ("BNextProposalNetwork", "ROI_BOX_HEAD"),
        ("BNextSemanticSegmentor", "RPN"),
    ],
)
def test_a_place_that_the_architecture_has_not(architecture, place):
    text = refusal(make_of(architecture, {f"MODEL.BNEXT.{place}.FROZEN": "both"}))
    assert text.startswith(f"MODEL.BNEXT.{place}.FROZEN must keep its default in a model without this place of bnext")


@pytest.mark.parametrize(("place", "switch"), [("ROI_MASK_HEAD", "MASK_ON"), ("ROI_KEYPOINT_HEAD", "KEYPOINT_ON")])
def test_a_head_that_is_switched_off(place, switch):
    cfg = make_of("BNextGeneralizedRCNN", {PLACES[place].norm: "BN", f"MODEL.BNEXT.{place}.EPS": 0.1})
    text = refusal(cfg)
    assert "must keep its default where MODEL." + switch + " is False; got" in text
    assert text.endswith(f"Set MODEL.{switch} to True, or remove the key.")


def test_domains_that_nothing_uses():
    assert refusal(make_whole(**DOMAINS)).startswith("MODEL.BNEXT.DOMAINS.NAMES must keep its default where nothing is")
    text = refusal(make_whole(**{"MODEL.BNEXT.DOMAINS.FALLBACK": "day"}))
    assert text.startswith("MODEL.BNEXT.DOMAINS.FALLBACK must keep its default where nothing is per_domain")
    cfg = make_whole(**{"MODEL.BNEXT.DOMAINS.NAMES": (1, 2), "MODEL.BNEXT.FPN.POPULATION": "per_domain"})
    assert refusal(cfg).startswith("MODEL.BNEXT.DOMAINS.NAMES must be names; got (1, 2)")


def test_schedules_are_checked_too():
    text = refusal(make_whole(**{"SOLVER.BNEXT.FREEZE.WHAT": "all"}))
    assert text.startswith("SOLVER.BNEXT.FREEZE.WHAT must be one of")


def test_a_config_is_dumped_and_read_again(tmp_path):
    cfg = make_whole(**{"MODEL.BNEXT.FPN.WORKERS": 2})
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = make_cfg()
    again.merge_from_file(str(tmp_path / "config.yaml"))
    assert again.MODEL.BNEXT == cfg.MODEL.BNEXT
    check_config(again)


def test_an_unknown_key_is_refused_on_merging():
    cfg = make_cfg()
    with pytest.raises((AssertionError, KeyError), match=r"MODEL\.BNEXT\.RETINANET\.STATISTIC"):
        cfg.merge_from_list(["MODEL.BNEXT.RETINANET.STATISTIC", "shared"])
    with pytest.raises(ValueError, match="Type mismatch"):
        cfg.merge_from_list(["MODEL.BNEXT.RETINANET.STATISTICS", 3])

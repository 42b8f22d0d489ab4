"""Every value and combination of keys that is refused, by the key that the error names; and what goes together."""

import pytest

pytest.importorskip("detectron2")

from detectron2.config import get_cfg
from detectron2.modeling import build_model

from bnext.config import load_config, resolve_norms
from bnext.config.keys import KEYS, PLACE_KEYS
from bnext.config.places import LEVEL_ARCHITECTURES, PLACES
from bnext.errors import ConfigError
from tests.config.configs import DOMAINS, make_cfg, make_whole

FPN, RETINANET, BOX = "MODEL.BNEXT.FPN", "MODEL.BNEXT.RETINANET", "MODEL.BNEXT.ROI_BOX_HEAD"
FREEZE, PRECISE, LOSS = "SOLVER.BNEXT.FREEZE", "TEST.BNEXT.PRECISE_BN", "TEST.BNEXT.VALIDATION_LOSS"
SMART, ENABLED = {"TEST.BNEXT.SMART_BATCH_NORM": True}, {"TEST.PRECISE_BN.ENABLED": True}
STATISTICS, FEATURES = {f"{BOX}.SHUFFLE": "statistics"}, {f"{BOX}.SHUFFLE": "features"}
EMA, BEST = "SOLVER.BNEXT.EMA", "TEST.BNEXT.BEST"
METRIC = {f"{BEST}.METRIC": "bbox/AP", "TEST.EVAL_PERIOD": 100, "DATASETS.TEST": ("my_val",)}
BATCHES = "DATALOADER.BNEXT"
ALTERNATING = {f"{BATCHES}.BATCHES": "alternating"}
RCNN_ONLY = ["ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD"]


def refusal(cfg):
    with pytest.raises(ConfigError) as error:
        resolve_norms(cfg)
    return str(error.value)


def architecture_of(place):
    return "BNextRetinaNet" if place == "RETINANET" else "BNextPanopticFPN"


def test_the_defaults_are_accepted_and_leave_detectron2_as_it_is():
    cfg = make_cfg("GeneralizedRCNN")
    resolve_norms(cfg)
    before, cfg = get_cfg(), make_cfg(get_cfg().MODEL.META_ARCHITECTURE)
    del cfg.MODEL["BNEXT"], cfg.SOLVER["BNEXT"], cfg.TEST["BNEXT"], cfg.DATASETS["BNEXT"], cfg.DATALOADER["BNEXT"]
    del cfg.DATASETS["DOMAINS"]
    assert cfg.SOLVER.pop("OPTIMIZER") == "SGD"
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RPN.IN_FEATURES = before.MODEL.BACKBONE.NAME, before.MODEL.RPN.IN_FEATURES
    assert cfg == before


def test_a_config_without_our_keys_names_the_missing_call():
    assert "add_bnext_config(cfg)" in refusal(get_cfg())


OUTSIDE = {
    f"{FPN}.STATISTICS": ["per_level", "none", "SHARED"],
    f"{RETINANET}.STATISTICS": ["per_image", "none", "per-level", ""],
    f"{RETINANET}.POPULATION": ["per_image"],
    "MODEL.BNEXT.RPN.AFFINE": ["per_image"],
    f"{FPN}.WORKERS": ["two", True, 0],
    f"{FPN}.TRAINING": ["batch"],
    f"{FPN}.AVERAGE": ["ema"],
    f"{FPN}.INFERENCE": ["batch"],
    f"{FPN}.FROZEN": ["all"],
    f"{FPN}.SINGLE_ELEMENT": ["skip"],
    f"{BOX}.SHUFFLE": ["yes"],
    f"{BOX}.SHUFFLE_GROUPS": [1, -1, "two", 2.5, True],
    "MODEL.BNEXT.DOMAINS.NAMES": [(1, 2), ("",)],
    f"{FREEZE}.ITER": [-2, 40_000],
    f"{FREEZE}.WHAT": ["all"],
    f"{FREEZE}.WARMUP_ITERS": [-1],
    "SOLVER.BNEXT.MOMENTUM": [[[0, 2.0]], [0.1], [[5, 0.1], [5, 0.2]]],
    "SOLVER.BNEXT.RENORM.R_MAX": [[[0, 0.5]]],
    "SOLVER.BNEXT.RENORM.D_MAX": [[[0, -1.0]]],
    "SOLVER.BNEXT.ACCUMULATE": [0, -1, True, 1.5],
    f"{EMA}.DECAY": [1.0, -0.1, float("nan")],
    f"{EMA}.BUFFERS": ["kept"],
    "SOLVER.BNEXT.NORM_METRICS.PERIOD": [-1, 0.5],
    "SOLVER.BNEXT.DOCTOR.PERIOD": [-1, True],
    f"{BEST}.MODE": ["most"],
    f"{BEST}.PATIENCE": [-1, True],
    f"{PRECISE}.ROIS": ["all"],
    f"{PRECISE}.TOLERANCE": [-0.1, float("inf"), float("nan")],
    f"{PRECISE}.ESTIMATOR": ["median"],
    f"{LOSS}.PERIOD": [-1],
    f"{LOSS}.NUM_BATCHES": [-1],
    f"{LOSS}.STATISTICS": ["frozen"],
    f"{BATCHES}.BATCHES": ["single"],
    f"{BATCHES}.RATIOS": [[["day", 0]], [["day", 1.5]], [["day"]], [["day", 1], ["day", 2]], ["day"], [{"day": 6}]],
    f"{BATCHES}.TEMPERATURE": [-1.0, 0.0, float("nan")],
    f"{BATCHES}.BALANCE": ["objects"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in OUTSIDE.items() for value in values])
def test_a_value_outside_its_set_is_refused_also_where_the_model_has_no_use_for_it(name, value):
    cfg = make_cfg("GeneralizedRCNN")
    node = cfg
    *path, key = name.split(".")
    for part in path:
        node = node[part]
    node[key] = value  # yacs refuses other types only where it merges
    text = refusal(cfg)
    assert text.startswith(f"{name} must ")
    assert "keep its default" not in text


# What needs another key, in an R-CNN with a BN everywhere: changes, the key that the error names, and the other one.
LACKING = [
    ({f"{FPN}.R_MAX": 2.0}, f"{FPN}.R_MAX", "TRAINING"),
    ({f"{FPN}.D_MAX": 2.0, f"{FPN}.TRAINING": "population"}, f"{FPN}.D_MAX", "TRAINING"),
    ({f"{FPN}.MOMENTUM": 0.3, f"{FPN}.AVERAGE": "cumulative"}, f"{FPN}.MOMENTUM", "AVERAGE"),
    ({f"{RETINANET}.FROZEN": "both"}, f"{RETINANET}.FROZEN", "MODEL.META_ARCHITECTURE"),
    ({f"{BOX}.SHUFFLE_GROUPS": 4}, f"{BOX}.SHUFFLE_GROUPS", "SHUFFLE"),
    ({f"{BOX}.SHUFFLE_GROUPS": 4, **FEATURES}, f"{BOX}.SHUFFLE_GROUPS", "SHUFFLE"),
    *(
        ({f"{BOX}.{key}": value, **shuffle}, f"{BOX}.SHUFFLE", key)
        for key, value in (
            ("NORMALIZATION_BATCH_SIZE", 4),
            ("TRAINING", "population"),
            ("FROZEN", "statistics"),
            ("FROZEN", "both"),
        )
        for shuffle in (STATISTICS, FEATURES)
    ),
    *(({f"{BOX}.WORKERS": workers, **STATISTICS}, f"{BOX}.SHUFFLE", "SHUFFLE_GROUPS") for workers in ("one", 1)),
    *(({f"{BOX}.WORKERS": workers, **FEATURES}, f"{BOX}.SHUFFLE", "WORKERS") for workers in ("all", "node", 2)),
    *(
        ({f"{BOX}.{key}": "per_domain", **DOMAINS, **FEATURES}, f"{BOX}.SHUFFLE", key)
        for key in ("STATISTICS", "POPULATION", "AFFINE")
    ),
    (DOMAINS, "MODEL.BNEXT.DOMAINS.NAMES", "POPULATION"),
    ({"MODEL.BNEXT.DOMAINS.FALLBACK": "day"}, "MODEL.BNEXT.DOMAINS.FALLBACK", "UNSEEN is 'fallback'"),
    ({"MODEL.BNEXT.DOMAINS.UNSEEN": "fallback"}, "MODEL.BNEXT.DOMAINS.UNSEEN", "FALLBACK is not empty"),
    ({"MODEL.BNEXT.DOMAINS.UNSEEN": "mixture"}, "MODEL.BNEXT.DOMAINS.UNSEEN", "POPULATION"),
    ({"MODEL.BNEXT.DOMAINS.SOURCE_IMAGES": 16}, "MODEL.BNEXT.DOMAINS.SOURCE_IMAGES", "UNSEEN is one of"),
    ({f"{FREEZE}.WHAT": "affine"}, f"{FREEZE}.WHAT", f"{FREEZE}.ITER"),
    ({f"{FREEZE}.WARMUP_ITERS": 3}, f"{FREEZE}.WARMUP_ITERS", f"{FREEZE}.ITER"),
    ({f"{EMA}.DECAY": 0.9}, f"{EMA}.DECAY", f"{EMA}.ENABLED"),
    ({f"{EMA}.WARM_UP": False}, f"{EMA}.WARM_UP", f"{EMA}.ENABLED"),
    ({f"{EMA}.BUFFERS": "copied"}, f"{EMA}.BUFFERS", f"{EMA}.ENABLED"),
    ({"SOLVER.BNEXT.WANDB.PROJECT": "mine"}, "SOLVER.BNEXT.WANDB.PROJECT", "SOLVER.BNEXT.WANDB.ENABLED"),
    ({"SOLVER.BNEXT.WANDB.NAME": "first"}, "SOLVER.BNEXT.WANDB.NAME", "SOLVER.BNEXT.WANDB.ENABLED"),
    ({**METRIC, "TEST.EVAL_PERIOD": 0}, f"{BEST}.METRIC", "TEST.EVAL_PERIOD"),
    ({**METRIC, "DATASETS.TEST": ()}, f"{BEST}.METRIC", "DATASETS.TEST"),
    ({f"{BEST}.MODE": "min"}, f"{BEST}.MODE", f"{BEST}.METRIC"),
    ({f"{BEST}.PATIENCE": 3}, f"{BEST}.PATIENCE", f"{BEST}.METRIC"),
    ({**METRIC, **SMART, f"{BEST}.PATIENCE": 3}, f"{BEST}.PATIENCE", "TEST.BNEXT.SMART_BATCH_NORM"),
    ({f"{PRECISE}.TOLERANCE": 0.01}, f"{PRECISE}.TOLERANCE", "TEST.PRECISE_BN.ENABLED"),
    ({f"{PRECISE}.ESTIMATOR": "mean_of_batches"}, f"{PRECISE}.ESTIMATOR", "TEST.PRECISE_BN.ENABLED"),
    ({f"{PRECISE}.BEFORE_CHECKPOINTS": False}, f"{PRECISE}.BEFORE_CHECKPOINTS", "TEST.PRECISE_BN.ENABLED"),
    # The one estimate of smart batch norm is before the last checkpoint only.
    ({f"{PRECISE}.BEFORE_CHECKPOINTS": False, **SMART}, f"{PRECISE}.BEFORE_CHECKPOINTS", "TEST.PRECISE_BN.ENABLED"),
    (
        {f"{PRECISE}.TOLERANCE": 0.5, f"{PRECISE}.ESTIMATOR": "layer_by_layer", **ENABLED},
        f"{PRECISE}.TOLERANCE",
        f"{PRECISE}.ESTIMATOR",
    ),
    ({**SMART, **ENABLED}, "TEST.BNEXT.SMART_BATCH_NORM", "TEST.PRECISE_BN.ENABLED"),
    ({**SMART, f"{FREEZE}.ITER": 0}, "TEST.BNEXT.SMART_BATCH_NORM", f"{FREEZE}.ITER"),
    ({f"{LOSS}.NUM_BATCHES": 3}, f"{LOSS}.NUM_BATCHES", f"{LOSS}.PERIOD"),
    ({f"{LOSS}.STATISTICS": "mini_batch"}, f"{LOSS}.STATISTICS", f"{LOSS}.PERIOD"),
    ({f"{LOSS}.PERIOD": 5, "DATASETS.TEST": ()}, f"{LOSS}.PERIOD", "DATASETS.TEST"),
    (
        {**ALTERNATING, "DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler"},
        f"{BATCHES}.BATCHES",
        "DATALOADER.SAMPLER_TRAIN",
    ),
    ({f"{BATCHES}.RATIOS": [["day", 1]]}, f"{BATCHES}.RATIOS", f"{BATCHES}.BATCHES"),
    ({f"{BATCHES}.TEMPERATURE": 5.0}, f"{BATCHES}.TEMPERATURE", f"{BATCHES}.BATCHES"),
    (
        {**ALTERNATING, f"{BATCHES}.TEMPERATURE": 5.0, f"{BATCHES}.RATIOS": [["day", 1]]},
        f"{BATCHES}.TEMPERATURE",
        f"{BATCHES}.RATIOS",
    ),
    ({**ALTERNATING, f"{BATCHES}.BALANCE": "annotations"}, f"{BATCHES}.BALANCE", f"{BATCHES}.TEMPERATURE"),
    ({**ALTERNATING, "SOLVER.BNEXT.VIRTUAL_IMAGES": 4}, "SOLVER.BNEXT.VIRTUAL_IMAGES", f"{BATCHES}.BATCHES"),
]


@pytest.mark.parametrize(("changes", "name", "other"), LACKING)
def test_a_key_without_what_gives_it_an_effect_is_refused(changes, name, other):
    text = refusal(make_whole(changes=changes))
    assert text.startswith(f"{name} must keep its default unless ")
    assert other in text.split("; got ")[0]
    assert f"got {changes.get(name)!r}" in text


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("norm", ["", "GN", "LN", "FrozenBN"])
def test_keys_that_another_norm_has_no_use_for_are_said_and_left_out(place, norm, caplog, monkeypatch):
    """A config is to run with whatever norm the command line gives it."""
    monkeypatch.setattr("bnext.notices._told_names", set())
    key, name = PLACES[place].norm, f"MODEL.BNEXT.{place}"
    changes = {f"{name}.EPS": 0.1, f"{name}.AFFINE": "none"}
    cfg = make_whole(architecture_of(place), {key: norm, **changes})

    resolved = resolve_norms(cfg).places[place]
    assert (resolved.name, resolved.changed) == (norm, ())
    assert resolved == resolve_norms(make_whole(architecture_of(place), {key: norm})).places[place]
    assert len(caplog.messages) == 1, "said once, however often the config is read"
    for words in (f"{name}.EPS", f"{name}.AFFINE", f"{key} is {norm!r}"):
        assert words in caplog.messages[0]

    resolved = resolve_norms(make_whole(architecture_of(place), {key: "BN", **changes})).places[place]
    assert set(resolved.changed) == {"EPS", "AFFINE"}


@pytest.mark.parametrize(("key", "value"), [("NORMALIZATION_BATCH_SIZE", 2), ("SHUFFLE", "features")])
def test_groups_inside_a_mini_batch_of_all_workers_are_said_and_left_out(key, value, caplog, monkeypatch):
    """Ghost BN in a file, SyncBN from the command line; a worker count that the file asks for itself stays refused."""
    monkeypatch.setattr("bnext.notices._told_names", set())
    changes = {f"{BOX}.{key}": value, "MODEL.ROI_BOX_HEAD.NORM": "SyncBN"}
    place = resolve_norms(make_whole(changes=changes)).places["ROI_BOX_HEAD"]
    assert place == resolve_norms(make_whole(changes={"MODEL.ROI_BOX_HEAD.NORM": "SyncBN"})).places["ROI_BOX_HEAD"]
    assert f"{BOX}.{key} has no effect" in caplog.text

    assert BOX in refusal(make_whole(changes={f"{BOX}.{key}": value, f"{BOX}.WORKERS": "all"}))


def test_domains_are_left_out_with_the_norm_that_had_some(caplog, monkeypatch):
    monkeypatch.setattr("bnext.notices._told_names", set())
    changes = {**DOMAINS, "MODEL.BNEXT.RESNETS.POPULATION": "per_domain"}
    norms = resolve_norms(make_whole(changes={**changes, "MODEL.RESNETS.NORM": "GN"}))
    assert (norms.domains, norms.places["RESNETS"].spec.domains) == ((), ())
    assert "MODEL.BNEXT.RESNETS.POPULATION has no effect" in caplog.text


@pytest.mark.parametrize("place", RCNN_ONLY)
def test_a_shuffle_of_a_head_without_batch_norm(place):
    """Of features it is seen when the head is built: see tests/heads/test_roi_shuffle.py."""
    key = f"MODEL.BNEXT.{place}.SHUFFLE"
    for form, left in (("statistics", "none"), ("features", "features")):
        norms = resolve_norms(make_whole(changes={PLACES[place].norm: "GN", key: form}))
        assert norms.places[place].shuffle == left


@pytest.mark.parametrize("place", PLACES)
def test_keys_of_a_place_that_the_architecture_has_not(place):
    """The norm of a place of ours is such a key, too."""
    names = [key.name for key in PLACE_KEYS[place] if key.name.endswith((".NORM", ".AFFINE", ".SHUFFLE"))]
    values = {"NORM": "BN", "AFFINE": "none", "SHUFFLE": "features"}
    for name in names:
        text = refusal(make_cfg("RetinaNet", {name: values[name.rpartition(".")[2]]}))
        assert text.startswith(f"{name} must keep its default unless MODEL.META_ARCHITECTURE is one of 'BNext")


@pytest.mark.parametrize(("place", "switch"), [("ROI_MASK_HEAD", "MASK_ON"), ("ROI_KEYPOINT_HEAD", "KEYPOINT_ON")])
@pytest.mark.parametrize(("key", "value"), [("EPS", 0.1), ("SHUFFLE", "statistics"), ("SHUFFLE", "features")])
def test_a_head_that_is_switched_off(place, switch, key, value):
    cfg = make_cfg("BNextGeneralizedRCNN", {PLACES[place].norm: "BN", f"MODEL.BNEXT.{place}.{key}": value})
    if place == "ROI_KEYPOINT_HEAD":
        cfg.MODEL.BNEXT[place].NORM = ""
    assert f"unless MODEL.{switch} is True" in refusal(cfg)


@pytest.mark.parametrize("key", ["STATISTICS", "POPULATION"])
def test_a_choice_between_levels_needs_several(key):
    changes = {"MODEL.RETINANET.NORM": "BN", "MODEL.RETINANET.IN_FEATURES": ["p3"], f"{RETINANET}.{key}": "shared"}
    text = refusal(make_cfg(changes=changes))
    assert text.startswith(f"{RETINANET}.{key} must keep its default unless MODEL.RETINANET.IN_FEATURES is several")
    resolve_norms(make_cfg(changes={**changes, f"{RETINANET}.{key}": "per_level", f"{RETINANET}.AFFINE": "none"}))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("norm", "remedy"),
    [
        ("nnSyncBN", "Write SyncBN"),
        ("naiveSyncBN", "Write SyncBN"),
        ("NaiveSyncBN", "Write SyncBN"),
        ("syncbn", "Write SyncBN"),
        ("batchnorm", "Write BN"),
        ("FrozenBatchNorm2d", "Write FrozenBN"),
        ("none", "Write ''"),
        ("GhostBN", "Write BN, and set MODEL.BNEXT.{place}.NORMALIZATION_BATCH_SIZE"),
        ("bn", "Write BN."),
        ("torch.nn.BatchNorm2d", "Write BN."),
        ("IN", "Choose one of them"),
    ],
)
def test_a_norm_that_is_unknown_says_what_to_write(place, norm, remedy):
    text = refusal(make_whole(architecture_of(place), {PLACES[place].norm: norm}))
    assert text.startswith(f"{PLACES[place].norm} must be one of ")
    assert f"got {norm!r}" in text
    assert remedy.format(place=place) in text


def test_a_norm_by_the_name_of_a_way_names_its_key_where_the_place_has_it():
    assert f"{RETINANET}.POPULATION" in refusal(make_cfg(changes={"MODEL.RETINANET.NORM": "CycleBN"}))
    assert "POPULATION" not in refusal(make_whole(changes={"MODEL.FPN.NORM": "CycleBN"}))
    assert f"{BOX}.SHUFFLE" in refusal(make_whole(changes={"MODEL.ROI_BOX_HEAD.NORM": "ShuffleBN"}))


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"NORMALIZATION_BATCH_SIZE": -1}, "normalization_batch_size"),
        ({"NORMALIZATION_BATCH_SIZE": 2, "WORKERS": "all"}, "normalization_batch_size"),
        ({"MOMENTUM": 0.0}, "momentum"),
        ({"EPS": 0.0}, "eps"),
        ({"POPULATION": "none"}, "inference"),
    ],
)
def test_answers_that_no_norm_can_give_name_the_place(changes, answer):
    changes = {f"MODEL.BNEXT.SEM_SEG_HEAD.{key}": value for key, value in changes.items()}
    assert refusal(make_whole(changes=changes)).startswith(f"MODEL.BNEXT.SEM_SEG_HEAD: {answer} must ")


def test_domains_without_a_name_name_the_key_that_says_them_and_the_place():
    message = refusal(make_whole(changes={"MODEL.BNEXT.SEM_SEG_HEAD.POPULATION": "per_domain"}))
    assert message.startswith("DATASETS.DOMAINS.TRAIN must ")
    assert "SEM_SEG_HEAD" in message


def test_rois_of_a_re_estimation_need_an_r_cnn_of_bnext():
    resolve_norms(make_whole(changes={f"{PRECISE}.ROIS": "top_scored"}))
    assert refusal(make_cfg("BNextRetinaNet", {f"{PRECISE}.ROIS": "top_scored"})).startswith(f"{PRECISE}.ROIS")


def test_a_re_estimation_needs_batches_which_is_told_before_the_training():
    assert refusal(make_whole(changes={**ENABLED, "TEST.PRECISE_BN.NUM_ITER": 0})).startswith(
        "TEST.PRECISE_BN.NUM_ITER"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {**ENABLED, f"{PRECISE}.TOLERANCE": 0.01, f"{PRECISE}.BEFORE_CHECKPOINTS": False},
        {**ENABLED, f"{PRECISE}.ESTIMATOR": "layer_by_layer"},
        {**SMART, f"{PRECISE}.TOLERANCE": 0.01, f"{PRECISE}.ESTIMATOR": "mean_of_batches"},
        {**SMART, f"{FREEZE}.ITER": 5, f"{FREEZE}.WHAT": "affine"},
        {"DATASETS.TEST": ("val",), f"{LOSS}.PERIOD": 5, f"{LOSS}.NUM_BATCHES": 2, f"{LOSS}.STATISTICS": "mini_batch"},
        {"SOLVER.BNEXT.MOMENTUM": [[0, 0.5], [9, 0.1]], f"{FREEZE}.ITER": 9, f"{FREEZE}.WARMUP_ITERS": 3},
        {f"{FPN}.TRAINING": "renorm", f"{FPN}.R_MAX": "2.0", f"{FPN}.D_MAX": "1.0", f"{FPN}.WORKERS": "4"},
        {**STATISTICS, **DOMAINS, f"{BOX}.POPULATION": "per_domain"},
        *(
            {f"{BOX}.SHUFFLE": shuffle, f"{BOX}.{key}": value}
            for shuffle in ("statistics", "features")
            for key, value in (("FROZEN", "affine"), ("TRAINING", "renorm"), ("INFERENCE", "mini_batch"))
        ),
    ],
)
def test_keys_that_go_together(changes):
    resolve_norms(make_whole(changes=changes))


@pytest.mark.parametrize("architecture", LEVEL_ARCHITECTURES)
def test_building_a_model_checks_first(architecture):
    cfg = make_cfg(architecture)
    cfg.MODEL.DEVICE, cfg.MODEL.BNEXT.RETINANET.STATISTICS = "cpu", "both"
    with pytest.raises(ConfigError, match=r"MODEL\.BNEXT\.RETINANET\.STATISTICS must be one of"):
        build_model(cfg)


def test_a_config_is_dumped_and_read_again(tmp_path):
    cfg = make_whole(changes={f"{FPN}.WORKERS": 2})
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = make_cfg()
    again.merge_from_file(str(tmp_path / "config.yaml"))
    assert again.MODEL.BNEXT == cfg.MODEL.BNEXT
    resolve_norms(again)


def test_another_type_and_an_unknown_key_are_refused_on_merging():
    with pytest.raises(ConfigError, match=r"MODEL\.BNEXT\.RETINANET\.STATISTIC\b"):
        load_config("", [f"{RETINANET}.STATISTIC", "shared"])
    with pytest.raises(ConfigError, match=r"SHUFFLE_GROUPS must be a whole number"):
        load_config("", [f"{BOX}.SHUFFLE_GROUPS", "2.5"])
    with pytest.raises(ConfigError, match=r"MODEL\.BNEXT\.FPN\.SHUFFLE"):
        load_config("", [f"{FPN}.SHUFFLE", "statistics"])


def test_a_need_names_keys_that_there_are():
    """One that is misspelled would never be checked."""
    cfg = make_cfg()
    for key in KEYS.values():
        for need in key.needs:
            for name in need.conditions:
                node = cfg
                for part in name.split("."):
                    node = node[part]

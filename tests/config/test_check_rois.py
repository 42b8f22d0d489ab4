"""Config keys of RoI heads: every value or combination that is refused, by key, value and remedy."""

import pytest

pytest.importorskip("detectron2")

from bnext.config import load_config
from bnext.config.check import check_config
from bnext.config.places import PLACES, get_place_norm
from bnext.errors import ConfigError
from tests.config.test_check import DOMAINS, make_of, make_whole, refusal

BOX, MASK = "MODEL.BNEXT.ROI_BOX_HEAD", "MODEL.BNEXT.ROI_MASK_HEAD"
HEADS = [name for name, place in PLACES.items() if place.sees_rois]


def make_shuffled(form="statistics", **changes):
    """A panoptic FPN with BN everywhere, SHUFFLE in its box head, and changes of that node."""
    return make_whole(**{f"{BOX}.{key}": value for key, value in {"SHUFFLE": form, **changes}.items()})


def test_heads_that_see_rois():
    assert HEADS == ["ROI_BOX_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD"]


@pytest.mark.parametrize("head", HEADS)
def test_each_head_has_its_own_shuffle(head):
    cfg = make_whole(**{f"MODEL.BNEXT.{head}.SHUFFLE": "statistics", f"MODEL.BNEXT.{head}.SHUFFLE_GROUPS": 4})
    check_config(cfg)
    for place in HEADS:
        assert get_place_norm(cfg, place).workers == ("all" if place == head else "one")


@pytest.mark.parametrize(
    ("form", "workers", "groups", "expected"),
    [
        ("statistics", None, 0, "all"),
        ("statistics", "one", 2, "one"),
        ("statistics", 1, 2, 1),
        ("statistics", "node", 0, "node"),
        ("statistics", 2, 8, 2),
        ("features", None, 0, "one"),
        ("features", "one", 0, "one"),
        ("features", 1, 0, 1),
    ],
)
def test_whose_rois_are_dealt_out(form, workers, groups, expected):
    cfg = make_shuffled(form, WORKERS=workers, SHUFFLE_GROUPS=groups)
    check_config(cfg)
    assert get_place_norm(cfg, "ROI_BOX_HEAD").workers == expected


@pytest.mark.parametrize("form", ["statistics", "features"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("FROZEN", "affine"), ("TRAINING", "renorm"), ("SINGLE_ELEMENT", "population"), ("INFERENCE", "mini_batch")],
)
def test_what_goes_with_a_shuffle(form, key, value):
    check_config(make_shuffled(form, **{key: value}))


def test_a_shuffle_that_is_none_of_the_three():
    assert refusal(make_shuffled("yes")) == (
        f"{BOX}.SHUFFLE must be one of 'none', 'statistics', 'features'; got 'yes' (config). Choose one of them."
    )


@pytest.mark.parametrize("groups", [1, -1, "two", 2.5, True])
def test_a_wrong_number_of_groups(groups):
    cfg = make_shuffled()
    cfg.MODEL.BNEXT.ROI_BOX_HEAD.SHUFFLE_GROUPS = groups  # yacs refuses other types only where it merges
    assert refusal(cfg) == (
        f"{BOX}.SHUFFLE_GROUPS must be 2 or more, or 0 for one per worker; got {groups!r} (config). Choose a number; "
        f"one group over all workers is MODEL.ROI_BOX_HEAD.NORM SyncBN without a shuffle."
    )


@pytest.mark.parametrize("value", ["two", 2.5, True])
def test_a_number_of_groups_on_the_command_line(value):
    with pytest.raises(ConfigError, match=r"Type mismatch.*MODEL\.BNEXT\.ROI_BOX_HEAD\.SHUFFLE_GROUPS"):
        load_config("", [f"{BOX}.SHUFFLE_GROUPS", str(value)])
    cfg = load_config("", ["MODEL.META_ARCHITECTURE", "BNextGeneralizedRCNN", "MODEL.ROI_BOX_HEAD.NORM", "BN"])
    assert cfg.MODEL.BNEXT.ROI_BOX_HEAD.SHUFFLE_GROUPS == 0


@pytest.mark.parametrize("form", ["none", "features"])
def test_groups_of_nothing(form):
    assert refusal(make_shuffled(form, SHUFFLE_GROUPS=4)) == (
        f"{BOX}.SHUFFLE_GROUPS must keep its default unless SHUFFLE is 'statistics'; got 4 (SHUFFLE is {form!r}). Set "
        f"SHUFFLE to 'statistics', or remove the key: features move to as many workers as there are."
    )


@pytest.mark.parametrize("workers", ["one", 1])
def test_one_group_per_worker_of_one_worker(workers):
    text = refusal(make_shuffled(WORKERS=workers))
    assert text.startswith(f"{BOX}.SHUFFLE_GROUPS must be 2 or more where each worker deals its own RoIs; got 0 (")
    assert text.endswith("Set it, or remove WORKERS: the RoIs of all workers are dealt out.")


@pytest.mark.parametrize("place", HEADS)
@pytest.mark.parametrize("norm", ["", "GN", "LN", "FrozenBN"])
def test_a_head_without_batch_norm(place, norm):
    """Of features it is seen when the head is built: see tests/heads/test_roi_shuffle.py."""
    cfg = make_whole(**{PLACES[place].norm: norm, f"MODEL.BNEXT.{place}.SHUFFLE": "statistics"})
    assert refusal(cfg) == (
        f"MODEL.BNEXT.{place}.SHUFFLE must keep its default where there is no batch norm of bnext; got 'statistics' "
        f"({PLACES[place].norm} is {norm!r}). Set {PLACES[place].norm} to one of BN, SyncBN, or remove the key."
    )
    check_config(make_whole(**{PLACES[place].norm: norm, f"MODEL.BNEXT.{place}.SHUFFLE": "features"}))


@pytest.mark.parametrize("form", ["statistics", "features"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("NORMALIZATION_BATCH_SIZE", 4), ("TRAINING", "population"), ("FROZEN", "statistics"), ("FROZEN", "both")],
)
def test_what_makes_a_shuffle_superfluous(form, key, value):
    assert refusal(make_shuffled(form, **{key: value})) == (
        f"{BOX}.{key} must keep its default where RoIs are dealt out; got {value!r} (SHUFFLE is {form!r}). "
        f"Remove one of the two."
    )


@pytest.mark.parametrize("workers", ["all", "node", 2])
def test_features_of_norms_that_share_them_anyway(workers):
    assert refusal(make_shuffled("features", WORKERS=workers)).startswith(
        f"{BOX}.WORKERS must keep its default where RoIs are dealt out; got {workers!r} (SHUFFLE is 'features')"
    )
    cfg = make_whole(**{"MODEL.ROI_BOX_HEAD.NORM": "SyncBN", f"{BOX}.SHUFFLE": "features"})
    text = refusal(cfg)
    assert text.startswith("MODEL.ROI_BOX_HEAD.NORM must not be SyncBN where features are shuffled; got 'SyncBN'")
    assert text.endswith("Use BN.")


@pytest.mark.parametrize("key", ["STATISTICS", "POPULATION", "AFFINE"])
def test_features_that_leave_their_domain_behind(key):
    cfg = make_whole(**DOMAINS, **{f"{BOX}.SHUFFLE": "features", f"{BOX}.{key}": "per_domain"})
    assert refusal(cfg) == (
        f"{BOX}.SHUFFLE must be 'none' or 'statistics' where something is per_domain; got 'features' (config): RoIs "
        f"move to workers that do not know their domain. Use 'statistics'."
    )
    check_config(make_whole(**DOMAINS, **{f"{BOX}.SHUFFLE": "statistics", f"{BOX}.{key}": "per_domain"}))


@pytest.mark.parametrize("form", ["statistics", "features"])
def test_a_mask_head_that_is_switched_off(form):
    cfg = make_of("BNextGeneralizedRCNN", {PLACES["ROI_MASK_HEAD"].norm: "BN", f"{MASK}.SHUFFLE": form})
    assert refusal(cfg) == (
        f"{MASK}.SHUFFLE must keep its default where MODEL.MASK_ON is False; got {form!r} (config). "
        f"Set MODEL.MASK_ON to True, or remove the key."
    )


@pytest.mark.parametrize("architecture", ["BNextRetinaNet", "BNextProposalNetwork", "GeneralizedRCNN"])
@pytest.mark.parametrize(("key", "value"), [("SHUFFLE", "features"), ("SHUFFLE", "statistics"), ("SHUFFLE_GROUPS", 2)])
def test_a_model_without_roi_heads_of_bnext(architecture, key, value):
    assert refusal(make_of(architecture, {f"{BOX}.{key}": value})) == (
        f"{BOX}.{key} must keep its default in a model without this place of bnext; got {value!r} "
        f"(MODEL.META_ARCHITECTURE is {architecture!r}). Set MODEL.META_ARCHITECTURE to one of BNextGeneralizedRCNN, "
        f"BNextPanopticFPN, or remove the key."
    )


@pytest.mark.parametrize("place", sorted(set(PLACES) - set(HEADS)))
def test_other_places_have_no_shuffle(place):
    with pytest.raises((AssertionError, KeyError), match=rf"MODEL\.BNEXT\.{place}\.SHUFFLE"):
        make_of("BNextPanopticFPN", {f"MODEL.BNEXT.{place}.SHUFFLE": "statistics"})


def test_rois_of_a_re_estimation():
    key = "TEST.BNEXT.PRECISE_BN.ROIS"
    for value in ("sampled", "top_scored"):
        check_config(make_whole(**{key: value}))
    text = refusal(make_whole(**{key: "all"}))
    assert text == f"{key} must be one of 'sampled', 'top_scored'; got 'all' (config). Choose one of them."
    assert refusal(make_of("BNextRetinaNet", {key: "top_scored"})) == (
        f"{key} must keep its default in a model without RoI heads of bnext; got 'top_scored' (MODEL.META_ARCHITECTURE "
        f"is 'BNextRetinaNet'). Remove the key."
    )

"""The norms of a config as a recipe: what keys say reaches the norm of their place, from YAML and from plain values."""

import dataclasses

import pytest

pytest.importorskip("detectron2")

from bnext.config import NormRecipe, resolve_norms
from bnext.config.places import LEVEL_ARCHITECTURES, PLACES
from bnext.config.recipe import read_place
from bnext.errors import ConfigError
from bnext.layers import TABLE5_ROWS, NormSpec
from tests.config.configs import DOMAINS, make_cfg, make_whole

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
BOX = "MODEL.BNEXT.ROI_BOX_HEAD"


def places_of(architecture):
    return [name for name, place in PLACES.items() if architecture in place.architectures]


@pytest.mark.parametrize(("norm", "workers"), [("BN", "one"), ("SyncBN", "all")])
@pytest.mark.parametrize("row", TABLE5_ROWS)
@pytest.mark.parametrize("architecture", LEVEL_ARCHITECTURES)
def test_six_rows_by_keys_alone(architecture, row, norm, workers):
    answers = dict(zip(("STATISTICS", "POPULATION", "AFFINE"), TABLE5_ROWS[row], strict=True))
    changes = {f"MODEL.BNEXT.RETINANET.{key}": value for key, value in answers.items()}
    place = resolve_norms(make_cfg(architecture, {"MODEL.RETINANET.NORM": norm, **changes})).places["RETINANET"]
    assert place.norm == NormSpec.from_table5_row(row, workers=workers)
    assert place.levels == ("p3", "p4", "p5", "p6", "p7")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["BN", "SyncBN"])
def test_default_nodes_are_the_norm_of_the_name(place, name):
    cfg = make_whole("BNextRetinaNet" if place == "RETINANET" else "BNextPanopticFPN", {PLACES[place].norm: name})
    row = 4 if PLACES[place].levels else 1
    norm = resolve_norms(cfg).places[place]
    assert norm.norm == NormSpec.from_table5_row(row, workers="all" if name == "SyncBN" else "one")
    assert norm.changed == ()


@pytest.mark.parametrize("norm", ["GN", "", "FrozenBN"])
def test_other_norms_are_detectron2s(norm):
    assert resolve_norms(make_cfg(changes={"MODEL.RETINANET.NORM": norm})).places["RETINANET"].norm == norm


@pytest.mark.parametrize("architecture", ["BNextPanopticFPN", "BNextFCOS"])
@pytest.mark.parametrize("key", VALUES)
def test_every_key_reaches_the_spec_of_its_place_alone(architecture, key):
    default = resolve_norms(make_whole(architecture)).places
    assert set(default) == set(places_of(architecture))
    for place in default:
        norms = resolve_norms(make_whole(architecture, {f"MODEL.BNEXT.{place}.{key}": VALUES[key]})).places
        assert getattr(norms[place].norm, key.lower()) == norms[place].get_value(key) == VALUES[key]
        assert norms[place].changed == ((key,) if VALUES[key] != default[place].get_value(key) else ())
        assert all(norms[other] == default[other] for other in set(default) - {place})


def test_a_head_that_is_switched_off_is_no_place():
    norms = resolve_norms(make_whole(changes={"MODEL.KEYPOINT_ON": False, "MODEL.BNEXT.ROI_KEYPOINT_HEAD.NORM": ""}))
    assert set(places_of("BNextPanopticFPN")) - set(norms.places) == {"ROI_KEYPOINT_HEAD"}
    assert not resolve_norms(make_cfg("GeneralizedRCNN")).places


@pytest.mark.parametrize("place", ["RESNETS", "FPN", "ROI_BOX_HEAD", "SEM_SEG_HEAD"])
def test_domains_are_named_once_for_every_place(place):
    changes = {**DOMAINS, f"MODEL.BNEXT.{place}.POPULATION": "per_domain", "MODEL.BNEXT.DOMAINS.FALLBACK": "night"}
    changes["MODEL.BNEXT.DOMAINS.UNSEEN"] = "fallback"
    norms = resolve_norms(make_whole(changes=changes))
    assert (norms.domains, norms.fallback_domain) == (("day", "night"), "night")
    spec = norms.places[place].norm
    assert (spec.population, spec.domains, spec.fallback_domain) == ("per_domain", ("day", "night"), "night")
    assert norms.places["ROI_MASK_HEAD"].norm == NormSpec()


@pytest.mark.parametrize(
    ("form", "workers", "groups", "expected"),
    [
        ("statistics", None, 0, "all"),
        ("statistics", "one", 2, "one"),
        ("statistics", "node", 0, "node"),
        ("statistics", 2, 8, 2),
        ("features", None, 0, "one"),
        ("features", 1, 0, 1),
    ],
)
def test_whose_rois_are_dealt_out(form, workers, groups, expected):
    changes = {f"{BOX}.SHUFFLE": form, f"{BOX}.WORKERS": workers, f"{BOX}.SHUFFLE_GROUPS": groups}
    norms = resolve_norms(make_whole(changes=changes)).places
    box = norms["ROI_BOX_HEAD"]
    assert (box.shuffle, box.shuffle_groups, box.spec.workers) == (form, groups, expected)
    assert (norms["ROI_MASK_HEAD"].shuffle, norms["ROI_MASK_HEAD"].spec.workers) == ("none", "one")


def test_a_norm_that_is_there_says_who_shares_its_mini_batches_unless_a_key_does():
    plain = read_place(make_cfg(), "RESNETS")
    assert [plain.make_spec(name).workers for name in ("BN", "SyncBN")] == ["one", "all"]
    own = {"MODEL.BACKBONE.NAME": "build_a_backbone_with_norms_of_its_own"}
    changed = read_place(make_cfg(changes={**own, "MODEL.BNEXT.RESNETS.WORKERS": 2}), "RESNETS")
    assert {changed.make_spec(name).workers for name in ("BN", "SyncBN")} == {2}
    ghost = read_place(make_cfg(changes={**own, "MODEL.BNEXT.RESNETS.NORMALIZATION_BATCH_SIZE": 2}), "RESNETS")
    with pytest.raises(ConfigError, match=r"MODEL\.BNEXT\.RESNETS: normalization_batch_size"):
        ghost.make_spec("SyncBN")


def test_the_rule_for_unseen_domains_reaches_the_norms():
    node = "MODEL.BNEXT.DOMAINS"
    changes = {**DOMAINS, "MODEL.BNEXT.FPN.AFFINE": "per_domain", f"{node}.UNSEEN": "blend"}
    for value, expected in ((None, "auto"), (4, 4), (0.5, 0.5), (float("inf"), float("inf"))):
        norms = resolve_norms(make_whole(changes={**changes, f"{node}.SOURCE_IMAGES": value}))
        spec = norms.places["FPN"].norm
        assert (norms.unseen, spec.unseen, spec.source_images) == ("blend", "blend", expected)
    for value in (-1, True, float("nan"), "many"):
        with pytest.raises(ConfigError, match=f"{node}.SOURCE_IMAGES must"):
            resolve_norms(make_whole(changes={**changes, f"{node}.SOURCE_IMAGES": value}))
    with pytest.raises(ConfigError, match=f"{node}.UNSEEN must be another rule"):
        resolve_norms(make_whole(changes={**changes, f"{node}.UNSEEN": "nearest"}))


def test_plain_values_give_the_same_recipe_as_a_config():
    nodes = {
        "FPN": {"NORM": "SyncBN", "MOMENTUM": 0.2},
        "ROI_BOX_HEAD": {"NORM": "BN", "SHUFFLE": "statistics", "SHUFFLE_GROUPS": 4, "POPULATION": "per_domain"},
        "RPN": {"NORM": "BN", "LEVELS": ["p2", "p3"], "STATISTICS": "shared"},
        "DOMAINS": {"NAMES": ["day", "night"], "UNSEEN": "fallback", "FALLBACK": "day"},
    }
    changes = {f"MODEL.BNEXT.{place}.{key}": value for place, node in nodes.items() for key, value in node.items()}
    for place in ("FPN", "ROI_BOX_HEAD"):
        changes[PLACES[place].norm] = changes.pop(f"MODEL.BNEXT.{place}.NORM")
    del changes["MODEL.BNEXT.RPN.LEVELS"]
    cfg = make_cfg("BNextPanopticFPN", changes)

    found, expected = NormRecipe.of(nodes), resolve_norms(cfg)
    assert found.places == {place: expected.places[place] for place in found.places}
    assert (found.domains, found.fallback_domain) == (expected.domains, expected.fallback_domain)


@pytest.mark.parametrize(
    ("nodes", "name"),
    [
        ({"NECK": {}}, "NECK"),
        ({"FPN": {"MOMENTA": 0.2}}, "MOMENTA"),
        ({"FPN": {"NORM": "BN", "LEVELS": ["p3"]}}, "LEVELS"),
        ({"DOMAINS": {"NAME": ["day"]}}, "NAME"),
        ({"FPN": {"NORM": "BN"}, "DOMAINS": {"NAMES": ["day"]}}, r"MODEL\.BNEXT\.DOMAINS\.NAMES"),
        ({"FPN": {"NORM": "BatchNorm"}}, r"MODEL\.FPN\.NORM"),
        ({"FPN": {"NORM": "BN", "TRAINING": "batch"}}, r"MODEL\.BNEXT\.FPN\.TRAINING"),
        ({"FPN": {"NORM": "BN", "R_MAX": 2.0}}, r"MODEL\.BNEXT\.FPN\.R_MAX"),
        ({"FPN": {"NORM": "BN", "POPULATION": "per_domain"}}, r"DATASETS\.DOMAINS\.TRAIN"),
        ({"RPN": {"NORM": "BN", "LEVELS": ["p2"], "AFFINE": "per_level"}}, r"MODEL\.BNEXT\.RPN\.AFFINE"),
    ],
)
def test_plain_values_are_checked_by_the_same_table(nodes, name):
    with pytest.raises(ConfigError, match=name):
        NormRecipe.of(nodes)


def test_a_recipe_does_not_change():
    norms = NormRecipe.of({"FPN": {"NORM": "BN"}})
    with pytest.raises(TypeError):
        norms.places["RPN"] = norms.places["FPN"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        norms.places["FPN"].name = "GN"


GROUPS = "MODEL.BNEXT.RETINANET.LEVEL_GROUPS"
IN_GROUPS = [["p3", "p4"], ["p5", "p6", "p7"]]


def test_groups_of_levels_reach_the_spec_and_come_back_from_a_file(tmp_path):
    changes = {"MODEL.RETINANET.NORM": "SyncBN", GROUPS: IN_GROUPS}
    cfg, other = make_cfg(changes=changes), make_cfg()
    (tmp_path / "config.yaml").write_text(cfg.dump())
    other.merge_from_file(str(tmp_path / "config.yaml"))
    assert other.MODEL.BNEXT == cfg.MODEL.BNEXT

    place = resolve_norms(other).places["RETINANET"]
    assert place.norm == NormSpec.from_table5_row(4, workers="all").replace(level_groups=IN_GROUPS)
    assert place.levels == ("p3", "p4", "p5", "p6", "p7")
    assert "LEVEL_GROUPS" in place.changed


@pytest.mark.parametrize(
    "changes",
    [
        {GROUPS: IN_GROUPS, "MODEL.BNEXT.RETINANET.STATISTICS": "shared", "MODEL.BNEXT.RETINANET.POPULATION": "shared"},
        {GROUPS: ["p3", "p4"]},
        {GROUPS: [["p3"], ["p3", "p4"]]},
    ],
)
def test_groups_without_effect_or_of_no_levels_are_refused(changes):
    with pytest.raises(ConfigError, match=r"RETINANET.*level_groups|LEVEL_GROUPS"):
        resolve_norms(make_cfg(changes={"MODEL.RETINANET.NORM": "BN", **changes}))

"""Keys of remedies: as a LazyConfig takes them."""

import pytest

from bnext.config import load_config
from bnext.config.recipe import resolve_norms
from bnext.diagnostics.facts import Facts
from bnext.diagnostics.findings import Evidence, Remedy
from bnext.diagnostics.lazy_keys import suit_config
from tests import tiny


def suit(architecture, **keys):
    named = {key.replace("__", "."): value for key, value in keys.items()}
    facts = Facts((), config={"MODEL.META_ARCHITECTURE": architecture})
    return suit_config(facts, Evidence("error", (), "It is so.", Remedy("Do.", keys=named))).remedy


def test_keys_of_a_lazy_config_are_those_that_it_takes():
    keys = {"MODEL__BNEXT__RETINANET__STATISTICS": "shared", "MODEL__RETINANET__NORM": "BN", "SOLVER__IMS_PER_BATCH": 8}
    remedy = suit("BNextLazyModel", **keys)

    assert remedy == Remedy(
        "Do.", keys={"norms.RETINANET.STATISTICS": "shared", "norms.RETINANET.NORM": "BN", "SOLVER.IMS_PER_BATCH": 8}
    )
    pairs = [str(word) for pair in remedy.keys.items() for word in pair]
    cfg = load_config(str(tiny.LAZY), pairs)
    norm = resolve_norms(cfg).places["RETINANET"].norm
    assert norm.statistics == "shared"
    assert cfg.SOLVER.IMS_PER_BATCH == 8


def test_a_key_that_it_refuses_becomes_words():
    remedy = suit("BNextLazyModel", MODEL__RESNETS__NORM="GN")

    assert remedy == Remedy("Do. The norm of a part is said in its call in `model`.")


@pytest.mark.parametrize("architecture", ["BNextRetinaNet", None])
def test_others_are_as_they_are(architecture):
    assert suit(architecture, MODEL__RESNETS__NORM="GN").keys == {"MODEL.RESNETS.NORM": "GN"}

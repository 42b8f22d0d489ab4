"""The tables of configs/README.md: every key is listed, those of the ways are taken, and the tests named exist."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from detectron2.config import get_cfg

from bnext import add_bnext_config
from bnext.config import resolve_norms
from bnext.config.keys import KEYS, PLACE_KEYS, format_keys
from bnext.config.places import PLACES

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "configs" / "README.md").read_text()
HEADER = "| way | keys | proved by | compared with |"


def read_table(header):
    lines = TEXT.split(header)[1].splitlines()[2:]
    rows = [line.strip("|").split("|") for line in lines[: next(i for i, line in enumerate(lines) if not line)]]
    return [[cell.strip() for cell in row] for row in rows]


WAYS = {row[0]: row for row in read_table(HEADER)}


@pytest.mark.parametrize("way", WAYS)
def test_the_test_that_is_named_exists(way):
    path, _, name = WAYS[way][2].strip("`").partition("::")
    names = [node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)]
    assert not name or name in names


@pytest.mark.parametrize("way", [way for way, row in WAYS.items() if re.match(r"`[A-Z]", row[1])])
def test_keys_are_taken(way):
    cfg = get_cfg()
    add_bnext_config(cfg)
    keys = WAYS[way][1].split("`")[1].split()
    cfg.MODEL.META_ARCHITECTURE = "BNextRetinaNet" if "RETINANET" in keys[0] else "BNextGeneralizedRCNN"
    cfg.SOLVER.MAX_ITER = 90000
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    before = cfg.dump()
    cfg.merge_from_list(keys)
    resolve_norms(cfg)
    assert cfg.dump() != before


@pytest.mark.parametrize("way", [way for way, row in WAYS.items() if "`with" in row[1]])
def test_scopes_exist(way):
    module, _, name = re.search(r"with ([\w.]+)", WAYS[way][1])[1].rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))


def test_every_key_is_listed_as_the_table_of_keys_has_it():
    """The rows of a place are those of a RoI head, which has all keys, and of NORM, which has a table of its own."""
    node = "MODEL.BNEXT.ROI_BOX_HEAD."
    others = [
        key for key in KEYS.values() if key.name not in {key.name for keys in PLACE_KEYS.values() for key in keys}
    ]
    rows = [*format_keys(PLACE_KEYS["ROI_BOX_HEAD"], prefix=node), *format_keys(others)]
    missing = [row for row in rows if row not in TEXT.splitlines()]
    assert not missing, "add to configs/README.md:\n" + "\n".join(missing)


def test_every_place_is_listed():
    rows = {node.strip("`"): norm.strip("`") for _, norm, node, _ in read_table("| place | norm | node | levels |")}
    assert rows == {f"MODEL.BNEXT.{name}": place.norm for name, place in PLACES.items()}

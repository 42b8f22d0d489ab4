"""The table of configs/README.md: its keys are taken by check_config, and the tests that it names exist."""

import ast
import importlib
import re
from pathlib import Path

import pytest
from detectron2.config import get_cfg

from bnext import add_bnext_config
from bnext.config.check import check_config

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
    check_config(cfg)
    assert cfg.dump() != before


@pytest.mark.parametrize("way", [way for way, row in WAYS.items() if "`with" in row[1]])
def test_scopes_exist(way):
    module, _, name = re.search(r"with ([\w.]+)", WAYS[way][1])[1].rpartition(".")
    assert callable(getattr(importlib.import_module(module), name))


def test_every_key_of_a_node_is_explained_with_its_default():
    cfg = get_cfg()
    add_bnext_config(cfg)
    rows = read_table("| key | values (the default first) | question |")
    found = {}
    for keys, values, _ in rows:
        defaults = [value.split("`")[1] for value in re.split("; " if "`, `" in keys else "$", values) if "`" in value]
        names = re.findall(r"`(\w+)`", keys)
        if len(names) > len(defaults):
            defaults = re.findall(r"`([^`]*)`", values)
        found |= dict(zip(names, defaults, strict=False))
    assert found == {key: str(value) for key, value in cfg.MODEL.BNEXT.ROI_BOX_HEAD.items()}


def test_every_place_is_listed():
    cfg = get_cfg()
    add_bnext_config(cfg)
    places = {node.strip("`").rpartition(".")[2] for _, _, node, _ in read_table("| place | norm | node | levels |")}
    assert places == set(cfg.MODEL.BNEXT) - {"DOMAINS"}

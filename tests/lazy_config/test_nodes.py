"""The LazyConfig behind a CfgNode, in the process that has read it and in a worker."""

import functools
import pickle

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog
from omegaconf import OmegaConf

from bnext.config import load_config
from bnext.data.listed_sets import register_listed_sets
from bnext.errors import ConfigError, LaunchError
from bnext.lazy_config import copy_node, is_lazy, nodes
from bnext.lazy_config.nodes import describe_values

TEXT = """
from detectron2.config import LazyCall as L
from torch import nn
model = L(nn.Linear)(in_features=1, out_features=2)
"""


def load(folder, *opts):
    path = folder / "config.py"
    path.write_text(TEXT)
    return load_config(str(path), opts), path


def start_worker(monkeypatch, cfg):
    """A fresh process has nothing but the config."""
    monkeypatch.setattr(nodes, "_configs", {})
    return pickle.loads(pickle.dumps(cfg))


def test_a_worker_reads_the_same_file_with_its_overrides(tmp_path, monkeypatch):
    cfg, _ = load(tmp_path, "model.out_features=5", "model.bias=False")
    cfg = start_worker(monkeypatch, cfg)
    assert is_lazy(cfg)
    assert copy_node(cfg, "model").out_features == 5
    assert copy_node(cfg, "optimizer") is None
    copy_node(cfg, "model").out_features = 7
    assert copy_node(cfg, "model").out_features == 5, "a copy"
    with pytest.raises(ConfigError, match="optimizer in a LazyConfig must be there for a training"):
        copy_node(cfg, "optimizer", "for a training")


def test_a_file_that_has_changed_since_is_refused(tmp_path, monkeypatch):
    cfg, path = load(tmp_path)
    path.write_text(TEXT.replace("out_features=2", "out_features=3"))
    assert copy_node(cfg, "model").out_features == 2, "this process has read it"
    load_config(str(path))
    assert copy_node(cfg, "model").out_features == 2, "also when it has read it anew"
    with pytest.raises(LaunchError, match=r"another model\.out_features"):
        copy_node(start_worker(monkeypatch, cfg), "model")


def test_values_are_described_in_a_readable_form_without_addresses():
    class Own:
        pass

    partial = functools.partial(torch.nn.LayerNorm, eps=1e-6)
    config = {"a": L(torch.nn.Linear)(bias=Own(), device=[partial, "x"]), "b": [{"c": 1}], "d": "${a}", "e": {}}
    lines = describe_values(OmegaConf.create(config, flags={"allow_objects": True}))
    assert [line for line in lines if "Own" not in line] == [
        "a.device = [partial(torch.nn.modules.normalization.LayerNorm, eps=1e-06), 'x']",
        "a._target_ = torch.nn.modules.linear.Linear",
        "b[0].c = 1",
        "d = '${a}'",
        "e = {}",
    ]
    assert not any("0x" in line for line in lines)


def test_a_set_that_the_file_registers_is_there_in_a_worker(tmp_path, monkeypatch):
    path = tmp_path / "config.py"
    path.write_text(f"from detectron2.data import DatasetCatalog\nDatasetCatalog.register('lazy_set', list)\n{TEXT}")
    cfg = load_config(str(path))
    try:
        register_listed_sets(cfg)
        assert "lazy_set" in DatasetCatalog
        DatasetCatalog.remove("lazy_set")
        register_listed_sets(start_worker(monkeypatch, cfg))
        assert "lazy_set" in DatasetCatalog
    finally:
        DatasetCatalog.remove("lazy_set")

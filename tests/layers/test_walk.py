"""The walk over a model to its batch norms."""

from torch import nn

from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec
from bnext.layers.walk import find_bnext_norms, find_foreign_norms, find_norms

SEPARATE = NormSpec(affine="per_domain", population="per_domain", domains=("day", "night"))


def make_model():
    norms = {"ours": BatchNorm2d(4, SEPARATE), "levels": LevelBatchNorm2d(4, ("p3", "p4"), NormSpec.from_table5_row(6))}
    others = {"torch": nn.BatchNorm2d(4), "list": nn.ModuleList([nn.SyncBatchNorm(4), nn.GroupNorm(1, 4)])}
    return nn.ModuleDict({**norms, **others, "again": norms["ours"]})


def test_every_batch_norm_comes_once_and_none_of_its_parts():
    model = make_model()
    assert list(find_norms(model)) == ["ours", "levels", "torch", "list.0"]
    assert list(find_bnext_norms(model)) == ["ours", "levels"]
    assert list(find_foreign_norms(model)) == ["torch", "list.0"]
    assert find_norms(model["torch"]) == {"": model["torch"]}


def test_a_selection_sees_path_and_norm():
    model = make_model()
    assert find_norms(model, lambda path, norm: "list" in path or norm is model["ours"]).keys() == {"ours", "list.0"}

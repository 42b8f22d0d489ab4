"""key=value: of keys that there are, and of arguments that calls take."""

import pytest
import torch
from detectron2.config import LazyCall as L
from omegaconf import OmegaConf

from bnext.errors import ConfigError
from bnext.lazy_config.overrides import apply_overrides


def make_config():
    layers = [{"width": 1}, {"width": 2}]
    config = {"train": {"max_iter": 3, "amp": {"enabled": False}, "names": "one"}, "layers": layers}
    return OmegaConf.create({**config, "model": L(torch.nn.Linear)(in_features=2)}, flags={"allow_objects": True})


@pytest.mark.parametrize(
    ("word", "name", "value"),
    [
        ("train.max_iter=1000", "train.max_iter", 1000),
        ("train.amp.enabled=true", "train.amp.enabled", True),
        ("train.names=[a,b]", "train.names", ["a", "b"]),
        ("train.names=/tmp/a-b_1.pth", "train.names", "/tmp/a-b_1.pth"),
        ("train.names='a=b, c'", "train.names", "a=b, c"),
        ("train.names=null", "train.names", None),
        ("train.names=(1, 2)", "train.names", [1, 2]),
        ("train.max_iter=1e-3", "train.max_iter", 0.001),
        ("layers.1.width=7", "layers[1].width", 7),
        ("model.bias=False", "model.bias", False),  # an argument of the call
        ("+train.own=1", "train.own", 1),
        ("+keys.SEED=1", "keys.SEED", 1),  # below a name that is new as well
        ("norms.FPN.NORM=BN", "norms.FPN.NORM", "BN"),  # known
    ],
)
def test_an_override_is_taken(word, name, value):
    config = make_config()
    apply_overrides(config, [word], "file", known=["norms.*"])
    assert OmegaConf.select(config, name) == value


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("train.max_iters=1", r"train.max_iters.*Did you mean train\.max_iter"),
        ("max_iter=1", r"Did you mean train\.max_iter"),
        ("model.in_feature=1", r"Did you mean model\.in_features"),
        ("train.amp.enabled.deep=1", "train.amp.enabled.deep"),
        ("layers.2.width=7", r"layers\.2\.width"),
        ("train.own=1", r"\+train\.own"),
        ("+trian.max_iter=1", r"Did you mean train\.max_iter"),
        ("+model.part.own=1", "model.part.own"),
        ("+train.max_iter.own=1", "train.max_iter.own"),
        ("train.names=a,b", "sweep"),
        ("~train.max_iter", "deletion"),
        ("train.max_iter={a:", "key=value"),
    ],
)
def test_an_override_of_what_is_not_there_is_refused_and_changes_nothing(word, words):
    config = make_config()
    with pytest.raises(ConfigError, match=words):
        apply_overrides(config, [word], "file")
    assert config == make_config()


def test_a_key_of_the_file_that_is_known_besides_is_suggested_once():
    with pytest.raises(ConfigError) as caught:
        apply_overrides(make_config(), ["train.max_iters=1"], "file", known=["train.max_iter"])
    assert str(caught.value).count("train.max_iter?") == 1
    assert " or " not in str(caught.value)

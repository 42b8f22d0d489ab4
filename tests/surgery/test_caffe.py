"""State of norms in Caffe's conventions, read into torch's."""

import pytest
import torch

from bnext.errors import CheckpointError
from bnext.surgery.caffe import read_caffe_state
from tests.cases import NUM_CHANNELS
from tests.surgery.norm_forms import make


def make_caffe_state(inverse, scale):
    norm = make("torch")
    state = norm.state_dict()
    var = (state["running_var"] + 1e-5).rsqrt() if inverse else state["running_var"]
    found = {"running_mean": state["running_mean"] * scale, "running_var": var * scale, "weight": state["weight"]}
    return norm, {**found, "bias": state["bias"], "scale_factor": torch.tensor([scale], dtype=torch.float64)}


@pytest.mark.parametrize("inverse", [True, False])
@pytest.mark.parametrize("scale", [1.0, 999.98])
@pytest.mark.parametrize("prefix", ["", "stem.norm."])
def test_state_of_caffe_is_read(inverse, scale, prefix):
    norm, found = make_caffe_state(inverse, scale)
    state = read_caffe_state({prefix + key: value for key, value in found.items()}, holds_inverse_std=inverse, eps=1e-5)
    assert state.keys() == {prefix + key for key in ("running_mean", "running_var", "weight", "bias")}
    for key, value in state.items():
        torch.testing.assert_close(value, norm.state_dict()[key.removeprefix(prefix)], rtol=1e-12, atol=1e-12)


def test_a_variance_of_zero_survives_its_inverse_root():
    inverse = torch.zeros(NUM_CHANNELS).add(1e-5).rsqrt()
    state = read_caffe_state({"running_var": inverse}, holds_inverse_std=True, eps=1e-5)
    assert bool((state["running_var"] >= 0).all())
    torch.testing.assert_close(state["running_var"], torch.zeros(NUM_CHANNELS), rtol=0, atol=1e-9)


@pytest.mark.parametrize("value", [1e3, 0.0, -1.0, float("nan")])
def test_what_is_no_inverse_root_is_refused(value):
    found = {"norm.running_var": torch.tensor([1.0, value])}
    with pytest.raises(CheckpointError, match=r"norm\.running_var.*channel 1"):
        read_caffe_state(found, holds_inverse_std=True, eps=1e-5)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_a_norm_of_caffe_that_was_never_trained_is_refused(factor):
    found = {"norm.running_mean": torch.zeros(2), "norm.scale_factor": torch.tensor([factor])}
    with pytest.raises(CheckpointError, match=r"norm\.scale_factor"):
        read_caffe_state(found, holds_inverse_std=False, eps=1e-5)

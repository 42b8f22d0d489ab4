"""Values, keys and kinds of a checkpoint against the model that is to load it: refused before it is changed."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from bnext.checkpoints import Checkpointer
from bnext.errors import CheckpointError
from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec
from bnext.surgery.fold import fold_norms
from tests.cases import randomize


class Model(nn.Sequential):
    """A convolution, a norm, and a mask in a buffer, which is infinite."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 4, 1), BatchNorm2d(4))
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
        self.register_buffer("scale", torch.ones(2))


def load(tmp_path, changes, model=None, **options):
    """Load the state of a model with some entries changed; the model after it."""
    model = randomize(Model()) if model is None else model
    torch.save({"model": {**model.state_dict(), **changes}}, tmp_path / "file.pth")
    target = copy.deepcopy(model)
    for value in target.state_dict().values():
        value.zero_() if value.dim() and not torch.isinf(value).any() else None
    before = copy.deepcopy(target.state_dict())
    try:
        Checkpointer(target).load(str(tmp_path / "file.pth"), **options)
    except CheckpointError:
        assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())
        raise
    return target


def spoil(value, index=0):
    spoilt = torch.full((4, 3, 1, 1), 0.5)
    spoilt.view(-1)[index] = value
    return spoilt


WRONG = {
    "NaN": ("0.weight", spoil(torch.nan, 7)),
    "Inf": ("0.weight", spoil(-torch.inf)),
    "too large for the model": ("0.weight", spoil(1e38).double() * 1e100),
    "integers": ("0.weight", torch.ones(4, 3, 1, 1, dtype=torch.int64)),
    "bools": ("1.weight", torch.ones(4, dtype=torch.bool)),
    "complex": ("1.bias", torch.ones(4, dtype=torch.complex64)),
    "bytes": ("0.bias", torch.ones(4, dtype=torch.uint8)),
    "no values": ("0.bias", torch.ones(4, device="meta")),
    "statistics of complex numbers": ("1.running_var", torch.ones(4, dtype=torch.complex64)),
    "statistics of integers": ("1.running_var", torch.ones(4, dtype=torch.int32)),
    "sparse": ("0.bias", torch.ones(4).to_sparse()),
    "statistics": ("1.running_mean", torch.tensor([0, torch.nan, 0, 0])),
    "a buffer": ("scale", torch.tensor([1.0, torch.nan])),
    "a counter": ("1.num_batches_tracked", torch.tensor(-1)),
    "a counter of NaN": ("1.num_batches_tracked", torch.tensor(torch.nan)),
    "a counter of bools": ("1.num_batches_tracked", torch.tensor(True)),
}


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_values_that_cannot_be_are_refused_by_name(tmp_path, name, complete):
    key, value = WRONG[name]
    with pytest.raises(CheckpointError, match=rf"^{key} must.*file\.pth"):
        load(tmp_path, {key: value}, complete=complete)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_every_precision_loads(tmp_path, kind):
    model = randomize(Model())
    changes = {key: value.to(kind) for key, value in model.state_dict().items() if value.is_floating_point()}
    loaded = load(tmp_path, changes, model, complete=True)
    assert torch.allclose(loaded[0].weight, model[0].weight, atol=5e-3)


def test_large_sums_and_masks_are_no_fault(tmp_path):
    large = torch.full((4, 3, 1, 1), 3e38)
    assert torch.equal(load(tmp_path, {"0.weight": large, "1.num_batches_tracked": torch.tensor(4.0)})[0].weight, large)


@pytest.mark.parametrize("array", [np.array(["a"] * 4), np.array([None] * 4), np.ones(4, "M8[s]")])
def test_arrays_of_other_things_than_numbers_are_refused(tmp_path, array):
    path = tmp_path / "file.pkl"
    state = {key: value.numpy() for key, value in Model().state_dict().items()}
    path.write_bytes(pickle.dumps({"model": {**state, "0.bias": array}, "__author__": "x"}))
    with pytest.raises(CheckpointError, match=r"^0\.bias must be of numbers"):
        Checkpointer(Model()).load(str(path))


FOREIGN = {
    "state_dict and epoch": ({"state_dict": Model().state_dict(), "epoch": 3}, "'state_dict' (OrderedDict), 'epoch'"),
    "list as model": ({"model": [torch.ones(2)]}, "got a list"),
    "nothing but numbers": ({"epoch": 3}, "a dictionary with 'epoch' (int)"),
    "numbered": ({"model": {0: torch.ones(2)}}, "a dictionary with 0 (Tensor)"),
    "empty": ({}, "a dictionary with nothing"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_other_programs_are_refused(tmp_path, name):
    content, found = FOREIGN[name]
    torch.save(content, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(Model()).load(str(tmp_path / "foreign.pth"))
    assert found in str(caught.value)
    assert "torch.save({'model': state_dict}, file)" in str(caught.value)


@pytest.mark.parametrize(
    ("prefix", "remedy"), [("_orig_mod.", "compiled"), ("layer1.0.", "convert-torchvision"), ("a.module.", "wrapped")]
)
def test_names_of_others_are_told_with_a_way(tmp_path, prefix, remedy):
    torch.save({f"{prefix}{key}": value for key, value in Model().state_dict().items()}, tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=f"Unexpected: {prefix}.*{remedy}"):
        Checkpointer(Model()).load(str(tmp_path / "file.pth"))


# ---- folded models whose state dict has lost torch's metadata


@pytest.mark.parametrize("bias", [False, True])
def test_a_folded_file_without_marks_is_told(tmp_path, bias, bnext_log):
    plain = randomize(nn.Sequential(nn.Conv2d(3, 4, 1, bias=bias), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1))).eval()
    folded = copy.deepcopy(plain)
    fold_norms(folded)
    torch.save({"model": dict(folded.state_dict().items())}, tmp_path / "folded.pth")
    with pytest.raises(CheckpointError, match=r"nothing of 1 \(.*folded"):
        Checkpointer(plain).load(str(tmp_path / "folded.pth"), complete=True)
    Checkpointer(plain).load(str(tmp_path / "folded.pth"))
    assert ("seems to be of a folded model: it has 0.bias" in bnext_log.text) == (not bias)


# ---- what was estimated for another config


def save_re_estimated(path, row=4):
    model = randomize(nn.Sequential(LevelBatchNorm2d(4, ("p3", "p4"), NormSpec.from_table5_row(row))))
    keys = {"MODEL.BNEXT.RETINANET.POPULATION": "per_level"}
    torch.save({"model": model.state_dict(), "recomputed_statistics": {"keys": keys}}, path)
    return str(path)


def test_a_config_without_the_keys_of_a_re_estimation_is_told_them(tmp_path, bnext_log):
    """An AP of 10 came instead of 30, with the advice to re-estimate."""
    path = save_re_estimated(tmp_path / "file.pth")
    shared = nn.Sequential(LevelBatchNorm2d(4, ("p3", "p4"), NormSpec.from_table5_row(3)))
    with pytest.raises(CheckpointError, match=r"POPULATION 'per_level'"):
        Checkpointer(shared).load(path, complete=True)
    Checkpointer(shared).load(path)
    assert "MODEL.BNEXT.RETINANET.POPULATION 'per_level'" in bnext_log.text
    Checkpointer(shared).load(path, complete=True, replaced=["0"])
    own = nn.Sequential(LevelBatchNorm2d(4, ("p3", "p4"), NormSpec.from_table5_row(4)))
    bnext_log.clear()
    Checkpointer(own).load(path, complete=True)
    assert "POPULATION" not in bnext_log.text


def test_a_file_without_a_domain_of_the_model_is_given_it_by_the_command_for_it(tmp_path):
    spec = NormSpec(statistics="per_level_and_domain", population="per_level_and_domain", domains=("day",))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), LevelBatchNorm2d(4, ("p3", "p4"), spec))
    torch.save({"model": model.state_dict()}, tmp_path / "file.pth")
    new = nn.Sequential(nn.Conv2d(3, 4, 1), LevelBatchNorm2d(4, ("p3", "p4"), spec.replace(domains=("day", "night"))))
    with pytest.raises(CheckpointError, match="`bnext domain add night`"):
        Checkpointer(new).load(str(tmp_path / "file.pth"), complete=True)
    new.append(nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match="every parameter") as refusal:
        Checkpointer(new).load(str(tmp_path / "file.pth"), complete=True)
    assert "bnext domain add" not in str(refusal.value)

"""A norm's own load: state of any form, whoever loads it, and what is said of it."""

import copy
import io
import logging

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec
from bnext.layers.loading import reporting_conversions
from bnext.surgery import convert_norm_state
from bnext.surgery.fold import fold_norms
from tests.cases import LEVELS, ROWS, randomize
from tests.surgery.norm_forms import LAYOUTS, make, pick_pairs

DOMAINS = NormSpec(population="per_domain", affine="per_domain", domains=("day", "night"))


@pytest.fixture
def said(caplog):
    """What norms say of a conversion."""
    with caplog.at_level(logging.WARNING, "bnext.layers.loading"):
        yield caplog


def head(row, seed=1):
    norms = [LevelBatchNorm2d(4, LEVELS, NormSpec.from_table5_row(row)) for _ in range(2)]
    return randomize(nn.Sequential(*norms), seed)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_load_gives_what_the_conversion_of_a_state_dict_gives(layout):
    for start, to in pick_pairs(layout):
        if not to.startswith(("own", "domains", "levels")):
            continue
        source, target, other = (
            nn.ModuleDict({"norm": make(name, seed)}) for name, seed in ((start, 1), (to, 2), (to, 2))
        )
        result = target.load_state_dict(source.state_dict(), strict=False)
        converted, _ = convert_norm_state(source.state_dict(), other)
        expected = other.load_state_dict(converted, strict=False)
        assert result == expected, (start, to)
        torch.testing.assert_close(target.state_dict(), other.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("stored", ROWS)
def test_every_row_loads_strictly_into_every_row(stored, assign):
    for row in ROWS:
        with torch.device("meta" if assign else "cpu"):
            target = LevelBatchNorm2d(4, LEVELS, NormSpec.from_table5_row(row))
        target.load_state_dict(head(stored)[0].state_dict(), assign=assign)
        assert not any(value.is_meta for value in target.state_dict().values())
        pointers = [value.data_ptr() for value in target.state_dict().values()]
        assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize("load_into", [Checkpointer, DetectionCheckpointer])
def test_checkpointers_of_others_load_every_entry(tmp_path, load_into, said):
    """80 entries of a RetinaNet were left at their initial values."""
    torch.save({"model": head(3).state_dict()}, tmp_path / "row3.pth")
    target = head(4, seed=2)
    load_into(target).load(str(tmp_path / "row3.pth"))
    for norm, source in zip(target, head(3), strict=True):
        for level in LEVELS:
            assert torch.equal(norm.get_submodule(level).running_mean, source.running_mean)
    messages = [record.getMessage() for record in said.records]
    assert sum("copied to every level" in message for message in messages) == 1
    assert not any("not found in the checkpoint" in message or "not used" in message for message in messages)


def test_each_load_says_once_what_it_did_and_what_is_left(said):
    for _ in range(2):
        said.clear()
        head(6).load_state_dict(head(1).state_dict())
        assert len(said.messages) == 2
        assert all("(0, and others alike)" in message for message in said.messages)

    said.clear()
    norm = randomize(BatchNorm2d(4, DOMAINS))
    before = copy.deepcopy(norm.night.state_dict())
    half = {key: value for key, value in BatchNorm2d(4, DOMAINS).state_dict().items() if key.startswith("day")}
    norm.load_state_dict(half, strict=False)
    assert "holds no population statistics for night" in said.text
    assert all(torch.equal(value, before[key]) for key, value in norm.night.state_dict().items())

    said.clear()
    with reporting_conversions():
        head(6).load_state_dict(head(1).state_dict())
    head(4).load_state_dict(head(4).state_dict())
    assert not said.messages


@pytest.mark.parametrize("fields", [["running_mean", "running_var"], ["weight", "bias"], ["weight"]])
def test_some_of_the_fields_of_a_plain_norm_are_loaded_without_a_word(fields, said):
    source, target = randomize(BatchNorm2d(4)).state_dict(), BatchNorm2d(4)
    part = {field: source[field] for field in fields}
    result = target.load_state_dict(part, strict=False)
    assert all(torch.equal(target.state_dict()[field], source[field]) for field in fields)
    assert set(result.missing_keys) == source.keys() - set(fields) - {"num_batches_tracked"}
    assert not said.messages


def test_what_cannot_be_converted_is_an_error_of_the_load():
    numbered = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3)).state_dict()
    for state, name in ((numbered, "numbered levels"), (nn.BatchNorm2d(5).state_dict(), r"shape \[4\]")):
        with pytest.raises(RuntimeError, match=name):
            BatchNorm2d(4, DOMAINS).load_state_dict(state, strict=False)
    integers = {key: value.long() for key, value in nn.BatchNorm2d(4).state_dict().items()}
    result = BatchNorm2d(4, DOMAINS).load_state_dict(integers, strict=False)
    assert "weight" in result.unexpected_keys
    assert "day.weight" in result.missing_keys


def test_entries_that_are_no_norms_are_left_to_torch():
    state = {**nn.BatchNorm2d(4).state_dict(), "observer.scale": torch.ones(1)}
    result = BatchNorm2d(4, DOMAINS).load_state_dict(state, strict=False)
    assert result.unexpected_keys == ["observer.scale"]
    assert not result.missing_keys


def test_shapes_without_values_load():
    """A state dict of the meta device, as tools that plan a model's memory give."""
    with torch.device("meta"):
        target = head(1)
        target.load_state_dict(head(6).state_dict(), assign=True)
    assert all(value.is_meta for value in target.state_dict().values())


@pytest.mark.parametrize("strict", [False, True])
def test_folded_and_unfolded_state_do_not_mix(strict):
    plain = randomize(nn.Sequential(nn.Conv2d(3, 4, 1), BatchNorm2d(4))).eval()
    folded = copy.deepcopy(plain)
    fold_norms(folded)
    stream = io.BytesIO()
    torch.save(folded.state_dict(), stream)
    stream.seek(0)
    stored = torch.load(stream, weights_only=True)
    with pytest.raises(RuntimeError, match=r"folded norm for one that is not \(1\)"):
        plain.load_state_dict(stored, strict=strict)
    with pytest.raises(RuntimeError, match=r"norm for a folded one \(1\)"):
        folded.load_state_dict(plain.state_dict(), strict=strict)
    folded.load_state_dict(stored, strict=strict)

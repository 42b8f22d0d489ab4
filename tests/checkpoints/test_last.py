"""The last checkpoint of an output folder: found, or refused where the folder is damaged; and all or nothing."""

import copy
import os

import pytest
import torch
from torch import nn

from bnext.checkpoints import Checkpointer
from bnext.checkpoints.last import find_last_checkpoint
from bnext.errors import CheckpointError


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


def damage_note(folder, kind):
    note = folder / "last_checkpoint"
    if kind == "folder":
        note.mkdir()
    elif kind == "link":
        note.symlink_to(folder / "nowhere")
    elif kind == "pipe":
        os.mkfifo(note)
    else:
        note.write_bytes(kind)


@pytest.mark.parametrize(
    "kind",
    [
        "folder",
        "link",
        "pipe",
        b"",
        b" \n",
        b"absent.pth",
        b"\xff\xfe\x00",
        b"a\x00b",
        b"../outside.pth",
        b"/etc/hostname",
        b"sub",
        b".",
        b"x" * 5000,
    ],
)
def test_a_damaged_note_is_refused(tmp_path, kind):
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    torch.save({}, tmp_path / "outside.pth")
    torch.save({}, folder / "model_0000002.pth")
    damage_note(folder, kind)
    checkpointer = Checkpointer(small(), str(folder))
    with pytest.raises(CheckpointError, match=r"OUTPUT_DIR/last_checkpoint.*model_0000002\.pth") as caught:
        checkpointer.resume_or_load("", resume=True)
    assert len(str(caught.value).splitlines()) == 1
    assert checkpointer.resume_or_load("", resume=False) == {}


def test_a_whole_note_is_followed(tmp_path, monkeypatch):
    assert find_last_checkpoint(str(tmp_path)) == ""
    assert not Checkpointer(small(), str(tmp_path)).has_checkpoint()
    torch.save({}, tmp_path / "a model.pth")
    (tmp_path / "last_checkpoint").write_text("a model.pth\n")
    assert find_last_checkpoint(str(tmp_path)) == str(tmp_path / "a model.pth")
    monkeypatch.chdir(tmp_path)
    assert find_last_checkpoint(".") == "./a model.pth"


def test_weights_alone_are_not_resumed_from(tmp_path):
    """The training began anew at iteration 1, with another optimizer, and said nothing."""
    Checkpointer(small(), str(tmp_path)).save("model_final")
    model = small()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(CheckpointError, match=r"state of its training; got no 'optimizer'.*without --resume"):
        Checkpointer(model, str(tmp_path), optimizer=optimizer).resume_or_load("", resume=True)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def make_training(momentum=0.9):
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=momentum)
    model(torch.ones(2, 3, 2, 2)).square().sum().backward()
    optimizer.step()
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("optimizer", {"state": {}, "param_groups": []}),
        ("optimizer", 3),
        ("optimizer", {}),
        ("scheduler", []),
        ("scheduler", {}),
        ("scheduler", None),
    ],
)
def test_a_refused_state_leaves_everything_as_it_was(tmp_path, name, value):
    model, optimizer, scheduler = make_training()
    Checkpointer(model, str(tmp_path), optimizer=optimizer, scheduler=scheduler).save("good")
    torch.save({**torch.load(tmp_path / "good.pth"), name: value}, tmp_path / "bad.pth")

    model, optimizer, scheduler = make_training()
    scheduler.last_epoch = 7
    before = copy.deepcopy([model.state_dict(), optimizer.state_dict(), scheduler.state_dict()])
    checkpointer = Checkpointer(model, optimizer=optimizer, scheduler=scheduler)
    with pytest.raises(CheckpointError, match=rf"'{name}' in a checkpoint.*bad\.pth"):
        checkpointer.load(str(tmp_path / "bad.pth"))

    after = [model.state_dict(), optimizer.state_dict(), scheduler.state_dict()]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    checkpointer.load(str(tmp_path / "good.pth"))
    assert scheduler.last_epoch == 0


@pytest.mark.parametrize("kind", ["folder", "link", "pipe"])
def test_what_is_no_file_is_named(tmp_path, kind):
    damage_note(tmp_path, kind)
    expected = {"folder": "a folder", "link": "a link to nothing", "pipe": "a device or a pipe"}[kind]
    with pytest.raises(CheckpointError, match=f"which is {expected}"):
        Checkpointer(small()).load(str(tmp_path / "last_checkpoint"))

"""A re-estimation of a checkpoint that is interrupted: what is kept of it, and how it goes on."""

import dataclasses

import pytest
import torch
from detectron2.data import DatasetMapper

from bnext.engine.recompute_checkpoint import run_request as run
from bnext.engine.recompute_request import RecomputeRequest
from bnext.errors import DatasetError
from tests.engine.saved import buffers_that_differ, load

pytestmark = pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")


def test_an_interrupted_run_goes_on_with_resume(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("bnext.statistics.kept_state._PERIOD", 2)
    cfg = load(weights, "SOLVER.IMS_PER_BATCH", 2)
    whole = RecomputeRequest(output=str(tmp_path / "whole.pth"), datasets=("digits_train",))
    run(cfg, whole)
    request = RecomputeRequest(output=str(tmp_path / "out.pth"), datasets=("digits_train",), resume=True)
    interrupt_at(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        run(cfg, request)
    assert [path.suffix for path in tmp_path.glob("out*")] == [".state"]
    monkeypatch.undo()
    seen = interrupt_at(100, monkeypatch)
    run(cfg, request)
    assert len(seen) == 6 - 4, "four batches were kept"
    assert not list(tmp_path.glob("*.state"))
    first, second = (torch.load(tmp_path / name)["model"] for name in ("whole.pth", "out.pth"))
    assert not buffers_that_differ(first, second)


def interrupt_at(number, monkeypatch):
    """Ctrl-C in a forward; gives the list of forwards."""
    from bnext.engine import recompute

    choose, seen = recompute.choose_forward, []

    def chosen(*args):
        forward = choose(*args)

        def counted(model, batch):
            seen.append(1)
            if len(seen) == number:
                raise KeyboardInterrupt
            return forward(model, batch)

        return counted

    monkeypatch.setattr(recompute, "choose_forward", chosen)
    return seen


def keep(tmp_path, cfg, monkeypatch, resume=False, **arguments):
    """A run that is interrupted after it has kept something."""
    request = RecomputeRequest(output=str(tmp_path / "out.pth"), datasets=("digits_train",), resume=resume, **arguments)
    with monkeypatch.context() as patch:
        patch.setattr("bnext.statistics.kept_state._PERIOD", 2)
        interrupt_at(5, patch)
        with pytest.raises(KeyboardInterrupt, match="The same command with --resume goes on"):
            run(cfg, request)
    (path,) = tmp_path.glob("out*.state")
    return request, path


def test_without_resume_what_was_kept_goes_when_the_new_run_has_begun(weights, tmp_path, monkeypatch, bnext_log):
    cfg = load(weights, "SOLVER.IMS_PER_BATCH", 2)
    request, first = keep(tmp_path, cfg, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(DatasetMapper, "__call__", lambda *args: (_ for _ in ()).throw(OSError("gone")))
        with pytest.raises(DatasetError, match="gone"):
            run(cfg, request)
    with monkeypatch.context() as patch:
        patch.setattr("bnext.engine.kept_run._remove", lambda paths: pytest.fail("not before the first batch"))
        patch.setattr("bnext.engine.recompute.recompute_population_statistics", interrupt)
        with pytest.raises(KeyboardInterrupt, match="goes on"):
            run(cfg, request)
    assert first.exists()
    assert "removed" not in bnext_log.text
    _, second = keep(tmp_path, cfg, monkeypatch)
    assert second != first
    assert f"{first.name} of an earlier run removed" in bnext_log.text
    seen = interrupt_at(100, monkeypatch)
    run(cfg, dataclasses.replace(request, resume=True))
    assert len(seen) == 2, "goes on with the second one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.pth"]


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_an_interruption_before_anything_is_kept_promises_nothing(weights, tmp_path, monkeypatch):
    interrupt_at(1, monkeypatch)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(load(weights), RecomputeRequest(output=str(tmp_path / "out.pth")))
    assert str(caught.value) == ""


def test_what_other_outputs_have_kept_stays(weights, tmp_path):
    others = ["o1.pth.0123456789ab.1.state", "o[1].pth.x.pth.0123456789ab.1.state", "o[1].pth.notes.state"]
    own = ["o[1].pth.0123456789ab.1.state", "o[1].pth.0123456789ab.2.state.1"]
    for name in [*others, *own]:
        (tmp_path / name).write_text("kept")
    run(load(weights), RecomputeRequest(output=str(tmp_path / "o[1].pth")))
    assert {path.name for path in tmp_path.iterdir()} == {*others, "o[1].pth", "o[1].json"}

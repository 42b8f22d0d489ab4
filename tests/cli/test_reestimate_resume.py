"""A re-estimation of a checkpoint that is interrupted: what is kept of it, and how it goes on."""

import dataclasses
import os

import pytest
import torch
from detectron2.data import DatasetMapper

from bnext.cli import reestimate as recompute_checkpoint
from bnext.cli.kept_run import KeptRun
from bnext.cli.reestimate import run_request as run
from bnext.cli.reestimate_request import RecomputeRequest
from bnext.errors import DatasetError, LaunchError
from tests import tiny
from tests.saved import buffers_that_differ, load, save

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
    assert sorted(path.suffix for path in tmp_path.glob("out*")) == [".previous", ".state"]
    monkeypatch.undo()
    seen = interrupt_at(100, monkeypatch)
    run(cfg, request)
    assert len(seen) == 6 - 4, "four batches were kept"
    assert not list(tmp_path.glob("*.state*"))
    first, second = (torch.load(tmp_path / name)["model"] for name in ("whole.pth", "out.pth"))
    assert not buffers_that_differ(first, second)


def test_an_interrupted_run_on_sampled_rois_draws_the_same_ones(digits, tmp_path, monkeypatch):
    """What a batch draws does not depend on the batches that the resumed run passes over."""
    monkeypatch.setattr("bnext.statistics.kept_state._PERIOD", 2)
    cfg = load(save(tmp_path / "in.pth", tiny.RCNN), "SOLVER.IMS_PER_BATCH", 2, config=tiny.RCNN)
    run(cfg, RecomputeRequest(output=str(tmp_path / "whole.pth"), datasets=("digits_train",)))
    request = RecomputeRequest(output=str(tmp_path / "out.pth"), datasets=("digits_train",), resume=True)
    numbers, read = iter(range(100)), DatasetMapper.__call__

    def interrupt(mapper, record):
        if next(numbers) == 9:
            raise KeyboardInterrupt
        return read(mapper, record)

    monkeypatch.setattr(DatasetMapper, "__call__", interrupt)
    with pytest.raises(KeyboardInterrupt, match="--resume goes on"):
        run(cfg, request)
    run(cfg, request)
    first, second = (torch.load(tmp_path / name)["model"] for name in ("whole.pth", "out.pth"))
    assert any("roi_heads" in key and key.endswith("running_mean") for key in first)
    assert not buffers_that_differ(first, second)


def interrupt_at(number, monkeypatch):
    """Ctrl-C in a forward; gives the list of forwards."""
    from bnext.evaluation import reestimate as recompute

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
        patch.setattr("bnext.cli.kept_run._remove", lambda paths: pytest.fail("not before the first batch"))
        patch.setattr("bnext.evaluation.reestimate.recompute_population_statistics", interrupt)
        with pytest.raises(KeyboardInterrupt, match="goes on"):
            run(cfg, request)
    assert first.exists()
    assert "removed" not in bnext_log.text
    _, second = keep(tmp_path, cfg, monkeypatch)
    assert second != first
    assert f"{first.name}, {first.name}.previous of an earlier run removed" in bnext_log.text
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
    own += [f"{own[1]}.previous", f"{own[1]}.partial"]
    for name in [*others, *own]:
        (tmp_path / name).write_text("kept")
    run(load(weights), RecomputeRequest(output=str(tmp_path / "o[1].pth")))
    assert {path.name for path in tmp_path.iterdir()} == {*others, "o[1].pth", "o[1].json"}


@pytest.mark.parametrize("cause", ["full disk", "interruption", "full disk for the report"])
def test_what_was_kept_stays_until_the_output_is_written(weights, tmp_path, monkeypatch, cause):
    monkeypatch.setattr("bnext.statistics.kept_state._PERIOD", 2)
    cfg = load(weights, "SOLVER.IMS_PER_BATCH", 2)
    request = RecomputeRequest(output=str(tmp_path / "out.pth"), datasets=("digits_train",))
    if cause == "interruption":
        with monkeypatch.context() as patch:
            patch.setattr("bnext.cli.reestimate.collect_norm_specs", interrupt)
            with pytest.raises(KeyboardInterrupt, match="with --resume goes on"):
                run(cfg, request)
    elif not os.path.exists("/dev/full"):
        pytest.skip("needs a device that is full")
    else:
        os.symlink("/dev/full", tmp_path / ("out.json.partial" if "report" in cause else "out.pth.partial"))
        with pytest.raises(LaunchError, match=r"--output must be.*No space left.*nothing is written.*--resume goes on"):
            run(cfg, request)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".previous", ".state"]
    seen = interrupt_at(100, monkeypatch)
    run(cfg, dataclasses.replace(request, resume=True))
    assert seen == [], "everything was kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.pth"]
    run(cfg, whole := dataclasses.replace(request, output=str(tmp_path / "whole.pth")))
    first, second = (torch.load(path)["model"] for path in (whole.output, request.output))
    assert not buffers_that_differ(first, second)


def test_what_ended_workers_have_half_written_is_removed(weights, tmp_path, monkeypatch):
    """Workers are ended by a signal, which no `finally` of theirs sees."""

    def start(main, number, args, device):
        path, _ = KeptRun(args[1].output, str(weights), "another").begin(resume=False)
        for name in ("out.pth.partial", "out.json.partial", "other.pth.partial", f"{path.name}.partial"):
            (tmp_path / name).write_text("half")
        path, _ = own[0].begin(resume=False)
        path.with_name(f"{path.name}.1.partial").write_text("half")
        raise KeyboardInterrupt

    own = []
    find = recompute_checkpoint._find_run
    monkeypatch.setattr(recompute_checkpoint, "_find_run", lambda *args: own.append(find(*args)) or own[-1])
    monkeypatch.setattr(recompute_checkpoint, "launch", start)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(load(weights), RecomputeRequest(output=str(tmp_path / "out.pth")))
    assert str(caught.value) == "", "nothing is kept"
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left[0] == "other.pth.partial"
    assert len(left) == 2, "the other request's stays"


def test_the_files_of_all_workers_are_removed(weights, tmp_path):
    kept = KeptRun(str(tmp_path / "out.pth"), f"{weights}?matching_heuristics=True", "request")
    path, _ = kept.begin(resume=False)
    for ending in ("", ".0", ".1", ".0.previous", ".1.partial", ".notes"):
        path.with_name(f"{path.name}{ending}").touch()
    assert kept.begin(resume=True)[0] == path
    kept.remove()
    assert [file.name for file in tmp_path.iterdir()] == [f"{path.name}.notes"]


def test_other_weights_of_the_same_name_are_another_run(tmp_path):
    names = []
    for text in ("one", "another"):
        (tmp_path / "in.pth").write_text(text)
        kept = KeptRun(str(tmp_path / "out.pth"), f"{tmp_path / 'in.pth'}?matching_heuristics=True", "request")
        names.append(kept.begin(resume=False)[0].name)
    assert names[0] != names[1]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
def test_without_room_for_a_short_report_there_is_no_output(tmp_path):
    os.symlink("/dev/full", tmp_path / "out.json.partial")
    with pytest.raises(LaunchError, match=r"nothing is written\. Mend it\.$"):
        recompute_checkpoint._write(str(tmp_path / "out.pth"), {}, {}, "")
    assert not list(tmp_path.iterdir())

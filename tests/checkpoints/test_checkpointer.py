"""Checkpoints: whole files, the right architecture, sane statistics, converted norms."""

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import NativePathHandler
from torch import nn

from bnext.checkpoints import Checkpointer
from bnext.checkpoints.checkpointer import check_eval_weights
from bnext.cli.main import build_parser
from bnext.errors import CheckpointError
from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec
from bnext.surgery.fold import fold_norms
from tests.cases import randomize


def small(channels=4):
    return nn.Sequential(nn.Conv2d(3, channels, 1), nn.BatchNorm2d(channels))


def save(model, path, **changes):
    state = model.state_dict()  # with torch's metadata of the modules
    state.update(changes)
    torch.save({"model": state}, path)
    return str(path)


def test_what_is_saved_is_loaded_and_is_the_last(tmp_path):
    source, target = small(), small()
    Checkpointer(source, str(tmp_path)).save("model_final", iteration=4)
    assert {path.name for path in tmp_path.iterdir()} == {"model_final.pth", "last_checkpoint"}
    assert Checkpointer(target, str(tmp_path)).resume_or_load("", resume=True) == {"iteration": 4}
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


class Interrupted(dict):
    """A state in the middle of whose saving the user presses Ctrl-C."""

    def __reduce__(self):
        raise KeyboardInterrupt


def test_an_interrupted_save_leaves_the_previous_checkpoint(tmp_path):
    checkpointer = Checkpointer(small(), str(tmp_path))
    checkpointer.save("model_final")
    before = (tmp_path / "model_final.pth").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        checkpointer.save("model_final", extra=Interrupted())
    assert (tmp_path / "model_final.pth").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"model_final.pth", "last_checkpoint"}


def test_another_architecture_is_refused_and_the_model_left_alone(tmp_path):
    path = save(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), tmp_path / "other.pth")
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(model).load(path)
    message = str(caught.value)
    assert "share some parameter of the model; got 0 of 6" in message
    assert path in message
    assert "Missing: 1.running_mean, 1.running_var." in message
    assert "0.weight (2, 2) instead of (4, 3, 1, 1)" in message
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("key", ["0.bias", "1.running_var"])
def test_a_part_is_enough_to_start_from_but_not_to_evaluate(tmp_path, key):
    state = small().state_dict()
    del state[key]
    torch.save({"model": state}, tmp_path / "part.pth")
    checkpointer = Checkpointer(small())
    checkpointer.load(str(tmp_path / "part.pth"))
    with pytest.raises(CheckpointError, match=f"5 of 6.*Missing: {key}"):
        checkpointer.load(str(tmp_path / "part.pth"), complete=True)


def test_a_resume_must_be_complete(tmp_path):
    Checkpointer(small(), str(tmp_path)).save("model_final")
    bigger = nn.Sequential(*small(), nn.Conv2d(4, 1, 1))
    with pytest.raises(CheckpointError, match="Missing: 2"):
        Checkpointer(bigger, str(tmp_path)).resume_or_load("", resume=True)


@pytest.mark.parametrize(("value", "shown"), [(-1e-3, "-0.001"), (float("nan"), "nan"), (float("inf"), "inf")])
def test_variances_that_cannot_be_are_refused(tmp_path, value, shown):
    """facebookresearch/detectron2#2413: such a checkpoint gave NaN without a word."""
    path = save(small(), tmp_path / "bad.pth", **{"1.running_var": torch.tensor([1.0, 1.0, value, 1.0])})
    with pytest.raises(CheckpointError, match=rf"1\.running_var .*{shown} .*bad\.pth"):
        Checkpointer(small()).load(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.pth"):
        Checkpointer(small()).load(str(tmp_path / "absent.pth"))


def test_weights_of_a_wrapped_model_and_numpy_weights_load(tmp_path):
    source = small()
    wrapped = {f"module.{key}": value for key, value in source.state_dict().items()}
    torch.save({"model": wrapped}, tmp_path / "wrapped.pth")
    arrays = {key: np.asarray(value) for key, value in source.state_dict().items()}
    (tmp_path / "zoo.pkl").write_bytes(pickle.dumps({"model": arrays, "__author__": "zoo"}))
    for name in ("wrapped.pth", "zoo.pkl"):
        target = small()
        Checkpointer(target).load(str(tmp_path / name), complete=True)
        assert torch.equal(target[0].weight, source[0].weight)


def test_backbone_weights_with_the_names_of_another_library_are_matched(tmp_path):
    """As detectron2's ImageNet weights: matched by the ends of the names."""
    model = nn.ModuleDict({"backbone": nn.ModuleDict({"stem": nn.Conv2d(3, 4, 1)}), "head": nn.Conv2d(4, 1, 1)})
    weight = np.ones((4, 3, 1, 1), dtype=np.float32)
    data = {"model": {"stem.weight": weight}, "__author__": "someone", "matching_heuristics": True}
    (tmp_path / "imagenet.pkl").write_bytes(pickle.dumps(data))
    Checkpointer(model).load(str(tmp_path / "imagenet.pkl"))
    assert bool((model["backbone"]["stem"].weight == 1).all())
    with pytest.raises(CheckpointError, match="1 of 4"):
        Checkpointer(model).load(str(tmp_path / "imagenet.pkl"), complete=True)


SEPARATE = NormSpec(population="per_domain", affine="per_domain", domains=("day", "night"))


def test_a_backbone_of_another_library_is_matched_with_norms_of_domains(tmp_path):
    """Its names end otherwise than those of a domain's state: detectron2 alone would leave the norms as they were."""
    model = nn.ModuleDict({"backbone": nn.ModuleDict({"stem": BatchNorm2d(4, SEPARATE), "conv": nn.Conv2d(3, 4, 1)})})
    arrays = {f"stem.{key}": np.full(4, 3, np.float32) for key in ("weight", "bias", "running_mean", "running_var")}
    arrays["conv.weight"] = np.ones((4, 3, 1, 1), dtype=np.float32)
    data = {"model": arrays, "__author__": "someone", "matching_heuristics": True}
    (tmp_path / "imagenet.pkl").write_bytes(pickle.dumps(data))
    Checkpointer(model).load(str(tmp_path / "imagenet.pkl"))
    state = model["backbone"]["stem"].state_dict()
    assert bool((model["backbone"]["conv"].weight == 1).all())
    assert all(bool((value == 3).all()) for key, value in state.items() if not key.endswith("tracked"))


def list_unwritten(log):
    return {message for message in log.messages if "mean 0 and variance 1" in message}


def test_frozen_norms_that_nothing_was_loaded_into_are_said(tmp_path, bnext_log):
    """pytorch/vision#5443, facebookresearch/detectron2#914: they normalize nothing, and losses explode."""
    frozen = BatchNorm2d(4, NormSpec(frozen="both"))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), frozen, FrozenBatchNorm2d(4), nn.BatchNorm2d(4))
    Checkpointer(model).load("")
    (message,) = list_unwritten(bnext_log)
    assert message.startswith("Frozen norms that do not normalize: 1, 2 (mean 0 and variance 1; no checkpoint).")
    bnext_log.clear()
    path = save(randomize(copy.deepcopy(model)), tmp_path / "good.pth")
    Checkpointer(model).load(path)
    assert not list_unwritten(bnext_log)


def test_training_from_scratch_is_not_bothered(tmp_path, bnext_log):
    backbone = save(randomize(nn.Sequential(nn.BatchNorm2d(4))), tmp_path / "backbone.pth")
    model = nn.Sequential(nn.BatchNorm2d(4), BatchNorm2d(4), BatchNorm2d(4, SEPARATE))
    Checkpointer(model).load("")
    Checkpointer(model).load(backbone)
    assert not list_unwritten(bnext_log)


def test_statistics_of_a_checkpoint_that_nobody_wrote_are_said(tmp_path, bnext_log):
    source = randomize(nn.Sequential(nn.BatchNorm2d(4), BatchNorm2d(4, SEPARATE)))
    source[1].night.reset_running_stats()
    path = save(source, tmp_path / "half.pth")
    Checkpointer(source).load(path)
    (message,) = list_unwritten(bnext_log)
    assert "Statistics that were never written" in message
    assert f"1.night (mean 0 and variance 1; {path})" in message


@pytest.mark.parametrize("bias", [False, True])
def test_folded_and_unfolded_checkpoints_are_told_apart(tmp_path, bias):
    """fvcore's loader leaves out what does not fit: the norm would be applied a second time, or never."""
    plain = randomize(nn.Sequential(nn.Conv2d(3, 4, 1, bias=bias), BatchNorm2d(4))).eval()
    folded = copy.deepcopy(plain)
    fold_norms(folded)
    paths = save(plain, tmp_path / "plain.pth"), save(folded, tmp_path / "folded.pth")
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"before it is folded.*\(1;"):
        Checkpointer(folded).load(paths[0])
    for complete in (False, True):
        with pytest.raises(CheckpointError, match=r"folded norms for 1 \(.*folded\.pth"):
            Checkpointer(plain).load(paths[1], complete=complete)
    assert all(torch.equal(value, before[key]) for key, value in plain.state_dict().items())
    Checkpointer(folded).load(paths[1], complete=True)


def test_folded_checkpoints_with_marks_load(tmp_path):
    """As they were saved at first: with statistics of no channels, and the domain in letters."""
    folded = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    fold_norms(folded)
    marks = {"1.running_var": torch.empty(0), "1.folded_domain": torch.tensor(list(b"day"), dtype=torch.uint8)}
    path = save(folded, tmp_path / "marked.pth", **marks)
    other = copy.deepcopy(folded)
    other[0].weight.data.zero_()
    Checkpointer(other).load(path, complete=True)
    assert torch.equal(other[0].weight, folded[0].weight)


def test_another_eps_than_in_training_is_said(tmp_path, bnext_log):
    """pytorch/vision#2169: the outputs differ, and nothing says why."""
    source = randomize(nn.Sequential(BatchNorm2d(4, NormSpec(eps=1e-3))))
    Checkpointer(source, str(tmp_path)).save("model_final")
    target = nn.Sequential(BatchNorm2d(4))
    Checkpointer(target).load(str(tmp_path / "model_final.pth"), complete=True)
    assert "eps was 0.001, the model's is 1e-05" in bnext_log.text


def test_norm_state_is_converted_and_reported(tmp_path, bnext_log):
    source = nn.Sequential(nn.BatchNorm2d(4))
    source[0].running_mean.fill_(3)
    path = save(source, tmp_path / "shared.pth")
    target = nn.Sequential(LevelBatchNorm2d(4, ("p3", "p4"), NormSpec(population="per_level")))
    Checkpointer(target).load(path, complete=True)
    means = [value for key, value in target.state_dict().items() if key.endswith("running_mean")]
    assert len(means) == 2
    assert all(bool((mean == 3).all()) for mean in means)
    assert "Norm state of the checkpoint" in bnext_log.text
    assert path in bnext_log.text


@pytest.mark.parametrize(("trained", "loaded"), [(1, 3), (3, 1), (2, 4), (4, 2)])
def test_rows_with_equal_keys_are_told_apart(tmp_path, bnext_log, trained, loaded):
    def head(row):
        return randomize(nn.Sequential(LevelBatchNorm2d(4, ("p3", "p4"), NormSpec.from_table5_row(row))))

    Checkpointer(head(trained), str(tmp_path)).save("model_final")
    path = str(tmp_path / "model_final.pth")
    Checkpointer(head(trained)).load(path, complete=True)
    assert not [message for message in bnext_log.messages if "Loading from" not in message]
    rest = Checkpointer(head(loaded)).load(path, complete=True)
    names = {1: "shared", 2: "shared", 3: "per_level", 4: "per_level"}
    expected = f"mini-batch statistics were {names[trained]}, the model's are {names[loaded]}"
    assert sum(expected in message for message in bnext_log.messages) >= 1
    assert "norm_specs" not in rest


def test_a_checkpoint_that_does_not_say_is_said(tmp_path, bnext_log):
    model = nn.Sequential(LevelBatchNorm2d(4, ("p3", "p4"), NormSpec.from_table5_row(3)))
    path = save(model, tmp_path / "foreign.pth")
    Checkpointer(model).load(path, complete=True)
    assert any("does not say whether" in message for message in bnext_log.messages)


def test_numbered_levels_are_per_level_whatever_they_become(tmp_path, bnext_log):
    """detectron2's CycleBatchNormList; the keys as they are in the file tell."""
    cycle = nn.Sequential(nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2)))
    model = nn.Sequential(LevelBatchNorm2d(4, ("p3", "p4"), NormSpec.from_table5_row(6)))
    Checkpointer(model).load(save(cycle, tmp_path / "cycle.pth"), complete=True)
    assert not any("does not say whether" in message for message in bnext_log.messages)


class Elsewhere(NativePathHandler):
    """A storage with a name of its own, as an object store; a folder in truth."""

    folder = ""

    def _get_supported_prefixes(self):
        return ["elsewhere://"]

    def _get_path_with_cwd(self, path):
        return path.replace("elsewhere:/", self.folder)


@pytest.fixture
def elsewhere(tmp_path):
    Elsewhere.folder = str(tmp_path)
    PathManager.register_handler(Elsewhere(), allow_override=True)
    return "elsewhere://out"


def test_another_storage_holds_the_norm_specs_too(tmp_path, elsewhere):
    (tmp_path / "out").mkdir()
    model = nn.Sequential(LevelBatchNorm2d(4, ("p3", "p4"), NormSpec.from_table5_row(3)))
    Checkpointer(model, elsewhere).save("model_final", iteration=4)
    stored = torch.load(tmp_path / "out" / "model_final.pth")
    assert stored["norm_specs"]["0"]["statistics"] == "per_level"
    assert stored["iteration"] == 4


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/model.pth", "nowhere://model.pth"])
def test_a_failed_download_has_a_remedy(address, tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        Checkpointer(small()).load(address)
    assert address in str(caught.value)
    assert "download the file by hand and give MODEL.WEIGHTS <file>" in str(caught.value)


@pytest.mark.parametrize("replaced", [(), ("0",)])
def test_copies_that_are_estimated_anew_at_once_need_no_warning(replaced, tmp_path, caplog):
    path = save(nn.Sequential(nn.BatchNorm2d(4)), tmp_path / "shared.pth")
    spec = NormSpec(statistics="per_level", population="per_level")
    model = nn.Sequential(LevelBatchNorm2d(4, levels=("p3", "p4"), spec=spec))
    Checkpointer(model).load(path, checkpointables=[], replaced=replaced)
    assert ("copied to every level" in caplog.text) != bool(replaced)


def test_an_evaluation_needs_weights():
    check_eval_weights("model.pth")
    with pytest.raises(CheckpointError, match="MODEL.WEIGHTS") as caught:
        check_eval_weights("")
    commands = re.findall(r"`bnext (\S+) ([^`]*)`", str(caught.value))
    assert commands, "--resume is an option of one command alone"
    for name, options in commands:
        build_parser(name).parse_args(options.split())


def test_no_path_is_no_checkpoint_as_in_detectron2(tmp_path):
    assert Checkpointer(nn.Linear(2, 2), str(tmp_path)).load(None) == {}

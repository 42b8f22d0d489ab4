import pickle

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from bnext import NormSpec, load_config
from bnext.cli.main import main
from bnext.diagnostics.diagnose import examine_facts
from bnext.errors import CheckpointError
from bnext.evaluation.doctor_checkpoint import examine_checkpoint
from bnext.layers import BatchNorm2d
from bnext.surgery.convert_state import collect_norm_specs
from tests import tiny


def make_state(value=-1.0):
    norm = nn.BatchNorm2d(4)
    norm.running_mean[:] = 1
    norm.running_var[0] = value
    return {f"1.{key}": entry for key, entry in norm.state_dict().items()}


def save(tmp_path, content, name="model_final.pth"):
    file = tmp_path / name
    torch.save(content, file)
    return str(file)


def list_codes(file):
    return [finding.code for finding in examine_facts(examine_checkpoint(file)).findings]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"model": state, "iteration": 7, "optimizer": {"state": {0: {"momentum_buffer": torch.ones(9)}}}},
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
    ],
)
def test_finds_the_state_dict_wherever_it_stands(tmp_path, wrap):
    facts = examine_checkpoint(save(tmp_path, wrap(make_state())))

    assert [norm.path for norm in facts.norms] == ["1"]
    assert [finding.code for finding in examine_facts(facts).findings] == ["BN011"]
    assert facts.weights.iteration == (7 if "iteration" in wrap({}) else None)


def test_a_pickle_of_arrays_is_read(tmp_path):
    file = tmp_path / "R-50.pkl"
    state = {key: value.numpy() for key, value in make_state().items()}
    file.write_bytes(pickle.dumps({"model": state, "__author__": "torchvision"}))

    assert list_codes(str(file)) == ["BN011"]


def test_an_average_of_the_weights_is_read_beside_them(tmp_path):
    facts = examine_checkpoint(save(tmp_path, {"model_ema": make_state(2.0), "model": make_state(3.0)}))

    assert float(facts.norms[0].populations[0].var[0]) == 3
    assert float(facts.averaged[0].populations[0].var[0]) == 2


def test_the_specs_of_a_file_say_eps_and_momentum(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNorm2d(4, NormSpec(eps=1e-3, momentum=0.02)))

    facts = examine_checkpoint(save(tmp_path, {"model": model.state_dict(), "norm_specs": collect_norm_specs(model)}))

    assert facts.norms[0].record.momentum == 0.02
    assert facts.weights.eps == {"1": 1e-3}


def test_names_beside_a_norms_state_are_told(tmp_path):
    file = save(tmp_path, {**make_state(1.0), "1.scale_factor": torch.ones(1), "head.scale": torch.ones(1)})

    assert examine_checkpoint(file).weights.unexpected == ("1.scale_factor",)
    assert list_codes(file) == ["BN019"]


class Code:
    def __reduce__(self):
        return print, ("it ran",)


@pytest.mark.parametrize(
    "content",
    [b"", b"no checkpoint", b"<html>", pickle.dumps({"model": Code()}), pickle.dumps([1]), pickle.dumps({"a": 1})],
)
def test_refuses_what_is_no_checkpoint_and_runs_nothing(tmp_path, capsys, content):
    file = tmp_path / "model.pth"
    file.write_bytes(content)

    with pytest.raises(CheckpointError, match="model.pth"):
        examine_checkpoint(str(file))
    assert main(["doctor", str(file)]) == 2
    assert "it ran" not in capsys.readouterr().out


def test_a_file_without_norms_is_no_error(tmp_path, capsys):
    file = save(tmp_path, {"weight": torch.ones(3, 3), "array": torch.tensor(np.arange(3))})

    assert main(["doctor", file]) == 0
    assert "No norm has running statistics" in " ".join(capsys.readouterr().out.split())


def test_the_command_takes_a_file_alone(tmp_path, capsys):
    file = save(tmp_path, {"model": make_state()})

    assert main(["doctor", file, "--fail-on", "error"]) == 1

    output = capsys.readouterr().out
    assert "BN011" in output
    assert f"bnext reestimate --config-file CONFIG.yaml --output repaired.pth MODEL.WEIGHTS {file}" in output


@pytest.mark.parametrize(
    "words", [("SEED", "1"), ("--data",), ("--config-file", "Digits-Detection/retinanet_R_18_FPN.yaml")]
)
def test_the_command_refuses_more_beside_the_file(tmp_path, capsys, words):
    file = save(tmp_path, {"model": make_state()})

    assert main(["doctor", file, *words]) == 2
    assert "MODEL.WEIGHTS" in capsys.readouterr().err


def test_the_command_refuses_a_file_that_is_not_there(capsys):
    assert main(["doctor", "absent.pth"]) == 2
    assert "absent.pth" in capsys.readouterr().err


def test_statistics_that_no_model_loads_are_told_with_their_config(tmp_path, capsys):
    model = build_model(load_config(str(tiny.CONFIG)))
    state = model.state_dict()
    name = next(key for key in state if key.endswith("running_var"))
    state[name][2] = -1
    file = save(tmp_path, {"model": state})

    assert main(["doctor", "--config-file", str(tiny.CONFIG), "MODEL.WEIGHTS", file]) == 0

    output = " ".join(capsys.readouterr().out.split())
    assert "BN011" in output
    assert "running_var is -1 in channel 2" in output
    assert f"reestimate --config-file {tiny.CONFIG} --output repaired.pth MODEL.WEIGHTS {file}" in output


def test_a_file_of_an_optimizer_alone_is_named_by_its_entries(tmp_path, capsys):
    file = save(tmp_path, {"optimizer": {"state": {}}, "iteration": 3})

    assert main(["doctor", file]) == 2
    assert "a dictionary with 'optimizer' (dict)" in capsys.readouterr().err

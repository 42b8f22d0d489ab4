"""A norm that is written down for another runtime computes there what it does here, at other sizes as well."""

from __future__ import annotations

import copy
import dataclasses
import io
import logging
import warnings

import onnxruntime
import pytest
import torch
from torch import nn

from bnext import notices
from bnext.layers import BatchNorm2d, LevelBatchNorm2d, NormSpec
from tests.cases import CASES, LEVELS, NUM_CHANNELS, Case, make_features, pick_cases, randomize

DYNAMIC = torch.export.Dim.DYNAMIC
EXPORTERS = ("torch.export", "jit.trace", "ONNX by TorchScript", "ONNX")
SOME_CASES = pick_cases("plain", "domains-one", "domains-mixed", "levels-row1", "levels-row2", "levels-row6", "pairs")
MINI_BATCH = {"inference": "mini_batch"}


class Positional(nn.Module):
    """A case whose features come one by one."""

    def __init__(self, case, norm):
        super().__init__()
        self.case, self.norm = case, norm

    def forward(self, *features):
        return tuple(self.case.call(self.norm, dict(zip(self.case.names, features, strict=True))).values())


def export(exporter, model, features, axes):
    """What is called with features of other sizes and gives a list of outputs."""
    if exporter == "torch.export":
        shapes = (tuple(dict.fromkeys(axes, DYNAMIC) for _ in features),)
        return torch.export.export(model, tuple(features), dynamic_shapes=shapes).module()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its older exporters and of sizes that it takes for numbers
        if exporter == "jit.trace":
            return torch.jit.trace(model, tuple(features), check_trace=False)
        return export_to_onnx(exporter, model, features, axes)


def export_to_onnx(exporter, model, features, axes):
    file = io.BytesIO()
    names = [f"input{index}" for index in range(len(features))]

    if exporter == "ONNX":
        shapes = (tuple(dict.fromkeys(axes, DYNAMIC) for _ in features),)
        torch.onnx.export(model, tuple(features), dynamic_shapes=shapes, dynamo=True, verbose=False).save(file)
    else:
        named = {name: {axis: f"{name}_{axis}" for axis in axes} for name in names}
        settings = {"training": torch.onnx.TrainingMode.PRESERVE, "dynamic_axes": named, "input_names": names}
        torch.onnx.export(model, tuple(features), file, dynamo=False, **settings)

    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    inputs = [value.name for value in session.get_inputs()]

    def run(*others):
        given = {name: other.numpy() for name, other in zip(inputs, others, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, given)]

    return run


def check(exporter, case):
    """Whether what was exported gives, of other features, what the norm gives."""
    model = Positional(case, case.build(torch.float32)).eval()
    sizes = ((2, 6, 5), (2, 3, 4), (2, 2, 3)) if case.levels else ((5, 4, 3),)
    is_by_sample = isinstance(case.active, tuple)  # each has its domain
    number = 2 if is_by_sample else 3
    other_sizes = ((number, 7, 3), (number, 2, 5), (number, 3, 2)) if case.levels else ((5, 6, 2),)
    features, others = (
        list(make_features(seed, size, torch.float32, names=case.names).values())
        for seed, size in enumerate((sizes, other_sizes))
    )

    axes = (0, 2, 3) if case.levels and not is_by_sample else (2, 3)
    with torch.no_grad():
        outputs = export(exporter, model, features, axes)(*others)
        for output, expected in zip(outputs, model(*others), strict=True):
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("exporter", ["jit.trace", "ONNX by TorchScript"])
@pytest.mark.parametrize("case", SOME_CASES)
def test_a_trace_computes_what_the_norm_does(case, exporter):
    for inference in ("population", "mini_batch"):
        check(exporter, dataclasses.replace(case, spec=case.spec.replace(inference=inference)))


@pytest.mark.slow  # the exporter takes 14 s
def test_the_exporter_to_onnx_takes_levels_of_one_mini_batch_and_of_any_size():
    (row1,) = pick_cases("levels-row1")
    check("ONNX", dataclasses.replace(row1.values[0], spec=NormSpec(**MINI_BATCH)))


@pytest.mark.slow
@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("case", CASES)
def test_every_export_computes_what_the_norm_does(case, exporter):
    for inference in ("population", "mini_batch")[case.spec.population == "none" :]:
        check(exporter, dataclasses.replace(case, spec=case.spec.replace(inference=inference)))


@pytest.mark.parametrize("exporter", ["jit.trace", "ONNX by TorchScript"])
@pytest.mark.parametrize("statistics", ["shared", "per_level"])
def test_a_single_element_has_the_population_wherever_it_comes(exporter, statistics):
    case = Case(NormSpec(statistics=statistics, **MINI_BATCH), LEVELS[:2])
    norm = randomize(LevelBatchNorm2d(NUM_CHANNELS, case.levels, case.spec))
    model = Positional(case, norm).eval()

    features = [torch.randn(2, NUM_CHANNELS, 4, 4), torch.randn(2, NUM_CHANNELS, 2, 2)]
    others = [torch.randn(1, NUM_CHANNELS, 2, 2), torch.randn(1, NUM_CHANNELS, 1, 1)]
    with torch.no_grad():
        outputs = export(exporter, model, features, (0, 2, 3))(*others)
        for output, expected in zip(outputs, model(*others), strict=True):
            torch.testing.assert_close(output, expected)


def test_a_program_that_was_exported_has_the_gradients():
    norm = randomize(LevelBatchNorm2d(NUM_CHANNELS, LEVELS, NormSpec(**MINI_BATCH))).eval()
    program = torch.export.export(copy.deepcopy(norm), (make_features(dtype=torch.float32),)).module()

    gradients = []
    for model in (norm, program):
        features = make_features(dtype=torch.float32, requires_grad=True)
        outputs = model(features)
        sum(output.pow(3).sum() for output in outputs.values()).backward()
        gradients.append([features[level].grad for level in LEVELS])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exporter", ["ONNX", "ONNX by TorchScript"])
def test_training_goes_to_onnx_by_the_mini_batch_and_is_told(exporter, caplog, monkeypatch):
    monkeypatch.setattr(notices, "_told_names", set())
    norm, feature = randomize(BatchNorm2d(NUM_CHANNELS)), torch.randn(5, NUM_CHANNELS, 4, 3) * 3 + 2
    state = copy.deepcopy(norm.state_dict())

    with caplog.at_level(logging.WARNING, logger="bnext"):
        (output,) = export(exporter, Positional(Case(NormSpec()), norm), [feature], (2, 3))(feature)
    torch.testing.assert_close(norm.state_dict(), state, rtol=0, atol=0)
    assert "training mode" in caplog.text

    with torch.no_grad():
        torch.testing.assert_close(output, norm(feature), rtol=1e-5, atol=1e-5)

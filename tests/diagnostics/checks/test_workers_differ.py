import pytest
import torch
from torch import nn

from bnext.diagnostics.collecting.read_norms import read_norms
from bnext.diagnostics.collecting.worker_differences import compare_workers
from bnext.diagnostics.facts import Facts
from tests.diagnostics.checks.configs import examine
from tests.diagnostics.checks.diagnosing import find
from tests.workers import run_workers


def look(rank):
    model = nn.Sequential(nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.BatchNorm2d(2))
    model[0].running_mean += rank
    model[0].running_var.fill_(4)
    model[2].running_mean.fill_(float("nan"))  # of all workers
    (evidence,) = find("BN022", model)
    differences = compare_workers(read_norms(model))

    model[1].running_mean[1] = float("nan") if rank else 0.0
    broken = compare_workers(read_norms(model))["1"]

    model[1].running_mean[1] = 0.0
    exec(evidence.remedy.call, {"model": model})
    return evidence.severity, evidence.layers, differences, broken, find("BN022", model)


def test_workers_compare_their_statistics():
    answers = run_workers(look, 2)

    assert answers == [("error", ("0",), {"0": 0.5, "1": 0.0, "2": 0.0}, float("inf"), [])] * 2


def test_alone_there_is_nobody_to_compare_with():
    assert compare_workers(read_norms(nn.BatchNorm2d(2))) is None


@pytest.mark.parametrize(
    ("distance", "severity"),
    [(0.0, None), (0.0009, None), (0.03, "note"), (0.1, "warning"), (0.25, "error"), (float("inf"), "error")],
)
def test_by_the_distance(distance, severity):
    found = examine("BN022", Facts((), worker_differences={"a": distance, "b": 0.0}))

    assert [evidence.severity for evidence in found] == ([severity] if severity else [])


def test_numbers_that_are_none_do_not_stop_it():
    norm = nn.BatchNorm2d(2)
    norm.running_var.fill_(-torch.inf)
    assert not examine("BN022", Facts(read_norms(norm)))

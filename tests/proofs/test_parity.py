"""A check of parity finds what is not: other numbers, another type, another memory format."""

import sys

import pytest
import torch
from torch import nn

from bnext.kernels import find_kernels_fault
from bnext.proofs.cases import CASES, LAYOUTS
from bnext.proofs.list_checks import list_checks
from bnext.proofs.parity import TOLERANCE, measure_difference, measure_parity

CPU = torch.device("cpu")
CASE = CASES["ghost"]
NHWC = LAYOUTS["NHWC"]


class Wrong(nn.Module):
    """A norm that is right in float64 alone."""

    def __init__(self, fault):
        super().__init__()
        self.norm, self.fault = CASE.build(), fault

    def forward(self, feature):
        output = self.norm(feature)
        return output if feature.dtype == torch.float64 else self.fault(output)


FAULTS = {
    "number": lambda output: output * 1.001,
    "NaN": lambda output: output / 0 * 0,
    "type": lambda output: output.float(),
    "format": lambda output: output.contiguous(),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
def test_a_fault_is_found(fault):
    features = CASE.draw(torch.float16, NHWC)
    assert measure_parity(CASE.build, CASE.call, features, CPU, training=True) <= TOLERANCE[torch.float16]
    half = partial_parity(fault, features)
    single = partial_parity(fault, CASE.draw(torch.float32, NHWC))
    assert max(half, single) > 10 * TOLERANCE[torch.float32]


def partial_parity(fault, features):
    return measure_parity(lambda: Wrong(fault), CASE.call, features, CPU, training=True)


def test_a_missing_number_is_an_error():
    with pytest.raises(KeyError):
        measure_difference({}, {"output": torch.ones(2)})


def test_kernels_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert not any("triton" in check.part for check in list_checks(torch.device("cuda")))


def test_a_gpu_is_asked_for_more_than_a_cpu():
    parts = [{check.part for check in list_checks(torch.device(device))} for device in ("cpu", "cuda")]
    of_compiler = {"parity, float16, compiled", "speed, compiled"} if find_kernels_fault("compiled") is None else set()
    assert {"waits", *of_compiler} <= parts[1] - parts[0]
    names = {check.name for check in list_checks(torch.device("cuda"))}
    assert {"CUDA graph, row 1", "SyncBN by torch's SyncBatchNorm, float16, NHWC"} <= names

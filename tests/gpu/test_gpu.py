"""Every check of `bnext check-gpu` that has a right answer, and the norms of all other tests, on a GPU."""

import pytest
import torch

from bnext.proofs import list_checks
from bnext.proofs.cases import DTYPES, LAYOUTS
from bnext.proofs.parity import TOLERANCE, measure_parity
from tests.cases import CASES

GPU = torch.device("cuda")
CHECKS = [check for check in list_checks(GPU) if not check.is_goal]


@pytest.mark.parametrize("check", CHECKS, ids=[f"{check.part}: {check.name}" for check in CHECKS])
def test_a_check(check):
    outcome = check.run(GPU)
    assert outcome.is_passed, outcome


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_parity_of_every_norm(case, dtype, layout):
    features = {name: x.to(dtype).contiguous(memory_format=layout) for name, x in case.inputs().items()}
    for training in (True, False):
        error = measure_parity(lambda: case.build(torch.float32), case.call, features, GPU, training)
        assert error <= TOLERANCE[dtype]

"""One thread: detectors this small are slower on two, and far slower when the threads must wait for a core."""

import pytest
import torch

from tests.detector_fixtures import bnext_log  # noqa: F401


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""A worker that fails, or never comes, ends the others with an error that names layer and rank: nobody hangs."""

import time

import pytest
import torch
from torch import nn

from bnext.errors import BNextError, WorkerError
from bnext.layers import BatchNorm2d, NormSpec, Shuffled, deal_statistics, name_norms
from tests.workers import run_workers

LIMIT = 2.0  # seconds that a worker waits for another


class Failing(nn.Module):
    """Fails on the second worker."""

    def __init__(self, where, rank):
        super().__init__()
        self.where, self.rank = where, rank

    def forward(self, x):
        if self.rank == 1 and self.where == "forward":
            raise KeyError("lost")
        if self.rank == 1 and self.where == "backward":
            x.register_hook(_fail)
        return x


def _fail(grad):
    raise KeyError("lost")


def make_head(form, where, rank):
    spec = NormSpec(workers="all" if form == "statistics" else "one")
    head = nn.Sequential()
    head.add_module("conv1", nn.Conv2d(3, 4, 1))
    head.add_module("norm1", BatchNorm2d(4, spec))
    head.add_module("between", Failing(where, rank))
    head.add_module("norm2", BatchNorm2d(4, spec))
    name_norms(head)
    if form == "statistics":
        deal_statistics(head)
        return head
    return Shuffled(head, where="roi_heads.box_head")


def run(rank, form, when):
    """How this worker ends: kind and text of the error, seconds."""
    head = make_head(form, when, rank)
    start = time.monotonic()
    try:
        if rank == 1 and when == "before":
            raise KeyError("lost")
        if rank == 1 and when == "never":
            time.sleep(LIMIT + 1.5)  # alive, but elsewhere
            return None
        output = head(torch.randn(4, 3, 2, 2, requires_grad=True))
        output.sum().backward()
    except (BNextError, KeyError) as error:
        return type(error), str(error), time.monotonic() - start
    return "nothing", "", 0.0


def nothing(rank):
    return rank


# Where the first worker waits when the second one is lost, in each form.
PLACES = {
    ("statistics", "before"): "norm1",
    ("statistics", "forward"): "norm2",
    ("statistics", "backward"): "backward of norm1",
    ("statistics", "never"): "norm1",
    ("features", "before"): "roi_heads.box_head",
    ("features", "forward"): "roi_heads.box_head",
    ("features", "backward"): "roi_heads.box_head",
    ("features", "never"): "roi_heads.box_head",
}


@pytest.mark.parametrize(("form", "when"), PLACES)
def test_the_others_end_and_say_where_and_on_which_worker(form, when):
    run_workers(nothing, 2)  # the processes are there before the time runs
    (kind, text, seconds), other = run_workers(run, 2, form, when, timeout=2 * LIMIT)
    assert kind is WorkerError
    assert f"got a failure on worker 0 of 2, which waited for another one ({PLACES[form, when]}: " in text
    assert seconds < LIMIT + 2
    assert other is None or other[0] is KeyError

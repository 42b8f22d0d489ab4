"""The choice of kernels, and those that torch's compiler makes."""

import sys

import pytest
import torch
from torch._dynamo.utils import counters

import bnext
from bnext import ConfigError, LevelBatchNorm2d, NormSpec, kernels
from bnext.kernels import compiled, cpu, use_kernels

LEVELS = ("p3", "p4", "p5")


def get_file():
    return kernels._choose(torch.ones(1)).file


@pytest.fixture(autouse=True)
def begin_with_torch(monkeypatch, request):
    """The choice of the process is back after each test; those that compile nothing need no compiler."""
    monkeypatch.setattr(kernels, "_kind", "torch")
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setenv("CXX", sys.executable)


def test_kernels_are_chosen_for_good_or_for_a_block():
    assert bnext.use_kernels is use_kernels
    with use_kernels("torch"):
        use_kernels("compiled")
        assert get_file() is compiled
        with use_kernels("torch"):
            assert get_file() is cpu
        assert get_file() is compiled
    assert get_file() is cpu


def test_a_block_puts_back_what_was_before_it_once():
    block = use_kernels("compiled")
    use_kernels("torch")
    with block:
        assert get_file() is compiled
    assert get_file() is cpu
    with pytest.raises(ConfigError, match="once"):
        block.__enter__()


def test_a_decorator_is_refused_and_chooses_nothing():
    with pytest.raises(ConfigError, match="decorator"):
        use_kernels("compiled")(get_file)
    assert get_file() is cpu


def test_unknown_kernels_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match="'cuda'"):
        use_kernels("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="CXX"):
        use_kernels("compiled")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ConfigError, match="triton"):
        use_kernels("triton")
    assert get_file() is cpu


def take_step(norm, features):
    """Outputs and gradients of features and affine."""
    features = {level: feature.clone().requires_grad_() for level, feature in features.items()}
    outputs = norm(features)
    torch.autograd.backward(list(outputs.values()), [output.detach().sin() for output in outputs.values()])
    gradients = [value.grad for value in (*features.values(), *norm.parameters())]
    norm.zero_grad()
    return [*outputs.values(), *gradients]


@pytest.mark.slow
def test_compiled_kernels_are_those_of_torch_and_take_all_sizes():
    """No size is compiled anew: twelve of them, in two memory formats and for two kinds of vectors."""
    specs = NormSpec.from_table5_row(1), NormSpec.from_table5_row(6), NormSpec(normalization_batch_size=2)
    norms = [LevelBatchNorm2d(8, LEVELS, spec) for spec in specs]
    graphs = []
    for size in range(12):
        sides = (2 * size + 16, 30 - size), (size + 8, 15), (5, 7)
        features = {level: torch.randn(size % 3 + 2, 8, *side) for level, side in zip(LEVELS, sides, strict=True)}
        for norm in norms:
            for layout in (torch.contiguous_format, torch.channels_last):
                inputs = {level: feature.to(memory_format=layout) for level, feature in features.items()}
                expected = take_step(norm, inputs)
                with use_kernels("compiled"):
                    torch.testing.assert_close(take_step(norm, inputs), expected, rtol=1e-4, atol=1e-4)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[1] > graphs[0] - 1 > 0

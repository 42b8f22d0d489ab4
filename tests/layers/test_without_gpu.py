"""Norms on CUDA, proved without one: no mixing of devices, no wait of the host in training, a bound on launches."""

import pytest
import torch

from bnext import BatchNorm2d, LevelBatchNorm2d, NormSpec, use_domain
from tests.cases import CASES, NUM_CHANNELS, SIZE, SIZES, pick_cases
from tests.fake_cuda import fake_cuda, move_to_fake_cuda, run_backward, taking_cuda_passes

LEVELS = ("p3", "p4", "p5", "p6", "p7")
MODES = [
    (True, torch.float32, torch.contiguous_format),
    (True, torch.float16, torch.channels_last),
    (False, torch.float32, torch.channels_last),
]  # training, type, memory format
every_case = pytest.mark.parametrize("case", CASES)
some_cases = pytest.mark.parametrize("case", pick_cases("ghost2", "renorm", "domains-mixed", "levels-row1"))


def build(case):
    if case.levels:
        return LevelBatchNorm2d(NUM_CHANNELS, case.levels, case.spec)
    return BatchNorm2d(NUM_CHANNELS, case.spec)


def make_inputs(case, device, layout, dtype=torch.float32):
    inputs = {}
    for name, (n, h, w) in zip(case.names, SIZES if case.levels else (SIZE,), strict=True):
        feature = torch.empty(n, NUM_CHANNELS, h, w, device=device, dtype=dtype)
        inputs[name] = feature.contiguous(memory_format=layout).requires_grad_()
    return inputs


@every_case
def test_every_norm_stays_on_the_device_and_lets_the_host_go_on(case):
    for training, dtype, layout in MODES:
        with fake_cuda() as launches:
            norm, inputs = move_to_fake_cuda(build(case)).train(training), make_inputs(case, "cuda", layout, dtype)
            launches.take()
            outputs = case.call(norm, inputs)
            gradients = run_backward(outputs.values())

        assert launches.waits == []
        for name, output in outputs.items():
            assert (output.device.type, output.dtype, output.shape) == ("cuda", dtype, inputs[name].shape)
            assert output.is_contiguous(memory_format=layout)
        assert {gradient.device.type for gradient in gradients} == {"cuda"}


@some_cases
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_cudas_passes_go_through_autograd(case, layout):
    with taking_cuda_passes():
        norm, inputs = build(case).to("meta"), make_inputs(case, "meta", layout)
        outputs = case.call(norm, inputs)
        sum(output.sum() for output in outputs.values()).backward()
    for feature in inputs.values():
        assert feature.grad.shape == feature.shape
        assert feature.grad.is_contiguous(memory_format=layout)
    assert all(parameter.grad is not None for parameter in case.used_parameters(norm))


def test_what_a_gpu_would_not_do_is_seen():
    """The proof is one: each of these would be found."""
    with fake_cuda() as launches:
        feature = torch.empty(2, 3, device="cuda")
        bool(feature.isfinite().all())
        torch.tensor([1.0], device="cuda")
        feature.cpu()
        assert len(launches.take()[1]) == 3
        with pytest.raises(RuntimeError, match="same device"):
            feature + torch.ones(3)


DOMAINS = ("day", "night")
PER_DOMAIN = NormSpec(**dict.fromkeys(("statistics", "population", "affine"), "per_domain"), domains=DOMAINS)
# Forward and backward of 4 images. Of five levels 20 launches read or write a feature,
# of one 4; torch's kernel for a mini-batch of its own has 2. The others handle [P, C] vectors.
BOUNDS = {
    "row 1": (NormSpec.from_table5_row(1), LEVELS, 48, 30),
    "row 6": (NormSpec.from_table5_row(6), LEVELS, 45, 10),
    "plain": (NormSpec(), (), 9, 2),
    "ghost": (NormSpec(normalization_batch_size=2), (), 56, 25),
    "domains": (PER_DOMAIN, (), 53, 25),
}


@pytest.mark.parametrize(("spec", "levels", "forward", "backward"), BOUNDS.values(), ids=list(BOUNDS))
def test_no_more_launches_than(spec, levels, forward, backward):
    with fake_cuda() as launches, use_domain(("day", "night", "night", "day")):
        norm = move_to_fake_cuda(LevelBatchNorm2d(8, levels, spec) if levels else BatchNorm2d(8, spec))
        features = {name: torch.empty(4, 8, 32, 32, device="cuda").requires_grad_() for name in levels or ("x",)}
        launches.take()

        outputs = norm(features) if levels else {"x": norm(features["x"])}
        counts = [launches.take()[0]]
        run_backward(outputs.values())
        counts.append(launches.take()[0])
    assert counts[0] <= forward
    assert counts[1] <= backward

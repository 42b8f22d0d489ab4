"""Norms in what people do with them on a GPU: mixed precision, DistributedDataParallel, CUDA graphs, a compiler.

Each is compared with the same norm without it.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bnext.layers import BatchNorm2d, NormSpec, deal_statistics
from bnext.proofs.cases import CASES, LAYOUTS, NUM_CHANNELS, Case, randomize
from bnext.proofs.check import Check
from bnext.proofs.parity import TOLERANCE, measure_difference, step
from bnext.statistics import recompute_population_statistics
from bnext.surgery import fold_norms

__all__ = ["in_world_of_one", "list_checks_of_uses"]

EXACT = TOLERANCE[torch.float32]
CAPTURED = ("ghost", "domains", "row 1", "row 6", "levels and domains")


def list_checks_of_uses(device: torch.device, quick: bool = False) -> list[Check]:
    """Checks of uses that make sense on a device."""
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    checks = [
        Check("uses", f"autocast to {str(half)[6:]}", partial(_measure_autocast, half), TOLERANCE[torch.bfloat16]),
        Check("uses", "re-estimated and folded", _measure_folding, 1e-4),
        Check("uses", "dealt statistics", _measure_deal, EXACT),
    ]
    if quick:
        return checks

    backend = "NCCL" if device.type == "cuda" else "gloo"
    checks.append(Check("uses", f"DistributedDataParallel, {backend}, one worker", _measure_ddp, EXACT))
    if device.type == "cuda":
        for name in CAPTURED:
            checks.append(Check("uses", f"CUDA graph, {name}", partial(_measure_graph, CASES[name]), EXACT))
    checks.append(Check("uses", "torch.compile, row 1", partial(_measure_compiled, CASES["row 1"]), EXACT))
    return checks


def _make_model(spec: NormSpec) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, NUM_CHANNELS, 3), BatchNorm2d(NUM_CHANNELS, spec), nn.ReLU())
    model.append(nn.Conv2d(NUM_CHANNELS, NUM_CHANNELS, 3)).append(BatchNorm2d(NUM_CHANNELS, spec))
    return model


def _draw_images(number: int, device: torch.device) -> Tensor:
    return torch.randn(number, 3, 12, 14, generator=torch.Generator().manual_seed(2)).to(device)


def _measure_autocast(dtype: torch.dtype, device: torch.device) -> float:
    model, images = _make_model(NormSpec(normalization_batch_size=2)).to(device), _draw_images(6, device)
    expected = model(images)

    with torch.autocast(device.type, dtype):
        output = model(images)
    if output.dtype != dtype:
        return float("inf")
    output.float().square().sum().backward()
    if not all(parameter.grad.isfinite().all() for parameter in model.parameters()):  # type: ignore[union-attr]
        return float("inf")
    return measure_difference({"output": output}, {"output": expected})


def _measure_folding(device: torch.device) -> float:
    """Statistics of batches in float32 on the device, and of the folded model, against float64 on the CPU."""
    outputs = []
    for place, dtype in ((device, torch.float32), (torch.device("cpu"), torch.float64)):
        model = _make_model(NormSpec()).to(place, dtype)
        recompute_population_statistics(model, [_draw_images(n, place).to(dtype) for n in (4, 6)])
        fold_norms(model.eval())
        outputs.append(model(_draw_images(3, place).to(dtype)))
    return measure_difference({"output": outputs[0]}, {"output": outputs[1]})


def _measure_deal(device: torch.device) -> float:
    """RoIs are dealt out by a generator on the CPU, so that both places deal alike."""
    numbers = []
    for place, dtype in ((device, torch.float32), (torch.device("cpu"), torch.float64)):
        head = nn.Sequential(randomize(BatchNorm2d(NUM_CHANNELS))).to(place, dtype)
        deal_statistics(head, num_groups=4)
        rois = torch.randn(23, NUM_CHANNELS, 7, 7, generator=torch.Generator().manual_seed(3)).to(place, dtype)
        torch.manual_seed(4)
        numbers.append(step(head, lambda norm, features: {"x": norm(features["x"])}, {"x": rois}))
    return measure_difference(*numbers)


def _step_on(device: torch.device, case: Case, norm: Any, layout: str = "NCHW") -> dict[str, Tensor]:
    features = case.draw(torch.float32, LAYOUTS[layout])
    return step(norm, case.call, {name: feature.to(device) for name, feature in features.items()})


@contextlib.contextmanager
def in_world_of_one(device: torch.device) -> Iterator[None]:
    """In this scope this process is the one worker of a world."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def _measure_ddp(device: torch.device) -> float:
    case = CASES["row 1"]
    expected = _step_on(device, case, case.build().to(device))
    with in_world_of_one(device):
        ids = [device.index or 0] if device.type == "cuda" else None
        actual = _step_on(device, case, DistributedDataParallel(case.build().to(device), device_ids=ids))
    return measure_difference({name.replace(" module.", " "): value for name, value in actual.items()}, expected)


def _measure_compiled(case: Case, device: torch.device) -> float:
    expected = _step_on(device, case, case.build().to(device))
    actual = _step_on(device, case, torch.compile(case.build().to(device)))
    return measure_difference({name.replace(" _orig_mod.", " "): value for name, value in actual.items()}, expected)


def _measure_graph(case: Case, device: torch.device) -> float:
    """A step that was captured, replayed on other features, against the same steps without a graph."""
    norm = case.build().to(device)
    first = {name: x.to(device) for name, x in case.draw(torch.float32, LAYOUTS["NCHW"]).items()}
    second = {name: 3 * x + 1 for name, x in first.items()}
    inputs = {name: x.clone().requires_grad_() for name, x in first.items()}

    def run() -> dict[str, Tensor]:
        outputs = case.call(norm, inputs)
        total = torch.stack([(output**3).sum() for output in outputs.values()]).sum()
        return {**outputs, **dict(zip(inputs, torch.autograd.grad(total, list(inputs.values())), strict=True))}

    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for name, feature in second.items():
        inputs[name].detach().copy_(feature)
    graph.replay()
    actual = {name: value.detach().clone() for name, value in captured.items()}

    expected = {name: value.detach().clone() for name, value in run().items()}
    return measure_difference(actual, expected)

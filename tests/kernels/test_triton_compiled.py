"""Triton's kernels compile for GPUs, on a machine that needs none."""

import importlib.util
import re
import subprocess

import pytest
import torch

from bnext import kernels
from bnext.kernels import cpu, cuda, triton_passes, use_kernels
from bnext.kernels.triton_passes import TritonPasses

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

LAYOUTS = [torch.contiguous_format, torch.channels_last]
# Two images of a detector's levels, the smaller of which cannot be read in 16 bytes; and RoIs.
LEVELS = [(2, 256, 96, 168), (2, 256, 48, 84), (2, 256, 13, 21)]
OTHER_LEVELS = [(2, 256, 80, 104), (2, 256, 40, 52), (2, 256, 7, 10)]
ROIS = [(512, 256, 7, 7)]


class Driver:
    """What Triton asks of a GPU before it launches something."""

    def __init__(self, architecture):
        self.architecture = architecture

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self):
        return self.architecture  # for Triton keeps what it compiled for each device

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compile_passes(monkeypatch, tmp_path):
    """All five passes, compiled instead of launched; gives the kernels, each with its name."""
    import triton

    from bnext.kernels import triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile_them(architecture, shapes, dtype, layout, parts):
        compiled = []

        def compile_it(name, num_programs, *arguments, **constants):
            kernel = getattr(triton_kernels, name)
            compiled.append((name, kernel.run(*arguments, **constants, grid=(num_programs,), warmup=True)))

        monkeypatch.setattr(triton.runtime.driver, "_active", Driver(architecture))
        monkeypatch.setattr(triton_passes, "_start", compile_it)
        passes = TritonPasses(cuda)
        features = [torch.empty(shape, dtype=dtype).to(memory_format=layout) for shape in shapes]
        wide = torch.promote_types(dtype, torch.float32)
        vectors = [torch.empty(5, features[0].shape[1], dtype=wide) for _ in range(4)]
        passes.feature_statistics(features)
        passes.scale_and_shift(features, parts, *vectors[:3])
        passes.backward_sums(features, features, parts, vectors[0])
        passes.feature_gradients(features, features, parts, *vectors)
        return compiled

    return compile_them


def count_spills(kernel, architecture):
    """Bytes that a program writes to memory for want of registers, and its registers."""
    from triton import knobs

    suffix = "a" if architecture >= 90 else ""
    command = [knobs.nvidia.ptxas.path, "-v", f"--gpu-name=sm_{architecture}{suffix}", "-", "-o", "/dev/null"]
    report = subprocess.run(command, input=kernel.asm["ptx"], capture_output=True, text=True, check=True).stderr
    return int(re.search(r"(\d+) bytes spill stores", report)[1]), int(re.search(r"Used (\d+) registers", report)[1])


def check_code(compiled, has_aligned):
    for name, kernel in compiled:
        code = kernel.asm["ptx"]
        assert not re.search(r"\b(atom|red)\.", code), f"{name} adds in whatever order programs come"
        if has_aligned and name in ("take_statistics", "sum_tiles", "transform"):
            assert "ld.global.v4.b32" in code, name
        if has_aligned and name == "transform":
            assert "st.global.v4.b32" in code


def test_kernels_are_compiled_once_for_all_sizes(compile_passes):
    compiled = compile_passes(80, LEVELS, torch.float16, LAYOUTS[0], [0, 1, 2])
    again = compile_passes(80, OTHER_LEVELS, torch.float16, LAYOUTS[0], [2, 1, 4])
    assert [name for name, _ in compiled] == [
        "take_statistics", "merge_statistics", "transform", "sum_tiles", "merge_sums", "transform"
    ]  # fmt: skip
    assert {id(kernel) for _, kernel in compiled} == {id(kernel) for _, kernel in again}
    check_code(compiled, has_aligned=True)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", [80, 90])
def test_no_kernel_spills(compile_passes, architecture, dtype, layout):
    levels = compile_passes(architecture, LEVELS, dtype, layout, [0, 1, 2])
    check_code(levels, has_aligned=True)
    rois = compile_passes(architecture, ROIS, dtype, layout, [torch.zeros(512, dtype=torch.long)])
    check_code(rois, has_aligned=layout == torch.channels_last)
    for name, kernel in levels + rois:
        spills, registers = count_spills(kernel, architecture)
        assert spills == 0, name
        assert registers <= 128, name


def test_triton_is_for_gpus():
    """A CPU keeps its passes, unless Triton's interpreter is there."""
    with use_kernels("triton"):
        assert kernels._choose(torch.ones(1)).file is cpu
        assert not kernels.joins_features(torch.ones(1))

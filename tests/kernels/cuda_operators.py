"""torch's batch norm kernels that exist for CUDA alone, in Python: for a CPU, where they have numbers, and for shapes.

They take what the kernels take and refuse what those would refuse or read wrong, as written in ATen's
native/cuda/Normalization.cu and .cuh: vectors [C] in the type that the feature is accumulated in, one after another in
memory; a count in int32; gradients in the type of their feature and, as older versions take it for granted, in its
memory format.
"""

import contextlib

import torch

__all__ = ["registered"]


@contextlib.contextmanager
def registered():
    """A scope in which they are torch's operators, of CPU tensors and of those without numbers."""
    functions = batch_norm_update_stats, batch_norm_elemt, batch_norm_backward_reduce, batch_norm_backward_elemt
    with torch.library._scoped_library("aten", "IMPL") as library:
        for function in functions:
            for device in ("CPU", "Meta"):
                library.impl(function.__name__, function, device)
        yield


def batch_norm_update_stats(input, running_mean, running_var, momentum):
    assert running_mean is None
    assert running_var is None
    assert input.numel()
    wide = input.to(_accumulation(input))
    dims = [0, *range(2, input.dim())]
    return wide.mean(dims), wide.var(dims, correction=0)


def batch_norm_elemt(input, weight, bias, mean, invstd, eps):
    _check_vectors(input, weight, bias, mean, invstd)
    assert input.numel()
    output = (input.to(mean.dtype) - _along(mean, input)) * _along(invstd, input)
    if weight is not None:
        output = output * _along(weight, input)
    if bias is not None:
        output = output + _along(bias, input)
    return _like(output, input)


def batch_norm_backward_reduce(grad_out, input, mean, invstd, weight, input_g, weight_g, bias_g):
    assert (input_g, weight_g, bias_g) == (True, False, False)
    _check_vectors(input, weight, mean, invstd)
    _check_gradient(grad_out, input)
    dims = [0, *range(2, input.dim())]
    dy, centered = grad_out.to(mean.dtype), input.to(mean.dtype) - _along(mean, input)
    nothing = mean.new_empty(0)
    return dy.sum(dims), (dy * centered).sum(dims), nothing, nothing.clone()


def batch_norm_backward_elemt(grad_out, input, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    _check_vectors(input, weight, mean, invstd, sum_dy, sum_dy_xmu)
    _check_gradient(grad_out, input)
    assert count.dtype == torch.int32
    assert count.dim() == 1
    share = 1 / count.sum().to(mean.dtype)
    slope = _along(invstd.square() * sum_dy_xmu * share, input)
    centered = input.to(mean.dtype) - _along(mean, input)
    gradient = grad_out.to(mean.dtype) - _along(sum_dy * share, input) - centered * slope
    return _like(gradient * _along(weight * invstd, input), input)


def _accumulation(input):
    return torch.promote_types(input.dtype, torch.float32)


def _check_vectors(input, *vectors):
    for vector in vectors:
        if vector is not None:
            assert vector.shape == input.shape[1:2]
            assert vector.dtype == _accumulation(input)
            assert vector.is_contiguous()


def _check_gradient(grad_out, input):
    assert input.numel()
    assert grad_out.shape == input.shape
    assert grad_out.dtype == input.dtype
    for layout in (torch.contiguous_format, torch.channels_last):
        if input.is_contiguous(memory_format=layout):
            assert grad_out.is_contiguous(memory_format=layout)


def _along(vector, input):
    return vector.view(-1, *[1] * (input.dim() - 2))


def _like(output, input):
    is_last = not input.is_contiguous() and input.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_last else torch.contiguous_format
    return output.to(input.dtype).contiguous(memory_format=layout)

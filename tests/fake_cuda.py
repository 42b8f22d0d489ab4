"""CUDA without a GPU: fake tensors, which have devices and shapes but no numbers, in the passes that CUDA has.

A computation that mixes devices fails there, and so does one that reads a value; what would be launched is counted.
"""

import contextlib
from collections import Counter
from unittest import mock

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bnext import kernels
from tests.kernels.cuda_operators import registered

__all__ = ["Launches", "fake_cuda", "move_to_fake_cuda"]

aten = torch.ops.aten
# Kernels of an operator, where they are not one. Of inference torch's batch norm copies a mean and inverts a variance.
_LAUNCHES = {aten.index_add: 2, aten.native_batch_norm: 3, aten._unsafe_view: 0}


@contextlib.contextmanager
def fake_cuda():
    """A scope in which new tensors are fake, and those of CUDA take CUDA's passes; gives the counter of launches."""
    with registered(), mock.patch.object(kernels, "has_numbers", lambda tensor: True), FakeTensorMode():
        with Launches() as launches:
            yield launches


def move_to_fake_cuda(module):
    """In place, and within `fake_cuda`; torch's own `cuda()` cannot change a tensor's kind where something refers to it."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype, device="cuda")
            part._parameters[name] = torch.nn.Parameter(fake, parameter.requires_grad)
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cuda")
    return module


class Launches(TorchDispatchMode):
    """Counts what a GPU would be asked to do.

    Attributes:
        kernels: operator -> launches.
        copies: descriptions of copies between the host and the device, for which the host waits.
    """

    def __init__(self):
        super().__init__()
        self.kernels, self.copies = Counter(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))

        inputs = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        devices = {leaf.device.type for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)}
        if "copy" in function._schema.name and len(inputs | devices) > 1:
            self.copies.append(f"{function} {inputs} -> {devices}")
        if "cuda" in devices and not function.is_view and "empty" not in function._schema.name:
            packet = function.overloadpacket
            self.kernels[str(packet)] += _LAUNCHES.get(packet, 1)
        return outputs

    def take(self):
        """The number of launches since it was asked last, and the copies."""
        number, copies = self.kernels.total(), list(self.copies)
        self.kernels.clear()
        self.copies.clear()
        return number, copies

import torch
from torch import nn

import bnext
from bnext.diagnostics.collecting.read_norms import find_folded, read_norms


class Conv(nn.Conv2d):
    """A convolution that owns its norm, as detectron2's."""

    def __init__(self):
        super().__init__(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)


def test_the_layer_before_a_norm_says_whether_it_is_trained():
    model = nn.Sequential(nn.BatchNorm2d(3), Conv(), nn.ReLU(), nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model[3][0].requires_grad_(False)

    assert [norm.is_after_trained for norm in read_norms(model)] == [None, True, False]


def test_what_a_norm_holds_besides():
    class Wide(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + self.shift

    norm = Wide(3)
    norm.register_buffer("shift", torch.zeros(1))
    norm.register_forward_hook(lambda *_: None)

    plain, wide = read_norms(nn.Sequential(nn.BatchNorm2d(3).half(), norm))

    assert (plain.has_own_forward, plain.extras, plain.dtype) == (False, (), "float16")
    assert (wide.has_own_forward, wide.extras, wide.dtype) == (True, ("shift", "hooks"), "float32")


def test_folded_norms_and_those_that_became_nothing():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Identity()).eval()
    folded = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Identity(), nn.Identity())

    assert find_folded(folded) == ()
    assert find_folded(folded, model) == ("1",)
    bnext.fold_norms(model)
    assert find_folded(model) == ("1",)


def test_a_norm_without_channels_yet_has_no_values():
    (norm,) = read_norms(nn.Sequential(nn.LazyBatchNorm2d()))

    assert not norm.populations
    assert not norm.affines

"""Heads on CUDA, proved without one: no mixing of devices, and no wait of the host in training."""

import pytest
import torch

from bnext import use_domain
from tests.fake_cuda import fake_cuda, move_to_fake_cuda, taking_cuda_passes
from tests.heads.detectors import make_detector, make_model, shuffle_pairs

DENSE = {
    "retinanet": ("head", {"row": 1}),
    "retinanet, own statistics": ("head", {"row": 6}),
    "fcos": ("head", {"architecture": "BNextFCOS", "row": 1}),
}
ROI_NORMS = (
    "MODEL.ROI_BOX_HEAD.NORM",
    "BN",
    "MODEL.ROI_MASK_HEAD.NORM",
    "BN",
    "MODEL.BNEXT.ROI_KEYPOINT_HEAD.NORM",
    "BN",
)
RPN = ("MODEL.BNEXT.RPN.NORM", "BN", "MODEL.BNEXT.RPN.STATISTICS", "shared")
DEAL = shuffle_pairs("statistics", "ROI_BOX_HEAD", "ROI_MASK_HEAD")


def make_pyramid(device, channels):
    sides = (32, 16, 8, 4, 2)
    return [torch.empty(2, channels, side, side, device=device).requires_grad_() for side in sides]


def list_tensors(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [tensor for part in outputs for tensor in list_tensors(part)]


def check(head, call, inputs):
    """In training and evaluation on fake CUDA; then backward through CUDA's passes on the meta device."""
    for training in (True, False):
        with fake_cuda() as launches:
            move_to_fake_cuda(head).train(training)
            given = inputs("cuda")
            launches.take()
            outputs = list_tensors(call(given))
            number, waits = launches.take()
        assert {output.device.type for output in outputs} == {"cuda"}
        assert number > 0
        assert waits == []

    with taking_cuda_passes():
        for module in head.modules():
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: to_meta(tensor) for name, tensor in tensors.items() if tensor is not None})
        given = inputs("meta")
        sum(output.sum() for output in list_tensors(call(given))).backward()
    assert all(feature.grad is not None for feature in (given if isinstance(given, list) else [given]))


def to_meta(tensor):
    meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return torch.nn.Parameter(meta, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else meta


@pytest.mark.parametrize(("name", "arguments"), DENSE.values(), ids=list(DENSE))
def test_a_dense_head(name, arguments):
    head = make_detector(**arguments).get_submodule(name)
    check(head, head, lambda device: make_pyramid(device, 32))


def test_heads_of_a_two_stage_detector():
    model = make_model(*ROI_NORMS, *DEAL, *RPN)
    rpn_head = model.proposal_generator.rpn_head
    check(rpn_head, rpn_head, lambda device: make_pyramid(device, 16))

    for name in ("box_head", "mask_head", "keypoint_head"):
        head = model.roi_heads.get_submodule(name)
        call = getattr(head, "layers", head)
        check(head, call, lambda device: torch.empty(7, 16, 7, 7, device=device).requires_grad_())


def test_rois_of_each_image_at_inference():
    """Their numbers travel while the host goes on."""
    rois = make_model(*ROI_NORMS, "MODEL.BNEXT.ROI_BOX_HEAD.INFERENCE", "mini_batch").roi_heads.eval()
    with fake_cuda() as launches:
        head = move_to_fake_cuda(rois.box_head)
        for tell in rois.box_pooler._forward_pre_hooks.values():
            tell(rois.box_pooler, (), {"box_lists": [range(3), range(4)]})
        output = head(torch.empty(7, 16, 7, 7, device="cuda"))
    assert output.device.type == "cuda"
    assert launches.waits == []


def test_rois_dealt_out_by_image_and_domain():
    pairs = ("MODEL.BNEXT.ROI_BOX_HEAD.STATISTICS", "per_domain", "MODEL.BNEXT.ROI_BOX_HEAD.POPULATION", "per_domain")
    names = ("MODEL.BNEXT.DOMAINS.NAMES", "('day', 'night')")
    head = make_model(
        *ROI_NORMS, *DEAL, *pairs, *names, "MODEL.BNEXT.ROI_BOX_HEAD.SHUFFLE_GROUPS", 3
    ).roi_heads.box_head
    with use_domain("night"):
        check(head, head, lambda device: torch.empty(7, 16, 7, 7, device=device).requires_grad_())

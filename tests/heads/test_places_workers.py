"""SyncBN at every place, on a CPU: two gloo workers equal one process on the whole batch."""

import torch

from tests.heads.detectors import make_batch, make_model
from tests.workers import run_workers

PAIRS = ("MODEL.RESNETS.NORM", "SyncBN", "MODEL.FPN.NORM", "SyncBN", "MODEL.BNEXT.RPN.NORM", "SyncBN")


def run_backbone(part=slice(None)):
    """Features, and all gradients of their mean square over the whole batch, in float64."""
    model = make_model(*PAIRS, architecture="BNextProposalNetwork").double().train()
    images = torch.stack([record["image"].double() for record in make_batch((64, 64, 64))]) / 255
    features = model.backbone(images[part])
    logits, _ = model.proposal_generator.rpn_head([features[f"p{level}"] for level in range(2, 7)])
    sum(value.square().sum() for value in (*features.values(), *logits)).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: value for name, value in model.state_dict().items() if "running" in name}
    return {name: value.detach() for name, value in features.items()}, gradients, buffers


def run_part(rank):
    return run_backbone(slice(0, 1) if rank == 0 else slice(1, 3))  # one image and two


def test_features_gradients_and_buffers_of_uneven_workers():
    expected, expected_gradients, expected_buffers = run_backbone()
    (first, gradients, buffers), (second, more, same) = run_workers(run_part, 2)
    close = {"rtol": 1e-9, "atol": 1e-9}
    for name, value in expected.items():
        torch.testing.assert_close(torch.cat([first[name], second[name]]), value, **close)
    assert len(expected_gradients) > 150
    for name, value in expected_gradients.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(gradients[name] + more[name], value, rtol=0, atol=1e-9 * scale + 1e-12)
    assert len(expected_buffers) == 2 * (53 + 8 + 5)
    for name, value in expected_buffers.items():
        torch.testing.assert_close(buffers[name], value, **close)
        assert torch.equal(buffers[name], same[name])


def train_everywhere(rank):
    places = ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD", "SEM_SEG_HEAD")
    pairs = [item for place in places for item in (f"MODEL.{place}.NORM", "SyncBN")]
    pairs += ["MODEL.BNEXT.RPN.NORM", "SyncBN", "MODEL.BNEXT.ROI_KEYPOINT_HEAD.NORM", "SyncBN"]
    from tests.heads.detectors import run_step

    model = make_model(*pairs)
    batch = make_batch((64, 96), seed=rank)
    if rank:  # no object: its mask and keypoint heads get no RoI
        batch = batch[:1]
        batch[0]["instances"] = batch[0]["instances"][:0]
    losses, _ = run_step(model, batch)
    return {key: float(value) for key, value in losses.items()}, {
        name: value for name, value in model.state_dict().items() if "running" in name
    }


def test_a_worker_without_an_object_trains_along():
    (losses, buffers), (others, same) = run_workers(train_everywhere, 2)
    assert losses.keys() == others.keys()
    assert all(torch.isfinite(torch.tensor(list(part.values()))).all() for part in (losses, others))
    assert all(torch.equal(value, same[name]) for name, value in buffers.items())

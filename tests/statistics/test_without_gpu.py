"""Statistics of a model on CUDA, proved without one: no mixing of devices; where the host waits is known."""

import pytest
import torch
from torch import nn

from bnext import LevelBatchNorm2d, NormSpec, following_stream, recompute_population_statistics
from bnext.statistics.mini_batch_inference import normalizing_evaluation_by_mini_batch
from tests.cases import LEVELS, NUM_CHANNELS
from tests.fake_cuda import fake_cuda, move_to_fake_cuda

NUM_BATCHES, NUM_SETS = 4, 4  # of running statistics: the first norm's, and one for each level
WAITS = 9  # for a set and a batch at most, those of the report included


class Net(nn.Module):
    """A norm of torch's, and one of ours over levels."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm2d(NUM_CHANNELS)
        self.second = LevelBatchNorm2d(NUM_CHANNELS, LEVELS, NormSpec.from_table5_row(4))

    def forward(self, image):
        feature = self.first(image)
        return self.second({level: feature[..., :: index + 1] for index, level in enumerate(LEVELS)})


def make_images():
    return [torch.empty(2, NUM_CHANNELS, 9, 8, device="cuda") for _ in range(NUM_BATCHES)]


@pytest.mark.parametrize("estimator", ["pooled", "layer_by_layer"])
def test_a_re_estimation(estimator):
    """It asks whether the moments of each batch are finite, and how many elements they are of."""
    with fake_cuda() as launches:
        model, images = move_to_fake_cuda(Net()).eval(), make_images()
        launches.take()
        recompute_population_statistics(model, images, estimator=estimator)
        _, waits = launches.take()
    assert len(waits) <= WAITS * NUM_BATCHES * NUM_SETS


def test_inference_by_mini_batches_and_in_a_stream():
    with fake_cuda() as launches, torch.no_grad():
        model, images = move_to_fake_cuda(Net()).eval(), make_images()
        launches.take()
        with normalizing_evaluation_by_mini_batch(model):
            outputs = model(images[0])
        assert launches.take()[1] == []

        with following_stream(model):
            for image in images:
                outputs = model(image)
        assert len(launches.take()[1]) <= WAITS * NUM_BATCHES * NUM_SETS
    assert {output.device.type for output in outputs.values()} == {"cuda"}

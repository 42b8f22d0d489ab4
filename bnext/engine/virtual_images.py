"""Virtual BN in a training: images that are run forward only and enlarge every mini-batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

from bnext.data.loader import TrainLoader, build_train_loader
from bnext.errors import ConfigError
from bnext.heads import forward_statistics
from bnext.layers import virtual_samples
from bnext.layers.walk import find_bnext_norms
from bnext.seeding import Purpose, derive_seed, seeded

__all__ = ["VirtualImages", "build_virtual_images"]


class VirtualImages(HookBase):
    """Enlarges the mini-batches of every step by images of their own; see `virtual_samples`.

    Anchors, matching and losses of a dense detector are left out for them. What the model draws at random and
    what it reports is as without them. Once all statistics are frozen they are no longer run.

    Args:
        model: the detector, without DistributedDataParallel.
        loader: gives this worker's virtual images of each iteration.
        uses_amp: whether the training runs under autocast.
    """

    def __init__(self, model: nn.Module, loader: Any, uses_amp: bool = False) -> None:
        self._model = model
        self._loader = loader
        self._uses_amp = uses_amp
        self._batches: Iterator[Any] = iter(())
        self._scope = ExitStack()

    def before_train(self) -> None:
        if isinstance(self._loader, TrainLoader):
            self._loader.sampler.seed = derive_seed(self.trainer.seed, Purpose.LOAD_VIRTUAL)
            self._loader.sampler.start_iteration = self.trainer.start_iter

        self._batches = iter(self._loader)

    def before_step(self) -> None:
        images = next(self._batches)  # also where they are not needed: a resume counts iterations

        if any(norm.uses_mini_batch for norm in find_bnext_norms(self._model).values()):
            self._scope.enter_context(virtual_samples(self._model, images, forward=self._run))

    def _run(self, model: nn.Module, images: Any) -> None:
        seed = derive_seed(self.trainer.seed, Purpose.RUN_VIRTUAL, self.trainer.iter, comm.get_rank())
        device = next(model.parameters()).device.type

        with seeded(seed), EventStorage(self.trainer.iter), torch.autocast(device, enabled=self._uses_amp):
            if isinstance(model, DenseDetector):
                forward_statistics(model, images)
            else:
                model(images)

    def after_step(self) -> None:
        self._scope.close()

    def after_train(self) -> None:
        self._scope.close()  # of a step that failed


def build_virtual_images(cfg: CfgNode, model: nn.Module) -> list[VirtualImages]:
    """The hook that SOLVER.BNEXT.VIRTUAL_IMAGES asks for, if it does.

    Raises:
        ConfigError: the model has no norm that it could enlarge, or the images cannot be dealt to the workers.
    """
    number = cfg.SOLVER.BNEXT.VIRTUAL_IMAGES
    num_workers = comm.get_world_size()
    if number == 0:
        return []

    if number < 0 or number % num_workers:
        raise ConfigError.of(
            "SOLVER.BNEXT.VIRTUAL_IMAGES",
            f"be 0 or a multiple of the {num_workers} workers",
            got=number,
            where="config",
            remedy="Give every worker as many images.",
        )
    if not any(norm.uses_mini_batch for norm in find_bnext_norms(model).values()):
        raise ConfigError.of(
            "SOLVER.BNEXT.VIRTUAL_IMAGES",
            "be 0 in a model without a norm of bnext that uses mini-batches",
            got=number,
            where="config",
            remedy="Set a NORM to BN or SyncBN in one of bnext's architectures, or remove the key.",
        )

    loader_cfg = cfg.clone()
    loader_cfg.defrost()
    loader_cfg.SOLVER.IMS_PER_BATCH, loader_cfg.SOLVER.BNEXT.ACCUMULATE = number, 1
    return [VirtualImages(model, build_train_loader(loader_cfg), cfg.SOLVER.AMP.ENABLED)]

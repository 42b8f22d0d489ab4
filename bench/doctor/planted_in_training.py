"""Faults that only a running training, several workers, domains or an evaluation show: one a model, as in `planted`."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torchvision import models

import bnext
from bench.doctor.case import Case, draw_images, patient, train
from bench.doctor.planted import SmallNet, classify, find_norms, make_resnet
from bnext.diagnostics import Diagnosis

__all__: list[str] = []

_NUM_STEPS = 24


Between = Callable[[nn.Module], object]


def watch_training(model: nn.Module, between: Between | None = None) -> Case:
    """A case whose diagnosis is that of a training; `between` is called with the model after each step."""
    case = classify(model)
    case.diagnose = partial(_diagnose_training, case, between)
    return case


def _diagnose_training(case: Case, between: Between | None) -> Diagnosis:
    model = copy.deepcopy(case.model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    watch = bnext.TrainingWatch(model)

    for step in range(_NUM_STEPS):
        number = step % len(case.data)
        with watch.step(step):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(case.data[number]), case.labels[number]).backward()
            optimizer.step()
        if between is not None:
            between(model)
    return watch.diagnose(optimizer=optimizer)


# ---- what updates statistics


class CheckpointedNet(SmallNet):
    """Its body is run again in the backward pass."""

    def forward(self, images: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, images, use_reentrant=False).mean((2, 3)))


@patient("BN015", "torch", "activation checkpointing")
def _() -> Case:
    return watch_training(CheckpointedNet())


@patient("BN015", "torchvision", "a stage of ResNet-18 checkpointed")
def _() -> Case:
    model = make_resnet()
    stage: Any = model.layer2
    stage.forward = partial(checkpoint, stage.forward, use_reentrant=False)
    return watch_training(model)


class BranchedNet(SmallNet):
    """A branch with a norm that the training never takes."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Conv2d(32, 32, 1, bias=False), nn.BatchNorm2d(32))

    def forward(self, images: Tensor) -> Tensor:
        feature = self.body(images)
        return self.head((feature if self.training else self.branch(feature)).mean((2, 3)))


@patient("BN016", "torch", "a branch that the training never takes")
def _() -> Case:
    return watch_training(BranchedNet())


def validate(model: nn.Module) -> None:
    """In training mode, as a detector gives its losses in no other."""
    batches, _ = draw_images(num_batches=1, seed=1)
    with torch.no_grad():
        model(batches[0] + 2)


@patient("BN025", "torch", "a validation loss in training mode")
def _() -> Case:
    return watch_training(SmallNet(), between=validate)


@patient("BN025", "torchvision", "the same with MobileNet")
def _() -> Case:
    return watch_training(models.mobilenet_v3_small(num_classes=4), between=validate)


# ---- an evaluation


@patient("BN021", "torch", "statistics moved after the training, AP by three kinds")
def _() -> Case:
    case = train(classify(SmallNet()), num_steps=60)
    for norm in find_norms(case.model):
        norm.running_mean += 2 * norm.running_var.sqrt()
    images, labels = torch.cat(list(case.data)), torch.cat(list(case.labels))

    def evaluate(model: nn.Module) -> float:
        with torch.no_grad():
            return 100 * float((model(images).argmax(1) == labels).float().mean())

    case.options = {"depth": "full", "evaluate": evaluate}
    return case


# ---- domains


@patient("BN024", "torch", "statistics per domain for domains that are alike")
def _() -> Case:
    names = ("first", "second")
    spec = bnext.NormSpec(statistics="per_domain", population="per_domain", domains=names)
    model = SmallNet(lambda channels: bnext.BatchNorm2d(channels, spec))
    data, _ = draw_images(num_batches=8)
    domains = {name: data[number::2] for number, name in enumerate(names)}

    with torch.no_grad():
        for _ in range(20):
            for name, batches in domains.items():
                with bnext.use_domain(name):
                    model.train()(torch.cat(batches))
    return Case(model, options={"domains": domains})


# ---- workers


def _work(rank: int, model: nn.Module, folder: str) -> None:
    """A worker that trains by its own images, and says what the doctor finds."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    case = classify(copy.deepcopy(model))  # the tensors that it comes with are shared with the other worker
    case.data = [images + 2 * rank for images in case.data]
    diagnosis = bnext.diagnose(train(case).model)
    if rank == 0:
        Path(folder, "diagnosis").write_bytes(pickle.dumps(diagnosis))
    distributed.destroy_process_group()


def _diagnose_workers(model: nn.Module) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        spawn(_work, (model, folder), nprocs=2)
        return pickle.loads(Path(folder, "diagnosis").read_bytes())


@patient("BN022", "torch", "two workers, each with its own statistics")
def _() -> Case:
    case = classify(SmallNet())
    case.diagnose = partial(_diagnose_workers, case.model)
    return case


class OptionalNet(SmallNet):
    """Its last norm is called for every second batch only."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.BatchNorm2d(32)

    def forward(self, images: Tensor) -> Tensor:
        feature = self.body(images)
        is_bright = bool(images.mean() > 0)
        return self.head((self.extra(feature) if is_bright else feature).mean((2, 3)))


def _diagnose_wrapped(case: Case) -> Diagnosis:
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        return bnext.diagnose(DistributedDataParallel(copy.deepcopy(case.model)), case.data)
    finally:
        distributed.destroy_process_group()


@patient("BN028", "torch", "a norm that some steps leave out, in DistributedDataParallel")
def _() -> Case:
    case = classify(OptionalNet())
    case.data = [images + (0.5 if number % 2 else -0.5) for number, images in enumerate(case.data)]
    case.diagnose = partial(_diagnose_wrapped, case)
    return case

"""All that a checkpoint holds of a training beside weights and optimizer: a resume is exact, or says why not.

And the folder that a training writes into, which may hold the files of an earlier one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn
from torch.optim import Optimizer

from bnext.engine.optimizer import name_optimizer
from bnext.errors import CheckpointError, LaunchError, Refusal
from bnext.files import find_local_file
from bnext.lazy_config import is_lazy
from bnext.numbers import is_count

__all__ = [
    "check_output_files",
    "check_training_state",
    "collect_training",
    "compare_training",
    "drop_half_line",
    "expect_same_optimizer",
    "read_normalizers",
    "read_training_keys",
    "write_normalizers",
]

_LOGGER = logging.getLogger(__name__)

WRONG_STATE = Refusal(
    CheckpointError,
    "{thing} in a checkpoint to resume from",
    "be {rule}",
    "Resume from an earlier checkpoint, by its name in OUTPUT_DIR/last_checkpoint, or start another training with "
    "MODEL.WEIGHTS <file> and another OUTPUT_DIR.",
)
NO_PLACE = Refusal(
    LaunchError,
    "{name} in OUTPUT_DIR",
    "be a {kind} that can be written to",
    "Move it away, or give another folder: OUTPUT_DIR <folder>.",
)

# Written by a training or an evaluation, and by a training alone; all but the first are replaced, and not written to.
_FILES = ("log.txt", "config.yaml")
_FILES_OF_A_TRAINING = (
    "metrics.json",
    "last_checkpoint",
    "model_final.pth",
    "model_ema.pth",
    "model_best.pth",
    "best.json",
    "doctor.json",
)
# What the images and the steps depend on, without the keys whose change is told apart or changes nothing.
_NODES = ("SOLVER", "DATASETS", "DATALOADER", "INPUT", "MODEL")
_NO_INFLUENCE = {"WEIGHTS", "DEVICE", "INFERENCE", "IMS_PER_BATCH", "OPTIMIZER", "CHECKPOINT_PERIOD"}
_NO_INFLUENCE |= {"REFERENCE_WORLD_SIZE", "NUM_WORKERS", "NORM_METRICS", "WANDB", "DOCTOR"}
_NO_INFLUENCE_IN_LAZY: tuple[str, ...] = (
    "train.",
    "dataloader.test.",
    "dataloader.evaluator",
    "dataloader.train.num_workers",
)
_NO_INFLUENCE_IN_LAZY += ("dataloader.train.total_batch_size", "dataloader.train.dataset.")
# These are in the state of optimizer and scheduler, so that the checkpoint's values stay in force.
_IN_OPTIMIZER = {"SOLVER.BASE_LR", "SOLVER.BIAS_LR_FACTOR", "SOLVER.MOMENTUM", "SOLVER.NESTEROV"}
_IN_OPTIMIZER |= {"SOLVER.WEIGHT_DECAY", "SOLVER.WEIGHT_DECAY_NORM", "SOLVER.WEIGHT_DECAY_BIAS"}
_OF_PARAMETERS = ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")  # one value for each of a parameter's
_NORMALIZER = "loss_normalizer"  # a moving average that dense detectors keep as a plain attribute


def read_normalizers(model: nn.Module) -> dict[str, float]:
    """Path -> moving average of the foreground anchors, which no state dict holds."""
    normalizers = {}
    for path, module in model.named_modules():
        value = vars(module).get(_NORMALIZER)
        if isinstance(value, (int, float)):
            normalizers[path] = float(value)
    return normalizers


def write_normalizers(model: nn.Module, values: dict[str, float]) -> None:
    """Set what `read_normalizers` read."""
    for path, value in values.items():
        setattr(model.get_submodule(path), _NORMALIZER, value)


def collect_training(cfg: CfgNode, seed: int, workers: list[dict[str, float]]) -> dict[str, Any]:
    """Plain values of all that an exact resume depends on.

    Args:
        cfg: of the training.
        seed: of the training.
        workers: the normalizers of each worker, see `read_normalizers`.
    """
    return {
        "seed": seed,
        "total_batch_size": cfg.SOLVER.IMS_PER_BATCH,
        "optimizer": name_optimizer(cfg),
        "workers": workers,
        "config": read_training_keys(cfg),
    }


def read_training_keys(cfg: CfgNode) -> dict[str, Any]:
    """Key -> value of the config's solver and training data; lists for tuples, as files do not tell them apart."""
    keys = {}
    for name in _NODES:
        keys.update(_flatten(cfg[name], name))

    if is_lazy(cfg):
        return {**keys, **_read_lazy_values(cfg)}
    if cfg.SOLVER.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        del keys["SOLVER.MAX_ITER"]  # a longer training with steps is the same so far
    return keys


def _read_lazy_values(cfg: CfgNode) -> dict[str, str]:
    """Name -> value of a LazyConfig, without what stands under keys of its own, and what has no influence."""
    values = {}
    for line in cfg.LAZY.VALUES:
        name, _, value = line.partition(" = ")
        if not name.startswith(_NO_INFLUENCE_IN_LAZY):
            values[name] = value
    return values


def _flatten(node: CfgNode, prefix: str) -> dict[str, Any]:
    keys = {}
    for name, value in node.items():
        key = f"{prefix}.{name}"
        if name in _NO_INFLUENCE or "TEST" in name:
            continue
        if isinstance(value, CfgNode):
            keys.update(_flatten(value, key))
        else:
            keys[key] = _as_lists(value)
    return keys


def _as_lists(value: Any) -> Any:
    return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


# ---- the folder


def check_output_files(folder: str, *, training: bool = True) -> None:
    """Refuse a folder in which something stands in the place of a file that is to be written.

    Args:
        folder: OUTPUT_DIR; one of another storage is passed over.
        training: whether a training writes into it, or an evaluation.

    Raises:
        LaunchError: what is in the way.
    """
    if find_local_file(folder) is None:
        return

    for name in _FILES + _FILES_OF_A_TRAINING * training:
        path = os.path.join(folder, name)
        is_right = os.path.isfile(path) and (name in _FILES_OF_A_TRAINING[1:] or os.access(path, os.W_OK))
        if os.path.lexists(path) and not is_right:
            raise NO_PLACE.of(_name_kind(path), folder, name=name, kind="file")

    path = os.path.join(folder, "inference")
    if os.path.lexists(path) and not os.path.isdir(path):
        raise NO_PLACE.of(_name_kind(path), folder, name="inference", kind="folder")


def _name_kind(path: str) -> str:
    for kind, is_it in (("a folder", os.path.isdir), ("a file", os.path.isfile), ("a link to nothing", os.path.islink)):
        if is_it(path):
            return kind if os.access(path, os.W_OK) or kind == "a link to nothing" else f"{kind} that is read-only"
    return "a pipe or a device"


def drop_half_line(path: str) -> None:
    """Take the last line out of a file of JSON lines, if the process that wrote it was ended within it."""
    if not os.path.isfile(path):
        return

    with open(path, "r+b") as file:
        content = file.read()
        whole, _, last = content.rpartition(b"\n")
        if not last:
            return
        try:
            json.loads(last)
            file.write(b"\n")
        except ValueError:
            file.truncate(len(whole) + bool(whole))


# ---- the state


def check_training_state(state: Any, where: str, hooks: Sequence[str] = ()) -> None:
    """Refuse the state of a trainer that no training has written.

    Args:
        state: the trainer's state dict in the checkpoint.
        where: the folder of the checkpoint.
        hooks: those whose state a training cannot do without.

    Raises:
        CheckpointError: it has no iteration, or optimizer, seed or workers that cannot be.
    """
    if not isinstance(state, dict):
        raise WRONG_STATE.of(f"a {type(state).__name__}", where, thing="'trainer'", rule="a dictionary")
    if not is_count(state.get("iteration")):
        rule = "a number of 0 or more"
        raise WRONG_STATE.of(repr(state.get("iteration")), where, thing="'iteration'", rule=rule)

    training = state.get("bnext", {"seed": 0, "total_batch_size": 1, "workers": [{}]})
    is_dictionary = isinstance(training, dict) and {"seed", "total_batch_size", "workers"} <= training.keys()
    if not is_dictionary or not is_count(training["seed"]) or not _are_normalizers(training["workers"]):
        rule = "a dictionary of seed, batch size and workers"
        raise WRONG_STATE.of(f"{training!r:.60}", where, thing="'bnext'", rule=rule)

    inner, hook_states = state.get("_trainer"), state.get("hooks") or {}
    if "bnext" in state or inner is not None:  # detectron2 0.6 writes none, of which `compare_training` tells
        optimizer = inner.get("optimizer") if isinstance(inner, dict) else None
        if not isinstance(optimizer, dict) or "param_groups" not in optimizer:
            raise WRONG_STATE.of(f"{optimizer!r:.60}", where, thing="'optimizer'", rule="the state of one")
    for name in hooks:
        if not isinstance(hook_states, dict) or not isinstance(hook_states.get(name), dict):
            raise WRONG_STATE.of("none", where, thing=f"'{name}'", rule="the state of one")

    for name, value in _list_tensors(state.get("_trainer", {}), "_trainer"):
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise WRONG_STATE.of("NaN or Inf", where, thing=name, rule="finite")


def _are_normalizers(workers: object) -> bool:
    """Whether it is what `collect_training` holds of the workers."""
    if not isinstance(workers, list) or not workers or not all(isinstance(worker, dict) for worker in workers):
        return False
    values: list[Any] = []
    for worker in workers:
        values += worker.values()
    return all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)


def _list_tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor, and floating point number as one, in nested dictionaries and lists, with its name."""
    if isinstance(value, (Tensor, float)):
        yield name, torch.as_tensor(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _list_tensors(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _list_tensors(item, f"{name}.{index}")


@contextlib.contextmanager
def expect_same_optimizer(cfg: CfgNode, optimizer: Optimizer, state: dict[str, Any]) -> Iterator[None]:
    """Say what is wrong where the optimizer's state in a checkpoint is not one of this training's optimizer.

    Args:
        cfg: of the training that resumes.
        optimizer: of that training, into which the block loads.
        state: the trainer's state dict in the checkpoint.

    Raises:
        CheckpointError: another optimizer, or other parameters.
    """
    now = name_optimizer(cfg)
    before = (state.get("bnext") or {}).get("optimizer", now)

    try:
        if before != now:
            raise ValueError(f"the optimizer is {now}, it was {before}")
        yield
        for parameter, values in optimizer.state.items():
            for key in _OF_PARAMETERS:
                value = values.get(key)
                if isinstance(value, Tensor) and value.shape != parameter.shape:
                    raise ValueError(f"{key} of shape {tuple(value.shape)} for a parameter of {tuple(parameter.shape)}")
    except (KeyError, ValueError) as error:
        raise CheckpointError.of(
            "The optimizer of the resumed training",
            "be that of the checkpoint",
            got="another",
            where=f"{error}; OUTPUT_DIR {cfg.OUTPUT_DIR}",
            remedy="Resume with the config of the training, or start another with MODEL.WEIGHTS <file> and another "
            "OUTPUT_DIR.",
        ) from error


def compare_training(cfg: CfgNode, seed: int, state: dict[str, Any]) -> dict[str, Any] | None:
    """Log in what a resumed training differs from the one of a checkpoint.

    Args:
        cfg: of the training that resumes.
        seed: its seed so far.
        state: the trainer's state dict in the checkpoint.

    Returns:
        The value of `collect_training` when it was saved; None for a checkpoint of detectron2.
    """
    training = state.get("bnext")
    if training is None:
        lacking = "it has" if "_trainer" in state else "it lacks the optimizer and has"
        _warn_inexact(f"the checkpoint was not written by bnext, {lacking} no seed")
        return None

    if training["seed"] != seed:
        _LOGGER.info("The resumed training keeps its seed %d.", training["seed"])

    num_workers, num_states = comm.get_world_size(), len(training["workers"])
    if num_workers != num_states:
        _warn_inexact(f"{num_workers} worker(s) now, the state of {num_states} in the checkpoint")

    batch, former_batch = cfg.SOLVER.IMS_PER_BATCH, training["total_batch_size"]
    if batch != former_batch:
        _warn_inexact(f"SOLVER.IMS_PER_BATCH is {batch}, it was {former_batch}")

    if "config" in training:
        _compare_keys(training["config"], read_training_keys(cfg))
    else:
        _LOGGER.info(
            "The checkpoint does not say with which solver and data it was trained: a change would not be seen."
        )
    return training


def _compare_keys(before: dict[str, Any], now: dict[str, Any]) -> None:
    for key in sorted(before.keys() & now.keys()):
        if before[key] == now[key]:
            continue

        if key in _IN_OPTIMIZER or key.startswith("optimizer."):
            _LOGGER.warning(
                "The resume keeps %s %s, which is in the optimizer of the checkpoint; the config's %s has no effect.",
                key,
                before[key],
                now[key],
            )
        else:
            _warn_inexact(f"{key} is {now[key]}, it was {before[key]}")


def _warn_inexact(reason: str) -> None:
    _LOGGER.warning("The resume is not exact: %s.", reason)

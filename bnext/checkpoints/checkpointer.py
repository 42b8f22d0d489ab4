"""Checkpoints that are whole on disk, that fit the model, and whose norm state is converted openly."""

from __future__ import annotations

import logging
import os
import pickle
import re
from collections.abc import Iterable
from http.client import HTTPException
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from fvcore.common.checkpoint import _strip_prefix_if_present
from torch import Tensor, nn

from bnext.config.blame import building_from_config
from bnext.errors import CheckpointError, Refusal, list_few
from bnext.files import find_local_file, replace_file
from bnext.layers.folded_norm import FoldedNorm
from bnext.surgery.check_state import check_variances, find_unwritten_frozen_norms, is_unwritten
from bnext.surgery.convert_state import collect_norm_specs, compare_norm_specs, convert_norm_state, list_shared_keys

__all__ = ["Checkpointer", "check_eval_weights", "find_missing_weights", "load_model"]

_POPULATION = ("running_mean", "running_var")
_STATISTICS = (*_POPULATION, "num_batches_tracked")

RE_ESTIMATE = "Re-estimate them with recompute_population_statistics before an evaluation."

NO_FILE = Refusal(
    CheckpointError,
    "A checkpoint",
    "be a file",
    "Check the path, or set MODEL.WEIGHTS to '' to start from random weights.",
)
NOT_REACHED = Refusal(
    CheckpointError,
    "A checkpoint",
    "be reachable at its address",
    "Check the address and the network, or download the file by hand and give MODEL.WEIGHTS <file>.",
)
UNREADABLE = Refusal(
    CheckpointError,
    "A checkpoint",
    "be a whole file with a dictionary of tensors and plain values",
    "Copy or train it again.",
)
HOLDS_CODE = Refusal(
    CheckpointError,
    "A checkpoint",
    "hold tensors and plain values only",
    "If you trust the file, load it with torch.load(file, weights_only=False), and save its state dict again with "
    "torch.save({{'model': state_dict}}, file).",
)
NO_STATE = Refusal(
    CheckpointError,
    "A checkpoint",
    "hold a state dict, tensors by name, alone or under 'model'",
    "Save the model's state dict again with torch.save({{'model': state_dict}}, file).",
)
NORM_FOR_A_FOLDED_ONE = Refusal(
    CheckpointError,
    "a checkpoint of a model with norms",
    "be loaded before it is folded",
    "Build the model anew, load, then call fold_norms.",
)


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which also writes files whole or not at all, and converts norm state openly.

    It refuses what is no checkpoint, or that of another model, before the model is changed; it names norms that will
    normalize by statistics which nobody wrote, and repairs statistics that are to be estimated anew.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Write model and states to `name`.pth in the save directory, whole or not at all.

        Args:
            name: file name without its ending.
            kwargs: further values to store.
        """
        if not self.save_dir or not self.save_to_disk:
            return

        specs = collect_norm_specs(self.model)  # the keys alone do not tell row 1 from 3, or 2 from 4
        if specs:
            kwargs["norm_specs"] = specs
        if "://" in self.save_dir:
            super().save(name, **kwargs)
            return

        states = {key: value.state_dict() for key, value in self.checkpointables.items()}
        data = {"model": self.model.state_dict(), **states, **kwargs}
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        replace_file(path, lambda file: torch.save(data, file))
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name the file that a resume starts from, in `last_checkpoint`."""
        if "://" in self.save_dir:
            super().tag_last_checkpoint(last_filename_basename)
            return

        path = os.path.join(self.save_dir, "last_checkpoint")
        replace_file(path, lambda file: file.write(last_filename_basename.encode()))

    def load(
        self,
        path: str,
        checkpointables: list[str] | None = None,
        *,
        complete: bool = False,
        replaced: Iterable[str] = (),
    ) -> dict[str, Any]:
        """Load a checkpoint into the model and the states.

        Args:
            path: file or URL; empty: nothing is loaded.
            checkpointables: names of the states to load; None: all that the file has.
            complete: every parameter and norm statistic of the model must be in the file; otherwise
                one common parameter is enough (a backbone, say).
            replaced: paths of norms whose statistics are estimated anew afterwards. Those that are not finite, or
                negative variances, are listed in `left_out`, and become mean 0 and variance 1.

        Returns:
            What else the file holds.

        Raises:
            CheckpointError: if the file is missing, cannot be downloaded, is broken or no checkpoint, or does not
                fit the model.
        """
        is_address = bool(path) and "://" in path
        if path and not is_address and not os.path.isfile(path.split("?")[0]):
            raise NO_FILE.of(f"{path!r}, which does not exist", "MODEL.WEIGHTS, or OUTPUT_DIR/last_checkpoint")

        self._path, self._complete, self._replaced = path, complete, tuple(replaced)
        self.left_out: list[str] = []
        if not path:
            self._warn_of_unwritten({})

        try:
            return super().load(path, checkpointables)
        except (OSError, HTTPException, AssertionError) as error:
            if not is_address:
                raise
            raise NOT_REACHED.of(_name_error(error), path) from error

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Go on from the last checkpoint if `resume` and there is one, else load the weights of `path`.

        Raises:
            CheckpointError: see `load`; what is resumed must be complete.
        """
        if resume and self.has_checkpoint():
            return self.load(self.get_checkpoint_file(), complete=True)
        return self.load(path, checkpointables=[])

    # ---- steps of a load, which fvcore calls

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            return super()._load_file(filename)
        except Exception as error:  # whatever pickle and torch raise for a file that is cut, or of another kind
            refused = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
            if refused:
                got = f"a {refused[1]}, which torch does not load as it may run code"
                raise HOLDS_CODE.of(got, filename) from error
            raise UNREADABLE.of(_name_error(error), filename) from error

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        self._check_is_state(checkpoint["model"])
        self._convert_ndarray_to_tensor(checkpoint["model"])
        _strip_prefix_if_present(checkpoint["model"], "module.")
        self._leave_out_broken(checkpoint["model"])
        check_variances(checkpoint["model"], self._path)

        if checkpoint.get("matching_heuristics", False):
            # Such names are matched by their ends, which are other ones where a level or domain owns something.
            shared, caffe2 = list_shared_keys(self.model), checkpoint.get("__author__") == "Caffe2"
            checkpoint["model"] = align_and_update_state_dicts(shared, checkpoint["model"], c2_conversion=caffe2)
            checkpoint["matching_heuristics"] = False

        stored = checkpoint["model"]
        self._check_folded(stored)
        converted, report = convert_norm_state(stored, self.model)
        report.changes += compare_norm_specs(checkpoint.pop("norm_specs", None), stored, self.model)
        if report.changes:
            logging.getLogger(__name__).warning("%s (%s)", report, self._path)
        self._check_fit(converted)

        checkpoint["model"] = converted
        incompatible = super()._load_model(checkpoint)
        self._warn_of_unwritten(converted)
        return incompatible

    def _check_is_state(self, state: Any) -> None:
        """Refuse what is not tensors by name."""
        if not isinstance(state, dict):
            raise NO_STATE.of(f"a {type(state).__name__}", self._path)

        wrong = {key: value for key, value in state.items() if not isinstance(value, (Tensor, np.ndarray))}
        if wrong or not all(isinstance(key, str) for key in state):
            entries = [f"{key!r} ({type(value).__name__})" for key, value in (wrong or state).items()]
            raise NO_STATE.of(f"a dictionary with {list_few(entries)}", self._path)

    def _leave_out_broken(self, state: dict[str, Tensor]) -> None:
        """Give statistics that cannot be, of norms whose statistics are replaced, the values of a new norm."""
        for path in dict.fromkeys(key.rpartition(".")[0] for key in state if key.endswith(_POPULATION)):
            if not any(path == norm or path.startswith(f"{norm}.") for norm in self._replaced):
                continue
            statistics = _select_statistics(state, path)
            try:
                check_variances(statistics, self._path)
            except CheckpointError:
                self.left_out.append(path)
                for name, value in statistics.items():
                    state[f"{path}.{name}"] = torch.full_like(value, float(name == "running_var"))

        if self.left_out:
            logging.getLogger(__name__).warning(
                "Statistics that are not finite, to be estimated anew: %s (%s).", list_few(self.left_out), self._path
            )

    def _check_folded(self, state: dict[str, Tensor]) -> None:
        """Refuse the state of a norm that the model has folded: fvcore would leave it out, and the norm be lost."""
        for path, module in self.model.named_modules():
            statistics = _select_statistics(state, path)
            if isinstance(module, FoldedNorm) and any(value.numel() for value in statistics.values()):
                raise NORM_FOR_A_FOLDED_ONE.of("a norm for a folded one", f"{path}; {self._path}")

    def _check_fit(self, state: dict[str, Tensor]) -> None:
        """Refuse a checkpoint of another model, or one that must be complete and is not."""
        entries = self.model.state_dict()
        matching = {key for key, value in state.items() if key in entries and entries[key].shape == value.shape}
        required = _find_required_keys(self.model)
        missing = [min(names) for names in required if not names & matching]
        if len(missing) < len(required) and not (self._complete and missing):
            return

        mismatched = []
        for key, value in state.items():
            if key in entries and key not in matching:
                mismatched.append(f"{key} {tuple(value.shape)} instead of {tuple(entries[key].shape)}")
        lists = {
            "Missing": [key for key in missing if key not in state],
            "Unexpected": [key for key in state if key not in entries],
            "Of another shape": mismatched,
        }
        faults = " ".join(f"{title}: {list_few(keys) or 'none'}." for title, keys in lists.items())
        rule = "have every parameter and norm statistic" if self._complete else "share some parameter"
        got = f"{len(required) - len(missing)} of {len(required)}"
        remedy = f"{faults} Use the config that the checkpoint was trained with, or another checkpoint."
        raise CheckpointError.of("The checkpoint", f"{rule} of the model", got=got, where=self._path, remedy=remedy)

    def _warn_of_unwritten(self, state: dict[str, Tensor]) -> None:
        """Say which frozen norms, and which norms of a checkpoint, have no statistics but the initial ones.

        Norms that are trained from scratch have them too, and rightly: nothing is said of them.
        """
        frozen = find_unwritten_frozen_norms(self.model)

        stored = []
        for owner in dict.fromkeys(key.rpartition(".")[0] for key in state if key.endswith("running_var")):
            if owner not in frozen and is_unwritten(_select_statistics(state, owner)):
                stored.append(owner)

        for thing, paths, remedy in (
            ("Frozen norms that do not normalize", frozen, "Load weights with statistics, or do not freeze them."),
            ("Statistics that were never written", stored, RE_ESTIMATE),
        ):
            if paths:
                logging.getLogger(__name__).warning(
                    "%s: %s (mean 0 and variance 1; %s). %s",
                    thing,
                    list_few(paths),
                    self._path or "no checkpoint",
                    remedy,
                )


def load_model(cfg: CfgNode, weights: str) -> nn.Module:
    """The model of a config with all weights and statistics of a checkpoint, in evaluation mode.

    Raises:
        CheckpointError: see `Checkpointer.load`; the checkpoint must be complete.
    """
    with building_from_config():
        model = build_model(cfg)
    Checkpointer(model).load(weights, checkpointables=[], complete=True)
    return model.eval()


def check_eval_weights(path: str) -> None:
    """Raise CheckpointError where MODEL.WEIGHTS is empty, and no last checkpoint is evaluated instead."""
    if not path:
        remedy = "Give MODEL.WEIGHTS <file>, or --resume for the last checkpoint of OUTPUT_DIR."
        raise CheckpointError.of("MODEL.WEIGHTS", "name the checkpoint to evaluate", got="''", remedy=remedy)


def find_missing_weights(path: str, remedy: str = "Correct the path.") -> CheckpointError | None:
    """The error for MODEL.WEIGHTS that names a file of this machine which does not exist; None: it does not."""
    file = find_local_file(path)
    if not file or os.path.isfile(file):
        return None

    got = f"{path!r}, which does not exist"
    return CheckpointError.of("MODEL.WEIGHTS", "name a file", got=got, where="config", remedy=remedy)


def _find_required_keys(model: nn.Module) -> list[frozenset[str]]:
    """All names of each parameter and norm statistic: a complete checkpoint has one name of each."""
    names: dict[int, set[str]] = {}
    parameters = {id(parameter) for parameter in model.parameters()}

    for key, value in model.state_dict(keep_vars=True).items():
        if id(value) in parameters or key.rpartition(".")[2] in _POPULATION:
            names.setdefault(id(value), set()).add(key)

    return [frozenset(keys) for keys in names.values()]


def _select_statistics(state: dict[str, Tensor], owner: str) -> dict[str, Tensor]:
    """The population statistics of one norm, level or domain."""
    prefix = f"{owner}." if owner else ""
    return {name: state[prefix + name] for name in _STATISTICS if prefix + name in state}


def _name_error(error: Exception) -> str:
    return f"{type(error).__name__}: {''.join(str(error).splitlines()[:1])}"

"""Checkpoints that are whole on disk, that fit the model, and whose norm state is converted openly."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from http.client import HTTPException
from typing import Any
from urllib.parse import parse_qs

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from fvcore.common.checkpoint import _strip_prefix_if_present
from torch import Tensor, nn

from bnext.checkpoints.fit import (
    check_folded,
    check_is_state,
    check_keys,
    check_norm_kinds,
    check_values,
    find_bias_of_folded_norms,
    to_tensors,
)
from bnext.checkpoints.head_levels import giving_levels
from bnext.checkpoints.last import find_last_checkpoint
from bnext.checkpoints.reading import read_checkpoint
from bnext.config.blame import building_from_config
from bnext.errors import BNextError, CheckpointError, Refusal, list_few
from bnext.files import find_local_file, replace_file
from bnext.layers.counts import count_skipped, tell_skipped
from bnext.layers.kept import note_statistics
from bnext.layers.loading import reporting_conversions
from bnext.layers.norm_form import POPULATION
from bnext.layers.norm_state import COPIED_POPULATION, MERGED_POPULATION
from bnext.layers.walk import find_bnext_norms
from bnext.surgery.check_state import check_variances, find_unwritten_frozen_norms, is_unwritten
from bnext.surgery.convert_state import (
    ConversionReport,
    collect_norm_specs,
    compare_norm_specs,
    convert_norm_state,
    list_shared_keys,
)

__all__ = ["Checkpointer", "check_eval_weights", "find_missing_weights", "load_model"]

RE_ESTIMATED = "recomputed_statistics"  # says of itself what was done to its statistics
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
OTHER_QUERY = Refusal(
    CheckpointError,
    "The query of a checkpoint's path",
    "be ?matching_heuristics=True",
    "Leave out what follows '?'.",
)
NO_TRAINING = Refusal(
    CheckpointError,
    "A checkpoint to resume from",
    "hold the state of its training",
    "It has weights alone: to start a training from them give MODEL.WEIGHTS <file> and another OUTPUT_DIR, without "
    "--resume.",
)
OTHER_STATE = Refusal(
    CheckpointError,
    "{name!r} in a checkpoint",
    "be the state of what loads it",
    "Use the config of the training that wrote it, or start another with MODEL.WEIGHTS <file> and another OUTPUT_DIR.",
)
OTHER_POPULATION = Refusal(
    CheckpointError,
    "The config",
    "have the population statistics that were estimated for the checkpoint",
    "Set the keys that the file says it needs: {keys}.",
)


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, which also writes files whole or not at all, and converts norm state openly.

    It refuses what is no checkpoint, or that of another model, before the model is changed; it names norms that will
    normalize by statistics which nobody wrote, and repairs statistics that are to be estimated anew.
    """

    _is_resumed = False
    # Of a conversion: `domain_map` of `convert_norm_state`, and, after a load, what was in the file and became of it.
    domain_map: Mapping[str, str] | None = None
    report = ConversionReport()
    shapes: Mapping[str, tuple[int, ...]] = {}
    specs: Mapping[str, Mapping[str, Any]] = {}

    def save(self, name: str, **kwargs: Any) -> None:
        """Write model and states to `name`.pth in the save directory, whole or not at all.

        Args:
            name: file name without its ending.
            kwargs: further values to store.
        """
        if not self.save_dir or not self.save_to_disk:
            return

        norms = find_bnext_norms(self.model)
        tell_skipped(self.model, dict(zip(norms, count_skipped(norms.values()), strict=True)))
        states = {key: value.state_dict() for key, value in self.checkpointables.items()}
        self._write(name, {**states, **kwargs})
        self.tag_last_checkpoint(f"{name}.pth")

    def save_weights(self, name: str, **kwargs: Any) -> None:
        """Write the model alone to `name`.pth, whole or not at all: no training resumes from it.

        Args:
            name, kwargs: see `save`.
        """
        if self.save_dir and self.save_to_disk:
            self._write(name, kwargs)

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        data = {"model": self.model.state_dict(), **values}
        specs = collect_norm_specs(self.model)  # the keys alone do not tell row 1 from 3, or 2 from 4
        if specs:
            data["norm_specs"] = specs

        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info("Saving checkpoint to %s", path)
        if "://" in self.save_dir:
            with self.path_manager.open(path, "wb") as file:
                torch.save(data, file)
        else:
            replace_file(path, lambda file: torch.save(data, file))

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
        """Load a checkpoint into the model and the states: all of it, or nothing.

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
                fit the model. Model and states are then as they were.
        """
        is_address = bool(path) and "://" in path
        if path and not is_address:
            _check_is_file(path)

        self._path, self._complete, self._replaced = path, complete, tuple(replaced)
        self.left_out: list[str] = []
        if not path:
            self._warn_of_unwritten({})

        self._states = list(self.checkpointables) if checkpointables is None else checkpointables
        with contextlib.ExitStack() as self._undo:
            try:
                rest: dict[str, Any] = super().load(path, checkpointables=[])
            except (OSError, HTTPException, AssertionError) as error:
                if not is_address:
                    raise
                raise NOT_REACHED.of(_name_error(error), path) from error

            for name in self._states:
                if name in rest:
                    self._load_state(name, rest.pop(name))
        return rest

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Go on from the last checkpoint if `resume` and there is one, else load the weights of `path`.

        Raises:
            CheckpointError: see `load` and `get_checkpoint_file`; what is resumed must be complete, with every state.
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])

        self._is_resumed = True
        try:
            return self.load(self.get_checkpoint_file(), complete=True)
        finally:
            self._is_resumed = False

    def has_checkpoint(self) -> bool:
        """Whether the save directory names a last checkpoint.

        Raises:
            CheckpointError: see `get_checkpoint_file`.
        """
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """The last checkpoint of the save directory; "" where none is named.

        Raises:
            CheckpointError: `last_checkpoint` does not name a file of its folder.
        """
        if "://" in self.save_dir:
            return super().get_checkpoint_file() if super().has_checkpoint() else ""
        return find_last_checkpoint(self.save_dir)

    # ---- steps of a load, of which fvcore calls the first two

    def _load_file(self, filename: str) -> dict[str, Any]:
        checkpoint = read_checkpoint(filename, self._path)
        check_is_state(checkpoint["model"], self._path)

        # Newer ones than 0.6 take a query off the path, and give it to the reader of the file.
        query = getattr(getattr(self, "_parsed_url_during_load", None), "query", "")
        queries = parse_qs(query)
        if queries.pop("matching_heuristics", None) == ["True"]:
            checkpoint["matching_heuristics"] = True
        if queries:
            raise OTHER_QUERY.of(repr(query), self._path)

        absent = [name for name in self.checkpointables if name not in checkpoint]
        if self._is_resumed and absent:
            raise NO_TRAINING.of(f"no {list_few([repr(name) for name in absent])}", self._path)
        return checkpoint

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        to_tensors(checkpoint["model"], self._path)
        _strip_prefix_if_present(checkpoint["model"], "module.")
        if self._complete and not self._is_resumed:  # no optimizer knows the model's parameters yet
            self._undo.enter_context(giving_levels(self.model, checkpoint.get(RE_ESTIMATED), self._path))
        check_norm_kinds(checkpoint["model"], self.model, self._path)
        self._leave_out_broken(checkpoint["model"])
        check_variances(checkpoint["model"], self._path)
        metadata = getattr(checkpoint["model"], "_metadata", {})

        if checkpoint.get("matching_heuristics", False):
            # Such names are matched by their ends, which are other ones where a level or domain owns something.
            shared, caffe2 = list_shared_keys(self.model), checkpoint.get("__author__") == "Caffe2"
            checkpoint["model"] = align_and_update_state_dicts(shared, checkpoint["model"], c2_conversion=caffe2)
            checkpoint["matching_heuristics"] = False

        stored = checkpoint["model"]
        check_folded(stored, metadata, self.model, self._path)
        converted, report = convert_norm_state(stored, self.model, domain_map=self.domain_map)
        self._check_population(report, checkpoint)
        specs = _read_specs(checkpoint)
        report.changes += compare_norm_specs(specs, stored, self.model)
        self.report, self.specs = report, specs or {}
        self.shapes = {key: tuple(value.shape) for key, value in converted.items()}
        if report.changes:
            self._tell_changes()

        check_keys(converted, self.model, self._path, complete=self._complete)
        check_values(converted, self.model, self._path)
        self._warn_of_folded(converted)

        states = {name: self.checkpointables[name] for name in self._states if name in checkpoint}
        self._undo.enter_context(_unchanged_by_errors(self.model, states))

        checkpoint["model"] = converted
        with reporting_conversions():
            incompatible = super()._load_model(checkpoint)
        self._warn_of_unwritten(converted)
        return incompatible

    def _tell_changes(self) -> None:
        changes = [
            change
            for change in self.report.changes
            if change.text != COPIED_POPULATION or change.path not in self._replaced
        ]
        if changes:
            report = dataclasses.replace(self.report, changes=changes)
            logging.getLogger(__name__).warning("%s (%s)", report, self._path)

    def _load_state(self, name: str, state: Any) -> None:
        try:
            if not isinstance(state, dict) or (not state and self.checkpointables[name].state_dict()):
                raise TypeError(f"{state!r:.40} is no state")
            self.checkpointables[name].load_state_dict(state)
        except BNextError:
            raise
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise OTHER_STATE.of(_name_error(error), self._path, name=name) from error

    def _check_population(self, report: ConversionReport, checkpoint: dict[str, Any]) -> None:
        """Refuse a file whose statistics were estimated for a config with other owners of them: it says which."""
        done = checkpoint.get(RE_ESTIMATED)
        keys = done.get("keys") if isinstance(done, dict) else None
        if not isinstance(keys, dict):
            return

        merged = [change.path for change in report.changes if change.text == MERGED_POPULATION]
        kept = [path for path in merged if path not in self._replaced]
        if not kept:
            return

        pairs = ", ".join(f"{key} {value!r}" for key, value in keys.items())
        refused = OTHER_POPULATION.of(f"one set for all in {list_few(kept)}", self._path, keys=pairs)
        if self._complete:
            raise refused
        logging.getLogger(__name__).warning("%s", refused)

    def _leave_out_broken(self, state: dict[str, Tensor]) -> None:
        """Give statistics that cannot be, of norms whose statistics are replaced, the values of a new norm."""
        for path in dict.fromkeys(key.rpartition(".")[0] for key in state if key.endswith(POPULATION[:2])):
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

    def _warn_of_folded(self, state: dict[str, Tensor]) -> None:
        biases = find_bias_of_folded_norms(state, self.model)
        if biases:
            logging.getLogger(__name__).warning(
                "The checkpoint seems to be of a folded model: it has %s for convolutions without, and norms are "
                "missing in it (%s). Load the checkpoint that it was folded from.",
                list_few(biases),
                self._path,
            )

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
        remedy = (
            "Give MODEL.WEIGHTS <file>; `bnext train --eval-only --resume` evaluates the last checkpoint of OUTPUT_DIR."
        )
        raise CheckpointError.of("MODEL.WEIGHTS", "name the checkpoint to evaluate", got="''", remedy=remedy)


def find_missing_weights(path: str, remedy: str = "Correct the path.") -> CheckpointError | None:
    """The error for MODEL.WEIGHTS that names a file of this machine which does not exist; None: it does not."""
    file = find_local_file(path)
    if not file or os.path.isfile(file):
        return None

    got = f"{path!r}, which does not exist"
    return CheckpointError.of("MODEL.WEIGHTS", "name a file", got=got, where="config", remedy=remedy)


def _read_specs(checkpoint: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
    """The specs of its norms that a checkpoint holds, which are taken out; None: it has none."""
    specs = checkpoint.pop("norm_specs", None)
    is_right = isinstance(specs, dict) and all(isinstance(spec, dict) for spec in specs.values())
    return specs if is_right else None


def _check_is_file(path: str) -> None:
    file = path.split("?")[0]
    if os.path.isfile(file):
        return

    got = "which does not exist"
    if os.path.isdir(file):
        got = "which is a folder"
    elif os.path.islink(file):
        got = "which is a link to nothing"
    elif os.path.exists(file):
        got = "which is a device or a pipe"
    raise NO_FILE.of(f"{path!r}, {got}", "MODEL.WEIGHTS, or OUTPUT_DIR/last_checkpoint")


@contextlib.contextmanager
def _unchanged_by_errors(model: nn.Module, states: Mapping[str, Any]) -> Iterator[None]:
    """Give a model and states back what they held, where something goes wrong."""
    tensors = {}
    for key, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and not nn.parameter.is_lazy(value):
            tensors[key] = (value, value.detach().clone())
    before = {}
    for name, state in states.items():
        with contextlib.suppress(AttributeError):  # a trainer's hooks may have no state before the training
            before[name] = copy.deepcopy(state.state_dict())

    try:
        yield
    except BaseException:
        with torch.no_grad():
            for value, held in tensors.values():
                value.copy_(held)
        for module in model.modules():
            note_statistics(module)
        for name, state in before.items():
            states[name].load_state_dict(state)
        raise


def _select_statistics(state: dict[str, Tensor], owner: str) -> dict[str, Tensor]:
    """The population statistics of one norm, level or domain."""
    prefix = f"{owner}." if owner else ""
    return {name: state[prefix + name] for name in POPULATION if prefix + name in state}


def _name_error(error: Exception) -> str:
    return f"{type(error).__name__}: {''.join(str(error).splitlines()[:1])}"

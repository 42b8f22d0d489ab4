"""The training loop: Detectron2's DefaultTrainer, made to resume exactly and to run on CPU workers.

`train` and `evaluate` are the same as plain functions of a config, for scripts with a loop of
their own around them.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import shutil
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, create_ddp_model
from detectron2.engine import hooks as d2_hooks
from detectron2.evaluation import DatasetEvaluator, verify_results
from detectron2.utils import comm
from detectron2.utils.events import CommonMetricPrinter, EventWriter, TensorboardXWriter
from detectron2.utils.file_io import PathManager
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bnext.checkpoints.checkpointer import Checkpointer, check_eval_weights
from bnext.config.blame import building_from_config
from bnext.config.check import flatten
from bnext.data.check_classes import check_classes
from bnext.data.listed_sets import KEY, register_listed_sets
from bnext.data.loader import TrainLoader, build_train_loader, share_seed
from bnext.data.sampling.shares import check_ratios
from bnext.distributed import unwrap_model
from bnext.distributed.agreement import check_agreement, describe_parameters, describe_values
from bnext.engine import hooks
from bnext.engine.accumulation import build_step
from bnext.engine.averaged_weights import AverageWeights, build_averages
from bnext.engine.best import build_best, limit_iterations
from bnext.engine.doctor_hook import build_doctor
from bnext.engine.loop import run_iterations
from bnext.engine.metrics_file import MetricsWriter
from bnext.engine.norm_counts import build_norm_counts
from bnext.engine.norm_metrics import build_norm_metrics
from bnext.engine.norm_schedules import build_norm_schedules
from bnext.engine.optimizer import build_lr_scheduler, build_optimizer
from bnext.engine.output import holding_output
from bnext.engine.population import build_estimates, is_validated_by_mini_batch, normalizing_by_mini_batch
from bnext.engine.progress_bar import ProgressBar
from bnext.engine.resume import (
    check_output_files,
    check_training_state,
    collect_training,
    compare_training,
    drop_half_line,
    expect_same_optimizer,
    read_normalizers,
    write_normalizers,
)
from bnext.engine.screen import ENDED, set_up_logging
from bnext.engine.start_lines import describe_training
from bnext.engine.validation_hook import build_validation_loss
from bnext.engine.virtual_images import build_virtual_images
from bnext.engine.wandb_writer import build_wandb_writers, check_wandb
from bnext.errors import BNextError, CheckpointError, ConfigError
from bnext.evaluation.coco import build_evaluator, evaluate_model, evaluate_with
from bnext.evaluation.conditions import Conditions, under_conditions
from bnext.evaluation.domains import read_specialists
from bnext.evaluation.rehearsal import rehearse
from bnext.files import explain_os_error, find_local_file, replace_file
from bnext.heads.build_warnings import warn_of_faults
from bnext.heads.class_masks import check_maskable, mask_classes
from bnext.layers.single_element import explaining_single_values
from bnext.lazy_config import copy_node, is_lazy
from bnext.notices import gathering_notices
from bnext.seeding import Purpose, derive_seed, seeded

__all__ = ["Trainer", "check_same_config", "evaluate", "train"]

_LOG_PERIOD = 20  # iterations between lines of metrics, as in Detectron2
# Keys that may differ; weights and numbers of images are compared.
_OF_A_MACHINE = ("OUTPUT_DIR", "DATALOADER.NUM_WORKERS", "MODEL.WEIGHTS", KEY, "LAZY.FILE")


class Trainer(DefaultTrainer):
    """Detectron2's trainer with an exact resume, equal buffers on all workers, and CPU workers.

    A resumed training continues with the weights, the images and the augmentations that it would
    have had without the interruption: bit by bit on one CPU or two CPU workers, as long as the
    total batch size and the number of workers stay the same.

    Args:
        cfg: a whole config.

    Raises:
        ConfigError, DatasetError: see `build_train_loader`.
    """

    # Subclasses may put their own in the place of these, as in Detectron2.
    build_optimizer = staticmethod(build_optimizer)
    build_lr_scheduler = staticmethod(build_lr_scheduler)
    build_train_loader = staticmethod(build_train_loader)
    build_evaluator = staticmethod(build_evaluator)

    _averages: AverageWeights | None = None  # the hook that has an average of the weights

    def __init__(self, cfg: CfgNode) -> None:
        super(DefaultTrainer, self).__init__()  # DefaultTrainer's own cannot wrap a CPU model for several workers
        if cfg.SOLVER.AMP.ENABLED and not torch.cuda.is_available():
            remedy = "Train in float32 on this machine."
            raise ConfigError.of(
                "SOLVER.AMP.ENABLED", "be False without a GPU", got=True, where="config", remedy=remedy
            )
        if not all(logging.getLogger(name).isEnabledFor(logging.INFO) for name in ("detectron2", "bnext")):
            set_up_logging()

        check_same_config(cfg)
        register_listed_sets(cfg)
        check_wandb(cfg)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size()).clone()
        cfg.defrost()
        cfg.SEED = self.seed = share_seed(cfg.SEED)
        cfg.freeze()
        check_ratios(cfg)

        with seeded(derive_seed(self.seed, Purpose.INITIALIZE)):
            model = self.build_model(cfg)
        warn_of_faults(cfg, model)
        mask_classes(model)
        check_maskable(cfg, model)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)

        described: dict[str, object] = {**describe_parameters(model)}
        if isinstance(loader, TrainLoader):
            described["images of DATASETS.TRAIN"] = loader.num_images
        remedy = "Use the same code, versions and data on every machine."
        check_agreement("the models and the data", described, remedy)

        self._is_on_cpu = next(model.parameters()).device.type == "cpu"
        self._trainer = build_step(cfg, self._distribute(model, cfg), loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))

        self.start_iter = 0
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.cfg = cfg
        self._last_eval_results: dict[str, Any] = {}
        self._worker_states: tuple[int, list[dict[str, float]]] = (-1, [])
        self.register_hooks(self.build_hooks())

    def _distribute(self, model: nn.Module, cfg: CfgNode) -> nn.Module:
        # Newer torch renamed the switch; with both names DDP leaves the buffers alone in forward.
        parameters = inspect.signature(DistributedDataParallel.__init__).parameters
        switch = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
        devices = {"device_ids": None} if self._is_on_cpu else {}  # DDP refuses device ids for a CPU model

        wanted = (copy_node(cfg, "train.ddp") or {}) if is_lazy(cfg) else {}
        options = {key: wanted[key] for key in ("find_unused_parameters", "fp16_compression") if key in wanted}
        return create_ddp_model(model, **{switch: False}, **devices, **options)

    def build_hooks(self) -> list[d2_hooks.HookBase | None]:
        """The hooks in their order; the module `bnext.engine.hooks` says why it matters."""
        cfg, model = self.cfg, unwrap_model(self.model)
        tell_counts, *last = build_norm_counts(model, _LOG_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD) or [None]
        self._averages, save_averages = build_averages(cfg, model) or (None, None)
        doctor, settle = build_doctor(cfg) or (None, None)
        shared = [
            d2_hooks.IterationTimer(),
            hooks.SeedSteps(),
            *build_virtual_images(cfg, model),  # over when the next hooks look at the model
            doctor,
            d2_hooks.LRScheduler(),
            hooks.RememberMetrics(),
            *build_norm_metrics(cfg, model),
            self._averages,
            *build_estimates(cfg, model),
            *build_norm_schedules(cfg, model),
            tell_counts,
            hooks.EqualizeBuffers(cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TEST.EVAL_PERIOD),
            settle,  # nothing that comes now may change statistics
            save_averages,
            hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD),
            *build_validation_loss(cfg),
            hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate_and_keep) if cfg.DATASETS.TEST else None,
        ]
        shared += self.build_more_hooks()
        last = [build_best(cfg, self._averages, is_known=self._has_known_metrics), *last]  # which may end with errors
        if not comm.is_main_process():
            return [*shared, *last]

        writers = hooks.PeriodicWriter(weakref.proxy(self).build_writers, period=_LOG_PERIOD)
        return [*shared, writers, ProgressBar() if ProgressBar.is_wanted() else None, *last]

    def build_more_hooks(self) -> list[d2_hooks.HookBase]:
        """Hooks of a subclass, on every worker, after those of bnext and before the metrics are written."""
        return []

    def build_writers(self) -> list[EventWriter]:
        """Lines of metrics, metrics.json and TensorBoard events in the output directory."""
        folder = self.cfg.OUTPUT_DIR
        PathManager.mkdirs(folder)
        drop_half_line(f"{folder}/metrics.json")
        return [
            CommonMetricPrinter(self.max_iter),
            MetricsWriter(f"{folder}/metrics.json"),
            TensorboardXWriter(folder),
            *build_wandb_writers(self.cfg, self.start_iter),
        ]

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: list[DatasetEvaluator] | None = None
    ) -> OrderedDict[str, Any]:
        """See `bnext.evaluation.coco.evaluate_model`; `evaluators`, one per data set, replace its own."""
        if evaluators is None:
            return evaluate_model(cfg, model, build=cls.build_evaluator)

        results: OrderedDict[str, Any] = OrderedDict()
        for name, evaluator in zip(cfg.DATASETS.TEST, evaluators, strict=True):
            results[name] = evaluate_with(cfg, model, name, evaluator)
        return next(iter(results.values())) if len(results) == 1 else results

    def _evaluate_and_keep(self) -> dict[str, Any]:
        model = unwrap_model(self.model)
        by_mini_batch = is_validated_by_mini_batch(self.cfg, self.iter)

        with normalizing_by_mini_batch(model) if by_mini_batch else contextlib.nullcontext():
            self._last_eval_results = self.test(self.cfg, model)
            of_average = self._averages.evaluate(self.test) if self._averages is not None else {}
        return {**self._last_eval_results, **of_average}

    @property
    def _has_known_metrics(self) -> bool:
        """Whether the metrics are those of bnext's own evaluator."""
        return self._evaluates_as_bnext and self.build_evaluator is build_evaluator

    @property
    def _evaluates_as_bnext(self) -> bool:
        """Whether no subclass evaluates in a way of its own."""
        test, ours = (getattr(kind.test, "__func__", None) for kind in (type(self), Trainer))
        return test is not None and test is ours

    def resume_or_load(self, resume: bool = True) -> None:
        """Go on from OUTPUT_DIR/last_checkpoint if `resume` and it exists, else load MODEL.WEIGHTS.

        Args:
            resume: whether to go on.

        Raises:
            CheckpointError: if the file does not fit, or not every worker sees it.
        """
        path = self.checkpointer.get_checkpoint_file() if resume and self.checkpointer.has_checkpoint() else ""
        if len(set(comm.all_gather(path))) > 1:
            raise CheckpointError.of(
                "The last checkpoint",
                "be seen by every worker",
                got=f"{path or 'none'!r} on worker {comm.get_rank()}",
                where=f"OUTPUT_DIR {self.cfg.OUTPUT_DIR}",
                remedy="Copy the output directory to every machine.",
            )

        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if comm.get_world_size() > 1:
            values = describe_values(unwrap_model(self.model))
            check_agreement("the weights that were loaded", values, "Copy the same file to every machine.")
        if path:
            self.start_iter = self.iter + 1
        elif resume:
            logging.getLogger(__name__).warning(
                "--resume: OUTPUT_DIR %s holds no checkpoint; the training starts from the beginning.",
                self.cfg.OUTPUT_DIR,
            )

        if isinstance(self.data_loader, TrainLoader):
            self.data_loader.sampler.seed = self.seed
            self.data_loader.sampler.start_iteration = self.start_iter

    def train(self) -> dict[str, Any]:
        """Train to SOLVER.MAX_ITER and evaluate.

        Returns:
            The results of the last evaluation (`evaluate_model`).

        Raises:
            ConfigError, DatasetError: see `check_classes` and `rehearse`, before the first iteration.
        """
        self.max_iter = limit_iterations(self.cfg, self.start_iter, self.max_iter)
        if self.start_iter >= self.max_iter:
            logging.getLogger(__name__).info(
                "Nothing is left to train: the checkpoint is of iteration %d, SOLVER.MAX_ITER is %d.",
                self.start_iter,
                self.max_iter,
            )
            self._complete_files()
            return self.test(self.cfg, unwrap_model(self.model)) if self.cfg.DATASETS.TEST else {}

        check_classes(self.cfg, is_new=self.start_iter == 0)
        if self._evaluates_as_bnext:
            rehearse(self.cfg, build=self.build_evaluator)

        if comm.is_main_process():
            words = describe_training(self.cfg, self.data_loader, self.start_iter)
            logging.getLogger(__name__).info("%s", words)
        with holding_output(self.cfg.OUTPUT_DIR), _logging_refusals_in_one_line():
            run_iterations(self)

        if self.cfg.TEST.EXPECTED_RESULTS and comm.is_main_process():
            verify_results(self.cfg, self._last_eval_results)
        return self._last_eval_results

    def gather_worker_states(self) -> None:
        """Collect on every worker what only the worker itself knows. A collective, before a save."""
        self._worker_states = (self.iter, comm.all_gather(read_normalizers(unwrap_model(self.model))))

    def _complete_files(self) -> None:
        """Write the last file of a training that was ended between its last two, which have the same content."""
        final, last = os.path.join(self.cfg.OUTPUT_DIR, "model_final.pth"), self.checkpointer.get_checkpoint_file()
        is_local = find_local_file(self.cfg.OUTPUT_DIR) is not None and os.path.isfile(last)
        if self.start_iter != self.max_iter or not is_local or os.path.lexists(final):
            return

        with holding_output(self.cfg.OUTPUT_DIR):
            if comm.is_main_process():
                with open(last, "rb") as source:
                    replace_file(final, lambda target: shutil.copyfileobj(source, target))

    def run_step(self) -> None:
        # The JIT rewrites a scripted loss after its first calls, which changes the last digits of the gradient
        # and would tell a resumed training from an uninterrupted one. On GPUs, inexact anyway, speed counts.
        jit = torch.jit.optimized_execution(not self._is_on_cpu)  # type: ignore[attr-defined]
        with jit, gathering_notices(), explaining_single_values(f"iteration {self.iter}"):
            super().run_step()

    def state_dict(self) -> dict[str, Any]:
        # Detectron2 0.6 forgets the optimizer, so it is stored from here with every version.
        state = {**super(DefaultTrainer, self).state_dict(), "_trainer": self._trainer.state_dict()}

        gathered_at, workers = self._worker_states
        if gathered_at != self.iter:  # saved by hand: of the other workers nothing is known
            workers = [read_normalizers(unwrap_model(self.model))]

        return {**state, "bnext": collect_training(self.cfg, self.seed, workers)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        schedulers = [type(hook).__qualname__ for hook in self._hooks if isinstance(hook, d2_hooks.LRScheduler)]
        check_training_state(state_dict, f"OUTPUT_DIR {self.cfg.OUTPUT_DIR}", schedulers)
        super(DefaultTrainer, self).load_state_dict(state_dict)  # of hooks, too, whose faults are their own
        with expect_same_optimizer(self.cfg, self._trainer.optimizer, state_dict):
            if "_trainer" in state_dict:
                self._trainer.load_state_dict(state_dict["_trainer"])

        training = compare_training(self.cfg, self.seed, state_dict)
        if training is not None:
            self.seed = training["seed"]
            workers = training["workers"]
            write_normalizers(unwrap_model(self.model), workers[comm.get_rank() % len(workers)])


@contextlib.contextmanager
def _logging_refusals_in_one_line() -> Iterator[None]:
    """Detectron2's loop logs whatever ends it with a traceback, also what a person can mend."""

    def shorten(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return True
        refusal = error if isinstance(error, BNextError) else explain_os_error(error)
        if refusal is not None:
            record.exc_info = None
            record.msg, record.args = f"{ENDED}%s", (str(refusal),)
        return True

    logger = logging.getLogger("detectron2.engine.train_loop")
    logger.addFilter(shorten)
    try:
        yield
    finally:
        logger.removeFilter(shorten)


def check_same_config(cfg: CfgNode) -> None:
    """Raise on every worker where the workers have different configs. A collective.

    Raises:
        LaunchError: names the keys and the workers.
    """
    values = {key: value for key, value in flatten(cfg).items() if key not in _OF_A_MACHINE}
    check_agreement("the configs", values, "Give the same config and the same options on every machine.")


def train(cfg: CfgNode, resume: bool = False, trainer: type[Trainer] = Trainer) -> dict[str, Any]:
    """Train and evaluate a config in this worker.

    Args:
        cfg: a whole config; OUTPUT_DIR takes checkpoints, metrics.json, events and inference/.
        resume: go on from the last checkpoint of OUTPUT_DIR.
        trainer: a subclass, if parts of it are your own.

    Returns:
        The results of the evaluation (`evaluate_model`).

    Raises:
        BNextError: whatever is wrong with config, data or checkpoint, before the first iteration.
    """
    check_output_files(cfg.OUTPUT_DIR)
    with building_from_config():
        training = trainer(cfg)

    training.resume_or_load(resume=resume)
    return training.train()


def evaluate(
    cfg: CfgNode,
    resume: bool = False,
    trainer: type[Trainer] = Trainer,
    conditions: Conditions | None = None,
) -> OrderedDict[str, Any]:
    """Evaluate MODEL.WEIGHTS (with `resume`: the last checkpoint of OUTPUT_DIR) in this worker.

    Args:
        cfg: a whole config.
        resume: prefer the last checkpoint.
        trainer: a subclass, if its `test` or its evaluator is your own.
        conditions: other than those of the file, under which a `test` of the subclass is not called.

    Returns:
        See `evaluate_model`.

    Raises:
        CheckpointError: if the weights do not cover the model.
    """
    check_output_files(cfg.OUTPUT_DIR)
    register_listed_sets(cfg)
    with building_from_config():
        model = trainer.build_model(cfg)
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR)

    last = checkpointer.get_checkpoint_file() if resume and checkpointer.has_checkpoint() else ""
    weights = last or cfg.MODEL.WEIGHTS

    check_eval_weights(weights)
    checkpointer.load(weights, checkpointables=[], complete=True)
    if conditions is None:
        return trainer.test(cfg, model)

    return evaluate_model(
        cfg,
        model,
        os.path.join(cfg.OUTPUT_DIR, "inference", conditions.folder),
        build=trainer.build_evaluator,
        within=partial(under_conditions, cfg, model, conditions),
        specialists=read_specialists(cfg, conditions.specialists),
    )

"""Parts of a training that are the caller's own: mapper, hooks, writers, evaluator, a subclass of the trainer.

They travel to the workers as they are given, and a trainer is made of them there.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.events import EventWriter
from torch import nn

from bnext.data.loader import build_train_loader
from bnext.data.mapping import Mapper
from bnext.engine.trainer import Trainer
from bnext.errors import ConfigError, Refusal

__all__ = ["OwnParts"]

_NO_MAPPER = Refusal(
    ConfigError,
    "mapper",
    "be an object that is called with a record",
    "Give an object, such as DatasetMapper(cfg, is_train=True), or a function of a record.",
)
_NO_HOOKS = Refusal(
    ConfigError,
    "hooks",
    "be a list of detectron2's HookBase, or of functions of the config that make one each",
    "Derive the hook from detectron2.engine.HookBase, and give [hook].",
)
_NO_WRITERS = Refusal(
    ConfigError,
    "writers",
    "be a list of detectron2's EventWriter, or a function of the config that makes one",
    "Derive the writer from detectron2.utils.events.EventWriter, and give [writer].",
)
_NO_EVALUATOR = Refusal(
    ConfigError,
    "evaluator",
    "be a DatasetEvaluator of detectron2, or a function of the config and a data set's name that makes one",
    "Give an object of a subclass, or write `def build(cfg, name): return MyEvaluator(name)`.",
)
_NO_TRAINER = Refusal(
    ConfigError,
    "trainer",
    "be a subclass of bnext.engine.Trainer, which is Detectron2's DefaultTrainer with an exact resume",
    "Derive yours from it: what it overrides stays.",
)
_TWICE = Refusal(
    ConfigError,
    "{part}",
    "be left out where the trainer has a {method} of its own",
    "Give one of both.",
)


@dataclass(frozen=True, eq=False, kw_only=True)
class OwnParts:
    """Parts of a training; what is not given is as in `bnext.engine.Trainer`.

    Args:
        mapper: turns a training record into the model's input, in place of `ImageMapper(cfg, True)`.
        hooks: run after those of bnext, before the metrics are written; each a hook, or a function of the config.
        writers: besides those of bnext, on the main process; a list, or a function of the config.
        evaluator: of the data sets of DATASETS.TEST, or a function of config and name that makes one for each.
        trainer: a subclass of `bnext.engine.Trainer`.

    Raises:
        ConfigError: a part is none.
    """

    mapper: Mapper | None = None
    hooks: Sequence[HookBase | Callable[[CfgNode], HookBase]] = ()
    writers: Sequence[EventWriter] | Callable[[CfgNode], Sequence[EventWriter]] | None = None
    evaluator: DatasetEvaluator | Callable[..., DatasetEvaluator] | None = None
    trainer: type[Trainer] | None = None

    def __post_init__(self) -> None:
        if self.mapper is not None and (isinstance(self.mapper, type) or not callable(self.mapper)):
            raise _NO_MAPPER.of(_name(self.mapper))

        if not isinstance(self.hooks, (list, tuple)):
            raise _NO_HOOKS.of(_name(self.hooks))
        for hook in self.hooks:
            if not isinstance(hook, HookBase) and not callable(hook):
                raise _NO_HOOKS.of(_name(hook))
        if self.writers is not None and not callable(self.writers):
            _check_writers(self.writers)

        is_evaluator = isinstance(self.evaluator, DatasetEvaluator)
        if self.evaluator is not None and not is_evaluator and not callable(self.evaluator):
            raise _NO_EVALUATOR.of(_name(self.evaluator))
        if self.trainer is not None:
            self._check_trainer(self.trainer)

    def _check_trainer(self, trainer: Any) -> None:
        if not isinstance(trainer, type) or not issubclass(trainer, Trainer):
            raise _NO_TRAINER.of(_name(trainer))

        pairs = (("mapper", "build_train_loader"), ("evaluator", "build_evaluator"), ("evaluator", "test"))
        for part, method in pairs:
            kept, ours = getattr(trainer, method), getattr(Trainer, method)
            is_ours = getattr(kept, "__func__", kept) is getattr(ours, "__func__", ours)
            if getattr(self, part) is not None and not is_ours:
                raise _TWICE.of(f"{part} and {trainer.__name__}.{method}", part=part, method=method)

    def build_trainer(self) -> type[Trainer]:
        """The trainer's class, with these parts."""
        parts, base = self, self.trainer or Trainer

        class OwnTrainer(base):  # type: ignore[misc, valid-type]
            def build_more_hooks(self) -> list[HookBase]:
                hooks = [parts._build_hook(hook, self.cfg) for hook in parts.hooks]
                return [*super().build_more_hooks(), *hooks]

            def build_writers(self) -> list[EventWriter]:
                writers = parts._build_writers(self.cfg)  # first: those of bnext open their files
                return [*super().build_writers(), *writers]

        if self.mapper is not None:
            OwnTrainer.build_train_loader = staticmethod(self._build_train_loader)
        if isinstance(self.evaluator, DatasetEvaluator):
            OwnTrainer.test = classmethod(_test_with(base, self.evaluator))  # which tries no evaluator beforehand
        elif self.evaluator is not None:
            OwnTrainer.build_evaluator = staticmethod(self._build_evaluator)
        OwnTrainer.__name__ = OwnTrainer.__qualname__ = base.__name__
        return OwnTrainer

    def _build_train_loader(self, cfg: CfgNode) -> Any:
        return build_train_loader(cfg, mapper=self.mapper)

    def _build_hook(self, hook: Any, cfg: CfgNode) -> HookBase:
        built = hook if isinstance(hook, HookBase) else hook(cfg)
        if not isinstance(built, HookBase):
            raise _NO_HOOKS.of(f"{_name(built)} of {_name(hook)}")
        return built

    def _build_writers(self, cfg: CfgNode) -> Sequence[EventWriter]:
        writers = self.writers(cfg) if callable(self.writers) else self.writers or ()
        _check_writers(writers)
        return writers

    def _build_evaluator(self, cfg: CfgNode, name: str, folder: str | None = None) -> DatasetEvaluator:
        build: Any = self.evaluator
        evaluator = build(cfg, name, folder) if _takes_folder(build) else build(cfg, name)
        if not isinstance(evaluator, DatasetEvaluator):
            raise _NO_EVALUATOR.of(f"{_name(evaluator)} of {_name(build)}", f"data set {name!r}")
        return evaluator


def _test_with(base: type[Trainer], evaluator: DatasetEvaluator) -> Callable[..., OrderedDict[str, Any]]:
    def test(cls: type[Trainer], cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> OrderedDict[str, Any]:
        return base.test(cfg, model, evaluators or [evaluator] * len(cfg.DATASETS.TEST))

    return test


def _check_writers(writers: Any) -> None:
    if not isinstance(writers, (list, tuple)):
        raise _NO_WRITERS.of(_name(writers))
    for writer in writers:
        if not isinstance(writer, EventWriter):
            raise _NO_WRITERS.of(_name(writer))


def _takes_folder(function: Callable[..., Any]) -> bool:
    """Whether a function has a third argument that must be given, or is a folder by its name, as Detectron2's has."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
        inspect.signature(function).bind(*range(3))
    except (TypeError, ValueError):
        return False
    third = parameters[min(2, len(parameters) - 1)]
    return third.default is third.empty or any(word in third.name for word in ("folder", "dir", "output"))


def _name(part: Any) -> str:
    kind = part if isinstance(part, type) else type(part)
    if callable(part) and hasattr(part, "__qualname__"):
        return f"the {'class' if isinstance(part, type) else 'function'} {part.__qualname__}"
    return f"an object of type {kind.__qualname__}"

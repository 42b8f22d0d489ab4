"""The loop over iterations: Detectron2's, whose end a hook may bring nearer."""

from __future__ import annotations

import logging

from detectron2.engine import TrainerBase
from detectron2.utils.events import EventStorage

__all__ = ["run_iterations"]


def run_iterations(trainer: TrainerBase) -> None:
    """Run a trainer from `start_iter` to `max_iter`, which is read anew before every iteration.

    Args:
        trainer: whose hooks are called as by Detectron2's `TrainerBase.train`. They find `trainer.iter` equal to
            `max_iter` in `after_train`, unless a step has failed.
    """
    logger = logging.getLogger("detectron2.engine.train_loop")  # where people look for its lines
    logger.info("Starting training from iteration %d", trainer.start_iter)
    trainer.iter = trainer.start_iter

    with EventStorage(trainer.start_iter) as trainer.storage:
        try:
            trainer.before_train()
            while trainer.iter < trainer.max_iter:
                trainer.before_step()
                trainer.run_step()
                trainer.after_step()
                trainer.iter += 1
        except Exception:
            logger.exception("Exception during training:")
            raise
        finally:
            trainer.after_train()

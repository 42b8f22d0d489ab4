"""Hooks that say what norms have counted in a training: mini-batches left out of statistics, and domains.

`TellNormCounts` comes before checkpoints are written, as its counts are in them; `TellDomains` is the last hook, as it
sums up a training with its evaluations.
"""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from bnext.distributed import unwrap_model
from bnext.engine.hooks import is_due
from bnext.errors import list_few
from bnext.heads.roi import find_roi_heads
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.counts import count_skipped, counts_of, tell_skipped
from bnext.layers.walk import find_bnext_norms

__all__ = ["TellDomains", "TellNormCounts", "build_norm_counts"]

METRIC = "bnext/num_skipped_statistics"
FALLBACK = "%d samples were taken for the fallback domain %r in training, as counted by %s: %s."
DOMAINS = "Samples of this training by their domain: %s."
NEVER_ACTIVE = (
    "No sample of this training was of the domain(s) %s: what the norms keep for them is as it was before. Samples: %s."
)


class TellNormCounts(HookBase):
    """Put the number of mini-batches that were left out into the metrics, and count the samples of each domain.

    Args:
        model: whose norms of bnext count.
        periods: iterations between metrics, and between checkpoints, which hold the domains' counts.

    Attributes:
        domains: domain -> samples in this training, over all workers; those of before a resume, too.

    Note:
        A collective, every period. The number is that of norms and mini-batches on each worker, summed up; of a norm
        that all workers share each of them counts.
    """

    def __init__(self, model: nn.Module, *periods: int) -> None:
        self._model = model
        self._norms = find_bnext_norms(model)
        self._of_rois = {norm for _, head in find_roi_heads(model) for norm in find_bnext_norms(head).values()}
        self._periods = periods
        self._before: dict[BatchNorm2d, Counter[str]] = {}
        self._loaded: Counter[str] = Counter()
        self.domains: Counter[str] = Counter()

    @property
    def with_domains(self) -> dict[str, BatchNorm2d]:
        """Path -> norm that has domains, other than levels."""
        return {path: norm for path, norm in self._norms.items() if norm.spec.domains}

    def state_dict(self) -> dict[str, Any]:
        return {"domains": dict(self.domains)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loaded = Counter(state["domains"])

    def before_train(self) -> None:
        norms = self.with_domains
        self._before = {norm: counts_of(norm).domains.copy() for norm in norms.values()}
        self._skipped_before = count_skipped(self._norms.values())

    def after_step(self) -> None:
        trainer = self.trainer
        if not any(is_due(trainer.iter, period, trainer.max_iter) for period in self._periods):
            return

        now = count_skipped(self._norms.values())
        skipped = [number - before for number, before in zip(now, self._skipped_before, strict=True)]
        workers = comm.all_gather((skipped, self._count_domains()))

        by_norm = [sum(numbers) for numbers in zip(*(numbers for numbers, _ in workers), strict=True)]
        trainer.storage.put_scalar(METRIC, sum(by_norm), smoothing_hint=False)
        tell_skipped(self._model, dict(zip(self._norms, by_norm, strict=True)))

        self.domains = self._loaded.copy()
        for _, domains in workers:
            self.domains.update(domains)

    def _count_domains(self) -> Counter[str]:
        """Samples of this worker: the most that a norm saw; of RoIs only where no norm that sees images has domains."""
        seen: Counter[str] = Counter()
        of_images = [norm for norm in self._before if norm not in self._of_rois]
        for norm in of_images or self._before:
            seen |= counts_of(norm).domains - self._before[norm]
        return seen


class TellDomains(HookBase):
    """Say at the end of a training how many samples each domain of its norms had, and how many a fallback got.

    Args:
        counts: a hook of the same trainer.

    Note:
        Nothing is known of a model that torch.compile calls.
    """

    def __init__(self, counts: TellNormCounts) -> None:
        self._counts = counts

    def after_train(self) -> None:
        trainer, seen = self.trainer, self._counts.domains
        if trainer.iter < trainer.max_iter:  # it has failed
            return

        norms = self._counts.with_domains
        self._tell_fallback(norms)

        names = dict.fromkeys(name for norm in norms.values() for name in norm.spec.domains)
        missing = [name for name in names if not seen[name]]
        counted = list_few([f"{number:,} of {name!r}" for name, number in seen.items() if number])
        if missing and counted:
            logging.getLogger(__name__).warning(NEVER_ACTIVE, list_few(map(repr, missing)), counted)
        elif names:
            logging.getLogger(__name__).info(DOMAINS, counted)

    def _tell_fallback(self, norms: dict[str, BatchNorm2d]) -> None:
        for path, norm in norms.items():
            fallbacks = counts_of(norm).fallbacks
            if not any(fallbacks.values()):
                continue

            kinds = [f"{n} {'without a domain' if name is None else f'of {name!r}'}" for name, n in fallbacks.items()]
            arguments = sum(fallbacks.values()), norm.spec.fallback_domain, path or "the model", list_few(kinds)
            logging.getLogger(__name__).warning(FALLBACK, *arguments)
            return  # the others saw the same images


def build_norm_counts(model: nn.Module, *periods: int) -> list[HookBase]:
    """`TellNormCounts` and `TellDomains` of a model; nothing for one without norms of bnext."""
    model = unwrap_model(model)
    if not find_bnext_norms(model):
        return []
    counts = TellNormCounts(model, *periods)
    return [counts, TellDomains(counts)]

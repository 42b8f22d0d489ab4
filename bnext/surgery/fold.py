"""Folding for deployment: a norm with population statistics becomes part of the convolution before it.

Which convolution that is, is found in `bnext.surgery.fold_pairs`; what stays in the place of the norm is a
`bnext.layers.folded_norm.FoldedNorm`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from torch import nn

from bnext.errors import ConfigError
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.folded_norm import FoldedNorm, is_folded
from bnext.layers.level_norm import LevelBatchNorm2d
from bnext.surgery.fold_pairs import Pair, find_pairs
from bnext.surgery.fold_plan import FoldPlan, choose_domain, find_difference, make_plan
from bnext.surgery.folded_state import check_folded_state

__all__ = ["FoldReport", "FoldedNorm", "check_folded_state", "fold_norms", "is_folded"]

_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class FoldReport:
    """What `fold_norms` did. `str(report)` is the text to log.

    Attributes:
        folded: path of each norm that was folded -> path of its convolution.
        left: path of each norm that was not -> why.
        domain: the level or domain that was folded; None: none was chosen.
    """

    folded: dict[str, str]
    left: dict[str, str]
    domain: str | None = None

    def __str__(self) -> str:
        chosen = f" for {self.domain!r}" if self.domain is not None else ""
        lines = [f"{len(self.folded)} norms were folded into their convolutions{chosen}, {len(self.left)} were left."]
        paths: dict[str, list[str]] = {}
        for path, reason in self.left.items():
            paths.setdefault(reason, []).append(path)
        return "\n".join(lines + [f"  {_show(where)}: {reason}" for reason, where in paths.items()])


def fold_norms(
    model: nn.Module,
    domain: str | None = None,
    *,
    pairs: Iterable[tuple[str, str]] = (),
    allow_training: bool = False,
) -> FoldReport:
    """Merge the batch norms of a model into the convolutions before them, for inference. In place.

        scale = gamma / sqrt(running_var + eps)
        weight' = weight * scale,  bias' = (bias - running_mean) * scale + beta

    Args:
        model: any module in evaluation mode. Its torch, SyncBN and bnext norms, and the frozen ones of detectron2
            and torchvision, are folded where the output of one convolution goes to them and to nothing else:
            in a convolution that owns its norm (detectron2's), or as the forward of the module that
            holds both shows when it is traced (nn.Sequential, torchvision's networks). Group and layer
            norms are no concern of it.
        domain: name of the level or domain to fold for, where statistics or affine differ.
        pairs: paths (convolution, norm) for what cannot be traced; the caller vouches that the output
            of the convolution goes to the norm and to nothing else.
        allow_training: let the folded model be trained.

    Returns:
        What was folded and what was not, by path, with the reason. See that `left` is empty, or as expected.

    Raises:
        ConfigError: training mode; no domain is chosen where there are several, or an unknown one; a pair
            that is none; a norm that uses the mini-batch at inference.
        StatisticsError: statistics that are missing, not finite or negative; a folded weight that is
            not finite in the type of the convolution.

    Note:
        Computed in float64 and stored in the convolution's type and memory format. All is checked before
        the first change, each pair on a probe of noise against its own forward. Parameters are new ones: fold
        after the optimizer's last step. A norm becomes a `FoldedNorm`: it refuses training, and, folded for one
        of several levels or domains, the others. A forward that takes a convolution out of another module, or an
        nn.Sequential apart (a loss on features[:5], say), is not seen.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> fold_norms(model).folded
        {'1': '0'}

    Source:
        Jacob et al., *Quantization and Training of Neural Networks*, 2018, section 3.2; why not to train a folded
        model: Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021, appendix A.8, and You et al., *Efficient
        ConvBN Blocks for Transfer Learning and Beyond*, 2024.
    """
    found, left = find_pairs(model, pairs)
    _check_modes(found)
    _check_domain(model, domain)
    plans = []
    for pair in found:
        plan = make_plan(pair, domain)
        reason = find_difference(plan)
        if reason is None:
            plans.append(plan)
        else:
            left[pair.norm_path] = reason
    for plan in plans:
        _apply(model, plan, domain, allow_training)
    return FoldReport({plan.pair.norm_path: plan.pair.conv_path for plan in plans}, left, domain)


def _check_modes(pairs: list[Pair]) -> None:
    training = [pair.norm_path for pair in pairs if pair.norm.training or pair.conv.training]
    if training:
        raise ConfigError(
            f"model must be in evaluation mode; got training mode ({_show(training)}). Call model.eval() first."
        )
    for pair in pairs:
        if isinstance(pair.norm, BatchNorm2d) and pair.norm.spec.inference == "mini_batch":
            raise ConfigError(
                f"a norm to fold must use population statistics at inference; got inference='mini_batch' "
                f"({pair.norm_path}). Set its spec to inference='population', or fold the parts of the model "
                f"without it."
            )


def _check_domain(model: nn.Module, domain: str | None) -> None:
    """An unknown name is a mistake, also where nothing depends on it."""
    if domain is None:
        return
    names = {name: None for module in model.modules() if isinstance(module, BatchNorm2d) for name in module.domains}
    if domain not in names:
        known = ", ".join(repr(name) for name in names) or "none, as its norms have no levels or domains"
        raise ConfigError(f"domain must be one of {known}; got {domain!r} (fold_norms). Name one, or leave it out.")


def _apply(model: nn.Module, plan: FoldPlan, domain: str | None, allow_training: bool) -> None:
    conv, norm, path = plan.pair.conv, plan.pair.norm, plan.pair.norm_path
    like = conv.weight
    bias_has_gradient = like.requires_grad if conv.bias is None else conv.bias.requires_grad
    conv.weight = nn.Parameter(plan.weight.to(like.device, like.dtype), like.requires_grad)
    conv.bias = nn.Parameter(plan.bias.to(like.device, like.dtype), bias_has_gradient)
    folded = _make_folded_norm(norm, path, domain, len(plan.scale), allow_training)
    for place in plan.pair.norm_paths:
        parent, _, name = place.rpartition(".")
        setattr(model.get_submodule(parent), name, folded)


def _make_folded_norm(
    norm: nn.Module, path: str, domain: str | None, num_features: int, allow_training: bool
) -> FoldedNorm:
    chosen: dict[str, Any] = {}
    if isinstance(norm, BatchNorm2d):
        name = choose_domain(norm, path, domain)
        is_level_norm = isinstance(norm, LevelBatchNorm2d)
        chosen = {"domain": name, "levels": norm.domains if is_level_norm else ()}
        if name and not is_level_norm:
            chosen |= {"domains": norm.domains, "fallback_domain": norm.spec.fallback_domain}
    folded = FoldedNorm(num_features, **chosen, allow_training=allow_training, path=path)
    return folded.train(norm.training)


def _show(paths: list[str]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(paths[:_SHOWN]) + more

"""Folding for deployment: a norm with population statistics becomes part of the convolution before it.

Which convolution that is, is found in `bnext.surgery.fold_pairs`; what stays in the place of the norm is a
`bnext.layers.folded_norm.FoldedNorm`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from bnext.errors import ConfigError, StatisticsError, list_few
from bnext.layers.batch_norm import BatchNorm2d
from bnext.layers.folded_norm import FoldedNorm
from bnext.layers.forms import find_forms, find_other_norms
from bnext.layers.ownership import check_statistics
from bnext.layers.sources import Source, is_owned, is_per_domain, list_sources
from bnext.layers.walk import check_is_whole, find_bnext_norms, replace_modules
from bnext.surgery.fold_pairs import Pair, find_pairs

__all__ = ["FoldReport", "fold_norms"]


@dataclasses.dataclass(frozen=True)
class FoldReport:
    """Norms that `fold_norms` folded, and that it left. `str(report)` is the text to log.

    Attributes:
        folded: path of each norm that was folded -> path of its convolution.
        left: path of each norm that was not -> why.
        domain: the level or domain that was folded; None: none was chosen.
        others: path of each norm that is no batch norm, and stays -> its class.
    """

    folded: dict[str, str]
    left: dict[str, str]
    domain: str | None = None
    others: dict[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        chosen = f" for {self.domain!r}" if self.domain is not None else ""
        lines = [f"{len(self.folded)} norms were folded into their convolutions{chosen}, {len(self.left)} were left."]

        paths: dict[str, list[str]] = {}
        for path, reason in self.left.items():
            paths.setdefault(reason, []).append(path)
        lines += [f"  {list_few(places)}: {reason}" for reason, places in paths.items()]

        if self.others:
            classes = ", ".join(sorted(set(self.others.values())))
            lines.append(f"  {list_few(self.others)}: no batch norms, so there is nothing to fold ({classes})")
        return "\n".join(lines)


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
            in a convolution that owns its norm (detectron2's), or in the module that holds both
            (nn.Sequential, torchvision's networks), as a trace of their forwards shows. Group and layer
            norms are no concern of it.
        domain: name of the level or domain to fold for, where statistics or affine differ; "night_p3" of both.
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
        the first change. Parameters are new ones: fold after the optimizer's last step. A norm becomes a
        `FoldedNorm`, which has no state: it refuses training, and, folded for one of several levels or domains,
        the others. A forward that takes a convolution out of another module, or an nn.Sequential apart (a loss on
        features[:5], say), is not seen.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> fold_norms(model).folded
        {'1': '0'}

    Source:
        Jacob et al., *Quantization and Training of Neural Networks*, 2018, section 3.2; why not to train a folded
        model: Wu and Johnson, *Rethinking "Batch" in BatchNorm*, 2021, appendix A.8, and You et al., *Efficient
        ConvBN Blocks for Transfer Learning and Beyond*, 2024.
    """
    check_is_whole(model, "fold_norms")
    _check_complete(model)
    matches, left = find_pairs(model, pairs)
    _check_inference(matches)
    _check_domain(model, domain)

    folded: dict[nn.Module, nn.Module] = {}
    parameters = []
    for pair in matches:
        sources = _choose_sources(pair, domain)
        parameters.append(_fold_parameters(pair, sources[0]))
        folded[pair.norm] = _make_folded_norm(pair, sources, allow_training)

    for pair, (weight, bias) in zip(matches, parameters, strict=True):
        conv = pair.conv
        bias_is_trained = conv.weight.requires_grad if conv.bias is None else conv.bias.requires_grad
        conv.bias = nn.Parameter(bias.to(conv.weight.device, conv.weight.dtype), bias_is_trained)
        conv.weight = nn.Parameter(weight.to(conv.weight.device, conv.weight.dtype), conv.weight.requires_grad)
    replace_modules(model, folded)

    folded_paths = {pair.norm_path: pair.conv_path for pair in matches}
    return FoldReport(folded_paths, left, domain, _find_others(model, left))


def _find_others(model: nn.Module, left: Mapping[str, str]) -> dict[str, str]:
    """Path -> class of the norms that are not by batch or population."""
    norms = {path: norm for path, norm, form in find_forms(model) if not form.is_batch_norm}
    norms |= {path: norm for path, (norm, _) in find_other_norms(model).items() if path not in left}
    return {path: type(norm).__name__ for path, norm in norms.items()}


# ---- checks


def _check_complete(model: nn.Module) -> None:
    """Refuse lazy modules, which have neither channels nor weights yet."""
    for path, module in model.named_modules():
        if isinstance(module, LazyModuleMixin):
            remedy = "Run the model on one batch first, in evaluation mode."
            raise ConfigError.of("model", "have all its weights", got=type(module).__name__, where=path, remedy=remedy)


def _check_inference(pairs: list[Pair]) -> None:
    """Refuse training mode and mini-batches at inference."""
    for pair in pairs:
        where = pair.norm_path
        if pair.norm.training or pair.conv.training:
            remedy = "Call model.eval() first."
            raise ConfigError.of("model", "be in evaluation mode", got="training mode", where=where, remedy=remedy)

        if isinstance(pair.norm, BatchNorm2d) and pair.norm.spec.inference == "mini_batch":
            rule, got = "use population statistics at inference", "inference='mini_batch'"
            remedy = "Set its spec to inference='population', or fold the parts of the model without it."
            raise ConfigError.of("a norm to fold", rule, got=got, where=where, remedy=remedy)


def _check_domain(model: nn.Module, domain: str | None) -> None:
    """An unknown name is a mistake, also where nothing depends on it."""
    names: dict[str, None] = {}
    for norm in find_bnext_norms(model).values():
        names |= dict.fromkeys([*norm.levels, *norm.domains, *filter(None, norm.sources)])

    if domain is not None and domain not in names:
        rule = f"be one of {', '.join(map(repr, names)) or 'none, as its norms have no levels or domains'}"
        raise ConfigError.of("domain", rule, got=repr(domain), where="fold_norms", remedy="Name one, or leave it out.")


def _choose_sources(pair: Pair, name: str | None) -> list[Source]:
    """The sources that a folded norm is to serve: those of a name, which have one population and one affine."""
    norm = pair.norm
    if not isinstance(norm, BatchNorm2d):
        return [Source()]

    sources = list_sources(norm.levels, norm.domains)
    if not is_owned(norm.spec.population) and not is_owned(norm.spec.affine):
        return sources

    chosen = _list_named(sources, name)
    if len(_list_states(norm, chosen)) == 1:
        return chosen

    names = dict.fromkeys([*norm.domains, *norm.levels, *norm.sources])
    allowed = [choice for choice in names if len(_list_states(norm, _list_named(sources, choice))) == 1]
    rule = f"be one of {', '.join(map(repr, allowed))}, whose statistics or affine differ"
    remedy = f"Choose one: fold_norms(model, {allowed[0]!r}); a folded model serves a single one."
    raise ConfigError.of("domain", rule, got=repr(name), where=pair.norm_path, remedy=remedy)


def _list_named(sources: list[Source], name: str | None) -> list[Source]:
    """Sources of a name, be it that of their level, their domain, or both; None: all."""
    return [source for source in sources if name in (None, source.level, source.domain, source.name)]


def _list_states(norm: BatchNorm2d, sources: list[Source]) -> set[tuple[nn.Module, nn.Module]]:
    """Population and affine of each source."""
    return {(norm.population_state(source.name), norm.affine_state(source.name)) for source in sources}


# ---- one pair


def _fold_parameters(pair: Pair, source: Source) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution that takes its norm in; float64 on the CPU."""
    conv, norm, path = pair.conv, pair.norm, pair.norm_path
    population: Any = norm
    affine: Any = norm
    if isinstance(norm, BatchNorm2d):
        population, affine = norm.population_state(source.name), norm.affine_state(source.name)
    if population.running_mean is None:
        remedy = "Use a norm that keeps them, and estimate them with recompute_population_statistics."
        raise StatisticsError.of("a norm to fold", "keep population statistics", got="none", where=path, remedy=remedy)

    mean, var = _to_double(population.running_mean), _to_double(population.running_var)
    check_statistics(mean, var, path, "; nothing was folded")
    gamma = torch.ones_like(mean) if affine.weight is None else _to_double(affine.weight)
    beta = torch.zeros_like(mean) if affine.bias is None else _to_double(affine.bias)
    scale = gamma * (var + norm.eps).rsqrt()  # type: ignore[operator]

    old_bias = torch.zeros_like(mean) if conv.bias is None else _to_double(conv.bias)
    weight = _to_double(conv.weight) * _along_outputs(conv, scale)
    bias = (old_bias - mean) * scale + beta
    for name, value in (("weight", weight), ("bias", bias)):
        if not torch.isfinite(value.to(conv.weight.dtype)).all():
            rule, where = f"be finite in {conv.weight.dtype}", f"{pair.conv_path} with {path}"
            remedy = "Fold the model in float32; nothing was folded."
            raise StatisticsError.of(f"a folded {name}", rule, got="one that is not", where=where, remedy=remedy)
    return weight, bias


def _to_double(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().double()  # first to the CPU: not every device has float64


def _along_outputs(conv: Any, scale: Tensor) -> Tensor:
    """A factor per output channel, [C], in a shape that multiplies the weight of the convolution.

    Output channels are the first axis of a weight; of a transposed convolution's [in, out / groups, ...] they are the
    second, where a group of input channels has its own.
    """
    ones = [1] * len(conv.kernel_size)
    if not conv.transposed:
        return scale.reshape(-1, 1, *ones)

    of_groups = scale.reshape(conv.groups, -1, *ones)
    return of_groups.repeat_interleave(conv.in_channels // conv.groups, dim=0)


def _make_folded_norm(pair: Pair, sources: list[Source], allow_training: bool) -> FoldedNorm:
    norm = pair.norm
    names: dict[str, Any] = {"levels": tuple(dict.fromkeys(source.level for source in sources if source.level))}

    if isinstance(norm, BatchNorm2d) and (is_per_domain(norm.spec.population) or is_per_domain(norm.spec.affine)):
        fallback = norm.spec.fallback_domain if norm.spec.unseen == "fallback" else None
        names |= {"domain": sources[0].domain, "domains": norm.domains, "fallback_domain": fallback}

    folded = FoldedNorm(pair.conv.out_channels, **names, allow_training=allow_training, path=pair.norm_path)
    return folded.eval()

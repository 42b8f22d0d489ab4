"""Slow float64 definitions, written from the formulas and by autograd; nothing of bnext is used here.

Shape letters: N samples, C channels, H W. A "batch" is a list of [N, C, H, W] that share a mini-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = [
    "annotated_cross_entropy",
    "annotated_focal_loss",
    "ascend_projected",
    "concatenated_batch_norm",
    "inference_norm",
    "moments_of",
    "move_population",
    "moving_average",
    "normalize_samples",
    "per_channel_rows",
    "shuffled_by_gathering",
    "table5_forward",
]


def per_channel_rows(features: Sequence[Tensor]) -> Tensor:
    """All elements of each channel side by side: [C, total elements], float64."""
    rows = [feature.double().transpose(0, 1).flatten(1) for feature in features]
    return torch.cat(rows, dim=1)


def moments_of(features: Sequence[Tensor]) -> tuple[int, Tensor, Tensor]:
    """Number of elements per channel, mean [C] and variance [C] (divided by that number)."""
    rows = per_channel_rows(features)
    mean = rows.sum(1) / rows.shape[1]
    var = ((rows - mean[:, None]) ** 2).sum(1) / rows.shape[1]
    return rows.shape[1], mean, var


def concatenated_batch_norm(
    features: Sequence[Tensor], weights: Sequence[Tensor], biases: Sequence[Tensor], eps: float
) -> list[Tensor]:
    """Features that share one mini-batch, each with its own weight and bias [C]. Differentiable."""
    _, mean, var = moments_of(features)
    normalized = [(x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + eps) for x in features]
    return [
        x * weight[:, None, None] + bias[:, None, None]
        for x, weight, bias in zip(normalized, weights, biases, strict=True)
    ]


def inference_norm(feature: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Normalization by given statistics [C]."""
    normalized = (feature - mean[:, None, None]) / torch.sqrt(var[:, None, None] + eps)
    return normalized * weight[:, None, None] + bias[:, None, None]


def moving_average(
    mean: Tensor, var: Tensor, batches: Sequence[Sequence[Tensor]], momentum: float
) -> tuple[Tensor, Tensor]:
    """Running mean and variance after the batches came one after another; the variance is Bessel-corrected."""
    for batch in batches:
        count, new_mean, new_var = moments_of(batch)
        mean = (1 - momentum) * mean + momentum * new_mean
        var = (1 - momentum) * var + momentum * new_var * count / (count - 1)
    return mean, var


def table5_forward(
    answers: tuple[str, str, str],
    features: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    means: Mapping[str, Tensor],
    variances: Mapping[str, Tensor],
    *,
    eps: float = 1e-5,
    momentum: float = 0.1,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Training forward of any row of Table 5, by (statistics, population, affine).

    Affine and running statistics are given per level; where a row shares them, all levels are given
    the same ones. Returns outputs, new running means and new running variances, per level.
    """
    statistics, population, _ = answers
    levels = list(features)
    batches = [levels] if statistics == "shared" else [[level] for level in levels]
    outputs: dict[str, Tensor] = {}
    for batch in batches:
        of_batch = [[source[level] for level in batch] for source in (features, weights, biases)]
        outputs.update(zip(batch, concatenated_batch_norm(*of_batch, eps), strict=True))
    new_means, new_vars = {}, {}
    for level in levels:
        if population == "per_level":
            seen = [[features[level]]]
        else:
            seen = [[features[member] for member in batch] for batch in batches]
        detached = [[feature.detach() for feature in batch] for batch in seen]
        new_means[level], new_vars[level] = moving_average(means[level], variances[level], detached, momentum)
    return outputs, new_means, new_vars


def normalize_samples(
    samples: Sequence[Tensor],
    mini_batches: Sequence[object],
    affines: Sequence[tuple[Tensor, Tensor] | None],
    populations: Sequence[tuple[Tensor, Tensor] | None],
    by: str,
    *,
    eps: float = 1e-5,
    r_max: float = 3.0,
    d_max: float = 5.0,
) -> list[Tensor]:
    """Samples [C, H, W], each normalized with the samples of its mini-batch; differentiable.

    `by` is "mini_batch", "population", or "renorm" (Ioffe 2017, algorithm 1: r and d are constants to the
    gradient and use the population as it is before its update). A mini-batch of a single element has no
    variance: the population normalizes it.
    """
    outputs = []
    for x, key, affine, population in zip(samples, mini_batches, affines, populations, strict=True):
        members = [y.unsqueeze(0) for y, other in zip(samples, mini_batches, strict=True) if other == key]
        count, mean, var = moments_of(members)
        if by == "population" or count == 1:
            normalized = _standardize(x, *_known(population), eps)
        else:
            normalized = _standardize(x, mean, var, eps)
        if by == "renorm" and count > 1:
            old_mean, old_var = _known(population)
            r = (torch.sqrt(var + eps) / torch.sqrt(old_var + eps)).clamp(1 / r_max, r_max).detach()
            d = ((mean - old_mean) / torch.sqrt(old_var + eps)).clamp(-d_max, d_max).detach()
            normalized = normalized * r[:, None, None] + d[:, None, None]
        if affine is not None:
            normalized = normalized * affine[0][:, None, None] + affine[1][:, None, None]
        outputs.append(normalized)
    return outputs


def _standardize(x: Tensor, mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + eps)


def _known(population: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    assert population is not None, "a population is needed"
    return population


def move_population(
    mean: Tensor, var: Tensor, num_updates: int, samples: Sequence[Tensor], momentum: float | None
) -> tuple[Tensor, Tensor, int]:
    """One update by all elements of the samples [C, H, W]; `momentum` None: the mean of all updates so far.

    Fewer than two elements have no variance and change nothing.
    """
    if not samples or sum(x[0].numel() for x in samples) < 2:
        return mean, var, num_updates
    weight = 1 / (num_updates + 1) if momentum is None else momentum
    batch = [x.detach().unsqueeze(0) for x in samples]
    return *moving_average(mean, var, [batch], weight), num_updates + 1


def shuffled_by_gathering(
    function: Callable[[Tensor], Tensor], rows: Sequence[Tensor], deals: Sequence[Tensor], num_groups: int
) -> list[Tensor]:
    """Shuffle BN as it is told: gather the rows of all workers, give every group its own, take own outputs back.

    `function` is a plain head in training mode; it sees one group after another. `deals` has the group of each row,
    per worker. Differentiable in rows and parameters; all workers are in this one process.
    """
    groups = torch.cat(list(deals))
    order = groups.argsort(stable=True)
    shuffled = torch.cat(list(rows))[order]
    parts = shuffled.split([int((groups == group).sum()) for group in range(num_groups)])
    outputs = torch.cat([function(part) for part in parts if len(part)])
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    return list(outputs[back].split([len(own) for own in rows]))


def ascend_projected(
    compute_loss: Callable[[list[Tensor]], Tensor], images: Sequence[Tensor], epsilon: float, steps: int, size: float
) -> list[Tensor]:
    """Projected gradient ascent by its definition: a step by the sign, then back into the box, element by element."""
    starts = [image.double() for image in images]
    moved = [start.clone() for start in starts]

    for _ in range(steps):
        leaves = [image.detach().requires_grad_() for image in moved]
        gradients = torch.autograd.grad(compute_loss(leaves), leaves)
        for image, start, gradient in zip(moved, starts, gradients, strict=True):
            for place in torch.cartesian_prod(*map(torch.arange, image.shape)).tolist():
                value = float(image[tuple(place)]) + size * float(torch.sign(gradient[tuple(place)]))
                first = float(start[tuple(place)])
                image[tuple(place)] = min(max(value, first - epsilon, 0.0), first + epsilon, 255.0)
    return moved


def annotated_focal_loss(
    logits: Tensor, labels: Tensor, annotated: Sequence[int], *, alpha: float, gamma: float
) -> Tensor:
    """Sum of the sigmoid focal loss of the anchors of an image over the classes that it annotates.

    logits [R, K]; labels [R], K of the background and -1 of no loss.
    """
    total = logits.new_zeros((), dtype=torch.float64)
    for column in annotated:
        scores = torch.sigmoid(logits[:, column].double())
        positive, negative = scores[labels == column], scores[(labels >= 0) & (labels != column)]
        total = total - (alpha * (1 - positive) ** gamma * torch.log(positive)).sum()
        total = total - ((1 - alpha) * negative**gamma * torch.log1p(-negative)).sum()
    return total


def annotated_cross_entropy(logits: Tensor, labels: Tensor, annotated: Sequence[int]) -> Tensor:
    """Sum of the cross-entropy of the RoIs of an image over the classes that it annotates, and the background.

    logits [R, K + 1], the last column of the background; labels [R].
    """
    total = logits.new_zeros((), dtype=torch.float64)
    for row, label in zip(logits.double(), labels.tolist(), strict=True):
        scores = torch.exp(row[[*annotated, len(row) - 1]])
        total = total + torch.log(scores.sum()) - row[label]
    return total

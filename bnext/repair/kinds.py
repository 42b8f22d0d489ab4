"""The kinds of statistics of a comparison: what they are, whether they apply to a model, and to how many images."""

from __future__ import annotations

from torch import nn

from bnext.errors import StatisticsError
from bnext.layers import BatchNorm2d, LevelBatchNorm2d
from bnext.statistics.observe import select_norms

__all__ = ["KINDS", "count_images_as_trained", "find_obstacle"]

# Kind -> in words.
KINDS = {
    "moving_average": "moving average, as in the file",
    "precise": "precise, pooled",
    "mean_of_batches": "precise, mean of batches",
    "mini_batch": "mini-batch at inference: each image",
    "mini_batch_as_trained": "mini-batch at inference: as many images as in training",
    "per_level": "re-estimated per level",
    "per_domain": "re-estimated on the domain's own images",
    "adaptive": "adaptive: of the test images",
}


def count_images_as_trained(model: nn.Module, num_images: int) -> dict[int, str]:
    """How many images of a worker are normalized together in training.

    Args:
        model: the detector. Norms under `roi_heads` count RoIs, not images, and are left out.
        num_images: of a worker in an SGD step.

    Returns:
        Number -> the first norm that it is of; more than one number, where norms differ. `num_images`, unless
        normalization_batch_size cuts them into groups, whose sizes then differ by at most one: the largest group.

    Raises:
        StatisticsError: the model has no norm with population statistics that are not frozen.
    """
    counts: dict[int, str] = {}
    for path, norm in select_norms(model):
        limit = norm.spec.normalization_batch_size if isinstance(norm, BatchNorm2d) else None
        num_groups = 1 if limit is None else -(-num_images // limit)
        if not path.startswith("roi_heads."):
            counts.setdefault(-(-num_images // num_groups), path)
    return counts or {num_images: ""}


def find_obstacle(model: nn.Module, kind: str, num_images: int = 1) -> str | None:
    """Why a kind of statistics does not apply to a model; None: it does.

    Args:
        model: the detector.
        kind: one of `KINDS`.
        num_images: of a worker in an SGD step, for "mini_batch_as_trained".
    """
    if kind == "moving_average":
        return None  # whatever is in the file, also GroupNorm's nothing
    try:
        norms = select_norms(model)
    except StatisticsError:
        return "the model has no batch norm with population statistics that are not frozen"
    if kind == "mini_batch_as_trained":
        counts = count_images_as_trained(model, num_images)
        found = " and ".join(f"{count} in {path}" for count, path in counts.items())
        is_one = len(counts) == 1
        return None if is_one else f"norms differ in how many images they normalize together in training: {found}"
    if kind != "per_level":
        return None
    levels = [norm for _, norm in norms if isinstance(norm, LevelBatchNorm2d)]
    if not levels:
        return "the model has no batch norm that sees several levels"
    is_done = all(norm.spec.population == "per_level" for norm in levels)
    return "the statistics are per level already, see the precise ones" if is_done else None

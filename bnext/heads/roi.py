"""The image of each RoI: box, mask and keypoint heads get the RoIs of all images in one batch.

Known from the instances of the call, or from the pooler, which get them image by image. With it mini-batch statistics
at inference are those of one image, whichever images are evaluated together; and RoIs have the domain of their image.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bnext.errors import DomainError, Refusal, StatisticsError
from bnext.functional import Groups
from bnext.layers import BatchNorm2d
from bnext.layers.walk import find_bnext_norms
from bnext.scope.domain import get_active_domain
from bnext.scope.model import setting
from bnext.scope.recomputation import is_recomputing
from bnext.scope.record import Scope, close_scopes

__all__ = ["ImagesOfRois", "find_roi_heads", "mixing_images", "tell_images"]

NOT_ONE_PER_IMAGE = Refusal(
    DomainError, "use_domain", "name one domain per image", "Name one domain for all of them, or one for each."
)
IMAGES_NOT_KNOWN = Refusal(
    StatisticsError,
    "a RoI head whose norms depend on the image",
    "get the features of its pooler, image by image",
    "Take a head of detectron2 with a pooler, or population statistics that are shared.",
)
NO_MINI_BATCH_HEAD = Refusal(
    StatisticsError,
    "model",
    "have RoI heads with batch norms of bnext that take mini-batches at inference",
    "Set MODEL.ROI_BOX_HEAD.NORM to BN and MODEL.BNEXT.ROI_BOX_HEAD.INFERENCE to mini_batch, or those "
    "of another head; a model not built by bnext needs tell_images.",
)

# Attribute of the RoI heads -> attribute of the pooler whose features it gets.
POOLERS = {
    "box_head": "box_pooler",
    "mask_head": "mask_pooler",
    "keypoint_head": "keypoint_pooler",
    "res5": "pooler",  # of C4 models
}


class ImagesOfRois:
    """Tells the norms of a head of which image each RoI is.

    Args:
        head: gets the features of the RoIs of all images, [N, C, H, W], image by image.
        pooler: a detectron2 ROIPooler that makes them; None: not known.

    Attributes:
        mixes: in evaluation mode deal the RoIs of all images out at random to groups of the same sizes, instead of one
            group for each image. It shows what a head that was trained on RoIs of one image has learned of that.
    """

    def __init__(self, head: nn.Module, pooler: nn.Module | None) -> None:
        self.mixes = False
        self._num_rois: list[int] | None = None
        if pooler is not None:
            pooler.register_forward_pre_hook(self._before_pooler, with_kwargs=True)
        head.register_forward_pre_hook(self._before_head)
        head.register_forward_hook(self._after_head, always_call=True)

    def _before_pooler(self, pooler: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        boxes = kwargs["box_lists"] if "box_lists" in kwargs else args[1]
        self._num_rois = [len(of_image) for of_image in boxes]

    def _before_head(self, head: nn.Module, args: tuple[Any, ...]) -> None:
        if is_recomputing():
            return  # the calls of the forward hold, whose images these are

        norms = list(find_bnext_norms(head).values())

        active = get_active_domain()
        if isinstance(active, tuple) and any(norm.domains for norm in norms):
            Scope(self, domain=self._spread_domains(active, args, norms)).__enter__()

        by_image = [norm for norm in norms if not norm.training and norm.uses_mini_batch]
        if by_image:
            groups = self._group_images(args, by_image[0])
            Scope(self, groups=dict.fromkeys(by_image, groups)).__enter__()

        names = active if isinstance(active, tuple) else (active,)
        by_rule = [norm for norm in norms if _applies_rule(norm, names)]
        if by_rule and not self.mixes:
            images = self._number_images(args, by_rule[0])
            Scope(self, groups=dict.fromkeys(by_rule, images)).__enter__()

    def _after_head(self, head: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        close_scopes(self)

    def _group_images(self, args: tuple[Any, ...], norm: BatchNorm2d) -> Groups | None:
        """The RoIs of each image, or random ones of all; None for a single image."""
        num_rois = self._check_known(args, norm)
        if len(num_rois) < 2:
            return None

        numbers = _repeat_numbers(num_rois)
        if self.mixes:
            numbers = numbers[torch.randperm(len(numbers), device="cpu")]
        return Groups(numbers.to(args[0].device, non_blocking=True), len(num_rois))

    def _number_images(self, args: tuple[Any, ...], norm: BatchNorm2d) -> Groups:
        """The image of each RoI."""
        num_rois = self._check_known(args, norm)
        numbers = _repeat_numbers(num_rois)
        return Groups(numbers.to(args[0].device, non_blocking=True), max(len(num_rois), 1))

    def _spread_domains(
        self, active: tuple[str, ...], args: tuple[Any, ...], norms: list[BatchNorm2d]
    ) -> str | tuple[str, ...]:
        """The domain of each RoI, from that of each image."""
        num_rois = self._check_known(args, next(norm for norm in norms if norm.domains))
        if len(active) != len(num_rois):
            raise NOT_ONE_PER_IMAGE.of(f"{len(active)} names for {len(num_rois)} images", norms[0].where)

        names: list[str] = []
        for name, number in zip(active, num_rois, strict=True):
            names += [name] * number
        return tuple(names) or active[0]

    def _check_known(self, args: tuple[Any, ...], norm: BatchNorm2d) -> list[int]:
        """RoIs of each image, which make up the features of this call."""
        num_features = len(args[0]) if args and isinstance(args[0], Tensor) else None
        num_rois = self._num_rois
        if len(args) > 1 and isinstance(args[1], list):  # a mask or keypoint head: (features, instances)
            num_rois = [len(instances) for instances in args[1]]

        if num_rois is None or num_features != sum(num_rois):
            raise IMAGES_NOT_KNOWN.of(f"{num_features} features for {num_rois} boxes", norm.where)
        return num_rois


def _repeat_numbers(num_rois: Sequence[int]) -> Tensor:
    """The number of its image for each RoI, on the CPU."""
    counts = torch.tensor(list(num_rois), dtype=torch.long)
    return torch.arange(len(num_rois)).repeat_interleave(counts, output_size=sum(num_rois))


def _applies_rule(norm: BatchNorm2d, names: Sequence[str | None]) -> bool:
    """Whether some of these domains are unseen to a norm, and its rule for them looks at images."""
    has_rule = not norm.training and norm.spec.unseen not in ("error", "fallback")
    return has_rule and any(name not in norm.domains for name in names)


def find_roi_heads(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The heads of a detectron2 R-CNN that see RoIs: ("box_head", module), ...; one for each stage of a cascade."""
    rois = getattr(model, "roi_heads", None)
    for name in POOLERS:
        head = getattr(rois, name, None)
        for part in head if isinstance(head, nn.ModuleList) else [head]:
            if isinstance(part, nn.Module):
                yield name, part


def tell_images(model: Any) -> None:
    """Tell the heads of a detectron2 R-CNN of which image each RoI is, where they have norms of bnext.

    bnext's architectures have it done. A model that was built otherwise needs it for mini-batch statistics at
    inference with several images in a batch, and for a domain per image.

    Args:
        model: a GeneralizedRCNN, or what has `roi_heads` such as detectron2's.
    """
    for name, head in find_roi_heads(model):
        if _find_owner(head) is None and find_bnext_norms(head):
            ImagesOfRois(head, getattr(model.roi_heads, POOLERS[name], None))


def _find_owner(head: nn.Module) -> ImagesOfRois | None:
    """The `ImagesOfRois` of a head, also of the copy of one."""
    owners = [getattr(hook, "__self__", None) for hook in head._forward_pre_hooks.values()]
    return next((owner for owner in owners if isinstance(owner, ImagesOfRois)), None)


@contextlib.contextmanager
def mixing_images(model: nn.Module) -> Iterator[None]:
    """In this scope, mini-batches at inference are random RoIs of all images that are evaluated together.

    There are as many mini-batches as images, of the sizes that those of the images would have. For a look at what a
    head has learned of the fact that the RoIs of a mini-batch were of one image; not for use.

    Args:
        model: built by bnext; the norms of its heads have inference="mini_batch".

    Raises:
        StatisticsError: no head of the model knows the images of its RoIs, or none is normalized by mini-batches.
    """
    owners = {part: _find_owner(part) for part in model.modules()}  # also in a wrapper
    telling = {part: owner for part, owner in owners.items() if owner is not None}
    norms: list[BatchNorm2d] = []
    for part in telling:
        norms += find_bnext_norms(part).values()

    if not any(norm.spec.inference == "mini_batch" for norm in norms):
        raise NO_MINI_BATCH_HEAD.of(
            f"population statistics in {norms[0].where}" if norms else "none", type(model).__name__
        )

    with setting(telling.values(), mixes=True):
        yield

"""Adversarial images: labelled images moved, within a bound, to where the loss of a detector is larger.

    x_0 = x,   x_{t+1} = clip(x_t + step_size * sign(d loss / d x_t)),   into [x - epsilon, x + epsilon] and [0, 255]

Of the model nothing is changed. A training on such images is in `bnext.engine.auxiliary`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from bnext.distributed import unwrap_model
from bnext.errors import ConfigError, DatasetError, Refusal, StatisticsError, check_choice
from bnext.evaluation.validation_loss import Statistics, find_device
from bnext.losses import name_losses
from bnext.numbers import is_count, is_number
from bnext.scope.domain import use_domain
from bnext.scope.model import restoring
from bnext.scope.statistics import as_in_training
from bnext.statistics.data_pass import Forward

__all__ = ["AttackedLoss", "choose_step_size", "make_adversarial"]

AttackedLoss = Literal["total", "classification", "localization", "stronger"]

_WHERE = "make_adversarial"
_WHITE = 255.0
_LABELS = ("instances", "sem_seg")
# A loss belongs to a kind by the words of its name, such as loss_rpn_cls, loss_box_reg_stage0, loss_fcos_loc.
_WORDS = {"classification": {"cls"}, "localization": {"loc", "box", "bbox", "reg", "giou"}}

_NO_BOUND = Refusal(
    ConfigError,
    "epsilon",
    "be a number above 0, at most 255, in units of pixel values",
    "Use 4; for no attack leave the images as they are.",
)
_NO_STEPS = Refusal(ConfigError, "steps", "be a whole number of 1 or more", "Use 1 for FGSM, 5 for a stronger PGD.")
_NO_STEP_SIZE = Refusal(
    ConfigError, "step_size", "be a number above 0, or None", "Use None: the steps then reach a little past epsilon."
)
_NO_IMAGES = Refusal(
    DatasetError,
    "A batch to attack",
    "be a list of records with an image [C, H, W] each, of pixel values from 0 to 255",
    "Give records as detectron2's mappers make them, before the model normalizes them.",
)
_NO_LABELS = Refusal(
    DatasetError,
    "Every record of a batch to attack",
    "have labels, `instances` or `sem_seg`: the attack raises the loss",
    "Map records with annotations as for a training: build_mapper(cfg, True).",
)
_NO_SUCH_LOSS = Refusal(
    StatisticsError,
    "The losses of the model",
    "have one of {loss} in their names' words ({words}) to attack it",
    "Attack loss='total', or name the model's losses as detectron2 does.",
)
_NO_ENTRANCE = Refusal(
    StatisticsError,
    "The model",
    "have a `backbone` that gets all images of a batch at once, as one tensor [N, C, H, W], padded at the right and "
    "below",
    "Attack a detector of detectron2's structure, or let `backbone` name the part that takes the images.",
)
_NO_GRADIENT = Refusal(
    StatisticsError,
    "The loss",
    "depend on what the backbone gets",
    "Run the backbone with gradients: without torch.no_grad() and detach().",
)


def make_adversarial(
    model: nn.Module,
    batch: Sequence[Mapping[str, Any]],
    *,
    epsilon: float = 4.0,
    steps: int = 1,
    step_size: float | None = None,
    loss: AttackedLoss = "total",
    domain: str | None = None,
    statistics: Statistics = "mini_batch",
    forward: Forward | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Copies of labelled images that the model finds harder: projected gradient ascent on its loss.

        x_0 = x,   x_{t+1} = clip(x_t + step_size * sign(d loss / d x_t)),   into [x - epsilon, x + epsilon], [0, 255]

    Args:
        model: of detectron2 or built alike, with a `backbone`; on as many workers as it is trained on.
        batch: of this worker: records with "image" [C, H, W] of 0 to 255, and labels, as a mapper makes them.
        epsilon: bound of each pixel's change, in units of pixel values; above 0, at most 255.
        steps: 1 is FGSM.
        step_size: above 0; None: see `choose_step_size`.
        loss: that is raised: "total"; "classification" or "localization", the losses with such names; "stronger": the
            one of these two attacks after which the total loss of this worker's batch is larger.
        domain: of the copies; None: that of their images. It normalizes in the attack, too.
        statistics: "mini_batch": norms are as in training, as for images to train on; "population": as at inference, as
            for an evaluation of the model that is deployed.
        forward: called as forward(model, batch), gives the losses; default model(batch).
        seed: 0 or more: of what the model draws, such as RoIs, in each forward alike.

    Returns:
        Copies of the records; "image" is of float32 (float64 if it was), not rounded.

    Raises:
        ConfigError: epsilon, steps, step_size, loss or statistics cannot be.
        DatasetError: images without labels, or whose values are no pixel values.
        StatisticsError: the model has no losses, none of this kind, or no `backbone` that takes the images.

    Note:
        The batch is left as it is. Of the model all buffers, modes, plain attributes, gradients and random generators
        are bitwise as before, also after an exception; dropout is off. It begins at the image, not at a random place,
        so that an image's copy does not depend on the worker. A pixel whose gradient is not finite stays. Collectives:
        those of synchronized norms, `steps` forwards and backwards; of "stronger" twice as many, and two forwards.

    Example:
        >>> class Bright(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.backbone = nn.Conv2d(3, 1, 1)
        ...     def forward(self, batch):
        ...         images = torch.stack([record["image"] for record in batch])
        ...         return {"loss_cls": self.backbone(images).square().mean()}
        >>> record = {"image": torch.full((3, 4, 4), 100.0), "instances": ()}
        >>> (copy,) = make_adversarial(Bright(), [record], epsilon=2)
        >>> float((copy["image"] - record["image"]).abs().max())
        2.0

    Source:
        Madry et al., *Towards Deep Learning Models Resistant to Adversarial Attacks*, 2018 (PGD); Xie et al.,
        *Adversarial Examples Improve Image Recognition*, 2020 (AdvProp); Chen et al., *Robust and Accurate Object
        Detection via Adversarial Learning*, 2021, whose choice between the two losses is "stronger", there for each
        image, here for a batch.
    """
    size = _check_arguments(epsilon, steps, step_size, loss, statistics)
    _check_batch(batch)
    model = unwrap_model(model)
    records = [{**record, "domain": domain} if domain else dict(record) for record in batch]
    attack = _Attack(model, records, float(epsilon), steps, size, forward, seed)
    naming = use_domain(domain) if domain else contextlib.nullcontext()  # whatever scope is open around this call

    with torch.enable_grad(), naming, as_in_training(model, by_population=statistics == "population"):
        if loss == "stronger":
            candidates = [attack.ascend(kind) for kind in _WORDS]
            totals = [attack.measure(images) for images in candidates]
            images = candidates[totals.index(max(totals))]
        else:
            images = attack.ascend(loss)

    moved = zip(records, images, strict=True)
    return [{**record, "image": image.to(record["image"].device)} for record, image in moved]


def choose_step_size(epsilon: float, steps: int) -> float:
    """The step that in all reaches 1.25 epsilon, and with one step epsilon.

    Example:
        >>> choose_step_size(4, 1), choose_step_size(4, 5)
        (4.0, 1.0)
    """
    return float(epsilon) if steps == 1 else 1.25 * epsilon / steps


class _Attack:
    """The ascent for one batch.

    Args:
        model: without DistributedDataParallel, in the mode in which it is attacked.
        records: with the domain in which it is.
        epsilon, steps, step_size, forward, seed: see `make_adversarial`.
    """

    def __init__(
        self,
        model: nn.Module,
        records: list[dict[str, Any]],
        epsilon: float,
        steps: int,
        step_size: float,
        forward: Forward | None,
        seed: int,
    ) -> None:
        self.model, self.records, self.forward, self.seed = model, records, forward, seed
        self.steps, self.step_size = steps, step_size
        device = find_device(model)

        self.images = [_make_float(record["image"]).to(device) for record in records]
        self.lowest = [(image - epsilon).clamp(min=0) for image in self.images]
        self.highest = [(image + epsilon).clamp(max=_WHITE) for image in self.images]

    def ascend(self, loss: str) -> list[Tensor]:
        """The images after all steps on a loss."""
        images = self.images
        for _ in range(self.steps):
            moves = self._find_directions(images, loss)
            limits = zip(images, moves, self.lowest, self.highest, strict=True)
            images = [(image + self.step_size * move).clamp(low, high) for image, move, low, high in limits]
        return images

    def measure(self, images: list[Tensor]) -> float:
        """The total loss of images."""
        with torch.no_grad():
            return float(sum(self._compute_losses(images).values()))

    def _find_directions(self, images: list[Tensor], loss: str) -> list[Tensor]:
        """The sign of the gradient for each pixel: 1, 0 or -1.

        It is that of the backbone's input: models normalize pixels by (x - mean) / std, which leaves signs as they are,
        and detectron2 stacks them in a way that torch cannot differentiate.
        """
        inputs: list[Tensor] = []

        def take(backbone: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            inputs.append(args[0].detach().requires_grad_())
            return (inputs[-1], *args[1:])

        entrance = getattr(self.model, "backbone", None)
        if not isinstance(entrance, nn.Module):
            raise _NO_ENTRANCE.of(type(self.model).__name__, _WHERE)
        handle = entrance.register_forward_pre_hook(take)
        try:
            chosen = _choose_losses(self._compute_losses(images), loss)
        finally:
            handle.remove()

        if len(inputs) != 1 or not _holds(inputs[0], images):
            got = ", ".join(str(list(tensor.shape)) for tensor in inputs) or "nothing"
            raise _NO_ENTRANCE.of(f"{got} for {len(images)} images", f"{_WHERE}, {type(self.model).__name__}")
        total = torch.stack([value.reshape(()) for value in chosen]).sum()
        gradient = torch.autograd.grad(total, inputs, allow_unused=True)[0] if total.requires_grad else None
        if gradient is None:
            raise _NO_GRADIENT.of("a constant", f"{_WHERE}, {type(self.model).__name__}")

        signs = gradient.sign().nan_to_num(nan=0.0)
        pairs = zip(signs, images, strict=True)
        return [sign[:, : image.shape[1], : image.shape[2]].to(image.dtype) for sign, image in pairs]

    def _compute_losses(self, images: list[Tensor]) -> dict[str, Tensor]:
        """The losses of images by name, the same function of them in every call."""
        pairs = zip(self.records, images, strict=True)
        batch = [{**record, "image": image} for record, image in pairs]

        with restoring(self.model, seed=self.seed), EventStorage():
            output = self.model(batch) if self.forward is None else self.forward(self.model, batch)
        return name_losses(output, _WHERE)


def _choose_losses(losses: Mapping[str, Tensor], kind: str) -> list[Tensor]:
    if kind == "total":
        return list(losses.values())

    words = _WORDS[kind]
    chosen = [value for name, value in losses.items() if words.intersection(name.split("_"))]
    if not chosen:
        raise _NO_SUCH_LOSS.of(", ".join(losses), _WHERE, loss=kind, words=", ".join(sorted(words)))
    return chosen


def _holds(tensor: Tensor, images: list[Tensor]) -> bool:
    """Whether a tensor [N, C, H, W] can be these images, padded."""
    if tensor.dim() != 4 or len(tensor) != len(images):
        return False

    channels, height, width = tensor.shape[1:]
    for image in images:
        if image.shape[0] != channels or image.shape[1] > height or image.shape[2] > width:
            return False
    return True


def _make_float(image: Tensor) -> Tensor:
    return image if image.dtype == torch.float64 else image.float()


def _check_arguments(epsilon: Any, steps: Any, step_size: Any, loss: Any, statistics: Any) -> float:
    """The size of a step, of arguments that can be."""
    if not is_number(epsilon) or not 0 < epsilon <= _WHITE:
        raise _NO_BOUND.of(repr(epsilon), _WHERE)
    if not is_count(steps, 1):
        raise _NO_STEPS.of(repr(steps), _WHERE)
    if step_size is not None and not (is_number(step_size) and step_size > 0):
        raise _NO_STEP_SIZE.of(repr(step_size), _WHERE)

    check_choice("loss", loss, get_args(AttackedLoss), where=_WHERE)
    check_choice("statistics", statistics, get_args(Statistics), where=_WHERE)
    return choose_step_size(epsilon, steps) if step_size is None else float(step_size)


def _check_batch(batch: Any) -> None:
    if not isinstance(batch, Sequence) or not batch or not all(isinstance(record, Mapping) for record in batch):
        raise _NO_IMAGES.of(type(batch).__name__ if batch else "none", _WHERE)

    for record in batch:
        image, name = record.get("image"), str(record.get("file_name", _WHERE))
        if not isinstance(image, Tensor) or image.dim() != 3 or not image.numel():
            got = f"shape {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
            raise _NO_IMAGES.of(got, name)
        if not any(key in record for key in _LABELS):
            raise _NO_LABELS.of(f"a record with {', '.join(map(str, record))}", name)

        low, high = float(image.min()), float(image.max())
        if not 0 <= low <= high <= _WHITE:
            raise _NO_IMAGES.of(f"values from {low:g} to {high:g}", name)

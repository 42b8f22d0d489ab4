"""Settings of the study of classifiers."""

from __future__ import annotations

import dataclasses

from bnext.errors import ConfigError, check_choice
from bnext.studies.patterns import Pattern
from bnext.studies.setting import ImageSetting, check_counts

__all__ = ["MODELS", "LeakSetting", "parse_pattern"]

MODELS = ("plain", "residual", "resnet50")


@dataclasses.dataclass(frozen=True)
class LeakSetting(ImageSetting):
    """Mini-batches and nets of the study, and its axes.

    Args:
        patterns: of normalization batches, "K x M": K classes, M images of each.
        pattern: the one that is repaired, and that the axes change.
        shares: of the pattern.
        lengths: steps of a training.
        noises: standard deviation of what is added to each pixel.
        joined_patterns: patterns of pictures of `joined` digits each; none: they are left out.
        joined: digits on a picture, 10 ** joined classes.
        joined_count: pictures of them in a split.
        joined_steps: of their trainings.
        model: of `MODELS`.
        channels: of a plain or residual model.
        depth: of a residual model.
        num_groups: normalization batches of a mini-batch of SGD.
        num_steps, noise, learning_rate: of a training that no axis changes.
        num_statistics: mini-batches of SGD of which population statistics are estimated.
        num_tests: normalization batches of an evaluation.
    """

    side: int | None = 8
    patterns: tuple[str, ...] = ("10 x 3", "5 x 6", "2 x 16", "1 x 32")
    pattern: str = "2 x 16"
    shares: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    lengths: tuple[int, ...] = (300, 600, 1200)
    noises: tuple[float, ...] = (0.25, 0.5)
    joined_patterns: tuple[str, ...] = ("16 x 2",)
    joined: int = 2
    joined_count: int = 4000
    joined_steps: int = 1200
    model: str = "plain"
    channels: tuple[int, ...] = (16, 32, 64, 64)
    depth: int = 20
    num_groups: int = 4
    num_steps: int = 1200
    noise: float = 0.5
    learning_rate: float = 0.1
    num_statistics: int = 50
    num_tests: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("model", self.model, MODELS, where="the settings")
        for words in (*self.patterns, self.pattern, *self.joined_patterns):
            parse_pattern(words)

        if self.joined_patterns and self.dataset not in ("digits", "mnist"):
            rule, remedy = "be empty with a set that has no digits to join", "Add joined_patterns=[]."
            got = list(self.joined_patterns)
            raise ConfigError.of("joined_patterns", rule, got=got, where=self.dataset, remedy=remedy)

        counts = ("num_groups", "num_steps", "num_statistics", "num_tests", "joined", "joined_count")
        check_counts(self, *counts)


def parse_pattern(words: str, share: float = 1.0) -> Pattern:
    """The pattern of "K x M", with or without spaces.

    Raises:
        ConfigError: it is none.
    """
    numbers = [part.strip() for part in words.split("x")]
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        remedy = "Write '16 x 2' for 16 classes, 2 images of each."
        raise ConfigError.of("a pattern", "be K x M", got=repr(words), where="the settings", remedy=remedy)
    return Pattern(int(numbers[0]), int(numbers[1]), share)

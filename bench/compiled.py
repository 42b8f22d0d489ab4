"""Row 1 compiled: one graph for images of all sizes, ahead of the compiled concatenation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from bench.harness import CHANNELS, Arm, Comparison, Features, Setting, Shapes, compiling_afresh, draw_features
from bench.levels import PYRAMID, make_concatenated, make_row_1
from bench.record import Quantity, Result
from bnext import use_kernels

__all__ = ["ROWS"]

STRIDES = {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
SHORT_SIDES = (640, 672, 704, 736, 768, 800)  # of images, pixels; as Detectron2's configs draw them
LONG_SIDES = (864, 896, 960, 992, 1024, 1088)  # 4 / 3 of them, up to a multiple of 32
ALL_SIZES = [*zip(SHORT_SIDES, LONG_SIDES, strict=True), *zip(LONG_SIDES, SHORT_SIDES, strict=True)]
ONE_SIZE = [(736, 960)] * len(ALL_SIZES)  # as many pixels, to 1 %


def list_turns(sizes: Sequence[tuple[int, int]]) -> Shapes:
    """The features of one image of each size: "turn level" -> shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for turn, (height, width) in enumerate(sizes):
        for level, stride in STRIDES.items():
            shapes[f"{turn} {level}"] = (1, CHANNELS, -(-height // stride), -(-width // stride))
    return shapes


class InTurn(nn.Module):
    """A norm that sees one image after the other.

    Args:
        make_norm: builds the norm, which maps the features of all levels of an image.
    """

    def __init__(self, make_norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm = make_norm()

    def forward(self, features: Features) -> Features:
        outputs = {}
        for turn in range(len(features) // len(STRIDES)):
            image = {level: features[f"{turn} {level}"] for level in STRIDES}
            outputs.update({f"{turn} {level}": output for level, output in self.norm(image).items()})
        return outputs


def compile_ours() -> nn.Module:
    """Row 1 within a model that is compiled."""
    norm = make_row_1()
    norm.compile(dynamic=True)
    return norm


def compile_concatenated() -> nn.Module:
    """The usual way, compiled as a whole."""
    norm = make_concatenated()
    norm.compile(dynamic=True)
    return norm


@dataclass(frozen=True)
class CountedGraphs:
    """Graphs that our passes are compiled to by images of all sizes, and by those of one.

    Args:
        name, peer: of ours and of the other.
    """

    name: str
    peer: str

    def run(self, setting: Setting) -> list[Result]:
        """One quantity."""
        ours, other = (self.count(sizes, setting.device) for sizes in (ALL_SIZES, ONE_SIZE))
        return [Quantity(self.name, self.peer, "", "graphs", ours, other, goal=other)]

    def count(self, sizes: Sequence[tuple[int, int]], device: str) -> int:
        """Graphs of one step with images of these sizes."""
        from torch._dynamo.utils import counters  # imported with the compiler, which takes seconds

        shapes = list_turns(sizes)
        features, grads = (draw_features(shapes, "NCHW", device) for _ in range(2))
        with use_kernels("compiled"), compiling_afresh():
            counters.clear()
            Arm(InTurn(make_row_1), features, grads, sees_all=True).step()
            return counters["stats"]["unique_graphs"]


GOALS = {"NCHW": 1.8, "channels_last": 3.0}
PASSES = "row 1, compiled passes"
compiled = partial(Comparison, sees_all=True, compiles=True)
against_compiled = partial(
    compiled, peer="concatenation compiled", shapes=PYRAMID, make_other=compile_concatenated, goals=GOALS
)
in_turn = partial(
    compiled,
    f"{PASSES}, twelve sizes in turn",
    shapes=list_turns(ALL_SIZES),
    make_ours=partial(InTurn, make_row_1),
    kernels="compiled",
)

ROWS = [
    against_compiled(PASSES, make_ours=make_row_1, kernels="compiled"),
    against_compiled("row 1, compiled", make_ours=compile_ours),
    in_turn("concatenation compiled", make_other=partial(InTurn, compile_concatenated)),
    in_turn(
        "one size",
        make_other=partial(InTurn, make_row_1),
        other_shapes=list_turns(ONE_SIZE),
        differs="as the other has as many positions, to 1 %, of one size",
        goals={"NCHW": 1.0, "channels_last": 1.0},
    ),
    CountedGraphs(f"{PASSES}, twelve sizes in turn", "one size"),
]

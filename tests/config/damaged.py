"""Configs that somebody has damaged, drawn from a seed: odd values, misspelled keys, torn and tagged text."""

from __future__ import annotations

import dataclasses

import numpy as np
import yaml
from detectron2.config import get_cfg

from bnext.config.check import flatten
from bnext.config.keys import add_bnext_config
from tests import tiny

__all__ = ["Damaged", "draw_damaged"]

VALUES = (
    None, "", "x", "None", -1, 0, 1, 2.0, 3.7, 1e9, 10**30, 10**400, 1e-30, float("nan"), float("inf"), True, [], {},
    [[]], [0], [-1], [1e9], ["x"], [None], [True], {"x": 1}, [[[[1]]]], "ü$^", "%s {}", "../x", "1e3", "[", "nan", "\0",
    "a\nb", "\x1b[31m", "(" * 500, "9" * 5000, "1" * 200_000, "{1: 2}", "b'x'", "1j", "...",
)  # fmt: skip
LINES = (
    "SOLVER:", "SOLVER: 3", "SOLVER: [1]", "MODEL: {FPN: 3}", "MODEL: {3: x}", "? [1, 2]\n: 3",
    "SOLVER: {\tMAX_ITER: 3}", "SOLVER:\n\tMAX_ITER: 3", "SEED: *a", "SEED: &a [*a]", "SEED: !!python/name:os.system",
    "SEED: !!int x", "SEED: !!float ''",
    "SEED: !!python/tuple [1]", "SEED: !!bool x", "SEED: !!timestamp x", "SEED: !!binary x", "SEED: 2024-13-45",
    "---\n---",
    "_BASE_: nowhere.yaml", "_BASE_:", "_BASE_: []", "_BASE_: [1]", "_BASE_: damaged.yaml", "_BASE_: .", "VERSION: 9",
    "_BASE_: nowhere://x/y.yaml", "MODEL: {_BASE_: x}", "OUTPUT_DIR: 2024-01-01", "NO: 1", "%TAG ! x",
    "MODEL: {<<: {FPN: 3}}",
    "SEED: " + "[" * 2000, "SEED: 1:2:3:4:5:6:7:8:9", "VERSION: 1", "MODEL: {WEIGHT: x}",
    "VERSION: 1\nMODEL: {RPN: {X: 1}}",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Damaged:
    """A file and pairs that override it.

    Args:
        content: of the file.
        pairs: KEY VALUE ...
        culprit: the error must name it; "": whatever is wrong, or nothing.
    """

    content: bytes
    pairs: tuple[str, ...] = ()
    culprit: str = ""


def draw_damaged(number: int, seed: int) -> list[Damaged]:
    """So many damaged configs, of each kind in turn."""
    cfg = get_cfg()
    add_bnext_config(cfg)
    draw, keys = np.random.default_rng(seed), flatten(cfg)
    kinds = (_draw_value, _draw_key, _draw_line, _draw_torn)
    return [kinds[index % len(kinds)](draw, keys) for index in range(number)]


def _pick(draw, values):
    return values[int(draw.integers(len(values)))]


def _write(key, value):
    node = value
    for part in reversed(key.split(".")):
        node = {part: node}
    return yaml.safe_dump({"_BASE_": str(tiny.CONFIG), **node}, allow_unicode=True).encode()


def _draw_value(draw, keys):
    key, value = _pick(draw, list(keys)), _pick(draw, VALUES)
    if draw.integers(2) or len(str(value)[:5000]) == 5000:
        return Damaged(_write("SEED", 1), (key, str(value)))
    return Damaged(_write(key, value))


def _draw_key(draw, keys):
    key = _pick(draw, list(keys))
    section, _, name = key.rpartition(".")
    at = int(draw.integers(len(name)))

    wrong = [
        f"{name[:at]}{name[at + 1 :]}",
        f"{name[:at]}X{name[at:]}",
        name.lower(),
        f"{name}.X",
        f" {name}",
        f"{name}\0",
    ]
    wrong = f"{section}.{_pick(draw, wrong)}".lstrip(".")
    if wrong in keys:
        wrong = f"{wrong}_X"
    value = list(keys[key]) if isinstance(keys[key], tuple) else keys[key]
    culprit = wrong.rpartition(".")[2].strip("\0 ")
    return (
        Damaged(_write("SEED", 1), (wrong, str(value)), culprit)
        if draw.integers(2)
        else Damaged(_write(wrong, value), (), culprit)
    )


def _draw_line(draw, keys):
    text = f"_BASE_: {tiny.CONFIG}\n"
    line = _pick(draw, LINES)
    return Damaged((line if "_BASE_" in line or draw.integers(2) else text + line).encode())


def _draw_torn(draw, keys):
    """Bytes of a whole file changed, lost or doubled; what is left may be right."""
    content = bytearray(tiny.CONFIG.read_bytes())
    for _ in range(int(draw.integers(1, 6))):
        at, length = int(draw.integers(len(content))), int(draw.integers(1, 30))
        piece = content[at : at + length]
        content[at : at + length] = _pick(
            draw, (b"", piece * 2, bytes(draw.integers(0, 256, length, dtype=np.uint8)), b"\t", b"{")
        )
    return Damaged(bytes(content))

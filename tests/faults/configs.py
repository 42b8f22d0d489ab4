"""Configs that are damaged, or asked for what cannot be: refused in a line that names the key, or trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import yaml
from detectron2.config import get_cfg

from bnext.config.check import flatten
from bnext.config.keys import add_bnext_config
from tests import tiny
from tests.faults import lazy_configs, use
from tests.faults.attempt import Attempt, Outcome, Verdict

__all__ = ["make_attempts"]

NORMS = ("BN", "SyncBN", "GN", "LN", "FrozenBN", "naiveSyncBN", "nnSyncBN", "CycleBN", "", "GhostBN", "bn", "BatchNorm")
# Keys that a small training reads; bnext's own keys are added.
SECTIONS = (
    "SOLVER.",
    "INPUT.",
    "DATASETS.",
    "DATALOADER.",
    "MODEL.RETINANET.",
    "MODEL.RESNETS.",
    "MODEL.FPN.",
    "MODEL.BACKBONE.",
    "MODEL.ANCHOR_GENERATOR.",
    "MODEL.PIXEL",
    "TEST.",
    "MODEL.WEIGHTS",
    "MODEL.DEVICE",
    "MODEL.META_ARCHITECTURE",
    "SEED",
    "VIS_PERIOD",
    "CUDNN_BENCHMARK",
)
VALUES = (
    None,
    "",
    "x",
    "None",
    -1,
    0,
    1,
    2,
    3.7,
    1e9,
    10**30,
    1e-30,
    float("nan"),
    float("inf"),
    True,
    False,
    [],
    {},
    (),
    [[]],
    [0],
    [-1],
    [1e9],
    ["x"],
    [None],
    {"x": 1},
    "ü$^",
    "%s {}",
    "../x",
    "1e3",
    "[",
    "nan",
)
LONG = ("SOLVER.MAX_ITER",)  # a large value is a long training, as asked for


def make_attempts(count: int, seed: int) -> list[Attempt]:
    """Attempts drawn from a seed: files, keys, values and norms, in turn."""
    draw = np.random.default_rng(seed)
    keys = _list_keys()
    kinds = (_damage_value, _damage_value, _damage_key, _damage_file, _sweep_norm, _damage_lazy)
    return [kinds[index % len(kinds)](draw, keys) for index in range(count)]


def _list_keys() -> dict[str, object]:
    cfg = get_cfg()
    add_bnext_config(cfg)
    values = flatten(cfg)
    chosen = {key: value for key, value in values.items() if key.startswith(SECTIONS) or "BNEXT" in key}
    return {key: value for key, value in chosen.items() if key not in LONG}


def _pick(draw: np.random.Generator, values: object) -> object:
    values = list(values)  # type: ignore[call-overload]
    return values[int(draw.integers(len(values)))]


# ---- values


def _damage_value(draw: np.random.Generator, keys: dict[str, object]) -> Attempt:
    key, value = str(_pick(draw, keys)), _pick(draw, VALUES)
    is_in_file = bool(draw.integers(2))
    place = "in the file" if is_in_file else "as a pair"
    return Attempt(f"{key} = {value!r} {place}", partial(_train_with_value, key, value, is_in_file))


def _train_with_value(key: str, value: object, is_in_file: bool, folder: Path) -> Outcome:
    tiny.prepare(folder / "data")
    if is_in_file:
        run = use.train(folder / "output", config=_write_config(folder, key, value))
    else:
        run = use.train(folder / "output", key, value)

    parts = key.split(".")
    return use.judge(run, folder / "output", (key, parts[-1], ".".join(parts[:-1])), must_be_told=False)


def _write_config(folder: Path, key: str, value: object) -> str:
    node: object = value
    for part in reversed(key.split(".")):
        node = {part: node}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({"_BASE_": str(tiny.CONFIG), **node}))  # type: ignore[dict-item]
    return str(file)


# ---- keys


def _damage_key(draw: np.random.Generator, keys: dict[str, object]) -> Attempt:
    key = str(_pick(draw, keys))
    section, _, name = key.rpartition(".")
    at = int(draw.integers(len(name)))
    wrong = _pick(
        draw,
        (
            f"{section}.{name[:at]}{name[at + 1 :]}",
            f"{section}.{name[:at]}X{name[at:]}",
            f"{section}.{name.lower()}",
            f"{section}X.{name}",
            f"{name}",
            f"{key}.X",
            f"{section} .{name}",
        ),
    )
    wrong = str(wrong).lstrip(".")
    if wrong in keys:
        wrong = f"{wrong}_X"
    is_in_file = bool(draw.integers(2))
    return Attempt(f"key {wrong} of {key}", partial(_train_with_key, wrong, keys[key], is_in_file))


def _train_with_key(key: str, value: object, is_in_file: bool, folder: Path) -> Outcome:
    tiny.prepare(folder / "data")
    if is_in_file:
        value = list(value) if isinstance(value, tuple) else value
        run = use.train(folder / "output", config=_write_config(folder, key, value))
    else:
        run = use.train(folder / "output", key, value)
    parts = key.split(".")
    return use.judge(run, folder / "output", (key, parts[-1], ".".join(parts[:-1])), must_be_told=True)


# ---- files


@dataclasses.dataclass(frozen=True)
class FileFault:
    """A config file that is not one: how it is written, the words that a message may name, and whether it must fail."""

    name: str
    write: Callable[[Path], object]
    words: tuple[str, ...] = ("config.yaml",)
    is_wrong: bool = True


def _text(text: str, encoding: str = "utf-8") -> Callable[[Path], object]:
    return lambda file: file.write_bytes(text.encode(encoding))


BASE = f"_BASE_: '{tiny.CONFIG}'\n"
TAG = "!!python/object/apply:os.system ['touch ran']"
FILE_FAULTS = (
    FileFault("missing", lambda file: None),
    FileFault("a folder", Path.mkdir),
    FileFault("binary", lambda file: file.write_bytes(bytes(range(256)))),
    FileFault("a list", _text("- 1\n- 2\n")),
    FileFault("a word", _text("retinanet")),
    FileFault("torn", _text(BASE + "SOLVER: {BASE_LR: 0.1")),
    FileFault("tabs", _text(BASE + "SOLVER:\n\tBASE_LR: 0.1\n")),
    FileFault("a number as section", _text(BASE + "SOLVER: 3\n"), ("SOLVER",)),
    FileFault("null as section", _text(BASE + "SOLVER:\n"), ("SOLVER",)),
    FileFault("a list as section", _text(BASE + "SOLVER: [1]\n"), ("SOLVER",)),
    FileFault("a key twice", _text(BASE + "SOLVER: {BASE_LR: 0.1, BASE_LR: 0.001}\n"), ("BASE_LR",)),
    FileFault("a section twice", _text(BASE + "SOLVER: {BASE_LR: 0.1}\nSEED: 1\nSOLVER: {MAX_ITER: 2}\n"), ("SOLVER",)),
    FileFault("base missing", _text("_BASE_: nowhere.yaml\n"), ("nowhere.yaml",)),
    FileFault("base is itself", _text("_BASE_: config.yaml\n"), ("_BASE_", "config.yaml")),
    FileFault("base is null", _text("_BASE_:\nSEED: 1\n"), ("_BASE_",)),
    FileFault("base is a number", _text("_BASE_: 7\n"), ("_BASE_",)),
    FileFault("base is a list", _text("_BASE_: [a.yaml, b.yaml]\n"), ("_BASE_", "a.yaml")),
    FileFault("base is a folder", _text("_BASE_: '.'\n"), ("_BASE_", "'.'", "/work")),
    FileFault("a python tag", _text(BASE + f"OUTPUT_DIR: {TAG}\n"), ("tag", "python")),
    FileFault(
        "a tuple's tag", _text(BASE + "INPUT: {MIN_SIZE_TRAIN: !!python/tuple [48, 64]}\n"), ("tag", "python", "tuple")
    ),
    FileFault("an unknown tag", _text(BASE + "SEED: !seed 3\n"), ("!seed",)),
    FileFault("an unknown alias", _text(BASE + "SEED: *seed\n"), ("seed",)),
    FileFault("a link loop", lambda file: file.symlink_to(file)),
    FileFault("another version", _text(BASE + "VERSION: 9\n"), ("VERSION", "version", "v9")),
    FileFault("UTF-16", _text(BASE + "SEED: 3\n", "utf-16"), is_wrong=False),
    FileFault("a byte order mark", _text(BASE + "SEED: 3\n", "utf-8-sig"), is_wrong=False),
    FileFault("CRLF", _text((BASE + "SEED: 3\n").replace("\n", "\r\n")), is_wrong=False),
    FileFault("a comment alone", _text("# nothing\n"), ("config.yaml", "empty"), is_wrong=False),
    FileFault("deep aliases", _text(BASE + "SEED: &a 3\nVIS_PERIOD: *a\n"), is_wrong=False),
)


def _damage_file(draw: np.random.Generator, keys: dict[str, object]) -> Attempt:
    fault = _pick(draw, FILE_FAULTS)
    return Attempt(f"config file: {fault.name}", partial(_train_with_file, fault))  # type: ignore[attr-defined]


def _train_with_file(fault: FileFault, folder: Path) -> Outcome:
    tiny.prepare(folder / "data")
    file = folder / "config.yaml"
    fault.write(file)

    run = use.train(folder / "output", config=str(file))
    if (folder / "ran").exists():
        return Outcome(Verdict.WRONG, "the file has run a program")
    return use.judge(run, folder / "output", fault.words, must_be_told=fault.is_wrong)


def _damage_lazy(draw: np.random.Generator, keys: dict[str, object]) -> Attempt:
    return lazy_configs.make_attempt(draw)


# ---- norms


def _sweep_norm(draw: np.random.Generator, keys: dict[str, object]) -> Attempt:
    place = str(_pick(draw, ("MODEL.RETINANET.NORM", "MODEL.RESNETS.NORM", "MODEL.FPN.NORM")))
    norm = str(_pick(draw, NORMS))
    rows = draw.integers(2)
    return Attempt(f"{place} {norm!r}", partial(_train_with_norm, place, norm, bool(rows)))


def _train_with_norm(place: str, norm: str, has_row: bool, folder: Path) -> Outcome:
    tiny.prepare(folder / "data")
    is_known = norm in ("BN", "SyncBN", "GN", "LN", "FrozenBN", "")
    channels = ("MODEL.FPN.OUT_CHANNELS", 64, "MODEL.RESNETS.STEM_OUT_CHANNELS", 64)  # two for each of GN's 32 groups

    opts = () if has_row else tiny.NO_LEVELS
    run = use.train(folder / "output", place, norm, *channels, *opts)
    if is_known and (run.is_refused or run.raised):
        return Outcome(Verdict.BLAMED if run.is_refused else Verdict.TRACEBACK, run.error or run.raised)
    return use.judge(run, folder / "output", (norm or "NORM", place), must_be_told=not is_known)

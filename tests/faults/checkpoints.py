"""Files of weights that are damaged, foreign or of another model: refused, told, or loaded as they were meant."""

from __future__ import annotations

import dataclasses
import gzip
import json
import logging
import os
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from bnext.checkpoints import load_model
from bnext.errors import BNextError
from bnext.layers import TABLE5_ROWS
from tests import tiny
from tests.faults.attempt import Attempt, Outcome, Verdict
from tests.faults.trained import make_trained, tiny_data

__all__ = ["make_attempts"]

Draw = np.random.Generator
Content = dict[str, Any]


def make_attempts(count: int, seed: int) -> list[Attempt]:
    """Attempts drawn from a seed: bytes, contents, whole other files, other rows of Table 5, in turn."""
    make_trained()
    draw = np.random.default_rng(seed)
    kinds = (_damage_bytes, _edit_content, _edit_content, _replace_file, _load_other_row)
    return [kinds[index % len(kinds)](draw, index // len(kinds)) for index in range(count)]


# ---- loading, and what came of it


def _config(*opts: object):
    return tiny.load("output", *opts)


def _outputs(model: torch.nn.Module) -> torch.Tensor:
    """Of the head, on a fixed picture."""
    image = torch.arange(3 * 64 * 64, dtype=torch.float32).reshape(3, 64, 64) % 251
    with torch.no_grad():
        images = model.eval().preprocess_image([{"image": image}])
        features = model.backbone(images.tensor)
        logits, deltas = model.head([features[name] for name in model.head_in_features])
    return torch.cat([x.flatten() for x in [*logits, *deltas]])


class _Warnings(logging.Handler):
    """Collects what is said, of warnings and above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        for name in ("", "bnext", "fvcore", "detectron2"):
            logging.getLogger(name).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _load(
    file: Path, expected: torch.Tensor | None, *, is_meant: bool, words: tuple[str, ...], opts: tuple[object, ...] = ()
) -> Outcome:
    """Load a file with bnext's loader, and compare the outputs with those that it was meant to give.

    Args:
        file: the weights.
        expected: outputs of the model that was saved.
        is_meant: it must load.
        words: of which a message must have one.
        opts: for the config.
    """
    tiny_data()
    heard = _Warnings()
    try:
        model = load_model(_config(*opts), str(file))
    except BNextError as error:
        if is_meant:
            return Outcome(Verdict.BLAMED, f"must load: {error}")
        is_named = any(word.lower() in str(error).lower() for word in words)
        return Outcome(Verdict.REFUSED if is_named else Verdict.BLAMED, str(error))

    outputs = _outputs(model)
    if expected is not None and outputs.shape == expected.shape and _are_close(outputs, expected):
        return Outcome(Verdict.RIGHT)
    if any(word.lower() in line.lower() for line in heard.lines for word in words) and bool(outputs.isfinite().all()):
        return Outcome(Verdict.SAID, heard.lines[0])
    return Outcome(Verdict.WRONG, f"other outputs without a word; {heard.lines[:1]}")


def _are_close(outputs: torch.Tensor, expected: torch.Tensor) -> bool:
    """Up to what half precision rounds weights by."""
    return float((outputs - expected).abs().max()) < 0.01 * float(expected.abs().max())


def _right_outputs() -> torch.Tensor:
    tiny_data()
    return _outputs(load_model(_config(), str(_weights())))


def _weights() -> Path:
    return make_trained() / "output" / "model_final.pth"


# ---- bytes


def _damage_bytes(draw: Draw, turn: int) -> Attempt:
    way = ("flip", "hole", "truncate", "append", "swap")[turn % 5]
    where, size = float(draw.random()), int(draw.choice([1, 8, 1000, 60_000]))
    return Attempt(f"{way} {size} at {where:.3f}", partial(_load_bytes, way, where, size))


def _load_bytes(way: str, where: float, size: int, folder: Path) -> Outcome:
    content = bytearray(_weights().read_bytes())
    at = int(where * (len(content) - size))

    if way == "flip":
        for index in range(at, at + min(size, 64)):
            content[index] ^= 1 << (index % 8)
    elif way == "hole":
        content[at : at + size] = bytes(size)
    elif way == "truncate":
        del content[at:]
    elif way == "append":
        content += b"x" * size
    else:
        half = len(content) // 2
        content = content[half:] + content[:half]

    file = folder / "weights.pth"
    file.write_bytes(content)
    return _load(file, _right_outputs(), is_meant=False, words=("weights.pth",))


# ---- contents


@dataclasses.dataclass(frozen=True)
class Edit:
    """A change of what a checkpoint holds.

    Args:
        change: of the content, and of one entry that was drawn; gives the new content.
        key: part of the names of the entries that may be drawn.
        is_meant: it must load, and give the same outputs.
    """

    name: str
    change: Callable[[Content, str], Any]
    key: str = ""
    is_meant: bool = False


def _put(value: Callable[[torch.Tensor], Any]) -> Callable[[Content, str], Content]:
    def change(content: Content, key: str) -> Content:
        content["model"][key] = value(content["model"][key])
        return content

    return change


def _fill(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        value.flatten()[-1] = number
        return value

    return change


def _map(change: Callable[[str, torch.Tensor], tuple[str, Any]]) -> Callable[[Content, str], Content]:
    return lambda content, key: {**content, "model": dict(change(*item) for item in content["model"].items())}


def _drop(content: Content, key: str) -> Content:
    del content["model"][key]
    return content


EDITS = (
    Edit("NaN", _put(_fill(float("nan"))), "weight"),
    Edit("inf", _put(_fill(float("inf"))), "bias"),
    Edit("NaN in statistics", _put(_fill(float("nan"))), "running"),
    Edit("a negative variance", _put(_fill(-1.0)), "running_var"),
    Edit("integers", _put(lambda x: (x * 100).long()), "weight"),
    Edit("bools", _put(lambda x: x > 0), "weight"),
    Edit("bools as statistics", _put(lambda x: x > 0), "running_var"),
    Edit("complex numbers", _put(lambda x: x.to(torch.complex64)), "weight"),
    Edit("8-bit numbers", _put(lambda x: (x * 100).to(torch.int8)), "weight"),
    Edit("another shape", _put(lambda x: x[..., :1].clone()), "conv1.weight"),
    Edit("a channel more", _put(lambda x: torch.cat([x, x[:1]])), "norm.weight"),
    Edit("transposed", _put(lambda x: x.transpose(0, -1).clone()), "lateral3.weight"),
    Edit("a scalar", _put(lambda x: x.flatten()[0].clone()), "bias"),
    Edit("no elements", _put(lambda x: x[:0].clone()), "weight"),
    Edit("None", _put(lambda x: None), "weight"),
    Edit("a word", _put(lambda x: "weights"), "weight"),
    Edit("a list", _put(lambda x: x.tolist()), "norm.weight"),
    Edit("a sparse tensor", _put(lambda x: x.to_sparse()), "weight"),
    Edit("a meta tensor", _put(lambda x: x.to("meta")), "weight"),
    Edit("one entry missing", _drop, "weight"),
    Edit("statistics missing", _drop, "running_mean"),
    Edit("renamed", lambda c, k: _map(lambda name, x: (name.replace("head.", "kopf."), x))(c, k)),
    Edit("nothing", lambda c, k: {**c, "model": {}}),
    Edit("no model", lambda c, k: {"iteration": 3}),
    Edit("the model twice nested", lambda c, k: {"model": {"model": c["model"]}}),
    Edit("a list of entries", lambda c, k: {"model": list(c["model"].items())}),
    Edit("numbers as names", lambda c, k: {"model": dict(enumerate(c["model"].values()))}),
    Edit(
        "half precision", lambda c, k: _map(lambda name, x: (name, x.half() if x.ndim == 4 else x))(c, k), is_meant=True
    ),
    Edit(
        "float64",
        lambda c, k: _map(lambda name, x: (name, x.double() if x.is_floating_point() else x))(c, k),
        is_meant=True,
    ),
    Edit("prefix module.", lambda c, k: _map(lambda name, x: (f"module.{name}", x))(c, k), is_meant=True),
    Edit("bare", lambda c, k: c["model"], is_meant=True),
    Edit("under state_dict", lambda c, k: {"state_dict": c["model"]}),
    Edit(
        "parameters",
        lambda c, k: _map(lambda name, x: (name, torch.nn.Parameter(x) if x.is_floating_point() else x))(c, k),
        is_meant=True,
    ),
    Edit("an entry more", lambda c, k: {**c, "model": {**c["model"], "extra.weight": torch.ones(3)}}, is_meant=True),
    Edit(
        "counters missing",
        lambda c, k: {**c, "model": {n: x for n, x in c["model"].items() if "tracked" not in n}},
        is_meant=True,
    ),
)


def _edit_content(draw: Draw, turn: int) -> Attempt:
    edit = EDITS[int(draw.integers(len(EDITS)))]
    return Attempt(f"content: {edit.name}", partial(_load_content, edit, int(draw.integers(10**6))))


def _load_content(edit: Edit, number: int, folder: Path) -> Outcome:
    content = torch.load(_weights(), weights_only=True)
    keys = [key for key, value in content["model"].items() if edit.key in key and value.is_floating_point()]
    key = keys[number % len(keys)]

    file = folder / "weights.pth"
    torch.save(edit.change(content, key), file)
    words = ("weights.pth", key, "not found in the checkpoint", "head.", "shape")
    return _load(file, _right_outputs(), is_meant=edit.is_meant, words=words)


# ---- other files


class _Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


def _legacy(file: Path) -> None:
    torch.save(torch.load(_weights(), weights_only=True), file, _use_new_zipfile_serialization=False)


def _torn_legacy(file: Path) -> None:
    _legacy(file)
    file.write_bytes(file.read_bytes()[:-5000])


FILES: tuple[tuple[str, str, Callable[[Path], object], bool], ...] = (
    ("empty", "w.pth", lambda file: file.write_bytes(b""), False),
    ("a folder", "w.pth", Path.mkdir, False),
    ("missing", "w.pth", lambda file: None, False),
    ("a page of the web", "w.pth", lambda file: file.write_text("<!DOCTYPE html><html>404</html>"), False),
    ("JSON", "w.pth", lambda file: file.write_text(json.dumps({"model": {}})), False),
    (
        "a pointer of Git LFS",
        "w.pth",
        lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"),
        False,
    ),
    ("packed", "w.pth", lambda file: file.write_bytes(gzip.compress(_weights().read_bytes())), False),
    ("code", "w.pth", lambda file: torch.save({"model": _Code()}, file), False),
    ("code in a pickle", "w.pkl", lambda file: file.write_bytes(pickle.dumps({"model": _Code()})), False),
    ("code in the old form", "w.pth", lambda file: file.write_bytes(pickle.dumps({"model": _Code()})), False),
    ("a whole module", "w.pth", lambda file: torch.save(torch.nn.Linear(2, 2), file), False),
    ("a list in a pickle", "w.pkl", lambda file: file.write_bytes(pickle.dumps([1, 2])), False),
    ("a torn pickle", "w.pkl", lambda file: file.write_bytes(pickle.dumps({"model": {"a": np.ones(9)}})[:-9]), False),
    ("arrays", "w.npz", lambda file: np.savez(file, a=np.ones(3)), False),
    ("a link loop", "w.pth", lambda file: file.symlink_to(file), False),
    ("a pipe", "w.pth", lambda file: os.mkfifo(file), False),
    ("unreadable name", "w\n.pth", lambda file: file.write_bytes(b"x"), False),
    ("the old form", "w.pth", _legacy, True),
    ("the old form, torn", "w.pth", _torn_legacy, False),
)


def _replace_file(draw: Draw, turn: int) -> Attempt:
    name, file, write, is_meant = FILES[turn % len(FILES)]
    return Attempt(f"file: {name}", partial(_load_file, file, write, is_meant))


def _load_file(name: str, write: Callable[[Path], object], is_meant: bool, folder: Path) -> Outcome:
    file = folder / name
    write(file)

    outcome = _load(file, _right_outputs(), is_meant=is_meant, words=(name, "w.p", repr(name).strip("'")))
    if (folder / "ran").exists():
        return Outcome(Verdict.WRONG, "the file has run a program")
    return outcome if "weights_only=False" not in outcome.text else Outcome(Verdict.BLAMED, outcome.text)


# ---- other rows of Table 5


def _row_opts(row: int) -> tuple[object, ...]:
    cells = zip(("STATISTICS", "POPULATION", "AFFINE"), TABLE5_ROWS[row], strict=True)
    return tuple(word for key, cell in cells for word in (f"MODEL.BNEXT.RETINANET.{key}", cell))


def _load_other_row(draw: Draw, turn: int) -> Attempt:
    rows = [int(row) for row in draw.choice(list(TABLE5_ROWS), size=2)]
    loader = ("bnext", "detectron2", "torch")[turn % 3]
    return Attempt(f"row {rows[0]} into row {rows[1]} by {loader}", partial(_load_row, *rows, loader))


def _load_row(source: int, target: int, loader: str, folder: Path) -> Outcome:
    """Entries keep no initial value without a word, whoever loads."""
    tiny_data()
    torch.manual_seed(0)
    given = build_model(_config(*_row_opts(source)))
    with torch.no_grad():
        for name, value in given.state_dict().items():
            if "head" in name and value.is_floating_point():
                value.copy_(torch.rand(value.shape) + 2)
    file = folder / "weights.pth"
    torch.save({"model": given.state_dict()}, file)

    heard = _Warnings()
    cfg = _config(*_row_opts(target))
    try:
        if loader == "bnext":
            model = load_model(cfg, str(file))
        else:
            model = build_model(cfg)
            if loader == "detectron2":
                DetectionCheckpointer(model).load(str(file))
            else:
                model.load_state_dict(torch.load(file, weights_only=True)["model"])
    except (BNextError, RuntimeError) as error:
        return Outcome(Verdict.REFUSED, str(error))

    initial = [
        name
        for name, value in model.state_dict().items()
        if "head" in name and value.is_floating_point() and value.ndim == 1 and float(value.min()) < 2
    ]
    told = any("norm" in line or "statistics" in line for line in heard.lines)
    if initial and not told:
        return Outcome(Verdict.WRONG, f"{len(initial)} entries are at their initial values: {initial[:2]}")
    return Outcome(Verdict.SAID if told else Verdict.RIGHT, heard.lines[0] if heard.lines else "")

"""Output folders that are damaged and then resumed: the same weights as without a break, or one line."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from tests.faults import use
from tests.faults.attempt import Attempt, Outcome, Verdict
from tests.faults.trained import ITERATIONS, make_trained, tiny_data

__all__ = ["make_attempts"]

LAST = "last_checkpoint"
SAVED = "model_0000001.pth"


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda output: (output / name).write_bytes(content)


def _remove(name: str) -> Callable[[Path], object]:
    return lambda output: (output / name).unlink()


def _as_folder(name: str) -> Callable[[Path], object]:
    def damage(output: Path) -> None:
        path = output / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        path.mkdir()
        (path / "inside").write_text("x")

    return damage


def _as_file(name: str) -> Callable[[Path], object]:
    def damage(output: Path) -> None:
        shutil.rmtree(output / name)
        (output / name).write_bytes(b"x")

    return damage


def _as_loop(output: Path) -> None:
    (output / SAVED).unlink()
    (output / SAVED).symlink_to(SAVED)


def _cut(name: str, share: float) -> Callable[[Path], object]:
    def damage(output: Path) -> None:
        content = (output / name).read_bytes()
        (output / name).write_bytes(content[: int(len(content) * share)])

    return damage


def _edit(change: Callable[[dict], object]) -> Callable[[Path], object]:
    def damage(output: Path) -> None:
        content = torch.load(output / SAVED, weights_only=True)
        change(content)
        torch.save(content, output / SAVED)

    return damage


def _flip(output: Path) -> None:
    content = bytearray((output / SAVED).read_bytes())
    content[len(content) // 3] ^= 16
    (output / SAVED).write_bytes(content)


# Name, damage, whether the resume must go on as if nothing had happened.
FAULTS: tuple[tuple[str, Callable[[Path], object], bool], ...] = (
    ("nothing", lambda output: None, True),
    ("last_checkpoint empty", _write(LAST, b""), False),
    ("last_checkpoint names a file that is gone", _write(LAST, b"model_0000009.pth"), False),
    ("last_checkpoint is binary", _write(LAST, bytes(range(128, 256))), False),
    ("last_checkpoint with a line's end", _write(LAST, SAVED.encode() + b"\r\n"), True),
    ("last_checkpoint has two lines", _write(LAST, SAVED.encode() + b"\nmodel_final.pth"), False),
    ("last_checkpoint names a folder above", _write(LAST, b"../model.pth"), False),
    ("last_checkpoint is a folder", _as_folder(LAST), False),
    ("last_checkpoint is missing", _remove(LAST), False),
    ("the checkpoint is empty", _write(SAVED, b""), False),
    ("the checkpoint is cut", _cut(SAVED, 0.5), False),
    ("the checkpoint's end is cut", _cut(SAVED, 0.999), False),
    ("a bit is flipped", _flip, False),
    ("the checkpoint is a folder", _as_folder(SAVED), False),
    ("no iteration", _edit(lambda content: content.pop("iteration")), False),
    ("iteration in words", _edit(lambda content: content.update(iteration="two")), False),
    ("iteration -5", _edit(lambda content: content.update(iteration=-5)), False),
    ("iteration beyond the end", _edit(lambda content: content.update(iteration=900)), False),
    ("no trainer", _edit(lambda content: content.pop("trainer")), False),
    ("no optimizer", _edit(lambda content: content["trainer"]["_trainer"].pop("optimizer")), False),
    ("an empty optimizer", _edit(lambda content: content["trainer"]["_trainer"].update(optimizer={})), False),
    ("no hooks", _edit(lambda content: content["trainer"].pop("hooks")), False),
    ("weights alone", _edit(lambda content: [content.pop(key) for key in list(content) if key != "model"]), False),
    ("a weight missing", _edit(lambda content: content["model"].pop("head.bbox_pred.bias")), False),
    ("NaN in a weight", _edit(lambda content: content["model"]["head.bbox_pred.bias"].fill_(float("nan"))), False),
    ("metrics.json cut", _cut("metrics.json", 0.7), True),
    ("metrics.json is binary", _write("metrics.json", bytes(range(256))), True),
    ("metrics.json is a folder", _as_folder("metrics.json"), False),
    ("log.txt is a folder", _as_folder("log.txt"), False),
    ("config.yaml is binary", _write("config.yaml", bytes(range(256))), True),
    ("config.yaml is a folder", _as_folder("config.yaml"), False),
    ("inference is a file", _as_file("inference"), False),
    ("a half beside", _write(f"{SAVED}.partial", b"half"), True),
    ("read-only", lambda output: os.chmod(output, 0o500), True),  # root may write all the same
    ("the checkpoint is a link loop", _as_loop, False),
)


def make_attempts(count: int, seed: int) -> list[Attempt]:
    """The damages, one after another; nothing is drawn."""
    make_trained()
    attempts = []
    for index in range(count):
        name, damage, is_harmless = FAULTS[index % len(FAULTS)]
        attempts.append(Attempt(name, partial(_resume, name, damage, is_harmless)))
    return attempts


def _resume(name: str, damage: Callable[[Path], object], is_harmless: bool, folder: Path) -> Outcome:
    tiny_data()
    trained = make_trained() / "output"
    output = folder / "output"
    shutil.copytree(trained, output)
    (output / "model_final.pth").unlink()
    (output / LAST).write_text(SAVED)
    damage(output)

    opts = ("SOLVER.MAX_ITER", ITERATIONS, "SOLVER.CHECKPOINT_PERIOD", 2)
    run = use.train(output, *opts, options=("--resume",))
    if run.raised:
        return Outcome(Verdict.TRACEBACK, run.raised)
    if run.is_refused:
        if is_harmless:
            return Outcome(Verdict.BLAMED, f"it could be resumed: {run.error}")
        return Outcome(Verdict.REFUSED if "output" in run.error else Verdict.BLAMED, run.error)

    return _compare(output / "model_final.pth", trained / "model_final.pth", run)


def _compare(file: Path, right: Path, run: use.Run) -> Outcome:
    if not file.exists():
        if run.says("checkpoint", "iteration", "resume"):
            return Outcome(Verdict.SAID)
        return Outcome(Verdict.WRONG, f"status {run.status}, no final weights")

    weights, expected = (torch.load(path, weights_only=True)["model"] for path in (file, right))
    differ = [key for key, value in expected.items() if not torch.equal(value, weights[key])]
    if not differ:
        return Outcome(Verdict.RIGHT)
    if run.says("last_checkpoint", "resume", "from iteration", "starts", "checkpoint"):
        return Outcome(Verdict.SAID)
    return Outcome(Verdict.WRONG, f"other weights without a word: {len(differ)} entries")

"""bnext as a new user has it: the wheel of this checkout in an environment that sees the packages of the tests' own.

Nothing is downloaded. The environment imports from its own folder first, and from the other one without that one's
.pth files, so that an editable install there is not seen.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy

from tests import tiny

__all__ = ["build", "make_environment", "run"]

PARTS = ("bnext", "configs", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml")
SDIST_PARTS = (*PARTS, "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile", "constraints.txt", ".ci", "bench")
SDIST_PARTS += ("datasets", "docs", "projects", "tests", "tools")


def build(kind: str, folder: Path) -> Path:
    """The "wheel" or the "sdist" of this checkout, built from a copy of it without network; its file."""
    source, output = folder / f"source_{kind}", folder / kind
    for name in PARTS if kind == "wheel" else SDIST_PARTS:
        path = tiny.ROOT / name
        data = ("digits*", "coco") if name == "datasets" else ()
        leave = shutil.ignore_patterns("__pycache__", "_build", "*.egg-info", *data)
        if path.is_dir():
            shutil.copytree(path, source / name, symlinks=True, ignore=leave)
        else:
            source.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, source / name)

    command = [sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "--outdir", str(output), str(source)]
    check(subprocess.run(command, capture_output=True, text=True, timeout=300, env=bare_environment()))
    (file,) = output.iterdir()
    return file


def make_environment(folder: Path, wheel: Path) -> Path:
    """A virtual environment with the wheel in it; the folder of its programs."""
    check(subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], capture_output=True, text=True))
    programs = folder / "bin"

    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(programs / "python")]
    command = [*pip, "install", "--quiet", "--no-index", "--no-deps", "--no-compile", str(wheel)]
    check(subprocess.run(command, capture_output=True, text=True, timeout=300, env=bare_environment()))

    (own,) = folder.glob("lib/python*/site-packages")
    (own / "others.pth").write_text(f"{Path(numpy.__file__).parents[1]}\n{_find_detectron2()}\n")
    return programs


def _find_detectron2() -> Path:
    """The folder from which detectron2 is imported, which may be another than that of the packages."""
    import detectron2

    return Path(detectron2.__file__).parents[1]


def bare_environment() -> dict[str, str]:
    """Variables of this process without those that would let another process find this checkout."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "DETECTRON2_DATASETS")
    return {key: value for key, value in os.environ.items() if key not in hidden}


def run(programs: Path, folder: Path, *words: object, status: int = 0) -> str:
    """Run a program of the environment in a folder; what it prints, on both streams.

    Args:
        programs: from `make_environment`.
        folder: the working directory.
        words: name of the program and its arguments.
        status: with which it has to end.
    """
    command = [str(programs / str(words[0])), *map(str, words[1:])]
    done = subprocess.run(command, cwd=folder, env=bare_environment(), capture_output=True, text=True, timeout=600)
    said = done.stdout + done.stderr
    assert done.returncode == status, f"{' '.join(map(str, words))}\n{said[-3000:]}"
    return said


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]

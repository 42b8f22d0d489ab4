"""Make the `.venv` of this repository, or see that it is whole; called by every target of the Makefile.

The file `.venv/.setup` says what the environment is: "unfinished" from before the first package until
everything is installed and was imported once, then a digest of what went in. So an environment that
an interrupted set-up left behind is made anew, one made from older files is updated in place, and
one that is up to date costs no network access. `.venv` gets its name with that file in it, and loses
it as a whole, so that no interruption leaves one that seems to be somebody else's. Standard library only.

Usage: python tools/setup_environment.py
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

from install_detectron2 import load_installer

installer = load_installer()
InstallError, run_pip = installer.InstallError, installer.run_pip

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
MARK = VENV / ".setup"
INPUTS = ("constraints.txt", "pyproject.toml", "bnext/cli/install_detectron2.py", "tools/install_detectron2.py")
INPUTS += ("tools/setup_environment.py",)
LEFTOVER = "-setup-"  # in the names of folders that are on their way to or from being the environment
DISK_GB = 8  # 6.2 for the environment, the rest for pip to unpack in
FROST = "imagecorruptions-imaug"  # pictures; what it depends on would replace OpenCV
CHECK = "import torch, torchvision, cv2, detectron2.engine, detectron2.utils.visualizer"


def describe_inputs() -> str:
    """A digest of everything that decides what the environment holds."""
    digest = hashlib.sha256()
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def find_state() -> str:
    """One of "absent", "foreign" (not made here), "unusable", "outdated" and "ready"."""
    if not VENV.exists() or (VENV.is_dir() and not any(VENV.iterdir())):
        return "absent"
    if not MARK.exists():
        return "foreign"
    digest, _, location = MARK.read_text().partition(" ")
    library = VENV / "lib" / "python{}.{}".format(*sys.version_info)
    if location != str(ROOT) or not PYTHON.exists() or not library.exists():
        return "unusable"  # unfinished, moved with its folder, or of another Python than the one asked for
    return "ready" if digest == describe_inputs() else "outdated"


def lock_folder() -> None:
    """Wait until no other set-up works on this folder; the lock ends with this process and its children."""
    lock = os.open(ROOT, os.O_RDONLY)
    os.set_inheritable(lock, True)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("Another set-up of this folder is running; waiting for it.", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)


def check_machine() -> None:
    """Raise at once for what would fail after minutes of downloading."""
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            raise InstallError(f"{sys.executable} must have the module {module}; it has not. Install python3-venv.")
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < DISK_GB:
        raise InstallError(f"The disk of {ROOT} must have {DISK_GB} GB free; got {free:.1f} GB. Free some space.")


def remove_environment() -> None:
    """Remove what there is, and what an interrupted removal or beginning has left."""
    if VENV.exists():
        VENV.rename(VENV.with_name(f"{VENV.name}{LEFTOVER}old-{secrets.token_hex(4)}"))
    for leftover in VENV.parent.glob(f"{VENV.name}{LEFTOVER}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def create_environment() -> None:
    """An empty environment, marked as unfinished before it has its name."""
    new = VENV.with_name(f"{VENV.name}{LEFTOVER}new-{secrets.token_hex(4)}")
    new.mkdir()
    (new / MARK.name).write_text("unfinished")
    new.rename(VENV)

    # The interpreter may be that of the environment just removed, so its base makes the new one.
    base = getattr(sys, "_base_executable", None) or sys.executable
    process = subprocess.run([base, "-m", "venv", str(VENV)], capture_output=True, text=True)
    if process.returncode:
        reason = (process.stdout + process.stderr).strip().splitlines()[-1]
        raise InstallError(f"{base} cannot make a virtual environment ({reason}). Install python3-venv.")


def install_packages() -> None:
    """Everything from constraints.txt, detectron2, and bnext itself, editable."""
    MARK.write_text("unfinished")
    pinned = ("install", "-c", str(ROOT / "constraints.txt"))

    # The build tool is pinned as well: packages without a wheel are built with the installed one.
    print("Set-up 1/3: the build tool", flush=True)
    run_pip(*pinned, "setuptools", python=PYTHON)

    print("Set-up 2/3: detectron2", flush=True)  # before the large ones: its archive may be refused
    installer = [str(PYTHON), str(ROOT / "tools" / "install_detectron2.py"), "--no-deps"]
    process = subprocess.run(installer, stderr=subprocess.PIPE, text=True, close_fds=False)
    if process.returncode:
        raise InstallError(process.stderr.strip().removeprefix("error: "))

    print("Set-up 3/3: torch and the other pinned packages (about 3 GB to download)", flush=True)
    local = ("--no-build-isolation", "--use-pep517", "-e", f"{ROOT}[corruptions,digits,detectron2,docs,fast-eval,dev]")
    run_pip(*pinned, *local, python=PYTHON, show=sys.stdout.isatty())
    run_pip(*pinned, "--no-deps", FROST, python=PYTHON)

    process = subprocess.run([PYTHON, "-W", "ignore", "-c", CHECK], capture_output=True, text=True)
    if process.returncode:
        reason = process.stderr.strip().splitlines()[-1]
        raise InstallError(f"The new environment must import its packages; got {reason}. Remove {VENV} and try again.")


def set_up() -> None:
    """Bring the environment from whatever state it is in to "ready"."""
    state = find_state()
    if state == "ready":
        return
    if state == "foreign":
        raise InstallError(f"{VENV} must be made by `make setup`; got one that was not. Move it away.")
    todo = "it is brought up to date" if state == "outdated" else "it is made anew"
    print(f"The environment {VENV} is {state}; {todo}.", flush=True)
    if state != "outdated":
        remove_environment()
        check_machine()
        create_environment()
    install_packages()
    MARK.write_text(f"{describe_inputs()} {ROOT}")
    print(f"The environment {VENV} is ready.")


def main() -> int:
    try:
        lock_folder()
        set_up()
    except (InstallError, OSError) as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup: interrupted. Run `make setup` again; it begins anew.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

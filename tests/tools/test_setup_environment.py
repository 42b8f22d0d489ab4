"""The set-up: no half-made environment is taken for a whole one, and failures are one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import setup_environment as setup

REPOSITORY = Path(setup.__file__).resolve().parent.parent
NO_NETWORK = {
    "PIP_CONFIG_FILE": "/dev/null",
    "PIP_INDEX_URL": "http://127.0.0.1:9",
    "PIP_EXTRA_INDEX_URL": "",
    "PIP_FIND_LINKS": "",
    "PIP_RETRIES": "1",
}


@pytest.fixture
def tree(tmp_path):
    """The files of the repository that the set-up reads, in a folder of their own."""
    for name in (*setup.INPUTS, "Makefile"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REPOSITORY / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def whole(tree, monkeypatch):
    """An environment that passes for whole, in `tree`."""
    venv = tree / ".venv"
    for name, value in {"ROOT": tree, "VENV": venv, "MARK": venv / ".setup", "PYTHON": venv / "bin" / "python"}.items():
        monkeypatch.setattr(setup, name, value)
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to(sys.executable)
    (venv / "lib" / "python{}.{}".format(*sys.version_info)).mkdir(parents=True)
    setup.MARK.write_text(f"{setup.describe_inputs()} {tree}")
    return venv


def run(*command: str | Path, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")} | env
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=100)


class TestState:
    def test_whole_environment_is_ready_and_not_touched(self, whole, monkeypatch):
        assert setup.find_state() == "ready"
        monkeypatch.setattr(setup, "install_packages", lambda: pytest.fail("a whole environment was installed into"))
        setup.set_up()

    @pytest.mark.parametrize("name", setup.INPUTS)
    def test_changed_input_makes_it_outdated(self, whole, name):
        with open(setup.ROOT / name, "a") as file:
            file.write("\n")
        assert setup.find_state() == "outdated"

    def test_nothing_there(self, whole):
        shutil.rmtree(whole)
        assert setup.find_state() == "absent"

    def test_interrupted_is_not_taken_for_whole(self, whole):
        setup.MARK.write_text("unfinished")
        assert setup.find_state() == "unusable"

    def test_moved_folder_is_not_taken_for_whole(self, whole):
        setup.MARK.write_text(f"{setup.describe_inputs()} /elsewhere")
        assert setup.find_state() == "unusable"

    def test_lost_interpreter(self, whole):
        setup.PYTHON.unlink()
        setup.PYTHON.symlink_to("/nonexistent/python")
        assert setup.find_state() == "unusable"

    def test_another_python_is_asked_for(self, whole):
        (library,) = (whole / "lib").iterdir()
        library.rename(whole / "lib" / "python3.9")
        assert setup.find_state() == "unusable"

    def test_environment_of_the_user_is_never_removed(self, whole):
        setup.MARK.unlink()
        (whole / "mine").touch()
        with pytest.raises(setup.InstallError, match="must be made by `make setup`; got one that was not"):
            setup.set_up()
        assert (whole / "mine").exists()

    def test_failed_update_leaves_it_unfinished(self, whole, monkeypatch):
        (setup.ROOT / "constraints.txt").write_text("")
        monkeypatch.setattr(setup, "PYTHON", Path("/bin/false"))
        with pytest.raises(setup.InstallError):
            setup.set_up()
        assert setup.MARK.read_text() == "unfinished"


def test_full_disk_is_seen_before_anything_is_made(whole, monkeypatch):
    shutil.rmtree(whole)
    monkeypatch.setattr(setup, "DISK_GB", 10**9)
    monkeypatch.setattr(setup, "create_environment", lambda: pytest.fail("it was begun on a full disk"))
    with pytest.raises(setup.InstallError, match=r"must have 1000000000 GB free; got [\d.]+ GB"):
        setup.set_up()
    assert not whole.exists()


def test_missing_venv_module_is_named(whole, monkeypatch):
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(setup.InstallError, match="must have the module venv; it has not. Install python3-venv"):
        setup.check_machine()


def test_without_network_one_line_and_no_whole_environment(tree):
    """After a set-up that was interrupted."""
    (tree / ".venv").mkdir()
    (tree / ".venv" / ".setup").write_text("unfinished")
    process = run(sys.executable, tree / "tools" / "setup_environment.py", folder=tree, **NO_NETWORK)
    assert process.returncode == 1
    assert "is unusable; it is made anew" in process.stdout
    assert re.fullmatch(r"setup: The package index must be reachable; got .*Connection refused.*\n", process.stderr)
    assert (tree / ".venv" / ".setup").read_text() == "unfinished"


def test_second_set_up_waits_for_the_first(whole):
    """Also for a pip that outlives its killed parent, since the lock passes to children."""
    code = "import setup_environment as s, subprocess, os; s.lock_folder(); print('locked', flush=True); "
    # -3 is DEVNULL: the pipes would be waited for.
    holder = code + "subprocess.Popen(['sleep', '2'], close_fds=False, stdout=-3, stderr=-3); os._exit(0)"
    start = time.monotonic()
    first = run(sys.executable, "-c", holder, folder=setup.ROOT / "tools")
    second = run(sys.executable, "-c", code, folder=setup.ROOT / "tools")
    assert (first.stdout, first.returncode) == ("locked\n", 0)
    assert second.stdout == "Another set-up of this folder is running; waiting for it.\nlocked\n"
    assert time.monotonic() - start >= 2


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
class TestMakefile:
    @pytest.mark.parametrize(
        ("python", "message"),
        [("no-such-python", "no-such-python was not found"), ("false", "Python must be 3.10 to 3.13; got")],
    )
    def test_unsupported_python_is_one_line(self, tree, python, message):
        process = run("make", "setup", f"PYTHON={python}", folder=tree)
        assert process.returncode != 0
        ours = [line for line in process.stderr.splitlines() if not line.startswith("make")]
        assert len(ours) == 1
        assert message in ours[0]
        assert not (tree / ".venv").exists()

    def test_ready_environment_costs_no_time_and_no_network(self, whole):
        start = time.monotonic()
        process = run("make", "setup", folder=setup.ROOT, **NO_NETWORK)
        assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
        assert time.monotonic() - start < 5


def test_everything_that_is_installed_is_pinned():
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = sum(project["optional-dependencies"].values(), project["dependencies"])
    lines = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+( ; python_version (<|>=) \"3\.11\")?", line) for line in lines)
    pinned = {"bnext", *(line.split("==")[0] for line in lines)}  # an extra of its own extras
    assert {re.split(r"[\[<>=]", name)[0] for name in [*wanted, "setuptools"]} <= pinned


class TestKilled:
    """At any step, by whatever cannot be caught: the next set-up begins anew, and never takes it for somebody's."""

    @pytest.mark.parametrize("state", ["absent", "unusable", "outdated"])
    def test_at_every_step(self, whole, monkeypatch, state):
        for number in range(20):
            self.bring_into(whole, state)
            if not self.is_killed(monkeypatch, number):
                break
            assert setup.find_state() in ("absent", "unusable", state), f"killed at step {number}"
        else:
            pytest.fail("the set-up has more steps than this test kills it at")

        assert number >= 4
        assert setup.find_state() == "ready"
        leftovers = [path for path in whole.parent.glob(".venv*") if path != whole]
        assert leftovers == [] or state == "outdated"

    def bring_into(self, venv, state):
        shutil.rmtree(venv, ignore_errors=True)
        if state != "absent":
            (venv / "bin").mkdir(parents=True)
            (venv / "bin" / "python").symlink_to(sys.executable)
            (venv / "lib" / "python{}.{}".format(*sys.version_info)).mkdir(parents=True)
            setup.MARK.write_text("unfinished" if state == "unusable" else f"older {setup.ROOT}")

    def is_killed(self, monkeypatch, number):
        """Whether a set-up that dies at its step of this number has so many."""
        steps = []

        def count(step, *is_half_done):
            def stepping(*arguments, **options):
                steps.append(step)
                if len(steps) > number:
                    for half in is_half_done:
                        half(*arguments)
                    raise Killed
                return step(*arguments, **options)

            return stepping

        with monkeypatch.context() as patch:
            for name in ("rename", "mkdir", "write_text"):
                patch.setattr(Path, name, count(getattr(Path, name)))
            patch.setattr(setup.shutil, "rmtree", count(shutil.rmtree, remove_mark))
            patch.setattr(setup, "run_pip", count(lambda *arguments, **options: None))
            done = subprocess.CompletedProcess([], 0, "", "")
            patch.setattr(setup.subprocess, "run", count(lambda *arguments, **options: done))
            patch.setattr(setup, "check_machine", lambda: None)
            try:
                setup.set_up()
            except Killed:
                return True

        self.complete()
        return False

    def complete(self):
        """What the packages' installation would have left."""
        (setup.VENV / "bin").mkdir(exist_ok=True)
        setup.PYTHON.unlink(missing_ok=True)
        setup.PYTHON.symlink_to(sys.executable)
        (setup.VENV / "lib" / "python{}.{}".format(*sys.version_info)).mkdir(parents=True, exist_ok=True)


class Killed(BaseException):
    """In the place of SIGKILL."""


def remove_mark(folder, **options):
    Path(folder, ".setup").unlink(missing_ok=True)


def test_an_empty_folder_is_nobodys_environment(whole):
    shutil.rmtree(whole)
    whole.mkdir()
    assert setup.find_state() == "absent"

"""Processes that a command starts leave Ctrl-C to it, and do not outlive it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TOOL = """
import bnext.cli.start
import multiprocessing
import os
import signal
import time

def work(queue):
    queue.put(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)
    time.sleep(60)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=work, args=(queue,))
    worker.start()
    print(worker.pid, queue.get(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def has_ended(pid, seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_spawned_process_ignores_ctrl_c_and_ends_with_its_parent(tmp_path):
    (tmp_path / "bnext").write_text(TOOL)  # as the script of that name
    run = subprocess.run(
        [sys.executable, str(tmp_path / "bnext")], stdout=subprocess.PIPE, text=True, timeout=60, check=False
    )
    pid, ignores = run.stdout.split()
    try:
        assert ignores == "True"
        assert has_ended(int(pid), seconds=20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)

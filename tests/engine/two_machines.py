"""What workers of two machines do, all of them on this one; run by test_two_machines.py.

python -m tests.engine.two_machines MACHINE URL OUTPUT [KEY VALUE ...]
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

from detectron2.utils import comm

from bnext.cli.run_command import run_command
from bnext.engine import launch, train
from tests import tiny


def work(folder, machine, opts):
    tiny.register(Path(folder, "datasets"))
    cfg = tiny.load(Path(folder, "out"), "DATASETS.TEST", "()", "SOLVER.IMS_PER_BATCH", 8, "SOLVER.MAX_ITER", 2, *opts)
    Path(folder, f"{machine}-{os.getpid()}.started").touch()
    train(cfg)
    Path(folder, f"{comm.get_rank()}.trained").touch()


def main(machine, url, folder, *opts):
    machines = 2
    if opts[:1] == ("MACHINES",):
        machines, opts = int(opts[1]), opts[2:]
    seconds = timedelta(seconds=60)

    def start():
        launch(work, 2, machines, int(machine), url, args=(folder, machine, opts), timeout=seconds, device="cpu")

    return run_command(start)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

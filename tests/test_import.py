"""bnext without detectron2: the torch-only packages work, the others say what is missing."""

import subprocess
import sys

BLOCKED = "import sys; sys.modules['detectron2'] = None; "


def run(code):
    return subprocess.run([sys.executable, "-c", BLOCKED + code], capture_output=True, text=True, timeout=60)


def test_torch_only_packages_work_without_detectron2():
    code = (
        "import torch, bnext, bnext.distributed; "
        "norm = bnext.LevelBatchNorm2d(4, ['p3']); "
        "print(norm({'p3': torch.ones(2, 4, 3, 3)})['p3'].shape)"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "[2, 4, 3, 3]" in done.stdout


def test_the_others_name_the_ways_to_get_detectron2():
    done = run("import bnext.heads")
    assert done.returncode != 0
    assert "tools/install_detectron2.py" in done.stderr

"""bnext without detectron2: the torch-only packages work, the others say what is missing."""

import subprocess
import sys

BLOCKED = "import sys; sys.modules['detectron2'] = None; "
# The installed one would be found before a bare folder.
ONLY_A_FOLDER = """
import sys
from importlib.machinery import PathFinder

class Folder:
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [{!r}]) if name == "detectron2" else None

sys.meta_path.insert(0, Folder)
"""


def run(code, before=BLOCKED):
    return subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True, timeout=60)


def test_torch_only_packages_work_without_detectron2():
    code = (
        "import torch, bnext, bnext.distributed; "
        "norm = bnext.LevelBatchNorm2d(4, ['p3']); "
        "print(norm({'p3': torch.ones(2, 4, 3, 3)})['p3'].shape)"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "[2, 4, 3, 3]" in done.stdout


def test_a_bare_folder_of_the_name_is_no_detectron2(tmp_path):
    (tmp_path / "detectron2").mkdir()
    done = run("import bnext; print('detectron2' in sys.modules)", ONLY_A_FOLDER.format(str(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


def test_the_others_name_the_ways_to_get_detectron2():
    done = run("import bnext.heads")
    assert done.returncode != 0
    assert "bnext install-detectron2" in done.stderr
    assert "conda-forge" in done.stderr

"""bnext is imported by need: no torch and no detectron2 before something needs it, and what needs it registers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
REGISTERED = """
from detectron2.data import DatasetCatalog
from detectron2.modeling import META_ARCH_REGISTRY

def is_registered():
    return "BNextRetinaNet" in META_ARCH_REGISTRY, "digits_train" in DatasetCatalog
"""
BNEXT_FIRST = """
import pickle
import sys
import threading

import bnext

assert not {"torch", "numpy", "detectron2"} & set(sys.modules), "import bnext is to cost nothing"
assert {"BatchNorm2d", "repair", "heads"} <= set(dir(bnext))

# A name that several threads use first, and at the same time.
seen, barrier = [], threading.Barrier(8)
def use():
    barrier.wait()
    seen.append((bnext.BatchNorm2d, bnext.convert_norm, bnext.ConfigError))
threads = [threading.Thread(target=use) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert len(seen) == 8 and len(set(seen)) == 1
assert not {"detectron2", "triton"} & set(sys.modules), "the layers need torch alone"

spec = bnext.NormSpec(statistics="shared")
assert pickle.loads(pickle.dumps((bnext.BatchNorm2d, spec))) == (bnext.BatchNorm2d, spec)
try:
    bnext.no_such_name
except AttributeError:
    pass

exec(sys.argv[1])
assert is_registered() == (False, False), "nothing of bnext was needed yet"
from detectron2.config import get_cfg
cfg = get_cfg()
bnext.add_bnext_config(cfg)
assert is_registered() == (True, True)
bnext.register()

names = {}
exec("from bnext import *", names)
assert set(bnext.__all__) <= set(names)
"""
DETECTRON2_FIRST = """
import os
import sys

import detectron2  # which imports DETECTRON2_ENV_MODULE
assert ("bnext" in sys.modules) == ("DETECTRON2_ENV_MODULE" in os.environ)
import bnext
exec(sys.argv[1])
assert is_registered() == (True, True)
"""


def run(code, before=BLOCKED, **variables):
    command = [sys.executable, "-c", before + code, REGISTERED]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, env={**os.environ, **variables})


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


def test_bnext_first_costs_nothing_and_registers_when_it_is_needed():
    done = run(BNEXT_FIRST, before="")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("has_door", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_detectron2_first_be_it_by_its_own_door(has_door, tmp_path):
    Path(tmp_path, "mine.py").write_text("import bnext\n\ndef setup_environment():\n    pass\n")
    variables = {"DETECTRON2_ENV_MODULE": str(tmp_path / "mine.py")} if has_door else {}
    done = run(DETECTRON2_FIRST, before="", **variables)
    assert done.returncode == 0, done.stderr

"""A LazyConfig from its file: what it imports, and one line for whatever it raises."""

import builtins
import sys

import pytest

from bnext.errors import ConfigError
from bnext.lazy_config import read_lazy_file

BASE = "train = dict(max_iter=3)\nmodel = dict(depth=18)\n"


def write(folder, **files):
    """Files by their names without .py; the path of the first."""
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(folder / f"{next(iter(files))}.py")


def test_relative_imports_and_overrides_are_of_this_file_alone(tmp_path):
    text = "from .base import train, model\nmodel.depth = 50\nmodel.width = '${.depth}'\n"
    path = write(tmp_path, config=text, base=BASE)
    config = read_lazy_file(path, ["model.depth=34"])
    assert (config.model.depth, config.model.width, config.train.max_iter) == (34, 34, 3)
    assert read_lazy_file(path).model.depth == 50
    assert read_lazy_file(str(tmp_path / "base.py")).model.depth == 18


WRONG = {
    "syntax": ("model = (\n", r"SyntaxError.*line 1"),
    "an exception": ("x = 1\nmodel = dict(a=1 / 0)\n", r"ZeroDivisionError.*line 2"),
    "an exception without words": ("\n\nassert False\n", r"got AssertionError \(line 3\)"),
    "a module that is not there": ("import absent_module\n", r"absent_module.*line 1.*PYTHONPATH"),
    "a base that is not there": ("from .absent import model\n", r"absent\.py.*line 1"),
    "a base that raises": ("from .base import model\n", r"KeyError.*base\.py, line 2"),
    "an exit": ("import sys\nsys.exit(3)\n", r"SystemExit.*line 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_file_that_raises_is_a_line_that_names_it(tmp_path, name):
    text, words = WRONG[name]
    path = write(tmp_path, config=text, base="x = {}\nmodel = x['absent']\n")
    before = builtins.__import__
    with pytest.raises(ConfigError, match=words) as error:
        read_lazy_file(path)
    assert path in str(error.value)
    assert builtins.__import__ is before, "detectron2 leaves its own in the place"


@pytest.mark.parametrize("name", ["absent.py", "folder.py"])
def test_a_path_that_is_no_file_is_named(tmp_path, name):
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(ConfigError, match=rf"--config-file must be a file.*{name}"):
        read_lazy_file(str(tmp_path / name))


def test_a_module_of_the_files_own_is_imported_as_ever(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write(tmp_path, config="import lazy_own_module\nmodel = lazy_own_module.model\n", lazy_own_module=BASE)
    assert read_lazy_file(path).model.depth == 18
    del sys.modules["lazy_own_module"]

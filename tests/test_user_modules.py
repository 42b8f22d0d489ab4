"""Modules that a command imports for its user: found, imported once, and refused in a line that names file and line."""

import sys

import pytest

from bnext import user_modules
from bnext.errors import ConfigError
from bnext.user_modules import import_modules, list_imported, mentions


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory; what is imported from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(user_modules, "_imported", {})
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def write(folder, name, text=""):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("mine", "mine"),
        ("mine.py", "mine"),
        ("deep/other.py", "other"),
        ("package", "package"),
        ("package/__init__.py", "package"),
        ("package.inner", "package.inner"),
        ("package/inner.py", "package.inner"),
    ],
)
def test_a_name_or_a_path_is_found_in_the_working_directory(folder, given, name):
    for file in ("mine.py", "deep/other.py", "package/__init__.py", "package/inner.py"):
        write(folder, file, "from . import inner" if file == "package/__init__.py" else "NUMBER = 7")
    import_modules([given])
    assert list_imported() == (name,)
    assert str(folder) in sys.modules[name].__file__


def test_what_a_module_does_at_its_top_level_is_done_once(folder, capsys):
    write(folder, "speaks.py", "print('once')\nif __name__ == '__main__':\n    print('as a program')")
    import_modules(["speaks", "speaks.py"])
    assert capsys.readouterr().out == "once\n"
    assert mentions("speaks", "as a program")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("number = (\n", ["SyntaxError", "broken.py, line 1"]),
        ("\n\nimport nobody_has_this", ["nobody_has_this", "broken.py, line 3"]),
        ("from json import nobody_has_this", ["nobody_has_this", "broken.py, line 1"]),
        ("def fail():\n    raise KeyError('a\\nb')\n\nfail()", ["KeyError", "broken.py, line 2"]),
        ("import sys\ndef main():\n    sys.exit(3)\nmain()", ["exit status 3", "broken.py, line 4", "__main__"]),
        ("import json\njson.loads('{')", ["JSONDecodeError", "broken.py, line 2"]),
    ],
)
def test_a_module_that_cannot_be_imported_is_named_with_its_line(folder, text, words):
    write(folder, "broken.py", text)
    with pytest.raises(ConfigError) as refused:
        import_modules(["broken"])
    assert "\n" not in str(refused.value)
    assert [word for word in ["--import broken", *words] if word not in str(refused.value)] == []
    assert list_imported() == ()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("mine_", "Did you mean 'mine'?"),
        ("mine.part", "'mine.part'"),
        ("absent/mine.py", "absent/mine.py"),
        ("mine/", "Did you mean mine.py?"),
        ("no-name.py", "no-name.py"),
        ("--resume", "'--resume'"),
        ("", "''"),
        ("bare", "a folder without __init__.py"),
        ("queue", "queue.py"),
        ("queue.py", "queue.py"),
    ],
)
def test_a_name_that_is_none_or_another_modules_is_refused(folder, given, words):
    for file in ("mine.py", "no-name.py", "bare/some.txt", "queue.py"):
        write(folder, file)
    import queue

    assert "site-packages" not in queue.__file__
    with pytest.raises(ConfigError) as refused:
        import_modules([given])
    assert words in str(refused.value)

"""The commands that pages show are parsed: options, configs of the package and keys exist."""

import importlib

import pytest

from bnext import get_config_file
from bnext.cli.arguments import parse_arguments
from bnext.cli.main import COMMANDS, build_parser
from tests.docs.pages import PAGES, find_commands, has_key

LINES = [(page, words) for page in [*PAGES, "README.md"] for words in find_commands(page)]


@pytest.mark.parametrize(("page", "words"), LINES, ids=[f"{page}: {' '.join(words)}" for page, words in LINES])
def test_a_command_is_parsed(page, words):
    _, name, *rest = words
    assert name in COMMANDS
    command = importlib.import_module(COMMANDS[name][0])
    if not hasattr(command, "add_arguments"):  # it needs nothing but Python, and parses by itself
        assert not rest
        return
    args = parse_arguments(build_parser(name), rest, intermixed=getattr(command, "IS_INTERMIXED", False))

    config = getattr(args, "config_file", None) or ""
    if config and not config.startswith("my_"):
        get_config_file(config)

    opts = getattr(args, "opts", [])
    if name == "doctor" and opts and not config:  # a checkpoint alone
        assert len(opts) == 1
        return
    if config.endswith(".py"):
        assert not [word for word in opts if "=" not in word]
    else:
        assert len(opts) % 2 == 0
        assert not [key for key in opts[::2] if not has_key(key)]

"""The pages of the site: their texts and code blocks."""

import re
import shlex
import textwrap
from pathlib import Path

from detectron2.config import get_cfg

from bnext import add_bnext_config

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(str(path.relative_to(ROOT)) for path in DOCS.rglob("*.md"))


def read(page):
    return (ROOT / page).read_text()


def find_blocks(page, language):
    """The code blocks of a page, also those within lists."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", read(page), flags=re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(code) for _, code in found]


def find_commands(page):
    """The `bnext` commands of a page, as words."""
    commands = []
    for block in find_blocks(page, "sh"):
        lines = block.replace("\\\n", " ").splitlines()
        commands += [shlex.split(line, comments=True) for line in lines if line.startswith("bnext ")]
    return commands


def has_key(name):
    """Whether Detectron2's config with the keys of bnext has a key or a node."""
    node = get_cfg()
    add_bnext_config(node)
    for part in name.split("."):
        if not hasattr(node, "keys") or part not in node:
            return False
        node = node[part]
    return True

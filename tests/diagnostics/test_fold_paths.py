"""Paths folded into patterns: each stands for exactly its paths."""

import itertools
import re

from hypothesis import given
from hypothesis import strategies as st

from bnext.diagnostics.fold_paths import fold_paths

PARTS = st.sampled_from(["", "norm", "conv", "conv1", "conv2", "conv3", "res10", "p3_0", "007", "0", "1", "3"])
PATHS = st.lists(st.lists(PARTS, min_size=1, max_size=3).map(".".join), unique=True, max_size=12)


def expand(pattern):
    """All paths that a pattern stands for."""
    choices = []
    for piece in re.split(r"(\{[^}]*\})", pattern):
        numbers = [piece]
        if piece.startswith("{"):
            numbers = []
            for run in piece[1:-1].split(","):
                first, _, last = run.partition("-")
                numbers += map(str, range(int(first), int(last or first) + 1))
        choices.append(numbers)
    return {"".join(parts) for parts in itertools.product(*choices)}


@given(PATHS)
def test_every_path_is_in_one_pattern_that_stands_for_no_other(paths):
    folded = fold_paths(paths)
    assert sorted(itertools.chain(*folded.values())) == sorted(paths)
    assert all(expand(pattern) == set(members) for pattern, members in folded.items())
    assert all([path for path in paths if path in members] == members for members in folded.values())


def test_a_resnet_50_is_five_patterns():
    blocks = {2: 3, 3: 4, 4: 6, 5: 3}
    paths = ["stem.conv1.norm"]
    for stage, number in blocks.items():
        paths.append(f"res{stage}.0.shortcut.norm")
        paths += [f"res{stage}.{block}.conv{conv}.norm" for block in range(number) for conv in (1, 2, 3)]
    assert list(fold_paths(paths)) == [
        "stem.conv1.norm",
        "res{2-5}.0.shortcut.norm",
        "res{2,5}.{0-2}.conv{1-3}.norm",
        "res3.{0-3}.conv{1-3}.norm",
        "res4.{0-5}.conv{1-3}.norm",
    ]

"""The command `bnext`: a table of its commands, each of which is a module of this room.

Such a module has `DESCRIPTION`, the text of its help, `add_arguments(parser)` and `execute(args)`, which may return an
exit status; where something is kept after Ctrl-C, `find_kept(args)` gives a function that says what. `IS_INTERMIXED`
says whether its options may stand among KEY VALUE pairs. It is imported when it is asked for. One of `_ALONE` has
`main(argv, prog)` instead of `execute`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType

import bnext.cli.start  # noqa: F401  before all that takes time
from bnext.garbage import without_collection
from bnext.packages import explain_missing
from bnext.text import find_near

__all__ = ["COMMANDS", "build_parser", "main", "run_tool"]

# name -> module, and what it does.
COMMANDS: Mapping[str, tuple[str, str]] = {
    "train": ("bnext.cli.train", "train a detector, as Detectron2's train_net.py does"),
    "evaluate": ("bnext.cli.evaluate", "COCO AP of a checkpoint"),
    "reestimate": ("bnext.cli.reestimate", "population statistics of a checkpoint, estimated anew without training"),
    "compare": ("bnext.cli.compare", "COCO AP of a checkpoint with each kind of statistics"),
    "robustness": ("bnext.cli.robustness", "COCO AP of a checkpoint by corruption and severity, mPC and rPC"),
    "doctor": ("bnext.cli.doctor", "what is wrong with the batch norms of a config or a checkpoint, and what to do"),
    "draw": ("bnext.cli.draw", "pictures of what checkpoints detect, each box as right, wrong class, missed ..."),
    "export": ("bnext.cli.export", "a checkpoint as TorchScript, ONNX or a program of torch.export, verified"),
    "convert": ("bnext.cli.convert", "a checkpoint in the form of another config: other norms, torchvision's names"),
    "domain": ("bnext.cli.domain", "domains of a checkpoint: add one from pictures, drop, merge, select one alone"),
    "check-data": ("bnext.cli.check_data", "faults of data sets, and what is in them"),
    "corrupt": ("bnext.cli.corrupt", "a corrupted copy of a data set, as files"),
    "check-gpu": ("bnext.cli.check_gpu", "parity, waits and speed of the norms on this machine's GPU"),
    "demo": ("bnext.cli.demo", "the main job in five minutes, on digits"),
    "install-detectron2": ("bnext.cli.install_detectron2", "detectron2 without a compiler, where there is none"),
}
_HELP = """usage: bnext COMMAND [options]

Batch normalization done right in object detection.

commands:
{commands}

Where to start:
    bnext demo
    bnext train --config-file Digits-Detection/retinanet_R_18_FPN.yaml    # a config of the package, or a file of yours

bnext COMMAND --help shows the options of a command."""
_ALONE = ("check-gpu", "install-detectron2")  # need no detectron2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line of `bnext`.

    Args:
        argv: its words; None: those of this process.

    Returns:
        The exit status: 0, 2 for a mistake that the user can mend, or 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        return _run(words[0], words[1:], f"bnext {words[0]}")

    if not words or words[0] in ("-h", "--help", "help"):
        print(_format_help())
        return 0
    if words[0] == "--version":
        print(f"bnext {_find_version()}")
        return 0

    near = find_near(words[0], list(COMMANDS), most=1)
    remedy = f"Did you mean {near[0]}?" if near else "See bnext --help."
    commands = ", ".join(COMMANDS)
    print(f"error: The command must be one of {commands}; got {words[0]!r}. {remedy}", file=sys.stderr)
    return 2


def run_tool(name: str, argv: Sequence[str] | None = None) -> int:
    """Run a command for a file of `tools/`, under whose own name its help speaks; see `main`."""
    return _run(name, list(sys.argv[1:] if argv is None else argv), None)


def build_parser(name: str, prog: str | None = None) -> argparse.ArgumentParser:
    """The options of a command.

    Args:
        name: of `COMMANDS`.
        prog: how its help calls it; None: as the file that runs.
    """
    return _build_parser(_import_command(name), prog)


def _build_parser(command: ModuleType, prog: str | None) -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=command.DESCRIPTION, formatter_class=form)
    command.add_arguments(parser)
    if hasattr(command, "main"):
        return parser

    help = "a module of yours, which registers data sets or architectures; may be given several times"
    parser.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE", help=help)
    parser.add_argument("--verbose", action="store_true", help="show on the screen all that is logged")
    return parser


def _import_command(name: str) -> ModuleType:
    if name not in _ALONE:
        importlib.import_module("bnext.config")  # first, as it keeps the warnings of detectron2's import back
    return importlib.import_module(COMMANDS[name][0])


def _run(name: str, words: Sequence[str], prog: str | None) -> int:
    try:
        with without_collection():
            command = _import_command(name)
    except ImportError as error:
        refusal = explain_missing(error)
        if refusal is None:
            raise
        print(f"error: {refusal}", file=sys.stderr)
        return 2

    if name in _ALONE:
        status: int = command.main(words, prog)
        return status

    from bnext.cli.arguments import parse_arguments
    from bnext.cli.run_command import run_command
    from bnext.config.files import find_config_file
    from bnext.engine.screen import VERBOSE
    from bnext.user_modules import import_modules

    parser = _build_parser(command, prog)
    args = parse_arguments(parser, words, intermixed=getattr(command, "IS_INTERMIXED", False))
    if args.verbose:
        os.environ[VERBOSE] = "1"  # which workers inherit
    if getattr(args, "config_file", ""):
        args.config_file = find_config_file(args.config_file)
    find_kept = getattr(command, "find_kept", None)

    def execute() -> int | None:
        import_modules(args.imports)
        wanted: int | None = command.execute(args)
        return wanted

    return run_command(execute, find_kept(args) if find_kept else None)


def _format_help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return _HELP.format(commands="\n".join(lines))


def _find_version() -> str:
    import bnext

    return bnext.__version__

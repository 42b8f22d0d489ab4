"""A corrupted copy of a data set, written once."""

from __future__ import annotations

import argparse
from pathlib import Path

from bnext.cli.arguments import FILE_HELP, PAIRS_HELP
from bnext.cli.output_file import find_kept
from bnext.config import load_config
from bnext.data.corruptions.names import NAMES
from bnext.data.write_corrupted import ANNOTATIONS, PICTURES, write_corrupted

__all__ = ["DESCRIPTION", "add_arguments", "execute", "find_kept"]

DESCRIPTION = """Write a corrupted copy of a data set: pictures as PNG, and an annotation file in COCO's format.

    bnext corrupt --dataset my_val --corruption fog --severity 3 --output my_val_fog_3 --config-file my_config.yaml
    bnext corrupt --dataset digits_val --corruption invert --severity 5 --output digits_val_negative

Configs need no such copy: `my_val@fog_3` in DATASETS.TEST is the same set, corrupted when it is read. The set is only
read, and nothing that exists is replaced."""
IS_INTERMIXED = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--dataset", required=True, metavar="NAME", help="a registered set, or one that the config lists")
    add("--corruption", required=True, metavar="NAME", help=f"one of {', '.join(NAMES)}")
    add("--severity", required=True, type=int, metavar="S", help="1 to 5, the worst")
    add("--output", required=True, metavar="FOLDER", help="the folder to make")
    add("--config-file", default="", metavar="FILE", help=f"that lists the set: {FILE_HELP}")
    add("opts", nargs="*", metavar="KEY VALUE", help=PAIRS_HELP)


def execute(args: argparse.Namespace) -> None:
    """Run the command."""
    cfg = load_config(args.config_file, args.opts)
    workers = cfg.DATALOADER.NUM_WORKERS
    folder = write_corrupted(args.dataset, args.corruption, args.severity, args.output, workers)

    fields = {
        "name": Path(folder).name,
        "json": folder / ANNOTATIONS,
        "folder": folder / PICTURES,
        "domain": args.corruption,
    }
    print("- {" + ", ".join(f"{field}: {value}" for field, value in fields.items()) + "}")

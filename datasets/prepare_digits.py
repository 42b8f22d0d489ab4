#!/usr/bin/env python3
"""Makes the digits set: handwritten digits of scikit-learn on its sample photographs, in COCO format."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from bnext.cli.run_command import run_command
from bnext.data.catalog import datasets_root
from bnext.data.digits import prepare_digits
from bnext.data.digits_images import DigitsRecipe

HELP = {
    "seed": "which pictures are drawn",
    "num_train": "training pictures",
    "num_val": "validation pictures",
    "image_side": "side of a picture in pixels",
    "max_objects": "most digits per picture",
    "scale_range": "height of a digit as a share of the side",
    "image_style": "how much pictures differ in palette and contrast, 0 to 1",
    "image_classes": "different digits in one picture at most",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=datasets_root(), help="folder of all data sets")

    pair = {"type": float, "nargs": 2, "metavar": ("SMALLEST", "LARGEST")}
    for field in fields(DigitsRecipe):
        kind = pair if field.name == "scale_range" else {"type": type(field.default)}
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, help=HELP[field.name], **kind)

    parser.add_argument("--overwrite", action="store_true", help="replace the set that is there")
    return parser.parse_args()


def prepare() -> None:
    arguments = parse_arguments()
    values = {field.name: getattr(arguments, field.name) for field in fields(DigitsRecipe)}
    values["scale_range"] = tuple(values["scale_range"])

    folder = prepare_digits(arguments.root, DigitsRecipe(**values), overwrite=arguments.overwrite)
    print(f"The digits set is in {folder}.")


if __name__ == "__main__":
    sys.exit(run_command(prepare))

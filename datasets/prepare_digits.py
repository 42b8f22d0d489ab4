#!/usr/bin/env python3
"""Makes the digits set: handwritten digits of scikit-learn on its sample photographs, in COCO format."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from pathlib import Path

from bnext.cli.run_command import run_command
from bnext.data.digits import prepare_digits
from bnext.data.digits_images import DigitsRecipe


def parse_arguments() -> argparse.Namespace:
    default = {field.name: field.default for field in fields(DigitsRecipe)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    root = os.path.expanduser(os.environ.get("DETECTRON2_DATASETS", "datasets"))
    parser.add_argument("root", nargs="?", type=Path, default=root, help="folder of all data sets")
    parser.add_argument("--seed", type=int, default=default["seed"], help="which pictures are drawn")
    parser.add_argument("--num-train", type=int, default=default["num_train"], help="training pictures")
    parser.add_argument("--num-val", type=int, default=default["num_val"], help="validation pictures")
    parser.add_argument("--image-side", type=int, default=default["image_side"], help="side of a picture in pixels")
    parser.add_argument("--max-objects", type=int, default=default["max_objects"], help="most digits per picture")
    parser.add_argument(
        "--scale-range",
        type=float,
        nargs=2,
        default=default["scale_range"],
        metavar=("SMALLEST", "LARGEST"),
        help="height of a digit as a share of the side",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the set that is there")
    return parser.parse_args()


def main() -> int:
    arguments = vars(parse_arguments())
    arguments["scale_range"] = tuple(arguments["scale_range"])
    return run_command(lambda: print(f"The digits set is in {prepare_digits(arguments.pop('root'), **arguments)}."))


if __name__ == "__main__":
    sys.exit(main())

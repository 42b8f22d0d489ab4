"""`bnext check-gpu`: what norms must show on a GPU, as a table and a file."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import importlib.util
import math
import platform
import sys
from collections.abc import Iterable, Sequence

import torch

from bnext.errors import BNextError, ConfigError, Refusal
from bnext.files import explain_os_error, try_file, write_json
from bnext.proofs import Check, Outcome, list_checks, run_checks
from bnext.proofs.parity import measure_difference
from bnext.tables import format_rows

__all__ = ["DESCRIPTION", "add_arguments", "check_gpu", "main"]

DESCRIPTION = """Prove the norms on a GPU: parity with float64 on a CPU, no wait of the host, speed.

    bnext check-gpu
    bnext check-gpu --json output/gpu.json
    bnext check-gpu --device cpu --quick    # try the checks themselves, in seconds

It takes at most four minutes and needs torch and this package alone; every kind of kernels that is installed is
checked. The exit status is 1 where a number is wrong, the host waits or a check fails; a speed that is missed and what
there was no time for leave it at 0."""
SECONDS = 225.0  # after which no check begins

NO_SUCH_DEVICE = Refusal(
    ConfigError,
    "--device",
    "be one that torch finds on this machine, {devices}",
    "Choose one of them; cpu tries the checks themselves.",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 ..., or cpu (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write every number there, too")
    parser.add_argument("--quick", action="store_true", help="a few checks, in seconds")


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command line.

    Args:
        argv: its words; None: those of this process.
        prog: how its help calls it; None: as the file that runs.

    Returns:
        The exit status: 0, 1 where something is wrong, or 2 for a mistake that the user can mend.
    """
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=DESCRIPTION, formatter_class=as_written)
    add_arguments(parser)
    args = parser.parse_args(argv)

    try:
        return check_gpu(_find_device(args.device), args.json, args.quick)
    except (BNextError, OSError) as error:
        refusal = error if isinstance(error, BNextError) else explain_os_error(error)
        if refusal is None:
            raise
        print(f"error: {refusal}", file=sys.stderr)
        return 2


def _find_device(name: str) -> torch.device:
    numbers = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    devices = ["cpu", *(f"cuda:{number}" for number in numbers)]
    if name == "cuda" and numbers:
        return torch.device("cuda", torch.cuda.current_device())
    if name not in devices:
        where = "" if numbers else "there is no GPU"
        raise NO_SUCH_DEVICE.of(repr(name), where, devices=" or ".join(devices))
    return torch.device(name)


def check_gpu(device: torch.device, file: str | None = None, quick: bool = False) -> int:
    """Run all checks of a device, print their table, and write it if a file is named.

    Args:
        device: of this machine.
        file: in JSON, in a folder that is made if it is missing; None: none.
        quick: a few checks, in seconds.

    Returns:
        The exit status: 1 where something is wrong, see `Outcome.is_wrong`.

    Raises:
        OSError: the file cannot be written; it is tried before the checks.
    """
    if file is not None:
        try_file(file)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    about = _describe(device)
    print(", ".join(about.values()), flush=True)

    checks = list_checks(device, quick)
    if not quick and importlib.util.find_spec("detectron2") is not None:
        checks.append(Check("detector", "losses of RetinaNet", _measure_losses, 1e-3))
    outcomes = list(run_checks(checks, device, SECONDS))

    print(format_outcomes(outcomes))
    for outcome in outcomes:
        if outcome.is_run and outcome.failure:
            print(f"{outcome.part}, {outcome.name}: {outcome.failure}")
    if num_late := sum(not outcome.is_run for outcome in outcomes):
        print(f"{num_late} of {len(outcomes)} checks were not run, as {SECONDS:g} seconds were over.")

    if file is not None:
        write_json(file, {"about": about, "checks": [dataclasses.asdict(outcome) for outcome in outcomes]})
    return int(any(outcome.is_wrong for outcome in outcomes))


def _describe(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
    cuda = f"CUDA {torch.version.cuda}" if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return {"device": name, "torch": f"torch {torch.__version__}", "cuda": cuda, "date": f"{datetime.date.today()}"}


def format_outcomes(outcomes: Iterable[Outcome]) -> str:
    """A line for each check that has a number of its own to show; of each kind of parity one, with its worst case."""
    by_part: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_part.setdefault(outcome.part, []).append(outcome)

    rows: list[list[str]] = []
    for part, of_part in by_part.items():
        if part.startswith("parity"):
            rows.append(_summarize(part, of_part))
        else:
            rows += [[part, *_describe_outcome(outcome)] for outcome in of_part]
    return format_rows(rows, ["part", "check", "number", "limit", "verdict"], num_texts=2)


def _summarize(part: str, outcomes: Sequence[Outcome]) -> list[str]:
    num_passed, num_run = sum(outcome.is_passed for outcome in outcomes), sum(outcome.is_run for outcome in outcomes)
    worst = max(outcomes, key=_rank)
    name, value, limit, verdict = _describe_outcome(worst)
    if num_run > 0:
        verdict = f"{num_passed} of {num_run} right"
    if 0 < num_run < len(outcomes):
        verdict += f", {len(outcomes) - num_run} not run"
    return [part, f"worst of {len(outcomes)}: {name}", value, limit, verdict]


def _rank(outcome: Outcome) -> float:
    """Share of its limit that an outcome takes, or beyond it; below all others what was not run."""
    if not outcome.is_run:
        return -1.0
    if outcome.value is None or math.isnan(outcome.value):
        return math.inf
    return outcome.value / outcome.limit


def _describe_outcome(outcome: Outcome) -> list[str]:
    return [outcome.name, _describe_value(outcome), f"{outcome.limit:.3g}", _judge(outcome)]


def _describe_value(outcome: Outcome) -> str:
    if not outcome.is_run:
        return "-"
    return "failed" if outcome.value is None else f"{outcome.value:.2g}"


def _judge(outcome: Outcome) -> str:
    if not outcome.is_run:
        return "not run"
    if outcome.is_passed:
        return "reached" if outcome.is_goal else "right"
    return "wrong" if outcome.is_wrong else "missed"


def _measure_losses(device: torch.device) -> float:
    """Losses of a detector whose norms are ours, on the device and on a CPU; where detectron2 is installed."""
    from detectron2.modeling import build_model
    from detectron2.structures import Boxes, Instances
    from detectron2.utils.events import EventStorage

    from bnext.config import load_config
    from bnext.config.files import get_config_file

    torch.manual_seed(0)
    pairs = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", "0"]
    model = build_model(load_config(get_config_file("Digits-Detection/retinanet_R_18_FPN.yaml"), pairs))
    instances = Instances((128, 128), gt_boxes=Boxes(torch.tensor([[8.0, 8.0, 60.0, 60.0]])))
    instances.gt_classes = torch.tensor([1])
    batch = [{"image": 255 * torch.rand(3, 128, 128), "instances": instances} for _ in range(2)]

    losses = []
    with EventStorage():
        for place in (torch.device("cpu"), device):
            losses.append(copy.deepcopy(model).to(place)(batch))
    return measure_difference(losses[1], losses[0])

"""The results of a run with the machine and the versions they were measured with: as JSON and back, and as tables."""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, get_type_hints

import torch

import bnext
from bench.pairs import Estimate, Limits, Pairs, Verdict, estimate_ratio, judge_ratio
from bnext.distributed.groups import count_cores
from bnext.errors import BNextError, Refusal
from bnext.files import replace_file, write_json
from bnext.tables import format_rows

__all__ = [
    "LAYOUTS",
    "Failure",
    "LeftOut",
    "Quantity",
    "Record",
    "Result",
    "Speed",
    "check_files",
    "describe_setting",
    "fill_page",
    "format_record",
    "read_record",
    "write_figures",
    "write_record",
]

BEGIN, END = "<!-- results of the benchmark -->", "<!-- end of the results -->"  # marks of a page
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
ROOT = Path(__file__).resolve().parents[1]
MALLOC = "MALLOC_MMAP_MAX_"  # set by `make bench`

NO_MARKS = Refusal(BNextError, "a page", f"have the marks {BEGIN} and {END}", "Write both, each on a line by itself.")
NO_RECORD = Refusal(
    BNextError, "the file", "be a result of the benchmark", "Measure again: python -m bench --json FILE."
)


@dataclass(frozen=True)
class Speed:
    """Times of one comparison in one layout.

    Args:
        name, peer, layout: see `Comparison`.
        ours_ms, other_ms: medians of forward and backward, in milliseconds.
        ratio: of other / ours.
        num_workers, differs, averages_differ: see `Comparison`.
        difference: largest relative difference of outputs, gradients and averages in float64; None: not compared.
        goal: least ratio that is aimed at; None: none.
        megabytes: S, bytes of the features of one worker / 1e6; None: no features alone are timed.
        copy_gbs: what a copy of the features read and wrote in a second, measured beside the pairs, in GB/s.
        one_pass_ms, two_passes_ms: least time by that copy for a norm that reads its features once (5 S forward and
            backward) or, as statistics come first, twice (8 S).
    """

    name: str
    peer: str
    layout: str
    ours_ms: float
    other_ms: float
    ratio: Estimate
    num_workers: int = 1
    differs: str = ""
    averages_differ: str = ""
    difference: float | None = None
    goal: float | None = None
    megabytes: float | None = None
    copy_gbs: float | None = None
    one_pass_ms: float | None = None
    two_passes_ms: float | None = None

    @classmethod
    def of(cls, pairs: Pairs, name: str, peer: str, layout: str, **fields: Any) -> Speed:
        """The speed of timed pairs; the other fields as they are."""
        ours_ms, other_ms = (1e3 * statistics.median(seconds) for seconds in (pairs.ours, pairs.other))
        return cls(name, peer, layout, ours_ms, other_ms, estimate_ratio(pairs), **fields)

    @property
    def verdict(self) -> Verdict:
        """Whether the goal is met."""
        return judge_ratio(self.ratio, self.goal)


@dataclass(frozen=True)
class Quantity:
    """A number that is counted or measured without pairs; the less the better.

    Args:
        name, peer, layout: as of a comparison; "" is none.
        counted: with its unit.
        ours, other: of each arm; None: there is no other.
        goal: most that is aimed at; None: none.
    """

    name: str
    peer: str
    layout: str
    counted: str
    ours: float
    other: float | None = None
    goal: float | None = None

    @property
    def verdict(self) -> Verdict:
        """Whether the goal is met."""
        if self.goal is None:
            return ""
        return "met" if self.ours <= self.goal else "missed"


@dataclass(frozen=True)
class Failure:
    """Arms that do not agree, or do not run.

    Args:
        name, peer, layout: of the comparison.
        text: of the error.
    """

    name: str
    peer: str
    layout: str
    text: str


@dataclass(frozen=True)
class LeftOut:
    """A comparison that this machine cannot make.

    Args:
        name, peer: of the comparison.
        reason: with the remedy.
    """

    name: str
    peer: str
    reason: str


Result: TypeAlias = Speed | Quantity | Failure | LeftOut


@dataclass
class Record:
    """A run.

    Args:
        setting: date, machine, versions; name -> value.
        results: in the order of the run.
    """

    setting: Mapping[str, str]
    results: list[Result] = field(default_factory=list)

    @property
    def speeds(self) -> list[Speed]:
        return [result for result in self.results if isinstance(result, Speed)]

    @property
    def quantities(self) -> list[Quantity]:
        return [result for result in self.results if isinstance(result, Quantity)]

    @property
    def failures(self) -> list[Failure]:
        return [result for result in self.results if isinstance(result, Failure)]

    @property
    def left_out(self) -> list[LeftOut]:
        return [result for result in self.results if isinstance(result, LeftOut)]


def describe_setting(device: str, limits: Limits) -> dict[str, str]:
    """Date, machine and versions.

    Args:
        device: "cpu" or "cuda".
        limits: of the pairs.
    """
    is_cpu = device == "cpu"
    name = f"{_name_processor()}, {count_cores()} cores" if is_cpu else torch.cuda.get_device_name()

    setting = {
        "date": datetime.date.today().isoformat(),
        "machine": name,
        "device": device,
        "threads": str(torch.get_num_threads()),
        "pairs": f"{limits.least} to {limits.most}",
        "Python": platform.python_version(),
        "PyTorch": torch.__version__,
        "bnext": bnext.__version__,
    }

    if is_cpu:
        setting["malloc"] = "keeps large tensors" if os.environ.get(MALLOC) == "0" else "default"

    commit = _find_commit()
    if commit:
        setting["commit"] = commit
    return setting


def _find_commit() -> str:
    """The commit of this checkout, "-dirty" if files differ from it; "": it is none, or there is no git."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        command = ["git", "describe", "--always", "--dirty"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _name_processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# ---- JSON

_LISTS: dict[str, type] = {"speeds": Speed, "quantities": Quantity, "failures": Failure, "left_out": LeftOut}


def write_record(path: str | os.PathLike[str], record: Record) -> None:
    """Write a run, with what became of its goals."""
    content: dict[str, Any] = {"setting": dict(record.setting)}
    for name in _LISTS:
        content[name] = [_flatten(result) for result in getattr(record, name)]
    write_json(path, content)


def _flatten(result: Any) -> dict[str, Any]:
    words = {"verdict": result.verdict} if isinstance(result, (Speed, Quantity)) else {}
    return {**asdict(result), **words}


def write_figures(path: str | os.PathLike[str], figures: Sequence[Mapping[str, Any]]) -> None:
    """A JSON file of other figures, and of what they were measured with."""
    write_json(path, {"torch": torch.__version__, "num_threads": torch.get_num_threads(), "figures": figures})


def read_record(path: str | os.PathLike[str]) -> Record:
    """Read a run.

    Raises:
        BNextError: the file is none of `python -m bench --json`.
        OSError: there is none.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        record = Record(_read_setting(content["setting"]))
        for name, kind in _LISTS.items():
            record.results += [_read_result(kind, entry) for entry in _check_type(content[name], list, name)]
    except (ValueError, KeyError, TypeError) as error:
        raise NO_RECORD.of(f"{type(error).__name__}: {error}", str(path)) from error
    return record


def _read_setting(setting: Any) -> dict[str, str]:
    for name in ("date", "machine", *_check_type(setting, dict, "setting")):
        _check_type(setting[name], str, name)
    return setting


def _read_result(kind: type, entry: Any) -> Result:
    fields = {name: value for name, value in _check_type(entry, dict, "an entry").items() if name != "verdict"}
    if kind is Speed:
        fields["ratio"] = Estimate(**_check_type(fields["ratio"], dict, "ratio"))
        _check_types(fields["ratio"])

    result = kind(**fields)
    _check_types(result)
    if isinstance(result, Speed) and result.layout not in LAYOUTS:
        raise ValueError(f"layout {result.layout!r}")
    return result


def _check_types(result: Any) -> None:
    """Raise TypeError unless every field is of its type; a whole number may stand for any number."""
    for name, kind in get_type_hints(type(result)).items():
        value = getattr(result, name)
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        _check_type(float(value) if is_whole and kind is not int else value, kind, name)


def _check_type(value: Any, kind: Any, name: str) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}")
    return value


def check_files(files: Iterable[str | os.PathLike[str]], page: str | os.PathLike[str] | None) -> None:
    """Try what a run will write, before it takes its time.

    Args:
        files: that are written anew; their folders are made.
        page: see `fill_page`; None: none.

    Raises:
        BNextError: the page has no marks.
        OSError: a file cannot be written.
    """
    if page is not None:
        _split_page(page)
    for file in [*files, *([] if page is None else [page])]:
        os.makedirs(os.path.dirname(os.path.abspath(file)), exist_ok=True)
        if os.path.exists(file):
            with open(file, "ab"):
                continue
        replace_file(file, lambda content: content.write(b""))
        os.remove(file)


# ---- tables


def format_record(record: Record) -> str:
    """The run in Markdown: what it was measured with, its tables, and what they cannot say."""
    parts = [_format_setting(record)]
    if record.speeds:
        parts += [_format_speeds(record.speeds), _list_by_reason(_find_remarks(record.speeds))]
    if record.quantities:
        parts.append(_format_quantities(record.quantities))

    parts.append(_list_by_reason((f"Left out, as {left.reason}", _name(left)) for left in record.left_out))
    for failure in record.failures:
        layout = f" ({failure.layout})" if failure.layout else ""
        parts.append(f"FAILED: {_name(failure)}{layout}: {failure.text}")
    return "\n\n".join(part for part in parts if part)


def fill_page(path: str | os.PathLike[str], text: str) -> None:
    """Put the tables of a run between the marks of a page.

    Args:
        path: of the page, in Markdown.
        text: of `format_record`.

    Raises:
        BNextError: the page has no marks, or one of them.
    """
    before, after = _split_page(path)
    filled = f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"
    replace_file(path, lambda file: file.write(filled.encode()))


def _split_page(path: str | os.PathLike[str]) -> tuple[str, str]:
    """The text before and after the marks of a page."""
    page = Path(path).read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise NO_MARKS.of("none" if not begin else "the first alone", str(path))
    return before, after


def _name(result: Result) -> str:
    return f"{result.name}, against {result.peer}" if result.peer else result.name


def _format_setting(record: Record) -> str:
    words = [f"{name} {value}" for name, value in record.setting.items() if name not in ("date", "machine")]
    lines = [f"{record.setting['date']}, {record.setting['machine']}; {', '.join(words)}."]

    copies = [speed.copy_gbs for speed in record.speeds if speed.copy_gbs is not None]
    if copies:
        lines.append(
            f"A copy of the features read and wrote {min(copies):.0f} to {max(copies):.0f} GB/s beside the pairs."
        )
    differences = [speed.difference for speed in record.speeds if speed.difference is not None and not speed.differs]
    if differences:
        lines.append(f"Arms that are to be equal differ by at most {max(differences):.0e} in float64.")
    return "\n".join(lines)


def _format_speeds(speeds: Iterable[Speed]) -> str:
    rows = []
    for speed in speeds:
        ratio = speed.ratio
        limit = "" if speed.one_pass_ms is None else f"{speed.one_pass_ms:.1f} / {speed.two_passes_ms:.1f}"
        rows.append(
            [
                speed.name,
                speed.peer,
                speed.layout,
                f"{speed.ours_ms:.1f}",
                f"{speed.other_ms:.1f}",
                limit,
                f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})",
                f"{ratio.lowest:.2f} to {ratio.highest:.2f}",
                str(ratio.num_pairs),
                _format_goal(speed.goal, speed.verdict),
            ]
        )

    headers = ["forward and backward", "against", "layout", "ours, ms", "other, ms", "limit, ms"]
    headers += ["other / ours (95 %)", "all pairs", "pairs", "goal"]
    return format_rows(rows, headers, num_texts=3)


def _format_goal(goal: float | None, verdict: Verdict) -> str:
    return "" if goal is None else f"{goal:.3g}: {verdict}"


def _find_remarks(speeds: Iterable[Speed]) -> Iterator[tuple[str, str]]:
    """Why some arms are no equals, and which pairs were too few: reasons and names."""
    for speed in speeds:
        if speed.differs:
            yield f"Not equal, {speed.differs}", _name(speed)
        elif speed.averages_differ:
            yield f"Running statistics not equal, {speed.averages_differ}", _name(speed)
        if speed.ratio.is_cut:
            yield "Time ended before the interval was narrow twice", f"{_name(speed)} ({speed.layout})"


def _list_by_reason(remarks: Iterable[tuple[str, str]]) -> str:
    """A list in Markdown: each reason once, with its names."""
    names: dict[str, list[str]] = {}
    for reason, name in remarks:
        names.setdefault(reason, []).append(name)
    return "\n".join(f"- {reason}: {'; '.join(dict.fromkeys(names[reason]))}." for reason in names)


def _format_quantities(quantities: Iterable[Quantity]) -> str:
    rows = []
    for quantity in quantities:
        other = "" if quantity.other is None else f"{quantity.other:.3g}"
        goal = _format_goal(quantity.goal, quantity.verdict)
        names = quantity.name, quantity.peer, quantity.layout, quantity.counted
        rows.append([*names, f"{quantity.ours:.3g}", other, goal])
    return format_rows(rows, ["norm", "against", "layout", "counted", "ours", "other", "goal"], num_texts=4)

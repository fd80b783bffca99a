"""What the measurements share: taking turns, medians with their spread, a table, JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Series:
    """What one contender took, run by run."""

    name: str
    values: tuple[float, ...]
    unit: str = "ms"

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    @property
    def spread(self) -> tuple[float, float]:
        """Between these lie nine of ten."""
        ordered = sorted(self.values)
        return ordered[len(ordered) // 20], ordered[-1 - len(ordered) // 20]

    def row(self, baseline: float | None = None) -> tuple[str, ...]:
        """A line of a table; of several with one baseline, the ratio to that."""
        low, high = self.spread
        ratio = "" if baseline is None else f"{self.median / baseline:.2f}"
        return self.name, f"{self.median:.1f} {self.unit}", f"{low:.1f} to {high:.1f}", ratio


@dataclass
class Report:
    """One measurement: its series, ratios, and what could not be measured and why."""

    name: str
    series: list[Series] = field(default_factory=list)
    ratios: dict[str, float] = field(default_factory=dict)
    aims: dict[str, float] = field(default_factory=dict)
    """The most that a ratio, or a number of that name, is to be."""
    left_out: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def of(self, name: str) -> Series:
        """The series of that name."""
        return next(series for series in self.series if series.name == name)

    def show(self, baseline: str | None = None) -> None:
        """Prints it."""
        print(f"\n{self.name}")
        against = None if baseline is None else self.of(baseline).median
        header = ("", "median", "nine of ten", "" if baseline is None else f"/ {baseline}")
        print_table([header, *(series.row(against) for series in self.series)])
        for what, ratio in self.ratios.items():
            aim = f"   (aim: {self.aims[what]:g})" if what in self.aims else ""
            print(f"  {what} = {ratio:.2f}{aim}")
        for what, why in self.left_out.items():
            print(f"  not here: {what}: {why}")

    def as_json(self) -> dict[str, Any]:
        """All of it."""
        values = asdict(self)
        for series, described in zip(self.series, values["series"], strict=True):
            described |= {"median": series.median, "spread": series.spread}
        return values


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows of words, in columns."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        first, *rest = (
            word.ljust(width) if not at else word.rjust(width)
            for at, (word, width) in enumerate(zip(row, widths, strict=True))
        )
        print(("  " + "  ".join([first, *rest])).rstrip())


def in_turns(contenders: Mapping[str, Callable[[], float]], runs: int, report: Report) -> None:
    """Lets the contenders take turns, so that what else the machine does falls on all alike; the first turn warms up.

    One that fails in that is left out of the report, with its reason.
    """
    times: dict[str, list[float]] = {}
    for name, contender in contenders.items():
        try:
            contender()
            times[name] = []
        except (OSError, subprocess.SubprocessError) as error:
            report.left_out[name] = reason(error)
    for run in range(runs):
        progress(f"{report.name}: {run + 1} of {runs}")
        for name, values in times.items():
            values.append(contenders[name]())
    progress("")
    report.series += [Series(name, tuple(values)) for name, values in times.items()]


def reason(error: Exception) -> str:
    """One line."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"it does not come to an end within {error.timeout:g} seconds"
    said = getattr(error, "stderr", None) or str(error)
    text = said.decode(errors="replace") if isinstance(said, bytes) else said
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else type(error).__name__


def wall(argv: Sequence[str | os.PathLike[str]], **options: Any) -> float:
    """Milliseconds that a command takes."""
    start = time.perf_counter()
    subprocess.run(
        argv,
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=60,
        **options,
    )
    return (time.perf_counter() - start) * 1000


def progress(text: str) -> None:
    """Shows how far it is, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def computer() -> dict[str, Any]:
    """What it was measured on."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    qemu = subprocess.run(["qemu-system-x86_64", "--version"], capture_output=True, text=True, check=False).stdout
    return {
        "processor": model,
        "processors": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": qemu.split("\n", 1)[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def write(path: Path, reports: Sequence[Report]) -> None:
    """Writes them as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"computer": computer(), "reports": [report.as_json() for report in reports]}
    path.write_text(json.dumps(values, indent=1) + "\n")

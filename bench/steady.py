"""A thousand runs in a row, and what grows with them.

    .venv/bin/python -m bench.steady [--runs N]

One program runs `true` in a machine that wakes from a template, again and again. Compared are the first and the last
tenth: milliseconds, and at their ends the program's memory, its open descriptors, and the cache.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import vmette
from bench.measure import Report, Series, progress
from bench.startup import BASE, make_template
from vmette import assets


def state() -> dict[str, float]:
    """What could grow."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    files = [path for path in assets.cache_root().rglob("*") if path.is_file()]
    return {
        "resident MiB": int(status["VmRSS"].split()[0]) / 1024,
        "descriptors": len(os.listdir("/proc/self/fd")),  # noqa: PTH208 (this one is counted too, each time)
        "threads": int(status["Threads"]),
        "files in the cache": len(files),
        "MiB in the cache": sum(path.stat().st_blocks * 512 for path in files) / (1 << 20),
    }


def measure(runs: int) -> Report:
    """Of so many runs."""
    make_template(BASE)
    report = Report(f"{runs} runs in a row")
    tenth = max(1, runs // 10)
    times = []
    first = {}
    for run in range(runs):
        progress(f"{report.name}: {run + 1}")
        begin = time.perf_counter()
        vmette.run(BASE, ["true"], check=True)
        times.append((time.perf_counter() - begin) * 1000)
        if run + 1 == tenth:
            first = state()
    progress("")
    report.series = [Series("first tenth", tuple(times[:tenth])), Series("last tenth", tuple(times[-tenth:]))]
    report.ratios["last / first"] = statistics.median(times[-tenth:]) / statistics.median(times[:tenth])
    last = state()
    report.facts["grown by"] = {name: last[name] - first[name] for name in last}
    return report


def show(report: Report) -> None:
    """Prints it, and what has grown."""
    report.show()
    for name, grown in report.facts["grown by"].items():
        print(f"  {name}: {grown:+.1f}")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Measure a thousand runs.")
    parser.add_argument("--runs", type=int, default=1000)
    show(measure(parser.parse_args().runs))


if __name__ == "__main__":
    main()

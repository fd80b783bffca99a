"""A thousand runs in a row, and what grows with them.

    .venv/bin/python -m bench.steady [--runs N]

One program runs `true` in a machine that wakes from a template, again and again. After the first tenth and at the end
are compared its memory, its open descriptors, and the cache. The computer changes its pace meanwhile, so that times of
then and now tell nothing: at the end the program runs in turns with one that has just begun.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import vmette
from bench.measure import Report, in_turns, progress
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


def timed() -> float:
    """The milliseconds of a run."""
    begin = time.perf_counter()
    vmette.run(BASE, ["true"], check=True)
    return (time.perf_counter() - begin) * 1000


def newcomer() -> subprocess.Popen[str]:
    """A program that has only just begun: it does a run for each line, and answers with its milliseconds."""
    code = "import sys; from bench.steady import timed\nfor _ in sys.stdin: print(timed(), flush=True)"
    arguments = [sys.executable, "-c", code]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(program: subprocess.Popen[str]) -> float:
    """The milliseconds of a run of a :func:`newcomer`."""
    assert program.stdin is not None
    assert program.stdout is not None
    program.stdin.write("\n")
    program.stdin.flush()
    return float(program.stdout.readline())


def measure(runs: int) -> Report:
    """Of so many runs."""
    make_template(BASE)
    report = Report(f"{runs} runs in a row")
    tenth = max(1, runs // 10)
    first = {}
    for run in range(max(tenth, runs - tenth)):
        progress(f"{report.name}: {run + 1}")
        timed()
        if run + 1 == tenth:
            first = state()
    with newcomer() as program:
        in_turns({"old": timed, "new": lambda: ask(program)}, tenth, report)
    report.ratios["old / new"] = report.of("old").median / report.of("new").median
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

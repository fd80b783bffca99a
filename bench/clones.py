"""Many machines alive at once that woke from one template: time to the first output, and memory.

    .venv/bin/python -m bench.clones [--counts 1,4,16,64]

All of a count are started together, each as soon as a thread is free (two for each processor), run `echo`, and stay.
Memory is the proportional set size (PSS) of the QEMU processes: what they share is counted once in all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import vmette
from bench.measure import Report, Series, print_table
from bench.startup import BASE, make_template

COUNTS = (1, 4, 16, 64)


def memory(pid: int) -> tuple[float, float]:
    """MiB of a process: proportional, and its own alone."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        fields[name] = int(value) / 1024
    return fields["Pss:"], fields["Private_Clean:"] + fields["Private_Dirty:"]


def start(_: int) -> tuple[vmette.Sandbox, float, tuple[float, float]]:
    """A sandbox, how long it took to its first output (ms), and its memory before."""
    begin = time.perf_counter()
    sandbox = vmette.Sandbox(BASE)
    idle = memory(sandbox._session.guest._machine.child.pid)
    sandbox.run(["echo", "hi"], check=True)
    took = time.perf_counter() - begin
    assert sandbox.came_up == "woken from a template"
    return sandbox, took * 1000, idle


def measure(counts: tuple[int, ...]) -> Report:
    """A series for each count."""
    make_template(BASE)
    report = Report("clones alive at once, ms to the first output of each")
    rows = []
    for count in counts:
        with ExitStack() as stack, ThreadPoolExecutor(2 * len(os.sched_getaffinity(0))) as pool:
            begin = time.perf_counter()
            clones = list(pool.map(start, range(count)))
            seconds = time.perf_counter() - begin
            for sandbox, _, _ in clones:
                stack.callback(sandbox.close)
            report.series.append(Series(f"{count}", tuple(took for _, took, _ in clones)))
            after = [memory(sandbox._session.guest._machine.child.pid) for sandbox, _, _ in clones]
            rows.append(
                {
                    "count": count,
                    "seconds for all": seconds,
                    "own MiB, idle": statistics.median(idle[1] for _, _, idle in clones),
                    "own MiB, after a command": statistics.median(own for _, own in after),
                    "PSS MiB of all": sum(pss for pss, _ in after),
                }
            )
    report.facts["memory"] = rows
    return report


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Measure many machines at once.")
    parser.add_argument("--counts", default=",".join(map(str, COUNTS)), help="how many, one after the other")
    show(measure(tuple(map(int, parser.parse_args().counts.split(",")))))


def show(report: Report) -> None:
    """Prints it, memory too."""
    report.show()
    rows = report.facts["memory"]
    print()
    print_table([tuple(rows[0]), *(tuple(f"{value:.1f}".removesuffix(".0") for value in row.values()) for row in rows)])


if __name__ == "__main__":
    main()

"""The whole suite: `make bench`, or `.venv/bin/python -m bench [--runs N] [--quick] [--plots DIR]`.

Start-up, many machines at once and a thousand runs; `bench.images` and `bench.session` are apart. Writes
build/bench/results.json, and with --plots two SVG files there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench import clones, startup, steady
from bench.measure import Report, write

RESULTS = Path("build/bench/results.json")


def plot(directory: Path, start: Report, many: Report) -> None:
    """Draws the distribution of start-up times, and memory against the number of machines."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "vmette"  # the same drawing, the same bytes
    import matplotlib.pyplot as plt

    directory.mkdir(parents=True, exist_ok=True)
    shown = [series for series in start.series if series.name != "virtme-ng"]
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.boxplot([series.values for series in shown], orientation="horizontal", whis=(5, 95), showfliers=False)
    axes.set_yticks(range(1, len(shown) + 1), [series.name for series in shown])
    axes.set_xlabel("ms, from nothing to the end of `true`")
    axes.set_xlim(left=0)
    figure.savefig(directory / "startup.svg", metadata={"Date": None})
    rows = many.facts["memory"]
    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axes.plot([row["count"] for row in rows], [row["PSS MiB of all"] for row in rows], marker="o", label="all (PSS)")
    axes.set_xlabel("machines that woke from one template, after a command in each")
    axes.set_ylabel("MiB")
    axes.set_ylim(bottom=0)
    figure.savefig(directory / "memory.svg", metadata={"Date": None})


def main() -> None:
    """Measures all."""
    parser = argparse.ArgumentParser(description="Measure vmette.")
    parser.add_argument("--runs", type=int, default=20, help="runs of each contender (20)")
    parser.add_argument("--in-a-row", type=int, default=1000, help="runs for what grows (1000)")
    parser.add_argument("--quick", action="store_true", help="without other people's programs and Debian")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw two plots there")
    given = parser.parse_args()
    reports = startup.measure(given.runs, quick=given.quick)
    for report in reports:
        report.show()
    many = clones.measure(clones.COUNTS)
    clones.show(many)
    row = steady.measure(given.in_a_row)
    steady.show(row)
    write(RESULTS, [*reports, many, row])
    print(f"\n{RESULTS}")
    if given.plots is not None:
        plot(given.plots, reports[0], many)


if __name__ == "__main__":
    main()

"""A directory of the host in the guest: shared from the start (9p where QEMU emulates), against one that is added.

    .venv/bin/python -m bench.shares [--runs N]

- walk: `ls -lR` of 2,000 files in 100 directories.
- small: reads these files, 100 bytes each.
- read, write: 32 MiB in pieces of 1 MiB.

Both are of one sandbox and one file system, and take turns; the guest has nothing of them in memory. It prints medians
and ratios.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import vmette
from bench.measure import Report, in_turns

WORK = {
    "walk": "ls -lR {0} > /dev/null",
    "small": "cat {0}/d*/f* > /dev/null",
    "read": "dd if={0}/large of=/dev/null bs=1M",
    "write": "dd if=/dev/zero of={0}/new bs=1M count=32; rm {0}/new",
}


def fill(directory: Path) -> None:
    """Makes what is read."""
    for number in range(100):
        below = directory / f"d{number}"
        below.mkdir()
        for file in range(20):
            (below / f"f{file}").write_bytes(b"x" * 100)
    (directory / "large").write_bytes(bytes(32 << 20))


def timed(sandbox: vmette.Sandbox, script: str) -> float:
    """Milliseconds that it takes."""
    sandbox.run(["sh", "-c", "echo 3 > /proc/sys/vm/drop_caches"], check=True)
    start = time.perf_counter()
    sandbox.run(["sh", "-c", f"{{ {script}; }} 2>/dev/null"], check=True)
    return (time.perf_counter() - start) * 1000


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description="Measure shares.")
    parser.add_argument("--runs", type=int, default=5, help="runs of each (5)")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        fill(Path(place))
        with vmette.Sandbox("builtin://base", shares=[vmette.Share("start", Path(place))]) as sandbox:
            sandbox.share(place, "/later")
            for name, script in WORK.items():
                report = Report(name)
                places = {"from the start": "/mnt/start", "added later": "/later"}
                contenders = {what: partial(timed, sandbox, script.format(where)) for what, where in places.items()}
                in_turns(contenders, given.runs, report)
                report.show("from the start")


if __name__ == "__main__":
    main()

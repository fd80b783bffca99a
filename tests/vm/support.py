"""What the tests that boot real VMs share."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

BASE = "builtin://base"

Cli = Callable[..., "subprocess.CompletedProcess[bytes]"]
"""Runs `vmette ARGS…` (see conftest.py)."""


def vmm_processes() -> dict[int, str]:
    """The QEMU and virtiofsd processes of this machine: pid and command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if entry.name.isdigit() and Path(os.fsdecode(words[0])).name.startswith(("qemu-system-", "virtiofsd")):
            found[int(entry.name)] = os.fsdecode(b" ".join(words))
    return found


def children() -> set[str]:
    """This process's children, zombies too."""
    return {pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()}


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """For what happens soon, but not at once."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.02)


def command(args: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The command line of `vmette ARGS…`."""
    return [sys.executable, "-m", "vmette", *[os.fspath(arg) for arg in args]]

"""What the tests that boot real VMs share."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

BASE = "builtin://base"

Cli = Callable[..., "subprocess.CompletedProcess[bytes]"]
"""Runs `vmette ARGS…` (see conftest.py)."""


def vmm_name() -> str:
    """What messages call that which runs VMs."""
    return "vmette-vz" if os.environ.get("VMETTE_VMM") == "vz" else "QEMU"


def vz() -> bool:
    """Whether Virtualization.framework's stand-in runs VMs."""
    return vmm_name() == "vmette-vz"


def vmm_processes() -> dict[int, str]:
    """The processes of this machine that run VMs or serve them: pid and command line."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if entry.name.isdigit() and _name(words).startswith(("qemu-system-", "virtiofsd", "vmette-vz")):
            found[int(entry.name)] = os.fsdecode(b" ".join(words))
    return found


def _name(words: list[bytes]) -> str:
    return Path(os.fsdecode(words[0])).name


def vmms() -> set[int]:
    """Those of them that vmette has started to run a VM each."""
    program = "vmette-vz" if vmm_name() == "vmette-vz" else "qemu-system-"
    return {pid for pid, words in vmm_processes().items() if Path(words.split(" ")[0]).name.startswith(program)}


def children() -> set[str]:
    """This process's children, zombies too."""
    found: set[str] = set()
    for task in Path("/proc/self/task").iterdir():
        with suppress(FileNotFoundError):  # a thread that has ended meanwhile
            found |= set((task / "children").read_text().split())
    return found


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """For what happens soon, but not at once."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, f"never happened: {what}"
        time.sleep(0.02)


def command(args: Sequence[str | os.PathLike[str]]) -> list[str]:
    """The command line of `vmette ARGS…`."""
    return [sys.executable, "-m", "vmette", *[os.fspath(arg) for arg in args]]

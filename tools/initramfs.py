"""The guest's initramfs: one static program and a console node in an uncompressed newc cpio.

The format is the kernel's Documentation/driver-api/early-userspace/buffer-format.rst ("newc").
"""

from __future__ import annotations

import stat
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from .artifacts import artifact, scratch

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "guest"
PROGRAM = ("init.c", "agent.c")
HEADERS = ("agent.h",)
COMPILER_FLAGS = ("-static", "-Os", "-s", "-std=gnu11", "-Wall", "-Wextra", "-Werror")


@dataclass(frozen=True)
class Entry:
    """One member: `mode` has the file type bits, `device` is the (major, minor) of a device node."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def newc(entries: Iterable[Entry]) -> bytes:
    """A cpio archive of `entries`: the same entries give the same bytes (no times, owners or real inode numbers)."""
    archive = bytearray()
    for inode, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], 1):
        name = entry.name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(entry.mode) else 1
        fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        archive += bytes(-len(archive) % 4) + entry.data
        archive += bytes(-len(archive) % 4)
    return bytes(archive) + bytes(-len(archive) % 512)


def compile_init(arch: str, output: Path) -> None:
    """Builds the guest's program for `arch` with the compiler that we use for every target.

    Raises:
        subprocess.CalledProcessError: the compiler refused; it has printed why.
    """
    sources = [str(SOURCES / name) for name in PROGRAM]
    command = [sys.executable, "-m", "ziglang", "cc", "-target", f"{arch}-linux-musl", *COMPILER_FLAGS]
    subprocess.run([*command, *sources, "-o", str(output)], check=True)


def build(arch: str) -> Path:
    """The initramfs for `arch`, built unless it is in the cache."""
    made_of = [SOURCES / name for name in (*PROGRAM, *HEADERS)] + [Path(__file__)]
    facts = {path.name: path.read_text() for path in made_of} | {"arch": arch, "compiler": version("ziglang")}
    return artifact("initramfs.cpio", facts, lambda output: _build(arch, output))


def _build(arch: str, output: Path) -> None:
    with scratch(output) as directory:
        program = directory / "init"
        compile_init(arch, program)
        print(f"init for {arch}: {program.stat().st_size:,} bytes", file=sys.stderr)
        init = program.read_bytes()
    entries = [
        Entry("dev", stat.S_IFDIR | 0o755),
        Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
        Entry("init", stat.S_IFREG | 0o755, init),
    ]
    output.write_bytes(newc(entries))

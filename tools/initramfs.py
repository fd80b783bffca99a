"""The guest's static programs, and its initramfs: they and a console node in an uncompressed newc cpio.

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

from .artifacts import artifact

SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "guest"
HELPERS = {"vsock-send": ("vsock_send.c", "vsock.c"), "vsock-runner": ("vsock_runner.c", "vsock.c")}
"""Programs for the workload, and what they are made from. All other C files are `init`, PID 1."""
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


def programs() -> dict[str, tuple[str, ...]]:
    """The guest's programs and their C files."""
    helpers = {name for names in HELPERS.values() for name in names}
    return {"init": tuple(sorted(path.name for path in SOURCES.glob("*.c") if path.name not in helpers)), **HELPERS}


def build_program(arch: str, name: str) -> Path:
    """One of the guest's programs for `arch`, built unless it is in the cache."""
    sources = programs()[name]
    made_of = [SOURCES / source for source in sources] + sorted(SOURCES.glob("*.h"))
    facts = {path.name: path.read_text() for path in made_of}
    facts |= {"arch": arch, "compiler": version("ziglang"), "flags": " ".join(COMPILER_FLAGS)}
    return artifact(name, facts, lambda output: _compile(arch, sources, output))


def _compile(arch: str, sources: tuple[str, ...], output: Path) -> None:
    """With the compiler that we use for every target.

    Raises:
        subprocess.CalledProcessError: the compiler refused; it has printed why.
    """
    command = [sys.executable, "-m", "ziglang", "cc", "-target", f"{arch}-linux-musl", *COMPILER_FLAGS]
    subprocess.run([*command, *[str(SOURCES / source) for source in sources], "-o", str(output)], check=True)


def build(arch: str) -> Path:
    """The initramfs for `arch`, built unless it is in the cache."""
    built = {name: build_program(arch, name) for name in programs()}
    facts = {name: str(path) for name, path in built.items()} | {"recipe": Path(__file__).read_text()}
    return artifact("initramfs.cpio", facts, lambda output: _pack(built, output))


def _pack(built: dict[str, Path], output: Path) -> None:
    entries = [Entry("dev", stat.S_IFDIR | 0o755), Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))]
    entries += [Entry(name, stat.S_IFREG | 0o755, path.read_bytes()) for name, path in built.items()]
    output.write_bytes(newc(entries))

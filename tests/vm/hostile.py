"""Programs of the tests' own that run in a guest, and the guests that they make."""

from __future__ import annotations

import stat
import subprocess
import sys
from pathlib import Path

from tools.initramfs import COMPILER_FLAGS, Entry, newc
from vmette.assets import host_arch

HERE = Path(__file__).parent


def compiled(name: str, directory: Path) -> Path:
    """The program that tests/vm/`name`.c is, in `directory`."""
    program = directory / name
    command = [sys.executable, "-m", "ziglang", "cc", "-target", f"{host_arch()}-linux-musl", *COMPILER_FLAGS]
    subprocess.run([*command, str(HERE / f"{name}.c"), "-o", str(program)], check=True)
    return program


def initramfs(init: Path, files: dict[str, bytes], path: Path) -> Path:
    """An initramfs, at `path`, with a program as its init and some files."""
    entries = [Entry("dev", stat.S_IFDIR | 0o755), Entry("init", stat.S_IFREG | 0o755, init.read_bytes())]
    entries += [Entry(name, stat.S_IFREG | 0o644, data) for name, data in files.items()]
    path.write_bytes(newc(entries))
    return path

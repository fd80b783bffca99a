from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = '#include <stdio.h>\nint main(void) { return puts("a program") < 0; }\n'
LIBRARY = "int library(int value) { return value + 1; }\n"


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A program for macOS, as the linker signs it."""
    return compiled(tmp_path_factory.mktemp("program"), PROGRAM)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return compiled(tmp_path_factory.mktemp("library"), LIBRARY, "-shared")


def compiled(directory: Path, source: str, *options: str, target: str = "aarch64-macos.13.0") -> bytes:
    """What the cross-compiler makes of a C file."""
    (directory / "source.c").write_text(source)
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target, *options, "source.c", "-o", "output"]
    subprocess.run(command, cwd=directory, check=True)
    return (directory / "output").read_bytes()

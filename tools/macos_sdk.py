"""Compiling for macOS on Apple silicon without a Mac: zig's clang and linker, and the stubs in csrc/macos-stubs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STUBS = ROOT / "csrc" / "macos-stubs"
TARGET = "aarch64-macos.13.0"
"""macOS 13 is the first with named console ports."""
FRAMEWORKS = ("Foundation", "CoreFoundation", "Security", "Virtualization")
"""What vz_shim.m needs."""

FLAGS = ("-Os", "-s", "-fobjc-arc", "-fblocks", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")
WARNINGS = ("-Wunguarded-availability", "-Wno-unused-parameter", "-Wno-missing-field-initializers")
"""What is newer than the target wants @available around it. (The rest: cffi's wrappers name what they do not use.)"""


def compiler() -> list[str]:
    """The command, up to what it is to compile. Nothing of this machine's paths gets into what it makes."""
    command = [sys.executable, "-m", "ziglang", "cc", "-target", TARGET, *FLAGS, *WARNINGS]
    return [*command, f"-ffile-prefix-map={ROOT}=.", f"-F{STUBS}", f"-I{ROOT / 'csrc'}"]


def linker() -> list[str]:
    """What a link has beside its objects."""
    return [f"-L{STUBS / 'lib'}", *[word for name in FRAMEWORKS for word in ("-framework", name)], "-lobjc"]


def compile_program(sources: Sequence[Path], output: Path) -> None:
    """Makes a program.

    Raises:
        subprocess.CalledProcessError: the compiler refused; it has printed why.
    """
    subprocess.run([*compiler(), *map(str, sources), *linker(), "-o", str(output)], cwd=ROOT, check=True)


def compile_extension(sources: Sequence[Path], output: Path, include_dirs: Sequence[Path]) -> None:
    """Makes a Python module, whose Python is found when it is loaded. Relative paths are from the repository's root.

    Raises:
        subprocess.CalledProcessError: the compiler refused; it has printed why.
    """
    command = [*compiler(), "-shared", "-Wl,-undefined,dynamic_lookup", f"-Wl,-install_name,@rpath/{output.name}"]
    command += [f"-ffile-prefix-map={output.parent}=.", *[f"-I{path}" for path in include_dirs]]
    libraries = linker() if any(path.suffix == ".m" for path in sources) else []
    subprocess.run([*command, *map(str, sources), *libraries, "-o", str(output)], cwd=ROOT, check=True)

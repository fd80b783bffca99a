"""Builds the stand-in: vmette-vz as it is, over a QEMU in place of Apple's framework."""

from __future__ import annotations

import hashlib
import subprocess
import tempfile
from pathlib import Path

from vmette import assets

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "csrc/vmm_main.c", ROOT / "tests/fake_vz/fake_vz.c", ROOT / "csrc/spawn.c", ROOT / "csrc/tsc.c"]
HEADERS = [ROOT / "csrc" / name for name in ("vz_shim.h", "spawn.h", "tsc.h")]
FLAGS = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def program(*, sanitized: bool = False) -> Path:
    """A `vmette-vz` for this system, kept in the cache directory by what it is made from."""
    flags = [*FLAGS, *(SANITIZE if sanitized else [])]
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in [*SOURCES, *HEADERS]:
        digest.update(path.read_bytes())
    directory = assets.cache_root() / "build" / f"fake-vz-{digest.hexdigest()[:16]}"
    kept = directory / "vmette-vz"
    if not kept.exists():
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            made = Path(scratch) / "vmette-vz"
            command = ["gcc", *flags, "-I", str(ROOT / "csrc"), *map(str, SOURCES), "-o", str(made)]
            subprocess.run(command, check=True)
            made.replace(kept)
    return kept

"""Builds wheels on Linux, for it and for Macs: `python -m tools.wheel macos`, `python -m tools.wheel linux [ARCH]`.

One wheel serves every Python, for the native modules keep to the limited ABI. What is Python and what is metadata
setuptools puts together; native modules and vmette-vz are cross-compiled, and signed for macOS. The same sources give
the same bytes: the members are in order, and have one time, $SOURCE_DATE_EPOCH or else the first that zip knows.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import io
import os
import runpy
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vmette import assets

from . import codesign, initramfs, macos_sdk
from . import payload as guest
from .artifacts import BuildError

if TYPE_CHECKING:
    from setuptools import Extension

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
PROJECT = ("pyproject.toml", "README.md", "LICENSE")
"""What setuptools reads, beside the package itself."""
ENTITLEMENTS = Path("vmm", "vmette-vz.entitlements")
"""In the package."""
VZ_PROGRAM = Path("_payload", "macos", "vmette-vz")
"""Likewise."""
VZ_SOURCES = (ROOT / "csrc" / "vmm_main.c", ROOT / "csrc" / "vz_shim.m")

PYTHON_TAG = "cp310-abi3"
MACOS = "macosx_13_0_arm64"
GLIBC = (2, 27)
"""The first that has copy_file_range."""

PYCONFIG = """\
/* What the limited API's headers ask: the same on every target, whatever the building machine's own file says. */
#define SIZEOF_INT 4
#define SIZEOF_LONG 8
#define SIZEOF_LONG_LONG 8
#define SIZEOF_SIZE_T 8
#define SIZEOF_VOID_P 8
#define SIZEOF_WCHAR_T 4
"""

EARLIEST = 315532800
"""1980-01-01, in seconds: zip has nothing before."""


def build_macos(payload: Path, output: Path) -> Path:
    """Makes the wheel for Apple silicon in the directory `output`, of what runs in the guest from `payload`.

    Raises:
        BuildError: a part of the payload is missing.
        subprocess.CalledProcessError: something does not compile; the compiler has said what.
    """
    return _build(MACOS, "aarch64", payload, output, _compile_for_macos)


def build_linux(arch: str, payload: Path, output: Path) -> Path:
    """Makes the wheel for Linux on `arch`, as :func:`build_macos`."""

    def compile_for_linux(package: Path, scratch: Path) -> None:
        _compile_for_linux(arch, package, scratch)

    return _build(f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{arch}", arch, payload, output, compile_for_linux)


def _build(platform: str, arch: str, payload: Path, output: Path, compiled: Callable[[Path, Path], None]) -> Path:
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".wheel-", dir=output.resolve()) as directory:
        staging = Path(directory)
        content, metadata = _python_part(arch, payload, staging)
        compiled(content / "vmette", staging)
        name, version = metadata.name.removesuffix(".dist-info").split("-")
        (metadata / "WHEEL").write_text(
            f"Wheel-Version: 1.0\nGenerator: vmette ({version})\nRoot-Is-Purelib: false\nTag: {PYTHON_TAG}-{platform}\n"
        )
        wheel = staging / f"{name}-{version}-{PYTHON_TAG}-{platform}.whl"
        _pack(content, metadata.name, wheel)
        return wheel.replace(output / wheel.name)


# --- The parts


def _python_part(arch: str, payload: Path, staging: Path) -> tuple[Path, Path]:
    """The package with what runs in the guest on `arch`, and the metadata; which files, pyproject.toml says."""
    source, content = staging / "source", staging / "content"
    foreign = shutil.ignore_patterns("__pycache__", "*.so", "_payload")
    shutil.copytree(ROOT / "vmette", source / "vmette", ignore=foreign)
    for name in PROJECT:
        shutil.copy(ROOT / name, source / name)
    target = source / "vmette" / "_payload"
    try:
        shutil.copytree(payload / arch, target / arch, ignore=shutil.ignore_patterns(".*"))
        shutil.copy(payload / "NOTICE", target / "NOTICE")
    except OSError as error:
        raise BuildError(f"the payload is missing: {error}") from error
    wanted = (assets.KERNELS[arch], "initramfs.cpio", "base.squashfs", *initramfs.HELPERS)
    if missing := [name for name in wanted if not (target / arch / name).is_file()]:
        raise BuildError(f"{payload / arch} has no {', '.join(missing)}")
    # No setup.py: that would build the native modules for this machine.
    setup = [sys.executable, "-c", "import setuptools; setuptools.setup()", "--quiet"]
    commands = ["build_py", f"--build-lib={content}", "dist_info", f"--output-dir={content}"]
    done = subprocess.run([*setup, *commands], cwd=source, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BuildError(f"setuptools cannot put the package together:\n{done.stdout}{done.stderr}")
    (metadata,) = content.glob("*.dist-info")
    return content, metadata


def _compile_for_macos(package: Path, scratch: Path) -> None:
    for script in ("native_build.py", "vz_build.py"):
        extension = _extension(script, scratch)
        output = package / _file_name(extension)
        includes = [*map(Path, extension.include_dirs), _python_headers(scratch)]
        macos_sdk.compile_extension([ROOT / source for source in extension.sources], output, includes)
        output.write_bytes(codesign.sign(output.read_bytes(), output.name))
    program = package / VZ_PROGRAM
    program.parent.mkdir(parents=True)
    macos_sdk.compile_program(list(VZ_SOURCES), program)
    entitlements = (package / ENTITLEMENTS).read_bytes()
    program.write_bytes(codesign.sign(program.read_bytes(), program.name, entitlements))


def _compile_for_linux(arch: str, package: Path, scratch: Path) -> None:
    extension = _extension("native_build.py", scratch)
    target = f"{arch}-linux-gnu.{GLIBC[0]}.{GLIBC[1]}"
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-shared", "-fPIC", "-s"]
    command += [*extension.extra_compile_args, f"-ffile-prefix-map={scratch}=."]
    command += [f"-I{path}" for path in (*extension.include_dirs, _python_headers(scratch))]
    subprocess.run([*command, *extension.sources, "-o", package / _file_name(extension)], cwd=ROOT, check=True)


def _extension(script: str, scratch: Path) -> Extension:
    """What one of cffi's build scripts in csrc/ says is to be compiled, the C code that cffi writes for it included.

    Its paths are from ROOT, or whole.
    """
    ffi = runpy.run_path(str(ROOT / "csrc" / script))["ffi"]
    with contextlib.redirect_stdout(io.StringIO()):  # it says what it writes
        extension: Extension = ffi.distutils_extension(str(scratch / "cffi"), verbose=False)
    return extension


def _file_name(extension: Extension) -> str:
    return f"{extension.name.rpartition('.')[2]}.abi3.so"


def _python_headers(scratch: Path) -> Path:
    """The headers of the running Python, with a pyconfig.h that is good for every target."""
    directory = scratch / "python"
    if not directory.exists():
        directory.mkdir()
        for header in Path(sysconfig.get_path("include")).iterdir():
            if header.name != "pyconfig.h":
                (directory / header.name).symlink_to(header)
        (directory / "pyconfig.h").write_text(PYCONFIG)
    return directory


# --- The archive


def _pack(content: Path, metadata: str, wheel: Path) -> None:
    """Writes the files below `content`, the metadata last, and of that the list of all of them."""
    when = time.gmtime(max(int(os.environ.get("SOURCE_DATE_EPOCH", EARLIEST)), EARLIEST))[:6]
    names = [path.relative_to(content).as_posix() for path in content.rglob("*") if path.is_file()]
    record = ""
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in sorted(names, key=lambda name: (name.startswith(f"{metadata}/"), name)):
            data = (content / name).read_bytes()
            _add(archive, name, data, when, executable=name == f"vmette/{VZ_PROGRAM}")
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
            record += f"{name},sha256={digest},{len(data)}\n"
        name = f"{metadata}/RECORD"
        _add(archive, name, f"{record}{name},,\n".encode(), when)


def _add(
    archive: zipfile.ZipFile,
    name: str,
    data: bytes,
    when: tuple[int, int, int, int, int, int],
    *,
    executable: bool = False,
) -> None:
    member = zipfile.ZipInfo(name, when)
    member.create_system = 3  # Unix, for the mode
    member.external_attr = (stat.S_IFREG | (0o755 if executable else 0o644)) << 16
    archive.writestr(member, data, zipfile.ZIP_DEFLATED, 9)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.wheel", description=__doc__)
    parser.add_argument("system", choices=["linux", "macos"])
    parser.add_argument(
        "arch", nargs="?", choices=sorted(assets.KERNELS), help="of Linux: x86_64 unless told otherwise"
    )
    options = parser.parse_args()
    if options.system == "macos" and options.arch == "x86_64":
        parser.error("there is none for Intel Macs")
    arch = options.arch or ("aarch64" if options.system == "macos" else "x86_64")
    try:
        guest.build(arch)
        if options.system == "macos":
            wheel = build_macos(guest.PAYLOAD, DIST)
        else:
            wheel = build_linux(arch, guest.PAYLOAD, DIST)
    except (BuildError, subprocess.CalledProcessError) as error:
        print(f"wheel: {error}", file=sys.stderr)
        return 1
    print(wheel)
    return 0


if __name__ == "__main__":
    sys.exit(main())

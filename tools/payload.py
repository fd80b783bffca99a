"""Builds what runs in the guest and puts it into the package: `python -m tools.payload [ARCH]`.

The kernel, the initramfs with the agent, the built-in root filesystem, and the programs that a provider can put into
other root filesystems go to `vmette/_payload/ARCH`.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import subprocess
import sys
from pathlib import Path

from vmette import assets

from . import base, initramfs, kernel
from .artifacts import BuildError, package_version

PAYLOAD = Path(__file__).resolve().parent.parent / "vmette" / "_payload"

NOTICE = """\
The files in this directory are not under vmette's licence.

vmlinux, Image   Linux, GPL-2.0 (https://www.kernel.org). Built from Debian's source package {kernel} with the
                 configuration in csrc/guest/ of vmette's source, by tools/kernel.py there.
base.squashfs    BusyBox, GPL-2.0 (https://busybox.net), as Debian's binary package {busybox} has it.
                 Its notices are in the image, /usr/share/doc/busybox-static/copyright.
initramfs.cpio, vsock-send, vsock-runner
                 vmette's own programs for the guest, MIT, with the musl C library, MIT (https://musl.libc.org).

The sources of the two GPL programs are in the Debian archive, at https://snapshot.debian.org, under these versions.
"""


def build(arch: str) -> None:
    """Makes the payload for `arch` complete and up to date.

    Raises:
        BuildError: something is missing or does not build.
    """
    directory = PAYLOAD / arch
    directory.mkdir(parents=True, exist_ok=True)
    helpers = [initramfs.build_program(arch, name) for name in initramfs.HELPERS]
    for path in (kernel.build(arch), initramfs.build(arch), base.build(arch), *helpers):
        _install(path, directory / path.name)
    packages = {"kernel": kernel.PACKAGE, "busybox": base.PACKAGE}
    notice = NOTICE.format(**{what: f"{package} {package_version(package)}" for what, package in packages.items()})
    (PAYLOAD / "NOTICE").write_text(notice)


def _install(source: Path, target: Path) -> None:
    """Copies unless it is there: what does not change keeps its time, and with it what was found out about it."""
    if target.exists() and filecmp.cmp(source, target, shallow=False):
        return
    staging = target.with_name(f".{target.name}.part")
    shutil.copyfile(source, staging)
    staging.replace(target)
    print(f"{target.relative_to(PAYLOAD.parent.parent)}: {target.stat().st_size:,} bytes", file=sys.stderr)


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.payload", description=__doc__)
    parser.add_argument("arch", nargs="?", choices=sorted(assets.KERNELS), default=assets.host_arch())
    try:
        build(parser.parse_args().arch)
    except (BuildError, subprocess.CalledProcessError) as error:
        print(f"payload: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

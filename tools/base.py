"""The built-in root filesystem, `builtin://base`: Debian's busybox-static and our own programs, as a squashfs image."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

from . import initramfs
from .artifacts import BuildError, artifact, package_version, scratch

BUSYBOX = Path("/bin/busybox")
PACKAGE = "busybox-static"
COPYRIGHT = Path("usr/share/doc/busybox-static/copyright")

DIRECTORIES = ("dev", "etc", "home", "mnt", "proc", "root", "run", "sys", "tmp", "usr/local/bin", "var/log", "var/tmp")
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "etc/shells": "/bin/sh\n/bin/ash\n",
    "etc/profile": "export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\nexport PS1='\\w \\$ '\n",
    "etc/os-release": 'ID=vmette\nNAME=vmette\nPRETTY_NAME="vmette base (busybox)"\n',
}
MODES = {"tmp": 0o1777, "var/tmp": 0o1777, "root": 0o700}

# The same busybox gives the same bytes. Not compressed, in blocks that have all of busybox: 2 MB are not worth the
# guest's time at every start.
MKSQUASHFS = ["-noappend", "-quiet", "-no-progress", "-all-root", "-no-xattrs", "-mkfs-time", "0", "-all-time", "0"]
MKSQUASHFS += ["-noI", "-noD", "-noF", "-noX", "-b", "1M"]


def build(arch: str) -> Path:
    """The image for `arch`, built unless it is in the cache.

    Raises:
        BuildError: busybox or mksquashfs is missing.
    """
    if shutil.which("mksquashfs") is None:
        raise BuildError("mksquashfs is missing: apt-get install squashfs-tools")
    helpers = {name: initramfs.build_program(arch, name) for name in initramfs.HELPERS}
    facts = {"busybox": package_version(PACKAGE), "arch": arch, "recipe": Path(__file__).read_text()}
    facts |= {name: str(path) for name, path in helpers.items()}
    return artifact("base.squashfs", facts, lambda output: _build(arch, helpers, output))


def _build(arch: str, helpers: dict[str, Path], output: Path) -> None:
    with scratch(output) as directory:
        package = Path("/") if arch == platform.machine() else _foreign_package(arch, directory / "package")
        root = directory / "root"
        for name in DIRECTORIES:
            (root / name).mkdir(parents=True)
        for name, mode in MODES.items():
            (root / name).chmod(mode)
        for name, text in FILES.items():
            (root / name).write_text(text)
        (root / COPYRIGHT).parent.mkdir(parents=True)
        shutil.copyfile(package / COPYRIGHT, root / COPYRIGHT)
        applets = subprocess.run([BUSYBOX, "--list-full"], capture_output=True, text=True, check=True)
        for applet in applets.stdout.split():
            (root / applet).parent.mkdir(parents=True, exist_ok=True)
            if Path("/", applet) != BUSYBOX:
                (root / applet).symlink_to(BUSYBOX)
        shutil.copy(package / BUSYBOX.relative_to("/"), root / BUSYBOX.relative_to("/"))
        for name, program in helpers.items():
            target = root / "usr/local/bin" / name
            shutil.copyfile(program, target)
            target.chmod(0o755)
        subprocess.run(["mksquashfs", root, output, *MKSQUASHFS], check=True)


def _foreign_package(arch: str, directory: Path) -> Path:
    """The same package for another architecture, unpacked."""
    debian = {"x86_64": "amd64", "aarch64": "arm64"}[arch]
    command = ["mmdebstrap", "--variant=extract", f"--architectures={debian}", f"--include={PACKAGE}", "--quiet"]
    subprocess.run([*command, platform.freedesktop_os_release()["VERSION_CODENAME"], directory], check=True)
    return directory

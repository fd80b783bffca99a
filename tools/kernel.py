"""The guest kernel, from the distribution's source and the fragments in csrc/guest/."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import deque
from pathlib import Path

from .artifacts import BuildError, Progress, artifact, package_version, scratch

PACKAGE = "linux-source-6.12"
TARBALL = Path("/usr/src/linux-source-6.12.tar.xz")
FRAGMENTS = Path(__file__).resolve().parent.parent / "csrc" / "guest"

# Our name: the kernel's name, the prefix of the compiler's programs, what `make` builds, where that is.
ARCHITECTURES = {
    "x86_64": ("x86", "", "vmlinux", "vmlinux"),
    "aarch64": ("arm64", "aarch64-linux-gnu-", "Image", "arch/arm64/boot/Image"),
}

# The same source and configuration give the same kernel, whoever builds it and when.
REPRODUCIBLE = {
    "KBUILD_BUILD_TIMESTAMP": "1970-01-01",
    "KBUILD_BUILD_USER": "vmette",
    "KBUILD_BUILD_HOST": "vmette",
    "KBUILD_BUILD_VERSION": "1",
}


def build(arch: str) -> Path:
    """The kernel for `arch`: vmlinux (x86_64) or Image (aarch64), built unless it is in the cache.

    Raises:
        BuildError: the source is missing, an option of the fragments was not taken, or the build failed.
    """
    if not TARBALL.exists():
        raise BuildError(f"the kernel's source is missing: apt-get install {PACKAGE}")
    fragment = "".join((FRAGMENTS / f"{name}.fragment").read_text() for name in ("kernel", f"kernel-{arch}"))
    facts = {"fragment": fragment, "source": package_version(PACKAGE), "arch": arch}
    name = Path(ARCHITECTURES[arch][3]).name
    return artifact(name, facts, lambda output: _build(arch, fragment, output))


def _build(arch: str, fragment: str, output: Path) -> None:
    kernel_arch, prefix, target, product = ARCHITECTURES[arch]
    with scratch(output) as directory:
        progress = Progress(f"unpacking {TARBALL.name}")
        # What no guest of ours has and nothing but its own files needs: more than half of the tree's bytes.
        left_out = ("Documentation/*/*", "drivers/gpu/*.[ch]", "drivers/media/*.[ch]", "sound/*.[ch]", "tools/testing")
        exclude = [f"--exclude=*/{path}" for path in left_out]
        unpack = ["tar", "-xf", str(TARBALL), "-C", str(directory), "--strip-components=1", "--wildcards", *exclude]
        subprocess.run(unpack, check=True)
        progress.done()
        make = ["make", "-C", str(directory), f"ARCH={kernel_arch}", f"CROSS_COMPILE={prefix}"]
        make += [f"{name}={value}" for name, value in REPRODUCIBLE.items()]
        wanted = directory / "vmette.config"
        wanted.write_text(fragment)
        _run([*make, f"KCONFIG_ALLCONFIG={wanted}", "allnoconfig"], None)
        _check(fragment, (directory / ".config").read_text())
        _run([*make, f"-j{os.cpu_count() or 1}", target], Progress(f"building the guest kernel for {arch}"))
        if target == "vmlinux":
            subprocess.run(["strip", "--strip-all", "-o", output, directory / product], check=True)
        else:
            shutil.copyfile(directory / product, output)


def _run(command: list[str], progress: Progress | None) -> None:
    lines: deque[str] = deque(maxlen=30)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if progress is not None and re.match(r"  [A-Z]+ ", line):
                progress.step()
    if process.returncode != 0:
        raise BuildError(f"the kernel does not build:\n{''.join(lines)}")
    if progress is not None:
        progress.done()


def _check(fragment: str, config: str) -> None:
    """Every line of the fragment must be in force: an option with a typo or an unmet dependency is dropped silently."""
    got = dict(re.findall(r"^(CONFIG_\w+)=(.*)$", config, re.MULTILINE))
    refused = [
        f"{name}={value}"
        for name, value in re.findall(r"^(CONFIG_\w+)=(.*)$", fragment, re.MULTILINE)
        if got.get(name, "n") != value
    ]
    if refused:
        raise BuildError(f"the kernel's configuration does not take {', '.join(refused)}")

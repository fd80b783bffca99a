"""How long `vmette run builtin://base true` takes, against what the same VM needs with nothing of vmette in it.

    .venv/bin/python -m bench.startup [--runs N]

- vmette: the whole run, from the start of the process to its end.
- python: a bare `python -c ''`, which every Python program pays.
- floor: the same QEMU command line and kernel, with an init that powers off at once, started by a shell.
- debian: the same, with the kernel of Debian's linux-image-cloud-amd64 (downloaded with apt; x86_64 only).

The four take turns, so that what else the machine does falls on all alike. It prints medians and ratios.
"""

from __future__ import annotations

import argparse
import compileall
import shlex
import stat
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import vmette
from tools.initramfs import Entry, newc
from vmette import assets
from vmette.config import MachineConfig
from vmette.providers import BlockFs, BlockImage
from vmette.vmm.qemu import choose_accel, command_line

OFF = """
#include <sys/reboot.h>
int main(void) { reboot(RB_POWER_OFF); for (;;) {} }
"""

VMETTE = [sys.executable, "-m", "vmette", "run", "builtin://base", "true"]


def floor_initramfs(directory: Path) -> Path:
    """An initramfs whose init powers off."""
    (directory / "off.c").write_text(OFF)
    compiler = [
        sys.executable,
        "-m",
        "ziglang",
        "cc",
        "-target",
        f"{assets.host_arch()}-linux-musl",
        "-static",
        "-Os",
        "-s",
    ]
    subprocess.run([*compiler, directory / "off.c", "-o", directory / "off"], check=True)
    image = directory / "off.cpio"
    init = Entry("init", stat.S_IFREG | 0o755, (directory / "off").read_bytes())
    device = Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))
    image.write_bytes(newc([Entry("dev", stat.S_IFDIR | 0o755), device, init]))
    return image


def debian_kernel(directory: Path) -> Path:
    """The kernel of Debian's cloud image, fetched with apt."""
    depends = ["apt-cache", "depends", "--important", "linux-image-cloud-amd64"]
    lines = subprocess.run(depends, capture_output=True, text=True, check=True).stdout.splitlines()
    package = next(line.split()[-1] for line in lines if "linux-image-" in line and "Depends:" in line)
    subprocess.run(["apt-get", "download", "-qq", package], cwd=directory, check=True)
    subprocess.run(["dpkg-deb", "-x", next(directory.glob("*.deb")), directory / "debian"], check=True)
    return next((directory / "debian/boot").glob("vmlinuz-*"))


def floor(kernel: Path | None, initramfs: Path) -> list[str]:
    """A shell that runs the VM of `vmette run builtin://base`, with another initramfs and perhaps another kernel."""
    root = BlockImage(assets.base_image(), BlockFs.SQUASHFS)
    config = MachineConfig(root, kernel=kernel, initramfs=initramfs)
    argv = command_line(config, choose_accel(MachineConfig(root)), lambda *_: ("", []))
    # Nobody listens here: the sockets that vmette hands over become null devices.
    argv = [f"null,id={word.split('id=')[1].split(',')[0]}" if word.startswith("socket,") else word for word in argv]
    return ["sh", "-c", f"{shlex.join(argv)} && true"]


def wall(argv: list[str]) -> float:
    """Milliseconds that `argv` takes."""
    start = time.perf_counter()
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    return (time.perf_counter() - start) * 1000


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Measure vmette's start-up.")
    parser.add_argument("--runs", type=int, default=20, help="runs of each (20)")
    runs: int = parser.parse_args().runs
    compileall.compile_dir(Path(vmette.__file__).parent, quiet=1)  # as an installation has it
    with tempfile.TemporaryDirectory(prefix="vmette-bench-") as name:
        directory = Path(name)
        initramfs = floor_initramfs(directory)
        commands = {"vmette": VMETTE, "python": [sys.executable, "-c", ""], "floor": floor(None, initramfs)}
        if assets.host_arch() == "x86_64":
            commands["debian"] = floor(debian_kernel(directory), initramfs)
        times: dict[str, list[float]] = {what: [] for what in commands}
        for run in range(runs + 1):
            for what, argv in commands.items():
                took = wall(argv)
                if run > 0:  # the first one fills caches
                    times[what].append(took)
    median = {what: statistics.median(values) for what, values in times.items()}
    for what, values in times.items():
        print(f"{what:8} {median[what]:8.1f} ms   ({min(values):.1f} to {max(values):.1f})")
    print(f"vmette / (floor + python) = {median['vmette'] / (median['floor'] + median['python']):.2f}   (aim: 1.25)")
    if "debian" in times:
        print(f"vmette / debian           = {median['vmette'] / median['debian']:.2f}")
        print(f"floor / debian            = {median['floor'] / median['debian']:.2f}")


if __name__ == "__main__":
    main()

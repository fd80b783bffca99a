"""How long a command takes from nothing to its end, against what else could run it.

    .venv/bin/python -m bench.startup [--runs N] [--quick]

`true` in the built-in root filesystem:

- cold: `vmette run --no-template builtin://base true`, from the start of the process to its end.
- template: `vmette run builtin://base true`, when there is a template.
- pool: a sandbox from a `vmette.Pool`, `true` in it, in a program that runs.
- python: a bare `python -c ''`, which every Python program pays.
- floor: the same QEMU command line and kernel, with an init that powers off at once, started by a shell.
- debian: the same, with the kernel of Debian's linux-image-cloud-amd64 (downloaded with apt; x86_64 only).
- virtme-ng: that kernel and this computer's own root by `vng`, from PyPI.
- bwrap, runc: a container of the same root, which shares this computer's kernel: what people compare with.

`python3 -c pass` in Debian with python3: cold, template, pool, bwrap. All take turns. It prints medians and ratios.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import vmette
from bench.measure import Report, in_turns, wall
from tools.initramfs import Entry, newc
from vmette import assets
from vmette.config import MachineConfig
from vmette.machine import prepare
from vmette.providers import BlockFs, BlockImage
from vmette.templates import Template
from vmette.vmm.qemu import choose_accel, command_line

OFF = """
#include <sys/reboot.h>
int main(void) { reboot(RB_POWER_OFF); for (;;) {} }
"""
BASE = "builtin://base"
PEERS = {
    "boxlite (PyPI)": "needs /dev/kvm, under which ordinary kernels hang here",
    "microsandbox (PyPI)": "needs /dev/kvm, and images from a registry that is out of reach here",
    "smolvm (PyPI)": "downloads its kernel and Firecracker from where nothing is reached here",
    "firecracker-python (PyPI)": "drives Firecracker, which needs /dev/kvm",
}
"""Other microVM packages, and why they do not start on the development machine."""


def floor_initramfs(directory: Path) -> Path:
    """An initramfs whose init powers off."""
    (directory / "off.c").write_text(OFF)
    target = f"{assets.host_arch()}-linux-musl"
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-static", "-Os", "-s"]
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


def vmette_run(spec: str, *options: str, command: Sequence[str]) -> Callable[[], float]:
    """The whole process of `vmette run`."""
    return partial(wall, [sys.executable, "-m", "vmette", "run", *options, spec, *command])


def bwrap(root: Path, command: Sequence[str]) -> Callable[[], float]:
    """A container of `root` in namespaces of its own."""
    options = ["--ro-bind", str(root), "/", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "--unshare-all"]
    return partial(wall, ["bwrap", *options, *command])


def runc(root: Path, directory: Path) -> Callable[[], float]:
    """A container of `root` by runc, as its own `spec` describes one."""
    bundle = directory / "bundle"

    def run() -> float:
        if not bundle.exists():
            bundle.mkdir()
            subprocess.run(["runc", "spec"], cwd=bundle, check=True, capture_output=True)
            spec = json.loads((bundle / "config.json").read_text())
            spec["process"] |= {"terminal": False, "args": ["true"]}
            spec["root"] = {"path": str(root), "readonly": True}
            (bundle / "config.json").write_text(json.dumps(spec))
        return wall(["runc", "run", "--bundle", bundle, f"vmette-bench-{os.getpid()}"])

    return run


def virtme(kernel: Path, directory: Path) -> Callable[[], float]:
    """A run of `true` by virtme-ng in a VM whose root is this computer's own."""
    place = directory / "vng"

    def run() -> float:
        if not place.exists():
            venv.create(place, with_pip=True)
            subprocess.run([place / "bin/pip", "install", "-q", "virtme-ng"], check=True, capture_output=True)
        options = ["--disable-kvm", "--memory", "512M", "--cpus", "1", "--exec", "true"]
        environment = {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}"}
        return wall([place / "bin/vng", "--run", kernel, *options], cwd="/", env=environment)

    return run


@contextmanager
def pool(spec: str, command: Sequence[str]) -> Iterator[Callable[[], float]]:
    """A hand-out and a command, when a sandbox is ready."""
    with vmette.Pool(spec, 1, warm_up=command) as ready:

        def run() -> float:
            while not ready.ready:
                time.sleep(0.01)
            start = time.perf_counter()
            sandbox = ready.acquire()
            sandbox.run(command, check=True)
            took = (time.perf_counter() - start) * 1000
            sandbox.close()
            while not ready.ready:  # what refills it is not to be in the others' way
                time.sleep(0.01)
            return took

        yield run


def unpacked(directory: Path) -> Path:
    """The files of the built-in root filesystem."""
    root = directory / "base"
    subprocess.run(["unsquashfs", "-q", "-n", "-d", root, assets.base_image()], check=True)
    return root


def debian_python(directory: Path) -> tuple[str, Path]:
    """Debian with python3: a spec, and its files."""
    archive, root = directory / "python.tar", directory / "python"
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    options = ["--variant=essential", "--include=python3-minimal", "--quiet"]
    subprocess.run(["mmdebstrap", *options, release, archive], check=True)
    root.mkdir()
    subprocess.run(["tar", "-xf", archive, "-C", root, "--exclude=./dev/*"], check=True)
    return f"tar+file://{archive}", root


def make_template(spec: str) -> None:
    """Makes the template that a plain `vmette run` wakes from."""
    template = Template(prepare(spec, {}).config)
    if template.problem() is not None:
        template.make()


def measure(runs: int, *, quick: bool = False) -> list[Report]:
    """`true` in the built-in root, and (unless `quick`) python3 in Debian."""
    compileall.compile_dir(Path(vmette.__file__).parent, quiet=1)  # as an installation has it
    reports = [Report("true", left_out=dict(PEERS))]
    with tempfile.TemporaryDirectory(prefix="vmette-bench-") as name, ExitStack() as stack:
        directory = Path(name)
        initramfs = floor_initramfs(directory)
        make_template(BASE)
        contenders: dict[str, Callable[[], float]] = {
            "python": partial(wall, [sys.executable, "-c", ""]),
            "floor": partial(wall, floor(None, initramfs)),
            "cold": vmette_run(BASE, "--no-template", command=["true"]),
            "template": vmette_run(BASE, command=["true"]),
            "pool": stack.enter_context(pool(BASE, ["true"])),
        }
        if not quick:
            root = unpacked(directory)
            if assets.host_arch() == "x86_64":
                kernel = debian_kernel(directory)
                contenders["debian"] = partial(wall, floor(kernel, initramfs))
                contenders["virtme-ng"] = virtme(kernel, directory)
            for tool in ("bwrap", "runc"):
                if shutil.which(tool) is None:
                    reports[0].left_out[tool] = "it is not installed"
                else:
                    contenders[tool] = bwrap(root, ["true"]) if tool == "bwrap" else runc(root, directory)
        in_turns(contenders, runs, reports[0])
        _rate(reports[0])
        stack.close()
        if not quick:
            spec, root = debian_python(directory)
            command = ["python3", "-c", "pass"]
            reports.append(Report("python3 -c pass in Debian"))
            subprocess.run(
                [sys.executable, "-m", "vmette", "pull", "--quiet", spec], check=True, stdout=subprocess.DEVNULL
            )
            make_template(spec)
            contenders = {
                "cold": vmette_run(spec, "--no-template", command=command),
                "template": vmette_run(spec, command=command),
                "pool": stack.enter_context(pool(spec, command)),
            }
            if shutil.which("bwrap") is not None:
                contenders["bwrap"] = bwrap(root, command)
            in_turns(contenders, runs, reports[1])
            reports[1].ratios["template / cold"] = reports[1].of("template").median / reports[1].of("cold").median
            stack.close()
    return reports


def _rate(report: Report) -> None:
    median = {series.name: series.median for series in report.series}
    report.ratios = {
        "cold / (floor + python)": median["cold"] / (median["floor"] + median["python"]),
        "template / floor": median["template"] / median["floor"],
        "template / cold": median["template"] / median["cold"],
    }
    report.aims = {"cold / (floor + python)": 1.25, "template / floor": 0.3}
    if "debian" in median:
        report.ratios["cold / debian"] = median["cold"] / median["debian"]
    report.facts["pool, ms (aim: 30)"] = median["pool"]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Measure vmette's start-up.")
    parser.add_argument("--runs", type=int, default=20, help="runs of each (20)")
    parser.add_argument("--quick", action="store_true", help="without other people's programs and Debian")
    given = parser.parse_args()
    for report in measure(given.runs, quick=given.quick):
        report.show()


if __name__ == "__main__":
    main()

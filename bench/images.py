"""What it takes to have an image of a registry ready to be a root filesystem.

    .venv/bin/python -m bench.images [--runs N]

The image is Debian with python3 in one layer and a small one on top, in Debian's docker-registry on this machine.

- vmette: `vmette pull`, with an empty cache.
- unpack: `skopeo copy` to a layout and `umoci unpack` (as root).
- erofs: the same, and `mkfs.erofs` of what was unpacked.
- changed: `vmette pull` of the image with another small layer on top, when the cache has the first one.

They take turns. It prints medians of wall and CPU time, the largest process, and ratios of wall times.
"""

from __future__ import annotations

import argparse
import compileall
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import vmette
from tests.images.layout import Layout, member, tar
from tests.providers.oci.registry import docker_registry, push


@dataclass(frozen=True)
class Cost:
    """Of one run."""

    wall: float
    """Seconds."""
    cpu: float
    """Seconds, of user and system, of all processes."""
    memory: int
    """KiB, of the largest process."""


def cost(*commands: list[str], cache: Path | None = None) -> Cost:
    """What `commands`, one after the other, take."""
    environment = os.environ if cache is None else {**os.environ, "VMETTE_CACHE_DIR": str(cache)}
    start = time.perf_counter()
    cpu, memory = 0.0, 0
    for argv in commands:
        process = subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, argv)
        cpu += usage.ru_utime + usage.ru_stime
        memory = max(memory, usage.ru_maxrss)
    return Cost(time.perf_counter() - start, cpu, memory)


def push_images(directory: Path, host: str) -> None:
    """Has the registry have `image:1` and `image:2`, which share all but the top layer."""
    debian = directory / "debian.tar"
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    subprocess.run(["mmdebstrap", "--variant=minbase", "--include=python3", "--quiet", release, debian], check=True)
    layout = Layout(directory / "layout")
    base = debian.read_bytes()
    debian.unlink()
    for tag in ("1", "2"):
        top = tar([member(f"srv/app/{n}.py", f"# {tag} {n}\n".encode() * 200) for n in range(100)])
        push(layout.tag(tag, layout.manifest([base, top])), host, f"image:{tag}")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Measure how images are pulled and prepared.")
    parser.add_argument("--runs", type=int, default=5, help="runs of each (5)")
    runs: int = parser.parse_args().runs
    compileall.compile_dir(Path(vmette.__file__).parent, quiet=1)  # as an installation has it
    costs: dict[str, list[Cost]] = {"vmette": [], "unpack": [], "erofs": [], "changed": []}
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmette-bench-", dir="/var/tmp")))
        host = stack.enter_context(docker_registry(directory))
        # In a process of its own: what it takes would be counted as the peak of our other children.
        pushing = get_context("fork").Process(target=push_images, args=(directory, host))
        pushing.start()
        pushing.join()
        cache, layout, bundle = directory / "cache", directory / "copied", directory / "bundle"
        pull = [sys.executable, "-m", "vmette", "pull", "--quiet"]
        copy = ["skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false"]
        copy += [f"docker://{host}/image:1", f"oci:{layout}:1"]
        unpack = ["umoci", "unpack", "--image", f"{layout}:1", str(bundle)]
        mkfs = ["mkfs.erofs", str(directory / "image.erofs"), str(bundle / "rootfs")]
        for run in range(runs + 1):
            for what in costs:
                if what != "changed":
                    for path in (cache, layout, bundle):
                        shutil.rmtree(path, ignore_errors=True)
                    (directory / "image.erofs").unlink(missing_ok=True)
                if what == "vmette":
                    taken = cost([*pull, f"{host}/image:1"], cache=cache)
                elif what == "changed":
                    cost([*pull, f"{host}/image:1"], cache=cache)
                    taken = cost([*pull, f"{host}/image:2"], cache=cache)
                else:
                    taken = cost(copy, unpack, *([mkfs] if what == "erofs" else []))
                if run > 0:  # the first one fills the page cache
                    costs[what].append(taken)
    wall = {what: statistics.median(one.wall for one in ones) for what, ones in costs.items()}
    for what, ones in costs.items():
        spread = f"({min(one.wall for one in ones):.2f} to {max(one.wall for one in ones):.2f})"
        cpu, memory = statistics.median(one.cpu for one in ones), max(one.memory for one in ones)
        print(f"{what:8} {wall[what]:6.2f} s {spread:16} CPU {cpu:6.2f} s   largest process {memory / 1024:5.0f} MiB")
    print(f"vmette / unpack  = {wall['vmette'] / wall['unpack']:.2f}   (aim: 0.5)")
    print(f"vmette / erofs   = {wall['vmette'] / wall['erofs']:.2f}")
    print(f"changed / vmette = {wall['changed'] / wall['vmette']:.2f}   (aim: 0.2)")


if __name__ == "__main__":
    main()

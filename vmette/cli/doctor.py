"""`vmette doctor`."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from .. import assets
from ..errors import VmetteError

FREE_BYTES = 1 << 30
"""Less than this is soon full: images are of that size."""


@dataclass(frozen=True)
class Finding:
    """One line of the report: `state` is `ok`, `slow` (it works, and could be better) or `problem`."""

    subject: str
    state: str
    text: str
    advice: str = ""


@click.command()
def command() -> int:
    """Check what this computer has for vmette: QEMU, acceleration, shares, networks, the guest payload, the cache.

    On a Mac: macOS and the processor, the program that runs machines and its entitlement, Rosetta, payload and cache.

    Exits with 1 if there is a problem.
    """
    from .. import vmm

    failed = False
    for check in (*(MACOS if vmm.name() == "vz" else LINUX), *EVERYWHERE):
        for finding in _findings(check):
            failed |= finding.state == "problem"
            click.echo(f"{finding.subject:<12} {finding.state:<8} {finding.text}")
            if finding.advice:
                click.echo(f"{'':<12} {'':<8} -> {finding.advice}")
    return 1 if failed else 0


def _findings(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except VmetteError as error:
        yield Finding(check.__name__.strip("_").replace("_", "-"), "problem", str(error))


def _qemu() -> Iterator[Finding]:
    from ..vmm import qemu

    try:
        path = qemu.binary(assets.host_arch())
    except VmetteError as error:
        what, _, advice = str(error).partition(": ")
        yield Finding("qemu", "problem", what, advice)
        return
    try:
        answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding("qemu", "problem", f"{path} does not run: {error}", "install it anew")
        return
    yield Finding("qemu", "ok", f"{path}: {answer.stdout.partition(chr(10))[0]}")


def _accelerator() -> Iterator[Finding]:
    from ..config import MachineConfig
    from ..vmm import qemu

    arch = assets.host_arch()
    if problem := qemu.kvm_problem(arch):
        yield Finding("accelerator", "slow", "tcg (emulation)", problem)
    elif qemu.choose_accel(MachineConfig(None, arch=arch)) == "kvm":
        yield Finding("accelerator", "ok", "kvm")
    else:
        advice = "KVM does not boot the guest's kernel; that is so in many virtual machines. Remove the directory "
        yield Finding(
            "accelerator",
            "slow",
            "tcg (emulation)",
            advice + f"{assets.cache_root() / 'probes'} to have it tried again",
        )


def _shares() -> Iterator[Finding]:
    from ..config import MachineConfig
    from ..vmm import qemu, virtiofsd

    if qemu.choose_accel(MachineConfig(None)) != "kvm":
        yield Finding("shares", "slow", "9p", "virtio-fs is faster, and works under kvm only")
        return
    found = virtiofsd.find()
    path = virtiofsd.locate()
    if found is not None:
        kinds = "virtio-fs" if found.read_only else "virtio-fs; 9p for read-only ones"
        yield Finding("shares", "ok", f"{kinds} ({found.path})")
    elif path is None:
        yield Finding("shares", "slow", "9p", "virtio-fs is faster: install virtiofsd")
    else:
        yield Finding("shares", "slow", "9p", f"virtio-fs is faster, but {path} does not work for this user")


def _network() -> Iterator[Finding]:
    from ..vmm import passt

    if (program := passt.find()) is not None:
        yield Finding("network", "ok", f"passt ({program})")
    else:
        advice = "with --net, a guest reaches what listens on this computer's loopback; passt prevents that: install it"
        yield Finding("network", "slow", "QEMU's own", advice)


def _vsock() -> Iterator[Finding]:
    from ..vmm import vhost_vsock

    yield Finding("vsock", "ok", str(vhost_vsock.DEVICE) if vhost_vsock.available() else "through the guest's agent")


# --- macOS


def _macos() -> Iterator[Finding]:
    from ..vmm import vz

    if problem := vz.host_problem():
        what, _, advice = problem.partition(": ")
        yield Finding("macos", "problem", what, advice)
    else:
        import platform

        yield Finding("macos", "ok", f"{platform.mac_ver()[0] or platform.system()} on {os.uname().machine}")


def _vmette_vz() -> Iterator[Finding]:
    from ..vmm import vz

    if vz.host_problem():
        return
    original = assets.vz_program()
    if vz.quarantined(original):
        yield Finding("quarantine", "slow", f"{original} is quarantined", "a copy without that is used")
    found = vz.program()
    signed_here = found.path != original
    yield Finding("vmette-vz", "ok", f"{found.path}{' (signed on this computer)' if signed_here else ''}")
    cpus, memory = found.cpus, [amount >> 20 for amount in found.memory]
    yield Finding("machines", "ok", f"{cpus[0]} to {cpus[1]} vcpus, {memory[0]:,} to {memory[1]:,} MiB of memory")
    if found.save_restore:
        yield Finding("snapshots", "ok", "machines can be saved and restored")
    else:
        yield Finding("snapshots", "slow", "machines cannot be saved", "macOS 14 and later can")
    if found.rosetta == "installed":
        yield Finding("rosetta", "ok", "runs amd64 images: --platform linux/amd64")
    elif found.rosetta == "not-installed":
        yield Finding("rosetta", "slow", "not installed", "for amd64 images: softwareupdate --install-rosetta")
    else:
        yield Finding("rosetta", "slow", "not supported", "amd64 images do not run here")


# --- everywhere


def _payload() -> Iterator[Finding]:
    arch = assets.host_arch()
    for subject, find in (
        ("kernel", assets.kernel),
        ("initramfs", assets.initramfs),
        ("base image", assets.base_image),
    ):
        try:
            path = find(arch)
            yield Finding(subject, "ok", f"{path} ({path.stat().st_size:,} bytes)")
        except VmetteError as error:
            what, _, advice = str(error).partition(": ")
            yield Finding(subject, "problem", what, advice)


def _cache() -> Iterator[Finding]:
    root = assets.cache_root()
    place = next((path for path in (root, *root.parents) if path.exists()), Path("/"))
    advice = "set VMETTE_CACHE_DIR to a directory of yours"
    if not place.is_dir():
        yield Finding("cache", "problem", f"{place} is no directory", advice)
        return
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        yield Finding("cache", "problem", f"{place} cannot be written to: {error.strerror}", advice)
        return
    free = shutil.disk_usage(place).free
    text = f"{root} ({free / (1 << 30):.1f} GiB free)"
    if free < FREE_BYTES:
        yield Finding("cache", "problem", text, f"make room, or {advice}")
    elif root.exists() and (root.stat().st_mode & 0o022 or root.stat().st_uid != os.geteuid()):
        yield Finding("cache", "problem", f"{root} can be written to by others", f"chmod 700 it, or {advice}")
    else:
        yield Finding("cache", "ok", text)


def _templates() -> Iterator[Finding]:
    from .. import templates
    from .progress import human

    if os.environ.get("VMETTE_TEMPLATES") == "0":
        yield Finding("templates", "slow", "VMETTE_TEMPLATES is 0: each machine boots", "unset it")
        return
    place = templates.directory()
    sizes = [sum(path.stat().st_blocks * 512 for path in template.iterdir()) for template in place.glob("[!.]*")]
    text = f"{len(sizes)}, {human(sum(sizes))}"
    for failed in place.glob(".*.failed"):
        yield Finding("templates", "slow", f"{text}; one was not made: {failed.read_text()}", "it is tried again later")
        return
    yield Finding("templates", "ok", text)


LINUX = (_qemu, _accelerator, _shares, _network, _vsock)
MACOS = (_macos, _vmette_vz)
EVERYWHERE = (_payload, _cache, _templates)

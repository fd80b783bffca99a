"""The guest kernel's command line. `csrc/guest/init.c` reads the `vmette.` tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..config import CMDLINE_BYTES, ROOT_TAG, ROSETTA_TAG, MachineConfig, Share
from ..errors import ConfigError
from ..providers.base import BlockImage
from . import probe

COMMON = ("console=hvc0", "quiet", "panic=-1")

# The microvm has no PCI bus to look for.
X86 = ("pci=off",)

PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789/._-")
"""What a path can have that is not escaped."""


def kernel_cmdline(
    config: MachineConfig, accel: str, root_type: str, shares: Sequence[tuple[Share, str]], network: str = ""
) -> str:
    """The whole line.

    Args:
        config: The machine's.
        accel: `kvm` or `tcg`.
        root_type: Of a directory root, `virtiofs` or `9p`.
        shares: The shares, each with its type.
        network: How the network card gets its address (csrc/guest/network.h); empty if there is none.

    Raises:
        ConfigError: it is longer than the kernel takes.
    """
    tokens = [*COMMON]
    if config.arch == "x86_64":
        tokens += [*X86, *(_x86_clocks() if accel == "tcg" and config.saved is None else ())]
    if isinstance(config.root, BlockImage):
        tokens.append(f"vmette.rootfs_block={config.root.fstype}")
    elif config.root is not None:
        tokens.append(f"vmette.rootfs_share={root_type}:{ROOT_TAG}")
    if config.root_read_only:
        tokens.append("vmette.rootfs_ro")
    if not config.shares_later:
        tokens += [f"vmette.share={token}" for token in share_tokens(shares)]
    if config.scratch_mib is not None:  # the last of the disks
        tokens.append(
            f"vmette.scratch=/dev/vd{chr(ord('a') + isinstance(config.root, BlockImage) + len(config.disks))}"
        )
    if config.hostname != "vmette":
        tokens.append(f"vmette.hostname={config.hostname}")
    if config.pids is not None:
        tokens.append(f"vmette.pids={config.pids}")
    if config.nofile is not None:
        tokens.append(f"vmette.nofile={config.nofile}")
    if config.rosetta:
        tokens.append(f"vmette.rosetta=virtiofs:{ROSETTA_TAG}")
    if config.guest_helpers:
        tokens.append("vmette.helpers")
    if network:
        tokens.append(f"vmette.net={network}")
    if config.cmdline:
        tokens.append(config.cmdline)
    line = " ".join(tokens)
    size = len(os.fsencode(line))
    if size > CMDLINE_BYTES:
        raise ConfigError(f"the kernel command line is {size} bytes long; at most {CMDLINE_BYTES} fit")
    return line


def share_tokens(shares: Sequence[tuple[Share, str]]) -> list[str]:
    """What the guest is told of the shares, each with its type: one that lies within another is mounted after it."""
    tokens = []
    for share, kind in sorted(shares, key=lambda each: (each[0].target or "").count("/")):
        target = f":{escape(share.target)}" if share.target is not None else ""
        tokens.append(f"{kind}:{share.tag}:{'ro' if share.read_only else 'rw'}{target}")
    return tokens


def escape(path: str) -> str:
    """`path` as one word, with %XX for the bytes that would be none."""
    return "".join(chr(byte) if byte in PLAIN else f"%{byte:02X}" for byte in os.fsencode(path))


def _x86_clocks() -> list[str]:
    """What makes an emulated x86 boot reliable.

    `microvm` has no HPET, and the kernel measures its time-stamp counter against the PIT. On a busy host that fails
    (the two are not read at one time), and the kernel then waits for PIT interrupts to calibrate its APIC timer with,
    which never come: half of the boots hang. Told the frequency, it measures nothing. Nor is the PIT's interrupt
    tested then, nor the counter watched against a clock that is not there.
    """
    from . import processor

    try:
        khz = probe.recalled("tsc-khz", {"boot": probe.boot_id(), "host": processor()}, _tsc_khz, int)
    except _UnknownError:
        khz = 0
    return ["no_timer_check", "tsc=reliable", *([f"tsc_early_khz={khz}"] if khz else [])]


class _UnknownError(Exception):
    """The frequency could not be measured; the next time it may."""


def _tsc_khz() -> int:
    from .._native import lib

    khz = sorted(int(lib.vmette_tsc_khz()) for _ in range(3))[1]
    if not khz:
        raise _UnknownError
    return khz

"""The guest kernel's command line. `csrc/guest/init.c` reads the `vmette.` tokens."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..config import CMDLINE_BYTES, ROOT_TAG, MachineConfig, Share
from ..errors import ConfigError
from ..providers.base import BlockImage

COMMON = ("console=hvc0", "quiet", "panic=-1")

# The microvm has no PCI bus to look for.
X86 = ("pci=off",)


def kernel_cmdline(config: MachineConfig, accel: str, root_type: str, shares: Sequence[tuple[Share, str]]) -> str:
    """The whole line. Types of the directory root and of each share are `virtiofs` or `9p`.

    Raises:
        ConfigError: it is longer than the kernel takes.
    """
    tokens = [*COMMON]
    if config.arch == "x86_64":
        tokens += [*X86, *(_x86_clocks() if accel == "tcg" else ())]
    if isinstance(config.root, BlockImage):
        tokens.append(f"vmette.rootfs_block={config.root.fstype}")
    elif config.root is not None:
        tokens.append(f"vmette.rootfs_share={root_type}:{ROOT_TAG}")
    if config.root_read_only:
        tokens.append("vmette.rootfs_ro")
    tokens += [f"vmette.share={kind}:{s.tag}:{'ro' if s.read_only else 'rw'}" for s, kind in shares]
    if config.cmdline:
        tokens.append(config.cmdline)
    line = " ".join(tokens)
    size = len(os.fsencode(line))
    if size > CMDLINE_BYTES:
        raise ConfigError(f"the kernel command line is {size} bytes long; at most {CMDLINE_BYTES} fit")
    return line


def _x86_clocks() -> list[str]:
    """What makes an emulated x86 boot reliable.

    `microvm` has no HPET, and the kernel measures its time-stamp counter against the PIT. On a busy host that fails
    (the two are not read at one time), and the kernel then waits for PIT interrupts to calibrate its APIC timer with,
    which never come: half of the boots hang. Told the frequency, it measures nothing. Nor is the PIT's interrupt
    tested then, nor the counter watched against a clock that is not there.
    """
    from .._native import lib

    khz = lib.vmette_tsc_khz()
    return ["no_timer_check", "tsc=reliable", *([f"tsc_early_khz={khz}"] if khz else [])]

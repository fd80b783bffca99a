"""The guest kernel's command line. `csrc/guest/init.c` reads the `vmette.` tokens."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import CMDLINE_BYTES, ROOT_TAG, MachineConfig, Share
from ..errors import ConfigError
from ..providers.base import BlockImage

COMMON = ("console=hvc0", "quiet", "panic=-1")

# `microvm` has no HPET, so under emulation on a busy host the kernel's calibration of its clocks against the PIT can
# wait for ever; these take the calibration away. The microvm has no PCI bus to look for.
X86_TCG = ("no_timer_check", "lpj=10000000", "tsc=reliable")
X86 = ("pci=off",)


def kernel_cmdline(config: MachineConfig, accel: str, root_type: str, shares: Sequence[tuple[Share, str]]) -> str:
    """The whole line. Types of the directory root and of each share are `virtiofs` or `9p`.

    Raises:
        ConfigError: it is longer than the kernel takes.
    """
    tokens = [*COMMON]
    if config.arch == "x86_64":
        tokens += [*X86, *(X86_TCG if accel == "tcg" else ())]
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
    if len(line.encode()) > CMDLINE_BYTES:
        raise ConfigError(f"the kernel command line is {len(line.encode())} bytes long; at most {CMDLINE_BYTES} fit")
    return line

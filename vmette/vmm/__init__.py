"""The virtual machine monitors: QEMU on Linux, Apple's Virtualization.framework on macOS."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..config import MachineConfig
    from .base import VirtualMachine


def name() -> str:
    """`qemu` or `vz`: what runs machines on this host; $VMETTE_VMM says otherwise, for tests.

    Raises:
        ConfigError: the variable says neither.
    """
    chosen = os.environ.get("VMETTE_VMM") or ("vz" if sys.platform == "darwin" else "qemu")
    if chosen not in {"qemu", "vz"}:
        raise ConfigError(f"VMETTE_VMM is {chosen!r}; it can be qemu or vz")
    return chosen


def start(config: MachineConfig, prepared: Callable[[], None]) -> VirtualMachine:
    """Starts a machine. `prepared` is called once all questions about this host are answered.

    Raises:
        VmmError: it does not start.
        ConfigError: it cannot be as `config` wants it here.
    """
    if name() == "vz":
        from .vz import VzMachine, program

        helper = program()
        prepared()
        return VzMachine(config, helper)
    from .qemu import QemuMachine, choose_accel

    accel = choose_accel(config)
    prepared()
    return QemuMachine(config, accel)

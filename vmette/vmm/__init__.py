"""The virtual machine monitors: QEMU on Linux, Apple's Virtualization.framework on macOS."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
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


def settled(config: MachineConfig) -> MachineConfig:
    """`config`, with all that this host has a choice of chosen.

    Raises:
        VmmError: it cannot be had.
    """
    if name() == "vz":
        return config
    from .qemu import choose_accel

    return replace(config, accel=choose_accel(config))


def identity(config: MachineConfig) -> dict[str, str]:
    """What a machine that was saved can wake with alone, of this host: names, for people, and what changes with them.

    Raises:
        VmmError, PayloadError: there is nothing here that runs machines.
    """
    from . import probe

    system, _, *rest = os.uname()  # but for its name
    host = " ".join([system, *rest, processor()])
    if name() == "vz":
        from .vz import program

        return {"vmette-vz": probe.identity(program().path), "macOS": host}
    from .qemu import binary, cpu

    accelerator = f"{config.accel} {cpu(config.arch, config.accel)}"
    found = {"QEMU": probe.identity(binary(config.arch)), "the accelerator": accelerator, "this host": host}
    if config.network:  # the guest knows whom to ask for names
        from .passt import find

        found["the network"] = "QEMU" if find() is None else "passt"
    return found


def processor() -> str:
    """The model of this host's first processor: a guest knows how fast its clock ticks, emulated or not."""
    try:
        with Path("/proc/cpuinfo").open("rb", buffering=0) as file:
            start = file.read(2048).decode("ascii", "replace")
    except OSError:  # not on macOS
        return ""
    return next((line.partition(":")[2].strip() for line in start.splitlines() if line.startswith("model name")), "")

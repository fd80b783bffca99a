"""What the virtual machine monitors have in common, whatever runs the machine: the seam between them and the rest."""

from __future__ import annotations

import os
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from ..config import MachineConfig, Saved
from ..errors import VmmError
from .spawn import Child

if TYPE_CHECKING:
    from ..protocol import Resume


class VsockListener(Protocol):
    """A vsock port of the host at which one machine's connections arrive."""

    def fileno(self) -> int:
        """A descriptor that is readable when :meth:`accept` has something to look at."""
        ...

    def accept(self) -> socket.socket | None:
        """A connection, which is the caller's to close; None if there was none of this machine. Never waits."""
        ...

    def close(self) -> None:
        """Listens no more."""
        ...


class VsockDevice(Protocol):
    """A machine's vsock device, seen from the host."""

    def connect(self, port: int, timeout: float) -> socket.socket:
        """A stream socket to a port of the guest.

        Raises:
            OSError: nothing listens there, or nothing has answered within `timeout` seconds.
        """
        ...

    def listen(self, port: int) -> VsockListener:
        """Listens for the guest at a port of the host.

        Raises:
            OSError: it is in use.
        """
        ...


class VirtualMachine(ABC):
    """A running VM: its control port, its console, the complaints of what runs it, and an end."""

    vmm: str
    """The name of what runs it, for people."""
    config: MachineConfig
    child: Child
    """The process of the VM."""
    control: socket.socket
    console: socket.socket
    errors: int
    """A descriptor to read what the VMM says on stderr; -1 once it is closed."""
    resume: Resume | None = None
    """What the guest is to be told if it does not boot, but wakes."""
    greeted = False
    """It has been told already, in HELLO."""
    vsock: VsockDevice | None = None
    """None where there is no such device: then the guest's agent stands in."""

    def __enter__(self) -> VirtualMachine:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Ends the VM, now, and lets go of all that belongs to it."""

    def _close_ends(self) -> None:
        """Closes this side of its ports and pipes."""
        self.control.close()
        self.console.close()
        if self.errors >= 0:
            os.close(self.errors)
            self.errors = -1

    @property
    def ends(self) -> list[int]:
        """Descriptors that become readable when a program ends that the VM cannot do without."""
        return []

    @abstractmethod
    def save(self, to: Saved) -> None:
        """Saves the machine, whose guest has paused. It stands still from then on.

        Raises:
            VmmError: it cannot be saved.
            OSError: the files of `to` cannot be written.
        """

    @abstractmethod
    def go_on(self) -> None:
        """Has a machine that was saved, or was to be, go on.

        Raises:
            VmmError: it does not.
        """

    def failure(self, said: Sequence[str]) -> VmmError | None:
        """Why the VMM has failed, given the last lines that it `said`; None if the guest ended by itself.

        For when its process has ended.
        """
        status = os.waitstatus_to_exitcode(self.child.status or 0)
        if status == 0:
            return None
        how = f"was killed by signal {-status}" if status < 0 else f"failed with status {status}"
        text = self.complaint(said)
        return VmmError(f"{self.vmm} {how}: {text}" if text else f"{self.vmm} {how}")

    def complaint(self, said: Sequence[str]) -> str:
        """The part of what the VMM said that is about its end."""
        return " ".join(said[-1:])

"""The exceptions that vmette raises.

All derive from :class:`VmetteError`, whose text is one line for a person: what was wrong with what, and what to do.
The command line prints that line and exits with :attr:`VmetteError.exit_code`.
"""

from __future__ import annotations

__all__ = [
    "CommandNotStarted",
    "ConfigError",
    "GuestError",
    "PayloadError",
    "ProtocolError",
    "VmetteError",
    "VmmError",
]


class VmetteError(Exception):
    """Base of every error that vmette raises on purpose."""

    exit_code = 125


class ConfigError(VmetteError):
    """A value that the caller gave cannot be used."""


class PayloadError(VmetteError):
    """The guest kernel, the initramfs or the built-in root filesystem is missing or unusable."""


class VmmError(VmetteError):
    """The virtual machine monitor is missing, failed to start, or ended before the guest did."""


class GuestError(VmetteError):
    """The guest could not set itself up: a root filesystem or share that does not mount, a kernel that stops."""


class ProtocolError(VmetteError):
    """The guest broke the control protocol; the VM has been ended."""


class CommandNotStarted(VmetteError):
    """The command could not be started in the guest.

    ``exit_code`` is what a shell would give: 127 if there is no such program, 126 if it cannot be executed.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code

"""The exceptions that vmette raises.

All derive from :class:`VmetteError`, whose text is one line for a person: what was wrong with what, and what to do.
The command line prints that line and exits with :attr:`VmetteError.exit_code`.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "CalledProcessError",
    "CommandNotStarted",
    "ConfigError",
    "GuestError",
    "GuestFileError",
    "OutputTooLarge",
    "PayloadError",
    "ProtocolError",
    "SandboxClosed",
    "TimeoutExpired",
    "VmetteError",
    "VmmError",
]


def reason(error: OSError | ValueError) -> str:
    """Why a path cannot be used, without the path. A NUL in it is a ValueError, in words that differ by version."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return "embedded null byte" if "null" in str(error) else str(error)


class VmetteError(Exception):
    """Base of every error that vmette raises on purpose. All can be pickled, and so come back from other processes."""

    exit_code = 125

    def __reduce__(self) -> tuple[object, ...]:
        # Exception's own calls the class with the text, which is not what every class is made from.
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[VmetteError], args: tuple[object, ...], state: dict[str, object]) -> VmetteError:
    """An error as it was when it was pickled."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class SandboxTimeout(Exception):
    """The deadline passed. Only within vmette: callers get TimeoutExpired, with what the command had written."""


class ConfigError(VmetteError):
    """A value that the caller gave cannot be used."""

    exit_code = 2


class PayloadError(VmetteError):
    """The guest kernel, the initramfs or the built-in root filesystem is missing or unusable."""


class VmmError(VmetteError):
    """The virtual machine monitor is missing, failed to start, or ended before the guest did."""


class GuestError(VmetteError):
    """The guest could not set itself up, or stopped: a root that does not mount, a kernel that panics.

    ``console`` holds the last lines of the guest's console.
    """

    def __init__(self, message: str, console: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.console = console


class GuestFileError(VmetteError, OSError):
    """A file of the guest's cannot be used. `errno` is Linux's number, `filename` the guest's path.

    As :class:`OSError` does, it becomes what Python has for the number: also a :class:`FileNotFoundError`,
    :class:`FileExistsError`, :class:`PermissionError`, :class:`IsADirectoryError` or :class:`NotADirectoryError`.
    """

    def __new__(cls, number: int, text: str, filename: str) -> GuestFileError:  # noqa: D102 (as OSError's)
        return super().__new__(_FILE_ERRORS.get(number, cls), number, text, filename)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.errno, self.strerror, self.filename), self.__dict__

    def __str__(self) -> str:
        return f"{self.filename} in the guest: {self.strerror}"


class _GuestFileNotFoundError(GuestFileError, FileNotFoundError):
    pass


class _GuestFileExistsError(GuestFileError, FileExistsError):
    pass


class _GuestPermissionError(GuestFileError, PermissionError):
    pass


class _GuestIsADirectoryError(GuestFileError, IsADirectoryError):
    pass


class _GuestNotADirectoryError(GuestFileError, NotADirectoryError):
    pass


_FILE_ERRORS: dict[int, type[GuestFileError]] = {
    1: _GuestPermissionError,  # EPERM
    2: _GuestFileNotFoundError,  # ENOENT
    13: _GuestPermissionError,  # EACCES
    17: _GuestFileExistsError,  # EEXIST
    20: _GuestNotADirectoryError,  # ENOTDIR
    21: _GuestIsADirectoryError,  # EISDIR
}


class OutputTooLarge(VmetteError):
    """The command wrote more than the caller is willing to hold; it has been ended."""


class ProtocolError(VmetteError):
    """The guest broke the control protocol, and its VM has been ended; or what it says of its files makes no sense."""


class SandboxClosed(VmetteError):
    """The sandbox has ended: it was closed, was idle for too long, or has lived as long as it was meant to."""


class CommandNotStarted(VmetteError):
    """The command could not be started in the guest.

    ``exit_code`` is what a shell would give: 127 if there is no such program, 126 if it cannot be executed.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class CalledProcessError(VmetteError):
    """The command ended with a status other than 0 and `check` was asked for. Attributes as in :mod:`subprocess`."""

    def __init__(
        self, returncode: int, cmd: Sequence[str], output: bytes | str | None, stderr: bytes | str | None
    ) -> None:
        how = f"died of signal {-returncode}" if returncode < 0 else f"returned exit status {returncode}"
        super().__init__(f"command {list(cmd)} {how}")
        self.returncode = returncode
        self.cmd = cmd
        self.output = self.stdout = output
        self.stderr = stderr


class TimeoutExpired(VmetteError):
    """The time-out passed before the command ended. `stdout` and `stderr` are what had come by then."""

    exit_code = 124

    def __init__(
        self, cmd: Sequence[str], timeout: float, output: bytes | str | None, stderr: bytes | str | None
    ) -> None:
        super().__init__(f"command {list(cmd)} timed out after {timeout:g} seconds")
        self.cmd = cmd
        self.timeout = timeout
        self.output = self.stdout = output
        self.stderr = stderr

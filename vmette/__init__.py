r"""Run untrusted code in a hardware-isolated Linux microVM.

>>> import vmette
>>> vmette.run("builtin://base", ["uname", "-s"], text=True).stdout
'Linux\n'
"""

from __future__ import annotations

from ._version import __version__

TYPE_CHECKING = False  # `typing` takes a millisecond or three
if TYPE_CHECKING:
    from .aio import AsyncPopen, AsyncSandbox
    from .api import run
    from .config import Disk, Share
    from .errors import (
        CalledProcessError,
        CommandNotStarted,
        ConfigError,
        GuestError,
        GuestFileError,
        OutputTooLarge,
        PayloadError,
        ProtocolError,
        SandboxClosed,
        TimeoutExpired,
        VmetteError,
        VmmError,
    )
    from .executor import SandboxExecutor
    from .pool import Pool
    from .process import CompletedProcess, Popen
    from .sandbox import Sandbox
    from .timings import Timing

_HOMES = {
    "AsyncPopen": "aio",
    "AsyncSandbox": "aio",
    "CompletedProcess": "process",
    "Disk": "config",
    "Pool": "pool",
    "Popen": "process",
    "Sandbox": "sandbox",
    "SandboxExecutor": "executor",
    "Share": "config",
    "Timing": "timings",
    "run": "api",
}

__all__ = [
    "AsyncPopen",
    "AsyncSandbox",
    "CalledProcessError",
    "CommandNotStarted",
    "CompletedProcess",
    "ConfigError",
    "Disk",
    "GuestError",
    "GuestFileError",
    "OutputTooLarge",
    "PayloadError",
    "Pool",
    "Popen",
    "ProtocolError",
    "Sandbox",
    "SandboxClosed",
    "SandboxExecutor",
    "Share",
    "TimeoutExpired",
    "Timing",
    "VmetteError",
    "VmmError",
    "__version__",
    "run",
]


def __getattr__(name: str) -> object:
    # Names are fetched when they are first used (PEP 562): `import vmette` does no work.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

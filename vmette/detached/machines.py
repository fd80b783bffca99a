"""The detached machines of this user: a directory for each, of its name, below one that only the user can enter.

    lock        held exclusively by the supervisor as long as it lives: what tells a running machine from a stale entry
    state.json  what is known of the machine (:class:`State`), replaced as a whole
    socket      where the supervisor serves clients; one that comes while the machine boots waits
    log.N       what its command has written (:mod:`.log`)

Entries are made, judged and removed under one lock for all (`.lock`), so nobody ever sees half of one.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from .. import assets
from ..errors import ConfigError, SandboxClosed, VmetteError, reason
from ..files import write_atomically

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
LOCK, STATE, SOCKET = "lock", "state.json", "socket"


def check_name(name: str) -> str:
    """`name`, if a machine can have it.

    Raises:
        ConfigError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"machine name {name!r} is malformed: up to 63 of a-z, 0-9, '_', '.' and '-', with a letter or digit first"
        )
    return name


@dataclass(frozen=True)
class State:
    """What is known of a machine. Times are in seconds since 1970."""

    name: str
    rootfs: str
    created: float
    remove: bool = False
    """Whether its entry goes when it ends."""
    command: tuple[str, ...] = ()
    """Empty: it idles until it is stopped."""
    pid: int | None = None
    """The supervisor's. For people only: such a number may have become another process's."""
    started: float | None = None
    """When its command was started."""
    ended: float | None = None
    exit_code: int | None = None
    """What `vmette run` would have exited with."""
    error: str | None = None
    """Why it ended, if not by itself."""

    @property
    def status(self) -> str:
        """`starting`, `running` or `ended`."""
        return "ended" if self.ended is not None else "running" if self.started is not None else "starting"

    def encoded(self) -> bytes:
        """As it is in its file."""
        return json.dumps(asdict(self)).encode()

    @classmethod
    def decoded(cls, data: bytes) -> State:
        """Reads what :meth:`encoded` wrote; what a later vmette has added is ignored.

        Raises:
            ValueError: it is something else.
        """
        values = json.loads(data)
        try:
            known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
            return cls(**{**known, "command": tuple(known["command"])})
        except (TypeError, KeyError) as error:
            raise ValueError(f"no state of a machine: {error}") from error


class Entry:
    """A machine's directory, open: it stays what it is when another machine gets the name. A context manager."""

    def __init__(self, name: str, fd: int) -> None:
        self.name = name
        self.fd = fd

    def __enter__(self) -> Entry:
        return self

    def __exit__(self, *args: object) -> None:
        os.close(self.fd)

    def read_state(self) -> State | None:
        """What is known now; None if it cannot be read."""
        try:
            with os.fdopen(os.open(STATE, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd), "rb") as file:
                return State.decoded(file.read())
        except (FileNotFoundError, ValueError):
            return None

    @property
    def has_ended(self) -> bool:
        """Whether it has said so."""
        state = self.read_state()
        return state is not None and state.ended is not None

    def _locked(self, how: int) -> bool:
        """Whether the supervisor's lock could be shared, as only the dead share it; with a wait, once it can."""
        try:
            lock = os.open(LOCK, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self.fd)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | how)
        except BlockingIOError:
            return False
        finally:
            os.close(lock)
        return True

    @property
    def has_lock(self) -> bool:
        """Whether it has been made as far as its lock, and is vmette's therefore."""
        try:
            return stat.S_ISREG(os.stat(LOCK, dir_fd=self.fd, follow_symlinks=False).st_mode)
        except FileNotFoundError:
            return False

    @property
    def alive(self) -> bool:
        """Whether the supervisor lives."""
        return not self._locked(fcntl.LOCK_NB)

    def wait(self) -> None:
        """Returns when the supervisor has ended, and the VM with it."""
        self._locked(0)

    def connect(self) -> socket.socket:
        """A connection to the supervisor.

        Raises:
            SandboxClosed: the machine has ended.
            VmetteError: it is not up yet.
        """
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(socket_path(self.fd))
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            state = self.read_state()
            if self.alive and state is not None and state.status == "starting":
                raise VmetteError(f"machine {self.name!r} is not up yet: try again soon") from None
            raise SandboxClosed(f"machine {self.name!r} has ended") from None
        except BaseException:
            connection.close()
            raise
        return connection


def socket_path(directory: int) -> str:
    """The socket in the open `directory`, by a path that is short: 108 bytes are all that an address has (unix(7)).

    Raises:
        VmetteError: on macOS, where there is none that is shorter than the real one and an address has 104.
    """
    if sys.platform == "darwin":
        # fcntl(2): F_GETPATH wants MAXPATHLEN bytes
        real = fcntl.fcntl(directory, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0")
        path = os.fsdecode(os.path.join(real, SOCKET.encode()))  # noqa: PTH118
        if len(os.fsencode(path)) > 103:
            raise VmetteError(f"{path} is too long for a socket: set VMETTE_STATE_DIR to a shorter one")
        return path
    return f"/proc/self/fd/{directory}/{SOCKET}"


class Machines:
    """All entries below `root`, while nobody else makes or removes any: see :func:`machines`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def states(self) -> list[State]:
        """What is known of each machine, the oldest first."""
        found = []
        for path in self.root.iterdir():
            if _NAME.fullmatch(path.name) and (entry := self._opened(path.name)) is not None:
                with entry:
                    if (state := entry.read_state()) is not None:
                        found.append(state)
        return sorted(found, key=lambda state: state.created)

    def open(self, name: str) -> Entry:
        """The machine `name`.

        Raises:
            ConfigError: there is none.
        """
        entry = self._opened(check_name(name))
        if entry is None:
            raise ConfigError(f"there is no machine {name!r}: `vmette ps -a` lists them")
        return entry

    def _opened(self, name: str) -> Entry | None:
        """The machine `name`, or None. One whose supervisor was killed is gone, and now its entry goes too."""
        path = self.root / name
        try:
            entry = Entry(name, os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            if entry.alive or entry.has_ended:  # in this order: one that ends now has said so before
                return entry
        except BaseException:
            os.close(entry.fd)
            raise
        with entry:
            if entry.has_lock:
                self.remove(entry)
            else:  # :meth:`create` has not come far; or it is nothing of ours, which is not empty
                with suppress(OSError):
                    path.rmdir()
        return None

    def create(self, state: State) -> int:
        """Makes an entry; returns its lock, held. The machine is alive as long as that descriptor or a copy is open.

        Raises:
            ConfigError: the name is in use.
        """
        if (entry := self._opened(check_name(state.name))) is not None:
            with entry:
                raise ConfigError(
                    f"there is a machine {state.name!r} already: choose another name, or `vmette rm {state.name}`"
                )
        path = self.root / state.name
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:
            raise ConfigError(f"{path} is something else than a machine: choose another name") from None
        try:
            lock = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                write_atomically(path / STATE, state.encoded())
            except BaseException:
                os.close(lock)
                raise
        except BaseException:
            shutil.rmtree(path)
            raise
        return lock

    def remove(self, entry: Entry) -> None:
        """Removes an entry whose machine has ended. Does nothing if somebody else has."""
        path = self.root / entry.name
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(entry.fd), path.lstat()):
                shutil.rmtree(path)

    def release(self, name: str, lock: int) -> None:
        """Removes the entry that :meth:`create` has made with `lock`. Does nothing if somebody else has."""
        path = self.root / name
        with suppress(FileNotFoundError, NotADirectoryError):
            if os.path.samestat(os.fstat(lock), (path / LOCK).lstat()):
                shutil.rmtree(path)


def machines_root() -> Path:
    """Where the entries are: `machines` in the user's directory for state. Made if need be.

    It is not $XDG_RUNTIME_DIR, which goes when the user logs out, and a machine does not; and which is in memory, where
    logs do not belong.

    Raises:
        ConfigError: it cannot be used, or others can enter it.
    """
    root = (assets.state_root() / "machines").absolute()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = root.lstat()
    except OSError as error:
        raise ConfigError(f"cannot keep machines in {root}: {reason(error)}; set VMETTE_STATE_DIR") from error
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"{root} is a symlink, which somebody else may have made: set VMETTE_STATE_DIR")
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(f"{root} is open to others: chmod 700 it, or set VMETTE_STATE_DIR")
    return root


@contextmanager
def machines(root: Path | None = None) -> Iterator[Machines]:
    """All detached machines, held still for a moment.

    Raises:
        ConfigError: see :func:`machines_root`.
    """
    root = root or machines_root()
    lock = os.open(root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield Machines(root)
    finally:
        os.close(lock)


def open_machine(name: str) -> Entry:
    """The machine `name`.

    Raises:
        ConfigError: there is none.
    """
    with machines() as all_machines:
        return all_machines.open(name)


def new_state(name: str | None, rootfs: str, *, remove: bool) -> State:
    """The state of a machine that is to be; without a name it gets one that nobody has."""
    return State(os.urandom(6).hex() if name is None else check_name(name), rootfs, time.time(), remove)

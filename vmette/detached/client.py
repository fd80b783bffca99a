"""What starts a detached machine, and what talks to one."""

from __future__ import annotations

import math
import os
import pickle
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from ..config import Command
from ..errors import ConfigError, SandboxClosed, SandboxTimeout, VmetteError, VmmError
from ..machine import Machine
from ..polling import HEED_SECONDS
from . import wire
from .machines import Entry, State, machines

_INHERITED = re.compile(
    "PATH|HOME|TMPDIR|TEMP|TMP|TZ|LANG|LANGUAGE|LC_[A-Z]+|LD_LIBRARY_PATH|PYTHON[A-Z0-9]+"
    "|XDG_(CACHE|CONFIG|STATE)_HOME|XDG_RUNTIME_DIR|VMETTE_(ASSETS|CACHE|STATE)_DIR|VMETTE_(VMM|VZ|VSOCK|TEMPLATES|CACHE_MAX_BYTES)"
)
"""What a supervisor has of its client's environment, and shows in /proc as long as it lives: only what itself, Python
and QEMU read. In the rest may be secrets, such as those of the guest or a registry's tokens."""


def inherited() -> dict[str, str]:
    """The environment of a process that is to outlive this one."""
    return {name: value for name, value in os.environ.items() if _INHERITED.fullmatch(name)}


def check_timeout(timeout: float | None) -> None:
    """Checks a number of seconds that somebody gave.

    Raises:
        ConfigError: so long cannot be waited.
    """
    if timeout is not None and not (math.isfinite(timeout) and timeout >= 0):
        raise ConfigError(f"a time-out of {timeout} seconds cannot be kept")


class Reservation:
    """A machine's name and entry, before there is a machine: see :func:`reserved`."""

    def __init__(self, directory: Path, lock: int, state: State) -> None:
        self.directory = directory
        self.state = state
        self.started = False
        self._lock = lock

    def start(
        self,
        machine: Machine,
        command: Command,
        *,
        idle: bool = False,
        timeout: float | None = None,
        max_output: int | None = None,
        debug: bool = False,
    ) -> None:
        """Has a supervisor boot `machine` and run `command` in it; returns when it has started.

        Args:
            machine: The machine.
            command: Its main command: the machine ends when this does.
            idle: Do not run that: the machine idles until it is stopped. Other commands have its environment and all.
            timeout: Seconds until the command is ended.
            max_output: The most bytes of each of stdout and stderr that it may write.
            debug: The log has the guest's console and what vmette does.

        Raises:
            CommandNotStarted, VmmError, GuestError, …: as :func:`vmette.run`.
        """
        from .supervisor import Task

        check_timeout(timeout)
        ours, theirs = socket.socketpair()
        # Not the current directory, of which `-m` would import what happens to lie there.
        here = os.open(".", getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            supervisor = subprocess.Popen(
                [sys.executable, "-m", "vmette.detached", self.state.name],
                cwd="/",
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env=inherited(),
                pass_fds=(self._lock, here),
            )
        finally:
            os.close(here)
            theirs.close()
        argv = () if idle else tuple(map(os.fsdecode, command.argv))
        task = Task(
            directory=self.directory,
            lock=self._lock,
            cwd=here,
            state=replace(self.state, command=argv),
            machine=replace(machine, cancelled=None),
            command=command,
            idle=idle,
            timeout=timeout,
            max_output=max_output,
            debug=debug,
        )
        try:
            with ours:
                _hand_over(ours, task)
        except BaseException:
            supervisor.terminate()
            supervisor.wait()
            raise
        supervisor.returncode = 0  # it is on its own now
        self.started = True


def _hand_over(connection: socket.socket, task: object) -> None:
    answer = b""
    with suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(pickle.dumps(task))
        with connection.makefile("rb") as file:
            answer = file.read()
    error = pickle.loads(answer) if answer else VmmError("the machine's supervisor has ended")  # noqa: S301
    if error is not None:
        raise error


@contextmanager
def reserved(state: State) -> Iterator[Reservation]:
    """Takes the name of `state`, and gives it back at the end unless a machine was started.

    Raises:
        ConfigError: the name is in use.
    """
    with machines() as all_machines:
        lock = all_machines.create(state)
        reservation = Reservation(all_machines.root / state.name, lock, state)
    try:
        yield reservation
    finally:
        if not reservation.started:
            with machines(reservation.directory.parent) as all_machines:
                all_machines.release(state.name, lock)  # unless a machine that was up for a moment has
        os.close(lock)


def ask(entry: Entry, message: wire.Message) -> None:
    """Has the supervisor do something: see :mod:`.wire`.

    Raises:
        SandboxClosed: the machine has ended.
        VmetteError: it cannot be done.
    """
    with entry.connect() as connection:
        with suppress(ConnectionError):  # it has ended, or says why it does not listen
            wire.send(connection, message)
        _answer(entry, connection, None)


def _answer(entry: Entry, connection: socket.socket, deadline: float | None) -> wire.Message:
    line = b""
    while not line.endswith(b"\n"):
        left = HEED_SECONDS if deadline is None else deadline - time.monotonic()
        connection.settimeout(min(HEED_SECONDS, max(0.001, left)))
        try:
            data = connection.recv(65536)
        except TimeoutError:
            if deadline is None or time.monotonic() < deadline:
                continue
            raise SandboxTimeout from None
        except ConnectionResetError:
            data = b""
        if not data:
            raise SandboxClosed(f"machine {entry.name!r} has ended")
        line += data
    answer = wire.decode(line)
    if (text := wire.text(answer, "error")) is not None:
        error = VmetteError(text)
        error.exit_code = int(wire.number(answer, "exit_code", 255))
        raise error
    return answer


class Exec:
    """A command in a detached machine, and our ends of its pipes. A context manager; at its end the command is killed.

    Between the terminal, pipes and files of this process and the supervisor are pipes of their own: so nobody but this
    process waits for what is slow, and when this one is stopped nothing reads its terminal any more.

    Args:
        entry: The machine.
        argv: The program and its arguments.
        env: Added to what the machine's main command has.
        cwd: In place of the main command's.
        user: In place of the main command's.
        terminal: Rows and columns of the terminal that it is to have; all its output is stdout then.
        builtin: `argv` names a function of the guest's agent (csrc/guest/builtins.h).

    Raises:
        ConfigError: it is too long.
        SandboxClosed: the machine has ended.
    """

    def __init__(
        self,
        entry: Entry,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        terminal: tuple[int, int] | None = None,
        builtin: bool = False,
    ) -> None:
        message: wire.Message = {
            "do": "exec",
            "argv": [*argv],
            "env": {**(env or {})},
            "cwd": cwd,
            "user": user,
            "terminal": terminal,
            "builtin": builtin,
        }
        self._entry = entry
        self._connection = entry.connect()
        their_stdin, stdin = os.pipe()
        stdout, their_stdout = os.pipe()
        stderr, their_stderr = os.pipe()
        theirs = (their_stdin, their_stdout, their_stderr)
        self.stdin = os.fdopen(stdin, "wb", 0)
        self.stdout, self.stderr = os.fdopen(stdout, "rb", 0), os.fdopen(stderr, "rb", 0)
        try:
            with suppress(ConnectionError):  # as above: :meth:`wait` will tell
                wire.send(self._connection, message, theirs)
        except BaseException:
            for file in (self._connection, self.stdin, self.stdout, self.stderr):
                file.close()
            raise
        finally:
            for fd in theirs:
                os.close(fd)

    def __enter__(self) -> Exec:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills the command if it runs."""
        self._connection.close()

    def resize(self, rows: int, columns: int) -> None:
        """Tells its terminal its size."""
        with suppress(OSError):  # it has ended
            wire.send(self._connection, {"resize": [rows, columns]})

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, as a shell has it.

        Raises:
            SandboxTimeout: it has not ended after `timeout` seconds.
            SandboxClosed: the machine has ended.
            VmetteError: it could not be started. The error's exit code is that of :class:`CommandNotStarted`.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        return int(wire.number(_answer(self._entry, self._connection, deadline), "exit_code", 255))

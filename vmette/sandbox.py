"""A microVM that lives as long as a program needs it, with many commands in it."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from subprocess import DEVNULL, PIPE
from typing import TYPE_CHECKING, Literal, TypeVar, overload

from .config import Share
from .errors import ConfigError, GuestError, SandboxClosed, VmetteError, VmmError
from .guest import clock_command
from .linux import strerror
from .machine import SNAPSHOT, Machine, MachineOptions, booted, prepare
from .process import MAX_OUTPUT, Captured, CompletedProcess, Popen, Redirection, encoded, run
from .protocol import decode_error
from .snapshots import is_savable
from .timings import Stopwatch, Timing

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .filesystem import Files
    from .guest import Guest
    from .sharing import SharedDirectory
    from .snapshots import Snapshot
    from .vsock import Vsock

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Session:
    """A guest and the thread that turns its loop, for all the threads that use it.

    Whatever it is asked for after its end is refused with the reason of the end.
    """

    def __init__(self, machine: Machine, *, max_lifetime: float | None, idle_timeout: float | None) -> None:
        self.stopwatch = Stopwatch()
        self._idle_timeout = idle_timeout
        self._busy_until = time.monotonic()
        self._pid = os.getpid()
        self._lock = threading.Lock()
        """Held to add to what the thread is to do, and to end that."""
        self._saves = threading.Lock()
        self.ended: VmetteError | OSError | None = None
        self._closing = False
        with ExitStack() as stack:
            self.guest: Guest = stack.enter_context(booted(machine, self.stopwatch, lasting=True))
            self.guest.accept_calls()
            self._dies_at = None if max_lifetime is None else time.monotonic() + max_lifetime
            self._max_lifetime = max_lifetime
            self._busy_until = time.monotonic()
            self._thread = threading.Thread(target=self._serve, name="vmette-sandbox", daemon=True)
            self._rest = stack.pop_all()
        try:
            self._thread.start()
        except BaseException:
            self._rest.close()
            raise

    def call(self, function: Callable[[Guest], T], undo: Callable[[Guest, T], None] | None = None) -> T:
        """What `function` returns when the thread calls it with the guest.

        An exception that comes while this waits (of a signal handler) is raised once the thread is through with it,
        which takes one turn, and `undo` has been asked to undo what it did.

        Raises:
            VmetteError: the session has ended.
        """
        done = threading.Event()
        results: list[T] = []
        errors: list[BaseException] = []

        def task() -> None:
            try:
                results.append(function(self.guest))
            except BaseException as error:  # the thread has to go on, and the caller to hear of it
                errors.append(error)
            done.set()

        self.post(task, done.set)
        interrupted: BaseException | None = None
        while not done.is_set():
            try:
                done.wait()
            except BaseException as error:
                interrupted = error
        if interrupted is not None:
            if results and undo is not None:
                self.post_if_open(lambda: undo(self.guest, results[0]))
            raise interrupted
        if errors:
            raise errors[0]
        if not results:
            raise self._reason()
        return results[0]

    def save(self, function: Callable[[Guest], T]) -> T:
        """As :meth:`call`, of what saves the machine: one after the other."""
        with self._saves:
            return self.call(function)

    def post(self, task: Callable[[], None], too_late: Callable[[], None] = lambda: None) -> None:
        """Has the thread call `task`, or else, at its end, `too_late`.

        Raises:
            VmetteError: the session has ended.
        """
        if os.getpid() != self._pid:  # a fork takes no threads along
            raise SandboxClosed("the sandbox belongs to another process, from which this one was forked")
        with self._lock:
            if self.ended is not None or self._closing:
                raise self._reason()
            self.guest.call(task, too_late)

    def post_if_open(self, task: Callable[[], None]) -> None:
        """Has the thread call `task`; does nothing if the session has ended, and all that it held with it."""
        with suppress(VmetteError):
            self.post(task)

    def close(self) -> None:
        """Ends the VM, and waits for that."""
        if os.getpid() != self._pid:  # a fork takes no threads along, and the VM is not its own
            return
        with self._lock:
            closing, self._closing = self._closing, True
            if self.ended is None and not closing:
                self.guest.call(lambda: None)  # which ends its wait
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _reason(self) -> VmetteError | OSError:
        return self.ended or SandboxClosed("the sandbox has been closed")

    # --- the thread

    def _serve(self) -> None:
        error: VmetteError | OSError
        try:
            error = self._turn_until_closed()
        except (VmetteError, OSError) as failure:
            error = failure
        except BaseException as failure:
            logger.exception("the thread of a sandbox has failed")
            error = VmmError(f"vmette has failed: {failure!r}")
        with self._lock:
            self.ended = error
        try:
            self.guest.end_all(error)
        finally:
            self._rest.close()

    def _turn_until_closed(self) -> SandboxClosed:
        while not self._closing:
            busy = self.guest.busy
            self.guest.turn(self._next_end())
            now = time.monotonic()
            if busy or self.guest.busy:
                self._busy_until = now
            if self._dies_at is not None and now >= self._dies_at:
                return SandboxClosed(f"the sandbox has ended: its lifetime of {self._max_lifetime:g} seconds is over")
            if self._idle_timeout is not None and now >= self._busy_until + self._idle_timeout:
                return SandboxClosed(f"the sandbox has ended: it was idle for {self._idle_timeout:g} seconds")
        self.guest.finish()
        return SandboxClosed("the sandbox has been closed")

    def _next_end(self) -> float | None:
        ends = [] if self._dies_at is None else [self._dies_at]
        if self._idle_timeout is not None and not self.guest.busy:
            ends.append(self._busy_until + self._idle_timeout)
        return min(ends, default=None)


class Sandbox:
    r"""A microVM that has booted, and runs commands until it is closed: best used in a `with` statement.

    >>> with vmette.Sandbox("builtin://base") as sandbox:
    ...     sandbox.run(["uname", "-s"], text=True).stdout
    'Linux\n'

    All methods may be called from any thread. The VM ends when the sandbox is closed or collected as garbage, when the
    interpreter ends, and when this process is killed, however that happens.

    Args:
        rootfs: A spec that a provider claims: a directory, `builtin://base`, `alpine:3.20`, ….
        max_lifetime: Seconds after which the VM ends, whatever it does.
        idle_timeout: Seconds without any command or open connection after which the VM ends.
        options: The machine's: see :class:`vmette.machine.MachineOptions`.

    Raises:
        ConfigError, ProviderError, PayloadError, VmmError, GuestError, ProtocolError: the VM does not come up.
    """

    def __init__(
        self,
        rootfs: str | os.PathLike[str],
        *,
        max_lifetime: float | None = None,
        idle_timeout: float | None = None,
        **options: Unpack[MachineOptions],
    ) -> None:
        for name, seconds in {"max_lifetime": max_lifetime, "idle_timeout": idle_timeout}.items():
            if seconds is not None and not (math.isfinite(seconds) and seconds >= 0):
                raise ConfigError(f"{name} of {seconds} seconds cannot be kept")
        self._start(os.fspath(rootfs), prepare(rootfs, options), max_lifetime, idle_timeout)

    def _start(self, rootfs: str, machine: Machine, max_lifetime: float | None, idle_timeout: float | None) -> None:
        self.rootfs = rootfs
        self._limits = max_lifetime, idle_timeout
        # A machine that can be saved is one that may be: see `snapshot` and `fork`.
        self._machine = replace(machine, config=replace(machine.config, savable=is_savable(machine.config)))
        self._session = Session(self._machine, max_lifetime=max_lifetime, idle_timeout=idle_timeout)
        self._finalizer = weakref.finalize(self, self._session.close)

    def _copy(self, machine: Machine) -> Sandbox:
        """Another sandbox with this one's limits."""
        copy = Sandbox.__new__(Sandbox)
        copy._start(self.rootfs, machine, *self._limits)
        return copy

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = f"ended ({self._session.ended})" if self._session.ended else "running"
        return f"<vmette.Sandbox {self.rootfs} {state}>"

    def close(self) -> None:
        """Ends the VM and all that runs in it. Does nothing if it has ended."""
        self._finalizer()

    @property
    def closed(self) -> bool:
        """Whether the VM has ended."""
        return self._session.ended is not None

    @property
    def kernel(self) -> str:
        """The release of the guest's kernel."""
        return self._session.guest.kernel or ""

    @property
    def timings(self) -> tuple[Timing, ...]:
        """The milestones of the boot, in seconds since its start."""
        return self._session.stopwatch.timings

    def sync_clock(self, timeout: float | None = None) -> None:
        """Sets the guest's clock by this machine's: it stood still while this machine slept, if it did.

        Raises:
            GuestError: the guest cannot set it.
            TimeoutExpired: it has not answered within `timeout` seconds.
        """
        command = clock_command()
        captured = Captured(command)
        if run(self._session, command, b"", captured, timeout).code != 0:
            failure = decode_error(0, captured.stderr)
            raise GuestError(f"the guest cannot set its clock: {strerror(failure.errno)}")

    @property
    def came_up(self) -> str:
        """How it came up: `woken from a template`, or `booted`, and why."""
        return self._session.stopwatch.way

    def snapshot(self, target: str | os.PathLike[str]) -> Snapshot:
        """Saves the machine as it is, all that runs in it included. It stands still meanwhile, and goes on.

        What is open between this program and the guest is not saved: in a machine that wakes from it, the commands
        of this sandbox go on with their input at its end and their output going nowhere.

        Args:
            target: A name; or a path, if it has a `/`, of a directory that is made.

        Raises:
            ConfigError: the target is no name or taken, or the machine has shares, disks or secrets.
            VmmError, GuestError, VmetteError: it cannot be saved.
            SandboxClosed: the VM has ended.
        """
        from .snapshots import save_running

        return self._session.save(lambda guest: save_running(guest, self._machine, target, self.rootfs))

    @classmethod
    def restore(
        cls,
        target: str | os.PathLike[str],
        *,
        max_lifetime: float | None = None,
        idle_timeout: float | None = None,
        **options: Unpack[MachineOptions],
    ) -> Sandbox:
        """A sandbox that wakes from a snapshot, by its name or its path.

        Raises:
            ConfigError: there is none, or an option is of what was settled when it was made.
            VmmError: something that it needs has changed since, or it is damaged.
        """
        return cls(f"{SNAPSHOT}{os.fspath(target)}", max_lifetime=max_lifetime, idle_timeout=idle_timeout, **options)

    def fork(self, count: int = 1) -> list[Sandbox]:
        """So many copies of this sandbox as it is now; it goes on. Their memory is one until they write to it.

        Each has a clock, random numbers, a host name (this one's, and its number), a network address and a scratch disk
        of its own. Of its services it has those that lead out: what was published is this sandbox's alone. Secrets and
        certificates are in it as they were. See also :meth:`snapshot`.

        Raises:
            ConfigError: the machine has shares or disks, or secrets and copies that would be on the disk (on macOS), or
                `count` is less than 1.
            VmmError, GuestError: it cannot be saved, or a copy does not wake.
            SandboxClosed: the VM has ended.
        """
        from .fork import fork

        return fork(self, count)

    @property
    def files(self) -> Files:
        """The guest's files."""
        from .filesystem import Files

        return Files(lambda command: Popen(self, self._session, command, PIPE, PIPE, PIPE))

    def share(self, path: str | os.PathLike[str], target: str, *, read_only: bool = False) -> SharedDirectory:
        """Shares a directory of this host with the guest, until it is taken away again or the sandbox ends.

        What the machine is started with (`shares`) is faster; this needs no restart, so it is how a sandbox of a pool,
        or a copy, gets the directories of its task. Nothing outside the directory is reached, whatever links are in
        it. What others change there is seen within a second.

        Args:
            path: The directory.
            target: An absolute path of the guest, which is made if it is missing.
            read_only: The guest cannot write to it: this side sees to that.

        Returns:
            Its handle: a context manager that takes it away, as its `close` does.

        Raises:
            ConfigError: there is no such directory, or that target cannot be.
            GuestError: the guest cannot mount it.
            SandboxClosed: the VM has ended.
        """
        from .sharing import SharedDirectory

        return SharedDirectory(self, self._session, Share("", Path(path), read_only, target))

    @property
    def vsock(self) -> Vsock:
        """Its vsock ports: sockets between this process and the guest's programs."""
        from .vsock import Vsock

        return Vsock(self._session)

    @overload
    def run(
        self,
        argv: Sequence[str] = ...,
        *,
        text: Literal[False] = ...,
        env: Mapping[str, str] | None = ...,
        cwd: str | None = ...,
        user: str | None = ...,
        input: bytes | None = ...,
        timeout: float | None = ...,
        check: bool = ...,
        max_output: int = ...,
    ) -> CompletedProcess[bytes]: ...

    @overload
    def run(
        self,
        argv: Sequence[str] = ...,
        *,
        text: Literal[True],
        env: Mapping[str, str] | None = ...,
        cwd: str | None = ...,
        user: str | None = ...,
        input: str | None = ...,
        timeout: float | None = ...,
        check: bool = ...,
        max_output: int = ...,
    ) -> CompletedProcess[str]: ...

    def run(
        self,
        argv: Sequence[str] = (),
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        input: bytes | str | None = None,  # noqa: A002 (the name that subprocess.run has)
        timeout: float | None = None,
        check: bool = False,
        text: bool = False,
        max_output: int = MAX_OUTPUT,
    ) -> CompletedProcess[bytes] | CompletedProcess[str]:
        """Runs `argv` to its end and returns what it wrote. See :func:`vmette.run`; the VM goes on.

        At the time-out the command gets the signal that the image asks for, if it does, and ten seconds to act on it;
        then it is killed with all processes that it has started, as it is when it writes more than `max_output` bytes
        to stdout or stderr, and when this call is interrupted.

        Raises:
            CalledProcessError: `check` is set and the status is not 0.
            TimeoutExpired: the time is over. It carries the output so far.
            OutputTooLarge: there is more output than `max_output`.
            CommandNotStarted: there is no such command, or it cannot be executed.
            SandboxClosed, VmmError, GuestError, ProtocolError: the VM has ended.
        """
        command = self._machine.command(argv, env, cwd, user)
        captured = Captured(command, max_output, text=text)
        completed = captured.completed(run(self._session, command, encoded(input), captured, timeout))
        if check:
            completed.check_returncode()
        return completed

    def popen(
        self,
        argv: Sequence[str] = (),
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        stdin: Redirection = DEVNULL,
        stdout: Redirection = PIPE,
        stderr: Redirection = PIPE,
        terminal: tuple[int, int] | None = None,
        switch_root: bool = False,
    ) -> Popen:
        """Starts `argv` and returns at once: :class:`vmette.Popen` is its handle.

        Args:
            argv: As for :meth:`run`.
            env: As for :meth:`run`.
            cwd: As for :meth:`run`.
            user: As for :meth:`run`.
            stdin: Its input: `PIPE`, `DEVNULL`, a file of this process or its descriptor; None is this process's own.
            stdout: Its output, likewise.
            stderr: Its errors, likewise; `STDOUT` is where `stdout` goes.
            terminal: Run it in a terminal of so many rows and columns; all its output is stdout then.
            switch_root: Run `argv`, an init system, as PID 1 of a PID namespace of its own, in which all later
                commands run too, while it lives.
        """
        command = self._machine.command(argv, env, cwd, user, terminal=terminal, switch_root=switch_root)
        return Popen(self, self._session, command, stdin, stdout, stderr)

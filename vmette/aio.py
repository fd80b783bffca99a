"""The sandbox for asyncio: the names of :class:`vmette.Sandbox`, as coroutines that wait without a thread.

A command's end is told by the session's own thread, and its streams are pipes that the event loop polls. Only what
takes long and cannot be polled, the start and the end of a VM and its files, is done in other threads.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from subprocess import DEVNULL, PIPE
from typing import IO, TYPE_CHECKING, Any, Literal, TypeVar, overload

from .errors import OutputTooLarge, SandboxClosed, VmetteError
from .guest import STOP_SECONDS
from .machine import SNAPSHOT, MachineOptions, cancellable
from .process import (
    LINE_BYTES,
    MAX_OUTPUT,
    PIPE_BYTES,
    Captured,
    CompletedProcess,
    Popen,
    Redirection,
    Running,
    decoded,
    encoded,
)
from .protocol import SignalFlag
from .sandbox import Sandbox
from .streams import BytesSource

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .aio_files import AsyncFiles
    from .protocol import Usage
    from .sharing import SharedDirectory
    from .snapshots import Snapshot
    from .timings import Timing
    from .vsock import Vsock

T = TypeVar("T")


def in_thread(function: Callable[[], T]) -> asyncio.Future[T]:
    """What `function` returns in a thread of its own: the loop's pool may be full of what only this would end."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()  # whoever no longer waits has not cancelled what the thread does

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # it is the waiter's
            future.set_exception(error)

    threading.Thread(target=work, name="vmette-async", daemon=True).start()
    return asyncio.wrap_future(future)


def _end_of(process: Running | Popen) -> asyncio.Future[None]:
    """Is done when `process` has ended."""
    future: Future[None] = Future()
    process.when_done(lambda: future.set_result(None))
    return asyncio.wrap_future(future)


async def _within(future: asyncio.Future[Any], seconds: float | None) -> bool:
    """Whether `future` is done within `seconds`. Neither their end nor being cancelled here changes it."""
    await asyncio.wait([future], timeout=seconds)
    return future.done()


async def surely(future: asyncio.Future[T]) -> T:
    """The result of what will be done soon, and must be: a task that is cancelled meanwhile is so afterwards."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        future.exception()  # else asyncio complains that nobody has looked at it
        raise cancelled
    return future.result()


class _Pipe(asyncio.StreamReaderProtocol):
    """Our end of a pipe to or from a command."""

    def __init__(self) -> None:
        self.reader = asyncio.StreamReader(limit=LINE_BYTES)
        super().__init__(self.reader)
        self.transport: asyncio.BaseTransport | None = None
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        super().connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.closed.set_result(None)

    def close(self) -> None:
        """Closes it, which is done once :attr:`closed` is."""
        if self.transport is not None:
            self.transport.close()


class AsyncPopen:
    """A command in a sandbox, as :class:`asyncio.subprocess.Process` has it; :meth:`AsyncSandbox.popen` makes it.

    In an `async with` statement it is killed if the block is left by an exception or cancelled. Its pipes are open
    until they have been read to their ends, the statement ends, or the sandbox is closed.
    """

    def __init__(self, popen: Popen) -> None:
        self._popen = popen
        self.args = popen.args
        self.stdin: asyncio.StreamWriter | None = None
        self.stdout: asyncio.StreamReader | None = None
        self.stderr: asyncio.StreamReader | None = None
        self._pipes: list[_Pipe] = []
        self._ended = _end_of(popen)
        self._reads: dict[int, asyncio.Task[bytes]] = {}
        """What :meth:`chunks` has asked the readers for and not handed out."""

    async def connect(self) -> None:
        """Makes streams of the command's pipes. If that is cancelled, the command is killed."""
        loop = asyncio.get_running_loop()
        try:
            if self._popen.stdin is not None:
                transport, pipe = await loop.connect_write_pipe(self._pipe, self._popen.stdin)
                self.stdin = asyncio.StreamWriter(transport, pipe, pipe.reader, loop)
            self.stdout = await self._reader(self._popen.stdout)
            self.stderr = await self._reader(self._popen.stderr)
        except BaseException:
            self.kill()
            try:
                await self.close()
            finally:
                for file in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
                    if file is not None:
                        file.close()  # no transport's yet
            raise

    async def _reader(self, file: IO[bytes] | None) -> asyncio.StreamReader | None:
        if file is None:
            return None
        _, pipe = await asyncio.get_running_loop().connect_read_pipe(self._pipe, file)
        return pipe.reader

    def _pipe(self) -> _Pipe:
        pipe = _Pipe()
        self._pipes.append(pipe)
        return pipe

    def when_over(self, watcher: Callable[[AsyncPopen], None]) -> None:
        """Has `watcher` called, by the loop, once the command has ended and all its pipes are closed."""
        parts: list[asyncio.Future[None]] = [self._ended, *(pipe.closed for pipe in self._pipes)]

        def part_is_over(_: asyncio.Future[None]) -> None:
            if all(part.done() for part in parts):
                watcher(self)

        for part in parts:
            part.add_done_callback(part_is_over)

    async def __aenter__(self) -> AsyncPopen:
        return self

    async def __aexit__(self, kind: object, *args: object) -> None:
        if kind is not None:
            self.kill()
        await self.close()
        if kind is None:
            self._popen.poll()

    async def close(self) -> None:
        """Closes the pipes and waits for the command's end. If that is cancelled, the command is killed."""
        for pipe in self._pipes:
            pipe.close()
        try:
            await asyncio.wait([self._ended])
        finally:
            self.kill()
            await surely(self._ended)
            await surely(asyncio.gather(*(pipe.closed for pipe in self._pipes if pipe.transport is not None)))

    def __repr__(self) -> str:
        return f"<vmette.AsyncPopen {list(self.args)} returncode={self.returncode}>"

    @property
    def returncode(self) -> int | None:
        """As :class:`subprocess.Popen` has it: None until :meth:`poll` or :meth:`wait` has found that it has ended."""
        return self._popen.returncode

    @property
    def usage(self) -> Usage | None:
        """What it took of the machine; None until then."""
        return self._popen.usage

    def poll(self) -> int | None:
        """:attr:`returncode` if the command has ended, else None. See :meth:`vmette.Popen.poll`."""
        return self._popen.poll()

    async def wait(self) -> int:
        """:attr:`returncode`, once the command has ended and its output is in its pipes. See :meth:`vmette.Popen.wait`.

        Output that nobody reads delays the end of a command. To be cancelled here does nothing to it.
        """
        await asyncio.wait([self._ended])
        return self._popen.wait()

    def send_signal(self, number: int | str, *, group: bool = False) -> None:
        """Sends it a signal: see :meth:`vmette.Popen.send_signal`."""
        self._popen.send_signal(number, group=group)

    def terminate(self) -> None:
        """Sends it SIGTERM."""
        self._popen.terminate()

    def kill(self) -> None:
        """Kills it with all processes that it has started."""
        self._popen.kill()

    def resize(self, rows: int, columns: int) -> None:
        """Tells its terminal its size."""
        self._popen.resize(rows, columns)

    async def lines(self) -> AsyncIterator[str]:
        """The lines of stdout, without their ends, as they come. What goes to stderr is read by nobody meanwhile.

        Raises:
            OutputTooLarge: a line is longer than 1 MiB.
        """
        assert self.stdout is not None, "stdout is no pipe"
        while True:
            try:
                line = await self.stdout.readline()
            except ValueError:
                raise OutputTooLarge(f"a line is longer than {LINE_BYTES} bytes: take chunks() instead") from None
            if not line:
                return
            yield decoded(line.rstrip(b"\n"))

    async def chunks(self) -> AsyncIterator[tuple[int, bytes]]:
        """What it writes, as it comes: 1 for stdout or 2 for stderr, and the bytes, until both have ended."""
        readers = {number: reader for number, reader in ((1, self.stdout), (2, self.stderr)) if reader is not None}
        reads = self._reads
        try:
            while readers:
                for number, reader in readers.items():
                    if number not in reads:
                        reads[number] = asyncio.create_task(reader.read(PIPE_BYTES))
                await asyncio.wait(reads.values(), return_when=asyncio.FIRST_COMPLETED)
                number = next(number for number, read in reads.items() if read.done())
                if data := reads.pop(number).result():
                    yield number, data
                else:
                    del readers[number]
        finally:  # what has been read stays for the next call
            waiting = {number: read for number, read in reads.items() if not read.done()}
            for number, read in waiting.items():
                read.cancel()
                del reads[number]
            if waiting:
                await asyncio.wait(waiting.values())

    async def communicate(
        self,
        input: bytes | None = None,  # noqa: A002 (the name that subprocess has)
    ) -> tuple[bytes, bytes]:
        """Writes `input` to stdin and closes it, takes what comes from stdout and stderr, waits for the end.

        Raises:
            CommandNotStarted, SandboxClosed, …: as :meth:`wait`.
        """
        taken = {1: bytearray(), 2: bytearray()}
        feeding = asyncio.ensure_future(self._feed(input or b""))
        try:
            async for number, data in self.chunks():
                taken[number] += data
            await feeding
        finally:
            feeding.cancel()
        await self.wait()
        return bytes(taken[1]), bytes(taken[2])

    async def _feed(self, data: bytes) -> None:
        if self.stdin is not None:
            with suppress(BrokenPipeError, ConnectionResetError):  # the command need not read it
                self.stdin.write(data)
                await self.stdin.drain()
            self.stdin.close()


class AsyncSandbox:
    r"""A :class:`vmette.Sandbox` for asyncio, best used in an `async with` statement, which boots and ends the VM.

    >>> async with vmette.AsyncSandbox("builtin://base") as sandbox:
    ...     (await sandbox.run(["uname", "-s"], text=True)).stdout
    'Linux\n'

    It belongs to the event loop that starts it. A boot that is cancelled leaves nothing, and a command that is
    cancelled is killed with all its processes before the cancellation goes on.

    Args:
        rootfs: As for :class:`vmette.Sandbox`, and so the rest.
        max_lifetime: Seconds after which the VM ends, whatever it does.
        idle_timeout: Seconds without any command or open connection after which the VM ends.
        options: The machine's: see :class:`vmette.machine.MachineOptions`.
    """

    def __init__(
        self,
        rootfs: str | os.PathLike[str],
        *,
        max_lifetime: float | None = None,
        idle_timeout: float | None = None,
        **options: Unpack[MachineOptions],
    ) -> None:
        self.rootfs = os.fspath(rootfs)
        self._given_up = threading.Event()
        self._boot = partial(
            Sandbox,
            rootfs,
            max_lifetime=max_lifetime,
            idle_timeout=idle_timeout,
            **cancellable(options, self._given_up.is_set),
        )
        self._sandbox: Sandbox | None = None
        self._processes: set[AsyncPopen] = set()

    async def __aenter__(self) -> AsyncSandbox:
        await self.start()
        return self

    async def __aexit__(self, *args: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        if self._sandbox is None:
            return f"<vmette.AsyncSandbox {self.rootfs} not started>"
        return repr(self._sandbox).replace("Sandbox", "AsyncSandbox", 1)

    async def start(self) -> None:
        """Boots the VM; does nothing if that has been done.

        Raises:
            ConfigError, ProviderError, PayloadError, VmmError, GuestError, ProtocolError: the VM does not come up.
        """
        if self._sandbox is not None:
            return

        def boot() -> None:
            self._sandbox = self._boot()

        booting = in_thread(boot)
        try:
            await asyncio.wait([booting])
            booting.result()
        except asyncio.CancelledError:
            self._given_up.set()
            try:
                with suppress(VmetteError, OSError):
                    await surely(booting)
            finally:
                await self.close()
            raise

    async def close(self) -> None:
        """Ends the VM and all that runs in it, and closes what is open of its commands' streams."""
        self._given_up.set()
        try:
            if self._sandbox is not None:
                await surely(in_thread(self._sandbox.close))
        finally:
            for process in [*self._processes]:
                await process.close()

    @property
    def _started(self) -> Sandbox:
        if self._sandbox is None:
            raise SandboxClosed("the sandbox has not been started: use `async with`, or await its start()")
        return self._sandbox

    @property
    def closed(self) -> bool:
        """Whether the VM has ended, or was never there."""
        return self._sandbox is None or self._sandbox.closed

    @property
    def kernel(self) -> str:
        """The release of the guest's kernel."""
        return self._started.kernel

    @property
    def timings(self) -> tuple[Timing, ...]:
        """The milestones of the boot, in seconds since its start."""
        return self._started.timings

    async def sync_clock(self) -> None:
        """Sets the guest's clock by this machine's: see :meth:`vmette.Sandbox.sync_clock`."""
        await in_thread(self._started.sync_clock)

    async def snapshot(self, target: str | os.PathLike[str]) -> Snapshot:
        """Saves the machine as it is: see :meth:`vmette.Sandbox.snapshot`."""
        sandbox = self._started
        return await in_thread(lambda: sandbox.snapshot(target))

    @classmethod
    def restore(
        cls,
        target: str | os.PathLike[str],
        *,
        max_lifetime: float | None = None,
        idle_timeout: float | None = None,
        **options: Unpack[MachineOptions],
    ) -> AsyncSandbox:
        """A sandbox that wakes from a snapshot when it is started: see :meth:`vmette.Sandbox.restore`."""
        return cls(f"{SNAPSHOT}{os.fspath(target)}", max_lifetime=max_lifetime, idle_timeout=idle_timeout, **options)

    async def fork(self, count: int = 1) -> list[AsyncSandbox]:
        """So many copies of this sandbox, which have been started: see :meth:`vmette.Sandbox.fork`.

        If this is cancelled, there are none.
        """
        forking = in_thread(lambda: self._started.fork(count))
        try:
            await asyncio.wait([forking])
        except asyncio.CancelledError:
            with suppress(VmetteError, OSError):
                for copy in await surely(forking):
                    await surely(in_thread(copy.close))
            raise
        return [self._copy(copy) for copy in forking.result()]

    def _copy(self, sandbox: Sandbox) -> AsyncSandbox:
        copy = AsyncSandbox(self.rootfs)
        copy._sandbox = sandbox
        return copy

    @property
    def came_up(self) -> str:
        """How it came up: see :attr:`vmette.Sandbox.came_up`."""
        return self._started.came_up

    @property
    def files(self) -> AsyncFiles:
        """The guest's files."""
        from .aio_files import AsyncFiles

        sandbox = self._started
        return AsyncFiles(lambda command: Popen(sandbox, sandbox._session, command, PIPE, PIPE, PIPE))

    async def share(self, path: str | os.PathLike[str], target: str, *, read_only: bool = False) -> SharedDirectory:
        """Shares a directory of this host with the guest: see :meth:`vmette.Sandbox.share`.

        The `close` of what this returns waits for the guest: call it by `asyncio.to_thread`.
        """
        sandbox = self._started
        return await in_thread(lambda: sandbox.share(path, target, read_only=read_only))

    @property
    def vsock(self) -> Vsock:
        """Its vsock ports. What this has is not for asyncio: its calls wait, its sockets are ordinary ones."""
        return self._started.vsock

    @overload
    async def run(
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
    async def run(
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

    async def run(
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
        """Runs `argv` to its end and returns what it wrote: see :meth:`vmette.Sandbox.run`.

        If this is cancelled, the command is killed with all processes that it has started, and is gone afterwards.
        """
        sandbox = self._started
        command = sandbox._machine.command(argv, env, cwd, user)
        captured = Captured(command, max_output, text=text)
        # This waits for the session's thread to take it: for one turn of a loop that does not wait either.
        running = Running(sandbox._session, command, BytesSource(encoded(input)), *captured.sinks)
        ended = _end_of(running)
        try:
            in_time = await _within(ended, timeout)
            if not in_time and command.stop_signal is not None:
                running.signal(command.stop_signal)
                await _within(ended, STOP_SECONDS)
        finally:
            running.signal(signal.SIGKILL, SignalFlag.ALL)
            await surely(ended)
        if not in_time:
            assert timeout is not None
            raise captured.timed_out(timeout)
        completed = captured.completed(running.result())
        if check:
            completed.check_returncode()
        return completed

    async def popen(
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
    ) -> AsyncPopen:
        """Starts `argv` and returns its handle: see :meth:`vmette.Sandbox.popen`."""
        process = AsyncPopen(
            self._started.popen(
                argv, env=env, cwd=cwd, user=user, stdin=stdin, stdout=stdout, stderr=stderr, terminal=terminal
            )
        )
        await process.connect()
        self._processes.add(process)
        process.when_over(self._processes.discard)
        return process

"""A command in a sandbox, running or ended: the shapes of :mod:`subprocess`."""

from __future__ import annotations

import fcntl
import logging
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Generic, TypeVar, Union

from .config import signal_number
from .errors import CalledProcessError, OutputTooLarge, SandboxTimeout, TimeoutExpired
from .protocol import SignalFlag
from .streams import Buffer, BytesSource, Discard, FdSink, FdSource, Limited, Sink, Source
from .timings import Timing

if TYPE_CHECKING:
    from io import BufferedReader, BufferedWriter

    from .config import Command
    from .guest import Ending, Guest, Stream
    from .protocol import Exited, Usage
    from .sandbox import Sandbox, Session

logger = logging.getLogger(__name__)

MAX_OUTPUT = 256 << 20
"""Bytes of stdout, and of stderr, that are taken into memory unless a caller says otherwise."""

SHOWN_BYTES = 16384
"""How much of the end of an output a notebook shows."""

LINE_BYTES = 1 << 20
"""The longest line that is taken into memory."""
MAX_SELECT = 1e6
"""Seconds: select(2) and its kin cannot wait for months."""
PIPE_BYTES = 1 << 20
"""The size of a pipe that takes a command's output: fewer wake-ups for bulk data."""

Text = TypeVar("Text", bytes, str)


@dataclass(frozen=True)
class CompletedProcess(Generic[Text]):
    """A command that has ended, as :class:`subprocess.CompletedProcess` has it."""

    args: tuple[str, ...]
    returncode: int
    """The exit status, or minus the number of the signal that ended the command."""
    stdout: Text
    stderr: Text
    usage: Usage | None = field(default=None, compare=False)
    """What it took of the machine: time, memory, and how many of its processes died for lack of memory."""
    timings: tuple[Timing, ...] = field(default=(), compare=False)
    """The milestones of a run, in seconds since its start."""

    def _repr_html_(self) -> str:
        """For Jupyter. The output is a hostile guest's, and is shown as text whatever it says."""
        from html import escape
        from shlex import join

        shown = [f"<code>{escape(join(self.args))}</code> returned {self.returncode}"]
        for name, output in (("stdout", self.stdout), ("stderr", self.stderr)):
            if output:
                end = output[-SHOWN_BYTES:]
                text = end if isinstance(end, str) else decoded(end)
                more = f", the last {len(end)} of {len(output)}" if len(end) < len(output) else ""
                shown.append(f"{name}{more}:<pre>{escape(text)}</pre>")
        return "<div>" + "<br>".join(shown) + "</div>"

    def check_returncode(self) -> None:
        """Does nothing if the command succeeded.

        Raises:
            CalledProcessError: its status is not 0.
        """
        if self.returncode:
            raise CalledProcessError(self.returncode, self.args, self.stdout, self.stderr)


def returncode(exited: Exited) -> int:
    """As :mod:`subprocess` has it: the exit status, or minus the number of the signal."""
    return -exited.signal if exited.signal is not None else exited.code or 0


def decoded(data: bytes | bytearray) -> str:
    """What a guest wrote, as text: undecodable bytes become U+FFFD."""
    return data.decode(errors="replace")


def encoded(text: bytes | str | None) -> bytes:
    """A command's input as bytes."""
    return text.encode() if isinstance(text, str) else text or b""


class Captured:
    """The output of `command`, as it comes: at most `limit` bytes of each of stdout and stderr; as text if `text`."""

    def __init__(self, command: Command, limit: int = MAX_OUTPUT, *, text: bool = False) -> None:
        self.args = tuple(map(os.fsdecode, command.argv))
        self._out, self._err = Buffer(), Buffer()
        self.sinks: tuple[Sink, Sink] = Limited(self._out, limit), Limited(self._err, limit)
        self._text = text

    @property
    def stderr(self) -> bytes:
        """What there is of stderr by now."""
        return bytes(self._err.data)

    def timed_out(self, timeout: float) -> TimeoutExpired:
        """The error that carries what there is by now."""
        output = [decoded(b.data) if self._text else bytes(b.data) for b in (self._out, self._err)]
        return TimeoutExpired(self.args, timeout, *output)

    def completed(
        self, exited: Exited, timings: tuple[Timing, ...] = ()
    ) -> CompletedProcess[bytes] | CompletedProcess[str]:
        """What the command has become."""
        status, out, err = returncode(exited), self._out.data, self._err.data
        if self._text:
            return CompletedProcess(self.args, status, decoded(out), decoded(err), exited.usage, timings)
        return CompletedProcess(self.args, status, bytes(out), bytes(err), exited.usage, timings)


class Running:
    """A command that a session runs: what any thread can do with it. Holds nothing that keeps a sandbox alive."""

    def __init__(
        self,
        session: Session,
        command: Command,
        stdin: Source,
        stdout: Sink,
        stderr: Sink,
        taken: Callable[[], object] = lambda: None,
    ) -> None:
        """`taken` is called, in the session's thread, once the descriptors of the streams are the session's."""
        self._session = session
        self._command = command
        self._done = threading.Event()
        self._ending: Ending | None = None
        self._watchers: list[Callable[[], None]] = []
        self._lock = threading.Lock()

        def start(guest: Guest) -> Stream:
            stream = guest.exec(command, stdin, stdout, stderr, self._finished)
            taken()
            return stream

        def kill(guest: Guest, stream: Stream) -> None:
            guest.signal(stream.number, signal.SIGKILL, SignalFlag.ALL)

        self._stream: Stream = session.call(start, kill)

    def _finished(self, ending: Ending) -> None:
        self._ending = ending
        with self._lock:
            self._done.set()
            watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            try:
                watcher()
            except Exception:  # the session goes on
                logger.exception("what was to be called at a command's end has failed")

    def when_done(self, watcher: Callable[[], None]) -> None:
        """Has `watcher` called once the command has ended: in the session's thread, or now."""
        with self._lock:
            if not self._done.is_set():
                self._watchers.append(watcher)
                return
        watcher()

    def poll(self) -> bool:
        """Whether it has ended."""
        return self._done.is_set()

    def wait(self, deadline: float | None = None) -> Exited:
        """How it ended, once it has.

        Raises:
            SandboxTimeout: `deadline`, a time of `time.monotonic`, has passed before.
            CommandNotStarted, OutputTooLarge, …: as :meth:`vmette.Sandbox.run`.
        """
        if not self._done.wait(None if deadline is None else max(0.0, deadline - time.monotonic())):
            raise SandboxTimeout
        return self.result()

    def result(self) -> Exited:
        """How it ended; it has."""
        from .guest import completed

        assert self._ending is not None
        return completed(self._command, self._ending)

    def signal(self, number: int, flags: SignalFlag = SignalFlag.PROCESS) -> None:
        """Signals it; does nothing if it has ended."""
        if not self.poll():
            self._session.post_if_open(lambda: self._session.guest.signal(self._stream.number, number, flags))

    def resize(self, rows: int, columns: int) -> None:
        """Tells its terminal its size."""
        if not self.poll():
            self._session.post_if_open(lambda: self._session.guest.resize(self._stream.number, rows, columns))

    def kill(self) -> None:
        """Kills it with all processes that it has started, and waits for that."""
        self.signal(signal.SIGKILL, SignalFlag.ALL)
        self._done.wait()


def run(session: Session, command: Command, stdin: bytes, captured: Captured, timeout: float | None = None) -> Exited:
    """Runs `command` in `session` to its end: see :meth:`vmette.Sandbox.run`."""
    from .guest import STOP_SECONDS

    deadline = None if timeout is None else time.monotonic() + timeout
    running = Running(session, command, BytesSource(stdin), *captured.sinks)
    try:
        return running.wait(deadline)
    except SandboxTimeout:
        if command.stop_signal is not None:
            running.signal(command.stop_signal)
            with suppress(SandboxTimeout):
                running.wait(time.monotonic() + STOP_SECONDS)
        running.kill()
        assert timeout is not None
        raise captured.timed_out(timeout) from None
    except BaseException:
        running.kill()
        raise


Redirection = Union[int, "IO[bytes]", "IO[str]", None]
"""What a stream of a command is: `PIPE`, `DEVNULL`, a file of this process, its descriptor, or None for its own."""


class Popen:
    """A command in a sandbox, as :class:`subprocess.Popen` has it; :meth:`vmette.Sandbox.popen` makes it.

    What it does on the streams `stdin`, `stdout` and `stderr` goes through pipes of this process, so that everything
    that works with files works with them.
    """

    def __init__(
        self,
        sandbox: Sandbox,
        session: Session,
        command: Command,
        stdin: Redirection,
        stdout: Redirection,
        stderr: Redirection,
    ) -> None:
        self._sandbox = sandbox  # it lives as long as this does
        self.args = tuple(map(os.fsdecode, command.argv))
        self.stdin: BufferedWriter | None = None
        self.stdout: BufferedReader | None = None
        self.stderr: BufferedReader | None = None
        self.returncode: int | None = None
        """As :class:`subprocess.Popen` has it: None until :meth:`poll` or :meth:`wait` has found that it has ended."""
        self.usage: Usage | None = None
        """What it took of the machine; None until then."""
        self._taken = {1: bytearray(), 2: bytearray()}
        """What :meth:`communicate` has read by now."""
        with ExitStack() as ours, ExitStack() as theirs:
            source = self._source(stdin, ours, theirs)
            out, self.stdout = self._sink(stdout, 1, ours, theirs)
            if stderr == subprocess.STDOUT:
                err: Sink = FdSink(_kept(os.dup(out.fd), theirs), owned=True) if out.fd is not None else Discard()
            else:
                err, self.stderr = self._sink(stderr, 2, ours, theirs)
            self._running = Running(session, command, source, out, err, theirs.pop_all)
            ours.pop_all()

    def _source(self, target: Redirection, ours: ExitStack, theirs: ExitStack) -> Source:
        if target == subprocess.DEVNULL:
            return BytesSource(b"")
        if target != subprocess.PIPE:
            return FdSource(_kept(_duplicate(target, 0), theirs), owned=True)
        end, our_end = os.pipe()
        self.stdin = ours.enter_context(os.fdopen(our_end, "wb"))
        os.set_blocking(_kept(end, theirs), False)
        return FdSource(end, owned=True)

    def _sink(
        self, target: Redirection, own: int, ours: ExitStack, theirs: ExitStack
    ) -> tuple[Sink, BufferedReader | None]:
        if target == subprocess.DEVNULL:
            return Discard(), None
        if target != subprocess.PIPE:
            return FdSink(_kept(_duplicate(target, own), theirs), owned=True), None
        our_end, end = os.pipe()
        reader = ours.enter_context(os.fdopen(our_end, "rb"))
        os.set_blocking(_kept(end, theirs), False)
        with suppress(OSError, AttributeError):  # beyond the user's limit; or no Linux
            fcntl.fcntl(end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        return FdSink(end, owned=True), reader

    def __enter__(self) -> Popen:
        return self

    def __exit__(self, kind: object, *args: object) -> None:
        if kind is not None:
            self.kill()
        for file in (self.stdin, self.stdout, self.stderr):
            if file is not None:
                with suppress(BrokenPipeError):
                    file.close()
        self.wait()

    def __repr__(self) -> str:
        return f"<vmette.Popen {list(self.args)} returncode={self.returncode}>"

    def poll(self) -> int | None:
        """:attr:`returncode` if the command has ended, else None.

        Raises:
            CommandNotStarted, SandboxClosed, …: as :meth:`wait`.
        """
        return self._settle(self._running.result()) if self._running.poll() else None

    def wait(self, timeout: float | None = None) -> int:
        """:attr:`returncode`, once the command has ended and its output has gone where it goes.

        Raises:
            TimeoutExpired: `timeout` seconds have passed. The command goes on.
            CommandNotStarted: there is no such command, or it cannot be executed.
            SandboxClosed, VmmError, GuestError, ProtocolError: the VM has ended.
        """
        try:
            return self._settle(self._running.wait(None if timeout is None else time.monotonic() + timeout))
        except SandboxTimeout:
            assert timeout is not None
            raise TimeoutExpired(self.args, timeout, None, None) from None

    def _settle(self, exited: Exited) -> int:
        self.returncode, self.usage = returncode(exited), exited.usage
        return self.returncode

    def when_done(self, watcher: Callable[[], None]) -> None:
        """Has `watcher` called, in another thread, once the command has ended; at once if it has."""
        self._running.when_done(watcher)

    def send_signal(self, number: int | str, *, group: bool = False) -> None:
        """Sends it a signal, by name (`TERM`, `signal.SIGUSR1`) or Linux's number; to its process group with `group`.

        Does nothing if it has ended.

        Raises:
            ConfigError: there is no such signal.
        """
        self._running.signal(
            # Python's own signals have this host's numbers.
            signal_number(number.name if isinstance(number, signal.Signals) else str(number)),
            SignalFlag.GROUP if group else SignalFlag.PROCESS,
        )

    def terminate(self) -> None:
        """Sends it SIGTERM."""
        self.send_signal("TERM")

    def kill(self) -> None:
        """Kills it with all processes that it has started."""
        self._running.signal(signal.SIGKILL, SignalFlag.ALL)

    def resize(self, rows: int, columns: int) -> None:
        """Tells its terminal its size."""
        self._running.resize(rows, columns)

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """What it writes, as it comes: 1 for stdout or 2 for stderr, and the bytes, until both have ended."""
        with selectors.DefaultSelector() as selector:
            yield from self._read(selector, None, memoryview(b""))

    def lines(self) -> Iterator[str]:
        """The lines of stdout, without their ends, as they come. What goes to stderr is read by nobody meanwhile.

        Raises:
            OutputTooLarge: a line is longer than 1 MiB.
        """
        assert self.stdout is not None, "stdout is no pipe"
        while line := self.stdout.readline(LINE_BYTES + 1):
            if len(line) > LINE_BYTES:
                raise OutputTooLarge(f"the command wrote a line of more than {LINE_BYTES} bytes: read it by chunks")
            yield decoded(line.rstrip(b"\n"))

    def communicate(
        self,
        input: bytes | None = None,  # noqa: A002 (the name that subprocess has)
        timeout: float | None = None,
        max_output: int = MAX_OUTPUT,
    ) -> tuple[bytes, bytes]:
        """Writes `input` to stdin and closes it, takes what comes from stdout and stderr, waits for the end.

        Raises:
            TimeoutExpired: `timeout` seconds have passed. It carries the output so far; the command goes on.
            OutputTooLarge: there are more than `max_output` bytes of one of them. The command has been killed.
            CommandNotStarted, SandboxClosed, …: as :meth:`wait`.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        taken = self._taken
        try:
            with selectors.DefaultSelector() as selector:
                if self.stdin is not None and input:
                    self.stdin.flush()
                    os.set_blocking(self.stdin.fileno(), False)
                    selector.register(self.stdin, selectors.EVENT_WRITE, 0)
                elif self.stdin is not None:
                    self._close_stdin()
                for number, data in self._read(selector, deadline, memoryview(input or b"")):
                    taken[number] += data
                    if len(taken[number]) > max_output:
                        self._running.kill()
                        raise OutputTooLarge(f"the command wrote more than {max_output} bytes: raise the limit")
            self._settle(self._running.wait(deadline))
        except SandboxTimeout:
            assert timeout is not None
            raise TimeoutExpired(self.args, timeout, bytes(taken[1]), bytes(taken[2])) from None
        return bytes(taken[1]), bytes(taken[2])

    def _read(
        self, selector: selectors.BaseSelector, deadline: float | None, rest: memoryview
    ) -> Iterator[tuple[int, bytes]]:
        """Reads both outputs to their ends, and feeds `rest` to stdin if that is registered."""
        outputs = {number: file for number, file in ((1, self.stdout), (2, self.stderr)) if file and not file.closed}
        for number, output in outputs.items():
            selector.register(output, selectors.EVENT_READ, number)
        while selector.get_map():
            left = None if deadline is None else min(max(0.0, deadline - time.monotonic()), MAX_SELECT)
            ready = selector.select(left)
            if not ready and deadline is not None and time.monotonic() >= deadline:
                raise SandboxTimeout
            for key, _ in ready:
                if key.data == 0:
                    rest = self._feed(rest)
                    if not rest:
                        selector.unregister(key.fileobj)
                        self._close_stdin()
                elif data := outputs[key.data].read1(PIPE_BYTES):
                    yield key.data, data
                else:
                    selector.unregister(key.fileobj)
                    outputs[key.data].close()

    def _close_stdin(self) -> None:
        assert self.stdin is not None
        with suppress(BrokenPipeError):
            self.stdin.close()

    def _feed(self, rest: memoryview) -> memoryview:
        """Writes what stdin takes of `rest`, and returns what is left: none when nobody reads it."""
        assert self.stdin is not None
        try:
            return rest[os.write(self.stdin.fileno(), rest) :]
        except BlockingIOError:
            return rest
        except BrokenPipeError:
            return rest[len(rest) :]


def _kept(fd: int, undo: ExitStack) -> int:
    undo.callback(os.close, fd)
    return fd


def _duplicate(target: Redirection, own: int) -> int:
    """A descriptor of our own for a file that its owner may close."""
    if target is None:
        return os.dup(own)
    return os.dup(target if isinstance(target, int) else target.fileno())

"""The host's end of a running guest: one loop that moves bytes between the control port and what they are for."""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from .config import Command, MachineConfig, Saved
from .errors import (
    CommandNotStarted,
    ConfigError,
    GuestError,
    ProtocolError,
    SandboxClosed,
    SandboxTimeout,
    VmetteError,
    VmmError,
)
from .linux import strerror
from .polling import HEED_SECONDS, new_poll
from .protocol import (
    MAX_STREAMS,
    Accepted,
    Channel,
    Connection,
    Ended,
    Event,
    Exited,
    Failure,
    Hello,
    Opened,
    Output,
    Paused,
    SignalFlag,
)
from .providers.base import Cancelled
from .streams import BytesSource, Discard, Sink, Source
from .timings import Stopwatch

if TYPE_CHECKING:
    from .vmm.base import VirtualMachine, VsockDevice

BOOT_SECONDS = 120.0
"""A guest that has not said hello by then never will, however busy this host is."""
SHUTDOWN_SECONDS = 5.0
STOP_SECONDS = 10.0
"""What a command has, once its time is over, to act on the signal that its image asks for: Docker's default."""
KILL_SECONDS = 30.0
"""What a guest has to end a command that it is told to kill: one that cannot is of no more use."""
PAUSE_SECONDS = 10.0
"""What a guest has to fall silent."""
CRIPPLED_SECONDS = 1.0
"""A VM that ends takes its file servers along; if it has not ended by then, a file server went alone."""
CANCEL_SECONDS = 0.1
"""How long a wait for a guest that is not up goes on, at most, before `cancelled` is asked again."""
MAX_POLL = 1e9
"""Milliseconds: poll(2) takes an int of them, which is 24 days."""
CONSOLE_BYTES = 16384
"""How much of the end of the console is kept."""
LAST_WORDS = 20

WRITABLE = select.POLLOUT
READABLE = select.POLLIN


class Console:
    """The end of what the guest's kernel said, fit to be shown: a hostile guest writes this."""

    def __init__(self, show: Callable[[str], None] | None = None) -> None:
        self._tail = bytearray()
        self._line = bytearray()
        self._show = show

    def feed(self, data: bytes) -> None:
        """Takes more of it."""
        self._tail += data
        del self._tail[:-CONSOLE_BYTES]
        if self._show is not None:
            *lines, rest = (bytes(self._line) + data).split(b"\n")
            for line in lines:
                self._show(_plain(line))
            self._line = bytearray(rest[-CONSOLE_BYTES:])

    @property
    def last_words(self) -> tuple[str, ...]:
        """The last lines that are not empty."""
        lines = [_plain(line) for line in bytes(self._tail).split(b"\n")]
        return tuple([line for line in lines if line][-LAST_WORDS:])


def _plain(line: bytes) -> str:
    text = line.decode("utf-8", "replace").replace("\t", "    ").rstrip()
    return "".join(c for c in text if c.isprintable())


Ending = Exited | Failure | Exception
"""How a stream ended: the guest's word, or what went wrong on this side."""


class Stream:
    """A command or a connection of the guest: where its bytes come from and where they go."""

    def __init__(
        self,
        number: int,
        stdin: Source | None,
        sinks: dict[Channel, Sink],
        finished: Callable[[Ending], None],
        opened: Callable[[], None] | None = None,
        *,
        background: bool = False,
    ) -> None:
        self.number = number
        self.background = background
        """It does not keep the machine busy."""
        self.stdin = stdin
        """None once it has ended."""
        self.sinks = sinks
        self.finished = finished
        self.opened = opened
        self.pending: dict[Channel, bytearray] = {channel: bytearray() for channel in sinks}
        """What has come and was not passed on: at most the channel's window."""
        self.ended: set[Channel] = set()
        """Channels on which no more comes."""
        self.end: Exited | Failure | None = None
        self.error: Exception | None = None
        """What went wrong on this side: the first thing that did."""
        self.killed: float | None = None
        """When the guest was told to kill it, as a time of `time.monotonic`."""

    @property
    def flushed(self) -> bool:
        """Whether all that has come was passed on."""
        return not any(self.pending.values())


class Listener:
    """Where the guest listens for this side: `accept` says what becomes of each connection."""

    def __init__(
        self,
        number: int,
        accept: Callable[[int, str], None],
        finished: Callable[[Ending], None],
        opened: Callable[[], None] | None = None,
    ) -> None:
        self.number = number
        self.accept = accept
        self.finished = finished
        self.opened = opened


class Guest:
    """A running guest. All of it is for one thread, which calls :meth:`turn` again and again; but for :meth:`call`.

    Args:
        machine: The VM, which has just been started. It is closed with the guest.
        stopwatch: Notes the milestones.
        debug: Is called with each line of the guest's console.
        cancelled: Is asked now and then, until the guest is up, whether to give up.
    """

    def __init__(
        self,
        machine: VirtualMachine,
        stopwatch: Stopwatch,
        *,
        debug: Callable[[str], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> None:
        self._cancelled = cancelled
        self._stopwatch = stopwatch
        self._console = Console(debug)
        self._vmm_said = Console()
        self._connection = Connection(machine.resume)
        if machine.greeted:
            self._connection.outgoing.clear()
        self._streams: dict[int, Stream] = {}
        self._listeners: dict[int, Listener] = {}
        self._pauses = self._paused = False
        self.kernel: str | None = None
        """The release of the guest's kernel; None until it is up."""
        self.facts: dict[str, str] | None = None
        """What it was started with, if it can be saved: see :func:`vmette.saved.facts`."""
        self._crippled: float | None = None
        """When a program that serves the VM has ended."""
        config = machine.config
        self.writes_to_host = not all([*(s.read_only for s in config.shares), *(d.read_only for d in config.disks)])
        self._started = time.monotonic()
        self._slept = _seconds_slept()
        self._machine = machine
        self._machine.control.setblocking(False)
        self._machine.console.setblocking(False)
        os.set_blocking(self._machine.errors, False)
        self._poll = new_poll()
        self._watched: dict[int, int] = {}
        self._ready: dict[int, int] = {}
        self._watches: dict[int, Callable[[], None]] = {}
        self._at_end: list[Callable[[], None]] = []
        self._calls: deque[tuple[Callable[[], None], Callable[[], None]]] = deque()
        self._wake: tuple[int, int] | None = None
        """A pipe: a byte in it ends a wait."""

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    @property
    def config(self) -> MachineConfig:
        """What its machine is made of."""
        return self._machine.config

    @property
    def vsock(self) -> VsockDevice | None:
        """The machine's vsock device, if it has one."""
        return self._machine.vsock

    def save(self, to: Saved, *, last: bool = False) -> None:
        """Saves the machine, which stands still meanwhile; and after it if that is the `last` that it is to do.

        Raises:
            ConfigError: directories are shared with it.
            VmmError: it cannot be saved, or does not go on.
            GuestError: the guest does not pause.
            OSError: the files of `to` cannot be written.
        """
        if self.has_shares:
            raise ConfigError("a machine with shares is not saved: take them away before")
        self._pauses = True
        self._paused = False
        self._connection.pause()
        try:
            self.turn_until(lambda: self._paused, time.monotonic() + PAUSE_SECONDS)
        except SandboxTimeout:
            raise GuestError(f"the guest did not pause within {PAUSE_SECONDS:g} seconds") from None
        finally:
            self._pauses = False
        try:
            self._machine.save(to)
        finally:
            if not last:
                self._connection.resume()  # to be sent, whatever becomes of the next line
                self._machine.go_on()

    def close(self) -> None:
        """Ends the VM, now."""
        self._machine.close()
        while self._calls:
            _, too_late = self._calls.popleft()
            too_late()
        self.end_all(SandboxClosed("the sandbox has been closed"))
        wake, self._wake = self._wake, None
        for fd in wake or ():
            os.close(fd)
        self._stopwatch.reached("end")

    # --- streams

    def exec(
        self,
        command: Command,
        stdin: Source,
        stdout: Sink,
        stderr: Sink,
        finished: Callable[[Ending], None],
        opened: Callable[[], None] | None = None,
    ) -> Stream:
        """Starts `command`. `finished` is called when it has ended and its output was passed on.

        Before, `opened` is called when it has started, if it could be.
        """
        if (slept := _seconds_slept()) > self._slept + 1:  # the guest slept too, and does not know it
            self._slept = slept
            self.exec(clock_command(), BytesSource(b""), Discard(), Discard(), lambda _: None)
        number = self._connection.exec(command, announced=opened is not None)
        sinks = {Channel.STDOUT: stdout, Channel.STDERR: stderr}
        stream = Stream(number, stdin, sinks, finished, opened, background=command.background)
        return self._streams.setdefault(number, stream)

    def connect(
        self,
        address: str,
        source: Source,
        sink: Sink,
        finished: Callable[[Ending], None],
        opened: Callable[[], None] | None = None,
    ) -> Stream:
        """Has the guest connect to `address`; bytes go from `source` to it and from it to `sink`."""
        number = self._connection.connect(address)
        return self._streams.setdefault(number, Stream(number, source, {Channel.STDOUT: sink}, finished, opened))

    def listen(
        self,
        address: str,
        accept: Callable[[int, str], None],
        finished: Callable[[Ending], None],
        opened: Callable[[], None] | None = None,
    ) -> Listener:
        """Has the guest listen at `address`. `accept` gets number and peer of each connection: see :meth:`accepted`."""
        number = self._connection.listen(address)
        return self._listeners.setdefault(number, Listener(number, accept, finished, opened))

    def accepted(self, number: int, source: Source, sink: Sink, finished: Callable[[Ending], None]) -> Stream:
        """Says where the bytes of a connection go that a listener took."""
        return self._streams.setdefault(number, Stream(number, source, {Channel.STDOUT: sink}, finished))

    def signal(self, number: int, signal_number: int, flags: SignalFlag = SignalFlag.PROCESS) -> None:
        """Signals the command of stream `number`; with 9, ends a connection or a listener."""
        self._connection.signal(number, signal_number, flags)
        stream = self._streams.get(number)
        if stream is not None and stream.killed is None and signal_number == signal.SIGKILL:
            stream.killed = time.monotonic()

    def resize(self, number: int, rows: int, columns: int) -> None:
        """Tells the terminal of a command its size."""
        self._connection.resize(number, rows, columns)

    def reject(self, number: int) -> None:
        """Ends a connection that a listener took and that is not wanted."""
        self._connection.signal(number, signal.SIGKILL)

    def at_end(self, function: Callable[[], None]) -> None:
        """Has `function` called when the guest is gone."""
        self._at_end.append(function)

    def watch(self, fd: int, readable: Callable[[], None]) -> None:
        """Has `readable` called whenever there is something to read from `fd`, until :meth:`unwatch`."""
        self._watches[fd] = readable

    def unwatch(self, fd: int) -> None:
        """Undoes :meth:`watch`."""
        self._watches.pop(fd, None)

    def fail(self, stream: Stream, error: Exception) -> None:
        """Ends a stream because of what went wrong on this side: it is finished with `error` once the guest lets go."""
        if stream.error is None:
            stream.error = error
            for channel in stream.sinks:
                self._drop(stream, channel)
            self.signal(stream.number, signal.SIGKILL, SignalFlag.ALL)

    def end_all(self, error: Exception) -> None:
        """Finishes every stream with `error`: the guest is gone."""
        while self._streams:
            _, stream = self._streams.popitem()
            self._end_sinks(stream)
            stream.finished(stream.error or stream.end or error)
        while self._listeners:
            _, listener = self._listeners.popitem()
            listener.finished(error)
        while self._at_end:
            self._at_end.pop()()

    def run(
        self,
        command: Command,
        stdin: Source,
        stdout: Sink,
        stderr: Sink,
        *,
        deadline: float | None = None,
        started: Callable[[Stream], None] | None = None,
    ) -> Exited:
        """Runs `command` to its end, in this thread. Its output has been written then.

        All must be over by `deadline`, a time of `time.monotonic`. `started` is given the command's stream.

        Raises:
            CommandNotStarted: the guest has no such command, or cannot execute it.
            GuestError: the guest did not come up, or ended before the command did.
            VmmError: the VMM ended.
            ProtocolError: the guest broke the protocol.
            SandboxTimeout: the deadline passed.
        """
        endings: list[Ending] = []
        stream = self.exec(command, stdin, stdout, stderr, endings.append)
        if started is not None:
            started(stream)
        stopping = False
        while not endings:
            if stream.error is not None:
                raise stream.error
            if deadline is not None and time.monotonic() >= deadline:
                if stopping or command.stop_signal is None or self.kernel is None:
                    raise SandboxTimeout
                # As under Docker, the command gets the signal that its image asks for, and some time to act on it.
                self.signal(stream.number, command.stop_signal)
                deadline = time.monotonic() + STOP_SECONDS
                stopping = True
            self.turn(deadline)
        if stopping:
            raise SandboxTimeout
        return completed(command, endings[0])

    def turn_until(self, condition: Callable[[], bool], deadline: float | None = None) -> None:
        """Turns the loop until `condition` holds.

        Raises:
            SandboxTimeout: `deadline`, a time of `time.monotonic`, passed before.
            VmetteError: as :meth:`run`.
        """
        while not condition():
            if deadline is not None and time.monotonic() >= deadline:
                raise SandboxTimeout
            self.turn(deadline)

    def finish(self, deadline: float | None = None) -> None:
        """Lets the guest write back what it holds of shares and disks; without a writable one nothing is waited for."""
        if not self.writes_to_host:
            return
        self._connection.shutdown()
        give_up = time.monotonic() + SHUTDOWN_SECONDS
        give_up = give_up if deadline is None else min(give_up, deadline)
        try:
            while time.monotonic() < give_up:
                self.turn(give_up)
        except VmetteError:
            pass  # it has powered off; or does not, and close() ends it

    # --- other threads, and signal handlers

    def accept_calls(self) -> None:
        """Makes :meth:`call` work."""
        self._wake = os.pipe()
        for fd in self._wake:
            os.set_blocking(fd, False)

    def call(self, function: Callable[[], None], too_late: Callable[[], None] = lambda: None) -> None:
        """Has :meth:`turn` call `function`; or :meth:`close`, if that comes first, `too_late`."""
        self._calls.append((function, too_late))
        if self._wake is not None:
            with suppress(OSError):  # it is full, so the wait ends anyway; or closed, so there is none
                os.write(self._wake[1], b"\0")

    @property
    def has_shares(self) -> bool:
        """Whether directories are shared with it that it was not started with."""
        return any(stream.background for stream in self._streams.values())

    @property
    def busy(self) -> bool:
        """Whether a command runs or a connection is open."""
        return not all(stream.background for stream in self._streams.values())

    # --- one turn of the loop

    def turn(self, until: float | None = None) -> None:
        """Waits until something can be moved, but no longer than `until`, a time of `time.monotonic`; moves it.

        Raises:
            GuestError, VmmError, ProtocolError: the guest is gone, or must go.
        """
        wanted = dict.fromkeys(self._watches, READABLE)
        busy = bool(self._calls)
        for stream in self._streams.values():
            busy |= self._want_stream(stream, wanted)
        for event in self._exchange(wanted, until, wait=not busy):
            self._take(event)
        while self._calls:
            function, _ = self._calls.popleft()
            function()
        for fd, readable in list(self._watches.items()):
            if self._ready.get(fd):
                readable()
        for stream in list(self._streams.values()):
            self._move_stream(stream)

    def _want_stream(self, stream: Stream, wanted: dict[int, int]) -> bool:
        """Adds what `stream` waits for to `wanted`, and says whether it can go on without waiting."""
        busy = False
        if stream.stdin is not None and self._connection.stdin_room(stream.number):
            if stream.stdin.fd is None:
                busy = True
            else:
                _want(wanted, stream.stdin.fd, READABLE)
        for channel, sink in stream.sinks.items():
            if stream.pending[channel]:
                if sink.fd is None:
                    busy = True
                else:
                    _want(wanted, sink.fd, WRITABLE)
        return busy

    def _move_stream(self, stream: Stream) -> None:
        room = self._connection.stdin_room(stream.number)
        source = stream.stdin
        if source is not None and stream.end is None and room and self._is_ready(source.fd, READABLE):
            self._read(stream, source, room)
        for channel, sink in list(stream.sinks.items()):
            if stream.pending[channel] and self._is_ready(sink.fd, WRITABLE):
                self._write(stream, channel, sink)
        if stream.flushed:
            for channel in stream.ended:
                stream.sinks[channel].end()
            stream.ended.clear()
            if stream.end is not None and self._streams.pop(stream.number, None) is not None:
                self._end_sinks(stream)
                stream.finished(stream.error or stream.end)

    def _read(self, stream: Stream, source: Source, room: int) -> None:
        try:
            data = source.read(room)
        except BlockingIOError:  # somebody else who reads there was faster
            return
        except OSError as error:
            self.fail(stream, error)
            data = b""
        if data:
            self._connection.send_stdin(stream.number, data)
        else:
            source.end()
            stream.stdin = None
            self._connection.send_eof(stream.number)

    def _write(self, stream: Stream, channel: Channel, sink: Sink) -> None:
        pending = stream.pending[channel]
        try:
            with memoryview(pending) as data:
                written = sink.write(data)
        except BrokenPipeError:
            self._drop(stream, channel)
            if Channel.STDERR in stream.sinks:
                self._connection.send_eof(stream.number, channel)  # so that the command finds out as from a pipe
            else:
                self.signal(stream.number, signal.SIGKILL)
        except (OSError, VmetteError) as error:
            self.fail(stream, error)
        else:
            del pending[:written]
            self._connection.consumed(stream.number, channel, written)

    def _drop(self, stream: Stream, channel: Channel) -> None:
        """From now on what comes on `channel` goes nowhere."""
        stream.sinks[channel].end()
        stream.sinks[channel] = Discard()
        dropped, stream.pending[channel] = stream.pending[channel], bytearray()
        self._connection.consumed(stream.number, channel, len(dropped))

    def _end_sinks(self, stream: Stream) -> None:
        for sink in stream.sinks.values():
            sink.end()
        if stream.stdin is not None:
            stream.stdin.end()

    def _take(self, event: Event) -> None:
        if isinstance(event, Hello):
            self._greeted(event)
        elif isinstance(event, Paused):
            self._paused = True
            if not self._pauses:  # nobody waits for it any more
                self._connection.resume()
        elif isinstance(event, Failure) and event.stream == 0:
            reason = f"{event.text}: {strerror(event.errno)}" if event.errno else event.text
            raise GuestError(f"the guest could not set itself up: {reason}", self._console.last_words)
        elif isinstance(event, Accepted):
            self._take_connection(event)
        elif listener := self._listeners.get(event.stream):
            if isinstance(event, (Exited, Failure)):
                del self._listeners[event.stream]
                listener.finished(event)
            elif isinstance(event, Opened) and listener.opened is not None:
                listener.opened()
        elif stream := self._streams.get(event.stream):
            self._take_of_stream(stream, event)

    def _take_connection(self, event: Accepted) -> None:
        """Streams that have ended and whose last bytes nobody takes count too: what is held of all is bounded."""
        if event.stream in self._streams:
            raise ProtocolError("the guest numbered a connection wrongly")
        if len(self._streams) >= 2 * MAX_STREAMS:
            self.reject(event.stream)
        else:
            self._listeners[event.listener].accept(event.stream, event.peer)

    def _take_of_stream(self, stream: Stream, event: Event) -> None:
        if isinstance(event, Output):
            stream.pending[event.channel] += event.data
        elif isinstance(event, Ended):
            stream.ended.add(Channel.STDOUT)
        elif isinstance(event, (Exited, Failure)):
            stream.end = event
            self._stopwatch.reached("exit")
        elif isinstance(event, Opened) and stream.opened is not None:
            stream.opened()

    def _is_ready(self, fd: int | None, mask: int) -> bool:
        """Whether `fd` can be read or written, or told of an error, without a wait. None never makes one wait."""
        other = WRITABLE if mask == READABLE else READABLE
        return fd is None or bool(self._ready.get(fd, 0) & ~other)

    def _exchange(self, wanted: dict[int, int], until: float | None, *, wait: bool) -> list[Event]:
        """Waits for the VM and the descriptors of `wanted`, exchanges bytes with it, returns what the guest said."""
        machine = self._machine
        outgoing = self._connection.outgoing
        _want(wanted, machine.control.fileno(), READABLE | (WRITABLE if outgoing else 0))
        _want(wanted, machine.console.fileno(), READABLE)
        if machine.errors >= 0:
            _want(wanted, machine.errors, READABLE)
        if self._crippled is None:
            for fd in machine.ends:
                _want(wanted, fd, READABLE)
        if self._wake is not None:
            _want(wanted, self._wake[0], READABLE)
        for fd in self._watched.keys() - wanted.keys():
            self._poll.unregister(fd)
        for fd, mask in wanted.items():
            if self._watched.get(fd) != mask:
                self._poll.register(fd, mask)
        self._watched = wanted
        patience = self._patience(until)  # a guest that keeps the loop busy is not waited for any longer
        self._ready = dict(self._poll.poll(patience if wait else 0))
        if self._crippled is None and any(fd in self._ready for fd in machine.ends):
            self._crippled = time.monotonic()
        if self._wake is not None and self._wake[0] in self._ready:
            _drain(self._wake[0])
        if machine.console.fileno() in self._ready:
            self._console.feed(_drain(machine.console.fileno()) or b"")
        if machine.errors in self._ready and (text := _drain(machine.errors)) is not None:
            self._vmm_said.feed(text)
        ready = self._ready.get(machine.control.fileno(), 0)
        if ready & WRITABLE and outgoing:
            self._send(outgoing)
        if not ready & ~WRITABLE:
            return []
        try:
            data = machine.control.recv(262144)
        except BlockingIOError:
            return []
        except ConnectionResetError:
            data = b""
        if not data:
            raise self._ended()
        return list(self._connection.receive(data))

    def _send(self, outgoing: bytearray) -> None:
        try:
            sent = self._machine.control.send(memoryview(outgoing)[:262144])
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            return  # the reading side says what there is to say
        del outgoing[:sent]

    def _patience(self, until: float | None) -> float | None:
        """Milliseconds until something must have happened.

        Raises:
            GuestError: the guest has taken too long to boot.
            Cancelled: it is not up, and is not to be waited for.
            VmmError: a program that serves the VM has ended.
        """
        now = time.monotonic()
        ends = [] if until is None else [until]
        if self._wake is None:  # else this is no main thread's, and no signal comes here
            ends.append(now + HEED_SECONDS)
        if self._crippled is not None:
            ends.append(self._crippled + CRIPPLED_SECONDS)
            if now >= ends[-1]:
                said = self._vmm_said.last_words
                raise VmmError("virtiofsd has ended before the VM did" + (f": {said[-1]}" if said else ""))
        if self.kernel is None:
            ends.append(self._started + BOOT_SECONDS)
            if now >= ends[-1]:
                raise GuestError(f"the guest did not boot within {BOOT_SECONDS:g} seconds", self._console.last_words)
            if self._cancelled is not None:
                ends.append(now + CANCEL_SECONDS)
                if self._cancelled():
                    raise Cancelled
        for stream in self._streams.values():
            if stream.killed is not None and stream.end is None:
                ends.append(stream.killed + KILL_SECONDS)
                if now >= ends[-1]:
                    raise GuestError(f"the guest did not kill a command within {KILL_SECONDS:g} seconds")
        return min(max(1.0, (min(ends) - now) * 1000 + 1), MAX_POLL) if ends else None

    def _greeted(self, hello: Hello) -> None:
        self.kernel = hello.kernel
        now = time.monotonic()
        self._stopwatch.reached("hello", now)
        # The guest counts from its kernel's start; its last milestone is the hello itself.
        if hello.milestones:
            kernel = now - hello.milestones[-1].usec / 1e6
            self._stopwatch.reached("guest: kernel", kernel)
            for milestone in hello.milestones:
                self._stopwatch.reached(f"guest: {milestone.name}", kernel + milestone.usec / 1e6)

    def _ended(self) -> VmetteError:
        """The control port is closed: the VMM has ended, and says why if anything does."""
        machine = self._machine
        machine.child.poll(wait=True)
        while data := _drain(machine.console.fileno()):
            self._console.feed(data)
        while data := _drain(machine.errors):
            self._vmm_said.feed(data)
        if (failure := machine.failure(self._vmm_said.last_words)) is not None:
            return failure
        words = self._console.last_words
        when = "before the command did" if self.kernel is not None else "before it was up"
        panic = next((line for line in words if "Kernel panic" in line), "")
        return GuestError(f"the guest ended {when}" + (f": {panic}" if panic else ""), words)


def _seconds_slept() -> float:
    """How long this machine has slept since it booted."""
    # On macOS, that which goes on meanwhile is CLOCK_MONOTONIC, and the other is what Python calls monotonic.
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)) - time.monotonic()


def clock_command() -> Command:
    """Sets the guest's clock by this machine's."""
    return Command((b"clock", b"%d" % time.time_ns()), builtin=True)


def _want(wanted: dict[int, int], fd: int, mask: int) -> None:
    wanted[fd] = wanted.get(fd, 0) | mask


def _drain(fd: int) -> bytes | None:
    """What is there to read: nothing at the end, None if there is nothing yet."""
    try:
        return os.read(fd, 65536)
    except BlockingIOError:
        return None
    except OSError as error:
        if error.errno in {errno.ECONNRESET, errno.EIO}:
            return b""
        raise


def completed(command: Command, ending: Ending) -> Exited:
    """How `command` ended, if it did by itself.

    Raises:
        CommandNotStarted: it could not be started.
        VmetteError, OSError: what went wrong on this side.
    """
    if isinstance(ending, Exited):
        return ending
    if isinstance(ending, Exception):
        raise ending
    name = os.fsdecode(command.argv[0])
    if ending.stage != "exec":
        raise CommandNotStarted(f"cannot run {name!r}: {ending.stage}: {ending.text}", VmetteError.exit_code)
    if ending.errno == errno.ENOENT:
        raise CommandNotStarted(f"the root filesystem has no command {name!r}", 127)
    raise CommandNotStarted(f"cannot execute {name!r}: {strerror(ending.errno)}", 126)

"""A microVM from its start to its end, and the command that runs in it."""

from __future__ import annotations

import errno
import os
import select
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from .errors import CommandNotStarted, GuestError, SandboxTimeout, VmetteError, VmmError
from .protocol import Channel, Connection, Event, Exited, Failure, Hello, Output
from .streams import Sink, Source
from .timings import Stopwatch

if TYPE_CHECKING:
    from .config import Command
    from .vmm.qemu import QemuMachine

BOOT_SECONDS = 120.0
"""A guest that has not said hello by then never will, however busy this host is."""
SHUTDOWN_SECONDS = 5.0
STOP_SECONDS = 10.0
"""What a command has, once its time is over, to act on the signal that its image asks for: Docker's default."""
CRIPPLED_SECONDS = 1.0
"""A VM that ends takes its file servers along; if it has not ended by then, a file server went alone."""
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


class Sandbox:
    """One microVM. A context manager: at its end the VM is gone, whatever happened.

    Args:
        machine: The VM, which has just been started. It is closed with the sandbox.
        stopwatch: Notes the milestones.
        deadline: A time of `time.monotonic` by which all must be over.
        debug: Is called with each line of the guest's console.
    """

    def __init__(
        self,
        machine: QemuMachine,
        stopwatch: Stopwatch,
        *,
        deadline: float | None = None,
        debug: Callable[[str], None] | None = None,
    ) -> None:
        self._stopwatch = stopwatch
        self._deadline = deadline
        self._console = Console(debug)
        self._vmm_said = Console()
        self._connection = Connection()
        self._hello = False
        self._crippled: float | None = None
        """When a program that serves the VM has ended."""
        self._writes_to_host = any(not share.read_only for share in machine.config.shares)
        self._started = time.monotonic()
        self._machine = machine
        self._machine.control.setblocking(False)
        self._machine.console.setblocking(False)
        os.set_blocking(self._machine.errors, False)
        self._poll = select.poll()
        self._watched: dict[int, int] = {}

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the VM, now."""
        self._machine.close()
        self._stopwatch.reached("end")

    # --- running a command

    def run(self, command: Command, stdin: Source, stdout: Sink, stderr: Sink) -> Exited:
        """Runs `command` to its end and passes its streams on, byte for byte. Its output has been written then.

        Raises:
            CommandNotStarted: the guest has no such command, or cannot execute it.
            GuestError: the guest did not come up, or ended before the command did.
            VmmError: the VMM ended.
            ProtocolError: the guest broke the protocol.
            SandboxTimeout: the deadline passed.
            BrokenPipeError: nobody reads `stdout` or `stderr` any more.
        """
        connection = self._connection
        stream = connection.exec(command)
        sinks: dict[Channel, Sink] = {Channel.STDOUT: stdout, Channel.STDERR: stderr}
        pending: dict[Channel, deque[Output]] = {channel: deque() for channel in sinks}
        written: dict[Channel, int] = dict.fromkeys(sinks, 0)
        stdin_open, stopping = True, False
        end: Exited | None = None
        while end is None or any(pending.values()):
            wanted: dict[int, int] = {}
            room = connection.stdin_room(stream) if stdin_open and end is None else 0
            if room and stdin.fd is not None:
                _want(wanted, stdin.fd, READABLE)
            busy = bool(room) and stdin.fd is None
            for channel, sink in sinks.items():
                if pending[channel]:
                    busy |= sink.fd is None
                    if sink.fd is not None:
                        _want(wanted, sink.fd, WRITABLE)
            try:
                events = self._turn(wanted, wait=not busy)
            except SandboxTimeout:
                if stopping or command.stop_signal is None or not self._hello:
                    raise
                # As under Docker, the command gets the signal that its image asks for, and some time to act on it.
                connection.signal(stream, command.stop_signal, group=False)
                self._deadline = time.monotonic() + STOP_SECONDS
                stopping = True
                continue
            for event in events:
                if isinstance(event, Output):
                    pending[event.channel].append(event)
                elif isinstance(event, Exited):
                    end = event
                    self._stopwatch.reached("exit")
                elif isinstance(event, Failure):
                    raise _not_started(command, event)
            if room and end is None and (stdin.fd is None or self._is_ready(stdin.fd)):
                if data := stdin.read(room):
                    connection.send_stdin(stream, data)
                else:
                    stdin_open = False
                    connection.send_eof(stream)
            for channel, sink in sinks.items():
                if pending[channel] and (sink.fd is None or self._is_ready(sink.fd)):
                    output = pending[channel][0]
                    written[channel] += sink.write(memoryview(output.data)[written[channel] :])
                    if written[channel] == len(output.data):
                        written[channel] = 0
                        connection.consumed(pending[channel].popleft())
        if stopping:
            raise SandboxTimeout
        return end

    def finish(self) -> None:
        """Lets the guest write back what it holds of shares; without a writable share there is nothing to wait for."""
        if not self._writes_to_host:
            return
        self._connection.shutdown()
        give_up = time.monotonic() + SHUTDOWN_SECONDS
        self._deadline = give_up if self._deadline is None else min(give_up, self._deadline)
        try:
            while True:
                self._turn({}, wait=True)
        except (VmetteError, SandboxTimeout):
            pass  # it has powered off; or does not, and close() ends it

    # --- one turn of the loop

    def _is_ready(self, fd: int) -> bool:
        return fd in self._ready

    def _turn(self, wanted: dict[int, int], *, wait: bool) -> list[Event]:
        """Waits for the VM and the descriptors of `wanted`, moves what can be moved, returns what the guest said."""
        machine = self._machine
        outgoing = self._connection.outgoing
        _want(wanted, machine.control.fileno(), READABLE | (WRITABLE if outgoing else 0))
        _want(wanted, machine.console.fileno(), READABLE)
        if machine.errors >= 0:
            _want(wanted, machine.errors, READABLE)
        if self._crippled is None:
            for fd in machine.ends:
                _want(wanted, fd, READABLE)
        for fd in self._watched.keys() - wanted.keys():
            self._poll.unregister(fd)
        for fd, mask in wanted.items():
            if self._watched.get(fd) != mask:
                self._poll.register(fd, mask)
        self._watched = wanted
        self._ready = dict(self._poll.poll(self._patience() if wait else 0))
        if self._crippled is None and any(fd in self._ready for fd in machine.ends):
            self._crippled = time.monotonic()
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
        events: list[Event] = []
        for event in self._connection.receive(data):
            if isinstance(event, Hello):
                self._greeted(event)
            elif isinstance(event, Failure) and event.stream == 0:
                reason = f"{event.text}: {os.strerror(event.errno)}" if event.errno else event.text
                raise GuestError(f"the guest could not set itself up: {reason}", self._console.last_words)
            else:
                events.append(event)
        return events

    def _send(self, outgoing: bytearray) -> None:
        try:
            sent = self._machine.control.send(memoryview(outgoing)[:262144])
        except BlockingIOError:
            return
        except (BrokenPipeError, ConnectionResetError):
            return  # the reading side says what there is to say
        del outgoing[:sent]

    def _patience(self) -> float | None:
        """Milliseconds until something must have happened.

        Raises:
            GuestError: the guest has taken too long to boot.
            VmmError: a program that serves the VM has ended.
            SandboxTimeout: the deadline has passed.
        """
        now = time.monotonic()
        if self._deadline is not None and now >= self._deadline:
            raise SandboxTimeout
        until = [] if self._deadline is None else [self._deadline]
        if self._crippled is not None:
            until.append(self._crippled + CRIPPLED_SECONDS)
            if now >= until[-1]:
                said = self._vmm_said.last_words
                raise VmmError("virtiofsd has ended before the VM did" + (f": {said[-1]}" if said else ""))
        if not self._hello:
            until.append(self._started + BOOT_SECONDS)
            if now >= until[-1]:
                raise GuestError(f"the guest did not boot within {BOOT_SECONDS:g} seconds", self._console.last_words)
        return max(1.0, (min(until) - now) * 1000 + 1) if until else None

    def _greeted(self, hello: Hello) -> None:
        self._hello = True
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
        words = self._console.last_words
        said = [line for line in self._vmm_said.last_words if line.startswith("qemu")]
        status = os.waitstatus_to_exitcode(machine.child.status or 0)
        if status != 0:
            how = f"was killed by signal {-status}" if status < 0 else f"failed with status {status}"
            return VmmError(f"QEMU {how}: {said[-1]}" if said else f"QEMU {how}")
        when = "before the command did" if self._hello else "before it was up"
        panic = next((line for line in words if "Kernel panic" in line), "")
        return GuestError(f"the guest ended {when}" + (f": {panic}" if panic else ""), words)


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


def _not_started(command: Command, failure: Failure) -> VmetteError:
    name = os.fsdecode(command.argv[0])
    if failure.stage != "exec":
        return CommandNotStarted(f"cannot run {name!r}: {failure.stage}: {failure.text}", VmetteError.exit_code)
    if failure.errno == errno.ENOENT:
        return CommandNotStarted(f"the root filesystem has no command {name!r}", 127)
    return CommandNotStarted(f"cannot execute {name!r}: {os.strerror(failure.errno)}", 126)

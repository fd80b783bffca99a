"""The process that keeps a detached machine: it boots it, runs its command, writes its log and serves clients.

All of it is one thread, the loop of :class:`vmette.guest.Guest`.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import Command
from ..errors import SandboxClosed, TimeoutExpired, VmetteError, VmmError
from ..files import write_atomically
from ..guest import STOP_SECONDS, completed
from ..machine import Machine, booted
from ..protocol import Exited, Failure, SignalFlag
from ..providers.base import Cancelled, ImageConfig
from ..streams import BytesSource, FdSink, FdSource, limited
from ..timings import Stopwatch
from . import wire
from .log import STDERR, STDOUT, Log, LogSink
from .machines import SOCKET, STATE, State, machines, socket_path

if TYPE_CHECKING:
    from ..guest import Ending, Guest, Stream

logger = logging.getLogger(__name__)

MAX_CLIENTS = 128
"""At once; one more is refused. A client has at most four descriptors here."""
KILL_SECONDS = 5.0
"""How long a guest may take to say that its command is dead: then the VM ends without its word."""
MAX_PATIENCE = 1e9
"""Seconds."""


@dataclass(frozen=True)
class Task:
    """What a supervisor is to do. Descriptors are those that it has inherited."""

    directory: Path
    """The machine's entry."""
    lock: int
    """Of the entry, held."""
    cwd: int
    """What relative paths of `machine` are relative to."""
    state: State
    machine: Machine = field(repr=False)
    command: Command = field(repr=False)
    idle: bool
    """Do not run `command`; but those of clients have its environment, directory and user all the same."""
    timeout: float | None
    max_output: int | None
    debug: bool


def main() -> int:
    """Reads a pickled :class:`Task` from stdin, a socket; writes None there when the machine is up, or an error."""
    report = socket.socket(fileno=os.dup(0))
    _replace_with_null(0)
    with report.makefile("rb") as file:
        task: Task = pickle.load(file)  # noqa: S301 (of the process that started this one)
    os.set_inheritable(task.lock, False)
    os.fchdir(task.cwd)
    os.close(task.cwd)
    try:
        Supervisor(task, report).run()
    except BaseException as error:
        if not isinstance(error, (VmetteError, OSError)):
            error = VmmError(f"vmette has failed: {error!r}")
        with suppress(OSError):  # once the machine is up nobody listens
            report.sendall(pickle.dumps(error))
        return VmetteError.exit_code
    return 0


def _replace_with_null(fd: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, fd)
    os.close(null)


class Supervisor:
    """One machine, from its boot to its end. `report` is where the client that wants it waits."""

    def __init__(self, task: Task, report: socket.socket) -> None:
        self._task = task
        self._report = report
        self._state = task.state
        self._log = Log(task.directory)
        self.guest: Guest
        self.main: Stream | None = None
        self.inherited = _inherited(task.command)
        """What the commands of clients have by default."""
        self._ending: Ending | None = None
        """Of the main command."""
        self._over = False
        self._due: dict[Callable[[], None], float] = {}
        """What happens, and when (`time.monotonic`), unless the machine ends before."""
        self._expired = False
        self._terminated = False
        self.clients: set[Client] = set()

    def run(self) -> None:
        """Keeps the machine until its end.

        Raises:
            VmetteError, OSError, …: it has not come up. Once it is up, its state tells what went wrong.
        """
        self._set_up_logging()
        signals = self._catch_signals()
        machine = replace(self._task.machine, cancelled=self._is_unwanted)
        debug = (lambda line: self._log.line(f"[guest] {line}")) if self._task.debug else None
        error: Exception | None = None
        try:
            with booted(machine, Stopwatch(), debug=debug, lasting=True) as self.guest, self._listen() as listener:
                self.guest.watch(signals, lambda: self._signalled(signals))
                self._start()
                self._say_that_it_is_up()
                self.guest.watch(listener.fileno(), lambda: self._accept(listener))
                self._serve()
                (self._task.directory / SOCKET).unlink(missing_ok=True)
                self.guest.finish()
        except Exception as failure:
            if self._state.started is None:
                raise
            if not isinstance(failure, (VmetteError, OSError)):
                logger.exception("the supervisor has failed")
            error = failure
        self._end(error or self._ending)

    # --- beginning and end

    def _set_up_logging(self) -> None:
        handler = logging.Handler()
        handler.emit = lambda record: self._log.line(f"vmette: {handler.format(record)}")  # type: ignore[method-assign]
        logging.basicConfig(level=logging.DEBUG if self._task.debug else logging.WARNING, handlers=[handler])

    def _catch_signals(self) -> int:
        """A descriptor that becomes readable when this process is asked to end. A logout does not ask that."""
        readable, writable = os.pipe()
        os.set_blocking(readable, False)
        os.set_blocking(writable, False)
        signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        for number in (signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

        def terminate(number: int, frame: object) -> None:  # noqa: ARG001
            self._terminated = True

        signal.signal(signal.SIGTERM, terminate)
        return readable

    def _is_unwanted(self) -> bool:
        """Whether the client that started all this has gone, before it could know the machine."""
        with suppress(BlockingIOError):
            return self._terminated or not self._report.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        return False

    def _start(self) -> None:
        """Starts the main command.

        Raises:
            CommandNotStarted: the guest cannot.
            Cancelled: nobody wants it any more.
        """
        if self._task.timeout is not None:
            self._schedule(self._expire, self._task.timeout)
        if self._task.idle:
            return
        out, err = (limited(LogSink(self._log, channel), self._task.max_output) for channel in (STDOUT, STDERR))
        started: list[bool] = []
        self.main = self.guest.exec(
            self._task.command, BytesSource(b""), out, err, self._main_ended, lambda: started.append(True)
        )
        self.guest.watch(self._report.fileno(), lambda: None)
        while not started and self._ending is None:
            self.guest.turn()
            if self._is_unwanted():
                raise Cancelled
        self.guest.unwatch(self._report.fileno())
        if isinstance(self._ending, (Failure, Exception)):
            completed(self._task.command, self._ending)

    def _listen(self) -> socket.socket:
        directory = os.open(self._task.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(socket_path(directory))
            (self._task.directory / SOCKET).chmod(0o600)  # others cannot even enter the directory
            listener.listen()
            listener.setblocking(False)
        except BaseException:
            listener.close()
            raise
        finally:
            os.close(directory)
        return listener

    def _say_that_it_is_up(self) -> None:
        """Tells the client, which goes its way then; and takes leave of its directory."""
        os.chdir("/")
        started = time.time()
        self._tell(started=started)
        try:
            self._report.sendall(pickle.dumps(None))
        except OSError:  # it has gone, without a name to stop the machine by
            self._state = replace(self._state, started=None)
            raise
        self._report.close()

    def _main_ended(self, ending: Ending) -> None:
        self._ending = ending

    def _serve(self) -> None:
        while self._ending is None and not self._over:
            self.guest.turn(min(self._due.values(), default=None))
            for action in [action for action, due in self._due.items() if time.monotonic() >= due]:
                del self._due[action]
                action()

    def _schedule(self, action: Callable[[], None], seconds: float) -> None:
        """Has `action` done in `seconds`, or earlier if that was said before."""
        due = time.monotonic() + seconds
        self._due[action] = min(due, self._due.get(action, due))

    def _end(self, ending: Ending | None) -> None:
        """Writes down how the machine ended, and removes it if that is wanted."""
        code, error = self._outcome(ending)
        if error is not None:
            self._log.line(f"vmette: {error}")
        self._tell(ended=time.time(), exit_code=code, error=error)
        self._log.close()
        if self._state.remove:
            with machines(self._task.directory.parent) as all_machines:
                all_machines.release(self._state.name, self._task.lock)

    def _outcome(self, ending: Ending | None) -> tuple[int, str | None]:
        """The exit code, as `vmette run` would have it, and what went wrong."""
        if self._expired:
            return TimeoutExpired.exit_code, f"timed out after {self._task.timeout:g} seconds"
        if ending is None:  # no word from a command: there was none, or it had to be killed with the VM
            return (0 if self.main is None else 128 + signal.SIGKILL), None
        try:
            return _exit_code(completed(self._task.command, ending)), None
        except VmetteError as error:
            return error.exit_code, str(error)
        except Exception as error:
            return VmetteError.exit_code, str(error) if isinstance(error, OSError) else f"vmette has failed: {error!r}"

    def _tell(self, **changes: object) -> None:
        self._state = replace(self._state, pid=os.getpid(), **changes)  # type: ignore[arg-type]
        write_atomically(self._task.directory / STATE, self._state.encoded())

    # --- what can be asked of it

    def stop(self, patience: float) -> None:
        """Asks the main command to end, and kills it if it has not after `patience` seconds."""
        if self.main is None:
            self._finish()
            return
        self.guest.signal(self.main.number, self._task.command.stop_signal or signal.SIGTERM)
        self._schedule(self.kill, patience)

    def kill(self) -> None:
        """Kills the main command with all processes that it has started."""
        if self.main is None:
            self._finish()
            return
        self.guest.signal(self.main.number, signal.SIGKILL, SignalFlag.ALL)
        self._schedule(self._finish, KILL_SECONDS)

    def signal(self, number: int) -> None:
        """Signals the main command.

        Raises:
            VmetteError: there is none.
        """
        if number == signal.SIGKILL:
            self.kill()
        elif self.main is None:
            raise VmetteError(f"machine {self._state.name!r} has no command that could be signalled: it idles")
        else:
            self.guest.signal(self.main.number, number)

    def _finish(self) -> None:
        self._over = True

    def _expire(self) -> None:
        self._expired = True
        self.stop(STOP_SECONDS)

    def _signalled(self, wakeup: int) -> None:
        with suppress(BlockingIOError):
            os.read(wakeup, 64)
        if self._terminated and self._state.started is not None:
            self._terminated = False
            self.stop(STOP_SECONDS)

    # --- clients

    def _accept(self, listener: socket.socket) -> None:
        try:
            connection, _ = listener.accept()
        except OSError:  # it has gone already
            return
        connection.setblocking(False)
        client = Client(self, connection)
        if wire.peer_uid(connection) != os.geteuid():
            client.fail(VmetteError("this machine is another user's"))
        elif len(self.clients) > MAX_CLIENTS:
            client.fail(VmetteError(f"machine {self._state.name!r} has {MAX_CLIENTS} clients at once: try again later"))


class Client:
    """A connection of a client: one request, and what follows it until it is answered."""

    def __init__(self, supervisor: Supervisor, connection: socket.socket) -> None:
        self._supervisor = supervisor
        self._guest = supervisor.guest
        self._connection = connection
        self._buffer = bytearray()
        self._descriptors: list[int] = []
        self._command: Command
        self._stream: Stream | None = None
        """Of the command that it runs."""
        self._open = True
        supervisor.clients.add(self)
        self._guest.watch(connection.fileno(), self._readable)

    def _close(self) -> None:
        if self._open:
            self._open = False
            self._guest.unwatch(self._connection.fileno())
            self._connection.close()
            self._supervisor.clients.discard(self)
            self._drop_descriptors(0)

    def _drop_descriptors(self, kept: int) -> None:
        for fd in self._descriptors[kept:]:
            os.close(fd)
        del self._descriptors[kept:]

    def _answer(self, message: wire.Message) -> None:
        with suppress(OSError):  # it has gone, or does not listen
            self._connection.send(wire.encode(message))
        self._close()

    def fail(self, error: VmetteError | OSError) -> None:
        """Tells the client what went wrong."""
        code = error.exit_code if isinstance(error, VmetteError) else VmetteError.exit_code
        self._answer({"error": str(error), "exit_code": code})

    def _readable(self) -> None:
        if not self._open:  # it has been closed since it was found readable
            return
        try:
            data, descriptors = wire.receive(self._connection)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        if not data:
            self._gone()
            return
        self._descriptors += descriptors
        self._drop_descriptors(wire.STREAMS)
        self._buffer += data
        try:
            while self._open and b"\n" in self._buffer:
                line, _, self._buffer = self._buffer.partition(b"\n")
                self._take(wire.decode(bytes(line)))
            if len(self._buffer) > wire.MAX_LINE:
                raise VmetteError("a line over the machine's socket is too long")
        except (VmetteError, OSError) as error:
            self._kill()
            self.fail(error)

    def _gone(self) -> None:
        self._kill()
        self._close()

    def _kill(self) -> None:
        if self._stream is not None:
            self._guest.signal(self._stream.number, signal.SIGKILL, SignalFlag.ALL)

    def _take(self, message: wire.Message) -> None:
        if self._stream is not None:
            self._take_of_command(self._stream.number, message)
            return
        request = wire.text(message, "do")
        if request == "exec":
            self._exec(message)
            return
        if request == "stop":
            self._supervisor.stop(wire.number(message, "patience", MAX_PATIENCE))
        elif request == "signal":
            self._supervisor.signal(_signal(message))
        else:
            raise VmetteError(f"the machine's supervisor, of another version of vmette perhaps, cannot do {request!r}")
        self._answer({})

    def _take_of_command(self, stream: int, message: wire.Message) -> None:
        if "signal" in message:
            self._guest.signal(stream, _signal(message), SignalFlag.GROUP)
        elif (size := wire.size(message, "resize")) is not None:
            self._guest.resize(stream, *size)

    def _exec(self, message: wire.Message) -> None:
        argv = wire.texts(message, "argv")
        if message.get("builtin") is True:
            command = replace(Command.of(argv), builtin=True)
        else:
            cwd, user = wire.text(message, "cwd"), wire.text(message, "user")
            env = wire.text_map(message, "env")
            command = Command.of(argv, env, cwd, user, image=self._supervisor.inherited, entrypoint=())
        self._command = replace(command, terminal=wire.size(message, "terminal"))
        if len(self._descriptors) != wire.STREAMS:
            raise VmetteError("a command came over the machine's socket without its stdin, stdout and stderr")
        for fd in self._descriptors:
            os.set_blocking(fd, False)  # this loop waits for nobody
        stdin, stdout, stderr = self._descriptors
        source, *sinks = FdSource(stdin, owned=True), FdSink(stdout, owned=True), FdSink(stderr, owned=True)
        self._stream = self._guest.exec(self._command, source, sinks[0], sinks[1], self._finished)
        self._descriptors.clear()

    def _finished(self, ending: Ending) -> None:
        try:
            exited = completed(self._command, ending)
        except SandboxClosed:
            self.fail(SandboxClosed("the machine has ended"))
        except (VmetteError, OSError) as error:
            self.fail(error)
        else:
            self._answer({"exit_code": _exit_code(exited)})


def _exit_code(exited: Exited) -> int:
    """As a shell has it."""
    return 128 + exited.signal if exited.signal is not None else exited.code or 0


def _inherited(command: Command) -> ImageConfig:
    """An image that says what `command` has, but for the command."""
    entries = (os.fsdecode(entry).partition("=") for entry in command.env)
    return ImageConfig(
        env=tuple((name, value) for name, _, value in entries),
        user=None if command.user is None else os.fsdecode(command.user),
        working_dir=None if command.cwd is None else os.fsdecode(command.cwd),
    )


def _signal(message: wire.Message) -> int:
    number = wire.number(message, "signal", 64)
    if number != int(number) or number < 1:
        raise VmetteError(f"{number} is no signal of Linux")
    return int(number)

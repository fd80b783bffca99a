"""A machine that starts while Python still reads what it takes to know whether it is the one that is wanted.

That reading is a third of a run that wakes from a template, and a processor idles meanwhile. So `vmette run` notes how
it has started QEMU, and the next one that has the same words before its command starts the same at once. That is all
that it decides: when the time has come to start QEMU, with everything checked as ever, what runs already is taken if
it was started in exactly that way, and ended otherwise. The guest has been told no more by then than who it is, and
begins nothing by itself.

A note is as good as a program that this user runs. So notes are where the machines that stay have theirs, which nobody
shares or unpacks as one does a cache; and what they name of saved machines is handed to QEMU only if it is what it was
when all of it had been checked.

Nothing is imported here that Python has not read for itself: this module is what stands before the start.
"""

from __future__ import annotations

import _socket
import os
import sys
import time
import zlib

TYPE_CHECKING = False  # `typing` is one of the modules that are not read yet
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FORMAT = "4"
MAX_NOTES = 64
"""More are not kept: those that were written last are."""
MAX_NOTE = 1 << 16
"""Bytes."""
MAX_WORDS = 64
"""A run with more of them has no head start."""
MAX_PIPE = 1 << 20
"""Bytes: what a pipe may hold on most hosts (fs.pipe-max-size of Linux), and much more than a machine's state takes."""

# Descriptors of the QEMU process that every machine has.
CONTROL_FD, CONSOLE_FD = 3, 4
ENVIRONMENT = {"PATH": "/usr/bin:/bin"}


# Of docs/protocol.md.
HEADER, FIELD = 12, 8
SEED, CLOCK = 23, 24
SEED_BYTES = 64


def _filled(hello: bytes, seed: bytes, clock: int) -> bytes:
    """A HELLO with these for its SEED and CLOCK, if it has any: no two machines are told the same."""
    at, frame = HEADER, bytearray(hello)
    while at < len(frame):
        tag, size = int.from_bytes(frame[at : at + 2], "little"), int.from_bytes(frame[at + 4 : at + FIELD], "little")
        at += FIELD
        if tag in {SEED, CLOCK}:
            frame[at : at + size] = seed if tag == SEED else clock.to_bytes(8, "little")
        at += size
    return bytes(frame)


def stamp(fd: int) -> str:
    """What changes when a file becomes another one, or is written to."""
    status = os.fstat(fd)
    return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def piped(fd: int) -> int:
    """Another descriptor for what is in the file `fd`: a pipe that is full of it, if this user may have one as large.

    If not (fs.pipe-user-pages-soft and fs.pipe-max-size of Linux), it is the file. QEMU takes a machine's state from
    either; but 11.0 and later, from no file.

    Raises:
        OSError: it cannot be read, or there are too many descriptors.
    """
    import fcntl

    content = os.pread(fd, MAX_PIPE, 0)
    reading, writing = os.pipe()
    try:
        os.set_blocking(writing, False)
        fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, len(content))
        whole = os.write(writing, content) == os.fstat(fd).st_size
    except OSError:
        whole = False
    finally:
        os.close(writing)
    if whole and content:  # QEMU would wait for a first byte of an empty one
        return reading
    os.close(reading)
    return os.dup(fd)


class Start:
    """How a QEMU is started.

    Args:
        argv: Its arguments, the path of the program first.
        files: Its descriptors that are files for reading, with their paths, :func:`stamp`, and "pipe" for one that is
            :func:`piped`, or else "file".
        hello: What its guest is told at once: nothing, or HELLO (docs/protocol.md).
    """

    def __init__(
        self,
        argv: Sequence[str],
        files: Mapping[int, tuple[str, str, str]] | None = None,
        hello: bytes = b"",
    ) -> None:
        self.argv = list(argv)
        self.files = dict(files or {})
        self.hello = _filled(hello, bytes(SEED_BYTES), 0)

    def encode(self) -> bytes:
        """For a note."""
        files = [text for number, file in self.files.items() for text in (str(number), *file)]
        words = [FORMAT, self.hello.hex(), str(len(self.files)), *files]
        return b"\0".join(map(os.fsencode, [*words, *self.argv]))

    @classmethod
    def decode(cls, note: bytes) -> Start:
        """Of what :meth:`encode` has made.

        Raises:
            ValueError, IndexError: it is something else.
        """
        version, hello, count, *rest = map(os.fsdecode, note.split(b"\0"))
        if version != FORMAT:
            raise ValueError
        files = {int(rest[4 * i]): (rest[4 * i + 1], rest[4 * i + 2], rest[4 * i + 3]) for i in range(int(count))}
        return cls(rest[4 * len(files) :], files, bytes.fromhex(hello))


class Started:
    """A QEMU that runs, and this side's ends of what it is connected to, each a descriptor."""

    def __init__(self, start: Start) -> None:
        self.start = start
        self.files: dict[int, int] = {}
        self.ends: dict[int, int] = {}
        self.errors = -1
        self._gone = False
        theirs: dict[int, int] = {}
        try:
            for number, (path, state, kind) in start.files.items():
                self.files[number] = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
                if stamp(self.files[number]) != state:
                    raise FileNotFoundError
                if kind == "pipe":
                    file, self.files[number] = self.files[number], piped(self.files[number])
                    os.close(file)
            for number in (CONTROL_FD, CONSOLE_FD):
                ours, connection = _socket.socketpair()
                self.ends[number], theirs[number] = ours.detach(), connection.detach()
            self.errors, errors = os.pipe()
            theirs[1] = theirs[2] = errors
            theirs[0] = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            if start.hello:
                os.write(self.ends[CONTROL_FD], _filled(start.hello, os.urandom(SEED_BYTES), time.time_ns()))
            from .native import spawn

            self.pid = spawn(start.argv, {**theirs, **self.files}, ENVIRONMENT)
            if self.pid < 0:
                raise OSError(-self.pid, os.strerror(-self.pid))
        except BaseException:
            self.close()
            raise
        finally:
            for fd in set(theirs.values()):
                os.close(fd)

    def close(self) -> None:
        """Closes this side's ends."""
        for fd in {*self.files.values(), *self.ends.values(), self.errors} - {-1}:
            os.close(fd)

    @property
    def runs(self) -> bool:
        """Whether it has not ended by itself."""
        try:
            self._gone = self._gone or os.waitpid(self.pid, os.WNOHANG)[0] != 0
        except ChildProcessError:  # nobody here waits for children
            self._gone = True
        return not self._gone

    def kill(self) -> None:
        """Ends it."""
        from contextlib import suppress

        if self.runs:
            os.kill(self.pid, 9)
            with suppress(ChildProcessError):
                os.waitpid(self.pid, 0)
        self.close()


class HeadStart:
    """The head start of one run of the program.

    Args:
        words: Its arguments.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self._words = words
        self._before = 0
        """How many of them come before the command."""
        self._note = ""
        """Where the note is that was read."""
        self._read = self._noted = b""
        self._started: Started | None = None
        for count in range(len(words), 1, -1):
            self._note = _path(words[:count])
            try:
                self._read = _read(self._note)
                self._started = Started(Start.decode(self._read))
            except (OSError, ValueError, IndexError, OverflowError):
                continue
            return

    def end_of_options(self, command: Sequence[str]) -> None:
        """The `command` is what its arguments end with."""
        self._before = len(self._words) - len(command)

    def take(self, start: Start) -> Started | None:
        """What runs already as `start` says: the caller's from now on. None if nothing does.

        The next run begins like that, too.
        """
        from contextlib import suppress

        self._noted = start.encode()
        started = self._started
        if started is None or started.start.encode() != self._noted or not started.runs:
            self.drop()
            return None
        self._started = None
        with suppress(OSError):
            os.utime(self._note)  # it was of use
        return started

    def drop(self) -> None:
        """Ends what is not wanted."""
        started, self._started = self._started, None
        if started is not None:
            started.kill()

    def end(self) -> None:
        """Ends what nobody has taken, and notes what was wanted."""
        self.drop()
        if self._before and self._noted and self._noted != self._read:
            _write(_path(self._words[: self._before]), self._noted)


current: HeadStart | None = None
"""That of this process, if it is one."""


def begin(words: Sequence[str]) -> None:
    """Begins it, for a program that was called with `words`."""
    global current
    try:
        for fd in range(3):  # one that is closed would be given to the machine, and then taken for the user's
            os.fstat(fd)
    except OSError:
        return
    if words[:1] == ["run"] and len(words) <= MAX_WORDS and sys.platform == "linux":
        current = HeadStart(words)


def end() -> None:
    """Ends it."""
    if current is not None:
        current.end()


def _path(words: Sequence[str]) -> str:
    """Of the note for words before a command: it does not tell these, and has to differ as a rule only."""
    from .homes import state

    text = b"\0".join(map(os.fsencode, words))
    return os.path.join(state() or os.devnull, "starts", f"{zlib.crc32(text):08x}{zlib.adler32(text):08x}")


def _read(path: str) -> bytes:
    """A note of this user's, which nobody else can have written.

    Raises:
        OSError: there is none.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid() or status.st_mode & 0o7777 != 0o600:
            raise PermissionError
        return os.read(fd, MAX_NOTE)
    finally:
        os.close(fd)


def _write(path: str, note: bytes) -> None:
    """Writes a note, if it can be written."""
    from contextlib import suppress
    from pathlib import Path

    from .files import write_atomically

    with suppress(OSError):
        if len(note) < MAX_NOTE:
            write_atomically(Path(path), note, durable=False)
        notes = [(note.stat().st_mtime, note) for note in Path(path).parent.iterdir()]
        for _, old in sorted(notes)[:-MAX_NOTES]:
            old.unlink()

"""Where a command's input comes from and its output goes to, for a loop that must never wait on one of them."""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
from contextlib import suppress
from typing import Protocol

from .errors import OutputTooLarge

READ_BYTES = 65536


class Source(Protocol):
    """A command's stdin."""

    @property
    def fd(self) -> int | None:
        """The descriptor to be polled before :meth:`read`; None if it never makes one wait."""

    def read(self, size: int) -> bytes:
        """At least one and at most `size` bytes; none at its end."""

    def end(self) -> None:
        """No more is read."""


class Sink(Protocol):
    """A command's stdout or stderr."""

    @property
    def fd(self) -> int | None:
        """The descriptor to be polled before :meth:`write`; None if it never makes one wait."""

    def write(self, data: memoryview) -> int:
        """Takes some or all of `data` and says how much.

        Raises:
            BrokenPipeError: nobody reads it any more.
        """

    def end(self) -> None:
        """No more is written. May be called again."""


class BytesSource:
    """Input from memory."""

    fd = None

    def __init__(self, data: bytes) -> None:
        self._rest = memoryview(data)

    def read(self, size: int) -> bytes:
        """The next bytes."""
        piece, self._rest = bytes(self._rest[:size]), self._rest[size:]
        return piece

    def end(self) -> None:
        """Nothing to let go of."""


class FdSource:
    """Input from a descriptor of this process, which is closed at the end if it is `owned`."""

    def __init__(self, fd: int, *, owned: bool = False) -> None:
        self.fd = fd
        self._owned = owned

    def end(self) -> None:
        """Closes what is owned."""
        if self._owned:
            self._owned = False
            os.close(self.fd)

    def read(self, size: int) -> bytes:
        """What is there. One that is closed or cannot be read (a directory) is at its end."""
        try:
            return os.read(self.fd, min(size, READ_BYTES))
        except OSError as error:
            if error.errno in {errno.EBADF, errno.EISDIR, errno.EIO}:
                return b""
            raise


class Buffer:
    """Output into memory."""

    fd = None

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: memoryview) -> int:
        """Takes all of it."""
        self.data += data
        return len(data)

    def end(self) -> None:
        """Nothing to let go of."""


class Limited:
    """At most `limit` bytes of output into `sink`.

    Raises, when it is written to:
        OutputTooLarge: there would be more.
    """

    def __init__(self, sink: Sink, limit: int) -> None:
        self._sink = sink
        self._limit = self._left = limit

    @property
    def fd(self) -> int | None:
        """The sink's."""
        return self._sink.fd

    def write(self, data: memoryview) -> int:
        """Takes what the sink takes."""
        if len(data) > self._left:
            raise OutputTooLarge(
                f"the command wrote more than {self._limit} bytes: raise the limit, or have it write to a share"
            )
        written = self._sink.write(data)
        self._left -= written
        return written

    def end(self) -> None:
        """The sink's."""
        self._sink.end()


def limited(sink: Sink, limit: int | None) -> Sink:
    """`sink`, for at most `limit` bytes if there is a limit."""
    return sink if limit is None else Limited(sink, limit)


class Discard:
    """Output to nowhere."""

    fd = None

    def write(self, data: memoryview) -> int:
        """Takes all of it."""
        return len(data)

    def end(self) -> None:
        """Nothing to let go of."""


class FdSink:
    """Output to a descriptor of this process, which may be shared with others and so stays as it is: blocking.

    It is closed at the end if it is `owned`.
    """

    def __init__(self, fd: int, *, owned: bool = False) -> None:
        self.fd = fd
        self._owned = owned
        # A pipe or terminal that polls writable has room for this much (POSIX) and takes it without a wait.
        self._piece = select.PIPE_BUF
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode) or not os.get_blocking(fd):
                self._piece = 1 << 20
        except OSError:
            pass  # it is closed: write will say so

    def write(self, data: memoryview) -> int:
        """Takes as much as does not make one wait."""
        try:
            return os.write(self.fd, data[: self._piece])
        except BlockingIOError:  # somebody else made it non-blocking, and filled it
            return 0

    def end(self) -> None:
        """Closes what is owned."""
        if self._owned:
            self._owned = False
            os.close(self.fd)


class SocketSource:
    """What the other end of a stream socket of this process sends. The socket is its owner's to close."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self.fd = connection.fileno()

    def read(self, size: int) -> bytes:
        """What is there."""
        return self._socket.recv(min(size, READ_BYTES))

    def end(self) -> None:
        """Nothing to let go of."""


class SocketSink:
    """The other end of a stream socket of this process, which is non-blocking. The socket is its owner's to close."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self.fd = connection.fileno()

    def write(self, data: memoryview) -> int:
        """Takes as much as there is room for."""
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0

    def end(self) -> None:
        """The other end hears that no more comes."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

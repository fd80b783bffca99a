"""The connection to a vmette-vz: requests and their answers, and what it says by itself.

csrc/vmm_main.c has the other end, and the format of the frames.
"""

from __future__ import annotations

import enum
import errno
import itertools
import os
import queue
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from ..descriptors import receive
from ..errors import VmmError

ANSWER_SECONDS = 30.0
"""What a request may take."""
HEADER = struct.Struct("<III")
"""kind, id, bytes of payload"""
MAX_PAYLOAD = 4096
CODE = struct.Struct("<q")
PORT = struct.Struct("<I")


class Request(enum.IntEnum):
    """What vmette-vz is asked for."""

    START = 1
    PAUSE = 2
    RESUME = 3
    STOP = 4
    REQUEST_STOP = 5
    SAVE = 6
    RESTORE = 7
    CONNECT = 8
    LISTEN = 9
    UNLISTEN = 10
    IDENTIFIER = 11
    VALIDATE_SAVE = 12


class Event(enum.IntEnum):
    """What it says."""

    CREATED = 1
    DONE = 2
    FAILED = 3
    ACCEPTED = 4
    ENDED = 5


class VzCode(enum.IntEnum):
    """VZErrorCode, in the domain VZErrorDomain (Apple's VZError.h), as far as there is something to do about it."""

    INVALID_CONFIGURATION = 2
    LIMIT_EXCEEDED = 6
    OUT_OF_DISK_SPACE = 8
    SAVE = 11
    RESTORE = 12


class FrameworkError(VmmError):
    """Virtualization.framework, or vmette-vz itself, refuses. `domain` and `code` are those of its NSError."""

    def __init__(self, domain: str, code: int, text: str) -> None:
        super().__init__(_advice(domain, code, text))
        self.domain = domain
        self.code = code

    @classmethod
    def decode(cls, payload: bytes) -> FrameworkError:
        """What the payload of a frame says."""
        domain, _, text = payload[CODE.size :].partition(b"\0")
        code = CODE.unpack(payload[: CODE.size])[0] if len(payload) >= CODE.size else 0
        return cls(domain.decode(errors="replace"), code, " ".join(text.decode(errors="replace").split()))


def _advice(domain: str, code: int, text: str) -> str:
    """One line: what was wrong, and what to do."""
    if (domain, code) == ("vmette", errno.EPERM) or (
        (domain, code) == ("VZErrorDomain", VzCode.INVALID_CONFIGURATION) and "entitlement" in text
    ):
        return f"vmette-vz may not run virtual machines, for want of an entitlement: `vmette doctor` says more ({text})"
    if domain == "VZErrorDomain" and code == VzCode.LIMIT_EXCEEDED:
        return f"this Mac runs as many virtual machines as macOS allows: end another one first ({text})"
    if domain == "VZErrorDomain" and code == VzCode.OUT_OF_DISK_SPACE:
        return f"this Mac's disk is full: make room, `vmette cache prune` is one way ({text})"
    if domain == "VZErrorDomain" and code == VzCode.RESTORE:
        return f"the saved machine cannot be restored by this Mac, as after an update of macOS: make it anew ({text})"
    return f"Virtualization.framework: {text} ({domain} {code})"


@dataclass(frozen=True)
class Answer:
    """What became of a request: `fd`, if there is one, is the receiver's to close."""

    error: VmmError | None = None
    payload: bytes = b""
    fd: int | None = None


class Link:
    """One end of the connection. For all threads; a thread of its own reads.

    `ended` is told, in that thread, of the end of the machine, or that it could not be made: None if it was no failure.
    """

    def __init__(self, connection: socket.socket, ended: Callable[[FrameworkError | None], None]) -> None:
        self._connection = connection
        self._ended = ended
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, Callable[[Answer], object]] = {}
        self._listeners: dict[int, socket.socket] = {}
        self._over = False
        self._thread = threading.Thread(target=self._read, name="vmette-vz", daemon=True)
        self._thread.start()

    def hang_up(self) -> None:
        """Ends the machine, and the program. Whoever waits for an answer is told that there is none."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hangs up, and waits until all have been told."""
        self.hang_up()
        self.join()
        self._connection.close()

    def join(self) -> None:
        """Waits for the other end to hang up, once its process has ended."""
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def post(self, request: Request, payload: bytes = b"", *, answered: Callable[[Answer], object]) -> None:
        """Asks for something; `answered` is called with the answer, in the thread that reads."""
        with self._lock:
            number = next(self._numbers)
            if not self._over:
                self._waiting[number] = answered
                with suppress(OSError):  # it is gone: the thread that reads will tell
                    self._connection.sendall(HEADER.pack(request, number, len(payload)) + payload)
                return
        answered(Answer(VmmError("the VM has ended")))

    def request(self, request: Request, payload: bytes = b"", timeout: float = ANSWER_SECONDS) -> Answer:
        """Asks for something and waits for it.

        Raises:
            FrameworkError: it is refused.
            VmmError: the VM has ended.
            TimeoutError: there is no answer.
        """
        answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self.post(request, payload, answered=answers.put)
        try:
            answer = answers.get(timeout=timeout)
        except queue.Empty:
            threading.Thread(target=_drop, args=(answers,), daemon=True).start()
            raise TimeoutError(f"vmette-vz has not answered within {timeout:g} s") from None
        if answer.error is not None:
            raise answer.error
        return answer

    def listen(self, port: int) -> Listener:
        """Has connections of the guest to `port` of the host delivered.

        Raises:
            OSError: somebody listens there.
            VmmError: the VM has ended, or it has no vsock device.
        """
        ours, theirs = socket.socketpair()
        with self._lock:
            taken = self._listeners.setdefault(port, theirs) is not theirs
        if taken:
            ours.close()
            theirs.close()
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        try:
            self.request(Request.LISTEN, PORT.pack(port))
        except BaseException:
            self._forget(port)
            ours.close()
            raise
        return Listener(ours, lambda: self._stop_listening(port))

    def _stop_listening(self, port: int) -> None:
        self._forget(port)  # now, so that the port can be had again: requests are served in their order
        self.post(Request.UNLISTEN, PORT.pack(port), answered=lambda _: None)

    def _forget(self, port: int) -> None:
        with self._lock:
            listener = self._listeners.pop(port, None)
        if listener is not None:
            listener.close()

    # --- the thread that reads

    def _read(self) -> None:
        with suppress(OSError):
            while (frame := self._receive()) is not None:
                self._handle(*frame)
        with self._lock:
            self._over = True
            waiting, self._waiting = self._waiting, {}
            listeners, self._listeners = self._listeners, {}
        for answered in waiting.values():
            answered(Answer(VmmError("the VM has ended")))
        for listener in listeners.values():
            listener.close()

    def _receive(self) -> tuple[int, int, bytes, int | None] | None:
        """A frame; None at the end, or at what is no frame."""
        header = b""
        fd = None
        while len(header) < HEADER.size:
            data, fds = receive(self._connection, HEADER.size - len(header), 1)
            if not data:
                return None
            fd = fds[0] if fds else fd
            header += data
        kind, number, size = HEADER.unpack(header)
        if size > MAX_PAYLOAD:
            return None
        payload = b""
        while len(payload) < size:
            data = self._connection.recv(size - len(payload))
            if not data:
                return None
            payload += data
        return kind, number, payload, fd

    def _handle(self, kind: int, number: int, payload: bytes, fd: int | None) -> None:
        if kind in {Event.DONE, Event.FAILED} and number != 0:
            with self._lock:
                answered = self._waiting.pop(number, None)
            if answered is not None:
                answered(Answer(FrameworkError.decode(payload) if kind == Event.FAILED else None, payload, fd))
                return
        elif kind == Event.ACCEPTED and fd is not None:
            with self._lock:
                listener = self._listeners.get(number)
                if listener is not None:
                    with suppress(OSError):  # too many wait to be accepted
                        socket.send_fds(listener, [b"!"], [fd], socket.MSG_DONTWAIT)
        elif kind == Event.FAILED or (kind == Event.ENDED and payload):
            self._ended(FrameworkError.decode(payload))
        elif kind == Event.ENDED:
            self._ended(None)
        if fd is not None:
            os.close(fd)


def _drop(answers: queue.SimpleQueue[Answer]) -> None:
    """Takes the answer that nobody waits for any more."""
    if (fd := answers.get().fd) is not None:
        os.close(fd)


class Listener:
    """See :class:`vmette.vmm.base.VsockListener`."""

    def __init__(self, connection: socket.socket, close: Callable[[], None]) -> None:
        self._connection = connection
        self._connection.setblocking(False)
        self._close = close

    def fileno(self) -> int:
        """Readable when there is somebody."""
        return self._connection.fileno()

    def accept(self) -> socket.socket | None:
        """See :meth:`vmette.vmm.base.VsockListener.accept`."""
        try:
            _, fds = receive(self._connection, 1, 1)
        except OSError:
            return None
        return socket.socket(fileno=fds[0]) if fds else None

    def close(self) -> None:
        """Listens no more; those that wait are turned away."""
        self._close()
        while (connection := self.accept()) is not None:
            connection.close()
        self._connection.close()


class VzVsock:
    """A machine's vsock device."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def connect(self, port: int, timeout: float) -> socket.socket:
        """See :meth:`vmette.vmm.base.VsockDevice.connect`."""
        try:
            answer = self._link.request(Request.CONNECT, PORT.pack(port), timeout)
        except FrameworkError as error:
            if error.domain == "NSPOSIXErrorDomain":  # ECONNRESET, as a rule
                raise ConnectionRefusedError(errno.ECONNREFUSED, f"nothing listens at vsock port {port}") from error
            raise
        assert answer.fd is not None
        return socket.socket(fileno=answer.fd)

    def listen(self, port: int) -> Listener:
        """See :meth:`vmette.vmm.base.VsockDevice.listen`."""
        return self._link.listen(port)

"""What a detached machine has said: files `log.N` of frames, of which the last two are kept.

A frame is a header of 8 bytes, little-endian, and the bytes: u8 channel (1: stdout, 2: stderr, 3: a line of vmette's
own), three zero bytes, u32 length. A file that has reached `SEGMENT_BYTES` is followed by the next, and the one before
it goes: a reader that is behind by more than that misses some. The last frame is torn if the writer was killed.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ..protocol import MAX_DATA

HEADER = struct.Struct("<BxxxI")
STDOUT, STDERR, VMETTE = 1, 2, 3
SEGMENT_BYTES = 32 << 20
PREFIX = "log."


class Log:
    """Writes the log in `directory`, which has none yet. A disk that is full loses output, and stops nobody.

    All methods may be called from any thread.
    """

    def __init__(self, directory: Path, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._number = -1
        self._fd = -1
        self._size = 0
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        path = self._directory / f"{PREFIX}{self._number + 1}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        if self._fd >= 0:
            os.close(self._fd)
        self._number, self._fd, self._size = self._number + 1, fd, 0
        (self._directory / f"{PREFIX}{self._number - 2}").unlink(missing_ok=True)

    def write(self, channel: int, data: bytes | memoryview) -> None:
        """Adds a frame of at most `MAX_DATA` bytes; none to a log that is closed."""
        with self._lock, suppress(OSError):
            if self._fd < 0:
                return
            if self._size >= self._segment_bytes:
                self._begin()
            frame = HEADER.pack(channel, len(data)) + data
            try:
                written = os.write(self._fd, frame)
            except OSError:
                written = 0
            if written == len(frame):
                self._size += written
            else:  # the next frame begins where this one did
                os.ftruncate(self._fd, self._size)
                os.lseek(self._fd, self._size, os.SEEK_SET)

    def line(self, text: str) -> None:
        """Adds a line of vmette's own."""
        self.write(VMETTE, text.encode(errors="replace")[: MAX_DATA - 1] + b"\n")

    def close(self) -> None:
        """Writes no more."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


class LogSink:
    """A channel of a log as a command's output (:class:`vmette.streams.Sink`)."""

    fd = None

    def __init__(self, log: Log, channel: int) -> None:
        self._log = log
        self._channel = channel

    def write(self, data: memoryview) -> int:
        """Takes a frame's worth."""
        piece = data[:MAX_DATA]
        self._log.write(self._channel, piece)
        return len(piece)

    def end(self) -> None:
        """Nothing to let go of: the log has another channel."""


class LogReader:
    """Reads the log in the open directory `directory`. A context manager."""

    def __init__(self, directory: int) -> None:
        self._directory = directory
        self._number = -1
        self._fd = -1
        self._rest = bytearray()

    def __enter__(self) -> LogReader:
        return self

    def __exit__(self, *args: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """Channel and bytes of all frames that have come since the last call."""
        while True:
            following = self._following()
            yield from self._segment()  # to its end, to which nothing is added once there is another
            if following is None:
                return
            fd = -1
            with suppress(FileNotFoundError):  # the writer is faster
                fd = os.open(f"{PREFIX}{following}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)
            if fd >= 0:
                if self._fd >= 0:
                    os.close(self._fd)
                self._number, self._fd = following, fd
                self._rest.clear()

    def _following(self) -> int | None:
        names = (name.removeprefix(PREFIX) for name in os.listdir(self._directory))  # noqa: PTH208 (of a descriptor)
        return min((int(name) for name in names if name.isdecimal() and int(name) > self._number), default=None)

    def _segment(self) -> Iterator[tuple[int, bytes]]:
        while self._fd >= 0 and (data := os.read(self._fd, 1 << 20)):
            self._rest += data
            at = 0
            while len(self._rest) - at >= HEADER.size:
                channel, length = HEADER.unpack_from(self._rest, at)
                if len(self._rest) - at - HEADER.size < length:
                    break
                at += HEADER.size
                yield channel, bytes(self._rest[at : at + length])
                at += length
            del self._rest[:at]

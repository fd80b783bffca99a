"""A layer as we keep it: the bytes of its files, each at a block boundary, and an index of its entries.

In this form a layer can be laid over others without being read again, and an image takes over its bytes in whole runs,
which a file system with shared extents does not even copy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .archive import ArchiveError, Entry, Stream, entries

BLOCK = 4096
FORMAT = 1
"""Part of the name of what is cached: another form is another name."""
BUFFER = 1 << 20
_ZEROS = bytes(BLOCK)


@dataclass(frozen=True)
class Limits:
    """What an image may cost."""

    max_bytes: int
    """Decompressed, archive headers and all."""
    max_entries: int = 1_000_000


class _Blocks:
    """The data file being written. Blocks of zeros are left out: the file has holes there."""

    def __init__(self, file: BinaryIO, limit: int) -> None:
        self._file = file
        self._buffer = bytearray()
        self._position = 0
        """Where the buffer's first byte goes: a multiple of BLOCK."""
        self._limit = limit

    def begin(self) -> int:
        self._buffer += bytes(-len(self._buffer) % BLOCK)
        if len(self._buffer) >= BUFFER:
            self._flush()
        return self._position + len(self._buffer)

    def write(self, data: memoryview | bytes) -> None:
        self._buffer += data
        if len(self._buffer) >= BUFFER:
            self._flush()

    def skip(self, size: int) -> None:
        if self._position + len(self._buffer) + size > self._limit:
            raise ArchiveError(f"its files are larger than {self._limit} bytes")
        fill = min(size, -len(self._buffer) % BLOCK)
        self._buffer += bytes(fill)
        size -= fill
        if size >= BLOCK:
            self._flush()
            self._position += size - size % BLOCK
        self._buffer += bytes(size % BLOCK)

    def _flush(self) -> None:
        whole = len(self._buffer) - len(self._buffer) % BLOCK
        if whole > BUFFER or self._buffer.startswith(_ZEROS) or self._buffer.find(_ZEROS) >= 0:
            self._write_sparsely(whole)
        elif whole:
            os.pwrite(self._file.fileno(), memoryview(self._buffer)[:whole], self._position)
        self._position += whole
        del self._buffer[:whole]

    def _write_sparsely(self, whole: int) -> None:
        data = bytes(self._buffer[:whole])
        start = 0
        for at in range(0, whole + 1, BLOCK):
            if at == whole or data[at : at + BLOCK] == _ZEROS:
                _write_at(self._file, data[start:at], self._position + start)
                start = at + BLOCK

    def finish(self) -> None:
        end = self.begin()
        self._flush()
        self._file.truncate(end)


def _write_at(file: BinaryIO, data: bytes, position: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file.fileno(), view, position)
        position += written
        view = view[written:]


def convert(
    source: BinaryIO,
    directory: Path,
    limits: Limits,
    *,
    whiteouts: bool = True,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Reads the archive `source` into `data` and `index` in `directory`, and has the disk have them.

    Raises:
        ArchiveError: the archive is damaged, too large or hostile.
        InterruptedError: `cancelled` said so.
        OSError: it cannot be read or written.
    """
    with (directory / "data").open("xb") as file:
        blocks = _Blocks(file, limits.max_bytes)
        stream = Stream(source, limits.max_bytes, cancelled)
        rows = [_row(e) for e in entries(stream, blocks, max_entries=limits.max_entries, whiteouts=whiteouts)]
        blocks.finish()
        file.flush()
        os.fsync(file.fileno())
    with (directory / "index").open("x", encoding="ascii") as index:
        json.dump(rows, index, separators=(",", ":"))
        index.flush()
        os.fsync(index.fileno())


def _row(e: Entry) -> list[object]:
    xattrs = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in sorted(e.xattrs.items())]
    names = e.path.decode("latin-1"), e.target.decode("latin-1")
    return [names[0], e.kind, e.mode, e.uid, e.gid, e.mtime, e.size, e.offset, names[1], *e.device, xattrs]


def read_index(directory: Path) -> list[Entry]:
    """The entries of the layer that :func:`convert` wrote to `directory`."""
    found = []
    for path, kind, mode, uid, gid, mtime, size, offset, target, major, minor, xattrs in json.loads(
        (directory / "index").read_text("ascii")
    ):
        attributes = {name.encode("latin-1"): value.encode("latin-1") for name, value in xattrs}
        names = path.encode("latin-1"), target.encode("latin-1")
        found.append(Entry(names[0], kind, mode, uid, gid, mtime, size, offset, names[1], (major, minor), attributes))
    return found

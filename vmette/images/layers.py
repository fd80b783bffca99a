"""A layer as we keep it: the bytes of its files, each at a block boundary, and an index, which has a line per entry.

In this form a layer can be laid over others without being read again, and an image takes over its bytes in whole runs,
which a file system with shared extents does not even copy.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from .archive import ArchiveError, Entry, Stream, entries

BLOCK = 4096
FORMAT = 2
"""Part of the name of what is cached: another form is another name."""
BUFFER = 1 << 20
LINES = 1000
"""Of an index that are read at once."""
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
        data = bytes(memoryview(self._buffer)[:whole])
        start = 0
        if _ZEROS in data:
            for at in range(0, whole, BLOCK):
                if data[at : at + BLOCK] == _ZEROS:
                    write_at(self._file.fileno(), data[start:at], self._position + start)
                    start = at + BLOCK
        write_at(self._file.fileno(), data[start:], self._position + start)
        self._position += whole
        del self._buffer[:whole]

    def finish(self) -> None:
        end = self.begin()
        self._flush()
        self._file.truncate(end)


def write_at(fd: int, data: bytes, position: int) -> None:
    """Writes all of `data`: one call of the kernel's may write less, on a disk that is almost full."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, position)
        position += written
        view = view[written:]


def extents(source: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int]]:
    """What of the file's bytes from `start` to `end` is no hole, as far as its file system knows: (start, end) each.

    Raises:
        OSError: the file ends more than a block before `end`. A file of the host need not end with a whole block.
    """
    size = os.fstat(source.fileno()).st_size
    if size <= end - BLOCK:
        raise OSError(f"the cached layer {source.name} is shorter than its index says")
    end = min(end, size)
    while start < end:
        try:
            start = os.lseek(source.fileno(), start, os.SEEK_DATA)
            hole = os.lseek(source.fileno(), start, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            hole = end  # a file system that does not know
        if start < end:
            yield start, min(hole, end)
        start = hole


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
        with (directory / "index").open("x", encoding="ascii") as index:
            for e in spooled(source, file, limits, whiteouts=whiteouts, cancelled=cancelled):
                index.write(json.dumps(_row(e), separators=(",", ":")) + "\n")
            index.flush()
            os.fsync(index.fileno())
        file.flush()
        os.fsync(file.fileno())


def spooled(
    source: BinaryIO,
    file: BinaryIO,
    limits: Limits,
    *,
    whiteouts: bool = True,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Entry]:
    """The entries of the archive `source`; the bytes of its files go to `file`, which is empty.

    Raises:
        ArchiveError, InterruptedError, OSError: as :func:`convert`.
    """
    blocks = _Blocks(file, limits.max_bytes)
    stream = Stream(source, limits.max_bytes, cancelled)
    yield from entries(stream, blocks, max_entries=limits.max_entries, whiteouts=whiteouts)
    blocks.finish()


def _row(e: Entry) -> list[object]:
    xattrs = [[name.decode("latin-1"), value.decode("latin-1")] for name, value in sorted(e.xattrs.items())]
    names = e.path.decode("latin-1"), e.target.decode("latin-1")
    return [names[0], e.kind, e.mode, e.uid, e.gid, e.mtime, e.size, e.offset, names[1], *e.device, xattrs]


class DamagedLayer(OSError):
    """What is kept of a layer is not what :func:`convert` wrote."""

    def __init__(self, directory: Path) -> None:
        super().__init__(errno.EIO, "the cached layer is damaged; clear the cache (vmette cache prune --all)")
        self.filename = str(directory)
        self.directory = directory


def read_index(directory: Path) -> list[Entry]:
    """The entries of the layer that :func:`convert` wrote to `directory`.

    Raises:
        DamagedLayer: they are not there, or are none.
        OSError: they cannot be read.
    """
    path = directory / "index"
    try:
        with path.open(encoding="ascii") as index:
            found: list[Entry] = []
            while lines := list(islice(index, LINES)):
                found += [_entry(*row) for row in json.loads(f"[{','.join(lines)}]")]
            return found
    except (FileNotFoundError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedLayer(directory) from error


def _entry(
    path: str,
    kind: str,
    mode: int,
    uid: int,
    gid: int,
    mtime: int,
    size: int,
    offset: int,
    target: str,
    major: int,
    minor: int,
    xattrs: list[tuple[str, str]],
) -> Entry:
    names = path.encode("latin-1"), target.encode("latin-1")
    entry = Entry(names[0], kind, mode, uid, gid, mtime, size, offset, names[1], (major, minor))
    if not xattrs:
        return entry
    return entry._replace(xattrs={name.encode("latin-1"): value.encode("latin-1") for name, value in xattrs})

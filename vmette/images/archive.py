"""Reading archives that nobody trusts: compressed streams, and the entries of a tar in them."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, Protocol, cast

from ..errors import VmetteError

CHUNK = 1 << 18
MAX_HEADER = 1 << 20
"""The most bytes that one entry's extended header, long name or sparse map may have."""
MAX_PATH = 4095
MAX_NAME = 255
MAX_XATTRS = 16384
"""The most bytes of names and values of the attributes of one entry."""
MEMORY_LIMIT = 128 << 20
"""What an archive may make xz and zstd allocate (zstd's own limit is the same)."""

GZIP, BZIP2, XZ, ZSTD = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"


class ArchiveError(VmetteError):
    """An archive is damaged, larger than it may be, or asks for what no archive may ask for."""


# --- Decompression ---------------------------------------------------------------------------------------------------


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, max_length: int = ...) -> bytes: ...


class _Gzip:
    """zlib's decompressor with the manners of those of bz2, lzma and zstd."""

    def __init__(self) -> None:
        import zlib

        self._inner = zlib.decompressobj(16 + zlib.MAX_WBITS)
        self._error = zlib.error

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max(0, max_length))

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data


def _bzip2() -> _Decompressor:
    import bz2

    return bz2.BZ2Decompressor()


def _xz() -> _Decompressor:
    import lzma

    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MEMORY_LIMIT)


def _zstd() -> _Decompressor:
    try:
        from compression.zstd import ZstdDecompressor
    except ImportError:  # before Python 3.14
        from backports.zstd import ZstdDecompressor
    decompressor: _Decompressor = ZstdDecompressor()
    return decompressor


_FORMATS: dict[bytes, Callable[[], _Decompressor]] = {GZIP: _Gzip, BZIP2: _bzip2, XZ: _xz, ZSTD: _zstd}


def _format(start: bytes) -> Callable[[], _Decompressor] | None:
    if start[:1] and 0x50 <= start[0] <= 0x5F and start[1:4] == b"\x2a\x4d\x18":  # zstd's skippable frame
        return _zstd
    return next((make for magic, make in _FORMATS.items() if start.startswith(magic)), None)


class Stream:
    """The decompressed bytes of a file, forwards only: gzip, bzip2, xz, zstd or plain, by its first bytes.

    Archives of several members or frames one after the other are one stream. Memory is bounded whatever the data is.

    Args:
        limit: The most decompressed bytes that are taken.
        cancelled: Is asked now and then whether to give up, by an InterruptedError.

    Raises:
        ArchiveError: from any reading: the data is damaged, or longer than `limit`.
    """

    def __init__(self, file: BinaryIO, limit: int, cancelled: Callable[[], bool] = lambda: False) -> None:
        self._file = file
        self._cancelled = cancelled
        self._left = limit
        self._limit = limit
        self._input = file.read(CHUNK)
        self._make = _format(self._input)
        self._decompressor = self._make() if self._make else None
        self._buffer = b""
        self._at = 0
        self._position = 0
        self.last_read = b""
        """What the last :meth:`read` gave."""

    def _more(self) -> bytes:
        """The next decompressed bytes; none at the end."""
        while True:
            if self._cancelled():
                raise InterruptedError
            if self._decompressor is None:
                data, self._input = self._input, b""
                data = data or self._file.read(CHUNK)
            else:
                some = self._decompressed(self._decompressor)
                if some is None:
                    continue
                data = some
            self._left -= len(data)
            if self._left < 0:
                raise ArchiveError(f"it holds more than {self._limit} bytes")
            return data

    def _decompressed(self, decompressor: _Decompressor) -> bytes | None:
        """Some bytes; none at the end; None to be asked again."""
        if decompressor.eof:
            rest = decompressor.unused_data
            while rest and not rest.strip(b"\0"):
                rest = self._file.read(CHUNK)  # padding
            rest = rest.lstrip(b"\0") or self._file.read(CHUNK).lstrip(b"\0")
            if not rest:
                return b""
            if len(rest) < 6:
                rest += self._file.read(CHUNK)
            make = _format(rest)
            if make is None:
                raise ArchiveError("there is something else after the compressed data")
            self._decompressor, self._input = make(), rest
            return None
        if decompressor.needs_input and not self._input:
            self._input = self._file.read(CHUNK)
            if not self._input:
                raise ArchiveError("the compressed data ends early")
        data, self._input = self._input, b""
        try:
            return decompressor.decompress(data, CHUNK) or None
        except MemoryError:
            raise
        except Exception as error:  # zlib.error, OSError, LZMAError, ZstdError: each library has its own
            raise ArchiveError(f"the compressed data is damaged: {error}") from error

    def read_some(self, size: int) -> memoryview:
        """At least one and at most `size` bytes; none at the end."""
        if self._at == len(self._buffer):
            self._buffer, self._at = self._more(), 0
        piece = memoryview(self._buffer)[self._at : self._at + size]
        self._at += len(piece)
        self._position += len(piece)
        return piece

    # What tarfile wants of a file.

    def read(self, size: int = -1) -> bytes:
        """`size` bytes, or what there is until the end. It is for headers: no header is larger than MAX_HEADER."""
        if not 0 <= size <= MAX_HEADER:
            raise ArchiveError(f"an entry's header is larger than {MAX_HEADER} bytes")
        pieces = bytearray()
        while len(pieces) < size and (piece := self.read_some(size - len(pieces))):
            pieces += piece
        self.last_read = bytes(pieces)
        return self.last_read

    def tell(self) -> int:
        """How many bytes have been read."""
        return self._position

    def seek(self, position: int, whence: int = 0) -> int:
        """Goes on to `position`."""
        if whence != 0 or position < self._position:
            raise ArchiveError("an entry's data overlaps another's")
        while self._position < position and self.read_some(position - self._position):
            pass
        return self._position


# --- Entries ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One entry of a layer. Which fields mean something depends on `kind`."""

    path: bytes
    """Relative to the root, no `.`, `..` or empty component; the root itself is empty."""
    kind: str
    """f: file, d: directory, l: symlink, h: hard link, c, b: devices, p: FIFO, w: whiteout, o: opaque directory."""
    mode: int = 0
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    """Nanoseconds since 1970."""
    size: int = 0
    offset: int = 0
    """Where in the layer's data a file's bytes are."""
    target: bytes = b""
    device: tuple[int, int] = (0, 0)
    xattrs: dict[bytes, bytes] = field(default_factory=dict)


WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
_KINDS = {
    tarfile.REGTYPE: "f",
    tarfile.AREGTYPE: "f",
    tarfile.CONTTYPE: "f",
    tarfile.GNUTYPE_SPARSE: "f",
    tarfile.DIRTYPE: "d",
    tarfile.SYMTYPE: "l",
    tarfile.LNKTYPE: "h",
    tarfile.CHRTYPE: "c",
    tarfile.BLKTYPE: "b",
    tarfile.FIFOTYPE: "p",
}
_XATTR = "SCHILY.xattr."
_KEPT = (b"user.", b"security.", b"trusted.", b"system.posix_acl_access", b"system.posix_acl_default")
# An overlay reads its own attributes in its lower layer: an image has no say in that. The others belong to the host
# that made the archive.
_DROPPED = (b"trusted.overlay.", b"user.overlay.", b"security.selinux", b"security.ima", b"security.evm")


def clean_path(name: bytes) -> bytes:
    """The path of an entry, relative to the root.

    Raises:
        ArchiveError: it leads out of the root, or is longer than Linux takes.
    """
    parts = [part for part in name.split(b"/") if part not in {b"", b"."}]
    if b".." in parts:
        raise ArchiveError(f"the entry {_shown(name)} leads out of the root")
    if b"\0" in name or any(len(part) > MAX_NAME for part in parts):
        raise ArchiveError(f"the entry {_shown(name)} has a name that Linux does not take")
    path = b"/".join(parts)
    if len(path) > MAX_PATH:
        raise ArchiveError(f"the entry {_shown(name)} has a path that is longer than {MAX_PATH} bytes")
    return path


def _shown(name: bytes) -> str:
    text = repr(name[:60].decode("utf-8", "replace"))
    return text if len(name) <= 60 else f"{text}…"


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _xattrs(headers: Mapping[str, str]) -> dict[bytes, bytes]:
    found = {}
    total = 0
    for key, value in headers.items():
        if not key.startswith(_XATTR):
            continue
        name = _bytes(key[len(_XATTR) :])
        if not name.startswith(_KEPT) or name.startswith(_DROPPED) or name in _KEPT[:3]:
            continue
        found[name] = _bytes(value)
        total += len(name) + len(found[name])
        if len(name) > MAX_NAME or b"\0" in name or total > MAX_XATTRS:
            raise ArchiveError(f"an entry has extended attributes of more than {MAX_XATTRS} bytes")
    return found


def _mtime(headers: Mapping[str, str], seconds: float) -> int:
    text = headers.get("mtime")
    if text is not None:  # a float has not the digits
        whole, _, fraction = text.partition(".")
        digits = (fraction + "000000000")[:9]
        if whole.lstrip("-").isdecimal() and digits.isdecimal() and len(whole) <= 12:
            nanoseconds = int(whole) * 10**9
            return nanoseconds - int(digits) if whole.startswith("-") else nanoseconds + int(digits)
    return int(seconds) * 10**9 if abs(seconds) < 1e12 else 0


class Data(Protocol):
    """Takes the bytes of files."""

    def begin(self) -> int:
        """Starts another file, and says where it is."""

    def write(self, data: memoryview | bytes) -> None:
        """Takes more of it."""

    def skip(self, size: int) -> None:
        """Takes `size` zeros."""


def entries(stream: Stream, data: Data, *, max_entries: int, whiteouts: bool) -> Iterator[Entry]:
    """The entries of the tar in `stream`, in its order; the bytes of its files go to `data`.

    Formats are those of the standard library: ustar, GNU and PAX, sparse files among them. Sockets, and types that
    nobody knows, are left out. With `whiteouts`, names that begin with `.wh.` are what OCI's image-spec says in
    layer.md, and not entries.

    Raises:
        ArchiveError: the archive is damaged or hostile.
    """
    count = 0
    try:
        with tarfile.TarFile(fileobj=stream, mode="r", encoding="utf-8", errors="surrogateescape") as tar:  # type: ignore[arg-type]
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it keeps them all, and nobody needs them
                count += 1
                if count > max_entries:
                    raise ArchiveError(f"it has more than {max_entries} entries")
                entry = _entry(info, stream, data, whiteouts=whiteouts)
                if entry is not None:
                    yield entry
            if stream.last_read.strip(b"\0"):  # tarfile takes a damaged header for the end
                raise ArchiveError("the archive ends within a header, or has a damaged one")
            while stream.read_some(CHUNK):  # what is wrong with the rest is wrong with the archive
                pass
    except ArchiveError:
        raise
    except (tarfile.TarError, ValueError, OverflowError, EOFError, IndexError, TypeError) as error:
        # What tarfile lets through of a damaged header depends on the version of Python.
        raise ArchiveError(f"it is no tar archive, or a damaged one: {error}") from error


def _entry(info: tarfile.TarInfo, stream: Stream, data: Data, *, whiteouts: bool) -> Entry | None:
    path = clean_path(_bytes(info.name))
    directory, _, name = path.rpartition(b"/")
    if whiteouts and name.startswith(WHITEOUT):
        if name == OPAQUE:
            return Entry(directory, "o")
        hidden = name[len(WHITEOUT) :]
        if hidden.startswith(b".wh."):  # .wh..wh.plnk and its like: aufs' own affairs
            return None
        if hidden in {b"", b".", b".."}:
            raise ArchiveError(f"the whiteout {_shown(path)} hides nothing that could be there")
        return Entry(directory + b"/" + hidden if directory else hidden, "w")
    kind = _KINDS.get(info.type)
    if kind is None or (not path and kind != "d"):
        return None
    mode = info.mode & 0o7777
    attributes = _xattrs(info.pax_headers) if kind != "h" else {}
    mtime = _mtime(info.pax_headers, info.mtime)
    target, offset, size, device = b"", 0, 0, (0, 0)
    if kind in "lh":
        target = _bytes(info.linkname)
        if kind == "h":
            target = clean_path(target)
        elif not target or b"\0" in target or len(target) > MAX_PATH:
            raise ArchiveError(f"the symlink {_shown(path)} has no target that Linux takes")
    elif kind in "cb":
        device = (info.devmajor, info.devminor)
        if not (0 <= device[0] < 1 << 12 and 0 <= device[1] < 1 << 20):
            raise ArchiveError(f"the device {_shown(path)} has a number that Linux does not take")
    elif kind == "f":
        offset, size = data.begin(), info.size
        if info.sparse is not None:
            stream.seek(info.offset_data)
            _copy_sparse(cast("list[tuple[int, int]]", info.sparse), size, stream, data)
        else:
            _copy(stream, data, size)
    for number in (info.uid, info.gid):
        if not 0 <= number < (1 << 32) - 1:
            raise ArchiveError(f"the entry {_shown(path)} has an owner that Linux does not take")
    return Entry(path, kind, mode, info.uid, info.gid, mtime, size, offset, target, device, attributes)


def _copy(stream: Stream, data: Data, size: int) -> None:
    if size < 0:
        raise ArchiveError("an entry has a negative size")
    while size:
        piece = stream.read_some(size)
        if not piece:
            raise ArchiveError("the archive ends within a file")
        data.write(piece)
        size -= len(piece)


def _copy_sparse(pieces: Iterable[tuple[int, int]], end: int, stream: Stream, data: Data) -> None:
    """GNU's sparse files: of the file's `end` bytes the archive has those of `pieces`, (offset, size) each."""
    at = 0
    for offset, size in pieces:
        if size == 0:
            continue
        if offset < at or offset + size > end:
            raise ArchiveError("a sparse file has a map that makes no sense")
        data.skip(offset - at)
        _copy(stream, data, size)
        at = offset + size
    data.skip(end - at)

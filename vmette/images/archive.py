"""Reading archives that nobody trusts: compressed streams, and the entries of a tar in them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import BinaryIO, NamedTuple, Protocol

from ..errors import VmetteError

CHUNK = 1 << 18
INPUT = 1 << 15
"""Compressed bytes that are read at once. A decompressor copies what it does not need, and there may be a member of
gzip in every twenty bytes."""
MAX_HEADER = 1 << 20
"""The most bytes that one entry's headers, long names and sparse map may have."""
MAX_PATH = 4095
MAX_NAME = 255
MAX_XATTRS = 16384
"""The most bytes of names and values of the attributes of one entry."""
MAX_TEXT = 256 << 20
"""The most bytes of paths, targets and attributes of all entries: we hold them in memory."""
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
        self._input = file.read(INPUT)
        # The name that a plain archive begins with may look like anything: what is a tar header is nothing else.
        make = None if _is_header(self._input[:RECORD]) else _format(self._input)
        self._decompressor = make() if make else None
        self._buffer = b""
        self._at = 0

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
            rest = self._input or decompressor.unused_data or self._file.read(INPUT)
            if not rest:
                return b""
            self._input = b""
            rest = rest.lstrip(b"\0")  # padding
            if len(rest) < 6:
                more = self._file.read(INPUT)
                if more and not rest:
                    self._input = more
                    return None
                rest += more
            if not rest:
                return b""
            make = _format(rest)
            if make is None:
                raise ArchiveError("there is something else after the compressed data")
            self._decompressor, self._input = make(), rest
            return None
        if decompressor.needs_input and not self._input:
            self._input = self._file.read(INPUT)
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
        return piece

    def read(self, size: int) -> bytes:
        """`size` bytes, or what there is until the end."""
        data = self._buffer[self._at : self._at + size]
        self._at += len(data)
        while len(data) < size and (piece := self.read_some(size - len(data))):
            data += piece
        return data


# --- Headers ---------------------------------------------------------------------------------------------------------

# Not the standard library's tarfile: what that makes of a hostile header (its time, its memory, its depth of recursion,
# which damage it takes for the end) depends on the version of Python.

RECORD = 512
_END = bytes(RECORD)
# name, mode, uid, gid, size, mtime, checksum, type, linkname, magic, owners' names, devmajor, devminor, prefix
_USTAR = struct.Struct("100s8s8s8s12s12s8sc100s8s64x8s8s155s12x")
_OLD_MAP = slice(386, 482)
_PAX_OF_ALL = (b"uid", b"gid", b"mtime")
"""What a global extended header may say: all else is of one entry only, whatever POSIX lets it be."""


def _is_header(block: bytes) -> bool:
    """Whether its checksum, which old programs took of signed bytes, is right."""
    if len(block) < RECORD:
        return False
    try:
        checksum = _number(block[148:156])
    except ArchiveError:
        return False
    rest = block[:148] + block[156:]
    return checksum in {256 + sum(rest), 256 + sum(rest) - 256 * sum(byte > 127 for byte in rest)}


@dataclass(slots=True)
class _Header:
    """What the headers of one entry say, all of them together."""

    name: bytes
    kind: bytes
    """The type flag."""
    mode: int
    uid: int
    gid: int
    mtime: int
    """Nanoseconds."""
    target: bytes
    device: tuple[bytes, bytes]
    """As they are in the header: only a device's need make sense."""
    stored: int
    """Bytes that follow in the archive, without padding."""
    padding: int
    size: int
    """Of the file."""
    pieces: list[tuple[int, int]] | None
    """A sparse file's (offset, size) that are in the archive."""
    xattrs: dict[bytes, bytes]


def _number(field: bytes) -> int:
    """A number of a header: octal, or GNU's base 256."""
    if field[0] & 0x80:
        bits = 8 * len(field) - 1
        value = int.from_bytes(field, "big") & (1 << bits) - 1
        return value - (value >> bits - 1 << bits)
    text = field.strip(b" \0").partition(b"\0")[0].rstrip(b" ")
    if text.strip(b"01234567"):
        raise ArchiveError("an entry's header has a number that is none")
    return int(text, 8) if text else 0


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise ArchiveError("an entry's extended header has a number that is none")
    return int(text)


def _records(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The records of a PAX header: LENGTH, a space, KEY=VALUE, a newline; LENGTH counts all of that."""
    at = 0
    while at < len(data) and data[at]:
        digits = data[at : at + 20].partition(b" ")[0]
        end = at + _decimal(digits)
        key, equals, value = data[at + len(digits) + 1 : end].partition(b"=")
        if end > len(data) or not equals or value[-1:] != b"\n":
            raise ArchiveError("an entry's extended header is damaged")
        yield key, value[:-1]
        at = end


class _Headers:
    """Reads headers. Between two of them somebody has to read the first one's data, and its padding."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._of_all: dict[bytes, bytes] = {}
        self._left = 0
        """What the headers of this entry may still have."""
        self._first = True

    def _take(self, size: int) -> bytes:
        if size > self._left:
            raise ArchiveError(f"an entry's header is larger than {MAX_HEADER} bytes")
        self._left -= size
        data = self._stream.read(size)
        if len(data) < size:
            raise ArchiveError("the archive ends within a header")
        return data

    def _block(self) -> bytes | None:
        """The next header's bytes; None at the end."""
        if self._left < RECORD:
            raise ArchiveError(f"an entry's header is larger than {MAX_HEADER} bytes")
        self._left -= RECORD
        block = self._stream.read(RECORD)
        first, self._first = self._first, False
        if block == _END or (not block and not first):
            return None
        if _is_header(block):
            return block
        if first:
            raise ArchiveError("it is no tar archive")
        raise ArchiveError("the archive ends within a header, or has a damaged one")

    def next(self) -> _Header | None:
        """The next entry's; None at the end."""
        self._left = MAX_HEADER
        name = target = None
        pax: dict[bytes, bytes] = {}
        pieces: list[int] = []
        """PAX 0.0's offsets and sizes, which are records of the same keys again and again."""
        extended = False
        while True:
            block = self._block()
            if block is None:
                if extended:
                    raise ArchiveError("the archive ends within a header")
                return None
            kind = block[156:157]
            if kind not in b"LKxXg":
                break
            size = _number(block[124:136])
            if size < 0:
                raise ArchiveError("an entry has a negative size")
            data = self._take(size + -size % RECORD)[:size]
            extended = extended or kind != b"g"
            if kind == b"L":
                name = data.partition(b"\0")[0]
            elif kind == b"K":
                target = data.partition(b"\0")[0]
            elif kind == b"g":
                self._of_all.update((k, v) for k, v in _records(data) if k in _PAX_OF_ALL)
            else:
                for key, value in _records(data):
                    if key in {b"GNU.sparse.offset", b"GNU.sparse.numbytes"}:
                        pieces.append(_decimal(value))
                    elif value or key.startswith(_XATTR):
                        pax[key] = value
        return self._entry(block, name, target, {**self._of_all, **pax}, pieces)

    def _entry(
        self, block: bytes, name: bytes | None, target: bytes | None, pax: dict[bytes, bytes], pairs: list[int]
    ) -> _Header:
        own, mode, uid, gid, size, mtime, _, kind, link, magic, major, minor, prefix = _USTAR.unpack(block)
        if name is None:
            name = own.partition(b"\0")[0]
            prefix = prefix.partition(b"\0")[0]
            if magic[:6] == b"ustar\0" and prefix:
                name = prefix + b"/" + name
        name = pax.get(b"path", name)
        if kind == b"\0":  # v7
            kind = b"5" if name.endswith(b"/") else b"0"
        stored = _decimal(pax[b"size"]) if b"size" in pax else _number(size)
        if kind in b"123456":
            stored = 0  # whatever it says
        if stored < 0:
            raise ArchiveError("an entry has a negative size")
        header = _Header(
            name,
            kind,
            _number(mode) & 0o7777,
            _decimal(pax[b"uid"]) if b"uid" in pax else _number(uid),
            _decimal(pax[b"gid"]) if b"gid" in pax else _number(gid),
            _mtime(pax.get(b"mtime", b""), _number(mtime)),
            pax.get(b"linkpath", link.partition(b"\0")[0] if target is None else target),
            (major, minor),
            stored,
            -stored % RECORD,
            stored,
            None,
            _xattrs(pax),
        )
        if kind == b"S":
            self._old_sparse(header, block)
        elif kind in b"07":
            self._pax_sparse(header, pax, pairs)
        return header

    def _old_sparse(self, header: _Header, block: bytes) -> None:
        """GNU's own format: four pieces in the header, 21 in each block that follows it."""
        header.size = _number(block[483:495])
        table, more = block[_OLD_MAP], block[482]
        fields: list[bytes] = []
        while True:
            fields += [table[at : at + 12] for at in range(0, len(table) - 11, 12)]
            if not more:
                break
            block = self._take(RECORD)
            table, more = block[:504], block[504]
        header.pieces = [
            (_number(offset), _number(size))
            for offset, size in zip(fields[::2], fields[1::2], strict=True)
            if offset.strip(b"\0 ")
        ]

    def _pax_sparse(self, header: _Header, pax: dict[bytes, bytes], pairs: list[int]) -> None:
        """GNU's sparse files in PAX headers: 0.0 in many records, 0.1 in one, 1.0 before the file's data."""
        if pax.get(b"GNU.sparse.major") == b"1" and pax.get(b"GNU.sparse.minor") == b"0":
            pairs = self._map_before_data(header)
        elif b"GNU.sparse.map" in pax:
            pairs = [_decimal(number) for number in pax[b"GNU.sparse.map"].split(b",")]
        elif b"GNU.sparse.size" not in pax:
            return
        if len(pairs) % 2:
            raise ArchiveError("a sparse file has a map that makes no sense")
        header.size = _decimal(pax.get(b"GNU.sparse.realsize") or pax.get(b"GNU.sparse.size", b""))
        header.name = pax.get(b"GNU.sparse.name", header.name)
        header.pieces = list(zip(pairs[::2], pairs[1::2], strict=True))

    def _map_before_data(self, header: _Header) -> list[int]:
        numbers: list[int] = []
        text = b""
        while not numbers or len(numbers) <= 2 * numbers[0]:
            line, newline, rest = text.partition(b"\n")
            if newline:
                numbers.append(_decimal(line))
                text = rest
            elif len(text) > 20 or header.stored < RECORD:
                raise ArchiveError("a sparse file has a map that makes no sense")
            else:
                text += self._take(RECORD)
                header.stored -= RECORD
        return numbers[1:]


# --- Entries ---------------------------------------------------------------------------------------------------------


class Entry(NamedTuple):
    """One entry of a layer. Which fields mean something depends on `kind`."""

    # There are many of them: a tuple is made faster than anything else.

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
    xattrs: Mapping[bytes, bytes] = MappingProxyType({})

    @property
    def text(self) -> int:
        """Bytes of its names and attributes: see :data:`MAX_TEXT`."""
        names = len(self.path) + len(self.target)
        return names + sum(map(len, self.xattrs)) + sum(map(len, self.xattrs.values())) if self.xattrs else names


WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"
_KINDS = {b"0": "f", b"7": "f", b"S": "f", b"5": "d", b"2": "l", b"1": "h", b"3": "c", b"4": "b", b"6": "p"}
_XATTR = b"SCHILY.xattr."
_KEPT = (b"user.", b"security.", b"trusted.")
_ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")
# An overlay reads its own attributes in its lower layer: an image has no say in that. The others belong to the host
# that made the archive.
_DROPPED = (b"trusted.overlay.", b"user.overlay.", b"security.selinux", b"security.ima", b"security.evm")


def clean_path(name: bytes, *, whiteouts: bool = False) -> bytes:
    """The path of an entry, relative to the root. The mark of a whiteout may be more than a name's length.

    Raises:
        ArchiveError: it leads out of the root, or is longer than Linux takes.
    """
    parts = [part for part in name.split(b"/") if part not in {b"", b"."}]
    if b".." in parts:
        raise ArchiveError(f"the entry {_shown(name)} leads out of the root")
    path = b"/".join(parts)
    if whiteouts and parts and parts[-1].startswith(WHITEOUT):
        parts[-1] = parts[-1][len(WHITEOUT) :]
    if b"\0" in name or any(len(part) > MAX_NAME for part in parts):
        raise ArchiveError(f"the entry {_shown(name)} has a name that Linux does not take")
    if sum(map(len, parts)) + len(parts) - 1 > MAX_PATH:
        raise ArchiveError(f"the entry {_shown(name)} has a path that is longer than {MAX_PATH} bytes")
    return path


def _shown(name: bytes) -> str:
    text = repr(name[:60].decode("utf-8", "replace"))
    return text if len(name) <= 60 else f"{text}…"


def _xattrs(headers: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    found = {}
    total = 0
    for key, value in headers.items():
        if not key.startswith(_XATTR):
            continue
        name = key[len(_XATTR) :]
        if name not in _ACLS and (not name.startswith(_KEPT) or name.startswith(_DROPPED) or name in _KEPT):
            continue
        found[name] = value
        total += len(name) + len(value)
        if len(name) > MAX_NAME or b"\0" in name or total > MAX_XATTRS:
            raise ArchiveError(f"an entry has extended attributes of more than {MAX_XATTRS} bytes")
    return found


def _mtime(text: bytes, seconds: int) -> int:
    """Nanoseconds: of a PAX header's text, which has a fraction, or else of the header's seconds."""
    whole, _, fraction = text.partition(b".")
    minus = whole.startswith(b"-")
    digits = (fraction + b"000000000")[:9]
    if whole[minus:].isdigit() and digits.isdigit() and len(whole) <= 12:
        nanoseconds = int(whole) * 10**9
        return nanoseconds - int(digits) if minus else nanoseconds + int(digits)
    return seconds * 10**9 if abs(seconds) < 10**12 else 0


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

    Formats are v7, ustar, GNU and PAX, sparse files among them. Sockets, and types that nobody knows, are left out.
    With `whiteouts`, names that begin with `.wh.` are what OCI's image-spec says in layer.md, and not entries.

    Raises:
        ArchiveError: the archive is damaged or hostile.
    """
    headers = _Headers(stream)
    count = text = 0
    while (header := headers.next()) is not None:
        count += 1
        if count > max_entries:
            raise ArchiveError(f"it has more than {max_entries} entries")
        entry = _entry(header, stream, data, whiteouts=whiteouts)
        _skip(stream, header.stored + header.padding)
        if entry is not None:
            text += entry.text
            if text > MAX_TEXT:
                raise ArchiveError(f"its names and attributes are more than {MAX_TEXT} bytes")
            yield entry
    while stream.read_some(CHUNK):  # what is wrong with the rest is wrong with the archive
        pass


def _entry(header: _Header, stream: Stream, data: Data, *, whiteouts: bool) -> Entry | None:
    path = clean_path(header.name, whiteouts=whiteouts)
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
    kind = _KINDS.get(header.kind)
    if kind is None or (not path and kind != "d"):
        return None
    for number in (header.uid, header.gid):
        if not 0 <= number < (1 << 32) - 1:
            raise ArchiveError(f"the entry {_shown(path)} has an owner that Linux does not take")
    target, offset, size, device = b"", 0, 0, (0, 0)
    if kind in "lh":
        target = header.target
        if kind == "h":
            target = clean_path(target)
        elif not target or b"\0" in target or len(target) > MAX_PATH:
            raise ArchiveError(f"the symlink {_shown(path)} has no target that Linux takes")
    elif kind in "cb":
        device = (_number(header.device[0]), _number(header.device[1]))
        if not (0 <= device[0] < 1 << 12 and 0 <= device[1] < 1 << 20):
            raise ArchiveError(f"the device {_shown(path)} has a number that Linux does not take")
    elif kind == "f":
        offset, size = data.begin(), header.size
        if header.pieces is not None:
            _copy_sparse(header, header.pieces, stream, data)
        else:
            _copy(stream, data, size)
            header.stored = 0
    attributes = header.xattrs if kind != "h" else {}
    return Entry(
        path, kind, header.mode, header.uid, header.gid, header.mtime, size, offset, target, device, attributes
    )


def _copy(stream: Stream, data: Data, size: int) -> None:
    while size:
        piece = stream.read_some(size)
        if not piece:
            raise ArchiveError("the archive ends within a file")
        data.write(piece)
        size -= len(piece)


def _skip(stream: Stream, size: int) -> None:
    while size:
        piece = stream.read_some(size)
        if not piece:
            raise ArchiveError("the archive ends within a file")
        size -= len(piece)


def _copy_sparse(header: _Header, pieces: Iterable[tuple[int, int]], stream: Stream, data: Data) -> None:
    """GNU's sparse files: of the file's bytes the archive has those of `pieces`, (offset, size) each."""
    at = 0
    for offset, size in pieces:
        if size == 0:
            continue
        if offset < at or size < 0 or offset + size > header.size or size > header.stored:
            raise ArchiveError("a sparse file has a map that makes no sense")
        data.skip(offset - at)
        _copy(stream, data, size)
        header.stored -= size
        at = offset + size
    if header.size < at:
        raise ArchiveError("a sparse file has a map that makes no sense")
    data.skip(header.size - at)

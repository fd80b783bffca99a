"""The reader of images' layers, and an archive of anything: only ArchiveError comes out, and no path that leads out."""

from __future__ import annotations

import io
from contextlib import suppress

import atheris

from tests.fuzz.atheris_target import fuzz

with atheris.instrument_imports(include=["vmette"]):
    from vmette.images import archive

LIMIT = 1 << 20
MAX_ENTRIES = 100
KINDS = frozenset("fdlhcbpwo")
CHECKSUM = slice(148, 156)


class Count:
    """Counts the bytes of files."""

    def __init__(self) -> None:
        self.written = 0
        self.skipped = 0

    def begin(self) -> int:
        return self.written + self.skipped

    def write(self, data: memoryview | bytes) -> None:
        self.written += len(data)

    def skip(self, size: int) -> None:
        assert size >= 0
        self.skipped += size


def check(entry: archive.Entry, data: Count) -> None:
    assert entry.kind in KINDS
    for path in (entry.path, entry.target if entry.kind == "h" else b""):
        assert not path or {b"", b".", b".."}.isdisjoint(path.split(b"/")), path
        assert len(path) <= archive.MAX_PATH
        assert b"\0" not in path
    assert 0 <= entry.mode <= 0o7777
    assert max(entry.uid, entry.gid) < (1 << 32) - 1
    assert min(entry.uid, entry.gid, entry.size, *entry.device) >= 0
    assert entry.size == 0 or entry.offset + entry.size == data.begin()
    assert entry.text <= 2 * archive.MAX_PATH + archive.MAX_XATTRS


def one(data: bytes) -> None:
    """The first byte says whether whiteouts are looked for."""
    count, found = Count(), 0
    with suppress(archive.ArchiveError):
        stream = archive.Stream(io.BytesIO(data[1:]), LIMIT)
        for entry in archive.entries(stream, count, max_entries=MAX_ENTRIES, whiteouts=data[:1] > b"\x7f"):
            check(entry, count)
            found += 1
    assert found <= MAX_ENTRIES
    assert count.written <= LIMIT


def mutate(data: bytes, size: int, seed: int) -> bytes:
    """Gives most blocks the checksum of a header, without which hardly anything would be read."""
    mutated = bytearray(atheris.Mutate(data, size))
    if seed % 8 and mutated[1:3] != archive.GZIP:
        for at in range(1, len(mutated) - archive.RECORD + 1, archive.RECORD):
            block = mutated[at : at + archive.RECORD]
            if any(block):
                block[CHECKSUM] = b" " * 8
                block[CHECKSUM] = b"%06o\0 " % sum(block)
                mutated[at : at + archive.RECORD] = block
    return bytes(mutated)


def plant() -> None:
    """A name may be anything."""
    careful = archive.clean_path

    def careless(name: bytes, *, whiteouts: bool = False) -> bytes:
        try:
            return careful(name, whiteouts=whiteouts)
        except archive.ArchiveError:
            return name

    archive.clean_path = careless


if __name__ == "__main__":
    fuzz(one, plant, mutate)

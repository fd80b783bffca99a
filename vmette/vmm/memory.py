"""The memory of a machine that woke: that of the saved one, but for the pages that it has written to since."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from ..errors import VmmError, reason
from ..files import PIECE

ENTRY = 8
"""Bytes for each page in /proc/PID/pagemap (Documentation/admin-guide/mm/pagemap.rst of Linux), the lowest first."""
ENTRIES = 1 << 17
"""Are read at once: those of half a GiB of memory."""
_OWN = bytes(bool(top & 0xC0) and not top & 0x20 for top in range(256))
"""By an entry's highest byte, whether the page is the process's own: it is there or swapped out (bits 63 and 62), and
not the file's (bit 61)."""
_PRIVATE = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) rw-p 0+ ")
"""A line of /proc/PID/maps: a private mapping of a file from its beginning, to read and write."""


def own_pieces(pid: int, size: int) -> Iterator[tuple[int, bytes]]:
    """What the process `pid` has written to its private mapping of `size` bytes, and where in there.

    The process must not do so meanwhile.

    Raises:
        VmmError: there is none, or it cannot be read.
    """
    page = os.sysconf("SC_PAGESIZE")
    process = Path(f"/proc/{pid}")
    try:
        start = _start(process, size)
        with (process / "pagemap").open("rb", 0) as pagemap, (process / "mem").open("rb", 0) as memory:
            for at in range(0, size, ENTRIES * page):
                count = min(ENTRIES, (size - at) // page)
                entries = _exactly(pagemap.fileno(), count * ENTRY, (start + at) // page * ENTRY)
                for run in re.finditer(b"\x01+", entries[ENTRY - 1 :: ENTRY].translate(_OWN)):
                    begin, end = (at + page * number for number in run.span())
                    for offset in range(begin, end, PIECE):
                        yield offset, _exactly(memory.fileno(), min(PIECE, end - offset), start + offset)
    except OSError as error:
        hint = "; kernel.yama.ptrace_scope must be 0 or 1" if isinstance(error, PermissionError) else ""
        raise VmmError(f"the memory of process {pid} cannot be read: {reason(error)}{hint}") from error


def _start(process: Path, size: int) -> int:
    """The address of that mapping.

    Raises:
        VmmError: there is none.
        OSError: the process's mappings cannot be read.
    """
    with (process / "maps").open("rb") as maps:
        for line in maps:
            if match := _PRIVATE.match(line):
                start, end = (int(address, 16) for address in match.groups())
                if end - start == size:
                    return start
    raise VmmError(f"the process has no memory of {size} bytes to save")


def _exactly(fd: int, size: int, at: int) -> bytes:
    data = os.pread(fd, size, at)
    if len(data) != size:
        raise OSError("its memory is smaller than it was")
    return data

"""Makes archives, layers, trees and images for the tests."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

from vmette.images import erofs
from vmette.images.archive import Entry, Stream, entries
from vmette.images.layers import Limits, convert, read_index
from vmette.images.tree import Tree
from vmette.images.unpack import unpack

Item = tuple[tarfile.TarInfo, bytes]
LIMITS = Limits(1 << 34)
F, D, L, H, C, B, P = (
    tarfile.REGTYPE,
    tarfile.DIRTYPE,
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
)


def text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def item(
    name: bytes | str,
    kind: bytes = F,
    content: bytes = b"",
    *,
    target: bytes | str = b"",
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime_ns: int = 0,
    device: tuple[int, int] = (0, 0),
    xattrs: Mapping[bytes, bytes] | None = None,
    pax: Mapping[str, str] | None = None,
) -> Item:
    info = tarfile.TarInfo(name if isinstance(name, str) else text(name))
    info.type, info.size, info.mode, info.uid, info.gid = kind, len(content), mode, uid, gid
    info.linkname = target if isinstance(target, str) else text(target)
    info.devmajor, info.devminor = device
    seconds, nanoseconds = divmod(abs(mtime_ns), 10**9)
    headers = {"mtime": f"{'-' * (mtime_ns < 0)}{seconds}.{nanoseconds:09}"} if mtime_ns else {}
    headers.update((f"SCHILY.xattr.{text(key)}", text(value)) for key, value in (xattrs or {}).items())
    info.pax_headers = {**headers, **(pax or {})}
    return info, content


def directory(name: bytes | str, mode: int = 0o755) -> Item:
    return item(name, D, mode=mode)


def tar(*items: Item, form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as archive:
        for info, content in items:
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


class Sink:
    """Takes the bytes of files into memory."""

    def __init__(self) -> None:
        self.data = bytearray()

    def begin(self) -> int:
        return len(self.data)

    def write(self, data: memoryview | bytes) -> None:
        self.data += data

    def skip(self, size: int) -> None:
        assert size < 1 << 26
        self.data += bytes(size)


def scan(
    data: bytes, *, limit: int = 1 << 30, max_entries: int = 100_000, whiteouts: bool = True
) -> list[tuple[Entry, bytes]]:
    """The entries of an archive, with the files' bytes."""
    sink = Sink()
    found = list(entries(Stream(io.BytesIO(data), limit), sink, max_entries=max_entries, whiteouts=whiteouts))
    return [(entry, bytes(sink.data[entry.offset : entry.offset + entry.size])) for entry in found]


def layers(place: Path, archives: Iterable[bytes]) -> list[Path]:
    made = []
    for archive in archives:
        path = place / f"layer{len(list(place.iterdir()))}"
        path.mkdir()
        convert(io.BytesIO(archive), path, LIMITS)
        made.append(path)
    return made


def tree_of(paths: Iterable[Path], max_nodes: int = 1_000_000) -> Tree:
    tree = Tree(max_nodes)
    for number, path in enumerate(paths):
        tree.apply(read_index(path), number)
    return tree


def image(place: Path, *archives: bytes) -> Path:
    made = layers(place, archives)
    output = place / "image.erofs"
    with ExitStack() as stack:
        files = [stack.enter_context((path / "data").open("rb")) for path in made]
        erofs.write(tree_of(made), files, stack.enter_context(output.open("wb")), b"0123456789abcdef")
    return output


def unpacked(place: Path, *archives: bytes) -> Path:
    """The directory that the layers make."""
    made = layers(place, archives)
    output = place / "rootfs"
    output.mkdir(mode=0o700)
    with ExitStack() as stack:
        files = [stack.enter_context((path / "data").open("rb")) for path in made]
        fd = os.open(output, os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, fd)
        unpack(tree_of(made), files, fd)
    return output


def facts_of(top: Path) -> dict[bytes, tuple[object, ...]]:
    """What a directory of the host holds, by path: for comparisons."""
    found: dict[bytes, tuple[object, ...]] = {}
    groups: dict[int, bytes] = {}
    todo = [(b"", os.fsencode(top))]
    while todo:
        name, path = todo.pop()
        status = os.lstat(path)
        kind = status.st_mode >> 12
        content = b""
        if kind == 8:
            content = Path(os.fsdecode(path)).read_bytes()
        elif kind == 10:
            content = os.readlink(path)  # noqa: PTH115
        elif kind == 4:
            names = os.listdir(path)  # noqa: PTH208
            todo += [(name + b"/" + child if name else child, path + b"/" + child) for child in names]
        keys = os.listxattr(path, follow_symlinks=False)
        xattrs = {os.fsencode(key): os.getxattr(path, key, follow_symlinks=False) for key in keys}
        device = (os.major(status.st_rdev), os.minor(status.st_rdev))
        mode = 0 if kind == 10 else status.st_mode & 0o7777
        found[name] = (kind, mode, status.st_uid, status.st_gid, status.st_mtime_ns, content, device, xattrs)
        if kind != 4:
            groups.setdefault(status.st_ino, name)
            groups[status.st_ino] = min(groups[status.st_ino], name)
            found[name] = (*found[name], status.st_ino, status.st_nlink)
    # Hard links: the first name of the group in place of the number.
    return {
        name: (*fact[:8], groups[int(str(fact[8]))], fact[9]) if len(fact) > 8 else fact for name, fact in found.items()
    }

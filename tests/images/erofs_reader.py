"""A reader of uncompressed EROFS images that believes nothing: from the kernel's fs/erofs/erofs_fs.h, not from ours."""

from __future__ import annotations

import hashlib
import stat
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

BLOCK = 4096
FT = {stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFCHR: 3, stat.S_IFBLK: 4, stat.S_IFIFO: 5, stat.S_IFLNK: 7}
PREFIXES = {1: b"user.", 2: b"system.posix_acl_access", 3: b"system.posix_acl_default", 4: b"trusted.", 6: b"security."}
INLINE_CONTENT = 1 << 16
"""Longer files are given by their SHA-256 only."""


@dataclass
class Found:
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    nlink: int
    rdev: tuple[int, int]
    xattrs: dict[bytes, bytes]
    nid: int
    content: bytes = b""
    """A file's, if it is short."""
    sha256: str = ""
    target: bytes = b""

    @property
    def type(self) -> int:
        return stat.S_IFMT(self.mode)


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 * (crc & 1))
    return crc


class Image:
    def __init__(self, path: Path) -> None:
        self.file: BinaryIO = path.open("rb")
        first = self._at(0, BLOCK)
        assert first[:1024] == bytes(1024)
        magic, checksum, compat = struct.unpack_from("<III", first, 1024)
        assert magic == 0xE0F5E1E2
        assert compat & ~1 == 0
        if compat & 1:
            assert crc32c(first[1024:1028] + bytes(4) + first[1032:]) == checksum
        blkszbits, extslots, self.root, self.inodes = struct.unpack_from("<BBHQ", first, 1024 + 12)
        assert (blkszbits, extslots) == (12, 0)
        self.blocks, self.meta, self.xattr_blkaddr = struct.unpack_from("<III", first, 1024 + 36)
        self.uuid = first[1024 + 48 : 1024 + 64]
        (incompat,) = struct.unpack_from("<I", first, 1024 + 80)
        assert incompat == 0
        assert path.stat().st_size == self.blocks * BLOCK
        self.where: dict[int, tuple[int, int]] = {}
        """Bytes of the metadata that are taken: start and end by nid."""
        self.data: dict[int, int] = {}
        """Blocks that are taken, and by which nid."""

    def _at(self, position: int, size: int) -> bytes:
        self.file.seek(position)
        data = self.file.read(size)
        assert len(data) == size, "beyond the end of the image"
        return data

    def inode(self, nid: int) -> tuple[Found, bytes, int, int]:
        """(what is known, inline data, first block, size)"""
        start = self.meta * BLOCK + nid * 32
        raw = self._at(start, 64)
        fmt, icount, mode, _, size, union, _ino, uid, gid, mtime, nsec, nlink = struct.unpack("<HHHHQIIIIqII16x", raw)
        assert fmt & 1, "only extended inodes are expected"
        layout = fmt >> 1 & 7
        assert layout in {0, 2}
        assert fmt >> 4 == 0
        assert nsec < 10**9
        xattr_size = 12 + 4 * (icount - 1) if icount else 0
        xattrs = self._xattrs(self._at(start + 64, xattr_size))
        end = start + 64 + xattr_size
        tail = b""
        if layout == 2:
            length = size % BLOCK or (BLOCK if size else 0)
            assert size and end % BLOCK + length <= BLOCK, "inline data is not within its block"
            assert end // BLOCK == (end + length - 1) // BLOCK
            tail = self._at(end, length)
            end += length
        rdev = (0, 0)
        if stat.S_IFMT(mode) in {stat.S_IFCHR, stat.S_IFBLK}:
            rdev = (union >> 8 & 0xFFF, union & 0xFF | union >> 12 & 0xFFF00)
            assert size == 0
        self.where[nid] = (start, end)
        found = Found(mode, uid, gid, size, mtime * 10**9 + nsec, nlink, rdev, xattrs, nid)
        return found, tail, union, size

    def _xattrs(self, body: bytes) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        if not body:
            return found
        assert body[:12] == bytes(12), "shared attributes are not expected"
        at = 12
        while at < len(body):
            name_len, index, size = struct.unpack_from("<BBH", body, at)
            name = PREFIXES[index] + body[at + 4 : at + 4 + name_len]
            value = body[at + 4 + name_len : at + 4 + name_len + size]
            assert len(value) == size
            assert name not in found
            found[name] = value
            at += 4 + name_len + size
            at += -at % 4
        assert at == len(body)
        return found

    def pieces(self, nid: int, tail: bytes, first: int, size: int) -> list[bytes]:
        """The data in whole blocks, the last one shorter."""
        out = []
        for index in range(-(-(size - len(tail)) // BLOCK)):
            block = first + index
            assert 0 < block < self.meta, "data beyond the blocks of data"
            assert self.data.setdefault(block, nid) == nid, "a block is in two files"
            out.append(self._at(block * BLOCK, min(BLOCK, size - index * BLOCK)))
        return [*out, tail] if tail else out

    def entries(self, blocks: list[bytes]) -> list[tuple[bytes, int, int]]:
        found = []
        for block in blocks:
            (nameoff,) = struct.unpack_from("<H", block, 8)
            assert nameoff and nameoff % 12 == 0
            heads = [struct.unpack_from("<QHBB", block, at) for at in range(0, nameoff, 12)]
            offsets = [head[1] for head in heads] + [len(block)]
            assert offsets == sorted(offsets)
            for (nid, start, kind, reserved), end in zip(heads, offsets[1:], strict=True):
                name = block[start:end]
                if end == len(block):
                    name = name.rstrip(b"\0")
                assert 0 < len(name) <= 255 and b"\0" not in name and b"/" not in name
                assert reserved == 0
                found.append((name, nid, kind))
        names = [name for name, _, _ in found]
        assert names == sorted(set(names)), "names are not sorted, or come twice"
        return found


def read(path: Path) -> dict[bytes, Found]:
    """Everything in the image by its path. Fails if anything in it is not as the kernel wants it."""
    image = Image(path)
    found: dict[bytes, Found] = {}
    names: dict[int, int] = {}
    todo: list[tuple[bytes, int, int]] = [(b"", image.root, image.root)]
    known: dict[int, Found] = {}
    with image.file:
        while todo:
            where, nid, parent = todo.pop()
            names[nid] = names.get(nid, 0) + 1
            if nid in known:
                found[where] = known[nid]
                assert not stat.S_ISDIR(known[nid].mode), "a directory with two names"
                continue
            node, tail, first, size = image.inode(nid)
            found[where] = known[nid] = node
            if node.type not in {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK}:
                continue
            blocks = image.pieces(nid, tail, first, size)
            if node.type == stat.S_IFLNK:
                node.target = b"".join(blocks)
                assert 0 < len(node.target) == size
            elif node.type == stat.S_IFREG:
                digest = hashlib.sha256()
                for block in blocks:
                    digest.update(block)
                node.sha256 = digest.hexdigest()
                if size <= INLINE_CONTENT:
                    node.content = b"".join(blocks)
            else:
                entries = image.entries(blocks)
                kinds = {name: (number, kind) for name, number, kind in entries}
                assert kinds.pop(b".") == (nid, 2)
                assert kinds.pop(b"..") == (parent, 2)
                prefix = where + b"/" if where else b""
                todo += [(prefix + name, number, nid) for name, (number, _) in kinds.items()]
                children = [image.inode(number)[0] for number, _ in kinds.values()]
                for child, (_, kind) in zip(children, kinds.values(), strict=True):
                    assert FT[child.type] == kind, "the directory says another type than the inode"
                assert node.nlink == 2 + sum(child.type == stat.S_IFDIR for child in children)
    taken = sorted(image.where.values())
    assert all(end <= start for (_, end), (start, _) in pairwise(taken)), "inodes overlap"
    assert image.inodes == len(known)
    for nid, node in known.items():
        if not stat.S_ISDIR(node.mode):
            assert node.nlink == names[nid]
    return found

"""Writing an EROFS image: the kernel's read-only filesystem, uncompressed, in one pass.

The on-disk format is the kernel's fs/erofs/erofs_fs.h and Documentation/filesystems/erofs.rst. An image is::

    block 0        the superblock, at byte 1024
    from block 1   the bytes of the files, then directory blocks
    the rest       inodes, each with its attributes and the end of its directory or its symlink's target

The same tree gives the same bytes.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from .layers import BLOCK, extents, write_at
from .tree import TYPES, Node, Tree

MAGIC = 0xE0F5E1E2
FORMAT = 1
"""Part of what images are cached by: other bytes for the same tree are another number."""
SUPERBLOCK_AT = 1024
# magic, checksum, feature_compat, blkszbits, sb_extslots, root_nid, inos, build_time, build_time_nsec, blocks,
# meta_blkaddr, xattr_blkaddr, uuid, volume_name, feature_incompat, available_compr_algs, extra_devices, devt_slotoff,
# dirblkbits, xattr_prefix_count, xattr_prefix_start, packed_nid, xattr_filter_reserved, reserved
SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQB23x")
CHECKSUM_FEATURE = 1
# i_format, i_xattr_icount, i_mode, reserved, i_size, i_u, i_ino, i_uid, i_gid, i_mtime, i_mtime_nsec, i_nlink
INODE = struct.Struct("<HHHHQIIIIqII16x")
EXTENDED, FLAT_PLAIN, FLAT_INLINE = 1, 0 << 1, 2 << 1
SLOT = 32
"""Inodes are numbered by their place, in units of this many bytes."""
DIRENT = struct.Struct("<QHBB")  # nid, nameoff, file_type, reserved
XATTR_HEADER = 12
XATTR_ENTRY = struct.Struct("<BBH")  # e_name_len, e_name_index, e_value_size
XATTR_PREFIXES = (
    (b"user.", 1),
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"trusted.", 4),
    (b"security.", 6),
)

COPY = 1 << 30


@dataclass(eq=False, slots=True)
class _Inode:
    """What is known of an inode before it is written."""

    node: Node
    parent: _Inode | None
    number: int
    links: int = 0
    names: list[bytes] | None = None
    """A directory's, `.` and `..` among them, sorted."""
    ends: list[int] | None = None
    """Where in `names` each directory block ends."""
    size: int = 0
    """i_size."""
    tail: int = 0
    """Bytes that follow the inode: the end of the directory, or the symlink's target."""
    xattrs: bytes = b""
    address: int = 0
    """The first block of its data."""
    place: int = 0
    """Byte offset in the metadata."""

    @property
    def nid(self) -> int:
        return self.place // SLOT


def write(tree: Tree, layers: Sequence[BinaryIO], output: BinaryIO, uuid: bytes) -> None:
    """Writes `tree`, whose files' bytes are in `layers` by number, to the empty file `output`.

    Args:
        tree: The root filesystem.
        layers: Files with descriptors, as :func:`vmette.images.layers.convert` writes them.
        output: A file with a descriptor.
        uuid: 16 bytes.

    Raises:
        OSError: a file cannot be read or written.
    """
    inodes = _number(tree.root)
    block = _place_data(inodes, layers, output)
    directories = [inode for inode in inodes.values() if inode.names is not None]
    for inode in directories:
        inode.address = block
        block += (inode.size - inode.tail + BLOCK - 1) // BLOCK
    end = _place_inodes(list(inodes.values()))
    metadata = bytearray(end + -end % BLOCK)
    for inode in inodes.values():
        _write_inode(inode, inodes, metadata, output)
    write_at(output.fileno(), bytes(metadata), block * BLOCK)
    blocks = block + len(metadata) // BLOCK
    root = inodes[id(tree.root)]
    write_at(output.fileno(), _superblock(root.nid, len(inodes), blocks, block, uuid), 0)
    output.truncate(blocks * BLOCK)


def _number(root: Node) -> dict[int, _Inode]:
    """Every node once, in the order of the tree, by its identity."""
    inodes: dict[int, _Inode] = {}
    todo: list[tuple[Node, _Inode | None]] = [(root, None)]
    while todo:
        node, parent = todo.pop()
        known = inodes.get(id(node))
        if known is not None:
            known.links += 1
            continue
        inode = inodes[id(node)] = _Inode(node, parent, len(inodes) + 1, 1)
        inode.xattrs = _xattrs(node.xattrs)
        if node.children is not None:
            inode.links = 2 + sum(child.kind == "d" for child in node.children.values())
            inode.names = sorted([*node.children, b".", b".."])
            _measure_directory(inode)
            todo += [(node.children[name], inode) for name in inode.names[::-1] if name in node.children]
        elif node.kind == "l":
            inode.size = len(node.target)
            if INODE.size + len(inode.xattrs) + inode.size <= BLOCK:
                inode.tail = inode.size
        elif node.kind == "f":
            inode.size = node.size
    return inodes


def _measure_directory(inode: _Inode) -> None:
    assert inode.names is not None
    ends, used = [], 0
    for index, name in enumerate(inode.names):
        need = DIRENT.size + len(name)
        if used + need > BLOCK:
            ends.append(index)
            used = 0
        used += need
    inode.ends = [*ends, len(inode.names)]
    inode.size = len(ends) * BLOCK + used
    inode.tail = used if INODE.size + len(inode.xattrs) + used <= BLOCK else 0


def _place_data(inodes: dict[int, _Inode], layers: Sequence[BinaryIO], output: BinaryIO) -> int:
    """Copies the files' bytes from block 1 on, and returns the first block after them."""
    block = 1
    files = [inode for inode in inodes.values() if inode.node.kind == "f" and inode.size]
    files.sort(key=lambda inode: (inode.node.layer, inode.node.offset))
    before: _Inode | None = None
    run: list[int] = []  # layer, start, length, block: files that follow one another in their layer are one copy
    for inode in files:
        node, length = inode.node, inode.size + -inode.size % BLOCK
        if before is not None and (before.node.layer, before.node.offset) == (node.layer, node.offset):
            inode.address = before.address  # a layer that is there twice, at two places because of a symlink
            continue
        inode.address, before = block, inode
        if run and run[0] == node.layer and run[1] + run[2] == node.offset:
            run[2] += length
        else:
            if run:
                _copy(layers[run[0]], run[1], output, run[3] * BLOCK, run[2])
            run = [node.layer, node.offset, length, block]
        block += length // BLOCK
    if run:
        _copy(layers[run[0]], run[1], output, run[3] * BLOCK, run[2])
    # A symlink whose target does not fit behind its inode has a block of its own.
    for inode in inodes.values():
        if inode.node.kind == "l" and not inode.tail:
            inode.address = block
            write_at(output.fileno(), inode.node.target, block * BLOCK)
            block += 1
    return block


def _copy(source: BinaryIO, start: int, output: BinaryIO, to: int, length: int) -> None:
    """Copies within the kernel where it can (and shares the extents where the file system can). Holes stay holes."""
    for first, end in extents(source, start, start + length):
        _copy_extent(source, first, output, to + first - start, end - first)


def _copy_extent(source: BinaryIO, start: int, output: BinaryIO, to: int, length: int) -> None:
    if hasattr(os, "copy_file_range"):
        try:
            while length:
                done = os.copy_file_range(source.fileno(), output.fileno(), min(length, COPY), start, to)
                if done == 0:
                    break
                start, to, length = start + done, to + done, length - done
        except OSError:  # between file systems, or on one that cannot: by hand, which says what is really wrong
            pass
    while length:
        data = os.pread(source.fileno(), min(length, 1 << 20), start)
        if not data:
            raise OSError(f"the cached layer {source.name} is shorter than it was")
        write_at(output.fileno(), data, to)
        start, to, length = start + len(data), to + len(data), length - len(data)


def _place_inodes(inodes: list[_Inode]) -> int:
    """Gives each inode its place, and returns the end of the last one.

    What follows an inode in its block must be in that block whole; an inode that would be cut goes to the next one.
    """
    at = 2 * SLOT  # no inode has the number 0: readdir(3) of many systems takes it for none
    for inode in inodes:
        need = INODE.size + len(inode.xattrs) + inode.tail
        if need <= BLOCK and at % BLOCK + need > BLOCK:
            at += -at % BLOCK
        inode.place = at
        at += need + -need % SLOT
    return at


def _write_inode(inode: _Inode, inodes: dict[int, _Inode], metadata: bytearray, output: BinaryIO) -> None:
    node = inode.node
    seconds, nanoseconds = divmod(node.mtime, 10**9)
    if node.kind in "cb":
        major, minor = node.device
        value = (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12  # the kernel's new_encode_dev
    else:
        value = inode.address if inode.size > inode.tail or not inode.tail else 0
    INODE.pack_into(
        metadata,
        inode.place,
        EXTENDED | (FLAT_INLINE if inode.tail else FLAT_PLAIN),
        (len(inode.xattrs) - XATTR_HEADER) // 4 + 1 if inode.xattrs else 0,
        TYPES[node.kind][0] | node.mode,
        0,
        inode.size,
        value,
        inode.number,
        node.uid,
        node.gid,
        seconds,
        nanoseconds,
        inode.links,
    )
    at = inode.place + INODE.size
    metadata[at : at + len(inode.xattrs)] = inode.xattrs
    at += len(inode.xattrs)
    if inode.names is not None:
        blocks = _directory(inode, inodes)
        if inode.tail:
            metadata[at : at + inode.tail] = blocks.pop()
        for index, data in enumerate(blocks):
            write_at(output.fileno(), data + bytes(BLOCK - len(data)), (inode.address + index) * BLOCK)
    elif inode.tail:
        metadata[at : at + inode.tail] = node.target


def _directory(inode: _Inode, inodes: dict[int, _Inode]) -> list[bytes]:
    """The directory's blocks, the last one no longer than it is."""
    assert inode.names is not None and inode.ends is not None and inode.node.children is not None
    blocks = []
    start = 0
    for end in inode.ends:
        names = inode.names[start:end]
        start = end
        offset = DIRENT.size * len(names)
        entries = bytearray()
        for name in names:
            child = inodes[id(inode.node.children[name])] if name in inode.node.children else None
            if child is None:
                child = inode if name == b"." else inode.parent or inode
            entries += DIRENT.pack(child.nid, offset, TYPES[child.node.kind][1], 0)
            offset += len(name)
        data = bytes(entries) + b"".join(names)
        blocks.append(data if end == len(inode.names) else data + bytes(BLOCK - len(data)))
    return blocks


def _xattrs(attributes: Mapping[bytes, bytes]) -> bytes:
    """The attributes as they follow the inode; none at all if there are none."""
    if not attributes:
        return b""
    out = bytearray(XATTR_HEADER)
    for name, value in sorted(attributes.items()):
        prefix, index = next((p, i) for p, i in XATTR_PREFIXES if name.startswith(p))
        short = name[len(prefix) :]
        out += XATTR_ENTRY.pack(len(short), index, len(value)) + short + value
        out += bytes(-len(out) % 4)
    return bytes(out)


def _superblock(root_nid: int, inodes: int, blocks: int, metadata: int, uuid: bytes) -> bytes:
    """Block 0. Its checksum is over all of it from the superblock on."""

    def block(checksum: int) -> bytes:
        fields = (MAGIC, checksum, CHECKSUM_FEATURE, BLOCK.bit_length() - 1, 0, root_nid, inodes, 0, 0, blocks)
        rest = (metadata, 0, uuid, b"", 0, 0, 0, 0, 0, 0, 0, 0, 0)
        start = bytes(SUPERBLOCK_AT) + SUPERBLOCK.pack(*fields, *rest)
        return start + bytes(BLOCK - len(start))

    return block(crc32c(block(0)[SUPERBLOCK_AT:]))


def crc32c(data: bytes) -> int:
    """The Castagnoli CRC, reflected, as the kernel has it in EROFS: begun with all ones, not inverted at its end."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc

"""An empty ext4 file system in a sparse file, for a disk that lives no longer than its VM.

The on-disk format is https://docs.kernel.org/filesystems/ext4/ (super.html, group_descr.html, inodes.html,
ifork.html, directory.html) and the kernel's fs/ext4/ext4.h. There is no journal and there are no copies of the
superblock: nobody repairs this file system. Every block group holds its own metadata at its beginning::

    group 0       superblock and descriptors of all groups, block bitmap, inode bitmap, inode table, /, /lost+found
    other groups  block bitmap, inode bitmap, inode table

and all of them but the first are declared uninitialized (`uninit_bg`): what their metadata would say follows from
their descriptors, and the kernel writes it when it first uses them. So a descriptor of 32 bytes, a bitmap for the last
group and some ten blocks are all that is written, whatever the size.
"""

from __future__ import annotations

import os
import struct
import time

from ..errors import ConfigError
from .layers import BLOCK, write_at

MIN_SIZE, MAX_SIZE = 1 << 20, 1 << 44
"""Bytes. Block numbers of 32 bits do for 16 TiB, less one block."""
MAX_BLOCKS = (1 << 32) - 1
GROUP = 8 * BLOCK
"""Blocks of a group, and so bits of a bitmap, which is one block."""
BLOCKS_PER_INODE = 2
"""A root filesystem has many small files; an inode that is never used costs nothing on the host."""

SUPERBLOCK_AT = 1024
# inodes_count, blocks_count, r_blocks_count, free_blocks_count, free_inodes_count, first_data_block, log_block_size,
# log_cluster_size, blocks_per_group, clusters_per_group, inodes_per_group, mtime, wtime | mnt_count, max_mnt_count,
# magic, state, errors, minor_rev_level | lastcheck, checkinterval, creator_os, rev_level | def_resuid, def_resgid |
# first_ino | inode_size, block_group_nr | feature_compat, feature_incompat, feature_ro_compat | uuid, volume_name |
# hash_seed | def_hash_version, jnl_backup_type, desc_size | default_mount_opts, first_meta_bg, mkfs_time |
# min_extra_isize, want_extra_isize | flags | overhead_clusters
SUPERBLOCK = struct.Struct("<13I HhHHHH 4I 2H I 2H 3I 16s16s 100x 16s BBH 3I 80x 2H I 228x I 436x")
MAGIC = 0xEF53
CLEAN, ON_ERRORS_CONTINUE, DYNAMIC_REVISION, HALF_MD4, SIGNED_HASH = 1, 1, 1, 1, 1
USER_XATTR, ACL = 0x4, 0x8
COMPAT = 0x8 | 0x20 | 0x200  # ext_attr, dir_index, sparse_super2 (with no backups named: there are none)
INCOMPAT = 0x2 | 0x40  # filetype, extents
RO_COMPAT = (
    0x1 | 0x2 | 0x8 | 0x10 | 0x20 | 0x40
)  # sparse_super, large_file, huge_file, gdt_csum, dir_nlink, extra_isize

# block_bitmap, inode_bitmap, inode_table | free_blocks_count, free_inodes_count, used_dirs_count, flags |
# exclude_bitmap | block_bitmap_csum, inode_bitmap_csum, itable_unused, checksum
DESCRIPTOR = struct.Struct("<3I 4H I 4H")
INODE_UNINIT, BLOCK_UNINIT, INODE_ZEROED = 1, 2, 4

# mode, uid | size, atime, ctime, mtime, dtime | gid, links_count | blocks, flags, version | block | extra_isize |
# crtime
INODE = struct.Struct("<2H 5I 2H 3I 60s 28x H 14x I 108x")
EXTRA_ISIZE = 32
USES_EXTENTS = 0x80000
# magic, entries, max, depth, generation | of the only extent: block, len, start_hi, start
EXTENT_TREE = struct.Struct("<4H I I 2H I")
EXTENT_MAGIC = 0xF30A
DIRENT = struct.Struct("<I H BB")  # inode, rec_len, name_len, file_type
DIRECTORY = 2
ROOT, LOST_FOUND = 2, 11
"""Inode numbers. Those up to 10 are reserved."""
INODES_PER_BLOCK = BLOCK // INODE.size
SECTORS_PER_BLOCK = BLOCK // 512


def format_ext4(fd: int, size: int, *, label: bytes = b"scratch") -> None:
    """Makes the file an empty ext4 file system; what it held is lost.

    Args:
        fd: A regular file, open for writing, on a file system that has sparse files.
        size: Bytes, MIN_SIZE to MAX_SIZE: that of the file from now on. What is over at its end, less than a block
            or a piece too small for a group's metadata, is not used.
        label: The volume's name, at most 16 bytes.

    Raises:
        ConfigError: such a file system cannot be.
        OSError: the file cannot be written, or cannot be as large as that.
    """
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ConfigError(f"a file system of {size} bytes: it can have {MIN_SIZE} to {MAX_SIZE}")
    if len(label) > 16:
        raise ConfigError(f"file system label {label!r} is too long: at most 16 bytes")
    os.ftruncate(fd, 0)
    os.ftruncate(fd, size)
    for position, data in _Layout(min(size // BLOCK, MAX_BLOCKS)).blocks(label):
        write_at(fd, data, position * BLOCK)


class _Layout:
    """What is where in a file system of at most so many blocks."""

    def __init__(self, blocks: int) -> None:
        inodes = min(blocks, GROUP) // BLOCKS_PER_INODE
        self.inodes = inodes + -inodes % INODES_PER_BLOCK
        """Per group."""
        self.metadata = 2 + self.inodes // INODES_PER_BLOCK
        """Blocks per group."""
        if blocks > GROUP and blocks % GROUP <= self.metadata:
            blocks -= blocks % GROUP
        self.size = blocks
        """In blocks."""
        self.groups = -(-blocks // GROUP)
        self.last = self.groups - 1
        self.start = 1 + -(-self.groups * DESCRIPTOR.size // BLOCK)
        """Where the metadata of group 0 begins."""
        self.root = self.start + self.metadata
        self.lost_found = self.root + 1

    def blocks(self, label: bytes) -> list[tuple[int, bytes]]:
        """All that is not zero: block number and bytes."""
        uuid, now = os.urandom(16), int(time.time())
        head = bytes(SUPERBLOCK_AT) + self._superblock(uuid, label, now)
        blocks = [
            (0, head),
            (1, self._descriptors(uuid)),
            (self.start, _bitmap(self._used(0), self._length(0))),
            (self.start + 1, _bitmap(LOST_FOUND, self.inodes)),
            (self.start + 2, self._inodes(now)),
            (self.root, _directory((ROOT, b"."), (ROOT, b".."), (LOST_FOUND, b"lost+found"))),
            (self.lost_found, _directory((LOST_FOUND, b"."), (ROOT, b".."))),
        ]
        if self.last:
            blocks.append((self.last * GROUP, _bitmap(self._used(self.last), self._length(self.last))))
        return blocks

    def _used(self, group: int) -> int:
        """Blocks of the group that are in use, all at its beginning."""
        return self.metadata if group else self.lost_found + 1

    def _length(self, group: int) -> int:
        """Blocks of the group."""
        return min(GROUP, self.size - group * GROUP)

    def _superblock(self, uuid: bytes, label: bytes, now: int) -> bytes:
        inodes, overhead = self.groups * self.inodes, self.start + self.groups * self.metadata
        free = self.size - overhead - 2
        unit = BLOCK.bit_length() - 11  # log2 of KiB
        return SUPERBLOCK.pack(
            *(inodes, self.size, 0, free, inodes - LOST_FOUND, 0, unit, unit, GROUP, GROUP, self.inodes, 0, now),
            *(0, -1, MAGIC, CLEAN, ON_ERRORS_CONTINUE, 0),
            *(now, 0, 0, DYNAMIC_REVISION),
            *(0, 0, LOST_FOUND, INODE.size, 0),
            *(COMPAT, INCOMPAT, RO_COMPAT),
            *(uuid, label, os.urandom(16)),
            *(HALF_MD4, 0, 0),
            *(USER_XATTR | ACL, 0, now),
            *(EXTRA_ISIZE, EXTRA_ISIZE, SIGNED_HASH, overhead),
        )

    def _descriptors(self, uuid: bytes) -> bytes:
        """Those of all groups, in their order."""
        seed = crc16(uuid)

        def descriptor(group: int, checksum: int) -> bytes:
            """That of a whole group whose bitmaps are in no block yet, as are all but the first and the last."""
            flags = INODE_UNINIT | BLOCK_UNINIT | INODE_ZEROED
            place = (group * GROUP, group * GROUP + 1, group * GROUP + 2)
            free = GROUP - self.metadata
            return DESCRIPTOR.pack(*place, free, self.inodes, 0, flags, 0, 0, 0, self.inodes, checksum)

        def checksum(group: int, descriptor: bytes) -> int:
            return crc16(group.to_bytes(4, "little") + descriptor[:-2], seed)

        def special(group: int, *fields: int) -> bytes:
            return DESCRIPTOR.pack(*fields, checksum(group, DESCRIPTOR.pack(*fields, 0)))

        # What is summed up, the number of the group and its descriptor, differs between groups by XOR only: GROUP is a
        # power of two above the offsets that are added to its multiples. And a CRC keeps XOR: from the sums of groups
        # 0 to n-1 those of n to 2n-1, n a power of two, follow with one difference. 16 TiB have 131,072 groups.
        sums = [checksum(0, descriptor(0, 0))]
        while len(sums) < self.groups:
            n = len(sums)
            difference = sums[0] ^ checksum(n, descriptor(n, 0))
            sums += [each ^ difference for each in sums]
        table = [descriptor(group, sums[group]) for group in range(self.groups)]

        if self.last:
            place, free = self.last * GROUP, self._length(self.last) - self.metadata
            flags, inodes = INODE_UNINIT | INODE_ZEROED, self.inodes
            table[-1] = special(self.last, place, place + 1, place + 2, free, inodes, 0, flags, 0, 0, 0, inodes)
        place, free = self.start, self._length(0) - self._used(0)
        flags, inodes = INODE_ZEROED, self.inodes - LOST_FOUND
        table[0] = special(0, place, place + 1, place + 2, free, inodes, 2, flags, 0, 0, 0, inodes)
        return b"".join(table)

    def _inodes(self, now: int) -> bytes:
        """The inode table up to the last inode that is in use."""
        table = bytearray(LOST_FOUND * INODE.size)
        for number, mode, links, block in ((ROOT, 0o40755, 3, self.root), (LOST_FOUND, 0o40700, 2, self.lost_found)):
            extents = EXTENT_TREE.pack(EXTENT_MAGIC, 1, 4, 0, 0, 0, 1, 0, block)
            INODE.pack_into(
                table,
                (number - 1) * INODE.size,
                *(mode, 0, BLOCK, now, now, now, 0, 0, links, SECTORS_PER_BLOCK, USES_EXTENTS, 0),
                *(extents, EXTRA_ISIZE, now),
            )
        return bytes(table)


def _bitmap(used: int, length: int) -> bytes:
    """A bitmap of `length` bits whose first `used` are set; what is behind it in its block is set too."""
    return ((1 << used) - 1 | (1 << GROUP) - (1 << length)).to_bytes(BLOCK, "little")


def _directory(*entries: tuple[int, bytes]) -> bytes:
    """A directory's only block: directories, by inode number and name."""
    block, end = bytearray(), BLOCK
    for number, name in entries:
        length = DIRENT.size + len(name) + -len(name) % 4
        if (number, name) == entries[-1]:
            length = end
        end -= length
        block += (DIRENT.pack(number, length, len(name), DIRECTORY) + name).ljust(length, b"\0")
    return bytes(block)


def crc16(data: bytes, crc: int = 0xFFFF) -> int:
    """The CRC of group descriptors, begun with `crc`: polynomial 0x8005, reflected (the kernel's lib/crc16.c)."""
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xA001 if crc & 1 else 0)
    return crc

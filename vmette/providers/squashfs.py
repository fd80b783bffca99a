"""`squashfs+https://host/root.sqfs`, `erofs+file:///root.erofs`, `./root.squashfs`: an image as it is."""

from __future__ import annotations

import logging
import os
import struct
from pathlib import Path
from typing import BinaryIO

from ..errors import ConfigError
from ..locks import held
from .base import Artifact, BlockFs, BlockImage, Context, InvalidSpec
from .layered import evict, limit_of, store_of
from .remote import Location, Remote, bare_path, check_pin, digest_of, hashed, locate, opened, prefixes, translated

logger = logging.getLogger(__name__)

LIMIT = "VMETTE_SQUASHFS_MAX_BYTES"
MAX_BYTES = 4 << 30
"""The most bytes of an image that is fetched, unless the environment variable LIMIT says otherwise."""
PREFIXES = prefixes("squashfs", "erofs")
SUFFIXES = {".squashfs": BlockFs.SQUASHFS, ".sqfs": BlockFs.SQUASHFS, ".erofs": BlockFs.EROFS}
PAGE = 4096
"""Of the guest's kernel: squashfs has no smaller blocks, EROFS no larger ones."""


def _wanted(name: str) -> bool:
    return name.endswith(tuple(SUFFIXES))


class SquashfsProvider:
    """Images of squashfs and EROFS, by URL (`#sha256=HEX` behind it to have that one and no other) or by path."""

    name = "squashfs"

    def matches(self, spec: str) -> bool:
        """A URL that begins with `squashfs+` or `erofs+`, or the path of a file that is there and so named."""
        return spec.startswith(PREFIXES) or bare_path(spec, _wanted) is not None

    def provide(self, spec: str, context: Context) -> Artifact:
        """The image: a file of the host where it is, another one in the cache.

        Raises:
            ConfigError: the context wants a directory.
            InvalidSpec: the spec is malformed, or there is no such image, or one that the guest could not mount.
            OfflineCacheMiss: the network must not be asked, and the cache has not got it.
            NetworkError: the server did not give it.
            ProviderIOError: the cache cannot be written.
            Cancelled: the context said so.
        """
        location = locate(spec, PREFIXES, _wanted)
        if context.form == "directory":
            raise ConfigError(f"{location.name} is an image, which vmette does not unpack: it cannot be a directory")
        if location.url:
            fstype = BlockFs(spec.partition("+")[0])
        else:
            fstype = next(fs for suffix, fs in SUFFIXES.items() if spec.lower().endswith(suffix))
        with translated(location.name):
            if location.path is None:
                return _fetched(location, fstype, context)
            with opened(location.path) as file:
                check(file, location, fstype)
                if location.pin:
                    cache = context.provider_cache(self.name)
                    check_pin(location, digest_of(file, location.path, cache, context.cancelled))
            return BlockImage(location.path, fstype)


def _fetched(location: Location, fstype: BlockFs, context: Context) -> BlockImage:
    cache = context.provider_cache("squashfs")
    max_bytes = limit_of(LIMIT, MAX_BYTES)
    images = _Images(context, location, fstype)
    return Remote(location, context, cache, max_bytes, LIMIT, images.cached, images.take).get()


class _Images:
    """The images that have been fetched, by their digests: what a running VM has mounted is never another image."""

    def __init__(self, context: Context, location: Location, fstype: BlockFs) -> None:
        self._store = store_of(context)
        self._location = location
        self._fstype = fstype

    def _path(self, digest: str) -> Path:
        return self._store.images / f"{digest.replace(':', '-')}.{self._fstype}"

    def cached(self, digest: str, size: int | None) -> BlockImage | None:
        """The image, if it is there and whole as far as can be told without reading all of it."""
        path = self._path(digest)
        if not self._store.used(path):
            return None
        try:
            with opened(path) as file:
                actual = os.fstat(file.fileno()).st_size
                if size not in {None, actual}:
                    raise InvalidSpec(f"{path} has {actual} bytes instead of {size}")
                check(file, self._location, self._fstype)
        except InvalidSpec:
            logger.warning("%s is damaged and is not used", path)
            return None
        return BlockImage(path, self._fstype)

    def take(self, source: Path, digest: str) -> BlockImage:
        """Moves the file to its place in the cache, if the guest can mount it."""
        from ..files import synced
        from ..images.store import remove

        with opened(source) as file:
            check(file, self._location, self._fstype)
        path = self._path(digest)
        if not self._whole(path, digest):
            remove(path)

        def make(staging: Path) -> None:
            synced(source)
            source.rename(staging)

        self._store.entry(path, make)
        fd = held(path)
        try:
            evict(self._store)
        finally:
            os.close(fd)
        return BlockImage(path, self._fstype)

    @staticmethod
    def _whole(path: Path, digest: str) -> bool:
        try:
            with opened(path) as file:
                return hashed(file, lambda: False) == digest
        except InvalidSpec:
            return False


# --- Superblocks -----------------------------------------------------------------------------------------------------

SQUASHFS_MAGIC = 0x73717368
# s_magic, inodes, mkfs_time, block_size, fragments, compression, block_log, flags, no_ids, s_major, s_minor,
# root_inode, bytes_used, and the places of six tables (the kernel's fs/squashfs/squashfs_fs.h)
_SQUASHFS = struct.Struct("<IIIIIHHHHHHQQ48x")
_SQUASHFS_COMPRESSIONS = {1: "gzip", 2: "lzma", 3: "lzo", 4: "xz", 5: "lz4", 6: "zstd"}
_SQUASHFS_KNOWN = {"gzip", "xz", "lz4", "zstd"}  # csrc/guest/kernel.fragment
SQUASHFS_MAX_BLOCK = 1 << 20

EROFS_INCOMPAT = 0x7F
"""The features without which a kernel must not mount an image, and which Linux 6.12 has."""
_EROFS_CONFIGURED = 2  # COMPR_CFGS: there is a list of compressions
_EROFS_COMPRESSIONS = ("lz4", "lzma", "deflate", "zstd")
_EROFS_KNOWN = {"lz4"}


def check(file: BinaryIO, location: Location, fstype: BlockFs) -> None:
    """Refuses an image that the guest's kernel would not mount, as far as its superblock shows that.

    Raises:
        InvalidSpec: it is one.
    """
    image = _Image(file, location.name.partition("#")[0])
    kinds = {BlockFs.SQUASHFS: image.is_squashfs, BlockFs.EROFS: image.is_erofs}
    if not kinds.pop(fstype)():
        ((other, is_other),) = kinds.items()
        if not is_other():
            raise InvalidSpec(f"{image.what} is no {fstype} image")
        its = f"{other}+{location.shown_url}"
        raise InvalidSpec(f"{image.what} is no {fstype} image but one of {other}: its spec is {its}")
    (image.squashfs if fstype is BlockFs.SQUASHFS else image.erofs)()


class _Image:
    def __init__(self, file: BinaryIO, what: str) -> None:
        self.what = what
        self._size = os.fstat(file.fileno()).st_size
        self._start = os.pread(file.fileno(), PAGE, 0)

    def is_squashfs(self) -> bool:
        return self._start[:4] == SQUASHFS_MAGIC.to_bytes(4, "little")

    def is_erofs(self) -> bool:
        from ..images import erofs

        return self._start[erofs.SUPERBLOCK_AT :][:4] == erofs.MAGIC.to_bytes(4, "little")

    def _refuse(self, why: str) -> InvalidSpec:
        return InvalidSpec(f"{self.what}: the image {why}")

    def squashfs(self) -> None:
        if len(self._start) < _SQUASHFS.size:
            raise self._refuse("ends within its superblock")
        fields = _SQUASHFS.unpack_from(self._start)
        _, inodes, _, block, _, compression, log, _, _, major, minor, _, used = fields
        if (major, minor) != (4, 0):
            raise self._refuse(f"is squashfs {major}.{minor}, and Linux mounts 4.0")
        if not PAGE <= block <= SQUASHFS_MAX_BLOCK or log >= 32 or block != 1 << log:
            raise self._refuse(f"has blocks of {block} bytes, which Linux does not mount")
        if inodes == 0:
            raise self._refuse("has no inodes")
        self._compressed(_SQUASHFS_COMPRESSIONS.get(compression, f"method {compression}"), _SQUASHFS_KNOWN)
        if used < _SQUASHFS.size:
            raise self._refuse("is damaged: it is smaller than its superblock")
        self._complete(used)

    def erofs(self) -> None:
        from ..images import erofs

        if len(self._start) < erofs.SUPERBLOCK_AT + erofs.SUPERBLOCK.size:
            raise self._refuse("ends within its superblock")
        fields = erofs.SUPERBLOCK.unpack_from(self._start, erofs.SUPERBLOCK_AT)
        _, checksum, compat, bits, extslots, _, _, _, _, blocks = fields[:10]
        incompat, algorithms, _, _, directory_bits = fields[14:19]
        if not 9 <= bits <= 16:
            raise self._refuse(f"is damaged: its blocks have 2^{bits} bytes")
        if bits > PAGE.bit_length() - 1:
            raise self._refuse(f"has blocks of {1 << bits} bytes, and the guest's kernel takes {PAGE} at most")
        if directory_bits or erofs.SUPERBLOCK.size + extslots * 16 > PAGE - erofs.SUPERBLOCK_AT:
            raise self._refuse("is of a form that Linux 6.12 does not mount")
        if compat & erofs.CHECKSUM_FEATURE:
            self._check_erofs(checksum, 1 << bits)
        if incompat & ~EROFS_INCOMPAT:
            raise self._refuse(f"has features that Linux 6.12 does not know ({incompat & ~EROFS_INCOMPAT:#x})")
        if incompat & _EROFS_CONFIGURED:
            for bit in range(16):
                if algorithms >> bit & 1:
                    name = _EROFS_COMPRESSIONS[bit] if bit < len(_EROFS_COMPRESSIONS) else f"method {bit}"
                    self._compressed(name, _EROFS_KNOWN)
        self._complete(blocks << bits)

    def _check_erofs(self, checksum: int, block: int) -> None:
        """The checksum is over the rest of the block that the superblock is in, or over a smaller block."""
        from ..images import erofs

        length = block - erofs.SUPERBLOCK_AT if block > erofs.SUPERBLOCK_AT else block
        data = bytearray(self._start[erofs.SUPERBLOCK_AT :][:length])
        data[4:8] = bytes(4)
        if len(data) < length:
            raise self._refuse("ends within its superblock")
        if erofs.crc32c(bytes(data)) != checksum:
            raise self._refuse("is damaged: the checksum of its superblock is wrong")

    def _compressed(self, name: str, known: set[str]) -> None:
        if name not in known:
            raise self._refuse(f"is compressed with {name}; the guest's kernel has {', '.join(sorted(known))}")

    def _complete(self, size: int) -> None:
        if size > self._size:
            raise self._refuse(f"is cut off: it has {self._size} of {size} bytes")

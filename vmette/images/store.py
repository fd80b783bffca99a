"""The cache of layers and images: content-addressed, shared by every vmette of this user.

An entry appears whole or not at all. It is made in a staging place under a lock, synchronised and renamed, so that two
processes that want it make it once, and one that dies leaves nothing that is taken for an entry.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ..files import synced
from ..locks import hold
from . import erofs, layers
from .archive import ArchiveError, Entry
from .tree import Tree

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.05
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_UNPACKED = "directory 1"
"""Another way to unpack is another number."""


def remove(path: Path) -> None:
    """Removes the file or the directory at `path`, if there is one."""
    if path.is_dir() and not path.is_symlink():
        for fd, name, is_directory in bottom_up(path):
            (os.rmdir if is_directory else os.unlink)(name, dir_fd=fd)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def bottom_up(path: Path) -> Iterator[tuple[int, str, bool]]:
    """What is below the directory at `path`: where (a descriptor), name, whether it is a directory, which comes last.

    An image may have more levels than there are descriptors, and longer paths than the kernel takes.
    """
    fd = os.open(path, _DIRECTORY)
    try:
        names: list[str] = []
        todo = [_listed(fd)]
        while todo:
            if todo[-1]:
                name, is_directory = todo[-1].pop()
                if is_directory:
                    fd = _moved(fd, name)
                    names.append(name)
                    todo.append(_listed(fd))
                else:
                    yield fd, name, False
            else:
                todo.pop()
                if names:
                    fd = _moved(fd, "..")
                    yield fd, names.pop(), True
    finally:
        os.close(fd)


def _listed(fd: int) -> list[tuple[str, bool]]:
    with os.scandir(fd) as there:
        return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in there]


def _moved(fd: int, name: str) -> int:
    """A descriptor of the directory `name`, in place of `fd`."""
    moved = os.open(name, _DIRECTORY, dir_fd=fd)
    os.close(fd)
    return moved


class Store:
    """The cache below `root`.

    Raises:
        OSError: from any method: it cannot be read or written.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.layers = root / "layers"
        self.images = root / "images"
        self.directories = root / "directories"
        self.downloads = root / "downloads"
        """What has been fetched in part: files by digest, written under their lock, gone when they have been read."""
        self.staging = root / "staging"
        self.locks = root / "locks"

    # --- entries

    @contextmanager
    def locked(self, name: str, cancelled: Callable[[], bool] = lambda: False) -> Iterator[None]:
        """Holds the lock `name`, which one process has at a time.

        Raises:
            InterruptedError: `cancelled` said so while another had it.
        """
        self.locks.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.locks / name
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                while True:
                    try:
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        if cancelled():
                            raise InterruptedError(f"waiting for {name} was given up") from None
                        time.sleep(POLL_SECONDS)
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), path.stat()):
                        break
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)  # the last holder has removed it
        try:
            yield
        finally:
            try:
                path.unlink(missing_ok=True)
            finally:
                os.close(fd)

    def entry(self, path: Path, make: Callable[[Path], None], cancelled: Callable[[], bool] = lambda: False) -> Path:
        """The entry at `path`, made by `make` at the place that it is given unless it is there."""
        if self.used(path):
            return path
        name = self.lock_of(path)
        with self.locked(name, cancelled):
            if self.used(path):  # somebody else has made it
                return path
            self.staging.mkdir(mode=0o700, exist_ok=True)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            staging = self.staging / name
            remove(staging)  # of one who died
            try:
                make(staging)
                os.utime(staging)  # it is new now, however long it took
                staging.rename(path)
            except BaseException:
                remove(staging)
                raise
            synced(path.parent)
        return path

    @staticmethod
    def lock_of(path: Path) -> str:
        """The name of the lock under which the entry at `path` comes and goes."""
        return f"{path.parent.name}-{path.name}"

    @staticmethod
    def used(path: Path) -> bool:
        """Whether there is an entry at `path`; it is marked as used then."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        except OSError:  # a cache that may only be read
            return path.exists()
        return True

    def discard(self, path: Path) -> None:
        """Removes the entry at `path`, which is damaged."""
        with self.locked(self.lock_of(path)):
            remove(path)

    # --- what is in it

    def layer(
        self,
        digest: str,
        convert: Callable[[Path], None],
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Path:
        """The directory of the layer `digest`, which `convert` fills if it is missing."""

        def make(staging: Path) -> None:
            staging.mkdir(mode=0o700)
            convert(staging)
            synced(staging)

        return self.entry(self.layer_path(digest), make, cancelled)

    def layer_path(self, digest: str) -> Path:
        """Where the layer `digest` is, if it is there.

        Raises:
            ArchiveError: it is no digest, but would lead somewhere else.
        """
        if "/" in digest or "\0" in digest:
            raise ArchiveError(f"{digest!r} is no digest")
        return self.layers / f"{digest.replace(':', '-')}.v{layers.FORMAT}"

    def image_path(self, sources: Sequence[Path], extra: Sequence[Path] = ()) -> Path:
        """Where the image of :meth:`image` is, if it is there. `sources` need not be there any more."""
        return self.images / f"{_name(erofs.FORMAT, sources, extra)}.erofs"

    def image(self, sources: Sequence[Path], limits: layers.Limits, extra: Sequence[Path] = ()) -> Path:
        """The EROFS image of the layers `sources`, the lowest first.

        Args:
            sources: Directories that :meth:`layer` gave.
            limits: What the image may cost.
            extra: Files of the host that go to usr/local/bin, mode 0755, whatever is there.

        Raises:
            ArchiveError: the layers do not make a root filesystem.
        """
        path = self.image_path(sources, extra)
        uuid = bytes.fromhex(path.stem)[:16]

        def make(staging: Path) -> None:
            with ExitStack() as stack:
                tree, files = self._open_layers(sources, limits, extra, stack)
                output = stack.enter_context(staging.open("xb"))
                erofs.write(tree, files, output, uuid)
                os.fsync(output.fileno())

        return self.entry(path, make)

    def _open_layers(
        self, sources: Sequence[Path], limits: layers.Limits, extra: Sequence[Path], stack: ExitStack
    ) -> tuple[Tree, list[BinaryIO]]:
        """The layers laid over each other, and their data."""
        tree = Tree(limits.max_entries)
        files: list[BinaryIO] = []
        numbers: dict[Path, int] = {}
        for source in sources:
            if source not in numbers:  # an empty layer often comes many times
                numbers[source] = len(files)
                files.append(stack.enter_context((source / "data").open("rb")))
                hold(files[-1].fileno())
            tree.apply(layers.read_index(source), numbers[source])
        for path in extra:
            entry = Entry(b"usr/local/bin/" + os.fsencode(path.name), "f", 0o755, size=path.stat().st_size)
            tree.apply([entry], len(files))
            files.append(stack.enter_context(path.open("rb")))
        return tree, files

    def directory_path(self, sources: Sequence[Path], extra: Sequence[Path] = ()) -> Path:
        """Where the root filesystem of :meth:`directory` is, if it is there."""
        return self.directories / _name(_UNPACKED, sources, extra) / "rootfs"

    def directory(self, sources: Sequence[Path], limits: layers.Limits, extra: Sequence[Path] = ()) -> Path:
        """The same root filesystem as a directory: see :meth:`image`."""

        def make(staging: Path) -> None:
            from .unpack import unpack

            (staging / "rootfs").mkdir(mode=0o700, parents=True)
            with ExitStack() as stack:
                tree, files = self._open_layers(sources, limits, extra, stack)
                fd = os.open(staging / "rootfs", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                unpack(tree, files, fd)
            os.sync()  # of so many files the disk has them sooner this way

        return self.entry(self.directory_path(sources, extra).parent, make) / "rootfs"


def _name(kind: object, sources: Sequence[Path], extra: Sequence[Path]) -> str:
    facts = [kind, *(path.name for path in sources), *map(_fingerprint, extra)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _fingerprint(path: Path) -> str:
    return f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}"

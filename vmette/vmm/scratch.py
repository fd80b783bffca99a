"""Files that hold what a VM writes, and are gone when it is."""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import suppress
from pathlib import Path

from .. import assets
from ..errors import VmmError, reason
from ..files import copy_with_holes


def unnamed(mib: int, saved: Path | None = None) -> int:
    """An ext4 file system of that size in a sparse file without a name: the kernel removes it with its last user.

    It is as `saved`, if there is such a file, or else empty.

    Raises:
        VmmError: it cannot be made in the cache directory.
    """
    import tempfile

    from ..images.ext4 import format_ext4

    directory = _directory()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            if saved is None:
                format_ext4(file.fileno(), mib << 20)
            else:
                with saved.open("rb") as source:
                    copy_with_holes(source.fileno(), file.fileno())
            return os.dup(file.fileno())
    except OSError as error:
        raise VmmError(f"cannot make a scratch disk of {mib} MiB in {directory}: {reason(error)}") from error


class Named:
    """A file for a VMM that takes paths alone. It is locked while it may be wanted.

    What a process that was killed has left of them goes when the next is made.

    Raises:
        VmmError: it cannot be made in the cache directory.
    """

    def __init__(self) -> None:
        import tempfile

        directory = _directory()
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            sweep(directory)
            while True:
                self.fd, name = tempfile.mkstemp(dir=directory, prefix="disk-")
                self.path = Path(name)
                fcntl.flock(self.fd, fcntl.LOCK_EX)
                if os.fstat(self.fd).st_nlink:
                    break
                os.close(self.fd)  # another process's sweep came between
        except OSError as error:
            raise VmmError(f"cannot make a disk in {directory}: {reason(error)}") from error

    @classmethod
    def scratch(cls, mib: int) -> Named:
        """With an ext4 file system of that size.

        Raises:
            VmmError: it cannot be made.
        """
        from ..images.ext4 import format_ext4

        made = cls()
        try:
            format_ext4(made.fd, mib << 20)
        except OSError as error:
            made.close()
            raise VmmError(f"cannot make a scratch disk of {mib} MiB in {made.path.parent}: {reason(error)}") from error
        return made

    @classmethod
    def copy(cls, path: Path) -> Named:
        """With what is in the file at `path`, which has holes.

        Raises:
            VmmError: it cannot be made.
        """
        made = cls()
        try:
            with path.open("rb") as file:
                copy_with_holes(file.fileno(), made.fd)
        except OSError as error:
            made.close()
            raise VmmError(f"cannot copy {path} to {made.path.parent}: {reason(error)}") from error
        return made

    @classmethod
    def padded(cls, image: Path, unit: int) -> Named:
        """A copy of `image` with zeros up to a multiple of `unit` bytes.

        Raises:
            VmmError: it cannot be made.
        """
        made = cls()
        try:
            shutil.copyfile(image, made.path)
            os.truncate(made.fd, -(-image.stat().st_size // unit) * unit)
        except OSError as error:
            made.close()
            raise VmmError(f"cannot copy {image} to {made.path.parent}: {reason(error)}") from error
        return made

    def forget_name(self) -> None:
        """Removes the name: who has the file open keeps it."""
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Removes the file, if its name is still there, and the lock."""
        if self.fd >= 0:
            self.forget_name()
            os.close(self.fd)
            self.fd = -1


def sweep(directory: Path) -> None:
    """Removes the files of :class:`Named` that nobody holds."""
    for path in directory.glob("disk-*"):
        with suppress(OSError):
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(fd)


def _directory() -> Path:
    return assets.cache_root() / "scratch"

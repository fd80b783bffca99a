"""The files of a running guest: what its agent's functions (csrc/guest/builtins.h) do, as methods.

Data is streamed in both directions. What the guest says of its files is hostile: names and numbers are checked, sizes
are bounded, and a tree that comes out of it becomes files of the host only by :func:`vmette.images.unpack.place`.
"""

from __future__ import annotations

import errno
import math
import os
import select
import stat
import struct
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, BinaryIO, Protocol, TypedDict, cast

from .config import Command
from .errors import ConfigError, GuestFileError, OutputTooLarge, ProtocolError, TimeoutExpired
from .guest import MAX_POLL
from .linux import strerror
from .process import MAX_OUTPUT
from .protocol import MAX_CONTROL, Tag, decode_error, decode_record

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from .images.tree import Node

MAX_ENTRIES = 1_000_000
"""Of a directory that is listed, and of a tree that comes out of the guest."""
MAX_LISTING = 128 << 20
"""Bytes of the records of a directory that is listed."""
MAX_COPY = 8 << 30
"""Bytes that are copied out of a guest at once unless a caller says otherwise."""
CHUNK = 1 << 18
GRACE_SECONDS = 2.0
"""What a function whose input ends early has to remove what it has begun."""

MAX_OFFSET = (1 << 63) - 1
MAX_NAME = 255
MAX_TARGET = 4095
_STAT = struct.Struct("<IIIIQqII")
_TYPES = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK}

GuestPath = str | bytes | PurePosixPath
"""An absolute path of the guest."""


class Options(TypedDict, total=False):
    """What all methods of :class:`Files` take."""

    user: str | None
    """`user[:group]`, names of the guest or numbers, with whose rights it is done; root's by default."""
    timeout: float | None
    """Seconds that it may take."""


@dataclass(frozen=True)
class Stat:
    """What the guest says of a file."""

    mode: int
    """Type and permissions, as in :mod:`stat`."""
    uid: int
    gid: int
    nlink: int
    size: int
    """Bytes."""
    mtime_ns: int
    """Nanoseconds since 1970."""
    rdev: tuple[int, int]
    """A device's major and minor number."""
    target: str | None
    """Where a symlink leads; None of anything else."""

    @property
    def is_dir(self) -> bool:
        """Whether it is a directory."""
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file."""
        return stat.S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        """Whether it is a symlink."""
        return stat.S_ISLNK(self.mode)


@dataclass(frozen=True)
class Entry:
    """An entry of a directory."""

    name: str
    """As :func:`os.fsdecode` has it, whatever bytes the guest made it of. Never `.`, `..`, or with a slash or NUL."""
    stat: Stat
    """Of the entry itself: a symlink is not followed."""


Entries = list[Entry]


class Process(Protocol):
    """A function of the agent that runs, with a pipe for each of its streams. Leaving it on an error kills it."""

    @property
    def stdin(self) -> IO[bytes] | None:
        """Our end of the pipe."""

    @property
    def stdout(self) -> IO[bytes] | None:
        """Likewise."""

    @property
    def stderr(self) -> IO[bytes] | None:
        """Likewise."""

    def __enter__(self) -> object: ...
    def __exit__(self, kind: type[BaseException] | None, /, *args: object) -> object: ...

    def wait(self) -> int:
        """Its return code."""


@dataclass(frozen=True, repr=False)
class Files:
    """The guest's files: :attr:`vmette.Sandbox.files`. All methods may be called from any thread.

    Paths are the guest's and absolute. All methods take the options of :class:`Options`. One that is interrupted, or
    whose time is over, ends what the guest does for it.

    Raises, from all methods:
        GuestFileError: the guest cannot do it. It is an OSError too, and a FileNotFoundError and so on where it fits.
        TimeoutExpired: the time is over.
        ConfigError: a path or an option cannot be used.
        CommandNotStarted: the guest does not have the user.
        ProtocolError: the guest's answer makes no sense.
        SandboxClosed, VmmError, GuestError: the VM has ended.
    """

    _start: Callable[[Command], Process]
    """Has the guest's agent begin a function."""
    _user: bytes | None = None
    _timeout: float | None = None
    _deadline: float | None = None

    # --- files

    def read(
        self,
        path: GuestPath,
        *,
        offset: int = 0,
        length: int | None = None,
        max_bytes: int = MAX_OUTPUT,
        **options: Unpack[Options],
    ) -> bytes:
        """The bytes of a file.

        Args:
            path: The file. A FIFO or a device is read to its end, or up to `length`.
            offset: Where to begin.
            length: How many bytes to read, at most; None is to the end.
            max_bytes: The most that are taken.
            options: See :class:`Options`.

        Raises:
            OutputTooLarge: there is more than `max_bytes`.
        """
        return b"".join(self._pieces(path, offset, length, max_bytes, options))

    def read_text(
        self, path: GuestPath, *, encoding: str = "utf-8", errors: str = "strict", **options: Unpack[Options]
    ) -> str:
        """The text of a file, which is decoded as :meth:`bytes.decode` does it."""
        return self.read(path, **options).decode(encoding, errors)

    def read_to(
        self,
        path: GuestPath,
        file: IO[bytes],
        *,
        offset: int = 0,
        length: int | None = None,
        max_bytes: int = MAX_COPY,
        **options: Unpack[Options],
    ) -> int:
        """Writes the bytes of a file, as :meth:`read` returns them, to `file`, and says how many they were.

        Raises:
            OutputTooLarge: there is more than `max_bytes`: so many have been written.
            OSError: `file` cannot be written.
        """
        written = 0
        with closing(self._pieces(path, offset, length, max_bytes, options)) as pieces:
            for piece in pieces:
                file.write(piece)
                written += len(piece)
        return written

    def _pieces(
        self, path: GuestPath, offset: int, length: int | None, max_bytes: int, options: Options
    ) -> Generator[bytes]:
        if offset < 0 or (length is not None and length < 0) or max_bytes < 0:
            raise ConfigError("an offset, a length or a limit is negative")
        wanted = min(MAX_OFFSET if length is None else length, max_bytes + 1)
        left = max_bytes
        with self._bound(options)._call(b"read", _encoded(path), b"%d" % offset, b"%d" % wanted) as call:
            while piece := call.read():
                if len(piece) > left:
                    yield piece[:left]
                    raise _too_large(path, max_bytes)
                left -= len(piece)
                yield piece

    def write(
        self, path: GuestPath, data: bytes, *, mode: int = 0o644, append: bool = False, **options: Unpack[Options]
    ) -> None:
        """Makes `data` the contents of a file, or adds it to them if `append` is set.

        The file is made with `mode` if it is not there. One that is there is written to, as it is.
        """
        self._write(path, [data], mode, append, options)

    def write_text(
        self,
        path: GuestPath,
        text: str,
        *,
        encoding: str = "utf-8",
        mode: int = 0o644,
        append: bool = False,
        **options: Unpack[Options],
    ) -> None:
        """As :meth:`write`, for text."""
        self._write(path, [text.encode(encoding)], mode, append, options)

    def write_from(
        self, path: GuestPath, file: IO[bytes], *, mode: int = 0o644, append: bool = False, **options: Unpack[Options]
    ) -> None:
        """As :meth:`write`, for what there is to read from `file`.

        Raises:
            OSError: `file` cannot be read. What was read has been written.
        """
        self._write(path, _chunks(file), mode, append, options)

    def _write(self, path: GuestPath, data: Iterable[bytes], mode: int, append: bool, options: Options) -> None:
        words = [b"append"] if append else []
        with self._bound(options)._call(b"write", _encoded(path), _mode(mode), *words, takes_input=True) as call:
            call.feed(data)

    # --- directories

    def list(self, path: GuestPath, **options: Unpack[Options]) -> Entries:
        """The entries of a directory, by name.

        Raises:
            OutputTooLarge: there are more than a million.
        """
        with self._bound(options)._call(b"list", _encoded(path)) as call:
            found = decode_entries(call.read_all(MAX_LISTING))
        return sorted(found, key=lambda entry: entry.name)

    def stat(self, path: GuestPath, *, follow: bool = True, **options: Unpack[Options]) -> Stat:
        """What there is to say of a file; of a symlink itself if `follow` is not set."""
        words = [] if follow else [b"nofollow"]
        with self._bound(options)._call(b"stat", _encoded(path), *words) as call:
            return _decode_stat(dict(decode_record(call.read_all(2 * MAX_TARGET))))

    def exists(self, path: GuestPath, **options: Unpack[Options]) -> bool:
        """Whether there is something at `path`; a symlink that leads nowhere is nothing."""
        try:
            self.stat(path, **options)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def mkdir(
        self,
        path: GuestPath,
        *,
        mode: int = 0o755,
        parents: bool = False,
        exist_ok: bool = False,
        **options: Unpack[Options],
    ) -> None:
        """Makes a directory, as :meth:`pathlib.Path.mkdir` does.

        Args:
            path: The directory.
            mode: Its mode, exactly.
            parents: Make the directories that lead to it too if they are missing, with mode 0755.
            exist_ok: It may be there already. Its mode stays as it is then.
            options: See :class:`Options`.
        """
        files, encoded = self._bound(options), _encoded(path)
        try:
            files._do(b"mkdir", encoded, _mode(mode))
        except FileNotFoundError:
            if not parents:
                raise
            files._do(b"mkdir", _parent(encoded), b"755", b"parents")
            files.mkdir(path, mode=mode, exist_ok=exist_ok)
        except FileExistsError:
            if not (exist_ok and files.stat(path).is_dir):
                raise

    def remove(
        self, path: GuestPath, *, recursive: bool = False, missing_ok: bool = False, **options: Unpack[Options]
    ) -> None:
        """Removes a file, a symlink (not what it leads to) or an empty directory.

        Args:
            path: What to remove.
            recursive: A directory goes with all that is in it.
            missing_ok: It need not be there.
            options: See :class:`Options`.
        """
        words = [*([b"recursive"] if recursive else []), *([b"missing"] if missing_ok else [])]
        self._bound(options)._do(b"remove", _encoded(path), *words)

    # --- trees

    def copy_in(
        self,
        source: str | os.PathLike[str],
        target: GuestPath,
        *,
        owners: bool = False,
        **options: Unpack[Options],
    ) -> None:
        """Copies a file or a tree of this computer into the guest, as `cp -r` would.

        If `target` is a directory, it gets a copy with the name that `source` has; one without a name of its own, such
        as `.` or `src/.`, stands for what is in it. Else the copy becomes `target`. Directories that are there take the
        new contents in; files that are there are replaced. Modes, times, hard links and symlinks are kept; sockets are
        left out. No symlink below `source` is followed, and none of the guest's below `target`.

        Args:
            source: A file or a directory of this computer.
            target: An absolute path of the guest. The directory that it is in must be there.
            owners: Keep the numbers of owners and groups, and devices: the user must be root. Else they are the user's.
            options: See :class:`Options`.

        Raises:
            OSError: `source` cannot be read, or changes while it is.
        """
        from .images.pack import packed

        files, path = self._bound(options), Path(source)
        place, name = files._landing(_encoded(target), _name_of(source))
        words = [b"owners"] if owners else []
        with closing(packed(path, name, owners=owners)) as pieces:
            first = next(pieces)  # what cannot be read at all leaves the guest alone
            with files._call(b"untar", place, *words, takes_input=True) as call:
                call.feed([first])
                call.feed(pieces)

    def _landing(self, target: bytes, name: bytes) -> tuple[bytes, bytes]:
        """The directory of the guest in which to make what is to be `target`, and its name there."""
        try:
            if self.stat(target).is_dir:
                return target, name
        except FileNotFoundError:
            parent = _parent(target)
            if not self.stat(parent).is_dir:
                raise _not_a_directory(parent) from None
        return _parent(target), os.fsencode(PurePosixPath(os.fsdecode(target)).name)

    def copy_out(
        self,
        source: GuestPath,
        target: str | os.PathLike[str],
        *,
        max_bytes: int = MAX_COPY,
        setuid: bool = False,
        **options: Unpack[Options],
    ) -> None:
        """Copies a file or a tree of the guest to this computer, as :meth:`copy_in` does the other way.

        All of it is received before anything becomes visible, and a new directory appears whole. The copies are this
        user's, with the times that the originals have, and their modes as far as the umask allows; but directories stay
        their owner's to change, and those that are there keep their modes. Symlinks are copied as such, wherever they
        lead. None is followed on the way, at or below `target`.

        Args:
            source: An absolute path of the guest. Itself, it may be a symlink.
            target: A path of this computer. The directory that it is in must be there.
            max_bytes: The most that the tree may have. As much is taken twice on the disk for a while.
            setuid: Keep set-user-ID and set-group-ID bits.
            options: See :class:`Options`.

        Raises:
            ArchiveError: it is larger than that or has more than a million files, has devices or FIFOs, or is damaged.
            OSError: `target` cannot be written, or is a symlink.
        """
        import tempfile

        encoded = _encoded(source)
        place, directory, name = _landing_on_host(Path(target), _name_of(encoded))
        try:
            with tempfile.TemporaryFile(dir=place) as spool:
                with self._bound(options)._call(b"tar", encoded) as call:
                    node = receive(cast("BinaryIO", call), spool, f"{_shown(source)} in the guest", max_bytes)
                _place(node, name, spool, place, directory, 0o7777 if setuid else 0o1777)
        finally:
            os.close(directory)

    def archive(
        self, path: GuestPath, file: IO[bytes], *, max_bytes: int = MAX_COPY, **options: Unpack[Options]
    ) -> None:
        """Writes a tar archive (PAX) to `file`: of what is in a directory, or of one file. The guest makes it: beware.

        Raises:
            OutputTooLarge: there is more than `max_bytes`: so many have been written.
            OSError: `file` cannot be written.
        """
        left = max_bytes
        with self._bound(options)._call(b"tar", _encoded(path)) as call:
            while piece := call.read():
                file.write(piece[:left])
                if len(piece) > left:
                    raise _too_large(path, max_bytes)
                left -= len(piece)

    def unarchive(
        self, file: IO[bytes], target: GuestPath, *, owners: bool = False, **options: Unpack[Options]
    ) -> None:
        """Unpacks the tar archive that there is to read from `file` into a directory, which is made if it is missing.

        Names in it cannot lead out of `target`, and no symlink below that is followed.

        Args:
            file: The archive, which is not compressed.
            target: The directory.
            owners: Keep owners and devices, as :meth:`copy_in` does.
            options: See :class:`Options`.

        Raises:
            OSError: `file` cannot be read.
        """
        words = [b"owners"] if owners else []
        with self._bound(options)._call(b"untar", _encoded(target), *words, takes_input=True) as call:
            call.feed(_chunks(file))

    # --- calls

    def _bound(self, options: Options) -> Files:
        """These files, by what a method's caller asked for: then the method's own calls need not be told again."""
        if not options:
            return self
        user, timeout = options.get("user"), options.get("timeout")
        if user is not None and "\0" in user:
            raise ConfigError(f"user {user!r} has a NUL in it")
        if timeout is not None and not (math.isfinite(timeout) and timeout >= 0):
            raise ConfigError(f"a time-out of {timeout} seconds cannot be kept")
        deadline = None if timeout is None else time.monotonic() + timeout
        return replace(self, _user=None if user is None else os.fsencode(user), _timeout=timeout, _deadline=deadline)

    def _call(self, *argv: bytes, takes_input: bool = False) -> _Call:
        command = Command(argv, user=self._user, builtin=True)
        return _Call(self._start(command), command, self._timeout, self._deadline, takes_input)

    def _do(self, *argv: bytes) -> None:
        """Has a function do what takes and gives no data."""
        with self._call(*argv):
            pass


class _Call:
    """A function of the agent while it runs. A context manager: it ends when the function has, and raises its failure.

    Of the pipes we use the descriptors: what comes on stderr has to be taken whatever else one waits for, since a
    function that cannot get rid of that does not end either.
    """

    def __init__(
        self, process: Process, command: Command, timeout: float | None, deadline: float | None, takes_input: bool
    ) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        self._process = process
        self._command = command
        self._timeout = timeout
        self._deadline = deadline
        self._takes_input = takes_input
        self._stdin, self._stdout, self._stderr = process.stdin, process.stdout, process.stderr
        self._said = bytearray()
        self._code: int | None = None
        self._ended = False
        """Whether stderr has: so it is when the function has ended."""

    def __enter__(self) -> Self:
        self._process.__enter__()
        if self._takes_input:
            os.set_blocking(self._stdin.fileno(), False)
            self._stdout.close()  # there is nothing to say
        else:
            self._stdin.close()
        return self

    def __exit__(self, kind: type[BaseException] | None, *args: object) -> None:
        try:
            if kind is None:
                self._finish()
            elif self._takes_input:
                self._end_input()
        except BaseException as error:
            self._process.__exit__(type(error), error, error.__traceback__)
            raise
        else:
            self._process.__exit__(kind, *args)
        finally:
            for file in (self._stdin, self._stdout, self._stderr):
                file.close()

    def read(self, size: int = CHUNK) -> bytes:
        """At least one and at most `size` bytes of what the function says; none when it has ended, and well."""
        self._wait_for(self._stdout, select.POLLIN)
        data = os.read(self._stdout.fileno(), size)
        if not data:
            self._finish()
        return data

    def read_all(self, limit: int) -> bytes:
        """All that the function says.

        Raises:
            OutputTooLarge: it is more than `limit` bytes.
        """
        data = bytearray()
        while piece := self.read():
            data += piece
            if len(data) > limit:
                raise OutputTooLarge(f"what the guest says of {self._path} is more than {limit} bytes")
        return bytes(data)

    def feed(self, data: Iterable[bytes]) -> None:
        """Gives the function its input, or more of it."""
        for piece in data:
            rest = memoryview(piece)
            while rest:
                self._wait_for(self._stdin, select.POLLOUT)
                try:
                    rest = rest[os.write(self._stdin.fileno(), rest) :]
                except BrokenPipeError:
                    self._finish()
                    raise self._failure(errno.EPIPE, "it was not taken whole") from None

    def _finish(self) -> None:
        """Waits for the function's end.

        Raises:
            GuestFileError: it failed.
        """
        self._stdin.close()
        self._stdout.close()
        while not self._ended:
            self._wait(None, 0)
        code = self._code = self._process.wait() if self._code is None else self._code
        if code == 0:
            return
        said = decode_error(0, bytes(self._said))
        if said.errno == 0:
            how = f"was killed by signal {-code}" if code < 0 else f"failed with status {code}"
            raise self._failure(errno.EIO, f"the guest's function {os.fsdecode(self._command.argv[0])!r} {how}")
        raise self._failure(said.errno, said.text.removeprefix(f"{self._path}: ") or strerror(said.errno))

    def _end_input(self) -> None:
        """Has a function that is given up remove what it has begun: it is not to be killed before that."""
        self._stdin.close()
        self._deadline = time.monotonic() + GRACE_SECONDS
        with suppress(TimeoutExpired, ProtocolError):
            while not self._ended:
                self._wait(None, 0)

    def _wait_for(self, file: IO[bytes], mask: int) -> None:
        while not self._wait(file, mask):
            pass

    def _wait(self, file: IO[bytes] | None, mask: int) -> bool:
        """Waits until `file` is ready, and says so, or until something has come on stderr."""
        poll = select.poll()
        if file is not None:
            poll.register(file, mask)
        if not self._ended:
            poll.register(self._stderr, select.POLLIN)
        patience = None if self._deadline is None else self._deadline - time.monotonic()
        if patience is not None and patience <= 0:
            raise TimeoutExpired(tuple(map(os.fsdecode, self._command.argv)), self._timeout or 0, None, None)
        ready = {fd for fd, _ in poll.poll(None if patience is None else math.ceil(min(patience * 1000, MAX_POLL)))}
        if not self._ended and self._stderr.fileno() in ready:
            self._said += (data := os.read(self._stderr.fileno(), MAX_CONTROL))
            self._ended = not data
            if len(self._said) > MAX_CONTROL:
                raise ProtocolError("the guest sent an error that is too long")
        return file is not None and file.fileno() in ready

    @property
    def _path(self) -> str:
        return _shown(self._command.argv[1])

    def _failure(self, number: int, text: str) -> GuestFileError:
        return GuestFileError(number, text, self._path)


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while data := file.read(CHUNK):
        yield data


# --- paths of the guest


def _encoded(path: GuestPath) -> bytes:
    """A path as the guest takes it.

    Raises:
        ConfigError: it is not absolute, has a NUL, or is no text.
    """
    try:
        encoded = os.fsencode(path)
    except (UnicodeEncodeError, TypeError):
        raise ConfigError(f"the guest's path {path!r} is none") from None
    if b"\0" in encoded or not encoded.startswith(b"/"):
        raise ConfigError(f"the guest's path {_shown(encoded)!r} must be absolute and have no NUL in it")
    return encoded


def _shown(path: GuestPath) -> str:
    """For messages."""
    return "".join(c if c.isprintable() else "?" for c in os.fsencode(path).decode("utf-8", "replace"))


def _parent(path: bytes) -> bytes:
    return os.fsencode(PurePosixPath(os.fsdecode(path)).parent)


def _name_of(path: str | bytes | os.PathLike[str]) -> bytes:
    """The name that a copy gets; none where what is copied has none of its own."""
    name = os.fsencode(path).rstrip(b"/").rpartition(b"/")[2]
    return b"" if name in {b".", b".."} else name


def _mode(mode: int) -> bytes:
    if not 0 <= mode <= 0o7777:
        raise ConfigError(f"mode {mode:#o} is none: permissions are up to 0o7777")
    return b"%o" % mode


def _too_large(path: GuestPath, limit: int) -> OutputTooLarge:
    return OutputTooLarge(f"{_shown(path)} in the guest is larger than {limit} bytes: raise the limit")


def _not_a_directory(path: bytes) -> GuestFileError:
    return GuestFileError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), _shown(path))


# --- what the guest says of files


def decode_entries(payload: bytes) -> Entries:
    """The entries that a `list` of the agent says: NAME, STAT and TARGET (docs/protocol.md) of each.

    Raises:
        ProtocolError: they make no sense.
        OutputTooLarge: there are too many of them.
    """
    found: Entries = []
    name: bytes | None = None
    fields: dict[int, bytes] = {}
    for tag, value in decode_record(payload):
        if tag == Tag.NAME:
            if name is not None:
                found.append(Entry(_decode_name(name), _decode_stat(fields)))
            if len(found) >= MAX_ENTRIES:
                raise OutputTooLarge(f"the directory has more than {MAX_ENTRIES} entries")
            name, fields = value, {}
        else:
            fields[tag] = value
    if name is not None:
        found.append(Entry(_decode_name(name), _decode_stat(fields)))
    return found


def _decode_name(name: bytes) -> str:
    if name in {b"", b".", b".."} or b"/" in name or b"\0" in name or len(name) > MAX_NAME:
        raise ProtocolError("the guest sent a name that no file has")
    return os.fsdecode(name)


def _decode_stat(fields: Mapping[int, bytes]) -> Stat:
    value, target = fields.get(Tag.STAT, b""), fields.get(Tag.TARGET)
    if len(value) != _STAT.size:
        raise ProtocolError("the guest did not say what a file is")
    mode, uid, gid, nlink, size, mtime, major, minor = _STAT.unpack(value)
    if stat.S_IFMT(mode) not in _TYPES or mode >= 1 << 16 or size > MAX_OFFSET:
        raise ProtocolError("the guest told of a file that cannot be")
    if (target is not None) != stat.S_ISLNK(mode) or b"\0" in (target or b"") or len(target or b"") > MAX_TARGET:
        raise ProtocolError("the guest told of a symlink that cannot be")
    return Stat(mode, uid, gid, nlink, size, mtime, (major, minor), None if target is None else os.fsdecode(target))


# --- trees that come out of the guest


def _landing_on_host(target: Path, name: bytes) -> tuple[Path, int, bytes]:
    """The directory in which to make what is to be `target`, a descriptor of it, and the name there."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    try:  # at once, not after a look: a guest may have the directory that it is in, by a share
        return target, os.open(target, flags | os.O_NOFOLLOW), name
    except (FileNotFoundError, NotADirectoryError):
        if target.is_symlink():
            raise OSError(errno.ELOOP, "it is a symlink, which is not followed", str(target)) from None
    return target.parent, os.open(target.parent, flags), os.fsencode(target.name)


def receive(archive: BinaryIO, spool: BinaryIO, what: str, max_bytes: int = MAX_COPY) -> Node:
    """The file or the tree that a `tar` of the agent says; the bytes of its files go to `spool`.

    Raises:
        ArchiveError: it is damaged, too large, or nothing that is copied. `what` is what it calls it.
    """
    from .images.archive import ArchiveError
    from .images.layers import Limits, spooled
    from .images.tree import Tree

    limits = Limits(max_bytes, MAX_ENTRIES)
    try:
        entries = list(spooled(archive, spool, limits, whiteouts=False))
        for entry in entries:
            if entry.kind in "cbp":
                kind = "a FIFO" if entry.kind == "p" else "a device"
                raise ArchiveError(f"{_shown(b'/' + entry.path)} in it is {kind}, which is not copied")
        if not entries:
            raise ArchiveError("there is nothing that could be copied")
        tree = Tree(limits.max_entries)
        tree.apply(entries, 0)
        if not entries[0].path:
            return tree.root
        file = (tree.root.children or {})[entries[0].path] if b"/" not in entries[0].path else None
        if len(entries) > 1 or file is None or file.kind != "f":
            raise ArchiveError("it is neither a directory nor a file")
    except ArchiveError as error:
        raise ArchiveError(f"{what}: {error}") from error
    return file


def _place(node: Node, name: bytes, spool: BinaryIO, place: Path, directory: int, modes: int) -> None:
    """Makes `node`, as `name`, in the directory `place`, which is open."""
    from .images.store import remove
    from .images.unpack import new_name
    from .images.unpack import place as write

    if not name:
        write(node.children or {}, [spool], directory, modes=modes)
    elif node.kind != "d" or _is_there(name, directory):
        write({name: node}, [spool], directory, modes=modes)
    else:
        draft = new_name()
        try:
            write({os.fsencode(draft): node}, [spool], directory, modes=modes)
            os.rename(draft, name, src_dir_fd=directory, dst_dir_fd=directory)
        except BaseException:
            remove(place / draft)
            raise


def _is_there(name: bytes, directory: int) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True

"""Writing a tree as a directory of the host, where nothing of it may lead anywhere else.

Every name is made relative to a descriptor of its own directory: no path of the tree is ever resolved by the host.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import BinaryIO

from .layers import extents, write_at
from .tree import TYPES, Node, Tree

OVERRIDE = "user.containers.override_stat"
"""`uid:gid:mode` (mode in octal, with the type) of what this user may not set: the convention of containers/storage."""
CHUNK = 1 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def unpack(tree: Tree, layers: Sequence[BinaryIO], directory: int) -> None:
    """Writes `tree`, whose files' bytes are in `layers` by number, to the empty directory open as `directory`.

    Root sets owners, devices and attributes. Another user makes them files of his own and notes them in an attribute.

    Raises:
        OSError: something cannot be written; EEXIST where the file system does not tell two names apart.
    """
    _Unpacker(layers).directory(tree.root, directory)


def place(nodes: Mapping[bytes, Node], layers: Sequence[BinaryIO], directory: int, *, modes: int = 0o1777) -> None:
    """Writes `nodes`, by their names, into the directory open as `directory`, which others may be using.

    They become files of this user's, with their times and with those bits of their modes that `modes` has and the umask
    allows. Directories stay their owner's to change, so that he can get rid of them. Directories that are there take
    the new contents in and keep their modes; anything else that is there is replaced, and never followed.

    Raises:
        OSError: something cannot be written; EISDIR or ENOTDIR where a directory and something else have one name.
    """
    top = Node("d")
    top.children = dict(nodes)
    _Placer(layers, modes & (0o7000 | _permissions(directory))).contents(top, directory)


def new_name() -> str:
    """A name that nothing else has, for what is not finished."""
    return f".vmette-{secrets.token_hex(8)}"


class _Unpacker:
    def __init__(self, layers: Sequence[BinaryIO]) -> None:
        self._layers = layers
        self._root = os.geteuid() == 0
        self._several: set[int] = set()
        """The files with several names."""
        self._made: dict[int, str] = {}
        """Those that are there, by their names in the directory that is open as `_links`."""
        self._links = -1

    def directory(self, root: Node, top: int) -> None:
        """Writes `root`."""
        self.contents(root, top)
        self._attributes(root, top)  # when nothing more is made in it

    def contents(self, root: Node, top: int) -> None:
        """Writes what is in `root`."""
        self._several = _with_several_names(root)
        if not self._several:
            self._below(root, top)
            return
        # While we work, files with several names have another one that is short and known.
        name = new_name()
        os.mkdir(name, 0o700, dir_fd=top)
        self._links = os.open(name, _DIRECTORY, dir_fd=top)
        try:
            self._below(root, top)
        finally:
            for link in self._made.values():
                os.unlink(link, dir_fd=self._links)
            os.close(self._links)
            os.rmdir(name, dir_fd=top)

    def _below(self, root: Node, top: int) -> None:
        """Writes what is in `root`, directories after what is in them: depth first with one descriptor."""
        fd = os.dup(top)
        try:
            stack = [(root, sorted(root.children or {}, reverse=True), _identity(fd))]
            while True:
                node, names, _ = stack[-1]
                assert node.children is not None
                if names:
                    name = names.pop()
                    child = node.children[name]
                    if child.kind != "d":
                        self._file(child, name, fd)
                        continue
                    self._make_directory(child, name, fd)
                    there = os.open(name, _DIRECTORY, dir_fd=fd)
                    stack.append((child, sorted(child.children or {}, reverse=True), _identity(there)))
                elif len(stack) == 1:
                    return
                else:
                    stack.pop()
                    there = os.open("..", _DIRECTORY, dir_fd=fd)
                    try:
                        if _identity(there) != stack[-1][2]:
                            raise OSError(errno.ESTALE, "a directory was moved while it was written")
                        self._attributes(node, fd)
                    except BaseException:
                        os.close(there)
                        raise
                os.close(fd)
                fd = there
        finally:
            os.close(fd)

    def _make_directory(self, node: Node, name: bytes, fd: int) -> None:  # noqa: ARG002 (for those who need it)
        os.mkdir(name, 0o700, dir_fd=fd)

    def _file(self, node: Node, name: bytes, fd: int) -> None:
        first = self._made.get(id(node))
        if first is None:
            self._new_file(node, name, fd)
            if id(node) in self._several:
                first = str(len(self._made))
                os.link(name, first, src_dir_fd=fd, dst_dir_fd=self._links, follow_symlinks=False)
                self._made[id(node)] = first
        else:
            os.link(first, name, src_dir_fd=self._links, dst_dir_fd=fd, follow_symlinks=False)

    def _new_file(self, node: Node, name: bytes, fd: int) -> None:
        if node.kind == "l":
            os.symlink(node.target, name, dir_fd=fd)
            if self._root:
                os.chown(name, node.uid, node.gid, dir_fd=fd, follow_symlinks=False)
            os.utime(name, ns=(node.mtime, node.mtime), dir_fd=fd, follow_symlinks=False)
        elif node.kind in "cbp" and self._root:
            os.mknod(name, TYPES[node.kind][0] | 0o600, os.makedev(*node.device), dir_fd=fd)
            os.chown(name, node.uid, node.gid, dir_fd=fd, follow_symlinks=False)
            os.chmod(name, node.mode, dir_fd=fd)  # it is no symlink: we made it
            os.utime(name, ns=(node.mtime, node.mtime), dir_fd=fd, follow_symlinks=False)
        else:
            file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=fd)
            try:
                if node.kind == "f":
                    self._data(node, file)
                self._attributes(node, file)
            finally:
                os.close(file)

    def _data(self, node: Node, file: int) -> None:
        if node.size:
            source = self._layers[node.layer]
            for first, end in extents(source, node.offset, node.offset + node.size):
                for at in range(first, end, CHUNK):
                    data = os.pread(source.fileno(), min(CHUNK, end - at), at)
                    if data.strip(b"\0"):
                        write_at(file, data, at - node.offset)
        os.truncate(file, node.size)

    def _attributes(self, node: Node, fd: int) -> None:
        if self._root:
            os.fchown(fd, node.uid, node.gid)
            os.fchmod(fd, node.mode)
        else:
            os.fchmod(fd, node.mode & 0o700 | (0o700 if node.kind == "d" else 0o600))
        for name, value in self._kept(node).items():
            _set_attribute(fd, name, value)
        os.utime(fd, ns=(node.mtime, node.mtime))

    def _kept(self, node: Node) -> Mapping[bytes, bytes]:
        if self._root:
            return node.xattrs
        text = f"{node.uid}:{node.gid}:{TYPES[node.kind][0] | node.mode:07o}"
        if node.kind in "cb":
            text += ":{}:{}".format(*node.device)
        kept = {name: value for name, value in node.xattrs.items() if name.startswith(b"user.")}
        return {**kept, OVERRIDE.encode(): text.encode()}


class _Placer(_Unpacker):
    """Writes files as this user makes them, into what may be there. There are no devices among them."""

    def __init__(self, layers: Sequence[BinaryIO], modes: int) -> None:
        super().__init__(layers)
        self._root = False
        self._modes = modes
        self._there: set[int] = set()
        """The directories that have not been made here."""

    def _make_directory(self, node: Node, name: bytes, fd: int) -> None:
        try:
            super()._make_directory(node, name, fd)
        except FileExistsError:  # if it is something else, it does not open
            self._there.add(id(node))

    def _file(self, node: Node, name: bytes, fd: int) -> None:
        """It gets its name when it is whole, in place of what has it."""
        draft = os.fsencode(new_name())
        try:
            super()._file(node, draft, fd)
            os.rename(draft, name, src_dir_fd=fd, dst_dir_fd=fd)
        finally:
            with suppress(FileNotFoundError):  # else it failed; or both were names of one file, and have stayed
                os.unlink(draft, dir_fd=fd)

    def _attributes(self, node: Node, fd: int) -> None:
        if id(node) not in self._there:
            os.fchmod(fd, node.mode & self._modes | (0o700 if node.kind == "d" else 0))
        os.utime(fd, ns=(node.mtime, node.mtime))


def _permissions(directory: int) -> int:
    """Those that a new file there can have. It takes one to tell: who asks for the umask sets it, for all threads."""
    name = new_name()
    fd = os.open(name, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o777, dir_fd=directory)
    try:
        return os.fstat(fd).st_mode & 0o777
    finally:
        os.close(fd)
        os.unlink(name, dir_fd=directory)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _with_several_names(root: Node) -> set[int]:
    once: set[int] = set()
    several: set[int] = set()
    todo = [root]
    while todo:
        for child in (todo.pop().children or {}).values():
            if child.kind == "d":
                todo.append(child)
            else:
                (several if id(child) in once else once).add(id(child))
    return several


def _set_attribute(fd: int, name: bytes, value: bytes) -> None:
    """Sets an extended attribute; a file system that has none does without."""
    import xattr

    try:
        xattr.setxattr(fd, name, value)
    except OSError as error:
        if error.errno not in {errno.ENOTSUP, errno.EPERM}:
            raise

"""Writing a tree as a directory of the host, where nothing of it may lead anywhere else.

Every name is made relative to a descriptor of its own directory, which was made here a moment before in a place that
is nobody else's: no path of the image is ever resolved by the host.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import BinaryIO

from .tree import TYPES, Node, Tree

OVERRIDE = "user.containers.override_stat"
"""`uid:gid:mode` (mode in octal, with the type) of what this user may not set: the convention of containers/storage."""
CHUNK = 1 << 20


def unpack(tree: Tree, layers: Sequence[BinaryIO], directory: int) -> None:
    """Writes `tree`, whose files' bytes are in `layers` by number, to the empty directory open as `directory`.

    Root sets owners, devices and attributes. Another user makes them files of his own and notes them in an attribute.

    Raises:
        OSError: something cannot be written; EEXIST where the file system does not tell two names apart.
    """
    _Unpacker(layers).directory(tree.root, directory)


class _Unpacker:
    def __init__(self, layers: Sequence[BinaryIO]) -> None:
        self._layers = layers
        self._root = os.geteuid() == 0
        self._made: dict[int, str] = {}
        """Where the first name of a file with several is, relative to the root; made by us, of real directories."""
        self._top = -1

    def directory(self, root: Node, top: int) -> None:
        """Writes what is in `root`, directories after what is in them."""
        self._top = top
        # (node, descriptor, names still to do, path): depth first without recursion
        stack = [(root, os.dup(top), sorted(root.children or {}), b"")]
        try:
            while stack:
                node, fd, names, path = stack[-1]
                assert node.children is not None
                if not names:
                    stack.pop()
                    self._finish(node, fd)
                    continue
                name = names.pop()
                child = node.children[name]
                if child.kind == "d":
                    os.mkdir(name, 0o700, dir_fd=fd)
                    inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
                    stack.append((child, inner, sorted(child.children or {}), path + name + b"/"))
                else:
                    self._file(child, name, fd, os.fsdecode(path + name))
        finally:
            for _, fd, _, _ in stack:
                os.close(fd)

    def _file(self, node: Node, name: bytes, fd: int, path: str) -> None:
        first = self._made.get(id(node))
        if first is not None:
            os.link(first, name, src_dir_fd=self._top, dst_dir_fd=fd, follow_symlinks=False)
            return
        self._made[id(node)] = path
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
        at = 0
        while at < node.size:
            data = os.pread(self._layers[node.layer].fileno(), min(CHUNK, node.size - at), node.offset + at)
            if not data:
                break  # a hole at the end
            if data.strip(b"\0"):
                os.pwrite(file, data, at)
            at += len(data)
        os.truncate(file, node.size)

    def _finish(self, node: Node, fd: int) -> None:
        """A directory gets its mode and times when nothing more is made in it."""
        self._attributes(node, fd)
        os.close(fd)

    def _attributes(self, node: Node, fd: int) -> None:
        if self._root:
            os.fchown(fd, node.uid, node.gid)
            os.fchmod(fd, node.mode)
        else:
            os.fchmod(fd, node.mode & 0o700 | (0o700 if node.kind == "d" else 0o600))
        for name, value in self._kept(node).items():
            _set_attribute(fd, name, value)
        os.utime(fd, ns=(node.mtime, node.mtime))

    def _kept(self, node: Node) -> dict[bytes, bytes]:
        if self._root:
            return node.xattrs
        text = f"{node.uid}:{node.gid}:{TYPES[node.kind][0] | node.mode:07o}"
        if node.kind in "cb":
            text += ":{}:{}".format(*node.device)
        kept = {name: value for name, value in node.xattrs.items() if name.startswith(b"user.")}
        return {**kept, OVERRIDE.encode(): text.encode()}


def _set_attribute(fd: int, name: bytes, value: bytes) -> None:
    """Sets an extended attribute; a file system that has none does without."""
    import errno

    import xattr

    try:
        xattr.setxattr(fd, name, value)
    except OSError as error:
        if error.errno not in {errno.ENOTSUP, errno.EPERM}:
            raise

"""Layers laid over each other, in memory: what OCI's image-spec says in layer.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from .archive import MAX_PATH, MAX_TEXT, ArchiveError, Entry

MAX_LINKS = 40
"""Symlinks on the way to one entry, as in Linux."""
MAX_STEPS = 8192
"""Components on the way to one entry, those of the symlinks' targets among them."""
MAX_WALK = 100_000_000
"""Components on the way to all entries together: that is what laying the layers takes time for."""

# The type bits of a mode (inode(7)), and the kernel's FT_* number for directory entries.
TYPES = {
    "f": (0o100000, 1),
    "d": (0o040000, 2),
    "c": (0o020000, 3),
    "b": (0o060000, 4),
    "p": (0o010000, 5),
    "l": (0o120000, 7),
}


class Node:
    """A file of the tree. Hard links are names of one node."""

    __slots__ = (
        "children",
        "device",
        "gid",
        "kind",
        "layer",
        "mode",
        "mtime",
        "offset",
        "size",
        "target",
        "uid",
        "xattrs",
    )

    def __init__(self, kind: str, entry: Entry | None = None, layer: int = -1) -> None:
        self.kind = kind
        """f, d, l, c, b or p, as in :class:`Entry`."""
        self.layer = layer
        """The number of the layer that a file's data is in."""
        self.children: dict[bytes, Node] | None = {} if kind == "d" else None
        self.mode, self.uid, self.gid, self.mtime = 0o755, 0, 0, 0
        self.size = self.offset = 0
        self.target = b""
        self.device = (0, 0)
        self.xattrs: Mapping[bytes, bytes] = {}
        if entry is not None:
            self.set(entry)

    def set(self, entry: Entry) -> None:
        """Takes over what `entry` says."""
        self.mode, self.uid, self.gid, self.mtime = entry.mode, entry.uid, entry.gid, entry.mtime
        self.size, self.offset, self.target = entry.size, entry.offset, entry.target
        self.device, self.xattrs = entry.device, entry.xattrs


class Tree:
    """A root filesystem that grows by one layer after the other, the lowest first.

    Symlinks on the way to an entry are followed as the guest would follow them, within the tree: a layer may say
    `lib/x` where a lower one made `lib` a link to `usr/lib`.
    """

    def __init__(self, max_nodes: int) -> None:
        self.root = Node("d")
        self._max = max_nodes
        self._count = 0
        self._text = 0
        self._steps = 0
        self._last: tuple[bytes, Node, int] | None = None
        """The way to the last entry's directory: the next one is there too as a rule."""

    def apply(self, entries: Iterable[Entry], layer: int) -> None:
        """Lays a layer, whose number is `layer`, over what is there.

        Raises:
            ArchiveError: an entry cannot be where it says it is.
        """
        entries = list(entries)
        # Whiteouts are for lower layers, wherever in their own they come.
        whiteouts = [entry for entry in entries if entry.kind in "wo"]
        if whiteouts:
            with self._new_directories(entries):
                for entry in whiteouts:
                    self._remove(entry)
        self._last = None
        for entry in entries:
            if entry.kind not in "wo":
                self._add(entry, layer)

    @contextmanager
    def _new_directories(self, entries: list[Entry]) -> Iterator[None]:
        """For a while, what a directory of `entries` replaces is an empty directory.

        Whiteouts below it have nothing to do with what was there, which may be a symlink to another directory.
        """
        replaced: list[tuple[Node, bytes, Node, Node]] = []
        for entry in entries:
            if entry.kind == "d" and entry.path:
                parent, _, name = entry.path.rpartition(b"/")
                directory, _ = self._directory(parent, make=False)
                old = directory.children.get(name) if directory is not None and directory.children else None
                if directory is not None and directory.children and old is not None and old.kind != "d":
                    directory.children[name] = new = Node("d")
                    replaced.append((directory, name, old, new))
        yield
        for directory, name, old, new in reversed(replaced):
            if directory.children and directory.children.get(name) is new:  # there was no whiteout for it
                directory.children[name] = old

    def _remove(self, entry: Entry) -> None:
        if entry.kind == "o":
            directory, _ = self._directory(entry.path, make=False)
            if directory is not None:
                directory.children = {}
            return
        parent, _, name = entry.path.rpartition(b"/")
        directory, _ = self._directory(parent, make=False)
        if directory is not None and directory.children is not None:
            directory.children.pop(name, None)

    def _add(self, entry: Entry, layer: int) -> None:
        self._counted(entry.text)
        if not entry.path:
            self.root.set(entry)
            return
        parent, _, name = entry.path.rpartition(b"/")
        if self._last is not None and self._last[0] == parent:
            _, directory, length = self._last
        else:
            found, length = self._directory(parent, make=True)
            assert found is not None
            directory = found
            self._last = parent, directory, length
        assert directory.children is not None
        _check_length(length, name)
        there = directory.children.get(name)
        if there is not None and there.kind in "dl":
            self._last = None  # what was a way may lead elsewhere now
        if entry.kind == "d" and there is not None and there.kind == "d":
            there.set(entry)
            return
        if entry.kind == "h":
            node = self.find(entry.target)
            if node is None or node.kind == "d":
                raise ArchiveError(
                    f"the hard link {_name(entry.path)} leads to {_name(entry.target)}, which is no file"
                )
        else:
            node = Node(entry.kind, entry, layer)
            self._count += 1
        directory.children[name] = node
        self._counted(0)

    def _counted(self, text: int) -> None:
        self._text += text
        if self._count > self._max:
            raise ArchiveError(f"there are more than {self._max} files")
        if self._text > MAX_TEXT:
            raise ArchiveError(f"the files' names and attributes are more than {MAX_TEXT} bytes")

    def find(self, path: bytes) -> Node | None:
        """What is at `path`; a symlink there is not followed."""
        parent, _, name = path.rpartition(b"/")
        directory, _ = self._directory(parent, make=False)
        if directory is None or directory.children is None:
            return None
        return directory.children.get(name) if name else directory

    def _directory(self, path: bytes, *, make: bool) -> tuple[Node | None, int]:
        """The directory at `path`, and the length of its own path with a slash; symlinks are followed within the tree.

        It is made if it is missing and `make` is set.
        """
        trail = [self.root]
        lengths = [0]
        todo = path.split(b"/")[::-1] if path else []
        links = 0
        steps = 0
        while todo:
            part = todo.pop()
            steps += 1
            self._steps += 1
            if self._steps > MAX_WALK:
                raise ArchiveError("the ways to the files are too long")
            if steps > MAX_STEPS:
                raise ArchiveError(f"the way to {_name(path)} is too long")
            if part in {b"", b"."}:
                continue
            if part == b"..":
                if len(trail) > 1:
                    trail.pop()
                    lengths.pop()
                continue
            children = trail[-1].children
            assert children is not None
            node = children.get(part)
            if node is None:
                if not make:
                    return None, 0
                _check_length(lengths[-1], part)
                node = children[part] = Node("d")
                self._count += 1
                self._counted(len(part))
            if node.kind == "l":
                links += 1
                if links > MAX_LINKS:
                    if make:
                        raise ArchiveError(f"there are too many symlinks on the way to {_name(path)}")
                    return None, 0
                todo += node.target.split(b"/")[::-1]
                if node.target.startswith(b"/"):
                    del trail[1:], lengths[1:]
                continue
            if node.kind != "d":
                if make:
                    raise ArchiveError(f"there is a file on the way to {_name(path)}")
                return None, 0
            trail.append(node)
            lengths.append(lengths[-1] + len(part) + 1)
        return trail[-1], lengths[-1]

    def walk(self) -> Iterator[tuple[bytes, Node]]:
        """Every (path, node), a directory before what is in it, names in the order of their bytes."""
        yield b"", self.root
        todo = [(b"", _sorted(self.root))]
        while todo:
            prefix, names = todo[-1]
            if not names:
                todo.pop()
                continue
            name, node = names.pop()
            yield prefix + name, node
            if node.children:
                todo.append((prefix + name + b"/", _sorted(node)))


def _sorted(node: Node) -> list[tuple[bytes, Node]]:
    assert node.children is not None
    return sorted(node.children.items(), reverse=True)


def _check_length(directory: int, name: bytes) -> None:
    """A symlink on the way may make a path that is longer than the entry's."""
    if directory + len(name) > MAX_PATH:
        raise ArchiveError(f"the path of {_name(name)} is longer than {MAX_PATH} bytes")


def _name(path: bytes) -> str:
    return repr(path[:80].decode("utf-8", "replace"))

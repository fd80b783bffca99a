"""Layers laid over each other, in memory: what OCI's image-spec says in layer.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .archive import ArchiveError, Entry

MAX_LINKS = 40
"""Symlinks on the way to one entry, as in Linux."""
MAX_STEPS = 8192
"""Components on the way to one entry, those of the symlinks' targets among them."""

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
        self.xattrs: dict[bytes, bytes] = {}
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

    def apply(self, entries: Iterable[Entry], layer: int) -> None:
        """Lays a layer, whose number is `layer`, over what is there.

        Raises:
            ArchiveError: an entry cannot be where it says it is.
        """
        entries = list(entries)
        # Whiteouts are for lower layers, wherever in their own they come.
        for entry in entries:
            if entry.kind in "wo":
                self._remove(entry)
        for entry in entries:
            if entry.kind not in "wo":
                self._add(entry, layer)

    def _remove(self, entry: Entry) -> None:
        if entry.kind == "o":
            directory = self._directory(entry.path, make=False)
            if directory is not None and directory.children is not None:
                directory.children = {}
            return
        parent, _, name = entry.path.rpartition(b"/")
        directory = self._directory(parent, make=False)
        if directory is not None and directory.children is not None:
            directory.children.pop(name, None)

    def _add(self, entry: Entry, layer: int) -> None:
        if not entry.path:
            self.root.set(entry)
            return
        parent, _, name = entry.path.rpartition(b"/")
        directory = self._directory(parent, make=True)
        assert directory is not None and directory.children is not None
        there = directory.children.get(name)
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
            self._counted()
        directory.children[name] = node

    def _counted(self) -> None:
        self._count += 1
        if self._count > self._max:
            raise ArchiveError(f"there are more than {self._max} files")

    def find(self, path: bytes) -> Node | None:
        """What is at `path`; a symlink there is not followed."""
        parent, _, name = path.rpartition(b"/")
        directory = self._directory(parent, make=False)
        if directory is None or directory.children is None:
            return None
        return directory.children.get(name) if name else directory

    def _directory(self, path: bytes, *, make: bool) -> Node | None:
        """The directory at `path`, made if it is missing and `make` is set; symlinks are followed within the tree."""
        trail = [self.root]
        todo = path.split(b"/")[::-1] if path else []
        links = 0
        steps = 0
        while todo:
            part = todo.pop()
            steps += 1
            if steps > MAX_STEPS:
                raise ArchiveError(f"the way to {_name(path)} is too long")
            if part in {b"", b"."}:
                continue
            if part == b"..":
                if len(trail) > 1:
                    trail.pop()
                continue
            children = trail[-1].children
            assert children is not None
            node = children.get(part)
            if node is None:
                if not make:
                    return None
                node = children[part] = Node("d")
                self._counted()
            if node.kind == "l":
                links += 1
                if links > MAX_LINKS:
                    if make:
                        raise ArchiveError(f"there are too many symlinks on the way to {_name(path)}")
                    return None
                todo += node.target.split(b"/")[::-1]
                if node.target.startswith(b"/"):
                    del trail[1:]
                continue
            if node.kind != "d":
                if make:
                    raise ArchiveError(f"there is a file on the way to {_name(path)}")
                return None
            trail.append(node)
        return trail[-1]

    def walk(self) -> Iterator[tuple[bytes, Node]]:
        """Every (path, node), a directory before what is in it, names in the order of their bytes."""
        todo: list[tuple[bytes, Node]] = [(b"", self.root)]
        while todo:
            path, node = todo.pop()
            yield path, node
            if node.children:
                prefix = path + b"/" if path else b""
                todo += [(prefix + name, child) for name, child in sorted(node.children.items(), reverse=True)]


def _name(path: bytes) -> str:
    return repr(path[:80].decode("utf-8", "replace"))

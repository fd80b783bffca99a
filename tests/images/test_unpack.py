"""A tree as a directory of the host: as root, as somebody else, and of somebody who means ill."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.images.erofs_reader import read
from tests.images.layer_tools import (
    B,
    C,
    D,
    H,
    Item,
    L,
    P,
    directory,
    facts_of,
    image,
    item,
    layers,
    tar,
    tree_of,
    unpacked,
)
from vmette.images.archive import Entry
from vmette.images.store import remove
from vmette.images.tree import Tree
from vmette.images.unpack import unpack

ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root sets owners and makes devices")
REPO = Path(__file__).parents[2]
TIME = 1_600_000_000_123_456_789
ITEMS: list[Item] = [
    item("./", D, mode=0o711, mtime_ns=TIME),
    item("ro", D, mode=0o555, uid=5, gid=6, mtime_ns=TIME),
    item("ro/file", content=b"content", mode=0o444, uid=7, gid=8, mtime_ns=TIME + 1),
    item("ro/none", D, mode=0, mtime_ns=TIME),
    item("ro/none/file", mode=0),
    item("suid", content=b"s" * 9000, mode=0o6755, uid=1000, gid=1000, mtime_ns=-5),
    item("hard", H, target="ro/file"),
    item("ro/none/hard", H, target="hard"),
    item("link", L, target="/etc/passwd", uid=3, gid=4, mtime_ns=TIME),
    item("hardlink", H, target="link"),
    item("char", C, device=(4095, 0xFFFFF), mode=0o666, uid=1, mtime_ns=TIME),
    item("block", B, device=(8, 1), mode=0o660),
    item("fifo", P, mode=0o622, gid=9),
    item("hardfifo", H, target="fifo"),
    item(
        "x", xattrs={b"user.a": b"a\0b", b"security.capability": b"\1\0\0\2\0\x20\0\0" + bytes(12), b"trusted.t": b"t"}
    ),
    item(b"\xff\n", content=b"odd"),
]


@pytest.fixture(autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
    before = set(Path("/proc/self/fd").iterdir())
    yield
    assert set(Path("/proc/self/fd").iterdir()) <= before


@ROOT
def test_root_makes_what_is_in_the_image(tmp_path: Path) -> None:
    made = facts_of(unpacked(tmp_path, tar(*ITEMS)))
    found = read(image(tmp_path, tar(*ITEMS)))
    assert set(made) == set(found)
    for name, node in found.items():
        kind, mode, uid, gid, mtime, content, device, xattrs, *links = made[name]
        assert kind == node.mode >> 12
        assert mode == (0 if kind == 10 else node.mode & 0o7777), name
        assert (uid, gid, mtime, content) == (node.uid, node.gid, node.mtime_ns, node.target or (node.content)), name
        assert (device, xattrs) == (node.rdev, node.xattrs)
        if kind != 4:
            assert links[1] == node.nlink
    assert made[b"hard"][8] == made[b"ro/file"][8] == made[b"ro/none/hard"][8] == b"hard"
    assert made[b"link"][8] == made[b"hardlink"][8]
    assert made[b"fifo"][8] == made[b"hardfifo"][8]


def test_modes_do_not_depend_on_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o777)
    try:
        top = unpacked(tmp_path, tar(*ITEMS[:4], directory("made/by/us")))
    finally:
        os.umask(before)
    modes = {name: fact[1] for name, fact in facts_of(top).items()} if os.geteuid() == 0 else {}
    assert not modes or (modes[b"ro"], modes[b"ro/file"], modes[b"made/by"]) == (0o555, 0o444, 0o755)


UNPRIVILEGED = """
import os, sys
from pathlib import Path
import tempfile
import tests.images.layer_tools as tools
with tempfile.TemporaryDirectory(dir="/var/tmp") as place:  # nobody may not read what is to be imported
    tools.unpacked(Path(place), Path(sys.argv[2]).read_bytes())
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
tools.unpacked(Path(sys.argv[1]), Path(sys.argv[2]).read_bytes())
"""


@pytest.fixture
def somewhere() -> Iterator[Path]:
    """A directory that anybody may write to, on a file system with attributes of users."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        Path(name).chmod(0o777)
        yield Path(name)
        remove(Path(name, "place"))


def as_nobody(place: Path, *items: Item) -> Path:
    (place / "tar").write_bytes(tar(*items))
    (place / "place").mkdir(mode=0o777)
    (place / "place").chmod(0o777)
    command: list[str | Path] = [sys.executable, "-c", UNPRIVILEGED, place / "place", place / "tar"]
    done = subprocess.run(
        command, cwd=REPO, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(REPO)}
    )
    assert done.returncode == 0, done.stderr
    return place / "place/rootfs"


def test_somebody_else_notes_what_he_may_not_set(somewhere: Path) -> None:
    top = as_nobody(somewhere, *ITEMS, item("own", xattrs={b"user.containers.override_stat": b"0:0:0104755"}))
    made = facts_of(top)
    override = b"user.containers.override_stat"
    noted = {name: fact[7][override] for name, fact in made.items() if override in fact[7]}  # type: ignore[operator,index]
    assert noted[b""] == b"0:0:0040711"
    assert noted[b"ro"] == b"5:6:0040555"
    assert noted[b"ro/file"] == noted[b"hard"] == b"7:8:0100444"
    assert noted[b"suid"] == b"1000:1000:0106755"
    assert noted[b"char"] == b"1:0:0020666:4095:1048575"
    assert noted[b"block"] == b"0:0:0060660:8:1"
    assert noted[b"fifo"] == b"0:9:0010622"
    assert noted[b"own"] == b"0:0:0100644"
    assert set(noted) == set(made) - {b"link", b"hardlink"}
    assert made[b"x"][7] == {b"user.a": b"a\0b", override: b"0:0:0100644"}
    for name, (kind, mode, uid, gid, *_) in made.items():
        assert kind in {4, 8, 10}, name
        assert (uid, gid) == (65534, 65534) or os.geteuid() != 0
        assert kind == 10 or (isinstance(mode, int) and mode & 0o7077 == 0), name
        assert kind != 4 or mode == 0o700
        assert kind != 8 or (isinstance(mode, int) and mode & 0o600 == 0o600)
    assert made[b"suid"][5] == b"s" * 9000
    assert made[b"ro/file"][4] == TIME + 1
    assert made[b"hard"][8:] == made[b"ro/none/hard"][8:] == (b"hard", 3)
    assert made[b"link"][5] == b"/etc/passwd"


# --- nothing outside


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "outside"
    path.mkdir()
    (path / "file").write_bytes(b"kept")
    (path / "file").chmod(0o640)
    os.utime(path / "file", ns=(1, 1))
    os.utime(path, ns=(1, 1))
    before = facts_of(path)
    yield path
    assert facts_of(path) == before


@pytest.mark.parametrize("target", ["{outside}", "../../outside", "../outside", "/", "/proc/self/root/{outside}"])
def test_files_through_symlinks_stay_within(tmp_path: Path, outside: Path, target: str) -> None:
    target = target.format(outside=outside)
    place = tmp_path / "place"
    place.mkdir()
    lower = tar(item("l", L, target=target), item("f", L, target=f"{target}/file"))
    upper = tar(
        item("l/file", content=b"evil"), item("l/new", D), item("f", content=b"evil"), item("l/hard", H, target="f")
    )
    top = unpacked(place, lower, upper)
    assert (top / "l").is_symlink()
    assert sum(fact[5] == b"evil" for fact in facts_of(top).values()) == 3


def hostile(names: list[bytes]) -> Tree:
    """A tree as no layer makes one: whoever changes what reads them should not find out here."""
    tree = Tree(1000)
    assert tree.root.children is not None
    for name in names:
        other = Tree(10)
        other.apply([Entry(b"n", "f"), Entry(b"m", "d"), Entry(b"m/x", "f")], 0)
        assert other.root.children is not None
        tree.root.children[name] = other.root.children[b"m"]
        tree.root.children[name + b"2"] = other.root.children[b"n"]
    return tree


@pytest.mark.parametrize("name", [b"..", b"."])
def test_even_a_name_that_is_none_is_not_opened(tmp_path: Path, outside: Path, name: bytes) -> None:
    top = tmp_path / "top"
    top.mkdir()
    fd = os.open(top, os.O_RDONLY)
    try:
        with pytest.raises(OSError):
            unpack(hostile([name]), [], fd)
    finally:
        os.close(fd)


def test_what_is_there_is_not_replaced(tmp_path: Path, outside: Path) -> None:
    """What is unpacked to is empty; if it is not, nothing of it is followed or overwritten."""
    for kind, there in (("f", "file"), ("d", "link"), ("f", "link"), ("l", "link"), ("p", "link")):
        top = tmp_path / f"{kind}{there}"
        top.mkdir()
        (top / "x").symlink_to(outside / "file" if there == "link" else "nowhere")
        tree = Tree(10)
        tree.apply([Entry(b"x", kind, 0o777, target=b"t" if kind == "l" else b"")], 0)
        fd = os.open(top, os.O_RDONLY)
        try:
            with pytest.raises(FileExistsError):
                unpack(tree, [], fd)
        finally:
            os.close(fd)
        assert (top / "x").is_symlink()


def test_a_name_that_we_use_ourselves(tmp_path: Path) -> None:
    names = [".vmette-links", ".vmette-links_"]
    items = [item("a", content=b"1"), item("b", H, target="a"), item(names[0], content=b"2"), item(names[1], D)]
    found = facts_of(unpacked(tmp_path, tar(*items)))
    assert set(found) == {b"", b"a", b"b", b".vmette-links", b".vmette-links_"}
    assert found[b".vmette-links"][5] == b"2"
    assert found[b"a"][8:] == (b"a", 2)


def test_times_of_the_root_stay_when_there_are_hard_links(tmp_path: Path) -> None:
    items = [item("./", D, mtime_ns=TIME), item("a"), item("b", H, target="a")]
    assert facts_of(unpacked(tmp_path, tar(*items)))[b""][4] == TIME


# --- deep and large


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_deep_nesting_takes_few_descriptors(tmp_path: Path, few_descriptors: None) -> None:
    depth = 2000
    items = [
        item("a/" * depth + "file", content=b"deep"),
        item("a/" * 1000 + "b/c"),
        item("top", H, target="a/" * depth + "file"),
    ]
    place = tmp_path / "place"
    place.mkdir()
    top = unpacked(place, tar(*items))
    fd = os.open(top, os.O_PATH)
    try:
        status = os.stat("a/" * depth + "file", dir_fd=fd)
        assert (status.st_size, status.st_nlink) == (4, 2)
        assert stat.S_ISDIR(os.stat("a/" * 1000 + "b", dir_fd=fd).st_mode)
    finally:
        os.close(fd)
    remove(place)
    assert not place.exists()


def test_hard_links_to_long_paths(tmp_path: Path) -> None:
    deep = "/".join(["d" * 255] * 15) + "/" + "f" * 200
    place = tmp_path / "place"
    place.mkdir()
    top = unpacked(place, tar(item(deep), item("a", H, target=deep), item("b", H, target=deep)))
    assert (top / "a").stat().st_nlink == 3
    remove(place)


def test_holes_stay_holes(tmp_path: Path) -> None:
    sparse, size = tmp_path / "in/sparse", 1 << 30
    sparse.parent.mkdir()
    with sparse.open("wb") as file:
        file.seek(700_000_000)
        file.write(b"in the middle")
        file.truncate(size)
    command: list[str | Path] = [
        "tar",
        "-S",
        "--hole-detection=seek",
        "--format=gnu",
        "-C",
        sparse.parent,
        "-cf",
        "-",
        "sparse",
    ]
    data = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    place = tmp_path / "place"
    place.mkdir()
    started = time.process_time()
    made = unpacked(place, data) / "sparse"
    assert time.process_time() - started < 2
    assert (made.stat().st_size, made.stat().st_blocks * 512 < 1 << 20) == (size, True)
    with made.open("rb") as file:
        file.seek(699_999_990)
        assert file.read(30) == bytes(10) + b"in the middle" + bytes(7)


def test_what_is_written_in_part_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that is almost full: the kernel writes what fits, and only the next call is an error."""
    real = os.pwrite

    def pwrite(fd: int, data: bytes | memoryview, position: int) -> int:
        return real(fd, memoryview(data)[: max(1, len(data) // 3)], position)

    monkeypatch.setattr(os, "pwrite", pwrite)
    content = os.urandom(3_000_000)
    place = tmp_path / "place"
    place.mkdir()
    assert (unpacked(place, tar(item("f", content=content))) / "f").read_bytes() == content
    found = read(image(tmp_path, tar(item("f", content=content[:60_000]))))
    assert found[b"f"].content == content[:60_000]


def test_a_layer_that_is_shorter_than_its_index_is_an_error(tmp_path: Path) -> None:
    made = layers(tmp_path, [tar(item("f", content=b"x" * 50_000))])
    os.truncate(made[0] / "data", 40_000)
    (tmp_path / "top").mkdir()
    fd = os.open(tmp_path / "top", os.O_RDONLY)
    try:
        with (made[0] / "data").open("rb") as data, pytest.raises(OSError, match="shorter"):
            unpack(tree_of(made), [data], fd)
    finally:
        os.close(fd)

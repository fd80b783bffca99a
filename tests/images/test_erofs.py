"""Images: what fsck.erofs, an independent reader and the kernel find in them."""

from __future__ import annotations

import hashlib
import os
import random
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.images.erofs_reader import Found, read
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
from vmette.images import erofs
from vmette.images.archive import MAX_XATTRS

BLOCK = 4096
CAPABILITY = b"\1\0\0\2\0\x20\0\0" + bytes(12)
EVERYTHING: list[Item] = [
    item("./", D, mode=0o711, uid=3, gid=4, mtime_ns=1_700_000_000_000_000_001),
    directory("a"),
    directory("a/empty", 0o1777),
    item("a/file", content=b"content", mode=0o4755, uid=1000, gid=(1 << 32) - 2, mtime_ns=1_234_567_890_123_456_789),
    item("a/sgid", content=b"x", mode=0o2755),
    item("hard", H, target="a/file"),
    item("a/empty/again", H, target="a/file"),
    item("none"),
    item("link", L, target="a/file", mtime_ns=5),
    item("dangling", L, target="/nowhere/../at all"),
    item("char", C, device=(4095, 0xFFFFF), mode=0o666),
    item("block", B, device=(259, 256), mode=0o660, gid=6),
    item("null", C, device=(1, 3)),
    item("whiteout", C, device=(0, 0)),
    item("fifo", P, mode=0o622),
    item(b"\xff\xfe\x80", content=b"not UTF-8"),
    item("!a", content=b"before ."),
    item("-x", content=b"before . too"),
    item("..."),
    item(".a"),
    item("n" * 255, content=b"long"),
    item("attributes", xattrs={b"user.a": b"", b"user.b": b"\0\xff\n", b"security.capability": CAPABILITY}),
    item("a/d", D, xattrs={b"trusted.t": b"x" * 3000, b"user.dir": b"y" * 1200}),
    item("before", mtime_ns=-1_500_000_000),
    item("late", mtime_ns=(1 << 33) * 10**9 + 999_999_999),
]


def checked(path: Path) -> dict[bytes, Found]:
    """What is in the image, of which fsck.erofs has nothing to say."""
    command = 'ulimit -s 1000000; exec fsck.erofs --extract "$0"'  # it recurses
    done = subprocess.run(["sh", "-c", command, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "<W>" not in done.stdout + done.stderr
    return read(path)


def test_every_kind_of_entry(tmp_path: Path) -> None:
    found = checked(image(tmp_path, tar(*EVERYTHING)))
    names = {info.name.removeprefix("./").rstrip("/").encode("utf-8", "surrogateescape") for info, _ in EVERYTHING}
    assert set(found) == {b"" if name == b"." else name for name in names}
    root = found[b""]
    assert (root.mode, root.uid, root.gid) == (stat.S_IFDIR | 0o711, 3, 4)
    assert root.mtime_ns == 1_700_000_000_000_000_001
    file = found[b"a/file"]
    assert (file.mode, file.uid, file.gid) == (stat.S_IFREG | 0o4755, 1000, (1 << 32) - 2)
    assert (file.content, file.mtime_ns, file.nlink) == (b"content", 1_234_567_890_123_456_789, 3)
    assert found[b"hard"].nid == found[b"a/empty/again"].nid == file.nid
    assert found[b"a/sgid"].mode == stat.S_IFREG | 0o2755
    assert found[b"a/empty"].mode == stat.S_IFDIR | 0o1777
    assert (found[b"a"].nlink, found[b"a/empty"].nlink, root.nlink) == (4, 2, 3)
    assert found[b"link"].target == b"a/file"
    assert found[b"dangling"].target == b"/nowhere/../at all"
    assert (found[b"char"].mode, found[b"char"].rdev) == (stat.S_IFCHR | 0o666, (4095, 0xFFFFF))
    assert (found[b"block"].mode, found[b"block"].rdev) == (stat.S_IFBLK | 0o660, (259, 256))
    assert found[b"fifo"].mode == stat.S_IFIFO | 0o622
    assert found[b"\xff\xfe\x80"].content == b"not UTF-8"
    assert found[b"attributes"].xattrs == {
        b"user.a": b"",
        b"user.b": b"\0\xff\n",
        b"security.capability": CAPABILITY,
    }
    assert found[b"a/d"].xattrs == {b"trusted.t": b"x" * 3000, b"user.dir": b"y" * 1200}
    assert found[b"before"].mtime_ns == -1_500_000_000
    assert found[b"late"].mtime_ns == (1 << 33) * 10**9 + 999_999_999
    assert found[b"none"].size == 0


@contextmanager
def mounted(path: Path, at: Path) -> Iterator[Path]:
    at.mkdir()
    if os.geteuid() != 0 or b"erofs" not in Path("/proc/filesystems").read_bytes():
        pytest.skip("only root can mount, and only with erofs in the kernel")
    done = subprocess.run(["mount", "-t", "erofs", "-o", "ro,loop", path, at], capture_output=True, text=True)
    if done.returncode != 0:
        assert "loop" in done.stderr or "permi" in done.stderr, done.stderr
        pytest.skip(done.stderr)
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


def test_the_kernel_sees_what_is_in_the_directory_that_is_unpacked(tmp_path: Path) -> None:
    many = [item(f"many/{n:05}-{'x' * (n % 200)}", content=b"%d" % n) for n in range(1500)]
    items = [*EVERYTHING, item("big", content=random.Random(3).randbytes(3_000_001)), *many]
    items += [item(f"l{n}", L, target="t" * n) for n in (1, 59, 60, 3900, 4031, 4032, 4033, 4095)]
    items = [entry for entry in items if entry[0].name not in {"late", "a/d"}]  # too much for ext4
    with mounted(image(tmp_path, tar(*items)), tmp_path / "mnt") as mnt:
        directory_path = unpacked(tmp_path, tar(*items))
        seen = facts_of(mnt)
        for name, fact in facts_of(directory_path).items():
            if fact[0] == 4:  # a directory that nobody says the time of has now in one and 0 in the other
                assert seen[name][:4] == fact[:4]
            else:
                assert seen[name] == fact, name
            del seen[name]
        assert not seen


@pytest.mark.parametrize("size", [1, 59, 1000, 4031, 4032, 4033, 4094, 4095])
def test_long_symlinks(tmp_path: Path, size: int) -> None:
    target = bytes(97 + n % 26 for n in range(size))
    items = [item("l", L, target=target), item("m", L, target=target, xattrs={b"trusted.x": b"v" * 100})]
    found = checked(image(tmp_path, tar(*items)))
    assert found[b"l"].target == found[b"m"].target == target
    assert found[b"m"].xattrs == {b"trusted.x": b"v" * 100}


@pytest.mark.parametrize("length", [3, 40, 255])
@pytest.mark.parametrize("count", [0, 1, 14, 15, 16, 17, 400, 20_000])
def test_directories(tmp_path: Path, count: int, length: int) -> None:
    if count == 20_000 and length == 255:
        count = 5000
    names = [f"{n:05}".encode().ljust(length, b"n")[: max(length, 5)] for n in range(count)]
    found = checked(image(tmp_path, tar(directory("d"), *(item(b"d/" + name, P) for name in names))))
    assert sorted(path[2:] for path in found if path.startswith(b"d/")) == sorted(names)
    assert found[b"d"].nlink == 2


def test_directories_that_just_fill_their_blocks(tmp_path: Path) -> None:
    """12 bytes of a name's entry and the name: 12+1 and 12+2 for . and .., the last name makes the rest."""
    items = []
    for rest in range(15):
        items.append(directory(f"{rest}"))
        used = 27 + 15 * 252
        items += [item(f"{rest}/" + f"{n:02}".ljust(240, "n"), P) for n in range(15)]
        items.append(item(f"{rest}/{'y' * 140}", P))
        items.append(item(f"{rest}/{'z' * (BLOCK - used - 152 - 12 - 7 + rest)}", P))
    found = checked(image(tmp_path, tar(*items)))
    assert {found[b"%d" % rest].size for rest in range(15)} >= {BLOCK - 1, BLOCK}
    assert max(found[b"%d" % rest].size for rest in range(15)) > BLOCK


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 8192, 3 << 20, (3 << 20) + 1])
def test_files(tmp_path: Path, size: int) -> None:
    content = random.Random(size).randbytes(size)
    items = [item("before", content=b"b"), item("file", content=content), item("after", content=b"a" * 5000)]
    found = checked(image(tmp_path, tar(*items)))
    assert found[b"file"].size == size
    assert found[b"file"].sha256 == hashlib.sha256(content).hexdigest()
    assert (found[b"before"].content, found[b"after"].content) == (b"b", b"a" * 5000)


@pytest.mark.parametrize("size", [1, 4096, 10_000, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 5 << 20])
def test_zeros_take_no_blocks_on_the_disk(tmp_path: Path, size: int) -> None:
    content = b"start" + bytes(size) + b"end" + bytes(size)
    items = [item("zeros", content=bytes(size)), item("some", content=content), item("last", content=bytes(size))]
    path = image(tmp_path, tar(*items))
    found = checked(path)
    assert found[b"zeros"].sha256 == found[b"last"].sha256 == hashlib.sha256(bytes(size)).hexdigest()
    assert found[b"some"].sha256 == hashlib.sha256(content).hexdigest()
    assert path.stat().st_blocks * 512 <= 64 << 10


def test_a_sparse_file_of_a_gigabyte(tmp_path: Path) -> None:
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
        "--format=posix",
        "-C",
        sparse.parent,
        "-cf",
        "-",
        "sparse",
    ]
    data = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    started = time.process_time()
    path = image(tmp_path, data)
    assert time.process_time() - started < 2, "it has read the holes"
    assert path.stat().st_size > size
    assert path.stat().st_blocks * 512 < 1 << 20
    assert subprocess.run(["fsck.erofs", path]).returncode == 0
    with path.open("rb") as file:
        file.seek(700_000_000 + BLOCK)
        assert file.read(13) == b"in the middle"


def test_a_directory_without_holes_known_to_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"a" * 5000 + bytes(100_000) + b"b"

    def lseek(fd: int, position: int, how: int) -> int:
        raise OSError(22, "Invalid argument")

    made = layers(tmp_path, [tar(item("f", content=content))])
    monkeypatch.setattr(os, "lseek", lseek)
    output = tmp_path / "out"
    with (made[0] / "data").open("rb") as data, output.open("wb") as out:
        erofs.write(tree_of(made), [data], out, bytes(16))
    monkeypatch.undo()
    assert checked(output)[b"f"].sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("how", ["refuses", "nothing", "little"])
def test_where_the_kernel_does_not_copy_we_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    real: Callable[..., int] = os.copy_file_range
    calls = []

    def copy(source: int, to: int, count: int, start: int, where: int) -> int:
        calls.append(count)
        if how == "refuses" or len(calls) > 3:
            raise OSError(18, "Invalid cross-device link")
        return 0 if how == "nothing" else real(source, to, min(count, 1000), start, where)

    monkeypatch.setattr(os, "copy_file_range", copy)
    content = random.Random(5).randbytes(3_000_000)
    found = checked(image(tmp_path, tar(item("f", content=content))))
    assert found[b"f"].sha256 == hashlib.sha256(content).hexdigest()
    assert calls


def test_a_layer_that_is_shorter_than_its_index_is_an_error(tmp_path: Path) -> None:
    made = layers(tmp_path, [tar(item("f", content=b"x" * 50_000))])
    for size in (0, 4096, 40_000):
        os.truncate(made[0] / "data", size)
        with (made[0] / "data").open("rb") as data, (tmp_path / "out").open("wb") as out, pytest.raises(OSError):
            erofs.write(tree_of(made), [data], out, bytes(16))


def test_attributes_of_every_size(tmp_path: Path) -> None:
    items, expected = [], {}
    for size in (0, 1, 3, 4, 100, 4000, 4017, 4018, 4096, 8192, MAX_XATTRS - 8):
        for kind, name in ((b"0", "f"), (D, "d"), (L, "l"), (C, "c")):
            xattrs = {b"trusted.x": bytes(size % 250 for _ in range(size - 1))} if size else {b"trusted.": b""}
            xattrs = {b"trusted.y": b"v" * max(0, size - 1)} if size else xattrs
            path = f"{name}{size}"
            items.append(item(path, kind, target="t" * 300, xattrs=xattrs))
            expected[path.encode()] = {} if b"trusted." in xattrs else xattrs
    found = checked(image(tmp_path, tar(*items)))
    assert {path: found[path].xattrs for path in expected} == expected


def test_very_many_attributes(tmp_path: Path) -> None:
    xattrs = {b"user.%03d" % n: bytes([n % 256]) * (n % 5) for n in range(1400)}
    xattrs |= {b"system.posix_acl_access": b"\2\0\0\0", b"system.posix_acl_default": b"\2\0\0\0"}
    found = checked(image(tmp_path, tar(item("d", D, xattrs=xattrs), item("d/f"))))
    assert found[b"d"].xattrs == xattrs


def test_deep_nesting(tmp_path: Path) -> None:
    depth = 2000
    deepest = "a/" * depth + "file"
    found = checked(image(tmp_path, tar(item(deepest, content=b"deep"))))
    assert found[deepest.encode()].content == b"deep"
    assert len(found) == depth + 2


def test_the_kernel_goes_as_deep(tmp_path: Path) -> None:
    with mounted(image(tmp_path, tar(item("a/" * 2000 + "file", content=b"deep"))), tmp_path / "mnt") as mnt:
        fd = os.open(mnt, os.O_PATH)
        try:
            file = os.open("a/" * 2000 + "file", os.O_RDONLY, dir_fd=fd)
            assert os.read(file, 100) == b"deep"
            os.close(file)
        finally:
            os.close(fd)


def test_fifty_thousand_files(tmp_path: Path) -> None:
    items = [item(f"{n % 250}/{n}", content=b"%d" % n) for n in range(50_000)]
    started = time.process_time()
    path = image(tmp_path, tar(*items))
    assert time.process_time() - started < 30
    found = checked(path)
    assert len(found) == 50_000 + 250 + 1
    assert all(found[b"%d/%d" % (n % 250, n)].content == b"%d" % n for n in range(50_000))
    assert subprocess.run(["dump.erofs", "-s", path], capture_output=True, text=True).stdout.count("50251") == 1


def test_the_superblock(tmp_path: Path) -> None:
    path = image(tmp_path, tar(*EVERYTHING))
    text = subprocess.run(["dump.erofs", "-s", path], capture_output=True, text=True, check=True).stdout
    facts = {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    assert facts["Filesystem magic number"] == "0xE0F5E1E2"
    assert int(facts["Filesystem blocks"]) * BLOCK == path.stat().st_size
    assert int(facts["Filesystem inode count"]) == len({node.nid for node in read(path).values()})
    assert facts["Filesystem UUID"] == "30313233-3435-3637-3839-616263646566"
    assert facts["Filesystem features"] == "sb_csum"


def test_an_image_of_nothing(tmp_path: Path) -> None:
    found = checked(image(tmp_path, tar()))
    assert list(found) == [b""]
    assert found[b""].mode == stat.S_IFDIR | 0o755


def test_the_root_may_have_large_attributes(tmp_path: Path) -> None:
    """Its number has 16 bits in the superblock."""
    found = checked(image(tmp_path, tar(item("./", D, xattrs={b"user.x": b"v" * 16000}), item("f"))))
    assert found[b""].xattrs[b"user.x"] == b"v" * 16000


WRITE = """
import sys
from pathlib import Path
from tests.images.layer_tools import image
image(Path(sys.argv[2]), *(Path(each).read_bytes() for each in sys.argv[3:]))
"""


def test_the_same_layers_give_the_same_bytes(tmp_path: Path) -> None:
    upper = tar(item("a/new", content=b"n"), item("a/.wh.sgid"), item("b/c/d", content=b"x" * 9000))
    (tmp_path / "0").write_bytes(tar(*EVERYTHING, *(item(f"s/{n}", content=b"%d" % n) for n in range(500))))
    (tmp_path / "1").write_bytes(upper)
    images = []
    for seed in ("0", "1", "4711"):
        place = tmp_path / f"place{seed}"
        place.mkdir()
        command: list[str | Path] = [sys.executable, "-c", WRITE, "-", place, tmp_path / "0", tmp_path / "1"]
        subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": seed}, check=True, cwd=Path(__file__).parents[2])
        images.append((place / "image.erofs").read_bytes())
    assert images[0] == images[1] == images[2]
    assert b"a" in read(tmp_path / "place0/image.erofs")


def test_only_what_is_left_of_lower_layers_is_in_the_image(tmp_path: Path) -> None:
    secret = random.Random(8).randbytes(100_000)
    kept = random.Random(9).randbytes(100_000)
    lower = tar(item("a", content=kept), item("gone", content=secret), item("replaced", content=secret), item("b"))
    path = image(tmp_path, lower, tar(item(".wh.gone"), item("replaced", content=b"new")))
    found = checked(path)
    assert set(found) == {b"", b"a", b"b", b"replaced"}
    assert found[b"replaced"].content == b"new"
    assert found[b"a"].sha256 == hashlib.sha256(kept).hexdigest()
    assert secret[:4096] not in path.read_bytes()


ITEMS = st.lists(
    st.builds(
        lambda name, kind, content, target, xattrs: item(
            name, kind, content if kind == b"0" else b"", target=target, xattrs=xattrs
        ),
        st.binary(min_size=1, max_size=255).filter(lambda n: not set(n) & {0, 47} and n not in {b".", b".."}),
        st.sampled_from([b"0", D, L, C, P]),
        st.binary(max_size=9000),
        st.binary(min_size=1, max_size=4000).filter(lambda target: 0 not in target),
        st.dictionaries(
            st.text("ab\xe9 .", min_size=1, max_size=80).map(lambda name: b"trusted." + name.encode()),
            st.binary(max_size=2000),
            max_size=3,
        ),
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(items=ITEMS)
def test_anything(tmp_path_factory: pytest.TempPathFactory, items: list[Item]) -> None:
    items = [entry for entry in items if not entry[0].name.startswith(".wh.")]
    place = tmp_path_factory.mktemp("any")
    found = checked(image(place, tar(directory("d"), *items)))
    expected = {info.name.encode("utf-8", "surrogateescape"): (info, content) for info, content in items}
    assert set(found) >= set(expected)
    for name, (info, content) in expected.items():
        if info.type == b"0":
            assert found[name].sha256 == hashlib.sha256(content).hexdigest()
        elif info.type == L:
            assert found[name].target == info.linkname.encode("utf-8", "surrogateescape")
        assert len(found[name].xattrs) == sum(key.startswith("SCHILY") for key in info.pax_headers)

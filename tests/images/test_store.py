"""The cache: entries appear whole, once, and nothing else stays."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.images.erofs_reader import read
from tests.images.layer_tools import LIMITS, D, H, Item, L, facts_of, item, tar
from vmette.images.archive import ArchiveError
from vmette.images.layers import Limits, convert
from vmette.images.prune import size_of
from vmette.images.store import Store, remove

REPO = Path(__file__).parents[2]
LAYER = tar(item("a", content=b"x" * 5000), item("d/b", content=random.Random(1).randbytes(200_000)))


@pytest.fixture(autouse=True)
def no_descriptor_leaks() -> Iterator[None]:
    before = set(Path("/proc/self/fd").iterdir())
    yield
    assert set(Path("/proc/self/fd").iterdir()) <= before


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache/store")


def layer(store: Store, data: bytes = LAYER, name: str | None = None) -> Path:
    digest = name or f"sha256:{hashlib.sha256(data).hexdigest()}"
    return store.layer(digest, lambda place: convert(io.BytesIO(data), place, LIMITS))


def assert_clean(store: Store) -> None:
    """Nothing is there but entries."""
    for path in (store.staging, store.locks):
        assert not path.exists() or not list(path.iterdir())


def entries(store: Store) -> list[str]:
    return sorted(
        f"{path.parent.name}/{path.name}" for path in store.root.glob("[lid]*s/*") if path.parent.name != "locks"
    )


# --- made once


RACE = """
import io, sys, time
from pathlib import Path
from tests.images.layer_tools import LIMITS
from vmette.images.layers import convert
from vmette.images.store import Store
store, data = Store(Path(sys.argv[1])), Path(sys.argv[2]).read_bytes()
def make(place):
    print("made", flush=True)
    time.sleep(0.3)
    convert(io.BytesIO(data), place, LIMITS)
sys.stdin.readline()
source = store.layer("sha256:aa", make)
print(store.image([source], LIMITS), store.directory([source], LIMITS))
"""


def test_eight_processes_at_once_make_an_entry_once(store: Store, tmp_path: Path) -> None:
    (tmp_path / "tar").write_bytes(LAYER)
    command: list[str | Path] = [sys.executable, "-c", RACE, store.root, tmp_path / "tar"]
    children = [
        subprocess.Popen(command, cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(8)
    ]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    lines = [line for child in children for line in child.communicate(timeout=60)[0].splitlines()]
    assert [child.returncode for child in children] == [0] * 8
    assert lines.count("made") == 1
    (paths,) = {line for line in lines if line != "made"}
    image, directory = map(Path, paths.split())
    assert set(read(image)) == {b"", b"a", b"d", b"d/b"}
    assert (directory / "a").read_bytes() == b"x" * 5000
    assert_clean(store)


def test_threads_too(store: Store) -> None:
    calls = []

    def make(place: Path) -> None:
        calls.append(place)
        time.sleep(0.1)

    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda _: store.layer("sha256:aa", make), range(8)))
    assert len(calls) == 1
    assert len(set(paths)) == 1
    assert_clean(store)


def test_two_entries_do_not_wait_for_each_other(store: Store) -> None:
    meet = threading.Barrier(2, timeout=20)

    def make(place: Path) -> None:
        meet.wait()

    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(lambda name: store.layer(name, make), ["sha256:aa", "sha256:bb"]))) == 2


def test_an_entry_that_is_there_is_not_made_again_but_used(store: Store) -> None:
    path = layer(store)
    image, directory = store.image([path], LIMITS), store.directory([path], LIMITS)
    for each in (path, image, directory.parent):
        os.utime(each, (1, 1))
    assert layer(store) == path
    assert (store.image([path], LIMITS), store.directory([path], LIMITS)) == (image, directory)
    assert all(time.time() - each.stat().st_mtime < 60 for each in (path, image, directory.parent))
    assert_clean(store)


# --- killed, failed, full


KILLED = """
import io, os, sys, threading, time
from pathlib import Path
from tests.images.layer_tools import LIMITS
from vmette.images.layers import convert
from vmette.images.store import Store
store, data = Store(Path(sys.argv[1])), Path(sys.argv[2]).read_bytes()
def kill():
    time.sleep(float(sys.argv[3]))
    os.kill(os.getpid(), 9)
threading.Thread(target=kill, daemon=True).start()
source = store.layer("sha256:aa", lambda place: convert(io.BytesIO(data), place, LIMITS))
store.image([source], LIMITS)
store.directory([source], LIMITS)
"""


def test_killed_at_any_time_it_leaves_no_half_entry(store: Store, tmp_path: Path) -> None:
    items: list[Item] = [item(f"{n % 10}/{n}", content=b"%d" % n * 100) for n in range(2000)]
    (tmp_path / "tar").write_bytes(tar(*items))
    chance, killed, incomplete = random.Random(7), 0, 0
    for _ in range(14):
        command: list[str | Path] = [
            sys.executable,
            "-c",
            KILLED,
            store.root,
            tmp_path / "tar",
            str(chance.uniform(0, 0.8)),
        ]
        killed += subprocess.run(command, cwd=REPO).returncode == -signal.SIGKILL
        for path in store.layers.glob("*"):
            assert len((path / "index").read_text().splitlines()) == 2000
        for path in store.images.glob("*"):
            assert len(read(path)) == 2011
        for path in store.directories.glob("*"):
            assert len(facts_of(path / "rootfs")) == 2011
        incomplete += len(entries(store)) < 3
        if chance.random() < 0.5:  # the next begins where there is nothing, or less
            for path in [*store.images.glob("*"), *store.directories.glob("*"), *store.layers.glob("*")][::-1][:2]:
                remove(path)
    assert killed > 3
    assert incomplete > 3
    # One that was killed when its entry was whole has left a lock, which goes with the next that makes that entry.
    for path in [*store.images.glob("*"), *store.directories.glob("*"), *store.layers.glob("*")]:
        remove(path)
    source = store.layer("sha256:aa", lambda place: convert(io.BytesIO(tar(*items)), place, LIMITS))
    store.image([source], LIMITS)
    store.directory([source], LIMITS)
    assert_clean(store)


class Own(Exception):
    pass


@pytest.mark.parametrize("error", [Own, KeyboardInterrupt, ArchiveError, InterruptedError])
def test_an_exception_leaves_nothing(store: Store, error: type[BaseException]) -> None:
    def make(place: Path) -> None:
        (place / "some/thing").mkdir(parents=True)
        (place / "some/link").symlink_to("/etc")
        raise error

    for _ in range(2):
        with pytest.raises(error):
            store.layer("sha256:aa", make)
        assert entries(store) == []
        assert_clean(store)
    assert layer(store, name="sha256:aa").is_dir()


def test_a_bad_archive_leaves_nothing(store: Store) -> None:
    for data in (LAYER[:100_000], b"", b"garbage" * 1000):
        with pytest.raises(ArchiveError):
            layer(store, data)
    big = tar(item("f", content=bytes(100_000)))
    with pytest.raises(ArchiveError):
        store.layer("sha256:bb", lambda place: convert(io.BytesIO(big), place, Limits(50_000)))
    bad = layer(store, tar(item("hard", H, target="nothing")))
    for make in (store.image, store.directory):
        with pytest.raises(ArchiveError):
            make([bad], LIMITS)
    assert entries(store) == [f"layers/{bad.name}"]
    assert_clean(store)


@contextmanager
def small_disk(at: Path) -> Iterator[Path]:
    at.mkdir()
    command: list[str | Path] = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", at]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("no mounting here")
    try:
        yield at
    finally:
        subprocess.run(["umount", at], check=True)


@pytest.mark.parametrize("what", ["layer", "image", "directory"])
def test_a_full_disk_leaves_nothing(tmp_path: Path, what: str) -> None:
    content = random.Random(2).randbytes(1_300_000)
    with small_disk(tmp_path / "disk") as disk:
        store = Store(disk / "store")
        data = tar(item("f", content=content if what != "layer" else content * 2))
        with pytest.raises(OSError) as caught:
            path = layer(store, data)
            (store.image if what == "image" else store.directory)([path], LIMITS)
        assert caught.value.errno == errno.ENOSPC
        assert len(entries(store)) == (what != "layer")
        assert_clean(store)
        assert layer(store, tar(item("f", content=b"small"))).is_dir()


def test_a_file_that_is_written_in_part_is_not_taken_for_whole(store: Store) -> None:
    """A limit of sizes is met in the middle of a write, which then writes less than it should."""
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, hard))
    try:
        for size in (1_600_000, 2_000_000, 3_000_000):
            with pytest.raises(OSError) as caught:
                layer(store, tar(item("f", content=random.Random(3).randbytes(size))))
            assert caught.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert entries(store) == []
    assert_clean(store)


# --- locks and staging


def test_locks_do_not_accumulate(store: Store) -> None:
    for number in range(20):
        with store.locked(f"lock{number % 3}"):
            assert len(list((store.root / "locks").iterdir())) == 1
    assert_clean(store)


def test_waiting_for_a_lock_can_be_given_up(store: Store) -> None:
    answers = iter([False, False, True])
    with store.locked("name"):
        with pytest.raises(InterruptedError, match="name"), store.locked("name", answers.__next__):
            raise AssertionError("it had the lock twice")
        with store.locked("other", lambda: True):
            pass
    assert not list(answers)
    with store.locked("name", lambda: True):
        pass
    assert_clean(store)


def test_a_lock_is_one_process_s_even_while_its_file_comes_and_goes(store: Store) -> None:
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        for _ in range(30):
            with store.locked("name"):
                inside.append(number)
                most.append(len(inside))
                inside.remove(number)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(most) == 120
    assert max(most) == 1
    assert_clean(store)


def test_a_lock_that_another_has_taken_away_leaks_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def unlink(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, "no")

    with pytest.raises(PermissionError), store.locked("name"):
        monkeypatch.setattr(Path, "unlink", unlink)
    monkeypatch.undo()
    with store.locked("name", lambda: True):  # its descriptor is closed
        pass


def staged(store: Store, name: str) -> Path:
    store.staging.mkdir(parents=True, exist_ok=True)
    return store.staging / name


def link_to(outside: Path) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(outside)


@pytest.mark.parametrize(
    "kind", ["link to a directory", "link to a file", "dangling link", "file", "fifo", "directory"]
)
def test_what_is_in_place_of_the_staging_is_removed_and_not_followed(store: Store, tmp_path: Path, kind: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"kept")
    source = layer(store)
    made = (store.layer_path("sha256:bb"), store.image_path([source]))
    places = [staged(store, store.lock_of(path)) for path in made]
    for place in places:
        if kind == "link to a directory":
            place.symlink_to(outside)
        elif kind == "link to a file":
            place.symlink_to(outside / "file")
        elif kind == "dangling link":
            place.symlink_to(outside / "new")
        elif kind == "file":
            place.write_bytes(b"old")
        elif kind == "fifo":
            os.mkfifo(place)
        else:
            (place / "sub").mkdir(parents=True)
            (place / "sub/link").symlink_to(outside)
            (place / "data").symlink_to(outside / "file")
    other = layer(store, name="sha256:bb")
    image = store.image([source], LIMITS)
    assert [path.name for path in outside.iterdir()] == ["file"]
    assert (outside / "file").read_bytes() == b"kept"
    assert not other.is_symlink() and (other / "data").stat().st_nlink == 1
    assert b"d/b" in read(image)
    assert_clean(store)


def test_what_is_in_the_cache_is_ours_alone(store: Store) -> None:
    before = os.umask(0)
    try:
        source = layer(store)
        store.image([source], LIMITS)
        directory = store.directory([source], LIMITS)
    finally:
        os.umask(before)
    for path in (store.layers, store.images, store.directories, store.staging, store.locks, source):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    assert stat.S_IMODE(directory.parent.stat().st_mode) & 0o022 == 0 or store.directories.stat().st_mode & 0o077 == 0


# --- what is in an image


@pytest.fixture
def helper(tmp_path: Path) -> Path:
    path = tmp_path / "vmette-helper"
    path.write_bytes(b"\x7fELF" + b"h" * 10_000)
    path.chmod(0o700)
    return path


def test_other_layers_and_helpers_are_other_images(store: Store, helper: Path) -> None:
    one, two = layer(store), layer(store, tar(item("b")))
    stacks = [[one], [two], [one, two], [two, one], [one, one]]
    images = {store.image(stack, LIMITS) for stack in stacks}
    images.add(store.image([one], LIMITS, [helper]))
    helper.write_bytes(b"other")
    images.add(store.image([one], LIMITS, [helper]))
    images.add(store.image([one], LIMITS, [helper.rename(helper.with_name("renamed"))]))
    assert len(images) == 8
    assert len({path.read_bytes()[1024 + 48 : 1024 + 64] for path in images}) == 8, "the UUIDs"
    directories = {store.directory(stack, LIMITS) for stack in stacks}
    assert len(directories) == 5


def test_the_same_layer_again_and_again_takes_its_place_once(store: Store) -> None:
    """Each time a symlink leads it to another place: an archive of a megabyte would be an image of a hundred."""
    content = random.Random(4).randbytes(500_000)
    big = layer(store, tar(item("l/big", content=content)))
    stack = []
    for number in range(20):
        stack += [layer(store, tar(item("l", L, target=f"to{number}"))), big]
    image = store.image(stack, LIMITS)
    assert image.stat().st_size < 1_000_000
    with pytest.raises(AssertionError, match="two files"):  # which the reader takes for a mistake
        read(image)
    assert subprocess.run(["fsck.erofs", "--extract", image]).returncode == 0


@pytest.mark.parametrize(
    ("lower", "where"),
    [
        ([], "usr/local/bin"),
        ([item("usr/local/bin", D, mode=0o700)], "usr/local/bin"),
        ([item("usr/local", L, target="/etc")], "etc/bin"),
        ([item("usr/local", L, target="../../../etc"), item("etc/bin", L, target="/opt")], "opt"),
        ([item("usr", L, target="/{outside}")], "{outside}/local/bin"),
        ([item("usr/local/bin/vmette-helper", L, target="/etc/passwd")], "usr/local/bin"),
        ([item("usr/local/bin/vmette-helper", D), item("usr/local/bin/vmette-helper/x")], "usr/local/bin"),
        ([item("sh", content=b"sh"), item("usr/local/bin/vmette-helper", H, target="sh")], "usr/local/bin"),
    ],
)
def test_helpers_are_where_the_guest_finds_them_whatever_the_image_is(
    store: Store, tmp_path: Path, helper: Path, lower: list[Item], where: str
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for info, _ in lower:
        info.linkname = info.linkname.format(outside=str(outside).strip("/"))
    where = where.format(outside=str(outside).strip("/"))
    sources = [layer(store, tar(*lower))]
    found = read(store.image(sources, LIMITS, [helper]))
    node = found[f"{where}/vmette-helper".encode()]
    assert (node.mode, node.uid, node.gid, node.nlink) == (stat.S_IFREG | 0o755, 0, 0, 1)
    assert node.content == helper.read_bytes()
    made = store.directory(sources, LIMITS, [helper]) / where / "vmette-helper"
    assert made.read_bytes() == helper.read_bytes()
    assert list(outside.iterdir()) == []
    assert b"sh" not in found or found[b"sh"].content == b"sh"


def test_helpers_of_whole_blocks_and_empty_ones(store: Store, tmp_path: Path) -> None:
    for size in (0, 1, 4095, 4096, 8192, 8193):
        path = tmp_path / f"helper{size}"
        path.write_bytes(random.Random(size).randbytes(size))
        found = read(store.image([layer(store)], LIMITS, [path]))
        assert found[b"usr/local/bin/" + path.name.encode()].content == path.read_bytes()
        assert found[b"a"].content == b"x" * 5000


# --- removing


def test_what_is_deep_can_be_measured_and_removed(store: Store, tmp_path: Path) -> None:
    """Deeper than Python recurses, than there are descriptors, and longer than a path may be."""
    depth = 2000
    data = tar(item("a/" * depth + "file", content=b"x" * 5000), item("a/" * 500 + "n" * 255, content=b"y" * 5000))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        directory = store.directory([layer(store, data)], LIMITS)
        assert size_of(directory.parent) >= 16384
        remove(directory.parent)
        assert not directory.parent.exists()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_removing_follows_no_symlinks(tmp_path: Path) -> None:
    outside, top = tmp_path / "outside", tmp_path / "top"
    outside.mkdir()
    (outside / "file").touch()
    (top / "sub").mkdir(parents=True)
    (top / "sub/link").symlink_to(outside)
    (top / "file").symlink_to(outside / "file")
    (tmp_path / "link").symlink_to(outside)
    for path in (top, tmp_path / "link", tmp_path / "nothing"):
        remove(path)
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]
    assert (outside / "file").exists()


def test_names_of_layers_stay_within_the_cache(store: Store, tmp_path: Path) -> None:
    for name in ("../../outside", "sha256:../x", "/etc/x", "a/b", "../..", "a\0b"):
        with pytest.raises(ArchiveError):
            store.layer(name, lambda place: None)
    assert not store.root.exists()

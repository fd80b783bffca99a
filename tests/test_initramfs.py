"""`tools.initramfs` and `tools.artifacts`: archives that are the same each time, and are made once."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools import initramfs
from tools.artifacts import artifact, scratch
from tools.initramfs import Entry, newc
from vmette.providers.inject import HELPERS

TREE = [
    Entry("dev", stat.S_IFDIR | 0o755),
    Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1)),
    Entry("dev/disk", stat.S_IFBLK | 0o640, device=(254, 259)),
    Entry("init", stat.S_IFREG | 0o755, b"\x7fELF" + bytes(1001)),
    Entry("empty", stat.S_IFREG | 0o444),
    Entry("link", stat.S_IFLNK | 0o777, b"init"),
    Entry("suid", stat.S_IFREG | 0o4711, "na\u00efve\n".encode()),
]


def cpio(archive: bytes, *arguments: str, cwd: Path) -> str:
    """What GNU cpio, which has never seen our code, says of it."""
    environment = {**os.environ, "TZ": "UTC", "LC_ALL": "C"}
    done = subprocess.run(
        ["cpio", *arguments], cwd=cwd, input=archive, stdout=subprocess.PIPE, check=True, env=environment
    )
    return done.stdout.decode()


# --- newc


def test_gnu_cpio_lists_what_went_in(tmp_path: Path) -> None:
    listing = cpio(newc(TREE), "-itv", "--quiet", cwd=tmp_path).splitlines()
    parts = [line.split(maxsplit=3) for line in listing]
    assert [(mode, links, owner) for mode, links, owner, _ in parts] == [
        ("drwxr-xr-x", "2", "root"),
        ("crw-------", "1", "root"),
        ("brw-r-----", "1", "root"),
        ("-rwxr-xr-x", "1", "root"),
        ("-r--r--r--", "1", "root"),
        ("lrwxrwxrwx", "1", "root"),
        ("-rws--x--x", "1", "root"),
    ]
    assert [" ".join(rest.split()) for *_, rest in parts] == [
        "root 0 Jan 1 1970 dev",
        "root 5, 1 Jan 1 1970 dev/console",
        "root 254, 259 Jan 1 1970 dev/disk",
        "root 1005 Jan 1 1970 init",
        "root 0 Jan 1 1970 empty",
        "root 4 Jan 1 1970 link -> init",
        "root 7 Jan 1 1970 suid",
    ]


def test_gnu_cpio_unpacks_what_went_in(tmp_path: Path) -> None:
    entries = [entry for entry in TREE if entry.device == (0, 0)]  # to make a device node takes root
    entries.append(Entry("caf\u00e9", stat.S_IFREG | 0o644, b"x"))
    cpio(newc(entries), "-i", "--quiet", "--no-preserve-owner", cwd=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {entry.name for entry in entries}
    for entry in entries:
        path = tmp_path / entry.name
        assert stat.S_IFMT(path.lstat().st_mode) == stat.S_IFMT(entry.mode)
        if path.is_symlink():
            assert os.fsencode(path.readlink()) == entry.data
        elif path.is_file():
            assert path.read_bytes() == entry.data
            assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(entry.mode)


def test_the_same_entries_give_the_same_bytes() -> None:
    assert newc(TREE) == newc(iter(TREE)) == newc([Entry(e.name, e.mode, e.data, e.device) for e in TREE])


@pytest.mark.parametrize(
    "other",
    [
        Entry("other", stat.S_IFREG | 0o755, b"x"),
        Entry("init", stat.S_IFREG | 0o700, b"x"),
        Entry("init", stat.S_IFREG | 0o755, b"y"),
        Entry("init", stat.S_IFREG | 0o755, b"x", device=(1, 0)),
    ],
)
def test_another_entry_gives_other_bytes(other: Entry) -> None:
    assert newc([other]) != newc([Entry("init", stat.S_IFREG | 0o755, b"x")])


FIELDS = (
    *("ino", "mode", "uid", "gid", "nlink", "mtime", "filesize"),
    *("devmajor", "devminor", "rdevmajor", "rdevminor", "namesize", "check"),
)


def unpack(archive: bytes) -> list[Entry]:
    """The reader of the kernel's buffer-format.rst: a header of 110 bytes; name and data each padded to four bytes."""
    entries: list[Entry] = []
    inodes: set[int] = set()
    at = 0
    while True:
        assert at % 4 == 0
        assert archive[at : at + 6] == b"070701"
        values = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        header = dict(zip(FIELDS, values, strict=True))
        name = archive[at + 110 : at + 110 + header["namesize"]]
        assert name.index(0) == len(name) - 1
        data_at = at + 110 + len(name)
        start = -(-data_at // 4) * 4
        end = start + header["filesize"]
        at = -(-end // 4) * 4
        assert archive[data_at:start] == bytes(start - data_at)
        assert archive[end:at] == bytes(at - end)
        if name == b"TRAILER!!!\0":
            assert header["filesize"] == 0
            assert archive[at:] == bytes(len(archive) - at)
            return entries
        assert header["ino"] not in inodes, "two names with one inode would be hard links"
        inodes.add(header["ino"])
        assert [header[field] for field in ("uid", "gid", "mtime", "devmajor", "devminor", "check")] == [0] * 6
        entries.append(
            Entry(
                name[:-1].decode(),
                header["mode"],
                archive[start:end],
                (header["rdevmajor"], header["rdevminor"]),
            )
        )


ENTRIES = st.builds(
    Entry,
    st.text("abc/\u00e9\u6f22", min_size=1, max_size=9),
    st.sampled_from([stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK]).map(lambda kind: kind | 0o644),
    st.binary(max_size=9),
)


@settings(deadline=None)
@given(st.lists(ENTRIES, max_size=6))
def test_names_and_data_of_every_length_are_aligned(entries: list[Entry]) -> None:
    archive = newc(entries)
    assert unpack(archive) == entries
    assert len(archive) % 512 == 0


def test_an_empty_archive_is_one(tmp_path: Path) -> None:
    assert cpio(newc([]), "-it", "--quiet", cwd=tmp_path) == ""


# --- the guest's programs


def test_every_c_file_of_the_guest_is_of_some_program() -> None:
    programs = initramfs.programs()
    assert {name for names in programs.values() for name in names} == {
        path.name for path in initramfs.SOURCES.glob("*.c")
    }
    assert {"init.c", "agent.c", "network.c"} <= set(programs["init"])
    assert not {"vsock.c", "vsock_send.c", "vsock_runner.c"} & set(programs["init"])
    for name, helpers in initramfs.HELPERS.items():
        assert (initramfs.SOURCES / f"{name.replace('-', '_')}.c").name in helpers


def test_the_helpers_are_those_that_providers_put_into_images() -> None:
    assert tuple(initramfs.HELPERS) == HELPERS


# --- artifact


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VMETTE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Maker:
    """Makes a file, and counts how often."""

    def __init__(self, content: str = "made") -> None:
        self.calls = 0
        self._content = content

    def __call__(self, path: Path) -> None:
        self.calls += 1
        assert not path.exists()
        path.write_text(self._content)


def files_below(cache: Path) -> set[str]:
    return {path.name for path in cache.rglob("*") if path.is_file()} - {"lock"}


def test_an_artifact_is_made_once(cache: Path) -> None:
    make = Maker()
    paths = [artifact("thing", {"a": "1", "b": "2"}, make) for _ in range(3)]
    paths.append(artifact("thing", {"b": "2", "a": "1"}, make))
    assert make.calls == 1
    assert set(paths) == {paths[0]}
    assert paths[0].read_text() == "made"
    assert paths[0].is_relative_to(cache)
    assert files_below(cache) == {"thing"}


def test_other_facts_and_other_names_are_other_artifacts() -> None:
    what: list[tuple[str, dict[str, str]]] = [("a", {"f": "1"}), ("a", {"f": "2"}), ("b", {"f": "1"}), ("a", {})]
    paths = [artifact(name, facts, Maker(str((name, facts)))) for name, facts in what]
    assert [path.read_text() for path in paths] == [str(each) for each in what]


def fail_early(path: Path) -> None:
    raise RuntimeError("no compiler")


def fail_late(path: Path) -> None:
    path.write_text("half of it")
    raise RuntimeError("disk full")


def do_nothing(path: Path) -> None:
    pass


@pytest.mark.parametrize("fail", [fail_early, fail_late, do_nothing])
def test_what_fails_leaves_nothing_that_counts(cache: Path, fail: Callable[[Path], None]) -> None:
    with pytest.raises((RuntimeError, FileNotFoundError)):
        artifact("thing", {}, fail)
    assert "thing" not in files_below(cache)
    make = Maker()  # which fails if it finds what the other left
    assert artifact("thing", {}, make).read_text() == "made"
    assert make.calls == 1
    assert files_below(cache) == {"thing"}


def be_killed(path: Path) -> None:
    path.write_text("half of it")
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_is_killed_leaves_no_lock_and_nothing_that_counts(cache: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=artifact, args=("thing", {}, be_killed))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert files_below(cache) == {"thing.part"}
    assert artifact("thing", {}, Maker()).read_text() == "made"
    assert files_below(cache) == {"thing"}


def make_with_a_note(path: Path) -> None:
    """Leaves a note of each call, and takes its time so that others have to wait."""
    notes = path.parent.parent / "notes"
    with notes.open("a") as file:
        file.write(f"{os.getpid()}\n")
    with scratch(path) as directory:
        for number in range(300):
            (directory / str(number)).write_text(str(number))
        path.write_text(json.dumps(sorted(int(each.name) for each in directory.iterdir())))


def test_several_at_once_make_it_once(cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(4) as pool:
        paths = pool.starmap(artifact, [("thing", {"a": "1"}, make_with_a_note)] * 8, chunksize=1)
    assert set(paths) == {paths[0]}
    assert json.loads(paths[0].read_text()) == list(range(300))
    assert len((cache / "build/notes").read_text().splitlines()) == 1


@pytest.mark.parametrize("fail", [False, True])
def test_scratch_is_empty_at_first_and_gone_at_last(tmp_path: Path, fail: bool) -> None:
    output = tmp_path / "output"
    left = tmp_path / "output.work/left/over"
    left.parent.mkdir(parents=True)
    left.touch()
    try:
        with scratch(output) as directory:
            assert list(directory.iterdir()) == []
            (directory / "new").mkdir()
            if fail:
                raise RuntimeError
    except RuntimeError:
        pass
    assert list(tmp_path.iterdir()) == []

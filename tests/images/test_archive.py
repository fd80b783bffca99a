"""Archives: what is read of good ones, and that bad ones cost nothing and end in an ArchiveError."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
import random
import resource
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.images.layer_tools import B, C, D, F, H, Item, L, P, Sink, directory, item, scan, tar
from vmette.images.archive import MAX_HEADER, MAX_TEXT, MAX_XATTRS, ArchiveError, Entry, Stream, entries
from vmette.images.layers import Limits, convert


def run_filter(*command: str) -> Callable[[bytes], bytes]:
    return lambda data: subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout


zstd = run_filter("zstd", "-q", "-c")
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstd,
}
COMPRESSOR = pytest.mark.parametrize("compress", COMPRESSORS.values(), ids=COMPRESSORS)
SKIPPABLE = struct.pack("<II", 0x184D2A53, 5) + b"xyzzy"
CONTENT = random.Random(1).randbytes(300_000) + bytes(300_000)


def drained(data: bytes, limit: int = 1 << 30) -> bytes:
    stream = Stream(io.BytesIO(data), limit)
    out = bytearray()
    while piece := stream.read_some(1 << 20):
        out += piece
    assert not stream.read_some(1), "there is more after the end"
    return bytes(out)


def refused(data: bytes, *words: str, **options: int) -> str:
    with pytest.raises(ArchiveError) as caught:
        scan(data, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert len(message) < 250
    assert all(word in message for word in words), message
    return message


def paths(data: bytes) -> list[bytes]:
    return [entry.path for entry, _ in scan(data)]


def one(data: bytes) -> Entry:
    ((entry, _),) = scan(data)
    return entry


# --- Stream


def test_what_is_not_compressed_is_given_as_it_is() -> None:
    for data in (b"", b"x", b"BZ", CONTENT):
        assert drained(data) == data


@COMPRESSOR
def test_members_one_after_the_other_and_padding_are_one_stream(compress: Callable[[bytes], bytes]) -> None:
    members = compress(CONTENT) + compress(b"") + compress(b"second") + compress(b"")
    assert drained(members) == CONTENT + b"second"
    for zeros in (1, 4, 511, 1 << 20):
        assert drained(members + bytes(zeros)) == CONTENT + b"second"


@COMPRESSOR
@pytest.mark.parametrize("size", range(32760, 32775))
def test_the_next_member_may_begin_anywhere_in_what_is_read_at_once(
    compress: Callable[[bytes], bytes], size: int
) -> None:
    first = compress(b"first")
    assert drained(first + bytes(size - len(first)) + compress(b"second")) == b"firstsecond"


def test_a_member_in_another_format() -> None:
    assert drained(gzip.compress(b"a") + zstd(b"b") + lzma.compress(b"c") + bz2.compress(b"d")) == b"abcd"


@pytest.mark.parametrize("order", ["sf", "fs", "sfsfs", "ssf", "fss"])
def test_skippable_frames_of_zstd_are_skipped(order: str) -> None:
    parts = {"s": SKIPPABLE, "f": zstd(b"data")}
    assert drained(b"".join(parts[each] for each in order)) == b"data" * order.count("f")


@COMPRESSOR
def test_a_stream_that_ends_early_is_an_error_wherever_it_ends(compress: Callable[[bytes], bytes]) -> None:
    data = compress(CONTENT[:3000]) + compress(b"second")
    second = len(compress(CONTENT[:3000]))
    ends = {*range(6, 40), *range(second - 30, second), *range(second + 6, len(data)), second // 2}
    for end in sorted(ends - {second}):
        with pytest.raises(ArchiveError):
            drained(data[:end])


@COMPRESSOR
@pytest.mark.parametrize("garbage", [b"x", b"garbage", b"\0\0\0x", b"\x1f", b"\x1f\x8b", bytes(5000) + b"more"])
def test_what_follows_must_be_compressed_too(compress: Callable[[bytes], bytes], garbage: bytes) -> None:
    with pytest.raises(ArchiveError):
        drained(compress(CONTENT) + garbage)


@pytest.mark.parametrize(
    ("compress", "place"),
    [
        pytest.param(gzip.compress, -8, id="gzip's CRC"),
        pytest.param(gzip.compress, -4, id="gzip's length"),
        pytest.param(bz2.compress, 10, id="bzip2's block CRC"),
        pytest.param(lzma.compress, -30, id="xz's index"),
        pytest.param(run_filter("zstd", "-q", "-c", "--check"), -1, id="zstd's checksum"),
    ],
)
def test_checksums_are_checked(compress: Callable[[bytes], bytes], place: int) -> None:
    data = bytearray(compress(b"x" * 1000))
    assert drained(bytes(data)) == b"x" * 1000
    data[place] ^= 0x40
    with pytest.raises(ArchiveError):
        drained(bytes(data))


def test_the_limit_is_of_decompressed_bytes() -> None:
    for compress in (bytes, *COMPRESSORS.values()):
        assert len(drained(compress(CONTENT), len(CONTENT))) == len(CONTENT)
        with pytest.raises(ArchiveError, match="more than"):
            drained(compress(CONTENT), len(CONTENT) - 1)


def test_an_archive_does_not_say_how_much_memory_we_need() -> None:
    head = lzma.compress(b"x", lzma.FORMAT_XZ, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 16}])
    huge = bytearray(head)
    at = huge.index(bytes([0x21, 0x01])) + 2  # the filter's id, size of properties, then the size of its dictionary
    huge[at] = 36  # 1 GiB
    block = huge[12 : 12 + 4 * (huge[12] + 1) - 4]
    huge[12 + len(block) : 16 + len(block)] = struct.pack("<I", zlib.crc32(block))
    with pytest.raises(ArchiveError, match=r"[Mm]emory"):
        drained(bytes(huge))
    long = subprocess.run(["zstd", "-q", "-c", "--ultra", "--long=31"], input=b"x" * 100, stdout=subprocess.PIPE)
    frame = bytearray(long.stdout)
    frame[4] &= ~0x20  # no longer a single segment: a window follows
    frame[5] = 21 << 3  # 2 GiB
    with pytest.raises(ArchiveError):
        drained(bytes(frame))


BOMB = """
import resource, sys
from pathlib import Path
from vmette.images.archive import *
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with open(sys.argv[1], "rb") as file:
    stream = Stream(file, int(sys.argv[2]))
    try:
        while stream.read_some(1 << 20):
            pass
    except ArchiveError as error:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("tool", ["gzip", "bzip2", "xz", "zstd"])
def test_a_bomb_ends_at_the_limit_in_little_memory(tmp_path: Path, tool: str) -> None:
    bomb = tmp_path / "bomb"
    size, limit = (1 << 28, 1 << 27) if tool == "bzip2" else (1 << 30, 1 << 29)
    with bomb.open("wb") as out:
        subprocess.run(f"head -c {size} /dev/zero | {tool} -1 -c", shell=True, stdout=out, check=True)
    assert bomb.stat().st_size < 6 << 20
    command: list[str | Path] = [sys.executable, "-c", BOMB, str(bomb), str(limit)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=60)
    assert int(done.stdout) < 64 << 10, "KiB"


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress], ids=["gzip", "bzip2", "xz"])
def test_a_million_empty_members_take_no_time_per_member_that_grows(compress: Callable[[bytes], bytes]) -> None:
    data = compress(b"") * 20_000
    started = time.process_time()
    assert drained(data) == b""
    assert time.process_time() - started < 4


def test_giving_up() -> None:
    calls = iter([False, False, True])
    stream = Stream(io.BytesIO(bytes(10 << 20)), 1 << 30, lambda: next(calls))
    with pytest.raises(InterruptedError):
        while stream.read_some(1 << 20):
            pass
    empty = Stream(io.BytesIO(gzip.compress(b"") * 1000), 1 << 30, iter([False] * 100 + [True]).__next__)
    with pytest.raises(InterruptedError):  # also while nothing comes out
        empty.read_some(1)


# --- entries: good archives

FORMS = pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
KINDS: list[Item] = [
    directory("./"),
    item("file", content=b"content", mode=0o4755, uid=1000, gid=65534),
    item("dir/sub/", D, mode=0o1777),
    item("link", L, target="../dir//x/."),
    item("hard", H, target="./file"),
    item("char", C, device=(4095, (1 << 20) - 1)),
    item("block", B, device=(8, 1)),
    item("fifo", P),
    item("empty"),
]


@FORMS
def test_every_kind_in_every_format(form: int) -> None:
    found = {entry.path: (entry, content) for entry, content in scan(tar(*KINDS, form=form))}
    assert [entry.kind for entry, _ in found.values()] == list("dfdlhcbpf")
    file, content = found[b"file"]
    assert (file.mode, file.uid, file.gid, content) == (0o4755, 1000, 65534, b"content")
    assert found[b"dir/sub"][0].mode == 0o1777
    assert found[b"link"][0].target == b"../dir//x/."
    assert found[b"hard"][0].target == b"file"
    assert found[b"char"][0].device == (4095, (1 << 20) - 1)
    assert found[b""][0].kind == "d"


@pytest.mark.parametrize("form", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_what_gnu_tar_writes_is_what_was_there(tmp_path: Path, form: str) -> None:
    top = tmp_path / "top"
    (top / "a/b").mkdir(parents=True)
    (top / "a/file").write_bytes(CONTENT)
    (top / "a/file").chmod(0o2711)
    (top / "hard").hardlink_to(top / "a/file")
    (top / "link").symlink_to("a/file")
    names = {b"a", b"a/b", b"a/file", b"hard", b"link", b""}
    if form != "v7":
        os.mkfifo(top / "fifo")
        names.add(b"fifo")
    if form in {"gnu", "oldgnu", "posix"}:
        deep = b"d" * 200 + b"/" + b"\xff\xfe" + b"e" * 200
        (top / os.fsdecode(deep)).mkdir(parents=True)
        (top / "long").symlink_to("t" * 300)
        names |= {deep, b"d" * 200, b"long"}
    os.utime(top / "a/file", ns=(1_234_567_890_123_456_789,) * 2)
    data = subprocess.run(
        ["tar", f"--format={form}", "-C", top, "-cf", "-", "."], stdout=subprocess.PIPE, check=True
    ).stdout
    found = {entry.path: (entry, content) for entry, content in scan(data)}
    assert set(found) == names
    pair = {found[b"a/file"][0].kind, found[b"hard"][0].kind}
    assert pair == {"f", "h"}
    (file, content) = next(found[name] for name in (b"a/file", b"hard") if found[name][0].kind == "f")
    assert content == CONTENT
    assert file.mode == 0o2711
    assert file.mtime == (1_234_567_890_123_456_789 if form == "posix" else 1_234_567_890 * 10**9)
    assert found[b"link"][0].target == b"a/file"
    if b"long" in names:
        assert found[b"long"][0].target == b"t" * 300


def test_incremental_archives_have_times_where_ustar_has_a_prefix(tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    (tmp_path / "top/file").write_bytes(b"x")
    command: list[str | Path] = ["tar", "--format=gnu", "-g", tmp_path / "snapshot", "-C", tmp_path, "-cf", "-", "top"]
    data = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    assert b"top/file" in paths(data)


NAMES = st.lists(
    st.binary(min_size=1, max_size=60).filter(lambda name: not set(name) & set(b"/\0") and name.strip(b".")),
    min_size=1,
    max_size=5,
).map(b"/".join)


@pytest.mark.parametrize("name", [b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18"])
def test_a_plain_archive_is_plain_whatever_its_first_name_looks_like(name: bytes) -> None:
    found = scan(tar(item(name, F, b"content")), whiteouts=False)
    assert [(e.path, body) for e, body in found] == [(name, b"content")]


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.lists(
        st.tuples(
            NAMES,
            st.sampled_from([F, D, L, P]),
            st.binary(max_size=1500),
            st.integers(0, 0o7777),
            st.integers(0, (1 << 32) - 2),
            st.integers(0, (1 << 33)),
        ),
        max_size=6,
    ),
)
def test_what_the_standard_library_writes_is_read(
    form: int, members: list[tuple[bytes, bytes, bytes, int, int, int]]
) -> None:
    items = []
    for name, kind, content, mode, owner, seconds in members:
        info, body = item(name, kind, content if kind == F else b"", mode=mode, uid=owner, gid=owner, target=name)
        info.mtime = seconds
        items.append((info, body))
    found = scan(tar(*items, form=form), whiteouts=False)
    assert [(e.path, e.mode, e.uid, e.gid, e.mtime, body) for e, body in found] == [
        (name, mode, owner, owner, seconds * 10**9, content if kind == F else b"")
        for name, kind, content, mode, owner, seconds in members
    ]


@pytest.mark.parametrize(
    ("mtime", "expected"),
    [
        ("1.5", 1_500_000_000),
        ("1.123456789", 1_123_456_789),
        ("1.1234567899", 1_123_456_789),
        ("-1.5", -1_500_000_000),
        ("-0.5", -500_000_000),
        ("4294967296.000000001", (1 << 32) * 10**9 + 1),
        ("7.", 7_000_000_000),
    ],
)
def test_times_have_nanoseconds(mtime: str, expected: int) -> None:
    assert one(tar(item("f", pax={"mtime": mtime}))).mtime == expected


@pytest.mark.parametrize("mtime", ["", "x", "nan", "inf", "1e400", "--5", "9" * 400, "1.x", "-", "\u0663"])
def test_times_that_are_none_do_not_matter(mtime: str) -> None:
    assert one(tar(item("f", pax={"mtime": mtime}))).mtime == 0


def header(name: bytes = b"f", kind: bytes = b"0", size: bytes | int = 0, **fields: bytes) -> bytes:
    """A block whose checksum is right, whatever is in it."""
    block = bytearray(512)
    octal = size if isinstance(size, bytes) else b"%011o" % size
    defaults = {"mode": b"644", "uid": b"0", "gid": b"0", "mtime": b"0", "magic": b"ustar\x0000"}
    places = {
        "name": (0, 100),
        "mode": (100, 8),
        "uid": (108, 8),
        "gid": (116, 8),
        "size": (124, 12),
        "mtime": (136, 12),
        "kind": (156, 1),
        "link": (157, 100),
        "magic": (257, 8),
        "major": (329, 8),
        "minor": (337, 8),
        "prefix": (345, 155),
        "sparse": (386, 126),
    }
    for key, value in {**defaults, "name": name, "kind": kind, "size": octal, **fields}.items():
        at, length = places[key]
        assert len(value) <= length
        block[at : at + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def pax_record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    total = length + len(str(length))
    total = length + len(str(total))
    return b"%d %s=%s\n" % (total, key, value)


def pax(records: bytes, kind: bytes = b"x") -> bytes:
    return header(b"pax", kind, len(records)) + padded(records)


END = bytes(1024)


def test_base_256_numbers() -> None:
    huge = b"\x80" + (7).to_bytes(11, "big")
    data = header(size=huge, uid=b"\x80" + (70_000).to_bytes(7, "big"), mtime=b"\xff" * 11 + b"\xfb")
    ((entry, content),) = scan(data + padded(b"1234567") + END)
    assert (entry.size, entry.uid, entry.mtime, content) == (7, 70_000, -5 * 10**9, b"1234567")


@pytest.mark.parametrize("number", [b"644", b"0000644", b" 644 ", b"000644 ", b"\x00000644", b"644\0 99"])
def test_octal_numbers_as_they_come(number: bytes) -> None:
    assert one(header(mode=number) + END).mode == 0o644


def test_a_signed_checksum_of_old_programs() -> None:
    block = bytearray(header(b"\xff\xfe"))
    block[148:156] = b" " * 8
    signed = sum(byte - 256 * (byte > 127) for byte in block)
    block[148:156] = b"%06o\0 " % signed
    assert one(bytes(block) + END).path == b"\xff\xfe"


def test_prefix_of_ustar_only() -> None:
    assert paths(header(b"name", prefix=b"some/dir") + END) == [b"some/dir/name"]
    assert paths(header(b"name", prefix=b"some/dir", magic=b"ustar  \0") + END) == [b"name"]
    assert paths(header(b"name", prefix=b"some/dir", magic=b"") + END) == [b"name"]


def test_v7_directories_have_a_slash_and_no_type() -> None:
    kinds = [entry.kind for entry, _ in scan(header(b"dir/", b"\0") + header(b"file", b"\0") + END)]
    assert kinds == ["d", "f"]


def test_data_that_a_link_or_directory_claims_is_not_there() -> None:
    for kind in (b"1", b"2", b"3", b"4", b"5", b"6"):
        data = header(b"a", kind, 512, link=b"t", major=b"1", minor=b"1") + header(b"next") + END
        assert paths(data) == [b"a", b"next"]


def test_types_that_nobody_knows_are_left_out_with_their_data() -> None:
    data = header(b"a", b"Z", 700) + bytes(1024) + header(b"V", b"V") + header(b"next") + END
    assert paths(data) == [b"next"]


def test_names_of_extended_headers_win_and_hold_for_one_entry() -> None:
    long = b"l" * 200
    gnu = header(b"././@LongLink", b"L", 201) + padded(long + b"\0")
    target = header(b"././@LongLink", b"K", 201) + padded(b"t" * 200 + b"\0")
    both = gnu + target + header(kind=b"2", link=b"short") + header(b"next")
    (entry, _), (following, _) = scan(both + END)
    assert (entry.path, entry.target, following.path) == (long, b"t" * 200, b"next")
    assert paths(gnu + pax(pax_record(b"path", b"pax")) + header() + header(b"next") + END) == [b"pax", b"next"]
    assert paths(pax(pax_record(b"path", b"")) + header(b"own") + END) == [b"own"]


def test_what_holds_for_all_entries_are_owners_and_times_only() -> None:
    records = pax_record(b"uid", b"7") + pax_record(b"path", b"evil") + pax_record(b"size", b"9")
    records += pax_record(b"SCHILY.xattr.user.x", b"y") + pax_record(b"GNU.sparse.map", b"0,1")
    found = [entry for entry, _ in scan(pax(records, b"g") + header(b"a") + header(b"b") + END)]
    assert [(entry.path, entry.uid, entry.size, entry.xattrs) for entry in found] == [
        (b"a", 7, 0, {}),
        (b"b", 7, 0, {}),
    ]


def test_without_an_end_mark_and_with_much_after_it() -> None:
    data = header(b"a")
    assert paths(data) == [b"a"]
    assert paths(data + END + bytes(100_000)) == [b"a"]
    assert paths(data + END + header(b"not part of it")) == [b"a"]
    assert paths(END) == []


# --- entries: whiteouts and attributes


@pytest.mark.parametrize(
    ("name", "kind", "path"),
    [
        ("a/.wh.b", "w", b"a/b"),
        (".wh.b", "w", b"b"),
        ("a/.wh..wh..opq", "o", b"a"),
        (".wh..wh..opq", "o", b""),
        (".wh....", "w", b"..."),
        (".wh..hidden", "w", b".hidden"),
        (".wh." + "n" * 255, "w", b"n" * 255),
        ("a/.whx", "f", b"a/.whx"),
        (".wh.dir/file", "f", b".wh.dir/file"),
    ],
)
def test_whiteouts(name: str, kind: str, path: bytes) -> None:
    entry = one(tar(item(name, content=b"ignored")))
    assert (entry.kind, entry.path) == (kind, path)


@pytest.mark.parametrize("name", [".wh..wh.plnk", ".wh..wh.orph", "a/.wh..wh.aufs", ".wh..wh.x"])
def test_the_affairs_of_aufs_are_left_out(name: str) -> None:
    assert paths(tar(item(name, D), item("next"))) == [b"next"]


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh...", "a/.wh.", "a/.wh...", ".wh." + "n" * 256])
def test_whiteouts_of_what_cannot_be_there(name: str) -> None:
    refused(tar(item(name)), "n" * 50 if len(name) > 50 else "whiteout")


def test_without_whiteouts_they_are_names() -> None:
    names = [b".wh.", b".wh.a", b".wh..wh..opq", b".wh..."]
    found = scan(tar(*(item(name) for name in names)), whiteouts=False)
    assert [(entry.kind, entry.path) for entry, _ in found] == [("f", name) for name in names]
    with pytest.raises(ArchiveError):
        scan(tar(item(".wh." + "n" * 255)), whiteouts=False)


def test_attributes_that_are_kept() -> None:
    capability = b"\1\0\0\2\0\x20\0\0" + bytes(12)
    kept = {
        b"user.a": b"",
        b"user.b": b"new\nline = \xff",
        b"security.capability": capability,
        b"trusted.x": b"1",
        b"system.posix_acl_access": b"\2\0\0\0",
        b"system.posix_acl_default": b"\2\0\0\0",
    }
    names = "trusted.overlay.opaque user.overlay.redirect security.selinux security.ima security.evm btrfs.compression"
    names += " user. x system.posix_acl_access2 system.nfs4_acl com.apple.quarantine"
    dropped = dict.fromkeys(names.encode().split(), b"x")
    assert one(tar(item("f", xattrs={**dropped, **kept}))).xattrs == kept


def test_attributes_up_to_the_limit() -> None:
    assert len(one(tar(item("f", xattrs={b"user.a": bytes(MAX_XATTRS - 6)}))).xattrs[b"user.a"]) == MAX_XATTRS - 6
    refused(tar(item("f", xattrs={b"user.a": bytes(MAX_XATTRS - 5)})), "attributes")
    refused(tar(item("f", xattrs={b"user." + b"n" * 251: b""})), "attributes")
    refused(tar(item("f", xattrs={b"user.%d" % n: bytes(1000) for n in range(20)})), "attributes")


def test_what_gnu_tar_writes_of_attributes(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    os.setxattr(tmp_path / "f", "user.k", b"a\0b\xff")
    data = subprocess.run(
        ["tar", "--xattrs", "--format=posix", "-C", tmp_path, "-cf", "-", "f"], stdout=subprocess.PIPE, check=True
    ).stdout
    assert one(data).xattrs[b"user.k"] == b"a\0b\xff"


# --- entries: sparse files


def sparse_file(path: Path, pieces: list[tuple[int, bytes]], size: int) -> bytes:
    with path.open("wb") as file:
        for offset, piece in pieces:
            file.seek(offset)
            file.write(piece)
        file.truncate(size)
    return path.read_bytes()


@pytest.mark.parametrize(
    "form",
    [
        ["--format=gnu"],
        ["--format=oldgnu"],
        ["--format=posix", "--sparse-version=0.0"],
        ["--format=posix", "--sparse-version=0.1"],
        ["--format=posix", "--sparse-version=1.0"],
    ],
    ids=lambda form: " ".join(form),
)
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 24, 26, 200])
def test_sparse_files_of_gnu_tar(tmp_path: Path, form: list[str], count: int) -> None:
    pieces = [(65536 * (2 * n + 1), b"%06d" % n * 700) for n in range(count)]
    content = sparse_file(tmp_path / "sparse", pieces, 65536 * (2 * count + 3) + 17)
    (tmp_path / "after").write_bytes(b"after")
    command: list[str | Path] = [
        "tar",
        "--sparse",
        "--hole-detection=raw",
        *form,
        "-C",
        tmp_path,
        "-cf",
        "-",
        "sparse",
        "after",
    ]
    data = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    assert len(data) < len(content), "it is not sparse"
    (entry, got), (_, after) = scan(data)
    assert (entry.path, entry.size, after) == (b"sparse", len(content), b"after")
    assert got == content


def old_sparse(pieces: list[tuple[int, int]], stored: int, real: int, more: bytes = b"\0") -> bytes:
    table = b"".join(b"%011o\0%011o\0" % piece for piece in pieces).ljust(96, b"\0")
    return header(kind=b"S", size=stored, magic=b"ustar  \0", sparse=table + more + b"%011o\0" % real)


def sparse_01(text: bytes, real: int, size: int = 0) -> bytes:
    records = pax_record(b"GNU.sparse.size", b"%d" % real) + pax_record(b"GNU.sparse.map", text)
    return pax(records) + header(size=size) + bytes(size + -size % 512) + END


def sparse_10(body: bytes, real: bytes = b"100", size: int | None = None) -> bytes:
    records = pax_record(b"GNU.sparse.major", b"1") + pax_record(b"GNU.sparse.minor", b"0")
    records += pax_record(b"GNU.sparse.name", b"f") + pax_record(b"GNU.sparse.realsize", real)
    return pax(records) + header(size=len(body) if size is None else size) + padded(body) + END


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(sparse_01(b"0,512,256,512", 4096, 1024), id="overlap"),
        pytest.param(sparse_01(b"1024,512,0,512", 4096, 1024), id="backwards"),
        pytest.param(sparse_01(b"4000,512", 4096, 512), id="beyond the size"),
        pytest.param(sparse_01(b"0,1024", 4096, 512), id="more than is stored"),
        pytest.param(sparse_01(b"0", 4096, 512), id="half a piece"),
        pytest.param(sparse_01(b"0,-5", 4096, 512), id="negative"),
        pytest.param(sparse_01(b"0,1,,2", 4096, 512), id="empty number"),
        pytest.param(sparse_01(b"0,1e3", 4096, 512), id="no number"),
        pytest.param(sparse_01(b"0,%d" % (1 << 62), 1 << 63, 512), id="exabytes of data"),
        pytest.param(sparse_01(b"%d,0" % (1 << 62), 1 << 63, 0), id="exabytes of nothing"),
        pytest.param(sparse_01(b"9" * 5000 + b",0", 5, 0), id="a long number"),
        pytest.param(old_sparse([(0, 512)], 512, -(-1 << 34)) + bytes(512), id="16 GiB"),
        pytest.param(old_sparse([(0, 1 << 30)], 512, 1 << 31) + bytes(512), id="old: more than is stored"),
        pytest.param(old_sparse([(512, 512), (0, 512)], 1024, 4096) + bytes(1024), id="old: backwards"),
        pytest.param(old_sparse([], 0, 0, b"\1") + b"\1" * 512, id="old: no numbers"),
        pytest.param(old_sparse([], 0, 0, b"\1") + (bytes(504) + b"\1" + bytes(7)) * 3000, id="old: endless map"),
        pytest.param(sparse_10(b""), id="1.0: no map"),
        pytest.param(sparse_10(b"x\n"), id="1.0: no number"),
        pytest.param(sparse_10(b"1\n0\n"), id="1.0: half a map"),
        pytest.param(sparse_10(b"9" * 500_000), id="1.0: a long number"),
        pytest.param(sparse_10(b"%d\n" % 10**15 + b"0\n" * 2_000_000), id="1.0: endless map"),
        pytest.param(sparse_10(b"1\n0\n5\n".ljust(512, b"\0") + bytes(512), size=100), id="1.0: map beyond the data"),
        pytest.param(sparse_10(b"0\n".ljust(512, b"\0"), real=b"9" * 19), id="1.0: exabytes"),
        pytest.param(sparse_10(b"0\n".ljust(512, b"\0"), real=b"-1"), id="1.0: negative size"),
    ],
)
def test_sparse_maps_that_make_no_sense(tmp_path: Path, data: bytes) -> None:
    started = time.process_time()
    with pytest.raises(ArchiveError):
        convert(io.BytesIO(data), tmp_path, Limits(1 << 30))
    assert (tmp_path / "data").stat().st_blocks * 512 < 1 << 20
    assert time.process_time() - started < 3


def test_a_sparse_file_whose_map_is_good_is_taken(tmp_path: Path) -> None:
    """The files above are refused for what is wrong with them, and not for what is the same in all of them."""
    assert scan(sparse_01(b"1000,512", 4096, 512))[0][1] == bytes(4096)
    body = b"1\n10\n5\n".ljust(512, b"\0") + b"hello"
    assert scan(sparse_10(body))[0][1] == bytes(10) + b"hello" + bytes(85)
    data = old_sparse([(10, 5), (20, 5)], 10, 30) + padded(b"helloworld") + header(b"next") + END
    (entry, content), (following, _) = scan(data)
    assert (entry.size, content) == (30, bytes(10) + b"hello" + bytes(5) + b"world" + bytes(5))
    assert following.path == b"next"


# --- entries: bad archives


@pytest.mark.parametrize("name", ["../x", "a/../../x", "a/..", "..", "/../x", "a/../b", "./../x"])
@pytest.mark.parametrize("kind", [F, D, L, H, P])
def test_names_that_lead_out(name: str, kind: bytes) -> None:
    refused(tar(item(name, kind, target="t")), "leads out of the root")
    if kind == H:
        refused(tar(item("fine", kind, target=name)), "leads out of the root")


def test_absolute_names_are_relative_to_the_root() -> None:
    assert paths(tar(item("/etc/x"), item("//a//b/./c"), item("./d"), item("...", D))) == [
        b"etc/x",
        b"a/b/c",
        b"d",
        b"...",
    ]


def test_names_that_linux_does_not_take() -> None:
    refused(pax(pax_record(b"path", b"a\0b")) + header() + END, "name that Linux does not take")
    refused(pax(pax_record(b"linkpath", b"a\0b")) + header(kind=b"1") + END, "does not take")
    refused(pax(pax_record(b"linkpath", b"a\0b")) + header(kind=b"2") + END, "no target")
    refused(header(kind=b"2") + END, "no target")
    refused(tar(item("n" * 256)), "name that Linux does not take")
    refused(tar(item("d" * 256 + "/f")), "name that Linux does not take")
    refused(tar(item("a/" * 2048 + "x")), "longer than 4095")
    refused(tar(item("l", L, target="t" * 4096)), "no target")
    assert paths(tar(item("n" * 255), item("a/" * 2047 + "x"), item("l", L, target="t" * 4095)))


def test_no_file_at_the_root_itself() -> None:
    assert paths(tar(item("/"), item("./", L, target="x"), item("next"))) == [b"next"]


@pytest.mark.parametrize("owner", [b"4294967295", b"4294967296", b"99999999999999999999", b"-1", b"x", b"1.5"])
def test_owners_that_linux_does_not_take(owner: bytes) -> None:
    for key in (b"uid", b"gid"):
        refused(pax(pax_record(key, owner)) + header() + END)
    assert one(pax(pax_record(b"uid", b"4294967294")) + header() + END).uid == 4294967294


def test_devices_that_linux_does_not_take() -> None:
    assert one(header(kind=b"3", major=b"%o" % 4095, minor=b"%o" % 0xFFFFF) + END).device == (4095, 0xFFFFF)
    for major, minor in ((b"%o" % 4096, b"0"), (b"0", b"%o" % (1 << 20)), (b"\xff" * 8, b"0"), (b"0", b"\xff" * 8)):
        refused(header(kind=b"3", major=major, minor=minor) + END, "device")
    refused(header(kind=b"4", major=b"xyz") + END)
    assert paths(header(kind=b"0", major=b"xyz") + END) == [b"f"], "files have no device number"


@pytest.mark.parametrize(
    "size", [b"-1", b"9223372036854775808", b"99999999999999999999999", b"1e3", b"0x10", b"1_0", b" 1", b"\xd9\xa3"]
)
def test_sizes_that_are_none(size: bytes) -> None:
    refused(pax(pax_record(b"size", size)) + header() + bytes(512) + END)


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"\xff" + bytes(11), b"89", b"-1", b"0o7"])
@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"K", b"Z"])
def test_sizes_in_headers_that_are_none(size: bytes, kind: bytes) -> None:
    refused(header(kind=kind, size=size) + bytes(512) + header() + END)


def test_huge_headers() -> None:
    for kind in (b"x", b"g", b"L", b"K"):
        for size in (8 << 30, MAX_HEADER + 1):
            refused(header(kind=kind, size=size) + bytes(2 << 20), "header is larger")
    name = b"n" * 255
    assert paths(header(kind=b"L", size=MAX_HEADER - 2048) + name.ljust(MAX_HEADER - 2048, b"\0") + header()) == [name]


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_headers_of_headers_do_not_recurse(kind: bytes) -> None:
    record = pax_record(b"comment", b"x") if kind in b"xg" else b"name\0"
    refused((header(kind=kind, size=len(record)) + padded(record)) * 20_000 + header() + END, "header is larger")
    assert paths((header(kind=kind, size=len(record)) + padded(record)) * 900 + header(link=b"t") + END)


@pytest.mark.parametrize(
    "records",
    [
        pytest.param(b"1" * 1_000_000, id="digits"),
        pytest.param(b"3 x" * 330_000 + b"=\n", id="short records with a far ="),
        pytest.param(b"5 x=\n" * 200_000, id="many records"),
        pytest.param(b"".join(b"14 k%07d=v\n" % n for n in range(70_000)), id="many keys"),
        pytest.param(b"9" * 5000 + b" a=b\n", id="a long length"),
        pytest.param(b"0 a=b\n", id="no length"),
        pytest.param(b"-6 a=b\n", id="a negative length"),
        pytest.param(b"99 a=b\n", id="beyond the header"),
        pytest.param(b"6 a-b\n", id="no ="),
        pytest.param(b"6 a=bb", id="no newline"),
        pytest.param(b"GNU.sparse.offset=" * 50_000, id="sparse"),
    ],
)
def test_extended_headers_take_no_time_and_are_right_or_an_error(records: bytes) -> None:
    started = time.process_time()
    data = pax(records) + header() + END
    if records[:4] == b"5 x=" or records.startswith(b"14 k"):
        assert paths(data) == [b"f"]
    else:
        refused(data)
    assert time.process_time() - started < 2


def test_global_headers_do_not_pile_up() -> None:
    once = pax(b"".join(b"14 k%07d=v\n" % n for n in range(7000)), b"g") + header()
    started = time.process_time()
    assert len(paths(once * 100 + header() * 5000 + END)) == 5100
    assert time.process_time() - started < 5


def test_an_archive_that_ends_early_is_an_error_wherever_it_ends() -> None:
    parts = [header(b"a", size=700), padded(b"x" * 700), pax(pax_record(b"path", b"b")), header(), header(b"c")]
    data = b"".join(parts)
    good = {0: None, 512 + 1024: 1, 512 + 1024 + 1024 + 512: 2, len(data): 3}
    for end in sorted({*range(1, len(data), 64), *range(510, 515), *good, len(data) - 1, 512 + 700, 512 + 701} - {0}):
        if end in good:
            assert len(paths(data[:end])) == good[end]
        else:
            refused(data[:end])
    refused(b"")
    assert len(paths(data + bytes(512))) == 3


def test_a_damaged_header_is_not_the_end() -> None:
    data = bytearray(tar(item("a"), item("b"), item("c")))
    assert len(paths(bytes(data))) == 3
    for block in range(3):
        for place, value in ((0, 0xFF), (150, 0x20), (150, 0xFF), (148, 0x80)):
            damaged = bytearray(data)
            damaged[block * 512 + place] ^= value or 1
            refused(bytes(damaged))


@pytest.mark.parametrize(
    "data", [b"x", b"\0", b"<html>" + b"x" * 1000, bytes(511), b"PK\3\4" + bytes(600), b"\x7fELF" * 128]
)
def test_what_is_no_archive(data: bytes) -> None:
    refused(data)


def test_damage_of_the_compression_after_the_end_of_the_archive_counts() -> None:
    data = bytearray(gzip.compress(tar(item("a")) + bytes(100_000)))
    data[-6] ^= 1
    refused(bytes(data), "damaged")


class Endless(io.RawIOBase):
    """The same block for ever."""

    def __init__(self, block: bytes) -> None:
        self.block = block

    def read(self, size: int = -1) -> bytes:
        return self.block * max(1, size // len(self.block))


def test_an_endless_archive_ends_at_the_most_entries() -> None:
    stream = Stream(cast("BinaryIO", Endless(header())), 1 << 40)
    with pytest.raises(ArchiveError, match="more than 100000 entries"):
        for _ in entries(stream, Sink(), max_entries=100_000, whiteouts=True):
            pass


def test_names_and_attributes_together_have_a_limit() -> None:
    """A million entries with a name and a target of 4095 bytes would be 8 GB, of an archive of 30 MB."""
    records = pax_record(b"path", b"p/" * 2000 + b"x") + pax_record(b"linkpath", b"t" * 4000)
    records += pax_record(b"SCHILY.xattr.user.x", bytes(16000))
    stream = Stream(cast("BinaryIO", Endless(pax(records) + header(kind=b"2"))), 1 << 40)
    total = 0
    with pytest.raises(ArchiveError, match="names and attributes"):
        for entry in entries(stream, Sink(), max_entries=1_000_000, whiteouts=True):
            total += len(entry.path) + len(entry.target) + len(b"user.x") + 16000
    assert MAX_TEXT - 30_000 < total <= MAX_TEXT


def test_giving_up_within_an_archive() -> None:
    asked = iter([False] * 20 + [True])
    stream = Stream(cast("BinaryIO", Endless(header())), 1 << 40, lambda: next(asked))
    with pytest.raises(InterruptedError):
        for _ in entries(stream, Sink(), max_entries=1 << 40, whiteouts=True):
            pass


# --- fuzzing


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    place = tmp_path_factory.mktemp("corpus")
    sparse_file(place / "s", [(100_000, b"x" * 5000), (300_000, b"y")], 500_000)
    out = [tar(*KINDS, item("x" * 90 + "/" + "x" * 60, xattrs={b"user.a": b"b"}), form=form) for form in (0, 1, 2)]
    for form in ("gnu", "posix"):
        command: list[str | Path] = ["tar", "-S", f"--format={form}", "-C", place, "-cf", "-", "s"]
        out.append(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    out += [sparse_01(b"0,5,10,5", 100, 10), sparse_10(b"1\n10\n5\n".ljust(512, b"\0") + b"hello")]
    return out


def fixed(data: bytearray) -> bytearray:
    """The same with the checksums of its first blocks right: mutations reach more."""
    for at in range(0, min(len(data), 20 * 512) - 511, 512):
        block = data[at : at + 512]
        if block[257:262] == b"ustar":
            block[148:156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(block)
    return data


def mutations(data: bytes, chance: random.Random) -> Iterator[bytes]:
    for _ in range(500):
        out = bytearray(data)
        for _ in range(chance.choice([1, 2, 4, 10])):
            at = chance.randrange(min(len(out), 8192))
            match chance.randrange(5):
                case 0:
                    out[at] = chance.choice([0, 0xFF, 0x80, 0x20, 0x30, 0x37, chance.randrange(256)])
                case 1:
                    out[at : at + chance.randrange(1, 13)] = b""
                case 2:
                    out[at:at] = chance.choice([b"9" * 12, b"\xff" * 12, b"=", b"\n", bytes(512), b" "])
                case 3:
                    field = at // 512 * 512 + chance.choice([100, 108, 116, 124, 136, 156, 345, 386, 398, 482, 483])
                    value = chance.choice(
                        [b"77777777777\0", b"\xff" * 12, b"\x80" + b"\xff" * 11, bytes(12), b"S", b"x"]
                    )
                    out[field : field + len(value)] = value
                case _:
                    block, other = at // 512 * 512, chance.randrange(len(out)) // 512 * 512
                    out[block : block + 512] = out[other : other + 512]
        yield bytes(fixed(out) if chance.random() < 0.7 else out)


def test_mutations_end_soon_in_entries_or_an_archive_error(corpus: list[bytes], tmp_path: Path) -> None:
    chance = random.Random(20240229)
    outcomes = {"taken": 0, "refused": 0}
    number = 0
    for data in corpus:
        for mutation in mutations(data, chance):
            number += 1
            place = tmp_path / str(number)
            place.mkdir()
            started = time.process_time()
            try:
                convert(io.BytesIO(mutation), place, Limits(1 << 24, 1000))
                outcomes["taken"] += 1
            except ArchiveError:
                outcomes["refused"] += 1
            assert time.process_time() - started < 1, mutation
    assert min(outcomes.values()) > 100, outcomes


@pytest.mark.parametrize("name", COMPRESSORS)
def test_mutations_of_compressed_archives(corpus: list[bytes], name: str) -> None:
    chance = random.Random(name)
    data = COMPRESSORS[name](corpus[1])
    refusals = 0
    for _ in range(300):
        out = bytearray(data)
        for _ in range(chance.randrange(1, 5)):
            out[chance.randrange(len(out))] = chance.randrange(256)
        try:
            scan(bytes(out), limit=1 << 24)
        except ArchiveError:
            refusals += 1
    assert refusals > 50


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=1200))
def test_anything_as_records_of_an_extended_header(records: bytes) -> None:
    with contextlib.suppress(ArchiveError):
        scan(pax(records) + header() + END)


def test_memory_of_a_hostile_archive_is_bounded() -> None:
    """A header of the largest size, again and again: only the last one is held."""
    block = pax(pax_record(b"comment", bytes(MAX_HEADER - 4096))) + header()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(paths_of_endless(block, 200)) == 200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10


def paths_of_endless(block: bytes, count: int) -> list[bytes]:
    found = []
    with pytest.raises(ArchiveError):
        stream = Stream(cast("BinaryIO", Endless(block)), 1 << 40)
        for entry in entries(stream, Sink(), max_entries=count, whiteouts=True):
            found.append(entry.path)
    return found

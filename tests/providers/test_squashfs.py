"""`squashfs`, the provider of images that are mounted as they are."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.providers import web
from tests.providers.web import Handler, Site, later, sha256
from vmette.errors import ConfigError
from vmette.images import erofs
from vmette.images.prune import prune
from vmette.images.store import Store
from vmette.providers import (
    BlockFs,
    BlockImage,
    Context,
    InvalidSpec,
    NetworkError,
    OfflineCacheMiss,
    ProviderError,
    ProviderIOError,
)
from vmette.providers.squashfs import SquashfsProvider

PROVIDER = SquashfsProvider()
BOTH = pytest.mark.parametrize("fstype", list(BlockFs))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[BlockFs, bytes]:
    """One of each kind, of the real tools."""
    directory = tmp_path_factory.mktemp("images")
    (directory / "root/etc").mkdir(parents=True)
    (directory / "root/etc/motd").write_text("hello\n" * 10_000)
    commands = {
        BlockFs.SQUASHFS: ["mksquashfs", f"{directory}/root", f"{directory}/squashfs", "-quiet", "-no-progress"],
        BlockFs.EROFS: ["mkfs.erofs", f"{directory}/erofs", f"{directory}/root"],
    }
    for command in commands.values():
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is missing")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return {fstype: (directory / str(fstype)).read_bytes() for fstype in commands}


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web.hurry(monkeypatch)
    monkeypatch.delenv("VMETTE_SQUASHFS_MAX_BYTES", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(tmp_path / "cache")


def problem(spec: str, context: Context, kind: type[ProviderError] = InvalidSpec) -> str:
    with pytest.raises(kind) as caught:
        PROVIDER.provide(spec, context)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def provided(spec: str, context: Context) -> BlockImage:
    artifact = PROVIDER.provide(spec, context)
    assert isinstance(artifact, BlockImage)
    return artifact


def left_over(context: Context) -> list[Path]:
    """What of the cache is neither an image nor a note."""
    found = [path for path in context.cache_root.rglob("*") if path.is_file()]
    return [path for path in found if path.parent.name not in {"images", "refs"}]


def patched(data: bytes, offset: int, layout: str, *values: int) -> bytes:
    out = bytearray(data)
    struct.pack_into(f"<{layout}", out, offset, *values)
    return bytes(out)


def summed(data: bytes) -> bytes:
    """An EROFS image with the right checksum, as the kernel computes it."""
    block = 1 << data[1024 + 12]
    end = block if block > 1024 else 1024 + block
    zeroed = patched(data, 1028, "I", 0)
    return patched(data, 1028, "I", erofs.crc32c(zeroed[1024:end]))


# --- specs -----------------------------------------------------------------------------------------------------------


def test_its_name() -> None:
    assert PROVIDER.name == "squashfs"


@pytest.mark.parametrize("kind", ["squashfs", "erofs"])
@pytest.mark.parametrize("url", ["http://h/a", "https://h/a", "file:///a", "https://"])
def test_urls_are_claimed(kind: str, url: str) -> None:
    assert PROVIDER.matches(f"{kind}+{url}")


@pytest.mark.parametrize(
    ("spec", "claimed"),
    [
        *((f"./{name}", True) for name in ("a.squashfs", "a.sqfs", "a.erofs", "A.SQFS", "a.tar.squashfs", ".erofs")),
        *((f"./{name}", False) for name in ("a.squash", "squashfs", "a.squashfs.gz", "a.img")),
        *(
            (spec, False)
            for spec in ("a.squashfs", "./missing.squashfs", "./directory.sqfs", "./fifo.erofs", "./\0.sqfs")
        ),
        *((spec, False) for spec in ("", "squashfs+ftp://h/a", "erofs:", "squashfs", "erofs+", "http://h/a.sqfs")),
    ],
)
def test_existing_files_are_claimed_by_their_names(tmp_path: Path, spec: str, claimed: bool) -> None:
    for name in ("a.squashfs", "a.sqfs", "a.erofs", "A.SQFS", "a.tar.squashfs", ".erofs"):
        (tmp_path / name).touch()
    for name in ("a.squash", "squashfs", "a.squashfs.gz", "a.img"):
        (tmp_path / name).touch()
    (tmp_path / "directory.sqfs").mkdir()
    os.mkfifo(tmp_path / "fifo.erofs")
    assert PROVIDER.matches(spec) is claimed


@pytest.mark.parametrize("kind", ["directory", "fifo", "device", "missing"])
def test_what_is_no_regular_file_is_refused_and_does_not_hold_us(tmp_path: Path, context: Context, kind: str) -> None:
    path = tmp_path / "x"
    make: dict[str, Callable[[], object]] = {
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
    }
    make.get(kind, lambda: None)()
    assert str(path) in problem(f"squashfs+file://{path}", context)
    assert str(path) in problem(f"erofs+file://{path}#sha256={'0' * 64}", context)


@pytest.mark.parametrize(
    "spec",
    ["squashfs+http://a:b@h/", "erofs+file://host/a", "squashfs+http://h/a#x", "erofs+http://h/a#sha256=0", "a.sqfs"],
)
def test_malformed_specs(context: Context, spec: str) -> None:
    problem(spec, context)


@BOTH
def test_there_is_no_directory_of_it(
    tmp_path: Path, context: Context, images: dict[BlockFs, bytes], fstype: BlockFs
) -> None:
    (tmp_path / f"a.{fstype}").write_bytes(images[fstype])
    with pytest.raises(ConfigError, match=r"is an image, which vmette does not unpack: it cannot be a directory"):
        PROVIDER.provide(f"./a.{fstype}", replace(context, form="directory"))


# --- files -----------------------------------------------------------------------------------------------------------


@BOTH
def test_files_are_used_where_they_are(
    tmp_path: Path,
    context: Context,
    images: dict[BlockFs, bytes],
    fstype: BlockFs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / f"a b.{fstype}"
    path.write_bytes(images[fstype])
    offline = replace(context, offline=True, pull="never")
    assert PROVIDER.provide(f"./a b.{fstype}", offline) == BlockImage(Path(f"a b.{fstype}"), fstype)
    assert PROVIDER.provide(f"~/a b.{fstype}", offline) == BlockImage(path, fstype)
    assert PROVIDER.provide(f"{fstype}+file://{tmp_path}/a%20b.{fstype}", offline) == BlockImage(path, fstype)
    assert not context.cache_root.exists()


@BOTH
def test_the_other_kind_is_named(
    tmp_path: Path, context: Context, images: dict[BlockFs, bytes], fstype: BlockFs, site: Site
) -> None:
    (other,) = set(BlockFs) - {fstype}
    path = tmp_path / f"a b.{fstype}"
    path.write_bytes(images[other])
    site.answers["/a"] = web.file(images[other])
    for spec, its in (
        (f"./a b.{fstype}", f"{other}+file://{tmp_path}/a%20b.{fstype}"),
        (f"{fstype}+file://{tmp_path}/a%20b.{fstype}", f"{other}+file://{tmp_path}/a%20b.{fstype}"),
        (f"{fstype}+{site.url}/a?secret", f"{other}+{site.url}/a"),
    ):
        message = problem(spec, context)
        assert message.endswith(f" is no {fstype} image but one of {other}: its spec is {its}")
    assert left_over(context) == []
    assert provided(f"{other}+file://{tmp_path}/a%20b.{fstype}", context).path == path
    assert provided(f"{other}+{site.url}/a", context).path.read_bytes() == images[other]


@BOTH
def test_sha256_of_a_file(tmp_path: Path, context: Context, images: dict[BlockFs, bytes], fstype: BlockFs) -> None:
    path = tmp_path / "a"
    path.write_bytes(images[fstype])
    spec = f"{fstype}+file://{path}#sha256="
    assert provided(spec + sha256(images[fstype]), context).path == path
    message = problem(f"{spec}{'0' * 64}", context)
    assert f"sha256:{sha256(images[fstype])}" in message
    assert f"sha256:{'0' * 64}" in message


# --- superblocks -----------------------------------------------------------------------------------------------------

SQUASHFS_CHANGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "is no squashfs image"),
    "garbage": (lambda data: b"\x7fELF" + data[4:], "is no squashfs image"),
    "zeros": (lambda data: bytes(8192), "is no squashfs image"),
    "big-endian": (lambda data: b"sqsh" + data[4:], "is no squashfs image"),
    "only the magic": (lambda data: data[:4], "ends within its superblock"),
    "95 bytes": (lambda data: data[:95], "ends within its superblock"),
    "version 3.1": (lambda data: patched(data, 28, "HH", 3, 1), r"is squashfs 3\.1, and Linux mounts 4\.0"),
    "version 4.1": (lambda data: patched(data, 28, "HH", 4, 1), r"is squashfs 4\.1"),
    "small blocks": (lambda data: patched(data, 12, "I6xH", 2048, 11), "has blocks of 2048 bytes"),
    "large blocks": (lambda data: patched(data, 12, "I6xH", 1 << 21, 21), "has blocks of 2097152 bytes"),
    "odd blocks": (lambda data: patched(data, 12, "I", 131073), "has blocks of 131073 bytes"),
    "wrong log": (lambda data: patched(data, 22, "H", 0xFFFF), "has blocks of"),
    "no inodes": (lambda data: patched(data, 4, "I", 0), "has no inodes"),
    "lzma": (
        lambda data: patched(data, 20, "H", 2),
        "is compressed with lzma; the guest's kernel has gzip, lz4, xz, zstd",
    ),
    "unknown method": (lambda data: patched(data, 20, "H", 99), "is compressed with method 99"),
    "cut off": (lambda data: data[:200], r"is cut off: it has 200 of \d+ bytes"),
    "huge": (lambda data: patched(data, 40, "Q", (1 << 64) - 1), "is cut off"),
    "tiny": (lambda data: patched(data, 40, "Q", 95), "is damaged: it is smaller than its superblock"),
}

EROFS_CHANGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda data: b"", "is no erofs image"),
    "garbage": (lambda data: patched(data, 1024, "I", 1), "is no erofs image"),
    "only 1025 bytes": (lambda data: data[:1025], "is no erofs image"),
    "only the magic": (lambda data: data[:1028], "ends within its superblock"),
    "half a block": (lambda data: data[:2000], "ends within its superblock"),
    "a wrong checksum": (
        lambda data: patched(data, 1030, "B", data[1030] ^ 1),
        "the checksum of its superblock is wrong",
    ),
    "a changed block": (
        lambda data: patched(data, 1100, "B", data[1100] ^ 1),
        "the checksum of its superblock is wrong",
    ),
    "blocks of 8 bits": (lambda data: patched(data, 1036, "B", 8), r"is damaged: its blocks have 2\^8 bytes"),
    "blocks of 17 bits": (lambda data: patched(data, 1036, "B", 17), r"is damaged: its blocks have 2\^17 bytes"),
    "blocks of 16 KiB": (lambda data: patched(data, 1036, "B", 14), "has blocks of 16384 bytes"),
    "unknown features": (lambda data: summed(patched(data, 1104, "I", 0x100)), r"Linux 6\.12 does not know \(0x100\)"),
    "directory blocks": (lambda data: summed(patched(data, 1114, "B", 1)), "is of a form that Linux"),
    "a large superblock": (lambda data: patched(data, 1037, "B", 255), "is of a form that Linux"),
    "zstd": (
        lambda data: summed(patched(data, 1104, "IH", 2, 8)),
        "is compressed with zstd; the guest's kernel has lz4",
    ),
    "cut off": (lambda data: data[:4096], "is cut off: it has 4096 of"),
    "huge": (lambda data: summed(patched(data, 1060, "I", 0xFFFFFFFF)), "is cut off"),
}

CHANGES = [
    *((BlockFs.SQUASHFS, name) for name in SQUASHFS_CHANGES),
    *((BlockFs.EROFS, name) for name in EROFS_CHANGES),
]


@pytest.mark.parametrize(("fstype", "change"), CHANGES)
def test_images_that_the_guest_would_not_mount(
    tmp_path: Path, context: Context, images: dict[BlockFs, bytes], fstype: BlockFs, change: str, site: Site
) -> None:
    made, message = (SQUASHFS_CHANGES if fstype is BlockFs.SQUASHFS else EROFS_CHANGES)[change]
    data = made(images[fstype])
    assert data != images[fstype]
    path = tmp_path / f"a.{fstype}"
    path.write_bytes(data)
    site.answers["/a"] = web.file(data)
    for spec in (f"./a.{fstype}", f"{fstype}+file://{path}", f"{fstype}+{site.url}/a"):
        with pytest.raises(InvalidSpec, match=message):
            PROVIDER.provide(spec, context)
    assert left_over(context) == []
    assert list(context.cache_root.glob("squashfs/*/*")) == []


@pytest.mark.parametrize("compression", ["gzip", "xz", "lz4", "zstd"])
def test_what_the_guest_can_decompress(tmp_path: Path, context: Context, compression: str) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/a").write_text("a" * 100_000)
    command = ["mksquashfs", "root", "a.sqfs", "-comp", compression, "-quiet", "-no-progress"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    provided("./a.sqfs", context)


@pytest.mark.parametrize(
    "options", [["-zlz4"], ["-zlz4hc", "-C65536"], ["-Eztailpacking", "-zlz4"], ["--chunksize=4096"]]
)
def test_erofs_of_several_kinds(tmp_path: Path, context: Context, options: list[str]) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/a").write_text("a" * 100_000)
    subprocess.run(["mkfs.erofs", *options, "a.erofs", "root"], check=True, capture_output=True)
    provided("./a.erofs", context)


def test_an_image_of_our_own(tmp_path: Path, context: Context) -> None:
    from vmette.images.tree import Tree

    with (tmp_path / "a.erofs").open("xb") as file:
        erofs.write(Tree(10), [], file, bytes(16))
    provided("./a.erofs", context)


def test_small_blocks_of_erofs(tmp_path: Path, context: Context, images: dict[BlockFs, bytes]) -> None:
    """The checksum goes over other bytes then."""
    for bits in (9, 10, 11):
        data = summed(patched(images[BlockFs.EROFS], 1036, "B", bits))
        (tmp_path / "a.erofs").write_bytes(data)
        provided("./a.erofs", context)


# --- URLs ------------------------------------------------------------------------------------------------------------


@BOTH
def test_an_image_of_a_server(site: Site, context: Context, images: dict[BlockFs, bytes], fstype: BlockFs) -> None:
    site.answers["/a"] = web.file(images[fstype])
    for _ in range(3):
        image = provided(f"{fstype}+{site.url}/a", context)
        assert image.fstype is fstype
        assert image.path.read_bytes() == images[fstype]
        assert image.path.is_relative_to(context.cache_root / "store")
    assert len(site.requests) == 1
    assert left_over(context) == []


def test_it_goes_on_after_a_reset(site: Site, context: Context, images: dict[BlockFs, bytes]) -> None:
    data = images[BlockFs.EROFS]
    site.answers["/a"] = web.file(data, cuts=[5000])
    assert provided(f"erofs+{site.url}/a", context).path.read_bytes() == data
    assert site.requests[1][1]["Range"] == "bytes=5000-"


def test_the_same_rules_as_for_archives(
    site: Site, context: Context, images: dict[BlockFs, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = images[BlockFs.EROFS], images[BlockFs.EROFS] + bytes(4096)
    spec = f"erofs+{site.url}/a"
    offline, never = replace(context, offline=True), replace(context, pull="never")
    assert problem(f"{spec}?secret", offline, OfflineCacheMiss) == f"offline mode: {spec} not in cache"
    assert "--pull never" in problem(spec, never)
    site.answers["/a"] = web.file(one)
    first = provided(spec, context)
    later(monkeypatch, 4000)
    assert provided(spec, context) == first
    assert [headers["If-None-Match"] for _, headers in site.requests] == [None, web.etag(one)]
    site.answers["/a"] = web.file(two)
    assert provided(spec, never) == provided(spec, offline) == provided(spec, context) == first
    second = provided(spec, replace(context, pull="always"))
    assert second.path.read_bytes() == two
    assert first.path.read_bytes() == one  # a VM may have it mounted
    site.answers["/a"] = web.status(503)
    later(monkeypatch, 10_000)
    assert provided(spec, context) == second
    problem(spec, replace(context, pull="always"), NetworkError)
    site.answers["/a"] = web.status(404)  # an answer, and not what we had
    problem(spec, context, NetworkError)


def test_a_pinned_image(
    site: Site, context: Context, images: dict[BlockFs, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = images[BlockFs.SQUASHFS]
    spec = f"squashfs+{site.url}/a#sha256={sha256(data)}"
    site.answers["/a"] = web.file(data + b"x")
    message = problem(spec, context)
    assert f"sha256:{sha256(data)}" in message
    assert f"sha256:{sha256(data + b'x')}" in message
    assert list(context.cache_root.glob("squashfs/*/*")) == []
    site.answers["/a"] = web.file(data)
    image = provided(spec, context)
    later(monkeypatch, 1e6)
    site.requests.clear()
    for how in ({}, {"pull": "always"}, {"pull": "never"}, {"offline": True}):
        assert provided(spec, replace(context, **how)) == image
    assert site.requests == []


def test_urls_do_not_share_an_image(site: Site, context: Context, images: dict[BlockFs, bytes]) -> None:
    data = images[BlockFs.EROFS]
    for number in range(3):
        site.answers[f"/{number}"] = web.file(data + bytes(number))
        site.answers[f"/{'x' * 300}/{number}"] = web.file(data + bytes(number + 10))
    for _ in range(2):
        for number in range(3):
            assert provided(f"erofs+{site.url}/{number}", context).path.read_bytes() == data + bytes(number)
            long = f"erofs+{site.url}/{'x' * 300}/{number}"
            assert provided(long, context).path.read_bytes() == data + bytes(number + 10)
    assert len(site.requests) == 6


@pytest.mark.parametrize("damage", ["cut", "longer", "garbage", "gone", "directory"])
def test_a_cached_image_that_is_damaged(
    site: Site, context: Context, images: dict[BlockFs, bytes], damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    data = images[BlockFs.EROFS]
    site.answers["/a"] = web.file(data)
    spec = f"erofs+{site.url}/a"
    path = provided(spec, context).path
    if damage == "garbage":
        path.write_bytes(bytes(len(data)))
    elif damage in {"gone", "directory"}:
        path.unlink()
        if damage == "directory":
            path.mkdir()
    else:
        path.write_bytes(data[:-1] if damage == "cut" else data + b"x")
    problem(spec, replace(context, offline=True), OfflineCacheMiss)
    assert provided(spec, context) == BlockImage(path, BlockFs.EROFS)
    assert path.read_bytes() == data
    assert site.requests[1][1]["If-None-Match"] is None
    assert ("damaged" in caplog.text) is (damage != "gone")


def test_the_size_is_limited(
    site: Site, context: Context, images: dict[BlockFs, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = images[BlockFs.EROFS]
    monkeypatch.setenv("VMETTE_SQUASHFS_MAX_BYTES", str(len(data)))
    site.answers["/a"], site.answers["/b"], site.answers["/c"] = web.file(data), web.file(data + b"x"), web.endless
    provided(f"erofs+{site.url}/a", context)
    for name in ("b", "c"):
        assert f"more than {len(data)} bytes" in problem(f"erofs+{site.url}/{name}", context, NetworkError)
    assert left_over(context) == []
    monkeypatch.setenv("VMETTE_SQUASHFS_MAX_BYTES", "-1")
    with pytest.raises(ConfigError, match="VMETTE_SQUASHFS_MAX_BYTES"):
        PROVIDER.provide(f"erofs+{site.url}/a", context)


CHILD = """
import sys
from pathlib import Path
from vmette.providers.base import Context
from vmette.providers.squashfs import SquashfsProvider
print(SquashfsProvider().provide(sys.argv[1], Context(Path(sys.argv[2]))).path)
"""


def child(spec: str, context: Context) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, spec, str(context.cache_root)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def test_two_processes_fetch_it_once(site: Site, context: Context, images: dict[BlockFs, bytes]) -> None:
    data = images[BlockFs.EROFS]

    def slowly(handler: Handler) -> None:
        handler.head(200, Content_Length=len(data))
        handler.body(data[:100])
        time.sleep(1)
        handler.body(data[100:])

    site.answers["/a"] = slowly
    children = [child(f"erofs+{site.url}/a", context) for _ in range(2)]
    assert len({process.communicate(timeout=60)[0] for process in children}) == 1
    assert [process.returncode for process in children] == [0, 0]
    assert len(site.requests) == 1


def test_a_process_that_is_killed(site: Site, context: Context, images: dict[BlockFs, bytes]) -> None:
    data = images[BlockFs.EROFS]

    def stalls(handler: Handler) -> None:
        handler.head(200, Content_Length=len(data), ETag=web.etag(data))
        handler.body(data[:-1])
        handler.server.stopping.wait(60)

    site.answers["/a"] = web.sequence(stalls, web.file(data))
    spec = f"erofs+{site.url}/a"
    with child(spec, context) as process:
        end = time.monotonic() + 30
        while not any(path.stat().st_size for path in context.cache_root.glob("store/staging/*")):
            assert time.monotonic() < end
            time.sleep(0.02)
        process.kill()
    problem(spec, replace(context, offline=True), OfflineCacheMiss)
    assert provided(spec, context).path.read_bytes() == data


def test_images_are_cleared_like_those_of_the_store(
    site: Site, context: Context, images: dict[BlockFs, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vmette.images.prune.GRACE_SECONDS", -1)
    site.answers["/a"] = web.file(images[BlockFs.EROFS])
    path = provided(f"erofs+{site.url}/a", context).path
    (item,) = prune(Store(context.cache_root / "store"))
    assert item.path == path
    assert provided(f"erofs+{site.url}/a", context).path == path
    assert len(site.requests) == 2


def test_a_cache_that_cannot_be_written(site: Site, context: Context, images: dict[BlockFs, bytes]) -> None:
    site.answers["/a"] = web.file(images[BlockFs.EROFS])
    context.provider_cache("store")
    (context.cache_root / "store/images").write_text("a file")
    problem(f"erofs+{site.url}/a", context, ProviderIOError)


def test_nothing_is_imported_for_what_is_not_asked(tmp_path: Path) -> None:
    code = "import sys, vmette.providers.tar, vmette.providers.squashfs; print('requests' in sys.modules)"
    output: Any = subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    assert output == b"False\n"

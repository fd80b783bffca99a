"""`tar`, the provider of archives: what is promised of the cache, of the network and of hostile archives."""

from __future__ import annotations

import gzip
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.providers import web
from tests.providers.web import Handler, Site, later, sha256
from vmette.errors import ConfigError
from vmette.images.store import Store
from vmette.providers import (
    Artifact,
    BlockFs,
    BlockImage,
    Context,
    Directory,
    InvalidSpec,
    NetworkError,
    OfflineCacheMiss,
    ProviderError,
    ProviderIOError,
    remote,
    tar,
)
from vmette.providers.base import Cancelled, Progress
from vmette.providers.tar import TarProvider

PROVIDER = TarProvider()


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    web.hurry(monkeypatch)
    monkeypatch.setattr(remote, "SETTLED_NS", 0)
    monkeypatch.delenv("VMETTE_TAR_MAX_BYTES", raising=False)
    monkeypatch.delenv("VMETTE_CACHE_MAX_BYTES", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(tmp_path / "cache", form="directory")


def archive(text: str = "hello", *, mode: str = "w", name: str = "etc/motd") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as file:  # type: ignore[call-overload]
        info = tarfile.TarInfo(name)
        info.size = len(text)
        file.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def motd(artifact: Artifact) -> str:
    assert isinstance(artifact, Directory)
    return (artifact.path / "etc/motd").read_text()


def problem(spec: str, context: Context, kind: type[ProviderError] = InvalidSpec) -> str:
    with pytest.raises(kind) as caught:
        PROVIDER.provide(spec, context)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def left_over(context: Context) -> list[str]:
    """What of the caches is neither an entry nor a note."""
    found = [path for path in context.cache_root.rglob("*") if path.is_file()]
    kinds = {"layers", "images", "directories", "refs"}
    return [str(path) for path in found if path.relative_to(context.cache_root).parts[1] not in kinds]


# --- specs -----------------------------------------------------------------------------------------------------------


def test_its_name() -> None:
    assert PROVIDER.name == "tar"


@pytest.mark.parametrize("spec", ["tar+http://h/a", "tar+https://h/a", "tar+file:///a", "tar+https://", "tar+file://x"])
def test_urls_are_claimed(spec: str) -> None:
    assert PROVIDER.matches(spec)


@pytest.mark.parametrize(
    "spec",
    [
        *("", "tar", "tar+", "tar+ftp://h/a", "http://h/a.tar", "tar:a", "TAR+HTTP://h/a", "x.tar", "oci://x.tar"),
        *("./missing.tar", "./\0.tar", "./\udcff\ud800.tar", f"./{'x' * 5000}.tar", "~x.tar", "../missing.tgz"),
    ],
)
def test_other_specs_are_not_claimed(tmp_path: Path, spec: str) -> None:
    (tmp_path / "x.tar").touch()
    assert not PROVIDER.matches(spec)
    if not spec.startswith("tar+ftp"):
        problem(spec, Context(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("name", "claimed"),
    [
        *(
            (name, True)
            for name in ("a.tar", "a.tar.gz", "a.tar.zst", "a.tgz", "a.txz", "a.tbz2", "a.tzst", "A.TAR.GZ")
        ),
        *((name, True) for name in ("a.tar.old", "a b.tar", "a.tar.2024-01-01.gz", "a#b.tar")),
        *((name, False) for name in ("a.gz", "tar", "atar", "a.tarx", "tgz", "a.zip", "a.tgz.d", "a.squashfs")),
    ],
)
def test_existing_files_are_claimed_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, claimed: bool
) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / name).write_bytes(archive())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "sub")
    for start in (f"{tmp_path}/", "../", "./../", "~/"):
        assert PROVIDER.matches(start + name) is claimed
    assert not PROVIDER.matches(name)
    monkeypatch.delenv("HOME")
    assert not PROVIDER.matches(f"~/{name}")


def test_what_is_no_regular_file_is_not_claimed(tmp_path: Path) -> None:
    (tmp_path / "d.tar").mkdir()
    os.mkfifo(tmp_path / "f.tar")
    (tmp_path / "l.tar").symlink_to("loop.tar")
    (tmp_path / "loop.tar").symlink_to("l.tar")
    (tmp_path / "null.tar").symlink_to("/dev/null")
    for name in ("d", "f", "l", "null"):
        assert not PROVIDER.matches(f"./{name}.tar")


@pytest.mark.parametrize("kind", ["directory", "fifo", "device", "missing", "loop", "file"])
def test_what_is_no_regular_file_is_refused_and_does_not_hold_us(tmp_path: Path, context: Context, kind: str) -> None:
    path = tmp_path / "x"
    make: dict[str, Callable[[], object]] = {
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path),
        "file": path.touch,
    }
    make.get(kind, lambda: None)()
    if kind == "file":
        path = path / "y"
    assert str(path) in problem(f"tar+file://{path}", context)


@pytest.mark.parametrize(
    "spec",
    [
        *("tar+http://", "tar+https:///a", "tar+http://user:secret@h/a", "tar+http://h/a b", "tar+http://h:x/"),
        *("tar+file://", "tar+file://host/a", "tar+file://etc/passwd", "tar+file:///a%00", "tar+file:///a%zz"),
        *("tar+file:///a?secret", "tar+http://h/a?secret#x"),
        *(
            "tar+http://h/a#",
            "tar+http://h/a#sha256=",
            "tar+http://h/a#sha256=xyz",
            f"tar+http://h/a#sha256={'0' * 63}",
        ),
        *(f"tar+http://h/a#sha256={'0' * 65}", f"tar+http://h/a#sha512={'0' * 128}", f"tar+http://h/a#{'0' * 64}"),
        *(
            f"tar+http://h/a#sha256={'g' * 64}",
            f"tar+file:///a#sha256={'0' * 64}#",
            f"tar+http://h/a#SHA256={'0' * 64}",
        ),
    ],
)
def test_malformed_specs(context: Context, spec: str) -> None:
    assert "secret" not in problem(spec, context)
    assert left_over(context) == []


# --- files -----------------------------------------------------------------------------------------------------------

COMPRESSORS = {"tar": "", "tar.gz": "-z", "tar.bz2": "-j", "tar.xz": "-J", "tar.zst": "--zstd"}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_archives_of_the_real_tar(tmp_path: Path, context: Context, suffix: str) -> None:
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/motd").write_text(suffix)
    (root / ".wh.ordinary").write_text("no whiteout")
    (root / "link").symlink_to("/etc/motd")
    (root / "hard").hardlink_to(root / "etc/motd")
    options = [COMPRESSORS[suffix]] if COMPRESSORS[suffix] else []
    path = tmp_path / f"image.{suffix}"
    subprocess.run(["tar", "-c", *options, "-f", path, "-C", root, "."], check=True)
    artifact = PROVIDER.provide(f"./image.{suffix}", context)
    assert motd(artifact) == suffix
    assert isinstance(artifact, Directory)
    assert (artifact.path / ".wh.ordinary").read_text() == "no whiteout"
    assert (artifact.path / "link").readlink() == Path("/etc/motd")
    assert (artifact.path / "hard").samefile(artifact.path / "etc/motd")
    assert left_over(context) == []
    shutil.copy(path, tmp_path / "nameless")
    assert PROVIDER.provide(f"tar+file://{tmp_path}/nameless", context) == artifact


def test_a_block_image_is_what_there_is_by_default(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(archive())
    artifact = PROVIDER.provide("./a.tar", Context(tmp_path / "cache"))
    assert isinstance(artifact, BlockImage)
    assert artifact.fstype is BlockFs.EROFS
    if shutil.which("fsck.erofs"):
        subprocess.run(["fsck.erofs", artifact.path], check=True)


def test_percent_escapes(tmp_path: Path, context: Context) -> None:
    (tmp_path / "a b#c%.tar").write_bytes(archive())
    assert motd(PROVIDER.provide(f"tar+file://localhost{tmp_path}/a%20b%23c%25.tar", context)) == "hello"
    assert motd(PROVIDER.provide("./a b#c%.tar", context)) == "hello"


def test_home_is_expanded(tmp_path: Path, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home/a.tar").write_bytes(archive())
    assert motd(PROVIDER.provide("~/a.tar", context)) == "hello"


@pytest.mark.parametrize("context_of", [{}, {"offline": True}, {"pull": "never"}, {"pull": "always"}])
def test_a_file_needs_no_network(tmp_path: Path, context: Context, context_of: dict[str, Any]) -> None:
    (tmp_path / "a.tar").write_bytes(archive())
    assert motd(PROVIDER.provide("./a.tar", replace(context, **context_of))) == "hello"


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of which files the digest is computed from now on."""
    seen: list[str] = []
    real = remote.hashed

    def hashed(file: Any, cancelled: Callable[[], bool]) -> str:
        seen.append(file.name)
        return real(file, cancelled)

    monkeypatch.setattr(remote, "hashed", hashed)
    return seen


def test_a_file_is_read_again_only_if_it_has_changed(
    tmp_path: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.tar"
    spec = f"tar+file://{path}"
    path.write_bytes(archive("1"))
    seen = reads(monkeypatch)
    assert motd(PROVIDER.provide(spec, context)) == "1"
    assert len(seen) == 1
    assert motd(PROVIDER.provide(spec, context)) == "1"
    assert motd(PROVIDER.provide("./a.tar", context)) == "1"
    assert len(seen) == 1
    status = path.stat()
    path.write_bytes(archive("2"))  # the same size and, then, time of change
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert motd(PROVIDER.provide(spec, context)) == "2"
    other = tmp_path / "other"
    other.write_bytes(archive("3"))
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    other.replace(path)
    assert motd(PROVIDER.provide(spec, context)) == "3"
    assert len(seen) == 3


def test_a_file_that_has_just_changed_may_change_again(
    tmp_path: Path, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two changes may have the same time: the clock of file systems goes in steps."""
    monkeypatch.setattr(remote, "SETTLED_NS", 10**10)
    (tmp_path / "a.tar").write_bytes(archive())
    seen = reads(monkeypatch)
    for _ in range(2):
        PROVIDER.provide("./a.tar", context)
    assert len(seen) == 2


@pytest.mark.parametrize("note", [b"", b"[]", b"{}", b"\xff", b'{"path": 1}', b"[" * 100_000, b"null"])
def test_notes_that_are_damaged_are_ignored(tmp_path: Path, context: Context, note: bytes, site: Site) -> None:
    (tmp_path / "a.tar").write_bytes(archive())
    site.answers["/a"] = web.file(archive())
    for spec in ("./a.tar", f"tar+{site.url}/a"):
        PROVIDER.provide(spec, context)
        notes = list((context.cache_root / "tar/refs").iterdir())
        assert notes
        for path in notes:
            path.write_bytes(note)
        assert motd(PROVIDER.provide(spec, context)) == "hello"


def test_notes_are_private(site: Site, context: Context) -> None:
    site.answers["/a"] = web.file(archive())
    PROVIDER.provide(f"tar+{site.url}/a?token=secret", context)
    for path in (context.cache_root / "tar").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("how", ["rewritten", "longer", "touched", "rewritten with its time", "cut"])
def test_a_file_that_changes_while_it_is_read(
    tmp_path: Path, context: Context, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(archive("1"))
    real = remote.hashed

    def hashed(file: Any, cancelled: Callable[[], bool]) -> str:
        digest = real(file, cancelled)
        status = path.stat()
        with path.open("r+b") as changed:
            if how == "touched":
                os.utime(path, ns=(0, 0))
            elif how == "longer":
                changed.seek(0, os.SEEK_END)
                changed.write(bytes(512))
            elif how == "cut":
                changed.truncate(600)
            else:
                changed.write(archive("2"))
        if how == "rewritten with its time":
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        return digest

    monkeypatch.setattr(remote, "hashed", hashed)
    assert problem("./a.tar", context, ProviderIOError).endswith(" has changed while it was read")
    assert left_over(context) == []
    assert list((context.cache_root / "store/layers").iterdir()) == []
    monkeypatch.setattr(remote, "hashed", real)
    if how != "cut":
        assert motd(PROVIDER.provide("./a.tar", context)) == ("2" if "rewritten" in how else "1")


def test_a_damaged_file_is_not_said_to_have_changed(tmp_path: Path, context: Context) -> None:
    (tmp_path / "a.tgz").write_bytes(gzip.compress(archive())[:-20])
    assert "changed" not in problem("./a.tgz", context, ProviderIOError)


def test_sha256_of_a_file(tmp_path: Path, context: Context) -> None:
    data = archive()
    (tmp_path / "a").write_bytes(data)
    spec = f"tar+file://{tmp_path}/a#sha256="
    for _ in range(2):
        assert motd(PROVIDER.provide(spec + sha256(data).upper(), context)) == "hello"
        message = problem(f"{spec}{'0' * 64}", context)
        assert f"sha256:{sha256(data)}" in message
        assert f"sha256:{'0' * 64}" in message


# --- hostile archives ------------------------------------------------------------------------------------------------


def hostile() -> dict[str, bytes]:
    deep = io.BytesIO()
    with tarfile.open(fileobj=deep, mode="w") as file:
        link = tarfile.TarInfo("x")
        link.type, link.linkname = tarfile.SYMTYPE, "/tmp"
        file.addfile(link)
        hard = tarfile.TarInfo("y")
        hard.type, hard.linkname = tarfile.LNKTYPE, "../../etc/passwd"
        file.addfile(hard)
    return {
        "up": archive(name="../x"),
        "far up": archive(name="a/../../x"),
        "hard link": deep.getvalue(),
        "garbage": os.urandom(5000),
        "no archive": b"<html>Not here</html>" * 100,
        "cut": archive()[:700],
        "cut gzip": gzip.compress(archive("x" * 100_000))[:-100],
    }


@pytest.mark.parametrize("kind", hostile())
def test_hostile_archives_leave_nothing(tmp_path: Path, context: Context, site: Site, kind: str) -> None:
    data = hostile()[kind]
    (tmp_path / "a.tar").write_bytes(data)
    site.answers["/a"] = web.file(data)
    before = sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)
    for spec in ("./a.tar", f"tar+{site.url}/a"):
        problem(spec, context, ProviderIOError)
        assert left_over(context) == []
        for name in ("layers", "images", "directories"):
            assert list(context.cache_root.glob(f"store/{name}/*")) == []
    assert sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts) == before
    problem(f"tar+{site.url}/a", replace(context, offline=True), OfflineCacheMiss)


def test_an_archive_that_was_good_once_is_not_taken_for_the_hostile_one(
    context: Context, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = f"tar+{site.url}/a"
    site.answers["/a"] = web.file(archive("good"))
    PROVIDER.provide(spec, context)
    site.answers["/a"] = web.file(archive(name="../x"))
    later(monkeypatch, 3601)
    problem(spec, context, ProviderIOError)
    assert motd(PROVIDER.provide(spec, replace(context, offline=True))) == "good"


@pytest.mark.parametrize("where", ["file", "url"])
def test_a_bomb_is_stopped_early(
    tmp_path: Path, context: Context, site: Site, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setenv("VMETTE_TAR_MAX_BYTES", str(1 << 20))
    start = archive("x" * 512)[:1024]
    entry = tarfile.TarInfo("bomb")
    entry.size = 1 << 33
    bomb = gzip.compress(start + entry.tobuf()) + gzip.compress(bytes(64 << 20)) * 16
    assert len(bomb) < 1.2e6
    if where == "file":
        (tmp_path / "a.tgz").write_bytes(bomb)
    site.answers["/a"] = web.file(bomb[: 1 << 20])
    spec = "./a.tgz" if where == "file" else f"tar+{site.url}/a"
    before = time.monotonic()
    message = problem(spec, context, ProviderIOError)
    assert f"it holds more than {1 << 20} bytes" in message
    assert time.monotonic() - before < 3
    assert left_over(context) == []


def test_a_download_beyond_the_limit(context: Context, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMETTE_TAR_MAX_BYTES", str(1 << 20))
    site.answers["/a"] = web.endless
    assert f"more than {1 << 20} bytes (VMETTE_TAR_MAX_BYTES)" in problem(f"tar+{site.url}/a", context, NetworkError)
    assert left_over(context) == []
    monkeypatch.setenv("VMETTE_TAR_MAX_BYTES", "many")
    with pytest.raises(ConfigError, match="VMETTE_TAR_MAX_BYTES"):
        PROVIDER.provide(f"tar+{site.url}/a", context)


# --- URLs ------------------------------------------------------------------------------------------------------------


def test_an_archive_of_a_server(site: Site, context: Context) -> None:
    data = archive(mode="w:gz")
    site.answers["/a"] = web.file(data)
    told: list[Progress] = []
    spec = f"tar+{site.url}/a"
    assert motd(PROVIDER.provide(spec, replace(context, progress=told.append))) == "hello"
    assert [progress.state for progress in told if progress.state != "downloading"] == ["unpacking", "ready"]
    assert told[0].total == len(data)
    assert {progress.part for progress in told} == {"a"}
    for _ in range(3):
        assert motd(PROVIDER.provide(spec, context)) == "hello"
    assert len(site.requests) == 1
    assert left_over(context) == []


def test_after_an_hour_the_server_is_asked_whether_it_has_changed(
    site: Site, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = f"tar+{site.url}/a"
    site.answers["/a"] = web.file(archive("1"))
    PROVIDER.provide(spec, context)
    later(monkeypatch, 3599)
    PROVIDER.provide(spec, context)
    assert len(site.requests) == 1
    later(monkeypatch, 3601)
    assert motd(PROVIDER.provide(spec, context)) == "1"
    assert site.requests[1][1]["If-None-Match"] == web.etag(archive("1"))
    PROVIDER.provide(spec, context)
    assert len(site.requests) == 2  # the answer is good for another hour
    site.answers["/a"] = web.file(archive("2"))
    later(monkeypatch, 7203)
    assert motd(PROVIDER.provide(spec, context)) == "2"
    later(monkeypatch, 0)  # a clock that was set back: the note is of the future
    PROVIDER.provide(spec, context)
    assert len(site.requests) == 4


def test_last_modified_does_as_well(site: Site, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    date = "Tue, 01 Jan 2030 00:00:00 GMT"

    def answer(handler: Handler) -> None:
        if handler.headers.get("If-Modified-Since") == date:
            handler.head(304)
        else:
            handler.head(200, Content_Length=len(archive()), Last_Modified=date)
            handler.body(archive())

    site.answers["/a"] = answer
    for seconds in (0, 4000, 8000):
        later(monkeypatch, seconds)
        assert motd(PROVIDER.provide(f"tar+{site.url}/a", context)) == "hello"
    assert [headers["If-Modified-Since"] for _, headers in site.requests] == [None, date, date]


def test_without_any_of_them_it_is_fetched_again(site: Site, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    site.answers["/a"] = web.sequence(web.file(archive("1"), tag=""), web.file(archive("2"), tag=""))
    assert motd(PROVIDER.provide(f"tar+{site.url}/a", context)) == "1"
    later(monkeypatch, 4000)
    assert motd(PROVIDER.provide(f"tar+{site.url}/a", context)) == "2"


def test_not_modified_says_nothing_about_what_the_cache_has_lost(
    site: Site, context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = f"tar+{site.url}/a"
    site.answers["/a"] = web.file(archive())
    PROVIDER.provide(spec, context)
    shutil.rmtree(context.cache_root / "store")
    problem(spec, replace(context, offline=True), OfflineCacheMiss)
    assert motd(PROVIDER.provide(spec, context)) == "hello"
    assert site.requests[1][1]["If-None-Match"] is None


def test_always(site: Site, context: Context) -> None:
    always = replace(context, pull="always")
    spec = f"tar+{site.url}/a"
    site.answers["/a"] = web.file(archive("1"))
    for _ in range(2):
        assert motd(PROVIDER.provide(spec, always)) == "1"
    assert [headers["If-None-Match"] for _, headers in site.requests] == [None, web.etag(archive("1"))]
    site.answers["/a"] = web.status(500)
    assert "500" in problem(spec, always, NetworkError)
    assert motd(PROVIDER.provide(spec, context)) == "1"


def test_offline_and_never(site: Site, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    offline, never = replace(context, offline=True), replace(context, pull="never")
    spec = f"tar+{site.url}/a"
    assert problem(f"{spec}?secret", offline, OfflineCacheMiss) == f"offline mode: {spec} not in cache"
    message = f"invalid spec: {spec} is not in the cache, and it may not be pulled (--pull never)"
    assert problem(f"{spec}?secret", never) == message
    assert site.requests == []
    site.answers["/a"] = web.file(archive())
    PROVIDER.provide(spec, context)
    later(monkeypatch, 1e9)
    for how in (offline, never):
        assert motd(PROVIDER.provide(spec, how)) == "hello"
    assert len(site.requests) == 1


def test_a_server_that_is_gone(
    context: Context, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    with web.site() as site:
        site.answers["/a"] = web.file(archive())
        spec = f"tar+{site.url}/a"
        PROVIDER.provide(spec, context)
    later(monkeypatch, 4000)
    assert motd(PROVIDER.provide(spec, context)) == "hello"
    (record,) = caplog.records
    assert record.getMessage().startswith(f"network: {spec.removeprefix('tar+')}: ")
    assert record.getMessage().endswith("; using the cached copy")
    problem(spec, replace(context, pull="always"), NetworkError)


def test_urls_do_not_share_what_is_known_of_them(site: Site, context: Context) -> None:
    for name in ("a", "b"):
        site.answers[f"/{name}"] = web.file(archive(name))
    for name in ("a", "b", "a?b", "b?a", "a?b=1"):
        assert motd(PROVIDER.provide(f"tar+{site.url}/{name}", context)) == name[0]
    assert len(site.requests) == 5
    notes = sorted((context.cache_root / "tar/refs").iterdir())
    shutil.copy(notes[0], notes[1])  # as if their names were the same
    for name in ("a", "b", "a?b", "b?a", "a?b=1"):
        assert motd(PROVIDER.provide(f"tar+{site.url}/{name}", context)) == name[0]
    assert len(site.requests) == 6


@pytest.mark.parametrize("digest", ["../../../etc", "sha256:../x", "sha256:" + "0" * 63, 1, None, ""])
def test_a_note_with_a_bad_digest_leads_nowhere(site: Site, context: Context, digest: object) -> None:
    site.answers["/a"] = web.file(archive())
    spec = f"tar+{site.url}/a"
    PROVIDER.provide(spec, context)
    (note,) = (context.cache_root / "tar/refs").iterdir()
    note.write_text(json.dumps({**json.loads(note.read_text()), "digest": digest}))
    assert remote.Known.read(note, f"{site.url}/a") is None
    assert motd(PROVIDER.provide(spec, context)) == "hello"
    assert len(site.requests) == 2


# --- sha256 ----------------------------------------------------------------------------------------------------------


def test_a_pinned_archive_is_asked_for_once(site: Site, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    data = archive()
    spec = f"tar+{site.url}/a#sha256={sha256(data)}"
    problem(spec, replace(context, offline=True), OfflineCacheMiss)
    site.answers["/a"] = web.file(data)
    PROVIDER.provide(spec, context)
    later(monkeypatch, 1e6)
    site.answers["/a"] = web.file(archive("other"))
    for how in ({}, {"pull": "always"}, {"pull": "never"}, {"offline": True}):
        assert motd(PROVIDER.provide(spec, replace(context, **how))) == "hello"
    assert len(site.requests) == 1
    # Another spec has the URL mean something else since, and the pinned one does not care.
    assert motd(PROVIDER.provide(f"tar+{site.url}/a", context)) == "other"
    assert motd(PROVIDER.provide(spec, context)) == "hello"
    assert len(site.requests) == 2


def test_a_wrong_archive_is_not_looked_at(site: Site, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    data = archive()
    site.answers["/a"] = web.file(data)
    unpacked: list[object] = []
    monkeypatch.setattr(tar._Source, "opened", lambda source: unpacked.append(source))
    message = problem(f"tar+{site.url}/a?secret#sha256={'0' * 64}", context)
    assert message == f"invalid spec: tar+{site.url}/a has sha256:{sha256(data)}, and the spec says sha256:{'0' * 64}"
    assert unpacked == left_over(context) == []
    assert not (context.cache_root / "tar/refs").exists()


# --- several processes -----------------------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
from vmette.providers.base import Context
from vmette.providers.tar import TarProvider
print(TarProvider().provide(sys.argv[1], Context(Path(sys.argv[2]), form="directory", pull=sys.argv[3])).path)
"""


def child(spec: str, context: Context) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, spec, str(context.cache_root), context.pull]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("pull", ["missing", "always"])
def test_two_processes_fetch_it_once(site: Site, context: Context, pull: str) -> None:
    data, context = archive(), replace(context, pull=pull)

    def slowly(handler: Handler) -> None:
        handler.head(200, Content_Length=len(data), ETag=web.etag(data))
        handler.body(data[:100])
        time.sleep(1.5)
        handler.body(data[100:])

    site.answers["/a"] = slowly
    children = [child(f"tar+{site.url}/a", context) for _ in range(2)]
    paths = {process.communicate(timeout=60)[0] for process in children}
    assert [process.returncode for process in children] == [0, 0]
    assert len(paths) == 1
    assert len(site.requests) == 1
    assert left_over(context) == []


def test_a_process_that_is_killed_leaves_nothing_that_is_taken_for_something(site: Site, context: Context) -> None:
    data = archive("x" * 200_000)
    spec = f"tar+{site.url}/a"

    def stalls(handler: Handler) -> None:
        handler.head(200, Content_Length=len(data), ETag=web.etag(data))
        handler.body(data[:100_000])
        handler.server.stopping.wait(60)

    site.answers["/a"] = web.sequence(stalls, web.file(data))
    with child(spec, context) as process:
        end = time.monotonic() + 30
        while not any(path.stat().st_size for path in context.cache_root.glob("store/staging/*")):
            assert time.monotonic() < end
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    problem(spec, replace(context, offline=True), OfflineCacheMiss)
    assert len(left_over(context)) >= 1
    assert motd(PROVIDER.provide(spec, context)) == "x" * 200_000
    assert not list(context.cache_root.glob("store/staging/*"))


def test_what_a_killed_process_left_is_swept(context: Context) -> None:
    from vmette.images.prune import prune

    store = Store(context.provider_cache("store"))
    store.staging.mkdir(parents=True)
    (store.staging / "x").write_text("half")
    prune(store)
    assert left_over(context) == []


def test_it_is_cancelled(site: Site, context: Context) -> None:
    site.answers["/a"] = web.drip(b"HTTP/1.1 200 OK\r\n\r\n", 30)
    end = time.monotonic() + 0.5
    problem(f"tar+{site.url}/a", replace(context, cancelled=lambda: time.monotonic() > end), Cancelled)
    assert left_over(context) == []
    with Store(context.cache_root / "store").locked(remote._note_path(Path(), f"{site.url}/a").stem):
        problem(f"tar+{site.url}/a", replace(context, cancelled=lambda: True), Cancelled)


def test_a_cache_that_cannot_be_written(site: Site, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    problem(f"tar+{site.url}/a", Context(tmp_path / "cache"), ProviderIOError)
    (tmp_path / "cache").unlink()
    context = Context(tmp_path / "cache")
    context.provider_cache("store")
    (tmp_path / "cache/store/staging").write_text("a file")
    assert "store/staging" in problem(f"tar+{site.url}/a", context, ProviderIOError)

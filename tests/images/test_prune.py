"""What leaves the cache, and what must not; and the commands that show and clear it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.images.layout import Layout, member, tar
from vmette.images.prune import items, prune
from vmette.images.store import Store
from vmette.locks import held
from vmette.providers import Context
from vmette.providers.oci.provider import OciProvider


def vmette(cache: Path, *args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "VMETTE_CACHE_DIR": str(cache), **variables}
    return subprocess.run(
        [sys.executable, "-m", "vmette", *args], env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


@pytest.fixture
def cache(tmp_path: Path, layout: Layout) -> Path:
    """A cache with three images, of one layer each, used one, two and three hours ago."""
    for number in (1, 2, 3):
        spec = layout.tag(str(number), layout.manifest([tar([member("data", os.urandom(100_000 * number))])]))
        OciProvider().provide(spec, Context(tmp_path / "cache", arch="x86_64"))
        for path in entries(tmp_path / "cache"):
            if path.stat().st_mtime > time.time() - 1800:
                age(path, number)
    return tmp_path / "cache"


def entries(cache: Path) -> list[Path]:
    return [path for kind in ("layers", "images") for path in (cache / "store" / kind).iterdir()]


def age(path: Path, hours: float) -> None:
    then = time.time() - 3600 * hours
    os.utime(path, (then, then))


def hours(cache: Path) -> list[int]:
    """How long ago each entry that is left was used."""
    return sorted(round((time.time() - path.stat().st_mtime) / 3600) for path in entries(cache))


def test_the_least_recently_used_goes_first(cache: Path) -> None:
    store = Store(cache / "store")
    sizes = {item.path: item.size for item in items(store)}
    assert len(sizes) == 6
    total = sum(sizes.values())
    oldest = sum(size for path, size in sizes.items() if path.stat().st_mtime < time.time() - 9000)
    removed = prune(store, max_bytes=total - oldest)
    assert sorted(sizes[item.path] for item in removed) == sorted(item.size for item in removed)
    assert hours(cache) == [1, 1, 2, 2]
    assert prune(store, max_bytes=total) == []
    prune(store, unused_since=time.time() - 5400)
    assert hours(cache) == [1, 1]
    prune(store)
    assert hours(cache) == []


def test_what_is_held_or_was_just_asked_for_stays(cache: Path) -> None:
    store = Store(cache / "store")
    by_kind = {item.kind: item for item in items(store) if item.path.stat().st_mtime < time.time() - 9000}
    descriptors = [held(item.held) for item in by_kind.values()]
    (recent, *_) = [path for path in entries(cache) if path.stat().st_mtime > time.time() - 4000]
    os.utime(recent)
    prune(store)
    assert set(entries(cache)) == {recent, *(item.path for item in by_kind.values())}
    for fd in descriptors:
        os.close(fd)
    prune(store)
    assert entries(cache) == [recent]


def test_locks_of_those_who_died_go_and_others_stay(cache: Path) -> None:
    store = Store(cache / "store")
    store.locks.mkdir(mode=0o700, parents=True, exist_ok=True)
    (store.locks / "layers-of-one-who-died").touch(mode=0o600)
    with store.locked("layers-of-one-who-lives"):
        prune(store)
        assert [path.name for path in store.locks.iterdir()] == ["layers-of-one-who-lives"]
    assert list(store.locks.iterdir()) == []


def test_an_entry_that_is_being_made_stays(cache: Path) -> None:
    store = Store(cache / "store")
    path = entries(cache)[0]
    (store.staging / store.lock_of(path)).mkdir()
    with store.locked(store.lock_of(path)):
        prune(store)
        assert entries(cache) == [path]
        assert (store.staging / store.lock_of(path)).is_dir()
    prune(store)
    assert entries(cache) == list(store.staging.iterdir()) == []


def test_what_links_out_of_the_cache_is_not_followed(cache: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "data").mkdir(parents=True)
    store = Store(cache / "store")
    (store.layers / "link").symlink_to(outside)
    (store.staging / "link").symlink_to(outside)
    age(outside, 9)
    prune(store)
    assert (outside / "data").is_dir()


def test_a_new_image_evicts_the_old_ones(cache: Path, layout: Layout) -> None:
    spec = layout.tag("new", layout.manifest([tar([member("data", os.urandom(50_000))])]))
    done = vmette(cache, "pull", "--quiet", spec, VMETTE_CACHE_MAX_BYTES="500000")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_file()
    assert hours(cache) == [0, 0, 1, 1]


def test_the_commands(cache: Path) -> None:
    done = vmette(cache, "cache", "df")
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["KIND", "ENTRIES"],
        ["layers", "3"],
        ["images", "3"],
        ["directories", "0"],
        ["downloads", "0"],
        ["templates", "0"],
        ["total", "6"],
    ]
    assert vmette(cache, "cache", "prune").returncode == 2
    assert vmette(cache, "cache", "prune", "--all", "--until", "1h").returncode == 2
    for wrong in ("", "1", "h", "1y", "-1h", "1.5h", "9999999999s"):
        done = vmette(cache, "cache", "prune", f"--until={wrong}")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    for wrong in ("-1", "1k", "0"):
        done = vmette(cache, "cache", "prune", VMETTE_CACHE_MAX_BYTES=wrong)
        assert (done.returncode, "VMETTE_CACHE_MAX_BYTES" in done.stderr) == (2, True)
    assert vmette(cache, "cache", "prune", "--until", "90m").stdout.startswith("removed 4 entries, ")
    assert vmette(cache, "cache", "prune", VMETTE_CACHE_MAX_BYTES="1").stdout.startswith("removed 2 entries, ")
    assert vmette(cache, "cache", "prune", "--all").stdout == "removed 0 entries, 0 B\n"
    assert json.loads(vmette(cache, "images", "--json").stdout) == []
    (cache / "oci/refs").mkdir(exist_ok=True)
    (cache / "oci/refs/note").write_text("[]")
    assert vmette(cache, "cache", "prune", "--all").returncode == 0
    assert list((cache / "oci/refs").iterdir()) == []
    assert vmette(cache, "images").stdout.split()[0] == "REFERENCE"


def test_an_empty_cache(tmp_path: Path) -> None:
    for command in (["cache", "df"], ["cache", "prune", "--all"], ["images"], ["images", "--json"]):
        assert vmette(tmp_path / "new", *command).returncode == 0

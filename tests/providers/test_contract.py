"""`vmette.providers.base`: what providers and the rest have agreed upon. Meanings are those of the Rust edition."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

import vmette.providers
from vmette.errors import VmetteError
from vmette.providers import (
    BlockFs,
    BlockImage,
    BuiltinProvider,
    Context,
    Directory,
    DirProvider,
    InvalidSpec,
    NetworkError,
    OfflineCacheMiss,
    ProviderError,
    ProviderIOError,
    RootfsProvider,
)


@pytest.mark.parametrize(("fstype", "name"), [(BlockFs.SQUASHFS, "squashfs"), (BlockFs.EROFS, "erofs")])
def test_a_block_filesystem_goes_by_the_kernels_name(fstype: BlockFs, name: str) -> None:
    assert str(fstype) == f"{fstype}" == fstype.value == name
    assert BlockFs(name) is fstype


def test_artifacts_are_values() -> None:
    assert Directory(Path("/a")) == Directory(Path("/a"), read_only=False)
    assert Directory(Path("/a")) != Directory(Path("/a"), read_only=True)
    assert BlockImage(Path("/a"), BlockFs.EROFS) == BlockImage(Path("/a"), BlockFs.EROFS)
    assert BlockImage(Path("/a"), BlockFs.EROFS) != BlockImage(Path("/a"), BlockFs.SQUASHFS)
    assert len({Directory(Path("/a")), Directory(Path("/a")), BlockImage(Path("/a"), BlockFs.EROFS)}) == 2


@pytest.mark.parametrize(
    ("value", "field"),
    [
        (Directory(Path("/a")), "path"),
        (BlockImage(Path("/a"), BlockFs.EROFS), "fstype"),
        (Context(Path("/a")), "offline"),
    ],
)
def test_artifacts_and_contexts_do_not_change(value: object, field: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, field, None)


ERRORS: list[tuple[Callable[[str], ProviderError], str]] = [
    (InvalidSpec, "invalid spec: it"),
    (OfflineCacheMiss, "offline mode: it not in cache"),
    (NetworkError, "network: it"),
    (ProviderIOError, "io: it"),
    (ProviderError, "it"),
]


@pytest.mark.parametrize(("make", "text"), ERRORS)
def test_errors_say_what_kind_they_are_of(make: Callable[[str], ProviderError], text: str) -> None:
    error = make("it")
    assert str(error) == text
    assert isinstance(error, ProviderError)
    assert isinstance(error, VmetteError)


def test_an_io_error_tells_of_the_system_error() -> None:
    error = ProviderIOError(OSError(28, "No space left on device", "/cache/x"))
    assert str(error) == "io: [Errno 28] No space left on device: '/cache/x'"


def test_a_context_has_defaults(tmp_path: Path) -> None:
    context = Context(tmp_path)
    assert (context.cache_root, context.offline, context.guest_helpers_dir, context.arch) == (
        tmp_path,
        False,
        None,
        None,
    )
    full = Context(tmp_path, offline=True, guest_helpers_dir=tmp_path / "bin", arch="aarch64")
    assert (full.offline, full.guest_helpers_dir, full.arch) == (True, tmp_path / "bin", "aarch64")


def test_the_provider_cache_is_made(tmp_path: Path) -> None:
    """The seed's context_provider_cache_creates_subdir."""
    root = tmp_path / "not/there/yet"
    directory = Context(root).provider_cache("foo")
    assert directory.is_dir()
    assert directory == root / "foo"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_the_provider_cache_is_kept(tmp_path: Path) -> None:
    context = Context(tmp_path)
    (context.provider_cache("foo") / "file").touch()
    assert context.provider_cache("foo") == tmp_path / "foo"
    assert (tmp_path / "foo/file").exists()
    assert context.provider_cache("bar") != context.provider_cache("foo")
    assert {path.name for path in tmp_path.iterdir()} == {"foo", "bar"}


@pytest.mark.parametrize("in_the_way", ["cache", "cache/foo"])
def test_a_provider_cache_that_cannot_be_made(tmp_path: Path, in_the_way: str) -> None:
    (tmp_path / in_the_way).parent.mkdir(exist_ok=True)
    (tmp_path / in_the_way).touch()
    with pytest.raises(ProviderIOError, match=r"^io: \[Errno ") as caught:
        Context(tmp_path / "cache").provider_cache("foo")
    assert isinstance(caught.value.__cause__, OSError)


class Lacking:
    """No provider: it has no `provide`."""

    name = "lacking"

    def matches(self, spec: str) -> bool:
        return True


@pytest.mark.parametrize(
    ("thing", "is_one"),
    [(DirProvider(), True), (BuiltinProvider(), True), (Lacking(), False), (object(), False), (os, False)],
)
def test_what_a_provider_is(thing: object, is_one: bool) -> None:
    assert isinstance(thing, RootfsProvider) is is_one


def test_all_names_are_there() -> None:
    assert sorted(vmette.providers.__all__) == sorted(set(vmette.providers.__all__))
    for name in vmette.providers.__all__:
        assert hasattr(vmette.providers, name)

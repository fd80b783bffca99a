"""`builtin`, the provider of what vmette carries."""

from __future__ import annotations

from pathlib import Path

import pytest

from vmette.assets import host_arch
from vmette.errors import PayloadError
from vmette.providers import BlockFs, BlockImage, BuiltinProvider, Context, InvalidSpec

PROVIDER = BuiltinProvider()


@pytest.fixture
def payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for arch in ("x86_64", "aarch64"):
        (tmp_path / arch).mkdir()
        (tmp_path / arch / "base.squashfs").touch()
    monkeypatch.setenv("VMETTE_ASSETS_DIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "claimed"),
    [
        ("builtin://base", True),
        ("builtin://", True),
        ("builtin://other", True),
        ("builtin:base", False),
        ("builtin", False),
        ("BUILTIN://base", False),
        (" builtin://base", False),
        ("", False),
        ("/builtin://base", False),
    ],
)
def test_what_it_claims(spec: str, claimed: bool) -> None:
    assert PROVIDER.name == "builtin"
    assert PROVIDER.matches(spec) is claimed


@pytest.mark.parametrize(("arch", "directory"), [(None, host_arch()), ("x86_64", "x86_64"), ("aarch64", "aarch64")])
def test_the_base_is_a_block_image_for_the_guests_architecture(payload: Path, arch: str | None, directory: str) -> None:
    artifact = PROVIDER.provide("builtin://base", Context(payload / "cache", offline=True, arch=arch))
    assert artifact == BlockImage(payload / directory / "base.squashfs", BlockFs.SQUASHFS)
    assert not (payload / "cache").exists()


@pytest.mark.parametrize("name", ["", "other", "base/", "base/../base", "../base", "Base"])
def test_there_is_no_other(payload: Path, name: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        PROVIDER.provide(f"builtin://{name}", Context(payload))
    assert str(caught.value) == (f"invalid spec: builtin://{name}: the built-in root filesystems are: builtin://base")


def test_a_payload_without_it(payload: Path) -> None:
    (payload / "x86_64/base.squashfs").unlink()
    with pytest.raises(PayloadError, match=r"base\.squashfs is missing: run `make payload`"):
        PROVIDER.provide("builtin://base", Context(payload, arch="x86_64"))

"""`dir`, the provider of directories."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vmette.providers import Context, Directory, DirProvider, InvalidSpec

CONTEXT = Context(Path("/nonexistent/cache"))
PROVIDER = DirProvider()


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory."""
    (tmp_path / "src/inner").mkdir(parents=True)
    (tmp_path / "Cargo.toml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problem(spec: str) -> str:
    with pytest.raises(InvalidSpec) as caught:
        PROVIDER.provide(spec, CONTEXT)
    return str(caught.value)


def test_its_name() -> None:
    assert PROVIDER.name == "dir"


@pytest.mark.parametrize("spec", ["/abs/path", "./rel", "../up", "~/home", ".", "..", "/", "//", "./", "../", "~/"])
def test_specs_that_look_like_a_path_are_claimed_whether_they_are_there_or_not(spec: str) -> None:
    """The seed's dir_matches_path_like_specs."""
    assert PROVIDER.matches(spec)


@pytest.mark.parametrize(
    "spec",
    [
        *("alpine:3.20", "oci://alpine", "tar+https://example.com/a.tgz", "", "builtin://base", "~", "~root/x"),
        *(".hidden", "...", " /abs", "file:///abs", "-", "alpine\0", "\udcff", "x" * 5000),
    ],
)
def test_other_specs_are_not_claimed(spec: str) -> None:
    """The seed's dir_matches_path_like_specs, its other half."""
    assert not PROVIDER.matches(spec)


@pytest.mark.parametrize(
    ("spec", "claimed"),
    [
        ("src", True),
        ("src/", True),
        ("src/inner", True),
        ("link", True),
        ("definitely-not-a-dir-xyz", False),
        ("Cargo.toml", False),
        ("src/missing", False),
        ("Cargo.toml/x", False),
        ("dangling", False),
        ("loop", False),
    ],
)
def test_a_bare_name_is_claimed_if_it_is_a_directory(somewhere: Path, spec: str, claimed: bool) -> None:
    """The seed's dir_matches_bare_relative_existing_dir."""
    for name, target in (("link", "src"), ("dangling", "missing"), ("loop", "loop")):
        (somewhere / name).symlink_to(target)
    assert PROVIDER.matches(spec) is claimed


def test_a_directory_hides_an_image_of_its_name(somewhere: Path) -> None:
    assert not PROVIDER.matches("node")
    (somewhere / "node").mkdir()
    assert PROVIDER.matches("node")
    assert not PROVIDER.matches("oci://node")


def test_a_missing_path_is_refused() -> None:
    """The seed's dir_rejects_missing_paths."""
    spec = "/definitely/does/not/exist/vmette"
    assert problem(spec) == f"invalid spec: {spec}: No such file or directory"


def test_a_file_is_refused(somewhere: Path) -> None:
    """The seed's dir_rejects_files."""
    assert problem(f"{somewhere}/Cargo.toml") == f"invalid spec: {somewhere}/Cargo.toml is not a directory"
    assert "not a directory" in problem("/etc/passwd")


def test_a_directory_is_taken_and_may_be_written_to() -> None:
    """The seed's dir_accepts_real_directory."""
    artifact = PROVIDER.provide("/tmp", CONTEXT)
    assert artifact == Directory(Path("/tmp"), read_only=False)
    assert artifact.path.is_dir()


@pytest.mark.parametrize("spec", ["src", "src/inner", "./src", "../{}", "src/../src", ".", "..", "./-dash"])
def test_a_relative_path_stays_relative(somewhere: Path, spec: str) -> None:
    (somewhere / "-dash").mkdir()
    spec = spec.format(somewhere.name)
    artifact = PROVIDER.provide(spec, CONTEXT)
    assert artifact == Directory(Path(spec))
    assert str(artifact.path) == spec.removeprefix("./")


def test_a_symlink_is_followed_to_look_but_not_resolved(somewhere: Path) -> None:
    (somewhere / "current").symlink_to("src")
    for spec in (f"{somewhere}/current", "./current", "current"):
        assert PROVIDER.provide(spec, CONTEXT) == Directory(Path(spec))
    (somewhere / "current").unlink()
    (somewhere / "current").symlink_to("Cargo.toml")
    assert problem("./current") == "invalid spec: current is not a directory"


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("./missing", "missing: No such file or directory"),
        ("./Cargo.toml/x", "Cargo.toml/x: Not a directory"),
        ("./loop", "loop: Too many levels of symbolic links"),
        ("./dangling", "dangling: No such file or directory"),
        (f"./{'n' * 256}", f"{'n' * 256}: File name too long"),
        ("./a\0b", "a\0b: embedded null byte"),
        ("/tmp\0/x", "/tmp\0/x: embedded null byte"),
    ],
)
def test_reasons_of_a_refusal(somewhere: Path, spec: str, reason: str) -> None:
    for name, target in (("dangling", "nowhere"), ("loop", "loop")):
        (somewhere / name).symlink_to(target)
    assert problem(spec) == f"invalid spec: {reason}"


def test_a_fifo_is_refused_and_does_not_hold_us(somewhere: Path) -> None:
    os.mkfifo(somewhere / "fifo")
    assert problem("./fifo") == "invalid spec: fifo is not a directory"


@pytest.mark.parametrize(("spec", "below"), [("~/src", "src"), ("~/src/inner", "src/inner"), ("~/", "")])
def test_home_is_expanded(somewhere: Path, monkeypatch: pytest.MonkeyPatch, spec: str, below: str) -> None:
    monkeypatch.setenv("HOME", str(somewhere))
    assert PROVIDER.provide(spec, CONTEXT) == Directory(somewhere / below)


def test_home_is_expanded_at_the_start_only(somewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/nowhere")
    (somewhere / "~/src").mkdir(parents=True)
    assert PROVIDER.provide("./~/src", CONTEXT) == Directory(Path("~/src"))
    assert problem("~/src") == "invalid spec: /nowhere/src: No such file or directory"


def test_without_home_there_is_no_expansion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME", raising=False)
    assert PROVIDER.matches("~/x")
    assert problem("~/x") == "invalid spec: $HOME not set; cannot expand '~/'"


def test_resolving_again_gives_the_same_and_leaves_everything_alone(somewhere: Path) -> None:
    before = sorted(somewhere.rglob("*"))
    assert PROVIDER.provide("./src", CONTEXT) == PROVIDER.provide("./src", CONTEXT)
    assert sorted(somewhere.rglob("*")) == before
    assert not CONTEXT.cache_root.exists()

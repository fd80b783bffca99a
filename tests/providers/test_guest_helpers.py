"""`inject_guest_helpers`: into a tree that an image's author made, and nowhere else."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from vmette.providers import ProviderIOError, inject_guest_helpers

SEND, RUNNER = "usr/local/bin/vsock-send", "usr/local/bin/vsock-runner"
TIME = 1_600_000_000_000_000_001


@pytest.fixture
def helpers(tmp_path: Path) -> Path:
    directory = tmp_path / "helpers"
    directory.mkdir()
    for name in ("vsock-send", "vsock-runner", "something-else"):
        (directory / name).write_text(f"program {name}")
        os.utime(directory / name, ns=(TIME, TIME))
    return directory


@pytest.fixture
def rootfs(tmp_path: Path) -> Path:
    path = tmp_path / "rootfs"
    path.mkdir()
    return path


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    path = tmp_path / "outside"
    (path / "local/bin").mkdir(parents=True)
    (path / "bin").mkdir()
    (path / "file").write_text("kept")
    return path


def files_below(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}


def test_the_helpers_are_copied_with_the_directories_they_need(rootfs: Path, helpers: Path) -> None:
    inject_guest_helpers(rootfs, helpers)
    assert files_below(rootfs) == {SEND, RUNNER}
    for path in (rootfs / SEND, rootfs / RUNNER):
        assert path.read_text() == f"program {path.name}"
        assert stat.S_IMODE(path.stat().st_mode) == 0o755
        assert path.stat().st_mtime_ns == TIME


def test_what_else_is_there_stays(rootfs: Path, helpers: Path) -> None:
    (rootfs / "usr/local/bin").mkdir(parents=True)
    (rootfs / "usr/local/bin/other").write_text("kept")
    inject_guest_helpers(rootfs, helpers)
    assert files_below(rootfs) == {SEND, RUNNER, "usr/local/bin/other"}
    assert (rootfs / "usr/local/bin/other").read_text() == "kept"


@pytest.mark.parametrize("missing", [{"vsock-send"}, {"vsock-runner"}, {"vsock-send", "vsock-runner"}])
def test_a_missing_helper_is_logged_and_skipped(
    rootfs: Path, helpers: Path, caplog: pytest.LogCaptureFixture, missing: set[str]
) -> None:
    for name in missing:
        (helpers / name).unlink()
    with caplog.at_level(logging.WARNING):
        inject_guest_helpers(rootfs, helpers)
    assert files_below(rootfs) == {f"usr/local/bin/{name}" for name in {"vsock-send", "vsock-runner"} - missing}
    assert {record.getMessage() for record in caplog.records} == {
        f"guest helper {helpers / name} is missing, left out" for name in missing
    }


def test_no_helpers_at_all(rootfs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    inject_guest_helpers(rootfs, tmp_path / "missing")
    assert files_below(rootfs) == set()
    assert len(caplog.records) == 2


def test_nothing_is_logged_when_all_is_well(rootfs: Path, helpers: Path, caplog: pytest.LogCaptureFixture) -> None:
    inject_guest_helpers(rootfs, helpers)
    assert caplog.records == []


def test_an_up_to_date_helper_is_not_written_again(rootfs: Path, helpers: Path) -> None:
    inject_guest_helpers(rootfs, helpers)
    before = {path: (rootfs / path).stat() for path in (SEND, RUNNER)}
    inject_guest_helpers(rootfs, helpers)
    for path, status in before.items():
        now = (rootfs / path).stat()
        assert (now.st_ino, now.st_mtime_ns, now.st_ctime_ns) == (status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


@pytest.mark.parametrize(("content", "age"), [("program VSOCK-SEND", 1), ("program vsock-send, but longer", -(10**9))])
def test_a_newer_helper_of_equal_size_and_one_of_another_size_are_written(
    rootfs: Path, helpers: Path, content: str, age: int
) -> None:
    inject_guest_helpers(rootfs, helpers)
    (helpers / "vsock-send").write_text(content)
    os.utime(helpers / "vsock-send", ns=(TIME + age, TIME + age))
    inject_guest_helpers(rootfs, helpers)
    assert (rootfs / SEND).read_text() == content
    assert (rootfs / RUNNER).read_text() == "program vsock-runner"


@pytest.mark.parametrize("link", ["usr", "usr/local", "usr/local/bin"])
@pytest.mark.parametrize("target", ["{outside}", "{up}/outside", "missing", "{outside}/local", "/etc"])
def test_a_symlink_of_the_image_among_the_directories_is_not_followed(
    rootfs: Path, helpers: Path, outside: Path, link: str, target: str
) -> None:
    up = "/".join([".."] * (link.count("/") + 1))
    (rootfs / link).parent.mkdir(parents=True, exist_ok=True)
    (rootfs / link).symlink_to(target.format(outside=outside, up=up))
    with pytest.raises(ProviderIOError) as caught:
        inject_guest_helpers(rootfs, helpers)
    assert str(caught.value) == f"io: {rootfs}/usr/local/bin goes through a symlink; not following it"
    assert files_below(outside) == {"file"}
    assert not Path("/etc/local").exists()


@pytest.mark.parametrize("target", ["file", "new"])
def test_a_symlink_of_the_image_in_place_of_a_helper_is_replaced(
    rootfs: Path, helpers: Path, outside: Path, target: str
) -> None:
    (rootfs / SEND).parent.mkdir(parents=True)
    paths = (rootfs / SEND, rootfs / RUNNER)
    for path in paths:
        path.symlink_to(outside / target)
    inject_guest_helpers(rootfs, helpers)
    for path in paths:
        assert not path.is_symlink()
        assert path.read_text() == f"program {path.name}"
    assert files_below(outside) == {"file"}
    assert (outside / "file").read_text() == "kept"


def test_a_helper_may_be_a_symlink_on_our_side(rootfs: Path, helpers: Path) -> None:
    (helpers / "vsock-send").unlink()
    (helpers / "vsock-send").symlink_to("something-else")
    inject_guest_helpers(rootfs, helpers)
    assert not (rootfs / SEND).is_symlink()
    assert (rootfs / SEND).read_text() == "program something-else"


def test_a_real_failure_is_raised(rootfs: Path, helpers: Path) -> None:
    (rootfs / "usr").touch()
    with pytest.raises(ProviderIOError, match=r"^io: \[Errno 20\] Not a directory: .*usr/local/bin/vsock-send"):
        inject_guest_helpers(rootfs, helpers)
    with pytest.raises(ProviderIOError, match=r"^io: \[Errno 2\] No such file or directory"):
        inject_guest_helpers(rootfs / "missing", helpers)
    assert files_below(rootfs) == {"usr"}


def test_a_helper_that_is_no_file_is_a_failure(rootfs: Path, helpers: Path) -> None:
    (helpers / "vsock-runner").unlink()
    (helpers / "vsock-runner").mkdir()
    with pytest.raises(ProviderIOError, match=r"^io: \[Errno 22\]"):
        inject_guest_helpers(rootfs, helpers)
    assert files_below(rootfs) == {SEND}


UNPRIVILEGED = """
import json, os, vmette._native
from pathlib import Path
from vmette.providers import ProviderIOError, inject_guest_helpers
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    inject_guest_helpers(Path("rootfs"), Path("helpers"))
except ProviderIOError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.parametrize("closed", ["helpers", "rootfs", "helpers/vsock-send"])
def test_a_permission_that_is_lacking_is_a_failure(tmp_path: Path, rootfs: Path, helpers: Path, closed: str) -> None:
    there = tmp_path / "there"
    there.mkdir()
    there.chmod(0o755)
    rootfs.chmod(0o777)
    for directory in (helpers, rootfs):
        directory.rename(there / directory.name)
    mode = (there / closed).stat().st_mode
    (there / closed).chmod(0o000)
    try:
        done = subprocess.run([sys.executable, "-c", UNPRIVILEGED], cwd=there, stdout=subprocess.PIPE, check=True)
    finally:
        (there / closed).chmod(mode)
    assert json.loads(done.stdout).startswith("io: [Errno 13] Permission denied: ")

"""For tests that boot real VMs. After each of them, nothing may be left: no process, no file."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.vm.support import Cli, command, vmm_processes, wait_until


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gives the test a directory for temporary files of its own, and looks at what it leaves."""
    temporary = tmp_path / "TMPDIR"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr("tempfile.tempdir", None)
    before = vmm_processes()
    yield
    wait_until(lambda: not vmm_processes().keys() - before.keys(), f"the end of all VMs: {vmm_processes()}")
    assert list(temporary.iterdir()) == []


@pytest.fixture
def cli() -> Cli:
    """Runs `vmette ARGS…` as a user does."""

    def run(*args: str | os.PathLike[str], **options: Any) -> subprocess.CompletedProcess[bytes]:
        options.setdefault("stdin", subprocess.DEVNULL if "input" not in options else None)
        if options["stdin"] is None:
            del options["stdin"]
        return subprocess.run(command(args), capture_output=True, timeout=240, check=False, **options)

    return run


@pytest.fixture(scope="session")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real Debian root filesystem, of this machine's release."""
    root = tmp_path_factory.mktemp("debian") / "root"
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    subprocess.run(["mmdebstrap", "--variant=apt", "--quiet", release, str(root)], check=True)
    return root


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make test` builds nothing for another architecture, and so has nothing to test there."""
    foreign = collection_path.name in {"test_aarch64.py", "test_wheel_aarch64.py"}
    return True if foreign and config.getoption("--arch") != "aarch64" else None

"""What runs in the guest, out of the wheel for Macs, booted under emulation: `make test-macos` (see conftest.py)."""

from __future__ import annotations

import socket
import zipfile
from pathlib import Path

import pytest

import vmette
from tests.vm.support import BASE, Cli
from vmette import assets

DIST = Path(__file__).parents[2] / "dist"
MAX_BYTES = 20_000_000


@pytest.fixture(scope="module")
def wheel() -> Path:
    """As `make wheel-macos` has left it."""
    (path,) = DIST.glob("vmette-*-macosx_*_arm64.whl")
    return path


@pytest.fixture(autouse=True)
def payload(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the wheel has in `_payload`, in the place of what the checkout has."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "wheel")
    path = tmp_path / "wheel/vmette/_payload"
    monkeypatch.setenv("VMETTE_ASSETS_DIR", str(path))
    return path


def test_its_size(wheel: Path) -> None:
    assert wheel.stat().st_size < MAX_BYTES


def test_nothing_is_for_another_machine(payload: Path) -> None:
    assert sorted(path.name for path in payload.iterdir()) == ["NOTICE", "aarch64", "macos"]
    image = assets.kernel("aarch64").read_bytes()
    assert image[0x38:0x3C] == b"ARM\x64"  # not compressed, which is all that Virtualization.framework boots


def test_it_boots_and_runs_a_command(cli: Cli) -> None:
    done = cli("run", "--arch", "aarch64", BASE, "--", "sh", "-c", "uname -sm; cat; exit 5", input=b"in\n")
    assert (done.returncode, done.stdout, done.stderr) == (5, b"Linux aarch64\nin\n", b"")


def test_the_helpers(payload: Path) -> None:
    share = vmette.Share("payload", payload / "aarch64", read_only=True)
    same = "for name in vsock-send vsock-runner; do cmp /mnt/payload/$name /usr/local/bin/$name || exit; done"
    with vmette.Sandbox(BASE, arch="aarch64", vsock=True, shares=[share]) as sandbox:
        assert sandbox.run(["sh", "-c", same]).returncode == 0
        with sandbox.vsock.listen(5000) as listener:
            sender = sandbox.popen(["sh", "-c", "echo hello | vsock-send 5000"])
            with listener.accept(60) as connection:
                assert connection.recv(100) == b"hello\n"
                connection.sendall(b"reply")
            assert sender.communicate() == (b"reply", b"")
            runner = sandbox.popen(["vsock-runner", "5000", "6000"])
            with listener.accept(60) as connection:
                assert connection.recv(100) == b"READY\n"
            with sandbox.vsock.connect(6000) as connection:
                connection.sendall(b"uname -m; exit 7")
                connection.shutdown(socket.SHUT_WR)
                with connection.makefile("rb") as reply:
                    assert reply.read() == b"aarch64\n__EXIT__:7\n"
            runner.communicate()

"""Machines that vmette-vz runs, as on a Mac: over the stand-in for Apple's framework (tests/fake_vz/), which runs QEMU.

`make test-vz` runs all tests of this directory that way. What is here is about vmette-vz itself.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmette
from tests.fake_vz.build import program
from tests.vm.support import BASE, Cli, command, vmm_processes, wait_until
from vmette import assets


@pytest.fixture(autouse=True)
def vz(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"VMM": "vz", "VZ": str(program()), "VSOCK": ""}.items():
        monkeypatch.setenv(f"VMETTE_{name}", value)
    yield
    scratch = assets.cache_root() / "scratch"
    assert not scratch.exists() or list(scratch.glob("disk-*")) == []


def test_a_run(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/file").write_text("of the host\n")
    script = "cat /mnt/in/file; ! touch /mnt/in/new; df /tmp | grep -c vdb; cat; exit 3"
    options = ["--share", f"in={tmp_path / 'in'}:ro", "--scratch", "64M", "--mem-mib", "256", "--vcpus", "2"]
    done = cli("run", *options, BASE, "--", "sh", "-c", script, input=b"in\n")
    assert (done.returncode, done.stdout) == (3, b"of the host\n1\nin\n")
    assert done.stderr == b"touch: /mnt/in/new: Read-only file system\n"


def test_doctor(cli: Cli) -> None:
    done = cli("doctor")
    assert done.returncode == 0
    lines = {line.split("  ")[0]: line for line in done.stdout.decode().splitlines()}
    assert {"macos", "vmette-vz", "machines", "snapshots", "rosetta", "kernel", "cache"} <= lines.keys()
    assert "qemu" not in lines
    done = cli("doctor", env={**os.environ, "VMETTE_VZ": "/nothing"})
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr


def test_an_image_of_an_odd_size_is_padded(tmp_path: Path, cli: Cli) -> None:
    """As raw images of the framework must be; squashfs does not mind."""
    image = tmp_path / "odd.squashfs"
    image.write_bytes(assets.base_image().read_bytes() + b"!")
    done = cli("run", f"squashfs+file://{image}", "--", "echo", "up")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"up\n", b"")


def test_a_disk_is_written(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(4096))
    vmette.run(BASE, ["sh", "-c", "echo written >/dev/vdb && sync"], disks=[vmette.Disk(disk)], check=True)
    assert disk.read_bytes()[:8] == b"written\n"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("unsupported", "this Mac cannot virtualize"),
        (
            "validate",
            r"^Virtualization.framework: Invalid virtual machine configuration. A fault. \(VZErrorDomain 2\)$",
        ),
        ("start", r"^Virtualization.framework: Internal Virtualization error. .* \(VZErrorDomain 1\)$"),
        ("limit", "this Mac runs as many virtual machines as macOS allows: end another one first"),
        ("guest-error", r"stopped unexpectedly. \(VZErrorDomain 1\)$"),
    ],
)
def test_what_goes_wrong_is_told(fault: str, message: str, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setenv("FAKE_VZ_FAULT", fault)
    with pytest.raises(vmette.VmmError, match=message):
        vmette.run(BASE, ["sleep", "1000"])
    done = cli("run", BASE, "--", "sleep", "1000")
    assert done.returncode == 125
    assert done.stderr.count(b"\n") == 1


def test_one_without_its_entitlement_is_signed_anew_and_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cli: Cli
) -> None:
    """The stand-in has its entitlement from the environment, and codesign's has it from a wrapper."""
    real = os.environ["VMETTE_VZ"]
    unsigned = tmp_path / "vmette-vz"
    unsigned.write_text(f'#!/bin/sh\nFAKE_VZ_FAULT=unentitled\nexport FAKE_VZ_FAULT\nexec {real} "$@"\n')
    unsigned.chmod(0o755)
    codesign = tmp_path / "codesign"
    codesign.write_text('#!/bin/sh\nfor last; do :; done\nsed -i s/=unentitled/=/ "$last"\n')
    codesign.chmod(0o755)
    monkeypatch.setenv("VMETTE_VZ", str(unsigned))
    monkeypatch.setenv("VMETTE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("vmette.vmm.vz.CODESIGN", codesign)
    assert vmette.run(BASE, ["echo", "up"], text=True).stdout == "up\n"
    (signed, _lock) = sorted((tmp_path / "cache/vmm").iterdir(), reverse=True)
    assert "FAKE_VZ_FAULT=\n" in signed.read_text()
    done = cli("run", BASE, "--", "echo", "up")  # which finds it signed
    assert (done.returncode, done.stdout, done.stderr) == (0, b"up\n", b"")


def test_the_device_for_vsock_hands_over_connections() -> None:
    """The stand-in's device answers with an echo, and nobody is at the lower ports."""
    with vmette.Sandbox(BASE, vsock=True) as sandbox:
        with sandbox.vsock.connect(5000) as connection:
            connection.sendall(b"echo")
            assert connection.recv(4) == b"echo"
        with pytest.raises(ConnectionRefusedError):
            sandbox.vsock.connect(80)
        for _ in range(3):
            with (
                sandbox.vsock.listen(6000) as listener,
                sandbox.vsock.connect(6000) as ours,
                listener.accept(timeout=30) as theirs,
            ):
                ours.sendall(b"over")
                assert theirs.recv(4) == b"over"
        with sandbox.vsock.listen(6000), pytest.raises(vmette.GuestError, match="Address already in use"):
            sandbox.vsock.listen(6000)


def test_a_run_that_is_killed_leaves_no_machine(tmp_path: Path) -> None:
    argv = command(["run", "--scratch", "64M", BASE, "--", "sh", "-c", "echo up; sleep 1000"])
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert len(vmm_processes()) >= 2
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    wait_until(lambda: not vmm_processes(), "the end of vmette-vz and of QEMU")


def test_what_a_mac_has_not_is_refused(cli: Cli) -> None:
    done = cli("run", "--accel", "tcg", BASE, "--", "true")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"vmette: accelerator 'tcg' is QEMU's; Virtualization.framework has no choice of them\n"

"""Each kind of bad input gives one clear line, its exit code, and leaves nothing."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm.support import BASE, Cli

RUN = ["--", "true"]

CASES = {
    "unknown spec": (["nonsense://x", *RUN], 125, 'invalid spec: no provider claims "nonsense://x"; registered: ['),
    "unknown built-in": (["builtin://x", *RUN], 125, "the built-in root filesystems are: builtin://base"),
    "missing directory": (["{tmp}/none", *RUN], 125, "invalid spec: {tmp}/none: No such file or directory"),
    "file as directory": (["{tmp}/file", *RUN], 125, "invalid spec: {tmp}/file is not a directory"),
    "empty root": (["{tmp}/empty", *RUN], 127, "the root filesystem has no command 'true'"),
    "not executable": (["{tmp}/tree", "--", "/script"], 126, "cannot execute '/script': Permission denied"),
    "no kernel": (["--kernel", "{tmp}/file", BASE, *RUN], 125, "{tmp}/file is no x86_64 Linux kernel"),
    "missing kernel": (["--kernel", "{tmp}/no", BASE, *RUN], 125, "cannot read the kernel {tmp}/no: No such file"),
    "kernel is a directory": (["--kernel", "{tmp}", BASE, *RUN], 125, "cannot read the kernel {tmp}: Is a directory"),
    "missing initramfs": (["--initramfs", "{tmp}/no", BASE, *RUN], 125, "cannot read the initramfs {tmp}/no: No such"),
    "little memory": (["--mem-mib", "1", BASE, *RUN], 2, "1 MiB of memory: it can be 64 to"),
    "no processors": (["--vcpus", "0", BASE, *RUN], 2, "0 vcpus: there can be 1 to 16"),
    "many processors": (["--vcpus", "17", BASE, *RUN], 2, "17 vcpus: there can be 1 to 16"),
    "share without path": (["--share", "x", BASE, *RUN], 2, "share 'x' is malformed: it is TAG=PATH or TAG=PATH:ro"),
    "share without tag": (["--share", "=/tmp", BASE, *RUN], 2, "share tag '' is malformed"),
    "share with a bad tag": (["--share", "a b=/tmp", BASE, *RUN], 2, "share tag 'a b' is malformed"),
    "share tag too long": (["--share", f"{'x' * 37}=/tmp", BASE, *RUN], 2, "is too long: at most 3"),
    "share tag reserved": (["--share", "rootfs=/tmp", BASE, *RUN], 2, "share tag 'rootfs' is reserved"),
    "share tag twice": (["--share", "a=/tmp", "--share", "a=/tmp", BASE, *RUN], 2, "share tag 'a' is used twice"),
    "share missing": (["--share", "a={tmp}/no", BASE, *RUN], 2, "share a: {tmp}/no does not exist"),
    "share of a file": (["--share", "a={tmp}/file", BASE, *RUN], 2, "share a: {tmp}/file is not a directory"),
    "env without value": (["--env", "A", BASE, *RUN], 2, "environment entry 'A' is malformed: it is NAME=VALUE"),
    "env without name": (["--env", "=x", BASE, *RUN], 2, "environment entry '=x' is malformed: it is NAME=VALUE"),
    "relative directory": (["-w", "x", BASE, *RUN], 2, "working directory 'x' is no absolute path"),
    "negative time-out": (["--timeout", "-1", BASE, *RUN], 2, "time-out of -1.0 seconds cannot be kept"),
    "time-out no number": (["--timeout", "nan", BASE, *RUN], 2, "time-out of nan seconds cannot be kept"),
    "unknown architecture": (["--arch", "sparc", BASE, *RUN], 2, "architecture 'sparc' is not supported"),
    "long kernel parameters": (["--cmdline", "x" * 3000, BASE, *RUN], 2, "the kernel command line is"),
}


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("text\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/script").write_text("#!/bin/sh\n")
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_bad_input(cli: Cli, files: Path, case: str) -> None:
    arguments, code, message = CASES[case]
    done = cli("run", *[argument.replace("{tmp}", str(files)) for argument in arguments])
    error = done.stderr.decode()
    assert message.replace("{tmp}", str(files)) in error
    assert (done.returncode, done.stdout) == (code, b"")
    assert error.startswith("vmette: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no root filesystem"),
        ([BASE], "there is no command to run"),
        (["--exec", "true", BASE, "true"], "--exec and COMMAND exclude each other"),
        (["--no-such-option", BASE], "No such option"),
        (["--vcpus", "x", BASE, "true"], "Invalid value for '--vcpus'"),
    ],
)
def test_usage(cli: Cli, arguments: list[str], message: str) -> None:
    done = cli("run", *arguments)
    assert (done.returncode, done.stdout) == (2, b"")
    assert message in done.stderr.decode()
    assert b"Traceback" not in done.stderr


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "full", str(disk)], check=True)
    try:
        with pytest.raises(OSError, match="No space left"), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_full_cache_disk_makes_a_run_slower_and_not_wrong(cli: Cli, full_disk: Path) -> None:
    done = cli("run", "--quiet", BASE, "--", "echo", "fine", env={**os.environ, "VMETTE_CACHE_DIR": str(full_disk)})
    assert (done.returncode, done.stdout) == (0, b"fine\n")
    assert [path.name for path in full_disk.rglob("*") if path.is_file()] == ["filler"]


def test_a_full_disk_for_temporary_files_is_not_used(cli: Cli, full_disk: Path, tmp_path: Path) -> None:
    done = cli("run", "--share", f"work={tmp_path}", BASE, "--", "true", env={**os.environ, "TMPDIR": str(full_disk)})
    assert (done.returncode, done.stderr) == (0, b"")
    assert [path.name for path in full_disk.iterdir()] == ["filler"]


@pytest.mark.only_qemu
def test_doctor_and_providers(cli: Cli, tmp_path: Path) -> None:
    done = cli("doctor")
    assert done.returncode == 0
    lines = {line.split("  ")[0]: line for line in done.stdout.decode().splitlines()}
    assert {"qemu", "accelerator", "shares", "kernel", "initramfs", "base image", "cache"} <= lines.keys()
    assert "QEMU emulator version" in lines["qemu"]
    broken = {**os.environ, "PATH": "/nowhere", "VMETTE_ASSETS_DIR": str(tmp_path), "VMETTE_CACHE_DIR": "/proc/x"}
    done = cli("doctor", env=broken)
    assert done.returncode == 1
    assert done.stdout.decode().count(" problem ") >= 5
    assert b"Traceback" not in done.stderr
    assert [line.split()[0] for line in cli("providers").stdout.splitlines()] == [
        b"builtin",
        b"squashfs",
        b"tar",
        b"dir",
        b"oci",
    ]
    assert cli("--version").stdout.startswith(b"vmette, version ")
    for shell in ("bash", "zsh", "fish"):
        assert b"_VMETTE_COMPLETE" in cli("completion", shell).stdout


@pytest.mark.only_qemu
def test_no_qemu_is_told_with_what_to_do(cli: Cli) -> None:
    done = cli("run", BASE, "--", "true", env={**os.environ, "PATH": "/nowhere"})
    assert done.returncode == 125
    assert b"qemu-system-x86_64 is not installed: " in done.stderr

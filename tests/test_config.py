"""`vmette.config`, `vmette.assets`, `vmette.vmm.cmdline`: what is refused before a VM is started, and in what words."""

from __future__ import annotations

import os
import pwd
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vmette import assets
from vmette.config import CMDLINE_BYTES, Disk, MachineConfig, Saved, Share, scratch_size, signal_number
from vmette.errors import ConfigError, PayloadError, VmetteError
from vmette.machine import architecture
from vmette.providers.base import BlockFs, BlockImage, Directory
from vmette.vmm.cmdline import kernel_cmdline

ELF = b"\x7fELF" + bytes(2000)
BZ_IMAGE = bytes(514) + b"HdrS" + bytes(2000)
ARM_IMAGE = bytes(56) + b"ARM\x64" + bytes(2000)

GOOD_TAGS = ["a", "A", "0", "src", "a.b", "a_b", "a-b", "a..", "Rootfs", "rootfs2", "a" * 35]
BAD_TAGS = {
    "malformed": [
        "",
        ".",
        "..",
        ".a",
        "-a",
        "_a",
        "a b",
        "a/b",
        "../a",
        "a:b",
        "a,b",
        "a\n",
        "a\0",
        "caf\u00e9",
        "a\udcff",
    ],
    "too long": ["a" * 36],
    "reserved": ["rootfs", "vmette", "vmette.x"],
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "directory"
    path.mkdir()
    return path


@pytest.fixture
def payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Kernels and initramfs that are just good enough to be looked at."""
    path = tmp_path / "payload"
    for arch, kernel, content in (("x86_64", "vmlinux", ELF), ("aarch64", "Image", ARM_IMAGE)):
        (path / arch).mkdir(parents=True)
        (path / arch / kernel).write_bytes(content)
        (path / arch / "initramfs.cpio").write_bytes(b"070701")
    monkeypatch.setenv("VMETTE_ASSETS_DIR", str(path))
    return path


def config(**changes: Any) -> MachineConfig:
    return MachineConfig(**{"root": None, "arch": "x86_64", **changes})


# --- Share


@pytest.mark.parametrize("tag", GOOD_TAGS)
def test_tags_that_are_taken(directory: Path, tag: str) -> None:
    assert Share(tag, directory).tag == Share.parse(f"{tag}={directory}").tag == tag


@pytest.mark.parametrize(("problem", "tag"), [(problem, tag) for problem, tags in BAD_TAGS.items() for tag in tags])
def test_tags_that_are_refused(directory: Path, problem: str, tag: str) -> None:
    match = f"^share tag {re.escape(repr(tag))} is {problem}"
    with pytest.raises(ConfigError, match=match):
        Share(tag, directory)
    with pytest.raises(ConfigError, match=match):
        Share.parse(f"{tag}={directory}")


@pytest.mark.parametrize(
    ("ending", "name", "read_only"),
    [
        ("", "d", False),
        (":rw", "d", False),
        (":ro", "d", True),
        ("", "d=e", False),
        (":ro", "d:e", True),
        ("", "d:RO", False),
        (":rw", "d:ro", False),
        (":ro", "d:rw", True),
        (":ro", " d ", True),
    ],
)
def test_share_on_the_command_line(tmp_path: Path, ending: str, name: str, read_only: bool) -> None:
    (tmp_path / name).mkdir()
    assert Share.parse(f"tag={tmp_path / name}{ending}") == Share("tag", tmp_path / name, read_only)


@pytest.mark.parametrize("text", ["", "tag", "tag=", "tag=:ro", "tag=:rw", "/directory"])
def test_share_on_the_command_line_that_is_malformed(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^share {re.escape(repr(text))} is malformed: it is TAG=PATH"):
        Share.parse(text)


@pytest.mark.parametrize("path", [".", "./sub", "sub"])
def test_share_of_a_relative_path(directory: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    (directory / "sub").mkdir()
    monkeypatch.chdir(directory)
    assert Share.parse(f"tag={path}").path == Path(path)


def test_share_of_a_symlink_keeps_it(directory: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(directory)
    assert Share("tag", tmp_path / "current").path == tmp_path / "current"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("missing", " does not exist"),
        ("dangling", " does not exist"),
        ("file", " is not a directory"),
        ("file/x", ": Not a directory"),
        ("loop", ": Too many levels of symbolic links"),
        ("n" * 256, ": File name too long"),
        ("a\0b", ": embedded null byte"),
    ],
)
def test_share_of_what_is_no_directory(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ConfigError) as caught:
        Share("tag", tmp_path / name)
    assert str(caught.value) == f"share tag: {tmp_path / name}{problem}"


# --- Share, as a volume


@pytest.mark.parametrize(
    ("ending", "name", "target", "read_only"),
    [
        ("", "d", "/data", False),
        (":ro", "d", "/data", True),
        (":rw", "d", "/a b/c", False),
        ("", "d:e", "/x", False),
        (":ro", "d:/e", "/x:y", True),
        ("", "d", "/dev2", False),
        ("", "d", "/mnt/./x/", False),
    ],
)
def test_volume_on_the_command_line(tmp_path: Path, ending: str, name: str, target: str, read_only: bool) -> None:
    (tmp_path / name).mkdir(parents=True)
    made = Share.volume(f"{tmp_path / name}:{target}{ending}")
    assert made == Share("", tmp_path / name, read_only, target)


@pytest.mark.parametrize("text", ["", "x", "/x", ":/x", "/x:", "/x:y", "/x:ro", "/x:y:ro"])
def test_volume_on_the_command_line_that_is_malformed(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^volume {re.escape(repr(text))} is malformed: it is HOST:GUEST"):
        Share.volume(text)


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("data", "the place in the guest is an absolute path without '..'"),
        ("", "the place in the guest is an absolute path without '..'"),
        ("/a/../b", "the place in the guest is an absolute path without '..'"),
        ("/a\0b", "the place in the guest is an absolute path without '..'"),
        ("/\ud800", "the place in the guest is no text"),
        ("/", "that place is the guest's own; choose another one"),
        ("//.", "that place is the guest's own; choose another one"),
        ("/proc", "that place is the guest's own; choose another one"),
        ("//./sys/x", "that place is the guest's own; choose another one"),
        ("/dev/shm", "that place is the guest's own; choose another one"),
    ],
)
def test_places_that_a_volume_cannot_have(directory: Path, target: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Share("", directory, target=target)
    assert str(caught.value) == f"volume {target!r}: {problem}"


def test_volumes_get_tags_that_nobody_has(payload: Path, directory: Path) -> None:
    volumes = [Share("", directory, target=f"/{number}") for number in range(3)]
    shares = (volumes[0], Share("volume1", directory), volumes[1], Share("named", directory, target="/x"), volumes[2])
    assert [share.tag for share in config(shares=shares).shares] == [
        "volume0",
        "volume1",
        "volume2",
        "named",
        "volume3",
    ]
    assert [share.target for share in config(shares=shares).shares] == ["/0", None, "/1", "/x", "/2"]


def test_volume_of_what_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        Share.volume(f"{tmp_path}/missing:/data")
    assert str(caught.value) == f"volume /data: {tmp_path}/missing does not exist"


# --- Disk


@pytest.mark.parametrize(
    ("text", "path", "read_only"),
    [("d", "d", False), ("d:ro", "d", True), ("d:rw", "d", False), ("d:ro:rw", "d:ro", False)],
)
def test_disk_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, path: str, read_only: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / path).write_bytes(bytes(512))
    assert Disk.parse(text) == Disk(Path(path), read_only)


@pytest.mark.parametrize("text", ["", ":ro", ":rw"])
def test_disk_on_the_command_line_that_is_malformed(text: str) -> None:
    with pytest.raises(ConfigError, match=f"^disk {re.escape(repr(text))} is malformed: it is PATH or PATH:ro$"):
        Disk.parse(text)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("missing", ": No such file or directory"),
        ("directory", " is neither a regular file nor a block device"),
        ("fifo", " is neither a regular file nor a block device"),
        ("empty", " has 0 bytes; a raw image has a multiple of 512"),
        ("odd", " has 513 bytes; a raw image has a multiple of 512"),
        ("a\0b", ": embedded null byte"),
    ],
)
def test_what_is_no_disk(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    (tmp_path / "odd").write_bytes(bytes(513))
    with pytest.raises(ConfigError) as caught:
        Disk(tmp_path / name)
    assert str(caught.value) == f"disk {tmp_path / name}{problem}"


def test_disks_there_can_be(payload: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(512))
    disks = (Disk(tmp_path / "disk"),) * 9
    assert config(disks=disks[:8]).disks == disks[:8]
    with pytest.raises(ConfigError, match=r"^9 disks: there can be at most 8$"):
        config(disks=disks)


@pytest.mark.parametrize(
    ("text", "mib"), [("64", 64), ("512M", 512), ("8G", 8192), ("16", 16), ("16384G", 16 << 20), ("1G", 1024)]
)
def test_scratch_sizes(text: str, mib: int) -> None:
    assert scratch_size(text) == mib


@pytest.mark.parametrize("text", ["", "G", "8g", "8GB", "1.5G", "-8G", "8 G", "8T", "0x10", "\u0664", "1" * 10])
def test_scratch_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        scratch_size(text)
    assert str(caught.value) == f"scratch size {text!r} is malformed: it is like 8G, 512M or 64 (MiB)"


@pytest.mark.parametrize("text", ["0", "15", "0G", "16385G"])
def test_scratch_sizes_that_are_too_small_or_too_large(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^[0-9]+ MiB of scratch: there can be 16 to 16777216$"):
        scratch_size(text)


UNREADABLE = """
import os, sys
from pathlib import Path
from vmette.config import MachineConfig, Share
from vmette.errors import VmetteError
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
for make in (
    lambda: Share("tag", Path("closed/directory")),
    lambda: MachineConfig(None, kernel=Path("closed/kernel"), initramfs=Path("closed/initramfs")),
    lambda: MachineConfig(None),
):
    try:
        make()
    except VmetteError as error:
        print(error)
"""


def test_what_may_not_be_read_is_said_so(directory: Path) -> None:
    closed = directory / "closed"
    (closed / "directory").mkdir(parents=True)
    (closed / "kernel").write_bytes(ELF)
    directory.chmod(0o755)
    closed.chmod(0o000)
    try:
        done = subprocess.run(
            [sys.executable, "-c", UNREADABLE],
            cwd=directory,
            env={**os.environ, "VMETTE_ASSETS_DIR": "closed"},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    finally:
        closed.chmod(0o755)
    assert done.stdout.splitlines() == [
        "share tag: closed/directory: Permission denied",
        "cannot read the kernel closed/kernel: Permission denied",
        f"cannot read closed/{assets.host_arch()}/{assets.KERNELS[assets.host_arch()]}: Permission denied",
    ]


# --- The architecture of a machine


@pytest.mark.parametrize(
    ("vmm", "host", "arch", "platform", "expected"),
    [
        ("qemu", "x86_64", None, None, ("x86_64", False)),
        ("qemu", "x86_64", None, "linux/amd64", ("x86_64", False)),
        ("qemu", "x86_64", None, "linux/arm64/v8", ("aarch64", False)),
        ("qemu", "x86_64", "arm64", "linux/arm64", ("aarch64", False)),
        ("qemu", "aarch64", None, "linux/amd64", ("x86_64", False)),
        ("qemu", "x86_64", "aarch64", None, ("aarch64", False)),
        ("qemu", "x86_64", None, "nonsense", ("x86_64", False)),
        ("vz", "aarch64", None, None, ("aarch64", False)),
        ("vz", "aarch64", None, "linux/arm64", ("aarch64", False)),
        ("vz", "aarch64", None, "linux/amd64", ("aarch64", True)),
        ("vz", "aarch64", "aarch64", "linux/amd64", ("aarch64", True)),
        ("vz", "aarch64", "x86_64", "linux/amd64", ("x86_64", False)),
    ],
)
def test_the_architecture_follows_from_what_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, vmm: str, host: str, arch: str | None, platform: str | None, expected: object
) -> None:
    monkeypatch.setenv("VMETTE_VMM", vmm)
    monkeypatch.setattr(assets, "host_arch", lambda: host)
    assert architecture(arch, platform) == expected


@pytest.mark.parametrize(
    ("arch", "platform", "message"),
    [
        (None, "linux/386", "no machine here runs images for linux/386: there are linux/amd64 and linux/arm64"),
        ("x86_64", "linux/arm64", "an image for linux/arm64 does not run in a machine for x86_64: leave out one of "),
        ("sparc", None, "architecture 'sparc' is not supported"),
    ],
)
def test_an_image_that_no_machine_runs(
    monkeypatch: pytest.MonkeyPatch, arch: str | None, platform: str | None, message: str
) -> None:
    monkeypatch.setenv("VMETTE_VMM", "qemu")
    with pytest.raises(ConfigError, match=message):
        architecture(arch, platform)


def test_a_vmm_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMETTE_VMM", "xen")
    with pytest.raises(ConfigError, match="VMETTE_VMM is 'xen'; it can be qemu or vz"):
        architecture("aarch64", "linux/amd64")


# --- MachineConfig


@pytest.mark.parametrize(
    "changes",
    [
        {"vcpus": 1},
        {"vcpus": 16},
        {"mem_mib": 64},
        {"mem_mib": 1 << 20},
        {"accel": "kvm"},
        {"accel": "tcg"},
        {"cmdline": "a=b c"},
        {"scratch_mib": 16},
        {"scratch_mib": 16 << 20},
        {"vsock": True},
        {"pids": 1},
        {"nofile": 16},
        {"nofile": 1 << 20},
        {"hostname": "a"},
        {"hostname": "Web-1.example.org"},
        {"hostname": "a" * 63},
    ],
)
def test_values_within_the_limits(payload: Path, changes: dict[str, object]) -> None:
    made = config(**changes)
    assert {name: getattr(made, name) for name in changes} == changes


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"vcpus": 0}, "0 vcpus: there can be 1 to 16"),
        ({"vcpus": -1}, "-1 vcpus: there can be 1 to 16"),
        ({"vcpus": 17}, "17 vcpus: there can be 1 to 16"),
        ({"mem_mib": 63}, "63 MiB of memory: it can be 64 to 1048576"),
        ({"mem_mib": (1 << 20) + 1}, "1048577 MiB of memory: it can be 64 to 1048576"),
        ({"accel": "hvf"}, "accelerator 'hvf' is not known; there are auto, kvm, tcg"),
        ({"accel": ""}, "accelerator '' is not known; there are auto, kvm, tcg"),
        ({"arch": "riscv64"}, "architecture 'riscv64' is not supported; there are x86_64 and aarch64"),
        ({"scratch_mib": 15}, "15 MiB of scratch: there can be 16 to 16777216"),
        ({"scratch_mib": (16 << 20) + 1}, "16777217 MiB of scratch: there can be 16 to 16777216"),
        (
            {"scratch_mib": 16, "root_read_only": True},
            "a scratch disk is for writing to the root filesystem, which is to be read-only",
        ),
        ({"pids": 0}, "0 processes: there can be 1 to 4194304"),
        ({"nofile": 15}, "15 open files: there can be 16 to 1048576"),
        *[
            ({"hostname": name}, f"{name!r} is no host name: letters, digits, '-' and '.', at most 64")
            for name in ("", "-a", "a-", "a..b", ".a", "a b", "a_b", "a\n", "caf\u00e9", "a" * 64, "a.b" * 22)
        ],
        ({"cmdline": "a\nb"}, "the kernel command line must be one line"),
        ({"cmdline": "a\0b"}, "the kernel command line must be one line"),
    ],
)
def test_values_beyond_the_limits(payload: Path, changes: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert str(caught.value) == problem
    assert caught.value.exit_code == 2


def test_values_unless_told_otherwise(payload: Path) -> None:
    made = config()
    assert (made.vcpus, made.mem_mib, made.accel, made.cmdline, made.shares) == (1, 512, "auto", "", ())
    assert made.root_read_only is False


def test_shares_there_can_be(payload: Path, directory: Path) -> None:
    shares = tuple(Share(f"tag{number}", directory) for number in range(17))
    assert config(shares=shares[:16]).shares == shares[:16]
    with pytest.raises(ConfigError, match="17 shares: there can be at most 16"):
        config(shares=shares)
    with pytest.raises(ConfigError, match="share tag 'tag2' is used twice"):
        config(shares=(*shares[:4], shares[2]))


def test_kernel_and_initramfs_are_the_payloads_unless_given(payload: Path, tmp_path: Path) -> None:
    assert config().kernel_path == payload / "x86_64/vmlinux"
    assert config(arch="arm64").kernel_path == payload / "aarch64/Image"
    assert config(arch="arm64").initramfs_path == payload / "aarch64/initramfs.cpio"
    for name in ("kernel", "initramfs"):
        (tmp_path / name).write_bytes(ELF)
    given = config(kernel=tmp_path / "kernel", initramfs=tmp_path / "initramfs")
    assert (given.kernel_path, given.initramfs_path) == (tmp_path / "kernel", tmp_path / "initramfs")


@pytest.mark.parametrize("alias", ["amd64", "x86_64"])
def test_the_architecture_goes_by_one_name(payload: Path, alias: str) -> None:
    assert config(arch=alias).arch == "x86_64"


def test_the_architecture_is_the_hosts_unless_given(payload: Path) -> None:
    assert MachineConfig(None).arch == assets.host_arch()


@pytest.mark.parametrize(
    ("arch", "content", "good"),
    [
        ("x86_64", ELF, True),
        ("x86_64", BZ_IMAGE, True),
        ("x86_64", ARM_IMAGE, False),
        ("x86_64", b"", False),
        ("x86_64", b"#!/bin/sh\n", False),
        ("x86_64", b"\x7fEL", False),
        ("x86_64", bytes(513) + b"HdrS", False),
        ("aarch64", ARM_IMAGE, True),
        ("aarch64", ELF, False),
        ("aarch64", BZ_IMAGE, False),
        ("aarch64", b"\x1f\x8b" + bytes(2000), False),
        ("aarch64", ARM_IMAGE[:59], False),
    ],
)
def test_what_is_a_kernel(payload: Path, tmp_path: Path, arch: str, content: bytes, good: bool) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(content)
    if good:
        assert config(arch=arch, kernel=path).kernel == path
    else:
        with pytest.raises(PayloadError) as caught:
            config(arch=arch, kernel=path)
        assert str(caught.value) == f"{path} is no {arch} Linux kernel"


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("kernel", lambda path: {"kernel": path}),
        ("initramfs", lambda path: {"initramfs": path}),
        ("root image", lambda path: {"root": BlockImage(path, BlockFs.EROFS)}),
    ],
)
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("missing", "No such file or directory"),
        ("directory", "Is a directory"),
        ("fifo", "it is no regular file"),
        ("a\0b", "embedded null byte"),
    ],
)
def test_files_that_cannot_be_read(
    payload: Path, directory: Path, what: str, change: Callable[[Path], dict[str, Any]], name: str, problem: str
) -> None:
    os.mkfifo(directory.parent / "fifo")
    path = directory.parent / name
    with pytest.raises(PayloadError) as caught:
        config(**change(path))
    assert str(caught.value) == f"cannot read the {what} {path}: {problem}"


# --- assets


@pytest.mark.parametrize(
    ("name", "ours"), [("x86_64", "x86_64"), ("amd64", "x86_64"), ("aarch64", "aarch64"), ("arm64", "aarch64")]
)
def test_architectures_by_their_names(name: str, ours: str) -> None:
    assert assets.canonical_arch(name) == ours


@pytest.mark.parametrize("name", ["", "X86_64", "i686", "armv7l", "x86_64 "])
def test_architectures_that_have_no_guest(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^architecture '{name}' is not supported; there are x86_64 and aarch64$"):
        assets.canonical_arch(name)


CACHE_VARIABLES = ("VMETTE_CACHE_DIR", "XDG_CACHE_HOME", "HOME")


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (("/v", "/x", "/h"), "/v"),
        (("v", "/x", "/h"), "v"),
        (("", "/x", "/h"), "/x/vmette"),
        ((None, "/x", "/h"), "/x/vmette"),
        ((None, "", "/h"), "/h/.cache/vmette"),
        ((None, "x", "/h"), "/h/.cache/vmette"),
        ((None, None, "/h"), "/h/.cache/vmette"),
    ],
)
def test_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch, environment: tuple[str | None, ...], expected: str
) -> None:
    for name, value in zip(CACHE_VARIABLES, environment, strict=True):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert assets.cache_root() == Path(expected)


def test_where_macos_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setenv("HOME", "/h")
    for name in ("CACHE", "STATE", "CONFIG"):
        monkeypatch.delenv(f"XDG_{name}_HOME", raising=False)
        monkeypatch.delenv(f"VMETTE_{name}_DIR", raising=False)
    assert assets.cache_root() == Path("/h/Library/Caches/vmette")
    assert assets.state_root() == assets.config_root() == Path("/h/Library/Application Support/vmette")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert assets.cache_root() == Path("/x/vmette")


def test_no_home_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    for name in CACHE_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(ConfigError, match="set VMETTE_CACHE_DIR"):
        assets.cache_root()


GETTERS: list[tuple[Callable[[str], Path], str]] = [
    (assets.kernel, "Image"),
    (assets.initramfs, "initramfs.cpio"),
    (assets.base_image, "base.squashfs"),
]


@pytest.mark.parametrize(("get", "name"), GETTERS)
def test_payload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, get: Callable[[str], Path], name: str) -> None:
    monkeypatch.setenv("VMETTE_ASSETS_DIR", str(tmp_path))
    path = tmp_path / "aarch64" / name
    expected = f"{path} is missing: run `make payload-aarch64` in a checkout, or set VMETTE_ASSETS_DIR"
    with pytest.raises(PayloadError, match=f"^{re.escape(expected)}"):
        get("aarch64")
    path.mkdir(parents=True)
    with pytest.raises(PayloadError, match=f"^{re.escape(expected)}"):
        get("aarch64")
    path.rmdir()
    path.touch()
    assert get("aarch64") == path


def test_payload_is_within_the_package_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_file", lambda self: True)
    for value in (None, ""):
        monkeypatch.delenv("VMETTE_ASSETS_DIR", raising=False)
        if value is not None:
            monkeypatch.setenv("VMETTE_ASSETS_DIR", value)
        expected = Path(assets.__file__).parent / "_payload" / assets.host_arch() / "base.squashfs"
        assert assets.base_image() == expected


# --- the kernel's command line


def tokens(made: MachineConfig, accel: str = "kvm", root_type: str = "", kind: str = "9p") -> list[str]:
    return kernel_cmdline(made, accel, root_type, [(share, kind) for share in made.shares]).split(" ")


COMMON = ["console=hvc0", "quiet", "panic=-1"]


@pytest.mark.parametrize(
    ("arch", "accel", "more"),
    [("x86_64", "kvm", ["pci=off"]), ("aarch64", "kvm", []), ("aarch64", "tcg", [])],
)
def test_cmdline_of_each_machine(payload: Path, arch: str, accel: str, more: list[str]) -> None:
    assert tokens(config(arch=arch), accel) == COMMON + more


@pytest.mark.parametrize(("khz", "more"), [(0, []), (2_400_000, ["tsc_early_khz=2400000"])])
def test_cmdline_of_an_emulated_x86_takes_the_calibration_away(
    payload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, khz: int, more: list[str]
) -> None:
    monkeypatch.setenv("VMETTE_CACHE_DIR", str(tmp_path))
    measured = iter([khz, khz + 9, khz - 9] * (1 if khz else 2))  # what is not known is not remembered
    native = SimpleNamespace(lib=SimpleNamespace(vmette_tsc_khz=lambda: next(measured)))
    monkeypatch.setitem(sys.modules, "vmette._native", native)
    for _ in range(2):  # measured once in a run of this computer
        assert tokens(config(), "tcg") == [*COMMON, "pci=off", "no_timer_check", "tsc=reliable", *more]
    assert tokens(replace(config(), saved=Saved(tmp_path)), "tcg") == [*COMMON, "pci=off"]  # it knows already
    monkeypatch.setattr("vmette.vmm.probe.BOOT_ID", tmp_path / "another")
    with pytest.raises(RuntimeError, match="StopIteration"):  # it is measured again
        tokens(config(), "tcg")


@pytest.mark.parametrize("fstype", list(BlockFs))
def test_cmdline_of_a_block_root(payload: Path, tmp_path: Path, fstype: BlockFs) -> None:
    (tmp_path / "image").touch()
    made = config(arch="aarch64", root=BlockImage(tmp_path / "image", fstype))
    assert tokens(made) == [*COMMON, f"vmette.rootfs_block={fstype.value}"]


@pytest.mark.parametrize("root_type", ["virtiofs", "9p"])
@pytest.mark.parametrize("read_only", [False, True])
def test_cmdline_of_a_directory_root(payload: Path, directory: Path, root_type: str, read_only: bool) -> None:
    made = config(arch="aarch64", root=Directory(directory), root_read_only=read_only)
    expected = [*COMMON, f"vmette.rootfs_share={root_type}:rootfs", *(["vmette.rootfs_ro"] if read_only else [])]
    assert tokens(made, root_type=root_type) == expected


def test_cmdline_of_shares_and_the_users_own_at_the_end(payload: Path, directory: Path) -> None:
    shares = (Share("a", directory), Share("b", directory, read_only=True))
    made = config(arch="aarch64", shares=shares, cmdline="mine=1 vmette.hostname=x")
    expected = ["vmette.share=virtiofs:a:rw", "vmette.share=virtiofs:b:ro", "mine=1", "vmette.hostname=x"]
    assert tokens(made, kind="virtiofs") == [*COMMON, *expected]


def test_cmdline_of_volumes_the_outer_before_the_inner(payload: Path, directory: Path) -> None:
    places = ("/a/b c", "/a", '/100%/\u00e9:"x"\n')
    shares = (*(Share("", directory, target=place) for place in places), Share("tag", directory, read_only=True))
    assert tokens(config(shares=shares))[-4:] == [
        "vmette.share=9p:tag:ro",
        "vmette.share=9p:volume1:rw:/a",
        "vmette.share=9p:volume0:rw:/a/b%20c",
        "vmette.share=9p:volume2:rw:/100%25/%C3%A9%3A%22x%22%0A",
    ]


def test_cmdline_of_limits(payload: Path) -> None:
    made = config(pids=5, nofile=64, hostname="other", guest_helpers=True)
    assert tokens(made)[-4:] == ["vmette.hostname=other", "vmette.pids=5", "vmette.nofile=64", "vmette.helpers"]


@pytest.mark.parametrize("letter", ["x", "\u00e9", "\udcff"])
def test_cmdline_that_is_too_long(payload: Path, letter: str) -> None:
    size = len(os.fsencode(letter))
    used = len(" ".join(COMMON)) + 1
    fits = letter * ((CMDLINE_BYTES - used) // size)
    fits += "x" * (CMDLINE_BYTES - used - size * len(fits))
    line = kernel_cmdline(config(arch="aarch64", cmdline=fits), "kvm", "", ())
    assert len(os.fsencode(line)) == 2047
    with pytest.raises(ConfigError) as caught:
        kernel_cmdline(config(arch="aarch64", cmdline=f"{fits}x"), "kvm", "", ())
    assert str(caught.value) == "the kernel command line is 2048 bytes long; at most 2047 fit"


def test_all_these_errors_are_vmettes() -> None:
    assert issubclass(ConfigError, VmetteError)
    assert issubclass(PayloadError, VmetteError)
    assert (ConfigError.exit_code, PayloadError.exit_code) == (2, 125)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("SIGTERM", 15), ("TERM", 15), ("sigterm", 15), ("15", 15), ("SIGQUIT", 3), ("SIGWINCH", 28), ("SIGSYS", 31)),
        *(("SIGRTMIN", 34), ("SIGRTMIN+3", 37), ("RTMIN+30", 64), ("64", 64), ("SIGKILL", 9), ("USR2", 12)),
    ],
)
def test_signals_have_linux_numbers(text: str, number: int) -> None:
    assert signal_number(text) == number


@pytest.mark.parametrize("text", ["", "SIG", "0", "65", "-9", "1.5", "SIGNO", "SIGRTMIN+31", "SIGRTMIN-1", "²", "9 "])
def test_signals_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="is not known"):
        signal_number(text)

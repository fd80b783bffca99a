"""Directories of the host in the guest: as shares and as root, over virtio-fs and over 9p."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmette
from tests.vm.support import BASE, Cli
from vmette.tree import stat_tree
from vmette.vmm import qemu, virtiofsd


@pytest.fixture(params=[pytest.param("virtiofs", marks=pytest.mark.only_qemu), "9p"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways that shares go, whatever of them this host would choose. Data goes well over virtio-fs under emulation
    too; what may not be run over it is code (see `file_server`)."""
    server = None if request.param == "9p" else virtiofsd.find()
    assert request.param == "9p" or server is not None
    monkeypatch.setattr(qemu, "file_server", lambda accel: server)
    return str(request.param)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    directory = tmp_path / "shared, with a comma"
    directory.mkdir()
    (directory / "file").write_bytes(b"of the host\n")
    (directory / "file").chmod(0o640)
    (directory / "link").symlink_to("file")
    return directory


def guest(share: vmette.Share, script: str, **options: object) -> vmette.CompletedProcess[str]:
    return vmette.run(BASE, ["sh", "-c", script], shares=[share], text=True, **options)  # type: ignore[call-overload,no-any-return]


def test_a_share_is_read_and_written(shared: Path, transport: str) -> None:
    script = (
        "cd /mnt/work && cat link && stat -c %a file && mkdir -p a/b && echo guest >a/b/c && ln -s c a/b/d && rm file"
    )
    done = guest(vmette.Share("work", shared), script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "of the host\n640\n", "")
    assert (shared / "a/b/c").read_text() == "guest\n"
    assert (shared / "a/b/d").readlink() == Path("c")
    assert not (shared / "file").exists()


def test_the_transport_is_the_one_that_was_meant(tmp_path: Path, transport: str) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    done = guest(vmette.Share("work", plain), "awk '$2 == \"/mnt/work\" {print $3}' /proc/mounts")
    assert done.stdout.strip() == transport


def test_what_was_written_last_is_on_the_host_when_the_run_is_over(shared: Path, transport: str) -> None:
    done = guest(vmette.Share("work", shared), "head -c 20000000 /dev/zero >/mnt/work/zeros")
    assert done.returncode == 0
    assert (shared / "zeros").stat().st_size == 20_000_000
    assert not (shared / "zeros").read_bytes().strip(b"\0")


# Root in the guest may make a mount writable, or mount the device anew without the guest's own check.
ATTACKS = """
cd /
try() { "$@" 2>/dev/null && echo "DID: $*"; }
attack() {
    try sh -c 'echo bad >/mnt/work/new'
    try sh -c 'echo bad >>/mnt/work/file'
    try mkdir /mnt/work/directory
    try rm -f /mnt/work/file
    try mv /mnt/work/file /mnt/work/other
    try chmod 777 /mnt/work/file
    try chown 1:1 /mnt/work/file
    try ln -s x /mnt/work/symlink
    try ln /mnt/work/file /mnt/work/hard
    try mknod /mnt/work/node c 1 3
    try truncate -s 0 /mnt/work/file
    try touch -d '2001-01-01' /mnt/work/file
}
type=$(awk '$2 == "/mnt/work" {print $3}' /proc/mounts)
mount -o remount,rw /mnt/work && echo writable
attack
umount /mnt/work && mount -t $type -o $OPTIONS work /mnt/work && echo again
attack
cat /mnt/work/file
"""


def test_a_read_only_share_is_so_on_the_hosts_side(shared: Path, transport: str) -> None:
    before = (stat_tree(shared), (shared / "file").stat())
    options = {"9p": "rw,trans=virtio,version=9p2000.L,access=any", "virtiofs": "rw"}
    # The daemon of Debian 12 knows no read-only: such a share goes over 9p there.
    kind = transport if transport == "9p" or getattr(virtiofsd.find(), "read_only", False) else "9p"
    done = guest(vmette.Share("work", shared, read_only=True), ATTACKS, env={"OPTIONS": options[kind]})
    assert done.stdout == "writable\nagain\nof the host\n"
    after = (stat_tree(shared), (shared / "file").stat())
    assert after[0] == before[0]
    assert after[1][:7] == before[1][:7]


def test_a_symlink_to_the_outside_leads_into_the_guest(tmp_path: Path, shared: Path, transport: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("of the host\n")
    (shared / "out").symlink_to(secret)
    (shared / "up").symlink_to("../../../../../../.." + str(secret))
    script = "cat /mnt/work/out /mnt/work/up; ls /mnt/work/../../etc/passwd; cd /mnt/work && cat ../secret"
    done = guest(vmette.Share("work", shared), script)
    assert done.stdout == "/mnt/work/../../etc/passwd\n"


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """A root filesystem with just busybox in it."""
    root = tmp_path / "tree"
    for name in ("bin", "etc", "usr"):
        (root / name).mkdir(parents=True)
    (root / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (root / "bin/busybox").chmod(0o755)
    (root / "bin/sh").symlink_to("busybox")
    (root / "etc/owned").write_text("")
    os.chown(root / "etc/owned", 12, 34)
    yield root


def test_a_directory_is_the_root_and_is_never_written_to(tree: Path) -> None:
    before = stat_tree(tree)
    script = """
    busybox stat -c '%u:%g' /etc/owned
    echo x >/etc/owned && busybox rm /bin/busybox.copy; busybox cp /bin/busybox /bin/busybox.copy && echo copied
    busybox rm /etc/owned && echo removed
    busybox mkdir -p /tmp/lower
    for kind in virtiofs '9p -o trans=virtio,version=9p2000.L'; do
        busybox mount -t $kind rootfs /tmp/lower && echo bad >/tmp/lower/bad
    done
    """
    done = vmette.run(tree, ["sh", "-c", script], text=True)
    assert done.stdout == "12:34\ncopied\nremoved\n"
    assert stat_tree(tree) == before
    assert not (tree / "bad").exists()
    assert vmette.run(tree, ["sh", "-c", "busybox rm /etc/owned"], rootfs_ro=True).returncode == 1


@pytest.mark.parametrize("place", ["proc", "dev", "tmp", "mnt", "run"])
def test_a_root_that_has_a_link_where_we_mount_is_refused(tree: Path, place: str) -> None:
    (tree / place).symlink_to("usr")
    share = vmette.Share("work", tree)
    with pytest.raises(vmette.GuestError, match=f"cannot make /{place} in the root filesystem: Not a directory"):
        vmette.run(tree, ["true"], shares=[share])


def test_the_hosts_files_are_not_written_through_links_in_etc(tree: Path) -> None:
    (tree / "etc/hosts").symlink_to("owned")
    done = vmette.run(tree, ["sh", "-c", "busybox cat /etc/hosts; busybox wc -c </etc/owned"], text=True)
    assert done.stdout.startswith("127.0.0.1\tlocalhost")
    assert done.stdout.endswith("\n0\n")


def test_many_shares(tmp_path: Path, cli: Cli) -> None:
    options = []
    for number in range(16):
        (tmp_path / f"d{number}").mkdir()
        (tmp_path / f"d{number}/name").write_text(f"{number}\n")
        options += ["--share", f"t{number}={tmp_path}/d{number}{':ro' if number % 2 else ''}"]
    done = cli("run", *options, BASE, "--", "sh", "-c", "cat $(ls -v /mnt/*/name)")
    assert done.stdout.split() == [str(number).encode() for number in range(16)]


def test_a_debian_tree_is_a_root(debian: Path) -> None:
    before = stat_tree(debian)
    script = "cat /etc/debian_version; apt-get --version | head -1; "
    script += "perl -e 'print 6 * 7, qq(\\n)'; rm -rf /usr/share/doc; id -un"
    done = vmette.run(debian, ["bash", "-c", script], text=True, user="daemon")
    version, apt, answer, name = done.stdout.splitlines()
    assert version == (debian / "etc/debian_version").read_text().strip()
    assert apt.startswith("apt ")
    assert (answer, name) == ("42", "daemon")
    assert vmette.run(debian, ["bash", "-c", "rm -rf /usr/share/doc && echo x >/etc/motd"]).returncode == 0
    assert stat_tree(debian) == before

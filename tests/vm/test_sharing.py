"""Directories of this host in a sandbox that runs already."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import os
import socket
import stat
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE

import pytest

import vmette
from tests.vm.support import BASE, wait_until
from vmette.config import Command
from vmette.process import Popen


@pytest.fixture
def sandbox() -> Iterator[vmette.Sandbox]:
    with vmette.Sandbox(BASE) as sandbox:
        yield sandbox


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    (tree / "below").mkdir(parents=True)
    (tree / "file").write_text("of the host\n")
    (tree / "below/program").write_text("#!/bin/sh\necho it runs\n")
    (tree / "below/program").chmod(0o755)
    (tmp_path / "secret").write_text("secret\n")
    return tree


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """No thread, no descriptor."""
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    yield
    gc.collect()
    wait_until(lambda: not [t for t in threading.enumerate() if t.name == "vmette-share"], "the end of the threads")
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def text(sandbox: vmette.Sandbox, script: str, user: str | None = None) -> str:
    return str(sandbox.run(["sh", "-c", script], text=True, check=True, user=user).stdout)


def test_it_is_there_and_goes_away(sandbox: vmette.Sandbox, tree: Path) -> None:
    with sandbox.share(tree, "/work/here") as shared:
        assert text(sandbox, "cat /work/here/file; /work/here/below/program") == "of the host\nit runs\n"
        text(sandbox, "cd /work/here; echo new > new; mkdir -p a/b; mv new a/b; rm file; ln -s nowhere link; sync")
        assert (tree / "a/b/new").read_text() == "new\n"
        assert not (tree / "file").exists()
        assert (tree / "link").readlink() == Path("nowhere")
        assert repr(shared) == f"<vmette.SharedDirectory {tree} at /work/here>"
    assert text(sandbox, "ls -A /work/here; grep -c fuse /proc/mounts || true") == "0\n"
    shared.close()
    with sandbox.share(tree, "/work/here"):
        assert text(sandbox, "cat /work/here/a/b/new") == "new\n"


def test_much_of_everything(sandbox: vmette.Sandbox, tree: Path) -> None:
    data = os.urandom(20_000_001)
    (tree / "large").write_bytes(data)
    for number in range(500):
        (tree / f"below/{number}").write_text(f"{number}")
    with sandbox.share(tree, "/work"):
        script = (
            "cp /work/large /work/copy; sha256sum < /work/copy; ls /work/below | wc -l; cat /work/below/[0-9]* | wc -c"
        )
        sums = text(sandbox, script).split()
    assert sums == [hashlib.sha256(data).hexdigest(), "-", "501", str(sum(len(str(n)) for n in range(500)))]
    assert (tree / "copy").read_bytes() == data


def test_many_at_once(sandbox: vmette.Sandbox, tree: Path) -> None:
    """Reading and writing in both directions, so that all that is on the way is full."""
    data = os.urandom(3_000_000)
    (tree / "data").write_bytes(data)
    with sandbox.share(tree, "/work"), ThreadPoolExecutor(6) as pool:
        script = "cat /work/data /work/data > /work/{0}; sha256sum < /work/{0}"
        sums = set(pool.map(lambda number: text(sandbox, script.format(number)), range(6)))
    assert sums == {f"{hashlib.sha256(data + data).hexdigest()}  -\n"}


def test_holes_and_pieces(sandbox: vmette.Sandbox, tree: Path) -> None:
    (tree / "db").write_bytes(b"0" * 4096)
    with sandbox.share(tree, "/work"):
        text(sandbox, "dd if=/dev/zero of=/work/db bs=1024 seek=2048 count=1; echo x | dd of=/work/db conv=notrunc")
        text(sandbox, "for i in 1 2 3; do echo $i >> /work/log; done")
    assert (tree / "db").stat().st_size == 2049 * 1024
    assert (tree / "db").read_bytes()[:4] == b"x\n00"
    assert (tree / "log").read_text() == "1\n2\n3\n"


def test_read_only_is_so_on_this_side(sandbox: vmette.Sandbox, tree: Path) -> None:
    before = sorted(tree.rglob("*"))
    with sandbox.share(tree, "/work", read_only=True) as shared:
        assert shared.read_only
        assert text(sandbox, "cat /work/file") == "of the host\n"
        # The guest's root can have its kernel try.
        text(sandbox, "mount -o remount,rw /work")
        for attempt in (
            "echo x > file",
            "echo x > new",
            "mkdir new",
            "rm file",
            "mv file new",
            "chmod 777 file",
            "ln -s a b",
        ):
            done = sandbox.run(["sh", "-c", f"cd /work; {attempt}"], text=True)
            assert done.returncode != 0
            assert "Read-only file system" in done.stderr, attempt
    assert sorted(tree.rglob("*")) == before
    assert (tree / "file").read_text() == "of the host\n"


def test_nothing_outside_is_reached(sandbox: vmette.Sandbox, tree: Path) -> None:
    (tree / "out").symlink_to(tree.parent / "secret")
    (tree / "up").symlink_to("..")
    (tree / "absolute").symlink_to("/etc/hostname")
    with sandbox.share(tree, "/work"):
        assert sandbox.run(["cat", "/work/out"]).returncode != 0
        assert "secret" not in text(sandbox, "ls -a /work/up/ /work/..; cd /work; ls -a .. ../..")
        assert sandbox.run(["sh", "-c", "echo x > /work/up/escaped"]).returncode == 0  # which is the guest's own /
    assert not (tree.parent / "escaped").exists()
    assert (tree.parent / "secret").read_text() == "secret\n"


def test_a_user_of_the_guest_has_a_user_s_rights(sandbox: vmette.Sandbox, tree: Path) -> None:
    (tree / "private").write_text("x")
    (tree / "private").chmod(0o600)
    tree.chmod(0o777)
    with sandbox.share(tree, "/work"):
        done = sandbox.run(["cat", "/work/private"], user="1234:5678", text=True)
        assert (done.returncode, "Permission denied" in done.stderr) == (1, True)
        text(sandbox, "echo x > /work/mine", user="1234:5678")
    assert ((tree / "mine").stat().st_uid, (tree / "mine").stat().st_gid) == (1234, 5678)


def test_what_the_host_changes_is_seen(sandbox: vmette.Sandbox, tree: Path) -> None:
    with sandbox.share(tree, "/work"):
        assert text(sandbox, "cat /work/file") == "of the host\n"
        (tree / "file").write_text("changed, and longer\n")
        (tree / "below/program").rename(tree / "moved")
        wait_until(lambda: text(sandbox, "cat /work/file") == "changed, and longer\n", "the change is seen")
        wait_until(
            lambda: sorted(text(sandbox, "ls /work").split()) == ["below", "file", "moved"], "the rename is seen"
        )


def test_it_is_taken_away_from_who_uses_it(sandbox: vmette.Sandbox, tree: Path) -> None:
    shared = sandbox.share(tree, "/work")
    with sandbox.popen(
        ["sh", "-c", "exec 3< /work/file; cd /work; echo; read x; cat <&3; ls; echo $?"], stdin=PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        process.stdout.readline()
        shared.close()
        process.stdin.write(b"\n")
        process.stdin.close()
        assert process.stdout.read() == b"1\n"  # "Socket not connected", from each


@pytest.mark.parametrize("how", ["umount /work", "umount -l /work", "killall -9 init", "rm /dev/fuse"])
def test_the_guest_s_root_can_only_harm_itself(how: str, sandbox: vmette.Sandbox, tree: Path) -> None:
    shared = sandbox.share(tree, "/work")
    sandbox.run(["sh", "-c", how])
    assert text(sandbox, "echo fine") == "fine\n"
    shared.close()
    if how.startswith("umount"):
        assert text(sandbox, "ls -A /work") == ""
    assert (tree / "file").read_text() == "of the host\n"


def test_a_device_that_is_none(sandbox: vmette.Sandbox, tree: Path) -> None:
    text(sandbox, "rm /dev/fuse; mkfifo /dev/fuse")
    with pytest.raises(vmette.GuestError, match="cannot be shared at /work: /dev/fuse: No such device"):
        sandbox.share(tree, "/work")
    text(sandbox, "rm /dev/fuse")
    with pytest.raises(vmette.GuestError, match="/dev/fuse: No such file or directory"):
        sandbox.share(tree, "/work")


@pytest.mark.parametrize("target", ["work", "/", "/proc/x", "/a/../b", "/a\0b"])
def test_targets_that_cannot_be(target: str, sandbox: vmette.Sandbox, tree: Path) -> None:
    with pytest.raises(vmette.ConfigError):
        sandbox.share(tree, target)


def test_what_cannot_be_shared(sandbox: vmette.Sandbox, tree: Path) -> None:
    for path in (tree / "nothing", tree / "file"):
        with pytest.raises(vmette.ConfigError):
            sandbox.share(path, "/work")
    text(sandbox, "echo > /file")
    with pytest.raises(vmette.GuestError, match=f"{tree} cannot be shared at /file/x: /file/x: Not a directory"):
        sandbox.share(tree, "/file/x")
    assert text(sandbox, "grep -c fuse /proc/mounts || true") == "0\n"


def test_one_within_another(sandbox: vmette.Sandbox, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/x").write_text("inner")
    with sandbox.share(tree, "/work"), sandbox.share(tmp_path / "inner", "/work/below/inner"):
        assert text(sandbox, "cat /work/below/inner/x; cat /work/file") == "innerof the host\n"
    assert (tree / "below/inner").is_dir()


def test_one_that_stays_until_the_end(tree: Path) -> None:
    with vmette.Sandbox(BASE) as sandbox:
        sandbox.share(tree, "/work")
        gc.collect()
        assert text(sandbox, "cat /work/file") == "of the host\n"
        shared = sandbox.share(tree, "/again")
    shared.close()
    with pytest.raises(vmette.SandboxClosed):
        sandbox.share(tree, "/work")


def test_a_sandbox_that_nobody_holds(tree: Path) -> None:
    sandbox = vmette.Sandbox(BASE)
    sandbox.share(tree, "/work")
    gone = weakref.ref(sandbox)
    del sandbox
    gc.collect()
    assert gone() is None


def test_it_keeps_nothing_busy(tree: Path) -> None:
    with vmette.Sandbox(BASE, idle_timeout=1) as sandbox:
        sandbox.share(tree, "/work")
        wait_until(lambda: sandbox.closed, "the end of its time")


def test_it_is_in_no_snapshot(sandbox: vmette.Sandbox, tree: Path, tmp_path: Path) -> None:
    with sandbox.share(tree, "/work"):
        with pytest.raises(vmette.ConfigError, match="with shares is not saved"):
            sandbox.fork()
        with pytest.raises(vmette.ConfigError, match="with shares is not saved"):
            sandbox.snapshot(tmp_path / "snapshot")
        assert text(sandbox, "cat /work/file") == "of the host\n"
    with sandbox.fork()[0] as copy, copy.share(tree, "/work"):
        assert text(copy, "cat /work/file") == "of the host\n"
    assert not (tmp_path / "snapshot").exists()


def test_a_sandbox_of_a_pool(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VMETTE_TEMPLATES", raising=False)
    monkeypatch.setenv("VMETTE_CACHE_DIR", str(tmp_path / "cache"))
    with vmette.Pool(BASE, size=1) as pool:
        sandbox = pool.acquire()
        with sandbox.share(tree, "/work"):
            assert text(sandbox, "cat /work/file") == "of the host\n"
        sandbox.share(tree, "/work")
        pool.release(sandbox)  # for the next one, who has no business there
        wait_until(lambda: sandbox.closed, "its end")


def test_a_guest_that_sends_what_is_no_request(sandbox: vmette.Sandbox, tree: Path) -> None:
    """A command in place of the agent's function."""
    from vmette import sharing

    words: list[Command] = []

    class Forger(Popen):
        def __init__(self, owner: object, session: object, command: Command, *streams: object) -> None:
            words.append(command)
            forged = Command((b"sh", b"-c", b"head -c 100000 /dev/urandom; sleep 1000"), background=True)
            super().__init__(owner, session, forged, *streams)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharing, "Popen", Forger)
        shared = sandbox.share(tree, "/work")
    assert words[0].argv == (b"share", b"/work")
    wait_until(lambda: not [t for t in threading.enumerate() if t.name == "vmette-share"], "it is given up")
    shared._process.kill()
    shared.close()
    assert text(sandbox, "echo fine") == "fine\n"


def test_asyncio(tree: Path) -> None:
    async def main() -> bytes:
        async with vmette.AsyncSandbox(BASE) as sandbox:
            shared = await sandbox.share(tree, "/work", read_only=True)
            done = await sandbox.run(["cat", "/work/file"])
            await asyncio.to_thread(shared.close)
            return done.stdout

    assert asyncio.run(main()) == b"of the host\n"


def test_the_time_of_a_file(sandbox: vmette.Sandbox, tree: Path) -> None:
    with sandbox.share(tree, "/work"):
        text(sandbox, "touch -d '2001-02-03 04:05:06' /work/file")
        assert (tree / "file").stat().st_mtime == 981173106
        text(sandbox, "touch /work/file")
    assert abs((tree / "file").stat().st_mtime - time.time()) < 60


def test_a_guest_that_says_much_fills_nothing(sandbox: vmette.Sandbox, tree: Path) -> None:
    """On the stderr of the function, which nobody reads once it is there."""
    with sandbox.share(tree, "/work", read_only=True):
        pid = text(sandbox, "for p in /proc/[0-9]*; do ls -l $p/fd | grep -q /dev/fuse && echo ${p#/proc/}; done; true")
        done = sandbox.run(["sh", "-c", f"timeout 20 head -c 2000000 /dev/zero > /proc/{pid.strip()}/fd/2"])
        assert done.returncode != 0
        assert text(sandbox, "cat /work/file") == "of the host\n"


def test_one_that_is_busy_is_taken_away_whole(sandbox: vmette.Sandbox, tree: Path) -> None:
    (tree / "large").write_bytes(bytes(64 << 20))
    shared = sandbox.share(tree, "/work")
    script = "for i in 1 2 3 4; do cat /work/large > /work/copy$i & done; echo; wait"
    with sandbox.popen(["sh", "-c", script]) as process:
        assert process.stdout is not None
        process.stdout.readline()
        shared.close()
    assert text(sandbox, "grep -c fuse /proc/mounts || true") == "0\n"


def test_one_over_the_way_to_another(sandbox: vmette.Sandbox, tree: Path, tmp_path: Path) -> None:
    """The outer one goes first: the way to the inner one's place is dead then."""
    (tree / "inner").mkdir()
    outer, inner = sandbox.share(tree, "/work"), sandbox.share(tmp_path, "/work/inner")
    outer.close()
    inner.close()
    assert text(sandbox, "echo fine") == "fine\n"


def test_sockets_have_a_time_out_in_this_program(sandbox: vmette.Sandbox, tree: Path) -> None:
    socket.setdefaulttimeout(0.2)
    try:
        with sandbox.share(tree, "/work"):
            time.sleep(0.6)
            assert text(sandbox, "cat /work/file") == "of the host\n"
    finally:
        socket.setdefaulttimeout(None)


def test_set_user_id_bits_stay_in_the_guest(sandbox: vmette.Sandbox, tree: Path) -> None:
    with sandbox.share(tree, "/work"):
        text(sandbox, "cp /bin/busybox /work/root; chmod 6755 /work/root; chmod 2777 /work/below")
    assert stat.S_IMODE((tree / "root").stat().st_mode) == 0o755
    assert stat.S_IMODE((tree / "below").stat().st_mode) == 0o2777

"""Copies of running sandboxes."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

import vmette
from tests.vm.support import BASE, vmms, vz, wait_until
from vmette.machine import prepare
from vmette.templates import Template

IDENTITY = "cat /proc/sys/kernel/random/uuid; head -c 8 /dev/urandom | md5sum; hostname; date +%s"


@pytest.fixture
def sandbox() -> Iterator[vmette.Sandbox]:
    with vmette.Sandbox(BASE, scratch=64, hostname="parent") as sandbox:
        yield sandbox


def text(sandbox: vmette.Sandbox, script: str) -> str:
    return str(sandbox.run(["sh", "-c", script], text=True, check=True).stdout)


def test_a_copy_has_all_that_was(sandbox: vmette.Sandbox) -> None:
    text(sandbox, "echo memory >/run/x; echo disk >/x; httpd -p 127.0.0.1:8080 -h /etc")
    with sandbox.fork()[0] as copy:
        assert text(copy, "cat /run/x /x; wget -qO- http://127.0.0.1:8080/hostname | wc -l") == "memory\ndisk\n0\n"


def test_copies_and_the_original_go_their_own_ways(sandbox: vmette.Sandbox) -> None:
    text(sandbox, "echo before >/x; echo before >/run/x")
    with ExitStack() as stack:
        copies = [stack.enter_context(copy) for copy in sandbox.fork(3)]
        everybody = [sandbox, *copies]
        for number, each in enumerate(everybody):
            assert text(each, f"cat /x /run/x; echo {number} >/x; echo {number} >/run/x") == "before\nbefore\n"
        for number, each in enumerate(everybody):
            assert text(each, "cat /x /run/x") == f"{number}\n{number}\n"
        said = [text(each, IDENTITY).splitlines() for each in everybody]
        for what in range(3):
            assert len({lines[what] for lines in said}) == 4, said
        assert [lines[2] for lines in said] == ["parent", "parent-1", "parent-2", "parent-3"]
        for lines in said:
            assert abs(int(lines[3]) - time.time()) < 30
    assert text(sandbox, "cat /x") == "0\n"


def test_what_was_made_ready_for_the_next_command_is_a_command_like_any_other(sandbox: vmette.Sandbox) -> None:
    groups = "ls -d /sys/fs/cgroup/vmette/*/ | wc -l; cat /proc/self/cgroup; cat /proc/self/oom_score_adj; ulimit -n"
    ordinary = text(sandbox, groups).splitlines()
    with sandbox.fork()[0] as copy:
        for each in (sandbox, copy):
            first = text(each, groups).splitlines()
            second = text(each, groups).splitlines()
            assert first[0] == second[0] == ordinary[0] == "1"  # nothing else was left
            assert len({ordinary[1], first[1], second[1]}) == 3
            assert first[2:] == second[2:] == ordinary[2:]
        sandbox.fork()[0].close()
        done = sandbox.run(["sh", "-c", "head -c 20000000 /dev/zero | tail -c 20000000 | wc -c"], text=True)
        assert done.stdout == "20000000\n"
        assert done.usage is not None
        assert 20_000_000 < (done.usage.peak_memory or 0) < 60_000_000
        sandbox.fork()[0].close()
        with pytest.raises(vmette.TimeoutExpired):
            sandbox.run(["sh", "-c", "sleep 1000 & sleep 1000"], timeout=1)
        assert text(sandbox, "pidof sleep; true") == ""


def test_commands_go_on_in_both(sandbox: vmette.Sandbox) -> None:
    script = "i=0; while :; do i=$((i + 1)); echo $i; echo $i >/run/count; sleep 0.05; done"
    with sandbox.popen(["sh", "-c", script]) as counting:
        assert counting.stdout is not None
        assert counting.stdout.readline() == b"1\n"
        with sandbox.fork()[0] as copy:
            first = int(text(copy, "cat /run/count"))
            wait_until(lambda: int(text(copy, "cat /run/count") or 0) > first, "the copy's own count")
            text(copy, "kill $(pgrep -f 'i=0') || true")
            lines = [int(counting.stdout.readline()) for _ in range(20)]
            assert lines == list(range(2, 22))  # nothing was lost nor doubled
        counting.kill()


def test_input_that_was_on_its_way_arrives_once(sandbox: vmette.Sandbox) -> None:
    data = bytes(range(256)) * 4096
    with sandbox.popen(["sh", "-c", "sleep 0.5; md5sum"], stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(data[: 1 << 19])
        for copy in sandbox.fork(2):
            copy.close()
        process.stdin.write(data[1 << 19 :])
        process.stdin.close()
        assert process.stdout is not None
        assert process.stdout.read().split()[0].decode() == hashlib.md5(data, usedforsecurity=False).hexdigest()


def test_a_copy_can_be_copied(sandbox: vmette.Sandbox) -> None:
    text(sandbox, "echo 1 >/x")
    with sandbox.fork()[0] as child:
        text(child, "echo 2 >>/x; echo 2 >/run/y")
        with child.fork()[0] as grandchild:
            assert text(grandchild, "cat /x /run/y; hostname") == "1\n2\n2\nparent-1-1\n"
            text(grandchild, "echo 3 >>/x")
        assert text(child, "cat /x") == "1\n2\n"
    assert text(sandbox, "cat /x") == "1\n"


def test_a_machine_that_woke_can_be_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VMETTE_TEMPLATES")
    monkeypatch.setenv("VMETTE_CACHE_DIR", str(tmp_path))
    Template(prepare(BASE, {}).config).make()
    with vmette.Sandbox(BASE) as sandbox:
        assert sandbox.came_up == "woken from a template"
        text(sandbox, "echo 1 >/x; head -c 50000000 /dev/urandom >/run/y")
        with sandbox.fork()[0] as copy:
            assert text(copy, "cat /x; md5sum </run/y") == "1\n" + text(sandbox, "md5sum </run/y")


@pytest.mark.only_qemu  # another VMM's memory is not to be seen
def test_copies_share_memory(sandbox: vmette.Sandbox) -> None:
    text(sandbox, "head -c 200000000 /dev/zero | tr '\\0' x >/run/y")
    with ExitStack() as stack:
        before = vmms()
        for copy in sandbox.fork(4):
            stack.enter_context(copy)
        own = []
        for pid in vmms() - before:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            own.append(int(rollup.partition("Private_Dirty:")[2].split()[0]) // 1024)
        assert len(own) == 4
        assert max(own) < 150, own  # MiB, of 200 and all that the guest has beside


def test_nothing_is_left_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMETTE_CACHE_DIR", str(tmp_path / "cache"))
    with vmette.Sandbox(BASE, scratch=64) as sandbox:
        before = {path for path in (tmp_path / "cache").rglob("*") if path.is_file()}
        with sandbox.fork()[0] as copy:
            assert text(copy, "echo hi") == "hi\n"
            assert vz() or {path for path in (tmp_path / "cache").rglob("*") if path.is_file()} == before
    assert {path for path in (tmp_path / "cache").rglob("*") if path.is_file()} == before


def test_ports_are_not_published_twice(tmp_path: Path) -> None:
    with (
        vmette.Sandbox(BASE, publish=["0:80"], allow_hosts=["example.com"]) as sandbox,
        sandbox.fork()[0] as copy,
    ):
        assert text(copy, "echo $HTTPS_PROXY") == "http://127.0.0.1:3128\n"
        said = copy.run(["sh", "-c", "wget -qO- http://example.org/ 2>&1"], text=True).stdout
        assert "403" in said


def test_secrets_are_on_no_disk(tmp_path: Path) -> None:
    """Nor is what a copy, or a copy's copy, has of them."""
    target = tmp_path / "snapshot"
    with vmette.Sandbox(BASE, secrets={"A": "b"}) as sandbox, ExitStack() as stack:
        family = [sandbox]
        if vz():  # whose copies are on the disk for a while
            with pytest.raises(vmette.ConfigError, match="secrets is not copied"):
                sandbox.fork()
        else:
            family += [stack.enter_context(sandbox.fork()[0])]
            family += [stack.enter_context(family[1].fork()[0])]
        for each in family:
            assert text(each, "cat /run/secrets/A") == "b"
            with pytest.raises(vmette.ConfigError, match="secrets is not saved"):
                each.snapshot(target)
        assert not target.exists()


def test_nothing_runs_in_a_copy_before_it_is_its_own(sandbox: vmette.Sandbox) -> None:
    """What ran when it was made stood still until it had a name of its own, and entropy, which it gets just before."""
    text(sandbox, "(while :; do hostname; done) >/run/names 2>&1 &")
    time.sleep(0.5)
    with ExitStack() as stack:
        copies = [stack.enter_context(copy) for copy in sandbox.fork(3)]
        wait_until(lambda: all(text(copy, "grep -c -- - /run/names; true") != "0\n" for copy in copies), "names")
        before = [text(copy, "grep -cx parent /run/names") for copy in copies]
        assert int(before[0]) > 1
        assert before == [before[0]] * 3
        # And in the original it goes on too.
        seen = int(text(sandbox, "wc -l </run/names"))
        wait_until(lambda: int(text(sandbox, "wc -l </run/names")) > seen, "the original's loop")


def test_many_threads_copy_at_once(sandbox: vmette.Sandbox) -> None:
    def copy(number: int) -> str:
        sandbox.run(["sh", "-c", "cat >/dev/null"], input=bytes(100_000), check=True)
        with sandbox.fork()[0] as other:
            return text(other, f"echo {number}")

    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(copy, range(8))] == [f"{number}\n" for number in range(8)]
    assert text(sandbox, "echo fine") == "fine\n"


def test_what_cannot_be_copied(sandbox: vmette.Sandbox, tmp_path: Path) -> None:
    with pytest.raises(vmette.ConfigError, match="0 copies"):
        sandbox.fork(0)
    with vmette.Sandbox(BASE, shares=[vmette.Share("a", tmp_path)]) as other:
        with pytest.raises(vmette.ConfigError, match="with shares or disks"):
            other.fork()
        with pytest.raises(vmette.ConfigError, match="with shares or disks"):
            other.snapshot(tmp_path / "snapshot")
        assert text(other, "echo fine") == "fine\n"
    sandbox.close()
    with pytest.raises(vmette.SandboxClosed):
        sandbox.fork()


def test_a_snapshot_of_a_running_sandbox(sandbox: vmette.Sandbox, tmp_path: Path) -> None:
    text(sandbox, "echo 1 >/x; echo 1 >/run/x; httpd -p 127.0.0.1:8080 -h /")
    made = sandbox.snapshot(tmp_path / "one")
    assert made.directory == tmp_path / "one"
    text(sandbox, "echo 2 >/x")
    with pytest.raises(vmette.ConfigError, match="there is a snapshot 'one' already"):
        sandbox.snapshot(tmp_path / "one")
    for _ in range(2):
        with vmette.Sandbox.restore(tmp_path / "one", hostname="restored") as copy:
            assert text(copy, "cat /x /run/x; wget -qO- http://127.0.0.1:8080/x; hostname") == "1\n1\n1\nrestored\n"
            text(copy, "echo 3 >/x")
    with vmette.Sandbox.restore(tmp_path / "one") as copy:
        copy.snapshot(str(tmp_path / "two"))  # of one that woke itself
    with vmette.Sandbox(f"snapshot:{tmp_path}/two") as copy:
        assert text(copy, "cat /x") == "1\n"
    assert text(sandbox, "cat /x") == "2\n"


def test_a_snapshot_that_cannot_be_written(sandbox: vmette.Sandbox, tmp_path: Path) -> None:
    with pytest.raises(vmette.VmetteError, match="cannot keep snapshots in"):
        sandbox.snapshot(tmp_path / "none/one")
    assert text(sandbox, "echo fine") == "fine\n"


def test_a_full_disk(sandbox: vmette.Sandbox, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True)
    try:
        with pytest.raises(vmette.VmetteError, match=r"No space left on device|Save error"):
            sandbox.snapshot(disk / "one")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)
    assert text(sandbox, "echo fine") == "fine\n"
    with sandbox.fork()[0] as copy:
        assert text(copy, "echo fine") == "fine\n"


def test_the_same_for_asyncio(tmp_path: Path) -> None:
    async def main() -> None:
        async with vmette.AsyncSandbox(BASE) as sandbox:
            await sandbox.run(["sh", "-c", "echo 1 >/x"])
            copies = await sandbox.fork(2)
            for number, copy in enumerate(copies):
                async with copy:
                    done = await copy.run(["sh", "-c", f"cat /x; echo {number} >/x; cat /x"], text=True)
                    assert done.stdout == f"1\n{number}\n"
                assert copy.closed
            await sandbox.snapshot(tmp_path / "one")
            assert sandbox.came_up.startswith("booted")
        async with vmette.AsyncSandbox.restore(tmp_path / "one") as restored:
            assert (await restored.run(["cat", "/x"], text=True)).stdout == "1\n"

    asyncio.run(main())


def test_a_fork_that_is_cancelled_leaves_no_copies() -> None:
    async def main() -> None:
        async with vmette.AsyncSandbox(BASE) as sandbox:
            before = vmms()
            forking = asyncio.create_task(sandbox.fork(2))
            await asyncio.sleep(0.01)  # a fork takes several times as long
            forking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await forking
            assert vmms() == before
            assert (await sandbox.run(["echo", "fine"], text=True)).stdout == "fine\n"

    asyncio.run(main())

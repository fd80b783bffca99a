"""What a command may take of its machine, what comes of one that wants more, and that others do not notice."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import pytest

import vmette
from tests.vm.hostile import compiled
from tests.vm.support import BASE, vmm_processes
from vmette.protocol import Usage

PATIENCE = 120.0
MIB = 1 << 20


@pytest.fixture(scope="module")
def neighbour() -> Iterator[vmette.Sandbox]:
    """Another VM, which must not notice anything."""
    with vmette.Sandbox(BASE) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def hog(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return compiled("hog", tmp_path_factory.mktemp("programs")).read_bytes()


@contextmanager
def answering(*sandboxes: vmette.Sandbox) -> Iterator[None]:
    """These run one command after the other meanwhile."""
    done = threading.Event()
    answers: list[bool] = []

    def ask() -> None:
        while not done.is_set() or not answers:
            answers.append(
                all(each.run(["echo", "alive"], timeout=PATIENCE).stdout == b"alive\n" for each in sandboxes)
            )

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        yield
    finally:
        done.set()
        asker.join()
    assert answers
    assert all(answers)


def usage(done: vmette.CompletedProcess[Any]) -> Usage:
    assert done.usage is not None
    return done.usage


# --- Memory


def test_a_command_that_wants_more_memory_than_there_is(neighbour: vmette.Sandbox, hog: bytes) -> None:
    with vmette.Sandbox(BASE, mem_mib=192) as sandbox:
        sandbox.files.write("/tmp/hog", hog, mode=0o755)
        bystander = sandbox.popen(["sleep", "1000"], stdout=DEVNULL, stderr=DEVNULL)
        for argv in (["/tmp/hog", "memory", "4096"], ["tail", "/dev/zero"]):
            with answering(neighbour, sandbox):
                done = sandbox.run(argv, timeout=PATIENCE)
            assert done.returncode == -signal.SIGKILL
            assert usage(done).oom_kills == 1
            assert usage(done).max_rss > 64 * MIB
        assert bystander.poll() is None
        assert usage(sandbox.run(["true"])).oom_kills == 0
        bystander.kill()


def test_a_process_of_a_command_that_wants_too_much(hog: bytes) -> None:
    """The command itself goes on, and its result tells."""
    with vmette.Sandbox(BASE, mem_mib=128) as sandbox:
        sandbox.files.write("/tmp/hog", hog, mode=0o755)
        done = sandbox.run(["sh", "-c", "/tmp/hog memory 4096; echo $?"], timeout=PATIENCE)
        assert (done.returncode, done.stdout) == (0, b"137\n")
        assert usage(done).oom_kills == 1


def test_the_same_of_a_run() -> None:
    done = vmette.run(BASE, ["tail", "/dev/zero"], mem_mib=128, timeout=PATIENCE)
    assert done.returncode == -signal.SIGKILL
    assert usage(done).oom_kills == 1


# --- What a command took


def test_the_memory_that_a_command_took(hog: bytes) -> None:
    with vmette.Sandbox(BASE) as sandbox:
        sandbox.files.write("/tmp/hog", hog, mode=0o755)
        one = usage(sandbox.run(["/tmp/hog", "memory", "50"], check=True, timeout=PATIENCE))
        both = "/tmp/hog memory 50 | (sleep 1; cat) & /tmp/hog memory 30; wait"
        several = usage(sandbox.run(["sh", "-c", both], check=True, timeout=PATIENCE))
        little = usage(sandbox.run(["true"], timeout=PATIENCE))
    for taken in (one, several):
        assert 50 * MIB <= taken.max_rss < 60 * MIB
        assert taken.peak_memory is not None
    assert 50 * MIB <= (one.peak_memory or 0) < 60 * MIB
    assert 50 * MIB <= (several.peak_memory or 0) < 100 * MIB
    assert little.max_rss < 10 * MIB
    assert (little.peak_memory or 0) < 10 * MIB


def test_the_time_that_a_command_took() -> None:
    loop = "i=0; while [ $i -lt 100000 ]; do i=$((i + 1)); done"
    with vmette.Sandbox(BASE) as sandbox:
        busy = usage(sandbox.run(["sh", "-c", loop], timeout=PATIENCE))
        child = usage(sandbox.run(["sh", "-c", f"({loop}); true"], timeout=PATIENCE))
        system = usage(sandbox.run(["dd", "if=/dev/zero", "of=/dev/null", "bs=1M", "count=2000"], timeout=PATIENCE))
        idle = usage(sandbox.run(["sleep", "1"], timeout=PATIENCE))
    assert busy.user_seconds > 10 * idle.user_seconds
    assert busy.user_seconds > busy.system_seconds
    assert child.user_seconds > busy.user_seconds / 4
    assert system.system_seconds > system.user_seconds


# --- Processes and files


@pytest.mark.parametrize("limit", [20, 100])
def test_processes_are_limited(neighbour: vmette.Sandbox, limit: int) -> None:
    script = "while (sleep 1000 & ) 2>/dev/null && [ $(($i)) -lt 300 ]; do i=$((i + 1)); done; echo $i"
    with vmette.Sandbox(BASE, pids=limit) as sandbox, answering(neighbour):
        done = sandbox.run(["sh", "-c", script], timeout=PATIENCE, text=True)
        asleep = len(sandbox.run(["pidof", "sleep"], text=True, timeout=PATIENCE).stdout.split())
        # Each was started by a process that was there for a moment, beside the shell.
        assert limit - 2 <= asleep < limit
        assert done.returncode in {0, 2}


def test_open_files_are_limited_for_commands_and_not_for_the_agent() -> None:
    with vmette.Sandbox(BASE, nofile=16) as sandbox:
        assert sandbox.run(["sh", "-c", "ulimit -Sn; ulimit -Hn"], timeout=PATIENCE).stdout == b"16\n16\n"
        many = [sandbox.popen(["sleep", "1000"], stdout=DEVNULL, stderr=DEVNULL) for _ in range(50)]
        for command in many:
            command.kill()
        assert {command.wait(PATIENCE) for command in many} == {-signal.SIGKILL}


# --- Disks


def written(pid: int) -> int:
    """The bytes on this machine's disk of the files that a process holds open and that have no name any more."""
    files = {}
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        # (memfd: is its memory)
        if entry.readlink().name.endswith("(deleted)") and not str(entry.readlink()).startswith("/memfd:"):
            status = entry.stat()
            files[status.st_dev, status.st_ino] = status.st_blocks * 512
    return sum(files.values())


def test_a_disk_filler_on_a_scratch_disk(neighbour: vmette.Sandbox) -> None:
    others = vmm_processes().keys()
    with vmette.Sandbox(BASE, scratch=256, mem_mib=192) as sandbox:
        ours = vmm_processes().keys() - others
        for path in ("/filler", "/tmp/filler"):
            with answering(neighbour, sandbox):
                done = sandbox.run(["dd", "if=/dev/zero", f"of={path}", "bs=1M"], text=True, timeout=PATIENCE)
            assert done.returncode == 1
            assert "No space left on device" in done.stderr
            assert usage(done).oom_kills == 0
            sandbox.run(["sync"], timeout=PATIENCE)
            assert 128 * MIB < max(map(written, ours)) <= 257 * MIB
            sandbox.files.remove(path)
            sandbox.files.write(path, b"data")
            assert sandbox.files.read(path) == b"data"


def test_a_disk_filler_in_memory(neighbour: vmette.Sandbox) -> None:
    with vmette.Sandbox(BASE) as sandbox, answering(neighbour, sandbox):
        done = sandbox.run(["dd", "if=/dev/zero", "of=/filler", "bs=1M"], text=True, timeout=PATIENCE)
        assert done.returncode == 1
        assert "No space left on device" in done.stderr

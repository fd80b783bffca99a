"""However a run ends, nothing of it is left. (What `nothing_left` in conftest.py looks for after each test.)"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import pytest

import vmette
from tests.vm.support import BASE, children, command, vmm_name, vmm_processes, vmms, wait_until
from vmette.vmm import qemu, virtiofsd

BOOTS = 200


@contextmanager
def running(tmp_path: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A `vmette run` whose command has started, with a share."""
    argv = ["run", "--share", f"work={tmp_path}", *options, BASE, "--", "sh", "-c", "echo up; sleep 1000"]
    process = subprocess.Popen(
        command(argv), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"up\n"
            yield process
        finally:
            process.kill()


ELSEWHERE = """
import signal, sys, threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
from vmette.cli import main
sys.exit(main(sys.argv[1:]))
"""
"""Here another thread takes SIGINT, which so ends no wait of the main thread's: as one that comes just before it."""


def test_a_signal_that_ends_no_wait_is_heard() -> None:
    def interrupted(*words: str) -> None:
        argv = [sys.executable, "-c", ELSEWHERE, *words, "sh", "-c", "echo up; exec sleep 1000"]
        with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == b"up\n"
                time.sleep(0.2)
                process.send_signal(signal.SIGINT)
                assert process.wait(30) == 130
            finally:
                process.kill()

    interrupted("run", BASE)
    subprocess.run(command(["run", "-d", "--name", "heard", BASE]), check=True, stdout=subprocess.DEVNULL)
    try:
        interrupted("exec", "heard")
    finally:
        subprocess.run(command(["rm", "-f", "heard"]), check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
    ids=lambda value: str(value),
)
def test_a_signal_ends_the_run(tmp_path: Path, number: int, code: int) -> None:
    with running(tmp_path) as process:
        assert vmm_processes()
        os.killpg(process.pid, number)
        assert process.wait(30) == code
        assert process.stderr is not None
        assert process.stderr.read() == b""


def test_a_parent_that_is_killed_takes_all_along(tmp_path: Path) -> None:
    with running(tmp_path) as process:
        assert vmm_processes()
        process.kill()
        process.wait(30)
        wait_until(lambda: not vmm_processes(), "the end of QEMU and virtiofsd")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("delay", [0.05, 0.15, 0.3])
def test_a_run_that_is_ended_while_it_starts(tmp_path: Path, number: int, delay: float) -> None:
    argv = command(["run", "--share", f"work={tmp_path}", BASE, "--", "sleep", "1000"])
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay)
        process.send_signal(number)
        assert process.wait(30) in {-number, 128 + number}


def test_a_vmm_that_is_killed_is_told(tmp_path: Path) -> None:
    with running(tmp_path) as process:
        for pid in vmms():
            os.kill(pid, signal.SIGKILL)
        assert process.wait(30) == 125
        assert process.stderr is not None
        assert process.stderr.read() == f"vmette: {vmm_name()} was killed by signal 9\n".encode()


@pytest.mark.only_qemu
def test_a_file_server_that_is_killed_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = virtiofsd.find()
    monkeypatch.setattr(qemu, "file_server", lambda accel: server)

    def kill() -> None:
        wait_until((tmp_path / "up").exists, "the command in the guest")
        for pid, words in vmm_processes().items():
            if "qemu-system-" not in words:
                with suppress(ProcessLookupError):  # there are two, and the one may have taken the other along
                    os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(vmette.VmmError, match="virtiofsd has ended before the VM did"):
        vmette.run(BASE, ["sh", "-c", "touch /mnt/work/up; sleep 1000"], shares=[vmette.Share("work", tmp_path)])
    killer.join()


def test_a_time_out_leaves_nothing(tmp_path: Path) -> None:
    with running(tmp_path, "--timeout", "8") as process:
        assert process.wait(60) == 124


def test_eight_runs_at_once() -> None:
    argv = command(["run", BASE, "--", "sh", "-c", "sleep 1; echo done"])
    processes = [
        subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(8)
    ]
    assert [process.communicate(timeout=120) for process in processes] == [(b"done\n", b"")] * 8
    assert [process.returncode for process in processes] == [0] * 8


@contextmanager
def busy_core() -> Iterator[None]:
    """Another process takes one core, wholly."""
    with subprocess.Popen(["sh", "-c", "while :; do :; done"]) as process:
        try:
            yield
        finally:
            process.kill()


def open_files() -> list[str]:
    return sorted(path.name for path in Path("/proc/self/fd").iterdir())


@pytest.mark.only_qemu  # with its emulated clocks
@pytest.mark.timeout(900)
def test_two_hundred_runs_without_a_hang_or_a_leak() -> None:
    """Half of them while the other core is busy, which is when the kernel's clocks are hard to calibrate."""
    vmette.run(BASE, ["true"])
    files, threads, processes = open_files(), threading.active_count(), children()
    for neighbour in (nullcontext(), busy_core()):
        with neighbour:
            for number in range(BOOTS // 2):
                assert vmette.run(BASE, ["echo", str(number)], timeout=60).stdout == b"%d\n" % number
    assert open_files() == files
    assert threading.active_count() == threads
    assert not vmm_processes()
    assert children() == processes

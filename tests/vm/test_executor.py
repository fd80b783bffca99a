"""`vmette.SandboxExecutor`: jobs in microVMs."""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

import vmette
from tests.vm.support import BASE, children, wait_until
from vmette import executor as module
from vmette.executor import OVERHEAD_MIB, Job, default_workers, run_job


def test_each_job_has_a_fresh_machine() -> None:
    with vmette.SandboxExecutor(2) as executor:
        futures = [executor.submit(["sh", "-c", "mkdir /tmp/left && cat"], input=b"%d" % n) for n in range(4)]
        assert [future.result().stdout for future in futures] == [b"0", b"1", b"2", b"3"]
        assert [future.result().returncode for future in futures] == [0, 0, 0, 0]


def test_the_arguments_are_those_of_run() -> None:
    with vmette.SandboxExecutor(1, BASE, max_output=1000, mem_mib=128) as executor:
        done = executor.submit(
            ["sh", "-c", "cat; pwd; echo $A; id -u"], input="in\n", text=True, cwd="/usr", user="12", env={"A": "b"}
        )
        failed = executor.submit(["false"], check=True)
        late = executor.submit(["sleep", "1000"], timeout=0.5)
        loud = executor.submit(["yes"])
        missing = executor.submit(["nothing"])
        assert done.result().stdout == "in\n/usr\nb\n12\n"
        for future, kind in {
            failed: vmette.CalledProcessError,
            late: vmette.TimeoutExpired,
            loud: vmette.OutputTooLarge,
            missing: vmette.CommandNotStarted,
        }.items():
            assert isinstance(future.exception(), kind)
    assert repr(executor) == "<vmette.SandboxExecutor builtin://base max_workers=1>"


def test_what_is_wrong_with_a_job_is_said_at_once() -> None:
    with vmette.SandboxExecutor(1) as executor:
        with pytest.raises(vmette.ConfigError, match="one string"):
            executor.submit("ls -l")
        with pytest.raises(vmette.ConfigError, match="absolute"):
            executor.submit(["ls"], cwd="here")
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(["ls"])
    with pytest.raises(vmette.ConfigError, match="0 workers"):
        vmette.SandboxExecutor(0)


def test_reused_machines_are_replaced_when_they_die() -> None:
    before = children()
    with vmette.SandboxExecutor(1, reuse=True) as executor:
        assert executor.submit(["mkdir", "/tmp/left"]).result().returncode == 0
        machine = children() - before
        assert executor.submit(["ls", "/tmp"]).result().stdout == b"left\n"
        assert isinstance(executor.submit(["sleep", "1000"], timeout=0.5).exception(), vmette.TimeoutExpired)
        assert children() - before == machine
        died = executor.submit(["sleep", "1000"])
        wait_until(died.running, "the job's start")
        for pid in machine:
            os.kill(int(pid), signal.SIGKILL)
        assert isinstance(died.exception(), vmette.VmmError)
        assert executor.submit(["ls", "/tmp"]).result().stdout == b""


def test_map_takes_no_more_than_it_needs() -> None:
    """Of any number of jobs; results come in order though the first one takes longest."""
    taken = 0

    def endless() -> Iterator[list[str]]:
        nonlocal taken
        while True:
            taken += 1
            yield ["sh", "-c", f"sleep {2 if taken == 1 else 0}; echo {taken}"]

    with vmette.SandboxExecutor(2, reuse=True) as executor:
        results = executor.map(endless(), text=True)
        assert taken == 4
        for number in range(1, 7):
            assert next(results).stdout == f"{number}\n"
            assert taken <= number + 4
        results.close()  # type: ignore[attr-defined]


def test_an_error_ends_map() -> None:
    with vmette.SandboxExecutor(1, reuse=True) as executor:
        results = executor.map([["true"], ["false"], ["true"]], check=True)
        assert next(results).returncode == 0
        with pytest.raises(vmette.CalledProcessError):
            next(results)
        assert list(results) == []


def test_waiting_jobs_can_be_cancelled() -> None:
    with vmette.SandboxExecutor(1) as executor:
        first = executor.submit(["sh", "-c", "sleep 1; echo done"])
        second = executor.submit(["echo", "second"])
        third = executor.submit(["echo", "third"])
        assert second.cancel()
        executor.shutdown(wait=False, cancel_futures=True)
        assert first.result().stdout == b"done\n"
        with pytest.raises(CancelledError):
            third.result()


@pytest.mark.parametrize("reuse", [False, True])
def test_a_shutdown_that_does_not_wait(reuse: bool) -> None:
    before = children()
    executor = vmette.SandboxExecutor(2, reuse=reuse)
    futures = [executor.submit(["echo", str(n)]) for n in range(3)]
    executor.shutdown(wait=False)
    assert [future.result().stdout for future in futures] == [b"0\n", b"1\n", b"2\n"]
    wait_until(lambda: children() == before, "the end of its VMs")


def test_an_error_in_the_block_ends_the_machines() -> None:
    before = children()
    with pytest.raises(ZeroDivisionError), vmette.SandboxExecutor(2, reuse=True) as executor:
        futures = [executor.submit(["sleep", "1000"]) for _ in range(3)]
        wait_until(lambda: len(children() - before) == 2, "both VMs")
        _ = 1 / 0
    assert children() == before
    errors = [None if future.cancelled() else type(future.exception()) for future in futures]
    assert errors == [vmette.SandboxClosed, vmette.SandboxClosed, None]


def test_machines_are_ended_from_another_thread() -> None:
    executor = vmette.SandboxExecutor(1)
    future = executor.submit(["sh", "-c", "sleep 1000"])
    wait_until(future.running, "the job's start")
    killer = threading.Thread(target=executor.kill_workers)
    killer.start()
    assert isinstance(future.exception(), vmette.SandboxClosed)
    killer.join()
    with pytest.raises(RuntimeError):
        executor.submit(["true"])


def test_a_job_does_not_show_what_is_secret() -> None:
    job = Job(["a"], input="hush", env={"KEY": "hush"}, options={"secrets": {"key": "hush"}})
    assert "hush" not in repr(job)


def test_a_job_can_be_sent_to_another_process() -> None:
    job = Job(["sh", "-c", "echo out; exit 5"], options={"mem_mib": 128}, text=True)
    done = run_job(pickle.loads(pickle.dumps(job)))
    assert pickle.loads(pickle.dumps(done)) == vmette.CompletedProcess(tuple(job.argv), 5, "out\n", "")


@pytest.mark.parametrize(
    ("processors", "free", "workers"),
    [(4, None, 4), (4, 100_000, 4), (4, 2 * (512 + OVERHEAD_MIB), 2), (4, 10, 1), (1, 100_000, 1)],
)
def test_how_many_workers_there_are(
    monkeypatch: pytest.MonkeyPatch, processors: int, free: int | None, workers: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(processors)), raising=False)
    monkeypatch.setattr(module, "_free_mib", lambda: free)
    assert default_workers(512) == workers

"""Jobs in microVMs over Dask: two worker processes of this computer."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vmette
from tests.vm.support import BASE
from vmette.executor import Job, run_job

pytest.importorskip("distributed", reason="needs vmette[dask]")

EXAMPLE = Path(__file__).parents[2] / "examples" / "dask_jobs.py"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Any]:
    import dask
    from distributed import Client, LocalCluster

    with (
        dask.config.set(temporary_directory=tmp_path / "dask"),
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            processes=True,
            dashboard_address="127.0.0.1:0",
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def run_and_say_where(job: Job) -> tuple[int, vmette.CompletedProcess[Any]]:
    return os.getpid(), run_job(job)


def test_both_workers_run_jobs_and_errors_come_back(client: Any) -> None:
    jobs = [Job(["echo", str(number)], BASE, text=True) for number in range(6)]
    # Where a job runs is Dask's choice; half of them are bound to each worker.
    addresses = sorted(client.scheduler_info()["workers"])
    futures = [
        client.submit(run_and_say_where, job, pure=False, workers=addresses[number % 2])
        for number, job in enumerate(jobs)
    ]
    results = client.gather(futures)
    assert [done.stdout for _, done in results] == [f"{number}\n" for number in range(6)]
    processes = {pid for pid, _ in results}
    assert len(processes) == 2
    assert os.getpid() not in processes

    failing = {
        vmette.CalledProcessError: Job(["sh", "-c", "echo why >&2; exit 3"], check=True, text=True),
        vmette.TimeoutExpired: Job(["sh", "-c", "echo out; sleep 1000"], timeout=5),
        vmette.CommandNotStarted: Job(["nothing"]),
        vmette.OutputTooLarge: Job(["yes"], max_output=1000),
        vmette.VmetteError: Job(["true"], "/nothing/there"),
    }
    errors = [future.exception() for future in client.map(run_job, list(failing.values()), pure=False)]
    for error, kind in zip(errors, failing, strict=True):
        assert isinstance(error, kind)
    assert (errors[0].returncode, errors[0].stderr) == (3, "why\n")
    assert (errors[1].timeout, errors[1].stdout) == (5, b"out\n")
    assert errors[2].exit_code == 127


def test_the_example(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLE, "--jobs", "4", "--", "sh", "-c", "[ $JOB != 2 ] && echo job $JOB of $JOBS"],
        cwd=tmp_path,
        env={**os.environ, "DASK_TEMPORARY_DIRECTORY": str(tmp_path / "dask")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert sorted(done.stdout.splitlines()) == [f"{n}: job {n} of 4" for n in (0, 1, 3)], done.stderr
    assert "2: command ['sh', '-c'," in done.stderr
    assert done.returncode == 1

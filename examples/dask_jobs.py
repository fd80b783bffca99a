"""Runs a command many times in microVMs, over the workers of a Dask cluster.

    python examples/dask_jobs.py --jobs 20 -- sh -c 'echo job $JOB of $JOBS on $(uname -r)'
    python examples/dask_jobs.py --scheduler tcp://10.0.0.5:8786 --rootfs alpine:3.20 -- cat /etc/os-release

Without a scheduler, two worker processes of this computer do the work. Needs vmette[dask], on the workers too. Each
worker has as many VMs at once as it has threads.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from dask.distributed import Client, LocalCluster, as_completed

from vmette import VmetteError
from vmette.executor import Job, run_job


@contextmanager
def connected(scheduler: str | None) -> Iterator[Client]:
    """A client of the cluster at `scheduler`, or of one that lives as long as this."""
    if scheduler is not None:
        with Client(scheduler) as client:
            yield client
    else:
        with (
            LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address="127.0.0.1:0") as cluster,
            Client(cluster) as client,
        ):
            yield client


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if a job has failed."""
    parser = argparse.ArgumentParser(description="Run a command many times in microVMs over Dask.")
    parser.add_argument("--scheduler", help="the address of a cluster's scheduler; by default one is made here")
    parser.add_argument("--jobs", type=int, default=8, help="how many (8)")
    parser.add_argument("--rootfs", default="builtin://base", help="of the VMs, as the workers find it")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for each command (60)")
    parser.add_argument("argv", nargs="+", help="the command, which finds its number in JOB and the sum of all in JOBS")
    chosen = parser.parse_args(arguments)
    jobs = [
        Job(
            chosen.argv,
            chosen.rootfs,
            env={"JOB": str(number), "JOBS": str(chosen.jobs)},
            timeout=chosen.timeout,
            check=True,
            text=True,
            max_output=1 << 20,
        )
        for number in range(chosen.jobs)
    ]
    failed = 0
    with connected(chosen.scheduler) as client:
        # Not pure: the same command twice is two jobs. No retries: one whose worker has died may have done things.
        futures = client.map(run_job, jobs, pure=False, retries=0)
        numbers = {future.key: number for number, future in enumerate(futures)}
        for future in as_completed(futures):
            try:
                print(f"{numbers[future.key]}: {future.result().stdout}", end="", flush=True)
            except VmetteError as error:
                failed += 1
                print(f"{numbers[future.key]}: {error}", file=sys.stderr, flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())

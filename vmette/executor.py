"""Jobs in microVMs: the shape of :mod:`concurrent.futures`."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from .config import Command
from .errors import ConfigError, SandboxClosed
from .machine import MachineOptions, cancellable
from .process import MAX_OUTPUT, CompletedProcess
from .providers.base import Cancelled
from .sandbox import Sandbox

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .pool import Pool

OVERHEAD_MIB = 192
"""What QEMU takes beside the guest's memory, most of it for the code that it has translated when it emulates."""
DEFAULT_MEM_MIB = 512
PATIENCE_SECONDS = 0.2
"""How long a wait for a pool goes on before it is asked whether there is still a reason for it."""
AHEAD = 2
"""Jobs of :meth:`SandboxExecutor.map` that run, wait, or have results that wait, for each worker."""


@dataclass(frozen=True)
class Job:
    """A command and the microVM that it is to run in: what :func:`run_job` needs, and what another process can be sent.

    The arguments are those of :meth:`vmette.Sandbox.run`; `rootfs` and `options` those of :class:`vmette.Sandbox`.

    Raises:
        ConfigError: it cannot be asked for.
    """

    argv: Sequence[str]
    rootfs: str | os.PathLike[str] = "builtin://base"
    input: bytes | str | None = field(default=None, repr=False)
    env: Mapping[str, str] | None = field(default=None, repr=False)
    cwd: str | None = None
    user: str | None = None
    timeout: float | None = None
    check: bool = False
    text: bool = False
    max_output: int = MAX_OUTPUT
    options: MachineOptions = field(default_factory=MachineOptions, repr=False)

    def __post_init__(self) -> None:
        Command.of(self.argv or ["-"], self.env, self.cwd, self.user)
        object.__setattr__(self, "argv", tuple(self.argv))

    def run_in(self, sandbox: Sandbox) -> CompletedProcess[Any]:
        """Runs it in a VM that is there. See :meth:`vmette.Sandbox.run`."""
        run: Callable[..., CompletedProcess[Any]] = sandbox.run  # of text or bytes: who made the job knows
        return run(
            self.argv,
            input=self.input,
            env=self.env,
            cwd=self.cwd,
            user=self.user,
            timeout=self.timeout,
            check=self.check,
            text=self.text,
            max_output=self.max_output,
        )


def run_job(job: Job) -> CompletedProcess[Any]:
    """Runs `job` in a fresh VM, which is gone afterwards: for any engine that calls functions in other processes.

    Raises:
        VmetteError: as :class:`vmette.Sandbox` and :meth:`vmette.Sandbox.run`. All of them can be pickled.
    """
    with Sandbox(job.rootfs, **job.options) as sandbox:
        return job.run_in(sandbox)


class SandboxExecutor:
    r"""Runs commands in microVMs, several at once: as :class:`concurrent.futures.Executor` runs functions.

    >>> with vmette.SandboxExecutor() as executor:
    ...     [done.stdout for done in executor.map([["echo", word] for word in "ab"], text=True)]
    ['a\n', 'b\n']

    Each job has a fresh VM, unless `reuse` is set. What is held is bounded: by the memory of `max_workers` VMs, and by
    `max_output` for each result that has not been taken. Leaving the `with` statement waits for the jobs; leaving it
    by an exception ends them.

    Args:
        max_workers: How many VMs there are at most; by default one for each processor that this process may use, or
            as many as the memory that is free now has room for.
        rootfs: As for :class:`vmette.Sandbox`.
        reuse: Keep VMs for further jobs, which spares each job a boot and costs the isolation *between* jobs: one
            finds the files, the memory and the processes that earlier ones of its VM have left, and may have been
            prepared by them to be lied to. A VM that has died is replaced.
        pool: Take VMs from there, which are ready, in place of starting them. It says what they are, and is not closed.
        max_output: The most bytes of each of stdout and stderr that are taken of a job.
        options: The machine's: see :class:`vmette.machine.MachineOptions`.
    """

    def __init__(
        self,
        max_workers: int | None = None,
        rootfs: str | os.PathLike[str] = "builtin://base",
        *,
        reuse: bool = False,
        pool: Pool | None = None,
        max_output: int = MAX_OUTPUT,
        **options: Unpack[MachineOptions],
    ) -> None:
        if pool is not None and options:
            raise ConfigError(f"{next(iter(options))} is settled by the pool: leave it out")
        if max_workers is not None and max_workers < 1:
            raise ConfigError(f"{max_workers} workers can do nothing: there must be one")
        self.max_workers = max_workers or default_workers(options.get("mem_mib", DEFAULT_MEM_MIB))
        self._rootfs = rootfs if pool is None else pool.rootfs
        self._ready_ones = pool
        self._reuse = reuse
        self._max_output = max_output
        self._options = options
        self._pool = ThreadPoolExecutor(self.max_workers, thread_name_prefix="vmette-job")
        self._ended = threading.Event()
        """No job is to go on."""
        self._lock = threading.Lock()
        self._sandboxes: set[Sandbox] = set()
        self._idle: list[Sandbox] = []

    def __enter__(self) -> SandboxExecutor:
        return self

    def __exit__(self, kind: object, *args: object) -> None:
        if kind is not None:
            self.kill_workers()
        self.shutdown()

    def __repr__(self) -> str:
        return f"<vmette.SandboxExecutor {os.fspath(self._rootfs)} max_workers={self.max_workers}>"

    @overload
    def submit(
        self,
        argv: Sequence[str],
        *,
        text: Literal[False] = ...,
        input: bytes | None = ...,
        env: Mapping[str, str] | None = ...,
        cwd: str | None = ...,
        user: str | None = ...,
        timeout: float | None = ...,
        check: bool = ...,
    ) -> Future[CompletedProcess[bytes]]: ...

    @overload
    def submit(
        self,
        argv: Sequence[str],
        *,
        text: Literal[True],
        input: str | None = ...,
        env: Mapping[str, str] | None = ...,
        cwd: str | None = ...,
        user: str | None = ...,
        timeout: float | None = ...,
        check: bool = ...,
    ) -> Future[CompletedProcess[str]]: ...

    def submit(
        self,
        argv: Sequence[str],
        *,
        input: bytes | str | None = None,  # noqa: A002 (the name that subprocess.run has)
        env: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout: float | None = None,
        check: bool = False,
        text: bool = False,
    ) -> Future[CompletedProcess[bytes]] | Future[CompletedProcess[str]]:
        """Has `argv` run, and returns what will be the result of :meth:`vmette.Sandbox.run`, or its error.

        `timeout` are the seconds that the command has once its VM is up. A future that waits can be cancelled; one
        that runs cannot, as ever with futures: it is ended by its time-out or :meth:`kill_workers`.

        Raises:
            ConfigError: the job cannot be asked for.
            RuntimeError: the executor has been shut down.
        """
        job = Job(argv, self._rootfs, input, env, cwd, user, timeout, check, text, self._max_output, self._options)
        return self._pool.submit(self._run, job)

    @overload
    def map(
        self,
        argvs: Iterable[Sequence[str]],
        *,
        text: Literal[False] = ...,
        env: Mapping[str, str] | None = ...,
        cwd: str | None = ...,
        user: str | None = ...,
        timeout: float | None = ...,
        check: bool = ...,
    ) -> Iterator[CompletedProcess[bytes]]: ...

    @overload
    def map(
        self,
        argvs: Iterable[Sequence[str]],
        *,
        text: Literal[True],
        env: Mapping[str, str] | None = ...,
        cwd: str | None = ...,
        user: str | None = ...,
        timeout: float | None = ...,
        check: bool = ...,
    ) -> Iterator[CompletedProcess[str]]: ...

    def map(self, argvs: Iterable[Sequence[str]], **arguments: Any) -> Iterator[CompletedProcess[Any]]:
        """The results of all jobs, in their order. The arguments are those of :meth:`submit`, of each job.

        Jobs are taken from `argvs` as results are taken from here, and are at most two for each worker ahead: there
        may be any number of them. An error ends the iteration, and jobs that wait are cancelled at its end.
        """
        jobs = iter(argvs)
        ahead = deque(self.submit(argv, **arguments) for argv in islice(jobs, AHEAD * self.max_workers))

        def results() -> Iterator[CompletedProcess[Any]]:
            try:
                while ahead:
                    done = ahead.popleft().result()
                    ahead.extend(self.submit(argv, **arguments) for argv in islice(jobs, 1))
                    yield done
            finally:
                for future in ahead:
                    future.cancel()

        return results()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Takes no more jobs. VMs end with the last ones.

        Args:
            wait: Return once that is so.
            cancel_futures: Cancel the jobs that have not begun.
        """
        self._pool.shutdown(wait=False, cancel_futures=cancel_futures)
        if wait:
            self._finish()
        else:
            threading.Thread(target=self._finish, name="vmette-shutdown").start()

    def kill_workers(self) -> None:
        """Ends all VMs at once, those that boot too, and takes no more jobs.

        Futures of jobs that ran fail with SandboxClosed; those of jobs that waited are cancelled.
        """
        self._ended.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            sandboxes = [*self._sandboxes]
        for sandbox in sandboxes:
            sandbox.close()
        self._finish()

    def _finish(self) -> None:
        self._pool.shutdown()
        with suppress(IndexError):
            while True:
                self._end(self._idle.pop())

    # --- in a worker's thread

    def _run(self, job: Job) -> CompletedProcess[Any]:
        sandbox = self._ready()
        try:
            return job.run_in(sandbox)
        finally:
            if self._reuse and not sandbox.closed:
                self._idle.append(sandbox)
            else:
                self._end(sandbox)

    def _ready(self) -> Sandbox:
        """A VM that has booted. There are never more than threads of the pool, each of which has one at a time."""
        with suppress(IndexError):
            while (sandbox := self._idle.pop()).closed:
                self._end(sandbox)
            return sandbox
        try:
            sandbox = self._new() if self._ready_ones is None else self._taken(self._ready_ones)
        except Cancelled:
            raise SandboxClosed("the executor has ended its sandboxes") from None
        with self._lock:
            self._sandboxes.add(sandbox)
        if self._ended.is_set():  # perhaps just now, and not seen by kill_workers
            sandbox.close()
        return sandbox

    def _new(self) -> Sandbox:
        return Sandbox(self._rootfs, **cancellable(self._options, self._ended.is_set))

    def _taken(self, pool: Pool) -> Sandbox:
        while not self._ended.is_set():
            with suppress(TimeoutError):
                return pool.acquire(PATIENCE_SECONDS)
        raise Cancelled

    def _end(self, sandbox: Sandbox) -> None:
        sandbox.close()
        with self._lock:
            self._sandboxes.discard(sandbox)


def default_workers(mem_mib: int) -> int:
    """How many VMs of `mem_mib` MiB this computer has processors and free memory for; at least one."""
    affinity = getattr(os, "sched_getaffinity", None)
    processors = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    free = _free_mib()
    return max(1, processors if free is None else min(processors, free // (mem_mib + OVERHEAD_MIB)))


def _free_mib() -> int | None:
    """MiB of memory that can be had without swapping: of this computer, or of a container that has less.

    None where that is not told, which is everywhere but on Linux.
    """
    free = []
    with suppress(OSError):  # proc_meminfo(5)
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free.append(int(lines["MemAvailable"].split()[0]) >> 10)
    with suppress(OSError, ValueError):  # cgroup v2, of which a container sees its own as the root; "max" is no number
        limit, used = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        free.append(max(0, limit - used) >> 20)
    return min(free, default=None)

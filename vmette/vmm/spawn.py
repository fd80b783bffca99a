"""Child processes that cannot outlive this one."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from .. import native
from ..errors import VmmError


def find_program(name: str) -> Path | None:
    """The program `name` on this process's PATH."""
    # shutil.which would load three compression libraries at each start.
    candidates = (Path(directory, name) for directory in os.get_exec_path())
    # Access first: what is in a directory that is not this user's to search is_file() has no answer for.
    return next((path for path in candidates if os.access(path, os.X_OK) and path.is_file()), None)


class Child:
    """A running child process: ended by :meth:`kill`, or by the kernel when this process ends however it does."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.status: int | None = None
        """What `os.waitpid` said, once it has ended."""

    def poll(self, *, wait: bool = False) -> bool:
        """Whether the child has ended; with `wait`, once it has."""
        if self.status is None:
            try:
                pid, status = os.waitpid(self.pid, 0 if wait else os.WNOHANG)
            except ChildProcessError:  # somebody else in this program waits for every child
                pid, status = self.pid, 0
            if pid:
                self.status = status
        return self.status is not None

    def kill(self) -> None:
        """Ends the child now and waits until it is gone."""
        if not self.poll():  # one that is gone, or not ours after a fork, may have lent its number to another process
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.poll(wait=True)


def spawn(argv: Sequence[str], fds: Mapping[int, int], env: Mapping[str, str]) -> Child:
    """Starts `argv` (a path first) with descriptor `fds[n]` as its `n`, nothing else open, in a session of its own.

    stdin, stdout and stderr that `fds` does not name are those of this process.

    Raises:
        VmmError: it cannot be started.
    """
    if any("\0" in text for text in (*argv, *env, *env.values())):  # C would take what is before it for the whole
        raise VmmError(f"cannot start {argv[0]!r}: NUL in an argument or the environment")
    # The kernel ends a child when the *thread* that started it ends, so it must be one that lasts.
    pid = _in_lasting_thread(partial(native.spawn, argv, fds, env))
    if pid < 0:
        raise VmmError(f"cannot start {argv[0]}: {os.strerror(-pid)}")
    return Child(pid)


class _Spawner:
    """A thread that lives as long as the process and runs what it is given."""

    def __init__(self) -> None:
        import queue

        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name="vmette-spawner", daemon=True).start()

    def _work(self) -> None:
        while True:
            self._tasks.get()()

    def call(self, function: Callable[[], int]) -> int:
        done = threading.Event()
        results: list[int | BaseException] = []

        def task() -> None:
            try:
                results.append(function())
            except BaseException as error:  # the thread has to go on, and the caller to hear of it
                results.append(error)
            done.set()

        self._tasks.put(task)
        done.wait()
        (result,) = results
        if isinstance(result, BaseException):
            raise result
        return result


_spawner: _Spawner | None = None
_spawner_lock = threading.Lock()


def _in_lasting_thread(function: Callable[[], int]) -> int:
    global _spawner
    if threading.current_thread() is threading.main_thread():
        return function()
    with _spawner_lock:
        if _spawner is None:
            _spawner = _Spawner()
        spawner = _spawner
    return spawner.call(function)


def _forget() -> None:
    """After a fork: it takes no threads along, and the lock as it was, perhaps held by one of them."""
    global _spawner, _spawner_lock
    _spawner, _spawner_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)

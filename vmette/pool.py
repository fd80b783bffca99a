"""Sandboxes that are ready before they are asked for."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from subprocess import DEVNULL
from typing import TYPE_CHECKING, Any, Literal, overload

from .errors import CommandNotStarted, ConfigError, SandboxClosed, TimeoutExpired, VmetteError
from .guest import clock_command
from .machine import MachineOptions, cancellable, prepare
from .process import CompletedProcess, Popen
from .providers.base import Cancelled
from .sandbox import Sandbox

if TYPE_CHECKING:
    from typing_extensions import Unpack

logger = logging.getLogger(__name__)

STARTERS = 2
"""Sandboxes that are started at once."""
WARM_UP_SECONDS = 30.0
STALE_SECONDS = 30.0
"""One that has waited for so long is asked whether it still answers before it is handed out."""
ANSWER_SECONDS = 2.0
GIVE_WAY_SECONDS = 0.05
"""So long after one was taken, its first command has the processors for itself: only then is the next one started."""


class Pool:
    r"""Keeps `size` sandboxes ready, and starts another one for each that is taken.

    >>> with vmette.Pool("builtin://base", size=2) as pool:
    ...     pool.run(["echo", "hi"], text=True).stdout
    'hi\n'

    Each is handed out once, unless it is given back, and belongs to who took it. They wake from a template, which is
    made first if there is none, and have run `warm_up`, so that the code of a first command is translated where QEMU
    emulates. All methods may be called from any thread.

    Args:
        rootfs: As for :class:`vmette.Sandbox`.
        size: How many are kept ready. They take some 40 MB each under emulation, beside the template's memory, which
            they share.
        warm_up: A command that each runs before it is handed out, whatever its result; None is none.
        options: The machine's: see :class:`vmette.machine.MachineOptions`.

    Raises:
        ConfigError, ProviderError, PayloadError: there can be no such sandboxes.
    """

    def __init__(
        self,
        rootfs: str | os.PathLike[str] = "builtin://base",
        size: int = 2,
        *,
        warm_up: Sequence[str] | None = ("true",),
        **options: Unpack[MachineOptions],
    ) -> None:
        if size < 1:
            raise ConfigError(f"a pool of {size} sandboxes is of no use: there must be one")
        self.rootfs = os.fspath(rootfs)
        self.size = size
        machine = prepare(rootfs, options)  # what is wrong with it is said here and now
        self._shelf = _Shelf(self.rootfs, size, warm_up, options)
        if machine.template:
            self._shelf.template_of = machine.config
        self._finalizer = weakref.finalize(self, self._shelf.close)
        self._shelf.fill()

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<vmette.Pool {self.rootfs} size={self.size} ready={self.ready}>"

    @property
    def ready(self) -> int:
        """How many sandboxes wait."""
        return len(self._shelf.ready)

    def acquire(self, timeout: float | None = None) -> Sandbox:
        """A sandbox, which is the caller's to close. If none is ready, the next one that is.

        Args:
            timeout: Seconds to wait at most.

        Raises:
            TimeoutError: none was ready in time.
            SandboxClosed: the pool has been closed.
            VmetteError: the next one did not come up.
        """
        return self._shelf.take(timeout)

    def release(self, sandbox: Sandbox) -> None:
        """Gives one back: whoever takes it next finds what its earlier commands have left of files and processes.

        One that has ended is none, nor is one too many kept, or one that still has a share.

        Raises:
            ValueError: it is not of this pool, or was given back before.
        """
        self._shelf.put(sandbox)

    @contextmanager
    def sandbox(self, *, reuse: bool = False, timeout: float | None = None) -> Iterator[Sandbox]:
        """A sandbox for a `with` statement, at whose end it ends, or with `reuse` is given back.

        Raises:
            TimeoutError, SandboxClosed, VmetteError: as :meth:`acquire`.
        """
        sandbox = self.acquire(timeout)
        try:
            yield sandbox
        except BaseException:
            self._shelf.discard(sandbox)
            raise
        if reuse:
            self.release(sandbox)
        else:
            self._shelf.discard(sandbox)

    @overload
    def run(self, argv: Sequence[str], *, text: Literal[False] = ..., **arguments: Any) -> CompletedProcess[bytes]: ...

    @overload
    def run(self, argv: Sequence[str], *, text: Literal[True], **arguments: Any) -> CompletedProcess[str]: ...

    def run(self, argv: Sequence[str], **arguments: Any) -> CompletedProcess[Any]:
        """Runs `argv` in a sandbox of its own. The arguments are those of :meth:`vmette.Sandbox.run`.

        Raises:
            VmetteError: as :meth:`acquire` and :meth:`vmette.Sandbox.run`.
        """
        with self.sandbox() as sandbox:
            done: CompletedProcess[Any] = sandbox.run(argv, **arguments)
        return done

    def close(self) -> None:
        """Ends the sandboxes that wait. Those that were taken live on."""
        self._finalizer()


class _Shelf:
    """What is in a pool, and the threads that see to it, which must not keep the pool itself from being collected."""

    def __init__(self, rootfs: str, size: int, warm_up: Sequence[str] | None, options: MachineOptions) -> None:
        self.rootfs = rootfs
        self.size = size
        self.warm_up = warm_up
        self.closed = threading.Event()
        self.options = cancellable(options, self.closed.is_set)
        self.template_of: Any = None
        self.ready: deque[tuple[float, Sandbox]] = deque()
        self._taken: weakref.WeakSet[Sandbox] = weakref.WeakSet()
        self._changed = threading.Condition()
        self._starting = 0
        self._waiting = 0
        """How many want one now."""
        self._errors: list[BaseException] = []
        """Why the last ones did not come up; each is told once."""
        self._template_lock = threading.Lock()
        self._threads: set[threading.Thread] = set()

    def fill(self, give_way: float = 0.0) -> None:
        """Has as many started as there are too few, after `give_way` seconds unless they are waited for."""
        with self._changed:
            while (
                not self.closed.is_set()
                and self._starting + len(self.ready) < self.size
                and len(self._threads) < STARTERS
            ):
                self._starting += 1
                thread = threading.Thread(target=self._start, args=(give_way,), name="vmette-pool", daemon=True)
                self._threads.add(thread)
                thread.start()

    def take(self, timeout: float | None) -> Sandbox:
        """See :meth:`Pool.acquire`."""
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            self.fill()
            with self._changed:
                self._waiting += 1
                self._changed.notify_all()
                try:
                    self._changed.wait_for(
                        lambda: self.ready or self._errors or self.closed.is_set(),
                        None if end is None else max(0.0, end - time.monotonic()),
                    )
                finally:
                    self._waiting -= 1
                if self.closed.is_set():
                    raise SandboxClosed("the pool has been closed")
                since, sandbox = self.ready.popleft() if self.ready else (0.0, None)
                if sandbox is not None:
                    self._taken.add(sandbox)
                error = self._errors.pop() if sandbox is None and self._errors else None
            self.fill(GIVE_WAY_SECONDS)
            if error is not None:
                raise error
            if sandbox is None:
                assert timeout is not None
                raise TimeoutError(f"no sandbox was ready within {timeout:g} seconds")
            if not sandbox.closed and (time.monotonic() < since + STALE_SECONDS or _answers(sandbox)):
                return sandbox
            self.discard(sandbox)

    def put(self, sandbox: Sandbox) -> None:
        """See :meth:`Pool.release`."""
        with self._changed:
            if sandbox not in self._taken:
                raise ValueError("this sandbox is none of the pool's, or has been given back")
            self._taken.remove(sandbox)
            fit = not sandbox.closed and not sandbox._session.guest.has_shares
            if fit and not self.closed.is_set() and len(self.ready) < self.size:
                self.ready.appendleft((time.monotonic(), sandbox))
                self._changed.notify()
                return
        self.discard(sandbox)

    def discard(self, sandbox: Sandbox) -> None:
        """Ends a sandbox, for which nobody waits."""
        threading.Thread(target=sandbox.close, name="vmette-pool-end", daemon=True).start()

    def close(self) -> None:
        """See :meth:`Pool.close`."""
        self.closed.set()
        with self._changed:
            self._changed.notify_all()
            threads = [*self._threads]
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()
        while self.ready:
            self.ready.popleft()[1].close()

    # --- in the threads that start them

    def _start(self, give_way: float) -> None:
        """Starts sandboxes until there are enough, or one does not come up."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting > len(self.ready) or self.closed.is_set(), give_way)
        go_on = True
        while go_on:
            sandbox: Sandbox | None = None
            error: BaseException | None = None
            try:
                sandbox = self._new()
            except Cancelled:
                pass
            except BaseException as failure:  # who takes the next one is to hear of it
                error = failure
            with self._changed:
                if sandbox is not None:
                    self.ready.append((time.monotonic(), sandbox))
                if error is not None:
                    self._errors = [error]
                go_on = sandbox is not None and not self.closed.is_set()
                go_on = go_on and self._starting + len(self.ready) <= self.size
                if not go_on:
                    self._starting -= 1
                    self._threads.discard(threading.current_thread())
                self._changed.notify_all()

    def _new(self) -> Sandbox:
        self._make_template()
        sandbox = Sandbox(self.rootfs, **self.options)
        try:
            if self.warm_up is not None:
                with suppress(CommandNotStarted, TimeoutExpired):
                    sandbox.run(self.warm_up, timeout=WARM_UP_SECONDS)
                _answers(sandbox)  # that command took the process which a template has ready; this goes the long way
        except BaseException:
            sandbox.close()
            raise
        return sandbox

    def _make_template(self) -> None:
        """Once, and before the first one: then none has to boot."""
        from . import templates

        with self._template_lock:
            config, self.template_of = self.template_of, None
            if config is None or config.saved is not None or templates.unfit(config) is not None:
                return
            try:
                template = templates.Template(config)
                if template.problem() is not None:
                    template.make(self.closed.is_set)
            except Cancelled:
                raise
            except (VmetteError, OSError) as error:
                logger.info("the sandboxes of a pool boot: %s", error)


def _answers(sandbox: Sandbox) -> bool:
    """Whether the guest is well; sets its clock, too. One that is not is not waited for any longer."""
    try:
        return Popen(sandbox, sandbox._session, clock_command(), DEVNULL, DEVNULL, DEVNULL).wait(ANSWER_SECONDS) == 0
    except (VmetteError, OSError):
        return False

"""The guest's files for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from .aio import in_thread, surely
from .filesystem import Files

if TYPE_CHECKING:
    from .config import Command
    from .process import Popen

P = ParamSpec("P")
T = TypeVar("T")


class _Call:
    """What one method has the guest do, and an end to it."""

    def __init__(self, start: Callable[[Command], Popen]) -> None:
        self._start = start
        self._processes: list[Popen] = []
        self._cancelled = False

    def start(self, command: Command) -> Popen:
        """Begins a function of the agent."""
        process = self._start(command)
        self._processes.append(process)
        if self._cancelled:  # perhaps just now, and not seen by cancel()
            process.kill()
        return process

    def cancel(self) -> None:
        """Kills what has begun, and what begins."""
        self._cancelled = True
        for process in self._processes:
            process.kill()


def _awaited(
    method: Callable[Concatenate[Files, P], T],
) -> Callable[Concatenate[AsyncFiles, P], Coroutine[Any, Any, T]]:
    @wraps(method)
    async def call(self: AsyncFiles, /, *args: P.args, **kwargs: P.kwargs) -> T:
        call = _Call(self._start)
        future = in_thread(partial(method, Files(call.start), *args, **kwargs))
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError:
            call.cancel()
            with suppress(Exception):  # of what was killed
                await surely(future)
            raise
        return future.result()

    return call


class AsyncFiles:
    """The methods of :class:`vmette.filesystem.Files` as coroutines; each waits in a thread of its own.

    One that is cancelled has ended, in the guest too, before the cancellation goes on.
    """

    def __init__(self, start: Callable[[Command], Popen]) -> None:
        self._start = start

    read = _awaited(Files.read)
    read_text = _awaited(Files.read_text)
    read_to = _awaited(Files.read_to)
    write = _awaited(Files.write)
    write_text = _awaited(Files.write_text)
    write_from = _awaited(Files.write_from)
    list = _awaited(Files.list)
    stat = _awaited(Files.stat)
    exists = _awaited(Files.exists)
    mkdir = _awaited(Files.mkdir)
    remove = _awaited(Files.remove)
    copy_in = _awaited(Files.copy_in)
    copy_out = _awaited(Files.copy_out)
    archive = _awaited(Files.archive)
    unarchive = _awaited(Files.unarchive)

"""Waiting for descriptors: poll(2), and what stands in for it on macOS, whose poll does not know terminals."""

from __future__ import annotations

import os
import select
import sys
from typing import Protocol

HEED_SECONDS = 1.0
"""The main thread waits no longer at a time. Python runs the handler of a signal between two waits, and one that comes
just before a wait begins does not end that."""


class Poll(Protocol):
    """What :func:`select.poll` gives."""

    def register(self, fd: int, eventmask: int, /) -> object:
        """Watches `fd` for POLLIN, POLLOUT or both, in place of what it was watched for."""
        ...

    def unregister(self, fd: int, /) -> object:
        """Watches it no more."""
        ...

    def poll(self, timeout: float | None = None, /) -> list[tuple[int, int]]:
        """Waits for at most `timeout` milliseconds; says what is ready, and for what."""
        ...


class SelectPoll:
    """poll(2) by means of select(2), which knows every kind of descriptor. One that is not open is POLLNVAL."""

    def __init__(self) -> None:
        self._masks: dict[int, int] = {}

    def register(self, fd: int, eventmask: int, /) -> None:
        """See :class:`Poll`."""
        self._masks[fd] = eventmask

    def unregister(self, fd: int, /) -> None:
        """See :class:`Poll`."""
        del self._masks[fd]

    def poll(self, timeout: float | None = None, /) -> list[tuple[int, int]]:
        """See :class:`Poll`."""
        readers = [fd for fd, mask in self._masks.items() if mask & select.POLLIN]
        writers = [fd for fd, mask in self._masks.items() if mask & select.POLLOUT]
        seconds = None if timeout is None else timeout / 1000
        try:
            readable, writable, _ = select.select(readers, writers, [], seconds)
        except OSError:
            if invalid := [fd for fd in self._masks if not _is_open(fd)]:
                return [(fd, select.POLLNVAL) for fd in invalid]
            raise
        events = dict.fromkeys(readable, select.POLLIN)
        for fd in writable:
            events[fd] = events.get(fd, 0) | select.POLLOUT
        return list(events.items())


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def new_poll() -> Poll:
    """A poll object for descriptors of every kind."""
    return SelectPoll() if sys.platform == "darwin" else select.poll()

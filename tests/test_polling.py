"""`vmette.polling.SelectPoll`, the stand-in for poll(2), beside the real one."""

from __future__ import annotations

import os
import pty
import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from vmette.polling import Poll, SelectPoll, new_poll


@pytest.fixture(params=[select.poll, SelectPoll], ids=["poll", "select"])
def poll(request: pytest.FixtureRequest) -> Poll:
    made: Poll = request.param()
    return made


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def pipe(closing: ExitStack) -> tuple[int, int]:
    reader, writer = os.pipe()
    closing.callback(os.close, reader)
    closing.callback(os.close, writer)
    return reader, writer


def test_what_is_ready_is_told_with_its_mask(poll: Poll, closing: ExitStack) -> None:
    reader, writer = pipe(closing)
    poll.register(reader, select.POLLIN)
    assert poll.poll(0) == []
    poll.register(writer, select.POLLOUT)
    assert poll.poll() == [(writer, select.POLLOUT)]
    os.write(writer, b"x")
    assert sorted(poll.poll()) == sorted([(reader, select.POLLIN), (writer, select.POLLOUT)])


def test_a_mask_replaces_the_one_before(poll: Poll, closing: ExitStack) -> None:
    ours, theirs = socket.socketpair()
    closing.enter_context(ours)
    closing.enter_context(theirs)
    theirs.send(b"x")
    poll.register(ours.fileno(), select.POLLIN | select.POLLOUT)
    assert poll.poll() == [(ours.fileno(), select.POLLIN | select.POLLOUT)]
    poll.register(ours.fileno(), select.POLLOUT)
    assert poll.poll() == [(ours.fileno(), select.POLLOUT)]
    poll.unregister(ours.fileno())
    assert poll.poll(0) == []


def test_a_terminal(poll: Poll, closing: ExitStack) -> None:
    ours, theirs = pty.openpty()
    closing.callback(os.close, ours)
    closing.callback(os.close, theirs)
    poll.register(theirs, select.POLLIN)
    assert poll.poll(0) == []
    os.write(ours, b"line\n")
    assert poll.poll(1000) == [(theirs, select.POLLIN)]


def test_the_end_of_a_pipe_is_something_to_read(poll: Poll) -> None:
    reader, writer = os.pipe()
    os.close(writer)
    poll.register(reader, select.POLLIN)
    ((fd, event),) = poll.poll(1000)
    assert fd == reader
    assert event & (select.POLLIN | select.POLLHUP)
    assert os.read(reader, 1) == b""
    os.close(reader)


def test_what_is_not_open_is_invalid(poll: Poll, closing: ExitStack) -> None:
    reader, writer = pipe(closing)
    poll.register(reader, select.POLLIN)
    gone = os.dup(writer)
    os.close(gone)
    poll.register(gone, select.POLLOUT)
    assert poll.poll(1000) == [(gone, select.POLLNVAL)]


def test_it_waits_as_long_as_it_is_told(poll: Poll, closing: ExitStack) -> None:
    reader, _ = pipe(closing)
    poll.register(reader, select.POLLIN)
    before = time.monotonic()
    assert poll.poll(50) == []
    assert time.monotonic() - before >= 0.05


def test_each_system_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not isinstance(new_poll(), SelectPoll)
    monkeypatch.setattr("sys.platform", "darwin")
    assert isinstance(new_poll(), SelectPoll)

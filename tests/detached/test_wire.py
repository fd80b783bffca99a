"""What a client and a supervisor say to each other."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmette.detached import wire
from vmette.errors import VmetteError


@given(st.dictionaries(st.text(), st.one_of(st.text(), st.integers(), st.none(), st.lists(st.text()))))
def test_a_message_is_what_was_sent(message: dict[str, Any]) -> None:
    with suppress(UnicodeEncodeError):  # a surrogate that os.fsdecode does not make
        line = wire.encode(message)
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        assert wire.decode(line) == message


def test_bytes_that_are_no_text_pass() -> None:
    name = os.fsdecode(b"a\xff\n")
    assert wire.decode(wire.encode({"argv": [name]})) == {"argv": [name]}


@given(st.binary())
def test_any_line_is_a_message_or_an_error(line: bytes) -> None:
    with suppress(VmetteError):
        assert isinstance(wire.decode(line), dict)


@pytest.mark.parametrize(
    ("read", "values"),
    [
        (wire.text, [1, [], {}, True]),
        (wire.texts, [None, "a", [1], [["a"]], {}]),
        (wire.text_map, [None, "a", ["a"], {"a": 1}]),
        (wire.size, ["a", [1], [1, 2, 3], [-1, 2], [1, 65536], [1.0, 2], [True, 1], {}]),
        (lambda message, key: wire.number(message, key, 9), [None, "1", -1, 10, True, [], float("nan")]),
    ],
)
def test_a_malformed_value(read: Callable[[wire.Message, str], object], values: list[object]) -> None:
    for value in values:
        with pytest.raises(VmetteError, match="'key'"):
            read({"key": value}, "key")


def test_a_peer_is_of_this_user() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert wire.peer_uid(ours) == os.geteuid()

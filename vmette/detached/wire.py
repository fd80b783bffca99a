"""What a client and a supervisor say to each other over the machine's socket: lines of JSON.

A connection carries one request:

    {"do": "exec", "argv": [...], "env": {...}, "cwd": null, "user": null, "terminal": null, "builtin": false}
        with the descriptors of stdin, stdout and stderr (SCM_RIGHTS), non-blocking, from then on the supervisor's;
        `terminal` is [rows, columns]. Meanwhile {"resize": [rows, columns]} and {"signal": number} may follow.
        When the command has ended: {"exit_code": number}, which is 128 + N if signal N ended it.
    {"do": "stop", "patience": seconds}
    {"do": "signal", "signal": number}
        Answered with {} at once.

What cannot be done is answered with {"error": text, "exit_code": number}. A command whose client goes away is killed.
Text is as :func:`os.fsdecode` has it.
"""

from __future__ import annotations

import array
import errno
import json
import socket
import struct
import sys
from collections.abc import Sequence

from .. import descriptors
from ..errors import ConfigError, VmetteError
from ..protocol import MAX_EXEC

Message = dict[str, object]

XUCRED_BYTES = 76
"""Version, user, number of groups, and 16 of them."""

MAX_LINE = 2 * MAX_EXEC
"""Bytes of one line: what the guest would take of a command, with JSON's quotes and escapes."""
STREAMS = 3


def encode(message: Message) -> bytes:
    """A line."""
    return json.dumps(message, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogateescape") + b"\n"


def decode(line: bytes) -> Message:
    """The message in a line.

    Raises:
        VmetteError: it is none.
    """
    try:
        message = json.loads(line.decode("utf-8", "surrogateescape"))
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise VmetteError("what came over the machine's socket is no message of vmette")
    return message


def send(connection: socket.socket, message: Message, fds: Sequence[int] = ()) -> None:
    """Sends a message, and the descriptors `fds` with it.

    Raises:
        ConfigError: it is too long.
        OSError: the other side has gone.
    """
    line = encode(message)
    if len(line) > MAX_LINE:
        raise ConfigError("the command's arguments and environment are larger than 2 MiB")
    sent = socket.send_fds(connection, [line], fds) if fds else 0
    connection.sendall(memoryview(line)[sent:])


def receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """What has come: bytes, none at the end, and descriptors.

    Raises:
        OSError: nothing has come, or the other side has gone.
    """
    return descriptors.receive(connection, 65536, STREAMS)


def peer_uid(connection: socket.socket) -> int:
    """The user at the other end (SO_PEERCRED, unix(7))."""
    if sys.platform == "darwin":  # LOCAL_PEERCRED of level SOL_LOCAL, unix(4): struct xucred of <sys/ucred.h>
        version, uid = struct.unpack("II", connection.getsockopt(0, 1, XUCRED_BYTES)[:8])
        if version != 0:
            raise OSError(errno.EPROTO, "the system speaks of its users in another version")
        return int(uid)
    credentials = array.array("i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return credentials[1] & 0xFFFFFFFF


# --- what is in a message: each raises VmetteError if it is not what it should be


def text(message: Message, key: str) -> str | None:
    """A text, or None."""
    value = message.get(key)
    if value is not None and not isinstance(value, str):
        raise _malformed(key)
    return value


def texts(message: Message, key: str) -> list[str]:
    """A list of texts."""
    value = message.get(key)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise _malformed(key)
    return value


def text_map(message: Message, key: str) -> dict[str, str]:
    """Texts by name."""
    value = message.get(key)
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise _malformed(key)
    return value


def number(message: Message, key: str, largest: float) -> float:
    """A number from 0 to `largest`."""
    value = message.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= largest:
        raise _malformed(key)
    return value


def size(message: Message, key: str) -> tuple[int, int] | None:
    """Rows and columns of a terminal, or None."""
    value = message.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2 or not all(type(n) is int and 0 <= n <= 65535 for n in value):
        raise _malformed(key)
    return value[0], value[1]


def _malformed(key: str) -> VmetteError:
    return VmetteError(f"a message over the machine's socket has a malformed {key!r}")

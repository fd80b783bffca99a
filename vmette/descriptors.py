"""Open files that come over a Unix socket (SCM_RIGHTS, unix(7))."""

from __future__ import annotations

import array
import os
import socket

CLOEXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
"""Keeps them from the programs that another thread starts meanwhile; macOS does not have it."""


def receive(connection: socket.socket, size: int, most: int) -> tuple[bytes, list[int]]:
    """At most `size` bytes, none at the end, and at most `most` descriptors, which no child process inherits.

    Raises:
        OSError: nothing has come, or the other side has gone.
    """
    # Not socket.recv_fds, which forgets the flags.
    space = socket.CMSG_SPACE(most * array.array("i").itemsize)
    data, ancillary, _, _ = connection.recvmsg(size, space, CLOEXEC)
    descriptors = array.array("i")
    for level, kind, value in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(value[: len(value) - len(value) % descriptors.itemsize])
    if not CLOEXEC:
        for fd in descriptors:
            os.set_inheritable(fd, False)
    return data, list(descriptors)

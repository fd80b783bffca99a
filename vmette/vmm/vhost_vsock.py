"""vsock devices on Linux hosts: the kernel's own, /dev/vhost-vsock, which has to be opened for each VM (`vsock(7)`)."""

from __future__ import annotations

import logging
import os
import socket
from contextlib import suppress
from pathlib import Path

from ..errors import VmmError, reason

logger = logging.getLogger(__name__)

DEVICE = Path("/dev/vhost-vsock")
FIRST_CID, LAST_CID = 3, (1 << 32) - 2
"""Context ids that a guest can have."""
HOST_CID = 2
BACKLOG = 128


def open_device() -> int:
    """The host's side of a device, for one VM.

    Raises:
        VmmError: this host has none, or not for this user.
    """
    try:
        return os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        raise VmmError(f"{DEVICE} does not exist; is the kernel module vhost_vsock loaded?") from None
    except OSError as error:
        raise VmmError(f"{DEVICE} cannot be opened: {reason(error)}") from error


def available() -> bool:
    """Whether this host has such devices to give."""
    try:
        os.close(open_device())
    except VmmError as error:
        logger.debug("vsock goes through the guest's agent: %s", error)
        return False
    return True


def new_cid() -> int:
    """A context id, most likely free."""
    import random

    return random.SystemRandom().randint(FIRST_CID, LAST_CID)


class VhostVsock:
    """The device of the VM that has the context id `cid`."""

    def __init__(self, cid: int) -> None:
        self.cid = cid

    def connect(self, port: int, timeout: float) -> socket.socket:
        """See :meth:`vmette.vmm.base.VsockDevice.connect`."""
        connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout)
            connection.connect((self.cid, port))
            connection.settimeout(None)
        except BaseException:
            connection.close()
            raise
        return connection

    def listen(self, port: int) -> Listener:
        """See :meth:`vmette.vmm.base.VsockDevice.listen`."""
        return Listener(self.cid, port)


class Listener:
    """A port of this host, which other VMs may find too: they are turned away."""

    def __init__(self, cid: int, port: int) -> None:
        self._cid = cid
        self._listener = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
        try:
            self._listener.bind((HOST_CID, port))
            self._listener.listen(BACKLOG)
            self._listener.setblocking(False)
        except BaseException:
            self._listener.close()
            raise

    def fileno(self) -> int:
        """Readable when there is somebody."""
        return self._listener.fileno()

    def accept(self) -> socket.socket | None:
        """See :meth:`vmette.vmm.base.VsockListener.accept`."""
        with suppress(OSError):  # it has gone again
            connection, (peer, _) = self._listener.accept()
            if peer == self._cid:
                connection.setblocking(True)
                return connection
            connection.close()
        return None

    def close(self) -> None:
        """Listens no more."""
        self._listener.close()

"""Directories of this host in a sandbox that runs: FUSE, whose requests and answers go over the control channel.

What a machine is started with is shared by its VMM, which is faster; that cannot be added to, nor taken away.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import tempfile
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from .config import Command, Share
from .errors import ConfigError, GuestError, ProtocolError, TimeoutExpired, VmetteError, reason
from .fuse import DirectoryServer
from .process import Popen
from .protocol import MAX_CONTROL, decode_error

if TYPE_CHECKING:
    from .sandbox import Sandbox, Session

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 30.0
"""What a guest has to mount it, or to let go of it."""
PIECE = 1 << 18


class SharedDirectory:
    """A directory of this host in a running sandbox: see :meth:`vmette.Sandbox.share`.

    A context manager, which takes it away.
    """

    def __init__(self, sandbox: Sandbox, session: Session, share: Share) -> None:
        assert share.target is not None
        self.path = share.path
        self.target = share.target
        self.read_only = share.read_only
        self._sandbox = sandbox
        asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
        what = f"{share.path} cannot be shared at {share.target}"
        try:
            server = DirectoryServer(share.path, read_only=share.read_only)
        except OSError as error:
            raise ConfigError(f"{what}: {reason(error)}") from error
        self._ours, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile() as said:
            theirs.setblocking(False)
            # It knows nothing of the sandbox, which so can be collected as garbage.
            serving = (self._ours, server, asked)
            threading.Thread(target=_serve, args=serving, name="vmette-share", daemon=True).start()
            words = (b"share", os.fsencode(share.target), *([b"ro"] if share.read_only else []))
            command = Command(words, builtin=True, background=True)
            try:
                self._process = Popen(sandbox, session, command, theirs.fileno(), theirs.fileno(), said.fileno())
            except BaseException:
                self._hang_up()
                raise
            theirs.close()
            try:
                mounted = asked.get(timeout=ANSWER_SECONDS)
                if not mounted:
                    self._process.wait(ANSWER_SECONDS)
            except (queue.Empty, TimeoutExpired):
                self._process.kill()
                raise GuestError(f"{what}: the guest does not answer") from None
            if not mounted:
                raise GuestError(f"{what}: {_why(os.pread(said.fileno(), MAX_CONTROL, 0))}")

    def __enter__(self) -> SharedDirectory:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<vmette.SharedDirectory {self.path} at {self.target}>"

    def close(self) -> None:
        """Takes it away from the guest; files that are open there fail from then on. Does nothing if it is gone.

        Raises:
            GuestError: the guest does not let go of it.
        """
        self._hang_up()
        try:
            self._process.wait(ANSWER_SECONDS)
        except TimeoutExpired:
            self._process.kill()
            raise GuestError(f"the guest does not let go of {self.target}") from None
        except VmetteError:
            pass  # the sandbox has ended

    def _hang_up(self) -> None:
        with suppress(OSError):
            self._ours.shutdown(socket.SHUT_WR)


def _why(said: bytes) -> str:
    """What the guest's function says of its end."""
    with suppress(ProtocolError):
        if text := decode_error(0, said).text:
            return text
    return "the guest has let go of it"


def _serve(connection: socket.socket, server: DirectoryServer, asked: queue.SimpleQueue[bool]) -> None:
    """The thread: answers the guest until either side hangs up. `asked` hears when it first has, and of the end."""
    greeted = False
    try:
        with connection:
            while data := connection.recv(PIECE):
                if not greeted:
                    greeted = True
                    asked.put(True)
                for reply in server.receive(data):
                    connection.sendall(reply)
    except ProtocolError as error:
        logger.warning("a share is taken away: %s", error)
    except OSError as error:  # the sandbox is gone
        logger.debug("a share has ended: %s", reason(error))
    finally:
        server.close()
        asked.put(False)

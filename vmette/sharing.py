"""Directories of this host in a sandbox that runs: FUSE, whose requests and answers go over the control channel.

What a machine is started with is shared by its VMM, which is faster; that cannot be added to, nor taken away.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
from contextlib import ExitStack, suppress
from subprocess import PIPE
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
        with ExitStack() as undo:
            try:
                server = DirectoryServer(share.path, read_only=share.read_only)
                undo.callback(server.close)
                self._ours, theirs = socket.socketpair()
            except OSError as error:
                raise ConfigError(f"{what}: {reason(error)}") from error
            undo.callback(self._ours.close)
            undo.enter_context(theirs)
            theirs.setblocking(False)
            self._ours.settimeout(None)  # whatever socket.setdefaulttimeout has been told
            # It knows nothing of the sandbox, which so can be collected as garbage.
            serving = (self._ours, server, asked)
            threading.Thread(target=_serve, args=serving, name="vmette-share", daemon=True).start()
            undo.pop_all()
        try:
            with theirs:
                words = (b"share", os.fsencode(share.target), *([b"ro"] if share.read_only else []))
                command = Command(words, builtin=True, background=True)
                self._process = Popen(sandbox, session, command, theirs.fileno(), theirs.fileno(), PIPE)
            self._await_mount(asked, what)
        except BaseException:
            self._hang_up()
            raise

    def _await_mount(self, asked: queue.SimpleQueue[bool], what: str) -> None:
        said = self._process.stderr
        assert said is not None
        with said:  # nobody listens any longer: what the guest says there has no end
            try:
                if asked.get(timeout=ANSWER_SECONDS):
                    return
                self._process.wait(ANSWER_SECONDS)
            except (queue.Empty, TimeoutExpired):
                self._process.kill()
                raise GuestError(f"{what}: the guest does not answer") from None
            raise GuestError(f"{what}: {_why(said.read(MAX_CONTROL))}")

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
        except (VmetteError, OSError):
            pass  # the sandbox has ended, or the guest was cut off

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
            try:
                while data := connection.recv(PIECE):
                    if not greeted:
                        greeted = True
                        asked.put(True)
                    for reply in server.receive(data):
                        connection.sendall(reply)
            except OSError:  # this side has hung up. To leave requests unread would cut the guest off: it is to unmount
                with suppress(OSError):
                    while connection.recv(PIECE):
                        pass
    except ProtocolError as error:
        logger.warning("a share is taken away: %s", error)
    finally:
        server.close()
        asked.put(False)

"""virtio-fs: a directory of the host, served to one VM by the distribution's virtiofsd.

There are two programs of that name: the one written in C that came with QEMU until 7.2, and its successor in Rust.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ..errors import VmmError
from . import probe
from .spawn import Child, find_program, spawn

logger = logging.getLogger(__name__)

LOCATIONS = ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/kvm/virtiofsd")
ANSWER_SECONDS = 5.0

# VHOST_USER_GET_FEATURES, protocol version 1, no payload; and its answer's size (QEMU's docs/interop/vhost-user.rst)
GET_FEATURES = (1).to_bytes(4, "little") + (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
FEATURES_BYTES = 20


@dataclass(frozen=True)
class Daemon:
    """A virtiofsd that serves one directory, and the connection to it that belongs to QEMU."""

    child: Child
    connection: socket.socket
    ended: int
    """A descriptor that becomes readable when the daemon has ended."""

    def close(self) -> None:
        """Ends it."""
        self.connection.close()
        self.child.kill()
        os.close(self.ended)


@dataclass(frozen=True)
class Virtiofsd:
    """An installed virtiofsd that works here."""

    path: str
    rust: bool
    read_only: bool
    """Whether it can serve a directory that the guest cannot write to."""

    def _argv(self, directory: Path, fd: int, *, read_only: bool) -> list[str]:
        if not self.rust:
            options = [f"source={directory}", "cache=auto", "xattr", "log_level=err"]
            return [self.path, f"--fd={fd}", "-f", *(part for option in options for part in ("-o", option))]
        argv = [self.path, f"--fd={fd}", f"--shared-dir={directory}", "--cache=auto", "--xattr", "--log-level=error"]
        return [*argv, *(["--readonly"] if read_only else [])]

    def can_serve(self, directory: Path, *, read_only: bool) -> bool:
        """Whether it can serve `directory` with that access. The C program splits its options at commas."""
        return (self.read_only or not read_only) and (self.rust or not set(",\\") & set(str(directory.absolute())))

    def serve(self, directory: Path, *, read_only: bool, stderr: int) -> Daemon:
        """Starts it for `directory`.

        Raises:
            VmmError: it does not start.
        """
        # It takes a listening socket. Ours is the first connection to it, and then its name is gone.
        with tempfile.TemporaryDirectory(prefix="vmette-") as private, socket.socket(socket.AF_UNIX) as listener:
            name = str(Path(private) / "fs")
            listener.bind(name)
            listener.listen(1)
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(name)
            try:
                null = os.open(os.devnull, os.O_RDWR)
                try:
                    argv = self._argv(directory.absolute(), 3, read_only=read_only)
                    fds = {0: null, 1: stderr, 2: stderr, 3: listener.fileno()}
                    child = spawn(argv, fds, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"})
                finally:
                    os.close(null)
                return Daemon(child, connection, os.pidfd_open(child.pid))
            except BaseException:
                connection.close()
                raise

    def works(self) -> bool:
        """Whether it can run here at all: it needs root, or user namespaces with a range of ids."""
        null = os.open(os.devnull, os.O_RDWR)
        try:
            with tempfile.TemporaryDirectory(prefix="vmette-") as directory:
                daemon = self.serve(Path(directory), read_only=False, stderr=null)
                try:
                    daemon.connection.settimeout(ANSWER_SECONDS)
                    daemon.connection.sendall(GET_FEATURES)
                    return len(daemon.connection.recv(FEATURES_BYTES, socket.MSG_WAITALL)) == FEATURES_BYTES
                finally:
                    daemon.close()
        except (OSError, VmmError) as error:
            logger.info("%s does not work here: %s", self.path, error)
            return False
        finally:
            os.close(null)


def locate() -> Path | None:
    """The virtiofsd of this host."""
    return find_program("virtiofsd") or next((Path(path) for path in LOCATIONS if os.access(path, os.X_OK)), None)


def find() -> Virtiofsd | None:
    """The virtiofsd of this host if it works for this user. What is found out is remembered."""
    path = locate()
    if path is None:
        return None
    facts = {"program": probe.identity(path), "user": str(os.geteuid()), "host": os.uname().release}

    def help_has(word: str) -> bool:
        text = subprocess.run([path, "--help"], capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
        return word in text.stdout + text.stderr

    rust = probe.remembered("virtiofsd-rust", facts, lambda: help_has("--shared-dir"))
    read_only = rust and probe.remembered("virtiofsd-readonly", facts, lambda: help_has("--readonly"))
    daemon = Virtiofsd(str(path), rust, read_only)
    return daemon if probe.remembered("virtiofsd-works", facts, daemon.works) else None

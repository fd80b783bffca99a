"""User-mode networking by passt, where it is installed: QEMU's own NAT lets the guest reach the host's loopback.

QEMU and passt exchange Ethernet frames over a socket, each after its length (4 bytes, big-endian).
"""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

from ..errors import VmmError
from . import probe
from .spawn import Child, find_program, spawn

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 5.0
FRAME_BYTES = 42
"""Of an ARP frame (RFC 826, for IPv4 over Ethernet)."""


def start(program: Path, dns: str) -> tuple[Child, socket.socket]:
    """Starts it. Returns it, and the connection that belongs to QEMU; it ends when that is closed.

    `dns` is the address, of IPv4, at which it takes questions for the host's resolver.

    Raises:
        VmmError: it does not start.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        null = os.open(os.devnull, os.O_RDWR)
        try:
            # IPv4 alone, which is what the guest asks for an address of; no port of the host leads to the guest.
            argv = [str(program), "--foreground", "--quiet", "--ipv4-only", "--no-map-gw", "--dns-forward", dns]
            argv += ["--tcp-ports", "none", "--udp-ports", "none", "--fd", "3"]
            fds = {0: null, 1: null, 2: null, 3: theirs.fileno()}
            return spawn(argv, fds, {"PATH": "/usr/bin:/bin"}), ours
        except BaseException:
            ours.close()
            raise
        finally:
            os.close(null)


def works(program: Path) -> bool:
    """Whether it runs here, as this user: it answers when it is asked for a hardware address."""
    broadcast, card = b"\xff" * 6, bytes.fromhex("525400123456")
    ours, theirs = socket.inet_aton("169.254.0.1"), socket.inet_aton("169.254.0.2")
    question = broadcast + card + bytes.fromhex("0806 0001 0800 06 04 0001") + card + ours + bytes(6) + theirs
    try:
        child, connection = start(program, "169.254.0.2")
        with connection:
            try:
                connection.settimeout(ANSWER_SECONDS)
                connection.sendall(FRAME_BYTES.to_bytes(4, "big") + question)
                return bool(connection.recv(4 + FRAME_BYTES))  # the answer, or the beginning of it
            finally:
                child.kill()
    except (OSError, VmmError) as error:
        logger.info("%s does not work here: %s", program, error)
        return False


def find() -> Path | None:
    """The passt of this host, if it works for this user. What is found out is remembered."""
    path = find_program("passt")
    if path is None:
        logger.debug("there is no passt on PATH: the network is QEMU's own")
        return None
    if not _default_route():  # without which it does not start
        logger.debug("this host has no default route: the network is QEMU's own, not passt's")
        return None
    facts = {"program": probe.identity(path), "user": str(os.geteuid()), "host": os.uname().release}
    if probe.remembered("passt-works", facts, lambda: works(path)):
        return path
    logger.debug("%s does not work here: the network is QEMU's own", path)
    return None


def _default_route() -> bool:
    """Whether IPv4 has one (proc_pid_net(5): the second column is where a route leads)."""
    try:
        lines = Path("/proc/net/route").read_text().splitlines()[1:]
    except OSError:
        return False
    return any(line.split()[1:2] == ["00000000"] for line in lines)

"""`vmette logs`."""

from __future__ import annotations

import sys
import time

import click

from ..detached.log import STDOUT, VMETTE, LogReader
from ..detached.machines import open_machine
from . import complain

INTERVAL = 0.1
"""Seconds between two looks at the log."""


@click.command()
@click.option("-f", "--follow", is_flag=True, help="Go on until the machine ends.")
@click.argument("name")
def command(follow: bool, name: str) -> None:
    """Print what the command of machine NAME has written: its stdout to stdout, its stderr to stderr, byte for byte.

    What vmette has to say of the machine is on stderr too. The last 32 MiB are there, and up to 64.
    """
    with open_machine(name) as entry, LogReader(entry.fd) as reader:
        ended = False
        while not ended:
            ended = not follow or not entry.alive  # before the look: what comes after its end is nothing
            for channel, data in reader.frames():
                if channel == VMETTE:
                    complain(data.decode(errors="replace").rstrip("\n"))
                    continue
                stream = sys.stdout.buffer if channel == STDOUT else sys.stderr.buffer
                stream.write(data)
                stream.flush()
            if not ended:
                time.sleep(INTERVAL)

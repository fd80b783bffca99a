"""`vmette kill`."""

from __future__ import annotations

import signal
from functools import partial

import click

from ..config import signal_number
from ..detached import client
from ..detached.machines import Entry
from .stop import for_each


@click.command()
@click.option(
    "-s", "--signal", "name", default="KILL", show_default=True, help="Another signal, for the main command only."
)
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def command(name: str, names: tuple[str, ...]) -> int:
    """Kill the main commands of machines, with all processes that they have started: the machines end.

    Returns when they have ended. With another signal it is the command's to decide what happens.
    """
    return for_each(names, partial(kill, number=signal_number(name)))


def kill(entry: Entry, number: int) -> None:
    """Signals a machine's main command, and waits for the machine's end if it cannot be otherwise."""
    client.ask(entry, {"do": "signal", "signal": number})
    if number == signal.SIGKILL:
        entry.wait()

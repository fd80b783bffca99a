"""`vmette rm`."""

from __future__ import annotations

import signal
from contextlib import suppress

import click

from ..detached.machines import Entry, machines
from ..errors import SandboxClosed, VmetteError
from .kill import kill
from .stop import for_each


@click.command()
@click.option("-f", "--force", is_flag=True, help="Kill those that run.")
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def command(force: bool, names: tuple[str, ...]) -> int:
    """Remove machines that have ended: their logs and what is known of them."""

    def remove(entry: Entry) -> None:
        if entry.alive and not entry.has_ended:
            if not force:
                raise VmetteError(f"machine {entry.name!r} is running: stop it before, or use --force")
            with suppress(SandboxClosed):  # before the signal came
                kill(entry, signal.SIGKILL)
        entry.wait()
        with machines() as all_machines:
            all_machines.remove(entry)

    return for_each(names, remove)

"""`vmette stop`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress

import click

from ..detached import client
from ..detached.machines import Entry, open_machine
from ..errors import SandboxClosed, VmetteError
from ..guest import STOP_SECONDS
from . import complain


@click.command()
@click.option(
    "-t",
    "--time",
    "seconds",
    type=click.FloatRange(0, 1e9),
    default=STOP_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="How long to wait before the command is killed.",
)
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def command(seconds: float, names: tuple[str, ...]) -> int:
    """End machines: with the stop signal of the image or SIGTERM, and after a while with SIGKILL.

    Returns when they have ended. One that had ended before is no error.
    """
    return for_each(names, lambda entry: stop(entry, seconds))


def stop(entry: Entry, seconds: float) -> None:
    """Stops a machine and waits for its end."""
    with suppress(SandboxClosed):
        client.ask(entry, {"do": "stop", "patience": seconds})
    entry.wait()


def for_each(names: Sequence[str], action: Callable[[Entry], None]) -> int:
    """Has `action` done to each machine, and prints its name; goes on after an error. The exit code: 125 after one."""
    failed = False
    for name in names:
        try:
            with open_machine(name) as entry:
                action(entry)
            click.echo(name)
        except (VmetteError, OSError) as error:
            complain(f"vmette: {error}")
            failed = True
    return VmetteError.exit_code if failed else 0

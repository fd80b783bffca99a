"""`vmette ps`."""

from __future__ import annotations

import json
import shlex
import time
from dataclasses import asdict

import click

from ..detached.machines import State, machines
from .images import age

COMMAND_COLUMNS = 30


@click.command()
@click.option("-a", "--all", "everything", is_flag=True, help="List those too that have ended.")
@click.option("--json", "as_json", is_flag=True, help="One JSON list, times in seconds since 1970.")
def command(everything: bool, as_json: bool) -> None:
    """List the machines that `vmette run --detach` has started."""
    with machines() as all_machines:
        states = [state for state in all_machines.states() if everything or state.ended is None]
    if as_json:
        click.echo(json.dumps([{**asdict(state), "status": state.status} for state in states], indent=1))
        return
    rows = [("NAME", "ROOTFS", "COMMAND", "STATUS")]
    rows += [(state.name, state.rootfs, _command(state), _status(state)) for state in states]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for row in rows:
        click.echo("  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]]))


def _command(state: State) -> str:
    text = "".join(c if c.isprintable() else "?" for c in shlex.join(state.command))
    return text if len(text) <= COMMAND_COLUMNS else f"{text[: COMMAND_COLUMNS - 1]}…"


def _status(state: State) -> str:
    """`running, 3m ago`: what it is, and since when."""
    if state.ended is not None:
        return f"exited ({state.exit_code}), {age(time.time() - state.ended)}"
    return f"{state.status}, {age(time.time() - (state.started or state.created))}"

"""`vmette completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def command(shell: str) -> None:
    """Print the completion script for SHELL: put `eval "$(vmette completion bash)"` into ~/.bashrc."""
    from . import group

    completion = get_completion_class(shell)
    assert completion is not None
    # The shell asks by setting this variable; `main` hands it to click.
    click.echo(completion(group, {}, "vmette", "_VMETTE_COMPLETE").source())

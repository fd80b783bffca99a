"""`vmette cp`."""

from __future__ import annotations

import os
import re

import click

from ..detached.client import Exec
from ..detached.machines import Entry, open_machine
from ..filesystem import MAX_COPY, Files

STREAM = "-"
_REMOTE = re.compile(r"([a-z0-9][a-z0-9_.-]{0,62}):(.*)", re.DOTALL)


@click.command()
@click.option(
    "--max-bytes", type=click.IntRange(0), default=MAX_COPY, show_default=True, help="Take no more out of a machine."
)
@click.argument("source")
@click.argument("target")
def command(max_bytes: int, source: str, target: str) -> None:
    """Copy files into a machine, or out of it: one of SOURCE and TARGET is NAME:PATH.

    A file or directory lands in TARGET if that is a directory, else it becomes TARGET. SOURCE/. is what is in SOURCE.
    Links are copied as links, but for SOURCE itself. Times are kept, and modes, here as far as your umask allows.
    Owners are not: in the guest all belongs to root, here to you. (A file here with a colon in its name is ./FILE.)

    The other one can be -: a tar archive on stdin, which is unpacked in the directory TARGET, or on stdout.

    \b
    vmette cp src box:/srv            makes /srv/src, if there is a /srv
    vmette cp box:/var/log/. logs     what is in /var/log
    vmette cp box:/etc - | tar t
    """  # noqa: D301 (click wants the character)
    there, here = _REMOTE.fullmatch(source), _REMOTE.fullmatch(target)
    if there and not here:
        with open_machine(there[1]) as entry:
            if target == STREAM:
                with os.fdopen(1, "wb", closefd=False) as file:
                    files_of(entry).archive(_absolute(there[2]), file, max_bytes=max_bytes)
            else:
                files_of(entry).copy_out(_absolute(there[2]), target, max_bytes=max_bytes)
    elif here and not there:
        with open_machine(here[1]) as entry:
            if source == STREAM:
                with os.fdopen(0, "rb", closefd=False) as file:
                    files_of(entry).unarchive(file, _absolute(here[2]))
            else:
                files_of(entry).copy_in(source, _absolute(here[2]))
    else:
        raise click.UsageError("one of SOURCE and TARGET is NAME:PATH, the other one a path of this computer or -")


def files_of(entry: Entry) -> Files:
    """The files of a detached machine."""
    return Files(lambda command: Exec(entry, [*map(os.fsdecode, command.argv)], builtin=True))


def _absolute(path: str) -> str:
    """A path of the guest: relative ones begin at its root."""
    return path if path.startswith("/") else f"/{path}"

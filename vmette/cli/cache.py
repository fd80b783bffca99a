"""`vmette cache`."""

from __future__ import annotations

import re
import time

import click

from .. import assets
from ..errors import ConfigError
from ..providers.base import Context
from ..providers.layered import cache_limit, forget, store_of
from .progress import human

SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


@click.group()
def command() -> None:
    """See what the cache of images and templates holds, and clear it."""


@command.command()
def df() -> None:
    """Print how much of the disk the cache takes, by kind."""
    from ..images.prune import KINDS, items

    store = store_of(Context(assets.cache_root()))
    found = list(items(store))
    click.echo(f"{'KIND':<12} {'ENTRIES':>7} {'SIZE':>9}")
    for kind in KINDS:
        sizes = [item.size for item in found if item.kind == kind]
        click.echo(f"{kind:<12} {len(sizes):>7} {human(sum(sizes)):>9}")
    click.echo(f"{'total':<12} {len(found):>7} {human(sum(item.size for item in found)):>9}")


@command.command()
@click.option("--all", "everything", is_flag=True, help="Remove all that no running VM uses.")
@click.option("--until", metavar="AGE", help="Remove what has not been used for AGE: 90s, 30m, 24h, 7d, 2w.")
def prune(everything: bool, until: str | None) -> None:
    """Remove what has not been used for longest, down to VMETTE_CACHE_MAX_BYTES. What a running VM uses stays."""
    from ..images.prune import prune as prune_store

    limit = cache_limit()
    if everything and until is not None:
        raise click.UsageError("--all and --until exclude each other")
    if not everything and until is None and limit is None:
        raise click.UsageError("how much? set VMETTE_CACHE_MAX_BYTES, or give --until or --all")
    context = Context(assets.cache_root())
    store = store_of(context)
    if everything:
        forget(context)
        removed = prune_store(store)
    elif until is not None:
        removed = prune_store(store, unused_since=time.time() - seconds(until))
    else:
        removed = prune_store(store, max_bytes=limit)
    click.echo(f"removed {len(removed)} entries, {human(sum(item.size for item in removed))}")


def seconds(text: str) -> int:
    """The number of seconds of `24h` and its like.

    Raises:
        ConfigError: it is malformed.
    """
    match = re.fullmatch(r"([0-9]{1,9})([smhdw])", text)
    if match is None:
        raise ConfigError(f"age {text!r} is malformed: it is a number and s, m, h, d or w, like 24h")
    return int(match[1]) * SECONDS[match[2]]

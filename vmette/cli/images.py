"""`vmette images`."""

from __future__ import annotations

import json
import time

import click

from .. import assets
from ..providers.base import Context
from .progress import human


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON list, sizes in bytes and times in seconds since 1970.")
def command(as_json: bool) -> None:
    """List the images of registries that are in the cache."""
    from ..providers.oci.provider import cached

    images = sorted(cached(Context(assets.cache_root())), key=lambda image: (image.reference, image.platform))
    if as_json:
        click.echo(json.dumps([vars(image) for image in images], indent=1))
        return
    width = max([len(image.reference) for image in images] + [9])
    click.echo(f"{'REFERENCE':<{width}}  {'PLATFORM':<14}  {'DIGEST':<19}  {'CHECKED':>8}  {'SIZE':>8}")
    for image in images:
        ago = age(time.time() - image.asked)
        digest = image.manifest[:19]
        size = human(image.size)
        click.echo(f"{image.reference:<{width}}  {image.platform:<14}  {digest:<19}  {ago:>8}  {size:>8}")


def age(seconds: float) -> str:
    """So many seconds in words."""
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{int(seconds // length)}{unit} ago"
    return "now"

"""`vmette providers`."""

from __future__ import annotations

import inspect

import click


@click.command()
def command() -> None:
    """List the rootfs providers in the order in which they are asked, with what each one claims."""
    from ..providers import default_registry

    providers = list(default_registry())
    width = max(len(provider.name) for provider in providers)
    for provider in providers:
        summary = (inspect.getdoc(type(provider)) or "").partition("\n")[0]
        click.echo(f"{provider.name:{width}}  {summary}".rstrip())

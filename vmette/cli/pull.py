"""`vmette pull`."""

from __future__ import annotations

from dataclasses import replace

import click

from .. import assets
from ..providers.base import BlockImage, Context
from ..providers.registry import default_registry
from .run import form_option, platform_option, set_up_logging, shown_progress


@click.command()
@click.argument("spec")
@platform_option
@click.option("--arch", help="x86_64 or aarch64.  [default: the host's]")
@form_option
@click.option("--quiet", is_flag=True, help="Print nothing but the path and errors.")
def command(spec: str, platform: str | None, arch: str | None, rootfs_form: str, quiet: bool) -> None:
    """Fetch SPEC now, so that `vmette run` finds it in the cache, and print the path of what it has become."""
    set_up_logging(quiet=quiet, debug=False)
    machine = assets.canonical_arch(arch) if arch else assets.host_arch()
    context = Context(assets.cache_root(), arch=machine, pull="always", platform=platform, form=rootfs_form)
    with shown_progress(quiet=quiet) as progress:
        artifact = default_registry().resolve(spec, replace(context, progress=progress))
    click.echo(str(artifact.path))
    if not quiet and isinstance(artifact, BlockImage):
        from .progress import human

        click.echo(f"{artifact.fstype}, {human(artifact.path.stat().st_size)}", err=True)

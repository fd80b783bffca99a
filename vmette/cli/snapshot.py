"""`vmette snapshot`."""

from __future__ import annotations

import time

import click

from ..machine import MachineOptions
from ..snapshots import create as create_snapshot
from ..snapshots import remove, snapshots
from .progress import human
from .run import platform_option, set_up_logging, shown_progress


@click.group()
def command() -> None:
    """Save machines, and have others wake from them: `vmette run --snapshot NAME COMMAND`."""


@command.command()
@click.argument("rootfs")
@click.argument("name")
@click.option("--run", "shell_line", metavar="LINE", help="Run this shell line before; what it leaves running goes on.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Give up when LINE takes longer.")
@click.option("--vcpus", type=int, default=1, show_default=True, help="Virtual processors.")
@click.option("--mem-mib", type=int, default=512, show_default=True, help="Memory in MiB.")
@click.option("--scratch", metavar="SIZE", help="A disk of SIZE (8G, 512M, or MiB) for what is written.")
@click.option("--net", is_flag=True, help="A network card behind NAT.")
@click.option("--rootfs-ro", is_flag=True, help="Make the root filesystem read-only.")
@platform_option
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def create(
    rootfs: str,
    name: str,
    shell_line: str | None,
    timeout: float | None,
    vcpus: int,
    mem_mib: int,
    scratch: str | None,
    net: bool,
    rootfs_ro: bool,
    platform: str | None,
    quiet: bool,
) -> None:
    """Boot ROOTFS and save the machine as NAME, which may be a path with a `/`: a directory that is made.

    \b
    vmette snapshot create --run 'python3 -c "import numpy"' python:3.13 numpy
    vmette run --snapshot numpy python3 -c 'import numpy; print(numpy.__version__)'
    """  # noqa: D301 (click wants the character)
    set_up_logging(quiet=quiet, debug=False)
    options: MachineOptions = {
        "vcpus": vcpus,
        "mem_mib": mem_mib,
        "scratch": scratch,
        "net": net,
        "rootfs_ro": rootfs_ro,
        "platform": platform,
    }
    warm_up = () if shell_line is None else ("/bin/sh", "-c", shell_line)
    create_from(rootfs, name, warm_up, options, timeout=timeout or None, quiet=quiet)


def create_from(
    rootfs: str,
    target: str,
    warm_up: tuple[str, ...],
    options: MachineOptions,
    *,
    timeout: float | None,
    quiet: bool,
) -> None:
    """Makes a snapshot, and says so."""
    with shown_progress(quiet=quiet) as progress:
        made = create_snapshot(target, rootfs, warm_up, timeout=timeout, **{**options, "progress": progress})
    if not quiet:
        click.echo(f"{made.name}: {human(made.bytes)}")


@command.command()
def ls() -> None:
    """List the snapshots."""
    click.echo(f"{'NAME':<20} {'ROOTFS':<30} {'CREATED':<12} {'SIZE':>9}")
    for each in snapshots():
        created = time.strftime("%Y-%m-%d", time.localtime(each.created))
        click.echo(f"{each.name:<20} {each.rootfs:<30} {created:<12} {human(each.bytes):>9}")


@command.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME...")
def rm(names: tuple[str, ...]) -> None:
    """Remove snapshots. Machines that have woken from them live on."""
    for name in names:
        remove(name)

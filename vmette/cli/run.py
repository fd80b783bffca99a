"""`vmette run`."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..api import execute
from ..config import ACCELERATORS, Command, Share
from ..errors import ConfigError, SandboxTimeout, TimeoutExpired
from ..machine import MachineOptions, prepare
from ..providers.base import FORMS, PULL_POLICIES, Progress
from ..streams import FdSink, FdSource
from ..timings import Stopwatch
from . import complain

if TYPE_CHECKING:
    from .progress import ProgressDisplay


platform_option = click.option(
    "--platform", metavar="OS/ARCH", help="The image's platform.  [default: linux on --arch]"
)
form_option = click.option(
    "--rootfs-form", type=click.Choice(FORMS), default="block", show_default=True, help="What layers are made into."
)


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--rootfs", "rootfs_option", metavar="SPEC", help="The root filesystem, in place of ROOTFS.")
@click.option("--exec", "shell_line", metavar="LINE", help="Run LINE with the guest's /bin/sh, in place of COMMAND.")
@click.option("-e", "--env", "env", metavar="K=V", multiple=True, help="Set an environment variable. Repeatable.")
@click.option("-w", "--workdir", metavar="DIR", help="Run in DIR, an absolute path of the guest.  [default: /]")
@click.option(
    "-u", "--user", metavar="USER[:GROUP]", help="Run as USER, a name of the guest or a number.  [default: root]"
)
@click.option(
    "--share",
    "shares",
    metavar="TAG=PATH[:ro]",
    multiple=True,
    help="Share the host's directory PATH at /mnt/TAG; with :ro the guest cannot write to it. Repeatable.",
)
@click.option("--vcpus", type=int, default=1, show_default=True, help="Virtual processors.")
@click.option("--mem-mib", type=int, default=512, show_default=True, help="Memory in MiB.")
@click.option("--timeout", type=float, metavar="SECONDS", help="End the run after SECONDS (exit code 124); 0: never.")
@click.option(
    "--rootfs-ro", is_flag=True, help="Make the root filesystem read-only. Without it, changes go with the VM."
)
@click.option("--offline", is_flag=True, help="Use what the cache holds, and no network.")
@click.option(
    "--pull", type=click.Choice(PULL_POLICIES), default="missing", show_default=True, help="When to ask the registry."
)
@platform_option
@form_option
@click.option("--entrypoint", metavar="PROGRAM", help="In place of the image's entrypoint; an empty one is none.")
@click.option("--kernel", type=click.Path(path_type=Path), help="Boot another kernel.")
@click.option("--initramfs", type=click.Path(path_type=Path), help="Boot another initramfs.")
@click.option("--cmdline", default="", metavar="TEXT", help="More kernel parameters.")
@click.option("--arch", help="The guest's architecture: x86_64 or aarch64.  [default: the host's]")
@click.option("--accel", type=click.Choice(ACCELERATORS), default="auto", show_default=True, help="Acceleration.")
@click.option("--quiet", is_flag=True, help="Say nothing but errors.")
@click.option("--debug", is_flag=True, help="Show the guest's console and what vmette does, on stderr.")
@click.option("--timings", is_flag=True, help="Print where the time went, on stderr.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="ROOTFS [COMMAND]...")
def command(
    rootfs_option: str | None,
    shell_line: str | None,
    env: tuple[str, ...],
    workdir: str | None,
    user: str | None,
    shares: tuple[str, ...],
    vcpus: int,
    mem_mib: int,
    timeout: float | None,
    rootfs_ro: bool,
    offline: bool,
    pull: str,
    platform: str | None,
    rootfs_form: str,
    entrypoint: str | None,
    kernel: Path | None,
    initramfs: Path | None,
    cmdline: str,
    arch: str | None,
    accel: str,
    quiet: bool,
    debug: bool,
    timings: bool,
    words: tuple[str, ...],
) -> int:
    r"""Run COMMAND in a fresh microVM whose root filesystem is ROOTFS.

    ROOTFS is builtin://base, a directory, or an image such as alpine:3.20 (`vmette providers` lists all kinds). It is
    never changed: what the command writes is gone with the VM, but for what it writes to a --share. An image has its
    own entrypoint, command, environment, user and directory, as under Docker.

    stdin, stdout and stderr are the command's own, and so is the exit code: 0 to 255, or 128 and the number of the
    signal that ended it. 124: time-out, 125: vmette failed, 126: COMMAND cannot be executed, 127: there is none,
    2: usage.

    \b
    vmette run builtin://base -- uname -a
    vmette run alpine:3.20 cat /etc/os-release
    vmette run --share src=.:ro -w /mnt/src builtin://base -- find .
    vmette run --timeout 5 --mem-mib 256 --exec 'echo $((6 * 7))' builtin://base
    """
    set_up_logging(quiet=quiet, debug=debug)
    stopwatch = Stopwatch(_process_start())
    stopwatch.reached("python")
    arguments = list(words)
    rootfs = rootfs_option if rootfs_option is not None else (arguments.pop(0) if arguments else None)
    if rootfs is None:
        raise click.UsageError("there is no root filesystem: give ROOTFS, for instance builtin://base")
    if arguments[:1] == ["--"]:
        del arguments[0]
    if shell_line is not None:
        if arguments:
            raise click.UsageError("--exec and COMMAND exclude each other")
        arguments = ["/bin/sh", "-c", shell_line]
        entrypoint = ""
    environment = _environment(env)
    Command.of(arguments or ["-"], environment, workdir, user)  # what is wrong with it is said before all else
    options: MachineOptions = {
        "offline": offline,
        "pull": pull,
        "platform": platform,
        "rootfs_form": rootfs_form,
        "arch": arch,
        "shares": tuple(Share.parse(text) for text in shares),
        "vcpus": vcpus,
        "mem_mib": mem_mib,
        "rootfs_ro": rootfs_ro,
        "kernel": kernel,
        "initramfs": initramfs,
        "cmdline": cmdline,
        "accel": accel,
    }
    with shown_progress(quiet=quiet) as progress:
        machine = prepare(rootfs, {**options, "progress": progress})
    program = None if entrypoint is None else [entrypoint] if entrypoint else []
    if not arguments and not program and not (machine.image and (machine.image.entrypoint or machine.image.cmd)):
        raise click.UsageError("there is no command to run: give COMMAND, or a line with --exec")
    request = machine.command(arguments, environment, workdir, user, program)
    stopwatch.reached("rootfs")
    try:
        exited = execute(
            machine,
            request,
            FdSource(0),
            FdSink(1),
            FdSink(2),
            stopwatch=stopwatch,
            timeout=timeout or None,
            debug=(lambda line: complain(f"[guest] {line}")) if debug else None,
        )
    except SandboxTimeout:
        raise TimeoutExpired([*map(os.fsdecode, request.argv)], timeout or 0, None, None) from None
    finally:
        if timings:
            _print_timings(stopwatch)
    return 128 + exited.signal if exited.signal is not None else exited.code or 0


@contextmanager
def shown_progress(*, quiet: bool) -> Iterator[Callable[[Progress], None]]:
    """A callback for what takes long, and its display: none if `quiet`, nor when there is nothing to show."""
    with ExitStack() as stack:
        displays: list[ProgressDisplay] = []

        def show(progress: Progress) -> None:
            with lock:
                if not displays:  # most runs have nothing to show
                    from .progress import ProgressDisplay

                    displays.append(stack.enter_context(ProgressDisplay()))
            displays[0](progress)

        lock = threading.Lock()
        yield show if not quiet else lambda _: None


def _environment(entries: tuple[str, ...]) -> dict[str, str]:
    environment = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not name or not equals:
            raise ConfigError(f"environment entry {entry!r} is malformed: it is NAME=VALUE")
        environment[name] = value
    return environment


def set_up_logging(*, quiet: bool, debug: bool) -> None:
    """Has what vmette logs on stderr: warnings, with `debug` all, with `quiet` errors."""
    level = logging.DEBUG if debug else logging.ERROR if quiet else logging.WARNING
    handler = logging.Handler()
    handler.emit = lambda record: complain(f"vmette: {record.getMessage()}")  # type: ignore[method-assign]
    logging.basicConfig(level=level, handlers=[handler])


def _process_start() -> float | None:
    """When this process began, as a time of `time.monotonic`; the kernel counts it in hundredths of a second."""
    try:
        # proc_pid_stat(5): field 22, counted from the one after the name, which may have spaces and brackets
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


def _print_timings(stopwatch: Stopwatch) -> None:
    before = 0.0
    complain(f"{'milestone':<16} {'at':>10} {'took':>10}")
    for timing in stopwatch.timings:
        complain(f"{timing.name:<16} {timing.seconds * 1000:>7.1f} ms {(timing.seconds - before) * 1000:>7.1f} ms")
        before = timing.seconds

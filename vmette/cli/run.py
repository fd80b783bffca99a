"""`vmette run`."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from .. import headstart
from ..config import ACCELERATORS, Command, Disk, Share
from ..errors import ConfigError, SandboxTimeout, TimeoutExpired, reason
from ..machine import SNAPSHOT, Machine, MachineOptions, execute, prepare
from ..providers.base import FORMS, PULL_POLICIES, Progress
from ..streams import FdSink, FdSource, limited
from ..timings import Stopwatch
from . import complain

if TYPE_CHECKING:
    from .progress import ProgressDisplay


platform_option = click.option(
    "--platform",
    metavar="OS/ARCH",
    help="The image's platform, such as linux/arm64.  [default: linux on this computer's architecture]",
)
form_option = click.option(
    "--rootfs-form", type=click.Choice(FORMS), default="block", show_default=True, help="What layers are made into."
)


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--rootfs", "rootfs_option", metavar="SPEC", help="The root filesystem, in place of ROOTFS.")
@click.option("--exec", "shell_line", metavar="LINE", help="Run LINE with the guest's /bin/sh, in place of COMMAND.")
@click.option("-e", "--env", "env", metavar="K=V", multiple=True, help="Set an environment variable. Repeatable.")
@click.option(
    "--env-file",
    "env_files",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Set what the lines of a file say, K=V, or K for this environment's own. Repeatable.",
)
@click.option(
    "--secret",
    "secrets",
    metavar="NAME[=ENV]",
    multiple=True,
    help="Put the value of the environment variable ENV (or NAME) into /run/secrets/NAME. Repeatable.",
)
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
@click.option(
    "--allow-host",
    "allow_hosts",
    metavar="NAME[:PORT]",
    multiple=True,
    help="Let the guest reach NAME (or *.NAME) by HTTP and HTTPS, through a proxy here. Repeatable.",
)
@click.option(
    "-p",
    "--publish",
    metavar="[IP:]PORT:PORT",
    multiple=True,
    help="Lead a TCP port of this computer (of 127.0.0.1) to one of the guest. Repeatable.",
)
@click.option(
    "--ca-certs",
    metavar="DIR",
    help="Have the guest trust the PEM certificates in DIR.  [default: $VMETTE_CA_CERTS, or vmette's configuration]",
)
@click.option("--max-output", type=int, metavar="BYTES", help="End the run when stdout or stderr has more than BYTES.")
@click.option("-i", "--interactive", is_flag=True, expose_value=False, help="Pass stdin on: it always is.")
@click.option("-t", "--tty", is_flag=True, help="Run COMMAND in a terminal, for which this one stands. See below.")
@click.option("-d", "--detach", is_flag=True, help="Leave the machine running and print its name. See below.")
@click.option("--name", metavar="NAME", help="The name of a machine that is left running.  [default: a random one]")
@click.option("--rm", "remove", is_flag=True, help="Forget such a machine when it ends. Any other one always is.")
@click.option(
    "-v",
    "--volume",
    "volumes",
    metavar="DIR:PATH[:ro]",
    multiple=True,
    help="Share the host's directory DIR at PATH; with :ro the guest cannot write to it. Repeatable.",
)
@click.option(
    "--disk",
    "disks",
    metavar="PATH[:ro]",
    multiple=True,
    help="Give the guest a raw image or a block device as a disk: /dev/vdb, …. Repeatable.",
)
@click.option(
    "--scratch",
    metavar="SIZE",
    help="Put what is written to the root and /tmp on a disk of SIZE (8G, 512M, or MiB), gone with the VM, "
    "in place of memory.",
)
@click.option("--net", is_flag=True, help="A network card behind NAT: the guest reaches what this computer reaches.")
@click.option("--hostname", default="vmette", show_default=True, help="The guest's name.")
@click.option(
    "--vsock-port", type=int, default=-1, metavar="N", help="Log, and send back, what comes to this vsock port."
)
@click.option("--guest-vsock-port", type=int, metavar="N", help="Tell the guest to listen at this vsock port.")
@click.option(
    "--switch-root", is_flag=True, help="Run COMMAND, an init system, as PID 1 of a PID namespace of its own."
)
@click.option("--pids", type=int, help="The most processes and threads of the guest's commands.")
@click.option("--nofile", type=int, help="The most files that a process of the guest may have open.")
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
@click.option("--arch", help="The guest's architecture: x86_64 or aarch64.  [default: of --platform, or the host's]")
@click.option("--accel", type=click.Choice(ACCELERATORS), default="auto", show_default=True, help="Acceleration.")
@click.option("--quiet", is_flag=True, help="Say nothing but errors.")
@click.option("--debug", is_flag=True, help="Show the guest's console and what vmette does, on stderr.")
@click.option("--timings", is_flag=True, help="Print where the time went, on stderr.")
@click.option(
    "--template/--no-template",
    "template",
    default=True,
    help="Wake from a machine that was saved at the end of its boot, or boot.  [default: wake]",
)
@click.option(
    "--snapshot",
    "--resume-snapshot",
    "snapshot",
    metavar="NAME|PATH",
    help="Wake a machine from this snapshot, in place of a boot of ROOTFS.",
)
@click.option(
    "--build-snapshot",
    metavar="NAME|PATH",
    help="Save the machine here when COMMAND, if there is one, has ended well. See `vmette snapshot`.",
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="ROOTFS [COMMAND]...")
def command(
    rootfs_option: str | None,
    shell_line: str | None,
    env: tuple[str, ...],
    env_files: tuple[Path, ...],
    secrets: tuple[str, ...],
    workdir: str | None,
    user: str | None,
    shares: tuple[str, ...],
    volumes: tuple[str, ...],
    disks: tuple[str, ...],
    scratch: str | None,
    net: bool,
    hostname: str,
    vsock_port: int,
    guest_vsock_port: int | None,
    switch_root: bool,
    pids: int | None,
    nofile: int | None,
    allow_hosts: tuple[str, ...],
    publish: tuple[str, ...],
    ca_certs: str | None,
    max_output: int | None,
    tty: bool,
    detach: bool,
    name: str | None,
    remove: bool,
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
    template: bool,
    snapshot: str | None,
    build_snapshot: str | None,
    words: tuple[str, ...],
) -> int:
    """Run COMMAND in a fresh microVM whose root filesystem is ROOTFS.

    ROOTFS is builtin://base, a directory, or an image such as alpine:3.20 (`vmette providers` lists all kinds). It is
    never changed: what the command writes is gone with the VM, but for what it writes to a --share. An image has its
    own entrypoint, command, environment, user and directory, as under Docker.

    stdin, stdout and stderr are the command's own, and so is the exit code: 0 to 255, or 128 and the number of the
    signal that ended it. 124: time-out, 125: vmette failed, 126: COMMAND cannot be executed, 127: there is none,
    2: usage.

    With -t they are one terminal of the guest, as large as the one that vmette reads from and of its TERM. Once the
    guest is up all keys are the command's, Ctrl-C too, and what it writes controls your terminal. Its output is all
    on stdout, which may be a pipe.

    With -d vmette returns when COMMAND has started, and the machine lives until COMMAND ends; without a COMMAND, until
    it is stopped (where an image has one, `--entrypoint ''` is without). COMMAND's stdin is empty, and `vmette logs`
    has what it writes. See `vmette ps`, `exec`, `cp`, `stop`, `kill` and `rm`.

    \b
    vmette run builtin://base -- uname -a
    vmette run alpine:3.20 cat /etc/os-release
    vmette run -it alpine:3.20 sh
    vmette run -d --name box --entrypoint '' alpine:3.20
    vmette run --share src=.:ro -w /mnt/src builtin://base -- find .
    vmette run --timeout 5 --mem-mib 256 --exec 'echo $((6 * 7))' builtin://base
    """  # noqa: D301 (click wants the character)
    set_up_logging(quiet=quiet, debug=debug)
    stopwatch = Stopwatch(_process_start())
    stopwatch.reached("python")
    arguments = list(words)
    if snapshot is not None and rootfs_option is not None:
        raise click.UsageError("--snapshot and --rootfs exclude each other")
    rootfs = rootfs_option if snapshot is None else f"{SNAPSHOT}{snapshot}"
    if rootfs is None and arguments:
        rootfs = arguments.pop(0)
    if rootfs is None:
        raise click.UsageError("there is no root filesystem: give ROOTFS, for instance builtin://base")
    if headstart.current is not None:
        headstart.current.end_of_options(arguments)
    if arguments[:1] == ["--"]:
        del arguments[0]
    if shell_line is not None:
        if arguments:
            raise click.UsageError("--exec and COMMAND exclude each other")
        arguments = ["/bin/sh", "-c", shell_line]
        entrypoint = ""
    if detach and (tty or timings):
        raise click.UsageError("--detach excludes --tty and --timings")
    if name is not None and not detach:
        raise click.UsageError("--name is for a machine that is left running: add --detach")
    environment = parse_environment(env, env_files)
    terminal = attach = None
    if tty:
        from .terminal import attached, terminal_environment, terminal_size

        terminal, attach = terminal_size(0), partial(attached, 0)
        environment = {**terminal_environment(), **environment}
    Command.of(arguments or ["-"], environment, workdir, user)  # what is wrong with it is said before all else
    options: MachineOptions = {
        "offline": offline,
        "pull": pull,
        "platform": platform,
        "rootfs_form": rootfs_form,
        "arch": arch,
        "shares": (*map(Share.parse, shares), *map(Share.volume, volumes)),
        "disks": tuple(map(Disk.parse, disks)),
        "scratch": scratch,
        "net": net,
        "hostname": hostname,
        "pids": pids,
        "nofile": nofile,
        "vcpus": vcpus,
        "mem_mib": mem_mib,
        "rootfs_ro": rootfs_ro,
        "secrets": dict(map(_secret, secrets)),
        "ca_certs": ca_certs,
        "allow_hosts": allow_hosts,
        "publish": publish,
        "kernel": kernel,
        "initramfs": initramfs,
        "cmdline": cmdline,
        "accel": accel,
        "template": template,
    }
    if rootfs.startswith(SNAPSHOT):  # which has its own
        source = click.get_current_context().get_parameter_source
        for option in ("vcpus", "mem_mib", "rootfs_form", "accel"):
            if source(option) is ParameterSource.DEFAULT:
                del options[option]  # type: ignore[misc]
    if vsock_port >= 0:
        options["vsock_port"] = vsock_port
    if guest_vsock_port is not None:
        options["guest_vsock_port"] = guest_vsock_port
    if user is not None:
        options["secrets_user"] = user
    program = None if entrypoint is None else [entrypoint] if entrypoint else []

    def find() -> tuple[Machine, Command, bool]:
        """The machine, its command, and whether there is one: else it stands for what a command would have."""
        with shown_progress(quiet=quiet) as progress:
            machine = prepare(rootfs, {**options, "progress": progress})
        image = machine.image
        named = arguments or (program if program is not None else image and (image.entrypoint or image.cmd))
        words = arguments if named else ["-"]
        request = machine.command(
            words, environment, workdir, user, program, terminal=terminal, switch_root=switch_root
        )
        stopwatch.reached("rootfs")
        return machine, request, bool(named)

    if build_snapshot is not None:
        if detach or tty or snapshot is not None:
            raise click.UsageError("--build-snapshot excludes --detach, --tty and --snapshot")
        from .snapshot import create_from

        create_from(rootfs, build_snapshot, tuple(arguments), options, timeout=timeout or None, quiet=quiet)
        return 0
    if detach:
        from ..detached.client import reserved
        from ..detached.machines import new_state

        with reserved(new_state(name, rootfs, remove=remove)) as reservation:
            machine, request, named = find()
            reservation.start(
                machine, request, idle=not named, timeout=timeout or None, max_output=max_output, debug=debug
            )
        click.echo(reservation.state.name)
        return 0
    machine, request, named = find()
    if not named:
        raise click.UsageError("there is no command to run: give COMMAND, or a line with --exec")
    try:
        exited = execute(
            machine,
            request,
            FdSource(0),
            limited(FdSink(1), max_output),
            limited(FdSink(2), max_output),
            stopwatch=stopwatch,
            timeout=timeout or None,
            debug=(lambda line: complain(f"[guest] {line}")) if debug else None,
            attach=attach,
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


def parse_environment(entries: tuple[str, ...], files: tuple[Path, ...]) -> dict[str, str]:
    """What --env and --env-file say: the former has the last word."""
    environment = {}
    for path in files:
        try:
            lines = path.read_text().splitlines()
        except (OSError, ValueError) as error:
            why = "it is no text in UTF-8" if isinstance(error, UnicodeDecodeError) else reason(error)
            raise ConfigError(f"environment file {path}: {why}") from error
        for number, line in enumerate(map(str.strip, lines), 1):
            name, equals, value = line.partition("=")
            if not line or line.startswith("#"):
                continue
            if not name or " " in name:  # the line itself may be a secret
                raise ConfigError(f"environment file {path}: line {number} is malformed: it is NAME=VALUE, or NAME")
            if equals or name in os.environ:
                environment[name] = value if equals else os.environ[name]
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not name or not equals:
            raise ConfigError(f"environment entry {entry!r} is malformed: it is NAME=VALUE")
        environment[name] = value
    return environment


def _secret(text: str) -> tuple[str, str]:
    """Reads `NAME[=ENV]`: the name, and the value of the environment variable."""
    name, _, variable = text.partition("=")
    variable = variable or name
    if variable not in os.environ:
        raise ConfigError(f"secret {name!r}: there is no environment variable {variable!r}")
    return name, os.environ[variable]


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
    if stopwatch.way:
        complain(stopwatch.way)

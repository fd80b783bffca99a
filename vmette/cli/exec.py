"""`vmette exec`."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import IO, TypeVar

import click

from ..detached.client import Exec, check_timeout
from ..detached.machines import open_machine
from ..errors import ConfigError, SandboxTimeout, TimeoutExpired, VmetteError
from ..polling import new_poll
from .run import parse_environment

T = TypeVar("T")


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("-i", "--interactive", is_flag=True, help="Pass stdin on. Without it COMMAND's is empty.")
@click.option("-t", "--tty", is_flag=True, help="Run COMMAND in a terminal, for which this one stands. Implies -i.")
@click.option("-e", "--env", "env", metavar="K=V", multiple=True, help="Set an environment variable. Repeatable.")
@click.option("-w", "--workdir", metavar="DIR", help="Run in DIR, an absolute path of the guest.")
@click.option("-u", "--user", metavar="USER[:GROUP]", help="Run as USER, a name of the guest or a number.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Kill COMMAND after SECONDS (exit code 124); 0: never.")
@click.argument("name")
@click.argument("words", nargs=-1, required=True, type=click.UNPROCESSED, metavar="COMMAND...")
def command(
    interactive: bool,
    tty: bool,
    env: tuple[str, ...],
    workdir: str | None,
    user: str | None,
    timeout: float | None,
    name: str,
    words: tuple[str, ...],
) -> int:
    """Run COMMAND in machine NAME, beside what runs there.

    It has the environment, directory and user of the machine's main command, but for what is said here. Streams and
    exit codes are those of `vmette run`. When this program ends, COMMAND is killed.

    \b
    vmette exec box cat /etc/os-release
    vmette exec -it box sh
    tar c src | vmette exec -i box tar x -C /tmp
    """  # noqa: D301 (click wants the character)
    check_timeout(timeout)
    environment = parse_environment(env, ())
    argv = words[1:] if words[0] == "--" else words
    with ExitStack() as stack:
        terminal = None
        if tty:
            from .terminal import RawTerminal, on_resize, terminal_environment, terminal_size

            terminal = terminal_size(0)
            environment = {**terminal_environment(), **environment}
        entry = stack.enter_context(open_machine(name))
        running = stack.enter_context(Exec(entry, argv, env=environment, cwd=workdir, user=user, terminal=terminal))
        if tty:

            def resize() -> None:
                with suppress(ConfigError):  # it has hung up
                    running.resize(*terminal_size(0))

            stack.enter_context(RawTerminal(0))
            stack.enter_context(on_resize(resize))
        if interactive or tty:
            start_pump(0, running.stdin.fileno(), running.stdin)
        else:
            running.stdin.close()
        outputs = [
            start_pump(running.stdout.fileno(), 1, running.stdout),
            start_pump(running.stderr.fileno(), 2, running.stderr),
        ]
        try:
            status = running.wait(timeout or None)
        except SandboxTimeout:
            raise TimeoutExpired(argv, timeout or 0, None, None) from None
        except VmetteError:  # it has ended all the same
            join(outputs)
            raise
        join(outputs)
    return status


def join(threads: Iterable[threading.Thread]) -> None:
    """Waits for the end of each."""
    for thread in threads:
        thread.join()


def start_pump(source: int, target: int, pipe: IO[bytes]) -> threading.Thread:
    """Starts a thread that passes bytes on until one end has no more of them or takes none; then it closes `pipe`."""

    def pump() -> None:
        with pipe, suppress(OSError):  # whoever is at the other end of `pipe` finds out
            while data := memoryview(_patiently(lambda: os.read(source, 65536), source, select.POLLIN)):
                while data:
                    written = _patiently(lambda: os.write(target, data), target, select.POLLOUT)  # noqa: B023
                    data = data[written:]

    thread = threading.Thread(target=pump, daemon=True)
    thread.start()
    return thread


def _patiently(function: Callable[[], T], fd: int, events: int) -> T:
    """What `function` returns once `fd` lets it: some other program may have made that non-blocking."""
    while True:
        try:
            return function()
        except BlockingIOError:
            poll = new_poll()
            poll.register(fd, events)
            poll.poll()

"""Running one command in a microVM, from Python: the shape of :mod:`subprocess`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, overload

from .config import Command
from .errors import SandboxTimeout
from .machine import MachineOptions, execute, prepare
from .process import MAX_OUTPUT, Captured, CompletedProcess, encoded
from .streams import BytesSource
from .timings import Stopwatch

if TYPE_CHECKING:
    from typing_extensions import Unpack


@overload
def run(
    rootfs: str | os.PathLike[str],
    argv: Sequence[str] = ...,
    *,
    text: Literal[False] = ...,
    env: Mapping[str, str] | None = ...,
    cwd: str | None = ...,
    user: str | None = ...,
    input: bytes | None = ...,
    timeout: float | None = ...,
    check: bool = ...,
    entrypoint: Sequence[str] | None = ...,
    switch_root: bool = ...,
    max_output: int = ...,
    **options: Unpack[MachineOptions],
) -> CompletedProcess[bytes]: ...


@overload
def run(
    rootfs: str | os.PathLike[str],
    argv: Sequence[str] = ...,
    *,
    text: Literal[True],
    env: Mapping[str, str] | None = ...,
    cwd: str | None = ...,
    user: str | None = ...,
    input: str | None = ...,
    timeout: float | None = ...,
    check: bool = ...,
    entrypoint: Sequence[str] | None = ...,
    switch_root: bool = ...,
    max_output: int = ...,
    **options: Unpack[MachineOptions],
) -> CompletedProcess[str]: ...


def run(
    rootfs: str | os.PathLike[str],
    argv: Sequence[str] = (),
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    user: str | None = None,
    input: bytes | str | None = None,  # noqa: A002 (the name that subprocess.run has)
    timeout: float | None = None,
    check: bool = False,
    text: bool = False,
    entrypoint: Sequence[str] | None = None,
    switch_root: bool = False,
    max_output: int = MAX_OUTPUT,
    **options: Unpack[MachineOptions],
) -> CompletedProcess[bytes] | CompletedProcess[str]:
    """Runs `argv` in a fresh microVM whose root filesystem is `rootfs`, and returns what it wrote.

    Args:
        rootfs: A spec that a provider claims: a directory, `builtin://base`, ….
        argv: The program, looked up in the guest's PATH, and its arguments. There is no shell in between. An image's
            Entrypoint comes before it, and its Cmd in place of an empty one.
        env: The command's environment, added to the image's; PATH and HOME are added where they are missing. There is
            nothing of the host's.
        cwd: An absolute path of the guest; the image's WorkingDir or `/` by default.
        user: `user[:group]`, names of the guest or numbers; the image's User or root by default.
        input: The command's stdin, which is empty otherwise.
        timeout: Seconds for the whole run, boot included, once the root filesystem is at hand.
        check: Raise if the status is not 0.
        text: `input`, `stdout` and `stderr` are text in UTF-8 (undecodable bytes become U+FFFD), not bytes.
        entrypoint: In place of the image's Entrypoint; empty is none.
        switch_root: Run `argv`, an init system, as PID 1 of a PID namespace of its own.
        max_output: The most bytes of each of stdout and stderr that are taken.
        options: The machine's: see :class:`vmette.machine.MachineOptions`.

    Raises:
        CalledProcessError: `check` is set and the status is not 0.
        TimeoutExpired: the time is over. It carries the output so far.
        OutputTooLarge: there is more output than `max_output`.
        CommandNotStarted: there is no such command, or it cannot be executed.
        ConfigError, ProviderError, PayloadError, VmmError, GuestError, ProtocolError: the run failed.
    """
    stopwatch = Stopwatch()
    Command.of(argv or ["-"], env, cwd, user)  # what is wrong with it is said before all else
    machine = prepare(rootfs, options)
    command = machine.command(argv, env, cwd, user, entrypoint, switch_root=switch_root)
    stopwatch.reached("rootfs")
    captured = Captured(command, max_output, text=text)
    try:
        exited = execute(
            machine,
            command,
            BytesSource(encoded(input)),
            *captured.sinks,
            stopwatch=stopwatch,
            timeout=timeout,
        )
    except SandboxTimeout:
        assert timeout is not None
        raise captured.timed_out(timeout) from None
    completed = captured.completed(exited, stopwatch.timings)
    if check:
        completed.check_returncode()
    return completed

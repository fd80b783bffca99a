"""Copies of a running sandbox."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from . import vmm
from .config import HOSTNAME_BYTES, Saved, SavedInMemory
from .errors import ConfigError, VmetteError, reason
from .machine import Machine
from .snapshots import check_savable

if TYPE_CHECKING:
    from .sandbox import Sandbox

STARTERS = 8
"""Copies that are started at once."""


def fork(sandbox: Sandbox, count: int) -> list[Sandbox]:
    """See :meth:`vmette.Sandbox.fork`."""
    machine = sandbox._machine
    if count < 1:
        raise ConfigError(f"{count} copies of a sandbox: there can be 1 and more")
    check_savable(machine.config)
    with _place(machine) as saved:
        try:
            sandbox._session.save(lambda guest: guest.save(saved))
        except OSError as error:
            raise VmetteError(f"the sandbox cannot be copied: {reason(error)}") from error

        def start(number: int) -> Sandbox:
            return sandbox._copy(_copied(machine, saved, number))

        with ThreadPoolExecutor(min(count, STARTERS)) as pool, ExitStack() as undo:
            starting = [pool.submit(start, number) for number in range(1, count + 1)]
            for future in starting:
                if future.exception() is None:
                    undo.callback(future.result().close)
            copies = [future.result() for future in starting]
            undo.pop_all()
    return copies


@contextmanager
def _place(machine: Machine) -> Iterator[Saved]:
    """Where the sandbox is saved, until its copies are up."""
    if vmm.name() == "qemu":
        saved = SavedInMemory()
        try:
            yield saved
        finally:
            saved.close()
    elif machine.has_secrets:
        raise ConfigError("a sandbox with secrets is not copied here: they would be on the disk for a while")
    else:
        from .staging import staging
        from .templates import made_directory

        with staging(made_directory() / "fork") as directory:
            yield Saved(directory)


def _copied(machine: Machine, saved: Saved, number: int) -> Machine:
    services = machine.services
    if services is not None:
        services = replace(services, secrets={}, ca_certs=b"", publish=())
    suffix = f"-{number}"
    hostname = machine.config.hostname[: HOSTNAME_BYTES - len(suffix)].rstrip("-.") + suffix
    config = replace(machine.config, saved=saved, hostname=hostname)
    return replace(machine, config=config, services=services, template=False, copied_secrets=machine.has_secrets)

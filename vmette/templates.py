"""Machines that were saved where a boot ends, so that the next one like it need not boot.

A template is made after the first run of its kind, by a process in the background that boots another machine like it:
nothing of what anybody ran, nor a secret, is in it, only that the image's `true` has been run. It is found by what the
machine is made of; see :func:`vmette.saved.facts`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import assets, saved
from .config import Command, MachineConfig, Saved, Share
from .errors import SandboxTimeout, VmetteError, VmmError, reason
from .files import write_atomically
from .providers.base import BlockImage, Cancelled, Context

if TYPE_CHECKING:
    from .guest import Guest
    from .timings import Stopwatch

logger = logging.getLogger(__name__)

MAX_TEMPLATES = 16
"""More are not kept: those that were used last are."""
BOOT_SECONDS = 120.0
WARM_UP_SECONDS = 10.0
MIN_FREE = 1 << 30
"""Bytes of the disk that must be free: with less, a template would be in others' way."""
MAX_SIZE = 1 << 29
"""Bytes on the disk: an image's `true` that fills the memory does not fill the disk."""
RETRY_SECONDS = 3600.0
"""After a template could not be made, it is tried again."""
MAX_SHARE_TEXT = 3000
"""Bytes that are left for the shares in what a machine is told when it wakes (docs/protocol.md, HELLO)."""
_LOCK = ".lock"
"""Who has this file's lock makes a template."""
_PROGRAM = "import os; os.chdir('/'); from vmette.templates import main; main()"
"""(`-m` would import what happens to lie in the current directory; `os` is there before anything is looked for.)"""


def directory() -> Path:
    """Where all of them are."""
    return assets.cache_root() / "store" / "templates"  # of the cache of images: see images/prune.py


def made_directory() -> Path:
    """The same, which is there now.

    Raises:
        OSError: it cannot be made.
    """
    path = directory()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return path


class Template:
    """The place of the template for a machine, whether there is one or not.

    Raises:
        VmetteError: the machine's parts cannot be looked at.
    """

    def __init__(self, config: MachineConfig) -> None:
        from . import vmm

        self.config = replace(vmm.settled(config), savable=False)
        # The name only has to differ as a rule: the facts are compared. (hashlib would bring in OpenSSL at each start.)
        self._facts = saved.facts(self.config)
        facts = json.dumps(self._facts, sort_keys=True).encode()
        self.path = directory() / f"{zlib.crc32(facts):08x}{zlib.adler32(facts):08x}"
        self.saved = Saved(self.path)
        self.ready = False
        """Whether a machine can wake from it."""

    def problem(self) -> str | None:
        """Why no machine can wake from it now; None if one can."""
        if not self.path.exists():
            return "there is no template yet"
        try:
            meta = saved.read(self.saved)
            saved.check(self.saved, self._facts, meta)
        except (OSError, ValueError, VmmError) as error:
            logger.info("template %s: %s", self.path, error)
            if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
                return f"the template cannot be read: {reason(error)}"  # now, by this process: it may be fine
            self.drop()
            return "the template was of no more use"
        with suppress(OSError):
            os.utime(self.path)  # it was used
        return None

    def drop(self) -> None:
        """Removes it."""
        _remove(self.path)

    def give_up(self, error: Exception) -> None:
        """Removes it, and has none made for a while: no machine wakes from it."""
        self.drop()
        self._remember(error)

    # --- making it

    @property
    def _failed(self) -> Path:
        return self.path.with_name(f".{self.path.name}.failed")

    def _remember(self, error: Exception) -> None:
        with suppress(OSError):
            write_atomically(self._failed, str(error).encode())

    def _is_worth_a_try(self) -> bool:
        """Whether it could not be made a short while ago."""
        try:
            return time.time() - self._failed.stat().st_mtime > RETRY_SECONDS
        except OSError:
            return True

    def make_later(self) -> None:
        """Has another process make it, which goes on when this one has ended."""
        if not self._is_worth_a_try():
            return
        import pickle
        import sys
        import tempfile

        from .detached.client import inherited

        config = replace(
            self.config,
            root=self.config.root and replace(self.config.root, path=self.config.root.path.absolute(), config=None),
            kernel=self.config.kernel_path.absolute(),
            initramfs=self.config.initramfs_path.absolute(),
        )
        environment = {**inherited(), "VMETTE_CACHE_DIR": os.fspath(assets.cache_root().absolute())}
        try:
            with tempfile.TemporaryFile() as told:  # a pipe would hold only so much before somebody reads it
                told.write(pickle.dumps(config))
                told.seek(0)
                # A shell that does not wait for it: it is nobody's child then, and its end nobody's business.
                argv = ["sh", "-c", '"$@" <&3 3<&- &', "sh", sys.executable, "-c", _PROGRAM]
                redirect = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (1, 2)]
                actions = [(os.POSIX_SPAWN_DUP2, told.fileno(), 3), *redirect]
                spawned = os.posix_spawn("/bin/sh", argv, environment, file_actions=actions, setsid=True, setsigmask=[])
                os.waitpid(spawned, 0)
        except OSError as error:
            logger.info("no template is made: %s", reason(error))

    def make(self, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Boots a machine and saves it, unless somebody else does, or makes another one.

        `cancelled` is asked now and then whether to give up.

        Raises:
            Cancelled: it said so.
            VmetteError: it does not boot, or cannot be saved.
            OSError: there is no room for it.
        """
        import shutil

        from . import staging

        lock = os.open(made_directory() / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _sweep()
            if self.path.exists():
                return
            if shutil.disk_usage(directory()).free < MIN_FREE:
                raise VmetteError(f"there is too little room in {directory()}")
            with staging.staging(self.path) as place:
                self._boot_and_save(place, cancelled)
                staging.publish(place, self.path)
            self._failed.unlink(missing_ok=True)
            prune()
            _evict()
        except BlockingIOError:
            return
        except Cancelled:
            raise
        except (VmetteError, OSError) as error:
            self._remember(error)
            raise
        finally:
            os.close(lock)

    def _boot_and_save(self, place: Path, cancelled: Callable[[], bool]) -> None:
        from .machine import Machine, booted
        from .timings import Stopwatch

        empty = place / "empty"
        empty.mkdir(mode=0o500)
        shares = tuple(Share(share.tag, empty, read_only=True) for share in self.config.shares)
        config = replace(self.config, shares=shares, shares_later=True, savable=True, hostname="vmette")
        with booted(Machine(config, cancelled=cancelled, template=False), Stopwatch()) as guest:
            guest.turn_until(lambda: guest.kernel is not None, time.monotonic() + BOOT_SECONDS)
            _warm_up(guest, cancelled)
            guest.save(Saved(place), last=True)
        empty.rmdir()
        size = sum(path.stat().st_blocks for path in Saved(place).parts) * 512
        if size > MAX_SIZE:
            raise VmetteError(f"the machine holds {size >> 20} MiB after its start: that is too much to keep")
        saved.seal(Saved(place), self.config, {})


def _warm_up(guest: Guest, cancelled: Callable[[], bool]) -> None:
    """Runs the image's `true`, if it has one: what every command wants of the disk is in memory then.

    It is the init of namespaces of its own, whose end is that of all that it has started, wherever that has gone: the
    guest's kernel sees to it. What it has mounted is gone, too.

    Raises:
        VmetteError: it does not end.
        Cancelled: `cancelled` said so.
    """
    from .streams import BytesSource, Discard

    ended: list[object] = []
    guest.exec(Command((b"true",), init=True), BytesSource(b""), Discard(), Discard(), ended.append)
    try:
        guest.turn_until(lambda: bool(ended) or cancelled(), time.monotonic() + WARM_UP_SECONDS)
        if not ended:
            raise Cancelled
    except SandboxTimeout:
        raise VmetteError("the image's `true` does not end") from None


def unfit(config: MachineConfig) -> str | None:
    """Why machines of this kind always boot; None if they can wake from a template."""
    if os.environ.get("VMETTE_TEMPLATES") == "0":
        return "VMETTE_TEMPLATES is 0"
    if not isinstance(config.root, BlockImage):
        return "its root filesystem is a directory"
    if config.disks:
        return "it has disks of its own"
    return _unfit_here(config)


def _unfit_here(config: MachineConfig) -> str | None:
    """As :func:`unfit`, of what depends on the VMM."""
    from . import vmm

    if vmm.name() == "vz":
        from .vmm.vz import program

        if not program().save_restore:
            return "macOS 14 and later can save machines"
        return "it has shares" if config.shares else None
    from .vmm import vhost_vsock
    from .vmm.cmdline import share_tokens
    from .vmm.qemu import file_server, placed

    if config.vsock and vhost_vsock.available():
        return "it has a vsock device"
    if config.shares:
        if file_server(vmm.settled(config).accel) is not None:
            return "it has shares, which virtiofsd serves"
        tokens = share_tokens([(share, "9p") for share in placed(replace(config, shares_later=True))])
        if sum(map(len, tokens)) > MAX_SHARE_TEXT:
            return "its shares have very long names"
    return None


def find(config: MachineConfig, stopwatch: Stopwatch) -> Template | None:
    """The template that a machine like this wakes from, or the next one would; notes the way that is taken.

    None if there is none, ever.
    """
    if (why := unfit(config)) is not None:
        stopwatch.way = f"booted: {why}"
        return None
    try:
        template = Template(config)
        why = template.problem()
        template.ready = why is None
    except (VmetteError, OSError) as error:
        logger.info("no templates: %s", error)
        stopwatch.way = "booted: templates cannot be had"
        return None
    stopwatch.way = "woken from a template" if why is None else f"booted: {why}"
    return template


def _sweep() -> None:
    """Removes what processes left that did not come to their end, and what they remembered that is of no more use."""
    from . import staging

    staging.sweep(directory())
    for path in directory().glob(".*"):
        with suppress(OSError):
            # No directories, which are places for templates; but files that are not yet what they are to be: files.py.
            if path.name != _LOCK and time.time() - path.lstat().st_mtime > RETRY_SECONDS:
                path.unlink()


def prune() -> None:
    """Removes the templates that were not used for longest, if there are too many."""
    found = []
    for path in directory().glob("[!.]*"):
        with suppress(OSError):
            found.append((path.stat().st_mtime, path))
    for _, path in sorted(found)[:-MAX_TEMPLATES]:
        _remove(path)


def _evict() -> None:
    from .providers.layered import evict, store_of

    evict(store_of(Context(assets.cache_root())))


def _remove(path: Path) -> None:
    from . import staging  # late: it brings in three compressors

    with suppress(OSError):
        staging.remove(path)


def main() -> None:
    """Makes the template for the configuration that comes on stdin."""
    import pickle
    import sys

    os.closerange(3, 1 << 16)  # what whoever started the run has open is none of this process's business
    os.nice(19)
    with suppress(OSError, AttributeError):  # only where nobody else wants the processor; Linux alone has it
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    config = pickle.load(sys.stdin.buffer)  # noqa: S301 (of make_later)
    try:
        Template(config).make()
    except (VmetteError, OSError) as error:
        logger.info("no template is made: %s", error)

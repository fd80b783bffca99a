"""Things that take long to build are built once, and kept in the user's cache directory by what they are made from."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from vmette import assets


class BuildError(Exception):
    """Something cannot be built; the text says what to do."""


def package_version(package: str) -> str:
    """The version of an installed Debian package.

    Raises:
        BuildError: it is not installed.
    """
    query = ["dpkg-query", "-W", "-f", "${Version}", package]
    answer = subprocess.run(query, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        raise BuildError(f"Debian's package {package} is missing: apt-get install {package}")
    return answer.stdout


def artifact(name: str, facts: Mapping[str, str], make: Callable[[Path], None]) -> Path:
    """The file `name` made from `facts`: the kept one, or what `make` writes to the path that it is given.

    Two builds at once make one of them wait; a build that is interrupted leaves nothing that the next would take.
    """
    digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()[:32]
    directory = assets.cache_root() / "build" / digest
    kept = directory / name
    if kept.exists():
        return kept
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not kept.exists():
            staging = directory / f"{name}.part"
            staging.unlink(missing_ok=True)
            make(staging)
            with staging.open("rb") as file:
                os.fsync(file.fileno())
            staging.rename(kept)
    return kept


@contextmanager
def scratch(beside: Path) -> Iterator[Path]:
    """A directory for building, emptied first and removed afterwards: `artifact` holds the lock that keeps it ours."""
    directory = beside.with_name(beside.name + ".work")
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class Progress:
    """Says that something goes on: a living line on a terminal, else a line each half minute."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.steps = 0
        self._start = self._said = time.monotonic()
        self._live = sys.stderr.isatty()
        print(f"{what} ...", end="" if self._live else "\n", file=sys.stderr, flush=True)

    def step(self) -> None:
        """One more step is done."""
        self.steps += 1
        now = time.monotonic()
        if now - self._said >= (0.2 if self._live else 30):
            self._said = now
            self._say("")

    def done(self) -> None:
        """It is finished."""
        self._say("done")
        if self._live:
            print(file=sys.stderr)

    def _say(self, word: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self._start), 60)
        text = f"{self.what} ... {self.steps} steps, {minutes}:{seconds:02} {word}".rstrip()
        print(f"\r{text}\x1b[K" if self._live else text, end="" if self._live else "\n", file=sys.stderr, flush=True)

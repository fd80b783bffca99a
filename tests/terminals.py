"""Programs on a terminal of their own, for tests that sit in front of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import pexpect
import pyte

SECONDS = 120
"""Whatever is waited for happens soon, but this machine may be busy."""

# What is between two programs that print all settings of the terminal.
WRAPPER = """
trap : INT
stty -g
sh -c 'echo "pid $$"; exec "$@"' sh "$@"
echo "status $?"
stty -g
"""


class Terminal:
    """`argv` on a terminal; a context manager, at whose end all is gone. `child` is for what pexpect can do with it."""

    def __init__(
        self, argv: Sequence[str], *, rows: int = 24, columns: int = 80, env: Mapping[str, str] | None = None
    ) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: of forks where there are threads
            self.child: pexpect.spawn[bytes] = pexpect.spawn(
                "/bin/sh",
                ["-c", WRAPPER, "sh", *argv],
                timeout=SECONDS,
                maxread=65536,
                dimensions=(rows, columns),
                env=None if env is None else {**env},
            )
        self.child.delaybeforesend = None
        self.before, pid = self.groups(r"([0-9a-f:]+)\r\npid ([0-9]+)\r\n")
        """All settings of the terminal, as `stty -g` shows them."""
        self.pid = int(pid)
        """Of the program."""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *args: object) -> None:
        self.child.close()

    def groups(self, pattern: str) -> tuple[bytes, ...]:
        """Waits until `pattern` comes, and returns its groups."""
        self.child.expect(pattern)
        assert self.child.match
        return self.child.match.groups()  # type: ignore[union-attr]

    def until(self, text: str | bytes) -> bytes:
        """Waits until `text` comes, and returns what came before it."""
        self.child.expect_exact(text)
        assert isinstance(self.child.before, bytes)
        return self.child.before

    def type(self, keys: str | bytes) -> None:
        """Types. Enter is `\\r`."""
        self.child.send(keys)

    def ended(self) -> int:
        """The program's exit status, once it has ended. All settings of the terminal are then what they were."""
        status, after = self.groups(r"status (\d+)\r?\n([0-9a-f:]+)\r?\n")
        self.child.expect(pexpect.EOF)
        assert after == self.before
        return int(status)

    def until_screen(self, shows: Callable[[list[str]], bool]) -> None:
        """Waits until the lines of the screen, which starts as an empty one, are as `shows` wants them."""
        rows, columns = self.child.getwinsize()
        screen = pyte.Screen(columns, rows)
        stream = pyte.ByteStream(screen)
        while not shows([line.rstrip() for line in screen.display]):
            stream.feed(self.groups("(?s)(.+)")[0])

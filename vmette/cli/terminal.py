"""The user's terminal, while a command of the guest has it: raw, with its size passed on, and given back as it was."""

from __future__ import annotations

import atexit
import errno
import os
import signal
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..guest import Guest, Stream

IFLAG, OFLAG, CFLAG, LFLAG, CC = 0, 1, 2, 3, 6
"""Where `termios.tcgetattr` has them."""


def terminal_size(fd: int) -> tuple[int, int]:
    """Rows and columns of the terminal `fd`; 0 is what a terminal says that does not know.

    Raises:
        ConfigError: it is no terminal.
    """
    try:
        columns, rows = os.get_terminal_size(fd)
    except OSError:
        raise ConfigError("the input is no terminal: use -i without -t") from None
    return rows, columns


def terminal_environment() -> dict[str, str]:
    """What a command in a terminal is told of the host: the kind of its terminal. Its language is not the guest's."""
    return {"TERM": os.environ.get("TERM") or "xterm"}


class RawTerminal:
    """A context manager: passes each byte of the terminal `fd` on as it is, in both directions, up to its end.

    Then the terminal is as it was before, whatever ends the program, but for SIGKILL: a signal that Python makes an
    exception of, an exception, or the interpreter's end where one came at a bad moment. What was typed before is
    kept for the command. What is unread at the end is thrown away: it was meant for the command, or is the terminal's
    answer to a query of the guest, and the shell that reads next would run it.

    When the program is stopped, it has the terminal raw again once it goes on in the foreground, and SIGWINCH is
    raised: the size may have changed meanwhile. For the main thread only.

    Raises:
        OSError: `fd` is no terminal, or a dead one.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._before: list[Any] = []
        self._raw: list[Any] = []
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> RawTerminal:
        try:
            self._before, self._raw = termios.tcgetattr(self._fd), make_raw(termios.tcgetattr(self._fd))
        except termios.error as error:
            raise OSError(*error.args) from None
        atexit.register(self.restore)
        for number, handler in {signal.SIGTSTP: self._stop, signal.SIGCONT: self._go_on}.items():
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, handler)
        self._set(self._raw)
        return self

    def __exit__(self, *args: object) -> None:
        self.restore()
        atexit.unregister(self.restore)

    def restore(self) -> None:
        """Gives the terminal back. May be called again."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._give_back()

    def _give_back(self) -> None:
        """Leaves the terminal alone if it has been given to another program, which has its own ideas of it."""
        with suppress(OSError):  # not the terminal that controls this process: no other program contends for it
            if os.tcgetpgrp(self._fd) != os.getpgrp():
                return
        self._set(self._before)
        with suppress(termios.error):
            termios.tcflush(self._fd, termios.TCIFLUSH)  # all of it; TCSAFLUSH leaves what is still on its way

    def _set(self, attributes: list[Any]) -> None:
        """From the background this stops the program (SIGTTOU), as it does every full-screen program."""
        while True:
            try:
                termios.tcsetattr(self._fd, termios.TCSADRAIN, attributes)
            except termios.error as error:
                if error.args[0] == errno.EINTR:
                    continue
            return  # even if it has hung up: nobody is there to see the difference

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._give_back()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)
        signal.signal(number, self._stop)
        self._go_on(number, frame)  # where there is no shell to go back to, the kernel does not stop a program

    def _go_on(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._set(self._raw)
        signal.raise_signal(signal.SIGWINCH)


def make_raw(attributes: list[Any]) -> list[Any]:
    """`attributes` of `termios.tcgetattr` as cfmakeraw(3) has them; `tty.cfmakeraw` is new in Python 3.12."""
    attributes[IFLAG] &= ~(
        termios.IGNBRK
        | termios.BRKINT
        | termios.PARMRK
        | termios.ISTRIP
        | termios.INLCR
        | termios.IGNCR
        | termios.ICRNL
        | termios.IXON
    )
    attributes[OFLAG] &= ~termios.OPOST
    attributes[LFLAG] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    attributes[CFLAG] = attributes[CFLAG] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    attributes[CC][termios.VMIN], attributes[CC][termios.VTIME] = 1, 0
    return attributes


@contextmanager
def on_resize(callback: Callable[[], None]) -> Iterator[None]:
    """Has `callback` called whenever a terminal's size may have changed. It is called in a signal handler."""
    former = signal.signal(signal.SIGWINCH, lambda number, frame: callback())  # noqa: ARG005
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, former)


@contextmanager
def attached(fd: int, guest: Guest) -> Iterator[Callable[[Stream], None]]:
    """Makes the terminal `fd` that of one command, whose stream the yielded function is told."""
    streams: list[Stream] = []

    def resize() -> None:
        with suppress(ConfigError):  # it has hung up
            for stream in streams:
                guest.resize(stream.number, *terminal_size(fd))

    def started(stream: Stream) -> None:
        streams.append(stream)
        resize()  # since the command was made, the machine has booted

    guest.accept_calls()
    with RawTerminal(fd), on_resize(lambda: guest.call(resize)):
        yield started

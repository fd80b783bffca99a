"""The command line: `vmette COMMAND`. Each command is a module of its own, imported when it is used."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import click

from .. import __version__
from ..errors import GuestError, VmetteError

COMMANDS = {
    "run": "Run a command in a fresh microVM.",
    "ps": "List the machines that run by themselves.",
    "exec": "Run a command in a machine.",
    "cp": "Copy files into a machine, or out of it.",
    "logs": "Print what a machine has written.",
    "stop": "End machines.",
    "kill": "Kill machines, or send them a signal.",
    "rm": "Remove machines that have ended.",
    "snapshot": "Save machines that others wake from.",
    "pull": "Fetch an image into the cache.",
    "images": "List the images in the cache.",
    "cache": "See what the cache holds, and clear it.",
    "providers": "List what a rootfs can be.",
    "doctor": "Check what this computer has for vmette.",
    "completion": "Print the shell's completion script.",
}

SIGPIPE_STATUS = 128 + signal.SIGPIPE


class Interrupted(BaseException):
    """A signal asked this program to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.exit_code = 128 + number


class _NobodyReads(BaseException):
    """Our output goes nowhere any more."""


class _Commands(click.Group):
    """The commands, by name. Their modules stay unread until one is called."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _NobodyReads from None  # of a BrokenPipeError click would make exit code 1

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in COMMANDS:
            return None
        from importlib import import_module

        found = import_module(f".{cmd_name}", __name__).command
        assert isinstance(found, click.Command)
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vmette")
def group() -> None:
    """Run untrusted code in a hardware-isolated Linux microVM.

    \b
    vmette run builtin://base -- uname -a         the root filesystem that vmette carries
    vmette run alpine:3.20 sh -c 'echo hello'      an image of a registry
    vmette run ./tree -- sh -c 'echo $0; id'      a directory; nothing in it is changed
    echo 2+2 | vmette run builtin://base -- bc    stdin, stdout, stderr and exit code are the command's
    vmette run --help                             all that a run can be told
    """  # noqa: D301 (click wants the character)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code. Errors are one line on stderr."""
    _open_standard_streams()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup's wish is kept
            signal.signal(number, _interrupted)
    try:
        result = group.main(args=argv, prog_name="vmette", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except VmetteError as error:
        if isinstance(error, GuestError):
            for line in error.console:
                complain(f"[guest] {line}")
        complain(f"vmette: {error}")
        return error.exit_code
    except Interrupted as error:
        return error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return 128 + signal.SIGINT
    except (BrokenPipeError, _NobodyReads):
        # Nobody reads what we write. Python would try once more at its end, and complain.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        return SIGPIPE_STATUS
    except OSError as error:
        complain(f"vmette: {error}")
        return VmetteError.exit_code
    finally:
        gc.freeze()  # At its end Python would search all that it has loaded for garbage: 8 ms for nothing.


def _open_standard_streams() -> None:
    """A standard stream that is closed would go to the first file that we open, and be taken for the user's."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115


def complain(line: str) -> None:
    """Writes a line to stderr, which may be closed or full: there is nobody left to tell then.

    Guests, images and registries have their say in messages, and none in what the terminal does.
    """
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    with suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


def _interrupted(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(other, signal.SIG_IGN)  # the clean-up that this starts is not interrupted again
    raise Interrupted(number)

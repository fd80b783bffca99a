"""`vmette`, and `python -m vmette`."""

from __future__ import annotations

import gc
import sys

from . import headstart


def main() -> int:
    """Runs the command line and returns the exit code."""
    # Nearly all that a command makes lives as long as the command: to look for garbage is a waste, as a rule.
    gc.set_threshold(50_000)
    sys.unraisablehook = _not_lost
    try:
        headstart.begin(sys.argv[1:])
        from .cli import main

        return main()
    except KeyboardInterrupt:  # before there was anybody to handle it
        return 128 + 2
    finally:
        import signal  # late: nothing is to be read before the head start

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            signal.signal(number, signal.SIG_IGN)  # all is done: the exit code is what it is
        headstart.end()


def _not_lost(lost: sys.UnraisableHookArgs) -> None:
    """Has what ends this program raised again a moment later, where it ends it.

    What is raised in a finalizer, or when a weak reference has died (each import has one), Python prints and forgets.
    """
    value = lost.exc_value
    if value is None or isinstance(value, Exception):
        sys.__unraisablehook__(lost)
        return

    def again(*_: object) -> None:
        raise value

    import signal

    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, 0.001)


if __name__ == "__main__":
    sys.exit(main())

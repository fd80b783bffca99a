"""`vmette`, and `python -m vmette`."""

from __future__ import annotations

import gc
import sys

from . import headstart


def main() -> int:
    """Runs the command line and returns the exit code."""
    # Nearly all that a command makes lives as long as the command: to look for garbage is a waste, as a rule.
    gc.set_threshold(50_000)
    try:
        headstart.begin(sys.argv[1:])
        from .cli import main

        return main()
    except KeyboardInterrupt:  # before there was anybody to handle it
        return 128 + 2
    finally:
        import signal  # late: nothing is to be read before the head start

        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # all is done: the exit code is what it is
        headstart.end()


if __name__ == "__main__":
    sys.exit(main())

"""How far the fetching of an image is: one line a layer, redrawn in place on a terminal."""

from __future__ import annotations

import shutil
import sys
import threading
import time

from ..providers.base import Progress

REDRAW_SECONDS = 0.1
BAR = 24
FINISHED = ("ready", "cached")


class ProgressDisplay:
    """Takes :class:`Progress` from any thread and shows it on stderr. A context manager: at its end the bars are gone.

    Where stderr is no terminal, each layer that has been fetched is one line, and cached ones are none.
    """

    def __init__(self) -> None:
        self._parts: dict[str, Progress] = {}
        self._lock = threading.Lock()
        self._drawn = 0
        """Lines on the screen that are ours."""
        self._last = 0.0
        self._live = sys.stderr.isatty()

    def __enter__(self) -> ProgressDisplay:
        return self

    def __exit__(self, *args: object) -> None:
        with self._lock:
            self._erase()

    def __call__(self, progress: Progress) -> None:
        """Shows `progress`."""
        with self._lock:
            changed = progress.state != getattr(self._parts.get(progress.part), "state", None)
            self._parts[progress.part] = progress
            if not self._live:
                if changed and progress.state == "ready":
                    _say(f"{progress.part} ready")
            elif any(part.state not in FINISHED for part in self._parts.values()):
                now = time.monotonic()
                if changed or now - self._last >= REDRAW_SECONDS:
                    self._last = now
                    self._draw()

    def _erase(self) -> None:
        if self._drawn:
            _say(f"\x1b[{self._drawn}F\x1b[J", end="")
            self._drawn = 0

    def _draw(self) -> None:
        size = shutil.get_terminal_size()
        shown = [part for part in self._parts.values() if part.state not in FINISHED][: max(1, size.lines - 3)]
        done = sum(part.state in FINISHED for part in self._parts.values())
        lines = [_line(part) for part in shown] + [f"{done} of {len(self._parts)} layers ready"]
        self._erase()
        _say("".join(line[: size.columns - 1] + "\n" for line in lines), end="")
        self._drawn = len(lines)


def _line(part: Progress) -> str:
    text = f"{part.part:<12.12} {part.state:<11}"
    if part.state == "downloading" and part.total:
        filled = min(BAR, BAR * part.done // part.total)
        text += f" [{'#' * filled}{'.' * (BAR - filled)}] {human(part.done)} of {human(part.total)}"
    return text


def human(size: int) -> str:
    """`size` bytes in words."""
    if size < 1000:
        return f"{size} B"
    value = float(size)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.5 or unit == "TB":
            break
    return f"{value:.1f} {unit}" if value < 9.95 else f"{value:.0f} {unit}"


def _say(text: str, end: str = "\n") -> None:
    try:
        sys.stderr.write(text + end)
        sys.stderr.flush()
    except (OSError, ValueError):  # closed: there is nobody to show it to
        pass

"""Where the time of a run went."""

from __future__ import annotations

import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """A point that a run reached, `seconds` after its start."""

    name: str
    seconds: float


class Stopwatch:
    """Notes when points are reached. `start` is a time of `time.monotonic`; now, unless an earlier one is known."""

    def __init__(self, start: float | None = None) -> None:
        self.start = time.monotonic() if start is None else start
        self._times: dict[str, float] = {}
        self.way = ""
        """How the machine came up, and why that way."""

    def reached(self, name: str, at: float | None = None) -> None:
        """Notes `name`, at a time of `time.monotonic`: now, unless told otherwise."""
        self._times[name] = (time.monotonic() if at is None else at) - self.start

    @property
    def timings(self) -> tuple[Timing, ...]:
        """What has been noted, in the order of time."""
        return tuple(Timing(name, at) for name, at in sorted(self._times.items(), key=lambda item: item[1]))

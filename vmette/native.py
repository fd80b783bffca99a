"""Calls of the native module (`csrc/`) that others share, with Python's types."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence


def spawn(argv: Sequence[str], fds: Mapping[int, int], env: Mapping[str, str]) -> int:
    """Starts a process that ends with the calling thread: see :func:`vmette.vmm.spawn.spawn`.

    Returns:
        Its number, or a negative errno.
    """
    from ._native import ffi, lib

    strings = [ffi.new("char[]", os.fsencode(arg)) for arg in argv]
    entries = [ffi.new("char[]", os.fsencode(f"{name}={value}")) for name, value in env.items()]
    arguments = ffi.new("char *[]", [*strings, ffi.NULL])
    environment = ffi.new("char *[]", [*entries, ffi.NULL])
    sources, targets = list(fds.values()), list(fds.keys())
    return int(lib.vmette_spawn(strings[0], arguments, environment, sources, targets, len(sources)))

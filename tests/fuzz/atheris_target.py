"""What the Python targets share. Each is a program, with libFuzzer's options: `python -m tests.fuzz.fuzz_protocol`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

import atheris

PLANTED = "FUZZ_SELF_TEST"
"""In the environment: the target is to have a fault, which the fuzzer has to find (tests/test_fuzz.py)."""

Mutator = Callable[[bytes, int, int], bytes]


def fuzz(target: Callable[[bytes], None], plant: Callable[[], None], mutator: Mutator | None = None) -> None:
    """Runs `target` as the command line says. An exception that comes out of it is a finding."""
    if PLANTED in os.environ:
        plant()
    atheris.Setup(sys.argv, target, custom_mutator=mutator)
    atheris.Fuzz()


def pieces(data: bytes) -> Iterator[bytes]:
    """An input without its first byte, which says in how large pieces it comes; 0 is whole."""
    size = (data[0] if data else 0) or len(data)
    for at in range(1, len(data), size or 1):
        yield data[at : at + size]

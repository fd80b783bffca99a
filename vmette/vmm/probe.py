"""Answers about this host that are costly to find out, remembered in the user's cache directory."""

from __future__ import annotations

import json
import logging
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from .. import assets
from ..files import write_atomically

T = TypeVar("T")

logger = logging.getLogger(__name__)

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """What changes when this computer starts; empty where there is no telling."""
    return BOOT_ID.read_text() if BOOT_ID.exists() else ""


def identity(path: Path) -> str:
    """What changes when the file at `path` does."""
    status = path.stat()
    return f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"


def remembered(question: str, facts: Mapping[str, str], ask: Callable[[], bool]) -> bool:
    """The answer of `ask`, which is called once for each `question` and the `facts` that it depends on."""
    return recalled(question, facts, ask, bool)


def recalled(question: str, facts: Mapping[str, str], ask: Callable[[], T], kind: type[T]) -> T:
    """As :func:`remembered`, of an answer that is of the type `kind` and fit for JSON."""
    facts = dict(facts)
    # The file's name only has to differ as a rule: the facts in it are compared. (This runs at every start of a VM, and
    # hashlib would bring in OpenSSL.)
    key = zlib.crc32(json.dumps(facts, sort_keys=True).encode())
    path = assets.cache_root() / "probes" / f"{question}-{key:08x}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(path.read_text())
        answer = known["answer"]
        if known["facts"] == facts and isinstance(answer, kind):
            return answer
    answer = ask()
    try:
        write_atomically(path, json.dumps({"answer": answer, "facts": facts}, indent=1).encode())
    except OSError as error:  # a full disk makes the next run slower, not wrong
        logger.info("cannot remember that %s is %s: %s", question, answer, error)
    return answer

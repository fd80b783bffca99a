"""The user's directories, as text: what is needed before anything else is read."""

from __future__ import annotations

import os
import sys


def cache() -> str | None:
    """$VMETTE_CACHE_DIR, or `vmette` in the user's cache directory (of macOS: ~/Library/Caches)."""
    return os.environ.get("VMETTE_CACHE_DIR") or _users("XDG_CACHE_HOME", ".cache", "Library/Caches")


def state() -> str | None:
    """$VMETTE_STATE_DIR, or `vmette` in the user's directory for state (of macOS: ~/Library/Application Support)."""
    return os.environ.get("VMETTE_STATE_DIR") or _users("XDG_STATE_HOME", ".local/state", "Library/Application Support")


def config() -> str | None:
    """`vmette` in the user's directory for configuration (of macOS: ~/Library/Application Support)."""
    return _users("XDG_CONFIG_HOME", ".config", "Library/Application Support")


def _users(variable: str, xdg: str, apple: str) -> str | None:
    """`vmette` in one of the directories of the XDG specification, which has a relative one ignored, or in Apple's.

    None for a user who has no home.
    """
    explicit = os.environ.get(variable, "")
    if os.path.isabs(explicit):
        return os.path.join(explicit, "vmette")
    home = os.path.expanduser("~")
    if home.startswith("~"):
        return None
    return os.path.join(home, apple if sys.platform == "darwin" else xdg, "vmette")

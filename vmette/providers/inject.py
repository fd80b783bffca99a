"""Puts vmette's guest programs into a root filesystem that is a directory."""

from __future__ import annotations

import errno
import logging
from pathlib import Path

from ..tree import copy_into
from .base import ProviderIOError

logger = logging.getLogger(__name__)

HELPERS = ("vsock-send", "vsock-runner")
TARGET = "usr/local/bin"


def inject_guest_helpers(rootfs: Path, src_bin_dir: Path) -> None:
    """Copies the helpers to /usr/local/bin of `rootfs`, never through a symlink of the image.

    A helper that `src_bin_dir` lacks is logged and skipped.

    Raises:
        ProviderIOError: a helper that is there cannot be copied.
    """
    for helper in HELPERS:
        source = Path(src_bin_dir) / helper
        try:
            if not source.exists():
                logger.warning("guest helper %s is missing, left out", source)
                continue
            copy_into(rootfs, f"{TARGET}/{helper}", source, 0o755)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise ProviderIOError(f"{rootfs}/{TARGET} goes through a symlink; not following it") from error
            raise ProviderIOError(error) from error

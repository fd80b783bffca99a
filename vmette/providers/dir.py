"""`dir`: a directory of the host as root filesystem."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from ..errors import reason
from .base import Artifact, Context, Directory, InvalidSpec


class DirProvider:
    """Claims what looks like a path, there or not, and every bare name of an existing directory.

    A directory `node` in the working directory so hides an image of that name; `oci://node` names the image.
    """

    name = "dir"

    def matches(self, spec: str) -> bool:
        """Whether `spec` is path-shaped or names an existing directory."""
        if spec.startswith(("/", "./", "../", "~/")) or spec in {".", ".."}:
            return True
        try:
            return spec != "" and os.path.isdir(spec)  # noqa: PTH112 (the spec must not be normalised)
        except ValueError:  # a NUL in it
            return False

    def provide(self, spec: str, context: Context) -> Artifact:  # noqa: ARG002
        """The directory, its path verbatim: a symlink keeps its meaning for the next run.

        Raises:
            InvalidSpec: it is missing or no directory, or `~/` is used without $HOME.
        """
        if spec.startswith("~/"):
            home = os.environ.get("HOME")
            if home is None:
                raise InvalidSpec("$HOME not set; cannot expand '~/'")
            path = Path(home) / spec[2:]
        else:
            path = Path(spec)
        try:
            mode = path.stat().st_mode
        except (OSError, ValueError) as error:
            raise InvalidSpec(f"{path}: {reason(error)}") from error
        if not stat.S_ISDIR(mode):
            raise InvalidSpec(f"{path} is not a directory")
        return Directory(path)

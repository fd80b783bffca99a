"""`builtin`: the small root filesystem that vmette carries, so that something runs without a network."""

from __future__ import annotations

from .base import Artifact, BlockFs, BlockImage, Context, InvalidSpec

SCHEME = "builtin://"


class BuiltinProvider:
    """Claims `builtin://…`. There is one: `builtin://base`, busybox with its applets."""

    name = "builtin"

    def matches(self, spec: str) -> bool:
        """Whether `spec` has the scheme."""
        return spec.startswith(SCHEME)

    def provide(self, spec: str, context: Context) -> Artifact:
        """The image that came with vmette.

        Raises:
            InvalidSpec: there is no built-in root filesystem of that name.
            PayloadError: this installation lacks its image.
        """
        if spec != f"{SCHEME}base":
            raise InvalidSpec(f"{spec}: the built-in root filesystems are: {SCHEME}base")
        from ..assets import base_image

        return BlockImage(base_image(context.arch), BlockFs.SQUASHFS)

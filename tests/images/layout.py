"""OCI layouts, written by hand."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.images.layer_tools import B, C, D, F, H, Item, L, P, item
from tests.images.layer_tools import tar as archive

TYPES = {"f": F, "d": D, "l": L, "h": H, "c": C, "b": B, "p": P}
GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
INDEX = "application/vnd.oci.image.index.v1+json"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"


def member(
    name: str,
    data: bytes = b"",
    kind: str = "f",
    *,
    mode: int | None = None,
    owner: tuple[int, int] = (0, 0),
    target: str = "",
    device: tuple[int, int] = (0, 0),
    xattrs: Mapping[str, bytes] | None = None,
    mtime: int = 1_000_000_000,
) -> Item:
    """One entry of a layer, for :func:`tar`."""
    return item(
        name,
        TYPES[kind],
        data,
        target=target,
        mode=mode if mode is not None else 0o755 if kind == "d" else 0o644,
        uid=owner[0],
        gid=owner[1],
        mtime_ns=mtime * 10**9,
        device=device,
        xattrs={key.encode(): value for key, value in (xattrs or {}).items()},
    )


def tar(members: Iterable[Item]) -> bytes:
    """A layer, not compressed."""
    return archive(*members)


class Layout:
    """An OCI layout that is being written to `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs/sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self._entries: list[dict[str, Any]] = []

    def read(self, described: Mapping[str, Any]) -> bytes:
        """The bytes of a blob."""
        return (self.path / "blobs" / str(described["digest"]).replace(":", "/")).read_bytes()

    def blob(self, data: bytes, media_type: str, **more: Any) -> dict[str, Any]:
        """Writes a blob and describes it."""
        digest = hashlib.sha256(data).hexdigest()
        (self.path / "blobs/sha256" / digest).write_bytes(data)
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(data), **more}

    def manifest(
        self,
        layers: Sequence[bytes],
        config: Mapping[str, Any] | None = None,
        architecture: str = "amd64",
        media_type: str = GZIP,
    ) -> dict[str, Any]:
        """Writes an image of `layers`, which are tars, or compressed as `media_type` says, and describes it."""
        blobs = [
            self.blob(gzip.compress(data, 1, mtime=0) if media_type == GZIP else data, media_type) for data in layers
        ]
        identities = [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in layers]
        document = {
            "os": "linux",
            "architecture": architecture,
            "config": dict(config or {}),
            "rootfs": {"type": "layers", "diff_ids": identities},
        }
        described = self.blob(json.dumps(document).encode(), CONFIG)
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST, "config": described, "layers": blobs}
        platform = {"os": "linux", "architecture": architecture}
        return self.blob(json.dumps(manifest).encode(), MANIFEST, platform=platform)

    def index(self, manifests: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Writes an index and describes it."""
        document = {"schemaVersion": 2, "mediaType": INDEX, "manifests": list(manifests)}
        return self.blob(json.dumps(document).encode(), INDEX)

    def tag(self, name: str, described: Mapping[str, Any]) -> str:
        """Gives what is `described` a tag, and returns the spec."""
        self._entries.append({**described, "annotations": {"org.opencontainers.image.ref.name": name}})
        (self.path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": self._entries}))
        return f"oci-layout:{self.path}:{name}"

"""OCI layouts, written by hand."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

TYPES = {
    "f": tarfile.REGTYPE,
    "d": tarfile.DIRTYPE,
    "l": tarfile.SYMTYPE,
    "h": tarfile.LNKTYPE,
    "c": tarfile.CHRTYPE,
    "b": tarfile.BLKTYPE,
    "p": tarfile.FIFOTYPE,
}
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
) -> tuple[tarfile.TarInfo, bytes]:
    """One entry of a layer, for :func:`tar`."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname, info.mtime = TYPES[kind], len(data), target, mtime
    info.mode = mode if mode is not None else 0o755 if kind == "d" else 0o644
    info.uid, info.gid = owner
    info.devmajor, info.devminor = device
    info.pax_headers = {
        f"SCHILY.xattr.{key}": value.decode("utf-8", "surrogateescape") for key, value in (xattrs or {}).items()
    }
    return info, data


def tar(members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    """A layer, not compressed."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


class Layout:
    """An OCI layout that is being written to `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs/sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self._entries: list[dict[str, Any]] = []

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

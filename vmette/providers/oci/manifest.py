"""Manifests, indexes and configs: OCI's image-spec, and Docker's image manifest version 2, schema 2."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..base import ImageConfig, InvalidSpec
from .reference import is_digest

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
INDEXES = (OCI_INDEX, DOCKER_INDEX)
MANIFESTS = (OCI_MANIFEST, DOCKER_MANIFEST)
SCHEMA_1 = "application/vnd.docker.distribution.manifest.v1"

LAYERS = {
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
}
"""What a layer is; how it is compressed is seen by its first bytes."""

MAX_MANIFEST = 4 << 20
MAX_LAYERS = 512
MAX_ENTRIES = 1024
VARIANTS = {"arm64": "v8", "arm": "v7"}
"""The variant that an architecture has when none is named."""
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True)
class Descriptor:
    """Names a blob: `digest` and `size` are what it must have."""

    media_type: str
    digest: str
    size: int

    @property
    def short(self) -> str:
        """Enough of the digest to know it by."""
        return self.digest.partition(":")[2][:12]


@dataclass(frozen=True)
class Platform:
    """`os/architecture[/variant]`."""

    os: str
    architecture: str
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Reads it, machine names (`x86_64`, `aarch64`) among the architectures.

        Raises:
            InvalidSpec: it has another form.
        """
        parts = text.split("/")
        if not re.fullmatch("[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+){1,2}", text) or len(text) > 100:
            raise InvalidSpec(f"platform {text!r} is malformed: it is OS/ARCH or OS/ARCH/VARIANT, like linux/arm64")
        return cls(parts[0], ARCHITECTURES.get(parts[1], parts[1]), "".join(parts[2:]))

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))

    def matches(self, other: Mapping[str, Any]) -> bool:
        """Whether an index's `platform` is this one. A variant counts only where both have one, or its default."""
        default = VARIANTS.get(self.architecture, "")
        variant = other.get("variant") or default
        same = other.get("os") == self.os and other.get("architecture") == self.architecture
        return same and variant == (self.variant or default)


@dataclass(frozen=True)
class Image:
    """A manifest for one platform."""

    config: Descriptor
    layers: tuple[Descriptor, ...]


def media_type(data: bytes, given: str | None, what: str) -> str:
    """What a manifest is: what it says itself, or else what came with it.

    Raises:
        InvalidSpec: it is nothing that vmette knows.
    """
    document = json_object(data, what)
    said = document.get("mediaType") or (given or "").partition(";")[0].strip()
    if document.get("schemaVersion") == 1 or str(said).startswith(SCHEMA_1):
        raise InvalidSpec(f"{what} is a Docker schema 1 manifest, which vmette does not read; push the image anew")
    if said in INDEXES or said in MANIFESTS:
        return str(said)
    if isinstance(document.get("manifests"), list):
        return OCI_INDEX
    if isinstance(document.get("layers"), list):
        return OCI_MANIFEST
    raise InvalidSpec(f"{what} is no image, but {shown(said)}")


def entries(data: bytes, what: str) -> list[dict[str, Any]]:
    """What an index lists.

    Raises:
        InvalidSpec: it is malformed.
    """
    listed = _list(json_object(data, what), "manifests", MAX_ENTRIES, what)
    return [entry for entry in listed if isinstance(entry, dict)]


def choose(data: bytes, platform: Platform, what: str) -> Descriptor:
    """The manifest of an index that is for `platform`.

    Raises:
        InvalidSpec: there is none, or the index is malformed.
    """
    found = entries(data, what)
    known = []
    for entry in found:
        place = entry.get("platform")
        if place is None and len(found) == 1:
            return descriptor(entry, what)
        if isinstance(place, dict):
            if platform.matches(place):
                return descriptor(entry, what)
            if place.get("os") != "unknown":  # attestations
                parts = (place.get("os"), place.get("architecture"), place.get("variant"))
                known.append(shown("/".join(str(part) for part in parts if part)))
    there = ", ".join(sorted(set(known))[:20]) or "none"
    raise InvalidSpec(f"{what} is not there for {platform}; it is for {there} (choose with --platform)")


def image(data: bytes, what: str) -> Image:
    """Reads a manifest.

    Raises:
        InvalidSpec: it is malformed, or has layers of a kind that vmette does not read.
    """
    document = json_object(data, what)
    found = tuple(descriptor(entry, what) for entry in _list(document, "layers", MAX_LAYERS, what))
    for layer in found:
        if layer.media_type not in LAYERS:
            raise InvalidSpec(f"{what} has a layer of the type {layer.media_type[:100]!r}, which vmette does not read")
    return Image(descriptor(document.get("config"), what), found)


def descriptor(value: object, what: str) -> Descriptor:
    """Reads a descriptor.

    Raises:
        InvalidSpec: it is malformed.
    """
    if isinstance(value, dict):
        kind, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
        named = isinstance(kind, str) and isinstance(digest, str) and is_digest(digest)
        if named and type(size) is int and 0 <= size < 1 << 63:
            return Descriptor(str(kind), str(digest), size)
    raise InvalidSpec(f"{what} has a malformed descriptor")


def config(data: bytes, what: str) -> ImageConfig:
    """Reads what an image's config says about running it.

    Raises:
        InvalidSpec: it is malformed.
    """
    document = json_object(data, what).get("config") or {}
    if not isinstance(document, dict):
        raise InvalidSpec(f"{what} has a malformed config")
    env = []
    for entry in _strings(document, "Env", what):
        name, equals, value = entry.partition("=")
        if name and equals:
            env.append((name, value))
    return ImageConfig(
        _strings(document, "Entrypoint", what),
        _strings(document, "Cmd", what),
        tuple(env),
        _string(document, "User", what),
        _string(document, "WorkingDir", what),
        _string(document, "StopSignal", what),
    )


def shown(value: object) -> str:
    """What somebody else wrote, for a message: not too long, and nothing that a terminal obeys."""
    text = str(value)[:100]
    return text if text.isprintable() else repr(text)


def json_object(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object `data`.

    Raises:
        InvalidSpec: it is none.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise InvalidSpec(f"{what} has a manifest or config that is no JSON object")
    return document


def _list(document: Mapping[str, Any], key: str, most: int, what: str) -> Sequence[object]:
    value = document.get(key)
    if not isinstance(value, list) or len(value) > most:
        raise InvalidSpec(f"{what} has no list of {key}, or one of more than {most}")
    return value


def _strings(document: Mapping[str, Any], key: str, what: str) -> tuple[str, ...]:
    value = document.get(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(item, str) and _is_text(item) for item in value):
        raise InvalidSpec(f"{what} has a config whose {key} is no list of strings")
    return tuple(value)


def _is_text(value: str) -> bool:
    """Whether the guest can be told `value`: no NUL, and no half of a character, which JSON can say."""
    return not re.search("[\0\ud800-\udfff]", value)


def _string(document: Mapping[str, Any], key: str, what: str) -> str | None:
    value = document.get(key)
    if value is not None and (not isinstance(value, str) or not _is_text(value)):
        raise InvalidSpec(f"{what} has a config whose {key} is no string")
    return value or None

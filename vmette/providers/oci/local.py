"""Images that are files: an OCI layout (a directory) and what `docker save` writes (an archive)."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from ...errors import reason
from ...files import NotRegularError, open_regular
from ..base import InvalidSpec, ProviderIOError
from ..layered import Stopped
from . import manifest
from .manifest import Descriptor, Image, Platform
from .reference import digest_of, has_digest, is_tag

LAYOUT, ARCHIVE = "oci-layout:", "docker-archive:"
REF_NAME = "org.opencontainers.image.ref.name"
MAX_MEMBERS = 100_000
_CHUNK = 1 << 20


def _opened(path: Path) -> BinaryIO:
    try:
        return open_regular(path)
    except NotRegularError:
        raise ProviderIOError(f"{path} is no regular file") from None
    except (OSError, ValueError) as error:
        raise ProviderIOError(f"{path}: {reason(error)}") from error


class Layout:
    """An OCI image layout (image-spec, image-layout.md) at `DIR[:TAG]`.

    Raises:
        InvalidSpec: there is none, or it has not the image.
        ProviderIOError: from any method: it cannot be read.
    """

    def __init__(self, text: str) -> None:
        self.what = f"{LAYOUT}{text}"
        directory, colon, tag = text.rpartition(":")
        if not colon or "/" in tag or not is_tag(tag) or Path(text).is_dir():
            directory, tag = text, ""
        self._directory = Path(directory)
        self._tag = tag
        self._index = self._read(self._directory / "index.json", manifest.MAX_MANIFEST)

    def image(self, platform: Platform) -> tuple[Image, bytes]:
        """The manifest for `platform`, and its config."""
        found = self._chosen(platform)
        for _ in range(4):  # an index may be of indexes
            data = self.blob(found)
            if manifest.media_type(data, found.media_type, self.what) not in manifest.INDEXES:
                image = manifest.image(data, self.what)
                return image, self.blob(image.config)
            found = manifest.choose(data, platform, self.what)
        raise InvalidSpec(f"{self.what} has an index of an index of an index")

    def _chosen(self, platform: Platform) -> Descriptor:
        if not self._tag:
            return manifest.choose(self._index, platform, self.what)
        names = []
        for entry in manifest.entries(self._index, self.what):
            annotations = entry.get("annotations")
            name = annotations.get(REF_NAME) if isinstance(annotations, dict) else None
            if name == self._tag:
                return manifest.descriptor(entry, self.what)
            names.append(manifest.shown(name))
        raise InvalidSpec(f"{self.what}: there is no tag {self._tag!r}; there are {', '.join(names[:20]) or 'none'}")

    def blob(self, descriptor: Descriptor) -> bytes:
        """A manifest or config, checked."""
        if descriptor.size > manifest.MAX_MANIFEST:
            raise InvalidSpec(f"{self.what} has a manifest or config of more than {manifest.MAX_MANIFEST} bytes")
        with self.layer(descriptor) as file:
            data = file.read(descriptor.size)
        if not has_digest(data, descriptor.digest):
            raise ProviderIOError(f"{self._path(descriptor)} is not what its name says; the layout is damaged")
        return data

    def _path(self, descriptor: Descriptor) -> Path:
        algorithm, _, digits = descriptor.digest.partition(":")
        return self._directory / "blobs" / algorithm / digits

    @contextmanager
    def layer(self, descriptor: Descriptor, stopped: Stopped = lambda: False) -> Iterator[BinaryIO]:  # noqa: ARG002
        """A blob of the size that it is to have."""
        path = self._path(descriptor)
        with _opened(path) as file:
            if os.fstat(file.fileno()).st_size != descriptor.size:
                raise ProviderIOError(f"{path} is not what its name says; the layout is damaged")
            yield file

    def _read(self, path: Path, most: int) -> bytes:
        if not path.exists():
            raise InvalidSpec(f"{self._directory} is no OCI layout: it has no index.json")
        with _opened(path) as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise InvalidSpec(f"{path} is larger than {most} bytes")
        return data


class Archive:
    """What `docker save` and `skopeo copy … docker-archive:` write: a tar with a manifest.json.

    Raises:
        InvalidSpec: it is none, or a damaged one.
        ProviderIOError: from any method: it cannot be read.
    """

    def __init__(self, text: str) -> None:
        self.what = f"{ARCHIVE}{text}"
        self._path = Path(text)
        self._members: dict[str, tuple[int, int]] = {}
        self._layers: dict[str, str] = {}
        if not self._path.exists():
            raise InvalidSpec(f"{self._path} does not exist")
        try:
            with _opened(self._path) as file, tarfile.open(fileobj=cast("BinaryIO", _Headers(file)), mode="r:") as tar:
                for number, member in enumerate(tar):
                    if number >= MAX_MEMBERS:
                        raise InvalidSpec(f"{self.what} has more than {MAX_MEMBERS} members")
                    if member.isreg() and not member.issparse():
                        self._members[os.path.normpath(member.name)] = (member.offset_data, member.size)
                    elif member.issym():  # older archives link layers that are the same
                        where = os.path.normpath(Path(member.name).parent / member.linkname)
                        if where in self._members:
                            self._members[os.path.normpath(member.name)] = self._members[where]
        except OSError as error:
            raise ProviderIOError(f"{self._path}: {reason(error)}") from error
        except (tarfile.TarError, ValueError, EOFError, RecursionError) as error:
            raise InvalidSpec(f"{self._path} is no Docker archive: {error}") from error

    def image(self, platform: Platform) -> tuple[Image, bytes]:
        """The manifest that the archive's files amount to, and the config."""
        try:
            documents = json.loads(self._small("manifest.json"))
            (document,) = documents
            config_name, names = document["Config"], document["Layers"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InvalidSpec(f"{self.what} has not one image, described by its manifest.json") from None
        if not isinstance(config_name, str) or not isinstance(names, list) or len(names) > manifest.MAX_LAYERS:
            raise InvalidSpec(f"{self.what} has a malformed manifest.json")
        data = self._small(config_name)
        try:
            config = json.loads(data)
            identities = config["rootfs"]["diff_ids"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise InvalidSpec(f"{self.what} has a malformed config") from None
        if not isinstance(identities, list) or len(identities) != len(names):
            raise InvalidSpec(f"{self.what} has another number of layers than its config says")
        if not platform.matches(config):
            where = manifest.shown(f"{config.get('os')}/{config.get('architecture')}")
            raise InvalidSpec(f"{self.what} is not for {platform}, but for {where} (choose with --platform)")
        layers = tuple(
            self._describe(str(name), str(identity)) for name, identity in zip(names, identities, strict=True)
        )
        return Image(Descriptor("", digest_of(data), len(data)), layers), data

    def _describe(self, name: str, identity: str) -> Descriptor:
        """A layer by what its bytes are; those of one that is not compressed are what the config says."""
        offset, size = self._member(name)
        digest = hashlib.sha256()
        with _opened(self._path) as file:
            file.seek(offset)
            left, start = size, b""
            while left and (data := file.read(min(_CHUNK, left))):
                start = start or data[:512]
                digest.update(data)
                left -= len(data)
        found = f"sha256:{digest.hexdigest()}"
        if start[257:262] == b"ustar" and found != identity:
            raise InvalidSpec(f"{self.what}: the layer {name[:100]!r} is not what the config says; it is damaged")
        self._layers[found] = name
        return Descriptor("", found, size)

    @contextmanager
    def layer(self, descriptor: Descriptor, stopped: Stopped = lambda: False) -> Iterator[BinaryIO]:  # noqa: ARG002
        """A layer, as :meth:`image` has described it."""
        offset, size = self._member(self._layers[descriptor.digest])
        with _opened(self._path) as file:
            yield _Part(file, offset, size)  # type: ignore[misc]

    def _small(self, name: str) -> bytes:
        offset, size = self._member(name)
        if size > manifest.MAX_MANIFEST:
            raise InvalidSpec(f"{self.what}: {name[:100]!r} is larger than {manifest.MAX_MANIFEST} bytes")
        with _opened(self._path) as file:
            file.seek(offset)
            return file.read(size)

    def _member(self, name: str) -> tuple[int, int]:
        try:
            return self._members[os.path.normpath(name)]
        except (KeyError, ValueError):
            raise InvalidSpec(f"{self.what} has no {name[:100]!r}") from None


class _Headers:
    """A file of which tarfile reads headers, none of which is large in an honest archive."""

    def __init__(self, file: BinaryIO) -> None:
        self.seek, self.tell = file.seek, file.tell
        self._file = file

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _CHUNK:
            raise ValueError(f"it has a header of more than {_CHUNK} bytes")
        return self._file.read(size)


class _Part:
    """A part of a file, to be read once."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        file.seek(offset)
        self._file = file
        self._left = size

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data

"""Names of images: `alpine`, `ghcr.io/org/app:1.2`, `localhost:5000/x@sha256:…`."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from ..base import InvalidSpec

SCHEME = "oci://"
DEFAULT_HOST = "docker.io"
DEFAULT_API_HOST = "registry-1.docker.io"

_LABEL = "[a-z0-9](?:[a-z0-9-]*[a-z0-9])?"
_HOST = re.compile(rf"({_LABEL}(?:\.{_LABEL})*|\[[0-9a-f:.]+\])(?::([1-9][0-9]{{0,4}}))?")
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile("sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")


def is_tag(text: str) -> bool:
    """Whether `text` has the form of a tag."""
    return _TAG.fullmatch(text) is not None


def is_digest(text: str) -> bool:
    """Whether `text` has the form of a digest, and its algorithm is one that vmette computes."""
    return _DIGEST.fullmatch(text) is not None


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    """The digest of `data`."""
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def has_digest(data: bytes, digest: str) -> bool:
    """Whether `digest` is that of `data`."""
    return digest_of(data, digest.partition(":")[0]) == digest


def is_repository(text: str) -> bool:
    """Whether `text` has the form of a repository's name."""
    return len(text) <= 255 and _REPOSITORY.fullmatch(text) is not None


def canonical_host(host: str) -> str:
    """`host` in lower case, and Docker Hub by one name."""
    host = host.lower()
    return DEFAULT_HOST if host in {"index.docker.io", DEFAULT_API_HOST} else host


def api_host(host: str) -> str:
    """The host that answers for the registry `host`."""
    return DEFAULT_API_HOST if host == DEFAULT_HOST else host


@dataclass(frozen=True)
class Reference:
    """What names an image. Made by `parse`, so that `str()` of two that differ differs."""

    host: str
    repository: str
    tag: str | None
    digest: str | None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Reads `[oci://][HOST/]REPOSITORY[:TAG][@DIGEST]` as Docker does; without tag and digest it is `latest`.

        The first component is a host if it has a dot or a colon, or is `localhost`.

        Raises:
            InvalidSpec: it is malformed.
        """
        name, at, digest = text.removeprefix(SCHEME).partition("@")
        first, slash, rest = name.partition("/")
        if slash and (first.lower() == "localhost" or "." in first or ":" in first):
            host = canonical_host(first)
        else:
            host, rest = DEFAULT_HOST, name
        repository, colon, tag = rest.partition(":")
        if host == DEFAULT_HOST and "/" not in repository:
            if re.fullmatch("[0-9a-f]{64}", repository):
                raise InvalidSpec(f"{_shown(text)}: 64 hex digits are an image's ID, not its name")
            repository = repository and f"library/{repository}"
        problem = _host_problem(host) or _repository_problem(repository)
        if colon and not is_tag(tag):
            problem = problem or f"tag {_shown(tag)} is not 1 to 128 of A-Z a-z 0-9 _ . - (. and - not first)"
        if at and not is_digest(digest):
            problem = problem or f"digest {_shown(digest)} is not sha256: and 64, or sha512: and 128, of 0-9 a-f"
        if problem:
            raise InvalidSpec(f"{_shown(text)}: {problem}")
        return cls(host, repository, tag if colon else None if at else "latest", digest if at else None)

    def __str__(self) -> str:
        tag = "" if self.tag is None else f":{self.tag}"
        return f"{self.host}/{self.repository}{tag}" + ("" if self.digest is None else f"@{self.digest}")

    @property
    def api_host(self) -> str:
        """The host to talk to."""
        return api_host(self.host)

    @property
    def selector(self) -> str:
        """What to ask the registry for: the digest, else the tag."""
        selector = self.digest or self.tag
        assert selector is not None
        return selector


def _shown(text: str) -> str:
    """`text` for a message: on one line, and not all of it if it is long."""
    return repr(text if len(text) <= 100 else f"{text[:100]}…")


def _host_problem(host: str) -> str | None:
    match = _HOST.fullmatch(host) if len(host) <= 255 else None
    problem = f"registry {_shown(host)} is not a host name or address with or without a port"
    if match is None or int(match[2] or 1) > 65535:
        return problem
    if host.startswith("["):
        from ipaddress import IPv6Address

        try:
            IPv6Address(match[1][1:-1])
        except ValueError:
            return problem
    return None


def _repository_problem(repository: str) -> str | None:
    if not repository:
        return "it names no repository"
    if len(repository) > 255:
        return "the repository's name is longer than 255 characters"
    if is_repository(repository):
        return None
    if repository != repository.lower() and is_repository(repository.lower()):
        return f"repository {_shown(repository)} is not in lower case"
    return (
        f"repository {_shown(repository)} is not made of a-z and 0-9, with . _ __ or - between them and / between parts"
    )

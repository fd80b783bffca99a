"""Finds the credentials for a registry: in vmette's own environment variables, then where Docker keeps them."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .reference import DEFAULT_HOST, canonical_host

logger = logging.getLogger(__name__)

HELPER_TIMEOUT = 30.0
MAX_CONFIG = 1 << 20
MAX_HELPER_OUTPUT = 1 << 16

_HUB_KEY = "https://index.docker.io/v1/"
"""Docker Hub's name in Docker's configuration."""
_HELPER = re.compile("[A-Za-z0-9._-]+")
_HEADER_SAFE = re.compile("[!-~]+")
_SURROGATE = re.compile("[\ud800-\udfff]")  # bytes of the environment that are no UTF-8


@dataclass(frozen=True)
class Credentials:
    """What a registry is told. `basic` is a user and a password; `bearer` is sent as it is; `identity` buys tokens."""

    kind: Literal["basic", "bearer", "identity"]
    secret: str = field(repr=False)
    user: str = ""

    @property
    def usable(self) -> bool:
        """Whether it can be sent: a bearer token stands in a header itself, the others are encoded."""
        if _SURROGATE.search(self.user + self.secret):
            return False
        return bool(self.secret) and (self.kind != "bearer" or _HEADER_SAFE.fullmatch(self.secret) is not None)


def variable(host: str) -> str:
    """The environment variable with the credentials for `host`. `a-b.example` and `a.b.example` share one."""
    return "VMETTE_OCI_AUTH_" + re.sub("[^A-Z0-9]", "_", host.upper())


def credentials_for(host: str) -> Credentials | None:
    """The first credentials there are for `host`, None for an anonymous visitor.

    A source that is broken is logged, without what is in it, and passed over.
    """
    host = canonical_host(host)
    for source, found in _candidates(host):
        if found is None:
            continue
        if found.usable:
            logger.debug("credentials for %s: from %s", host, source)
            return found
        logger.warning("credentials for %s from %s are empty or cannot be sent; ignored", host, source)
    return None


def _candidates(host: str) -> Iterator[tuple[str, Credentials | None]]:
    yield f"${variable(host)}", _own_variable(host)
    yield "$VMETTE_OCI_TOKEN", _token_variable(host)
    config = _config()
    yield "Docker's credHelpers", _ask(_entry(config, "credHelpers", host), host)
    yield "Docker's auths", _stored(_entry(config, "auths", host), host)
    yield "Docker's credsStore", _ask(config.get("credsStore"), host)


def _own_variable(host: str) -> Credentials | None:
    value = os.environ.get(variable(host), "").strip()
    user, colon, secret = value.partition(":")
    if colon:
        return Credentials("basic", secret, user)
    return Credentials("bearer", value) if value else None


def _token_variable(host: str) -> Credentials | None:
    meant = os.environ.get("VMETTE_OCI_TOKEN_HOST", "").strip() or DEFAULT_HOST
    token = os.environ.get("VMETTE_OCI_TOKEN", "").strip()
    if not token or canonical_host(meant) != host:
        return None
    return Credentials("basic", token, os.environ.get("VMETTE_OCI_USER", "").strip() or "vmette")


def _config() -> dict[str, Any]:
    """Docker's configuration, empty if there is none that can be read."""
    try:
        directory = os.environ.get("DOCKER_CONFIG")
        path = (Path(directory) if directory else Path.home() / ".docker") / "config.json"
        with path.open("rb") as file:
            config = json.loads(file.read(MAX_CONFIG))
    except (FileNotFoundError, NotADirectoryError, RuntimeError):  # RuntimeError: no home directory
        return {}
    except OSError as error:
        logger.warning("cannot read %s: %s", path, error.strerror)
        return {}
    except (ValueError, RecursionError):  # whose text may quote a secret
        logger.warning("%s is not JSON; ignored", path)
        return {}
    return config if isinstance(config, dict) else {}


def _entry(config: dict[str, Any], name: str, host: str) -> Any:
    """What a section has for `host`: under its own name, or under a URL of it as old versions of Docker wrote."""
    section = config.get(name)
    if not isinstance(section, dict):
        return None
    if host in section:
        return section[host]
    for key, entry in section.items():
        if canonical_host(re.sub("^https?://", "", key).partition("/")[0]) == host:
            return entry
    return None


def _stored(entry: Any, host: str) -> Credentials | None:
    """What an entry of Docker's `auths` holds."""
    if not isinstance(entry, dict):
        return None
    fields = {key: value for key, value in entry.items() if isinstance(value, str) and value}
    if "identitytoken" in fields:
        return Credentials("identity", fields["identitytoken"])
    if "registrytoken" in fields:
        return Credentials("bearer", fields["registrytoken"])
    if "auth" in fields:
        import base64

        try:
            user, colon, secret = base64.b64decode(fields["auth"], validate=True).decode().partition(":")
        except ValueError:
            colon = ""
        if not colon:
            logger.warning("Docker's configuration: auth for %s is not base64 of user:password; ignored", host)
            return None
        return Credentials("basic", secret.rstrip("\0"), user)  # Docker does so: some programs pad it
    if "username" in fields and "password" in fields:
        return Credentials("basic", fields["password"], fields["username"])
    return None


def _ask(helper: Any, host: str) -> Credentials | None:
    """What `docker-credential-HELPER get` says. Its output is never logged: a secret may be in it."""
    if helper is None or helper == "":
        return None
    if not isinstance(helper, str) or _HELPER.fullmatch(helper) is None:
        logger.warning("Docker's configuration: the credential helper for %s has an impossible name; ignored", host)
        return None
    program = f"docker-credential-{helper}"
    try:
        status, output = _run(program, _HUB_KEY if host == DEFAULT_HOST else host)
    except OSError as error:
        logger.warning("%s for %s: %s", program, host, error.strerror or error)
        return None
    if status != 0:
        # Having none is the usual case of a credsStore, and has no status of its own.
        absent = b"credentials not found" in output
        logger.log(logging.DEBUG if absent else logging.WARNING, "%s for %s: exit status %d", program, host, status)
        return None
    try:
        answer = json.loads(output)
        user, secret = answer["Username"], answer["Secret"]
    except (ValueError, RecursionError, TypeError, KeyError):
        user = secret = None
    if not isinstance(user, str) or not isinstance(secret, str):
        logger.warning("%s for %s: its answer has no Username and Secret", program, host)
        return None
    return Credentials("identity", secret) if user == "<token>" else Credentials("basic", secret, user)


def _run(program: str, question: str) -> tuple[int, bytes]:
    """Runs a helper: its exit status and output.

    Raises:
        OSError: it cannot be started, takes too long (TimeoutError) or writes too much.
    """
    import select
    import subprocess
    import time

    end = time.monotonic() + HELPER_TIMEOUT
    output = b""
    # In our own session: a helper may have to ask for a passphrase on the terminal.
    with subprocess.Popen(
        [program, "get"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            with suppress(BrokenPipeError):
                process.stdin.write(question.encode())  # shorter than a pipe's buffer
            process.stdin.close()
            poll = select.poll()
            poll.register(process.stdout)
            while True:
                if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
                    raise TimeoutError(f"no answer in {HELPER_TIMEOUT:g} seconds")
                chunk = os.read(process.stdout.fileno(), MAX_HELPER_OUTPUT)
                if not chunk:
                    break
                output += chunk
                if len(output) > MAX_HELPER_OUTPUT:
                    raise OSError("its output is too long")
            return process.wait(max(0.0, end - time.monotonic())), output
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"no end in {HELPER_TIMEOUT:g} seconds") from None
        finally:
            process.kill()  # nothing happens if it has ended

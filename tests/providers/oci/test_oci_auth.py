"""Where credentials come from."""

from __future__ import annotations

import base64
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

from vmette.providers.oci import auth
from vmette.providers.oci.auth import Credentials, credentials_for, variable

SECRET = "hunter2-Geheim"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one."""
    for name in tuple(os.environ):
        if name.startswith(("VMETTE_", "DOCKER_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    return tmp_path


@pytest.fixture(autouse=True)
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """All of it."""
    caplog.set_level(logging.DEBUG)
    return caplog


def configure(home: Path, config: Any) -> None:
    (home / ".docker").mkdir(exist_ok=True)
    (home / ".docker/config.json").write_text(config if isinstance(config, str) else json.dumps(config))


def entry(user: str = "me", secret: str = SECRET) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{secret}".encode()).decode()}


def helper(home: Path, name: str, script: str) -> Path:
    """A credential helper that notes what it is asked in the file that is returned."""
    program, asked = home / "bin" / f"docker-credential-{name}", home / f"asked-{name}"
    program.write_text(f"#!/bin/sh\n{{ echo $1; cat; }} >{asked}\n{script}\n")
    program.chmod(0o755)
    return asked


def answer(user: str = "me", secret: str = SECRET) -> str:
    return f"echo '{json.dumps({'ServerURL': 'x', 'Username': user, 'Secret': secret})}'"


def basic(user: str = "me", secret: str = SECRET) -> Credentials:
    return Credentials("basic", secret, user)


def test_there_are_none() -> None:
    assert credentials_for("ghcr.io") is None
    assert credentials_for("docker.io") is None


def test_there_is_no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", homeless)
    assert credentials_for("ghcr.io") is None


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("ghcr.io", "GHCR_IO"),
        ("localhost:5000", "LOCALHOST_5000"),
        ("a-b.example", "A_B_EXAMPLE"),
        ("[::1]:5", "___1__5"),
        ("docker.io", "DOCKER_IO"),
        ("index.docker.io", "DOCKER_IO"),
        ("registry-1.docker.io", "DOCKER_IO"),
    ],
)
def test_a_variable_of_a_host(monkeypatch: pytest.MonkeyPatch, host: str, name: str) -> None:
    monkeypatch.setenv(f"VMETTE_OCI_AUTH_{name}", "me:a:b\n")
    assert credentials_for(host) == basic("me", "a:b")
    assert credentials_for("quay.io") is None


def test_a_bare_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable("ghcr.io"), f" {SECRET}\n")
    assert credentials_for("ghcr.io") == Credentials("bearer", SECRET)


@pytest.mark.parametrize("value", ["a b", "x\ny", "ü", "me:", ":", "me:\udcff", "\udcff"])
def test_what_cannot_be_sent_is_passed_over(
    home: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture, value: str
) -> None:
    monkeypatch.setenv(variable("ghcr.io"), value)
    configure(home, {"auths": {"ghcr.io": entry()}})
    assert credentials_for("ghcr.io") == basic()
    assert "ignored" in log.text


def test_the_token_is_for_docker_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMETTE_OCI_TOKEN", SECRET)
    assert credentials_for("docker.io") == basic("vmette")
    assert credentials_for("ghcr.io") is None
    assert credentials_for("docker.io.evil.example") is None
    monkeypatch.setenv("VMETTE_OCI_USER", "me")
    assert credentials_for("registry-1.docker.io") == basic("me")


def test_the_token_is_for_the_host_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMETTE_OCI_TOKEN", SECRET)
    monkeypatch.setenv("VMETTE_OCI_TOKEN_HOST", "GHCR.io")
    assert credentials_for("ghcr.io") == basic("vmette")
    for other in ("docker.io", "ghcr.io:443", "x.ghcr.io", "ghcr_io"):
        assert credentials_for(other) is None


def test_the_order(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each source is asked when those before it have gone."""
    helper(home, "one", answer("helper"))
    helper(home, "all", answer("store"))
    config = {"credHelpers": {"h.io": "one"}, "auths": {"h.io": entry("auths")}, "credsStore": "all"}
    configure(home, config)
    monkeypatch.setenv("VMETTE_OCI_TOKEN_HOST", "h.io")
    monkeypatch.setenv("VMETTE_OCI_TOKEN", SECRET)
    monkeypatch.setenv("VMETTE_OCI_AUTH_H_IO", f"own:{SECRET}")
    assert credentials_for("h.io") == basic("own")
    monkeypatch.delenv("VMETTE_OCI_AUTH_H_IO")
    assert credentials_for("h.io") == basic("vmette")
    monkeypatch.delenv("VMETTE_OCI_TOKEN")
    for user, key in (("helper", "credHelpers"), ("auths", "auths"), ("store", "credsStore")):
        assert credentials_for("h.io") == basic(user)
        del config[key]
        configure(home, config)
    assert credentials_for("h.io") is None


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (entry(), basic()),
        (entry("me", "a:b"), basic("me", "a:b")),
        ({"username": "me", "password": SECRET}, basic()),
        ({"auth": entry("me", "")["auth"], "identitytoken": SECRET}, Credentials("identity", SECRET)),
        ({"registrytoken": SECRET}, Credentials("bearer", SECRET)),
        ({"auth": base64.b64encode(f"me:{SECRET}\0\0".encode()).decode()}, basic()),
        *((broken, None) for broken in ({}, None, 5, "x", {"auth": 5}, {"auth": ""}, {"username": "me"})),
        *(({"auth": broken}, None) for broken in ("!", "aGk=", "aGk", "//8=", "ä")),
    ],
)
def test_what_docker_stores(home: Path, stored: Any, expected: Credentials | None) -> None:
    configure(home, {"auths": {"ghcr.io": stored}})
    assert credentials_for("ghcr.io") == expected


@pytest.mark.parametrize(
    ("key", "host"),
    [
        ("https://index.docker.io/v1/", "docker.io"),
        ("https://index.docker.io/v1/", "registry-1.docker.io"),
        ("index.docker.io", "docker.io"),
        ("registry-1.docker.io", "docker.io"),
        ("docker.io", "index.docker.io"),
        ("https://ghcr.io", "ghcr.io"),
        ("http://ghcr.io:80/v2/", "ghcr.io:80"),
        ("GHCR.io", "ghcr.io"),
    ],
)
def test_names_that_docker_has_for_a_host(home: Path, key: str, host: str) -> None:
    configure(home, {"auths": {key: entry()}})
    assert credentials_for(host) == basic()
    for other in ("evil.example", "xghcr.io", "ghcr.io.x", "io"):
        assert credentials_for(other) is None


@pytest.mark.parametrize("config", ["", "{", "[]", "5", "null", '{"auths": 5}', "[" * 100_000, '{"credHelpers": []}'])
def test_a_broken_configuration_is_none(home: Path, config: str) -> None:
    configure(home, config)
    assert credentials_for("ghcr.io") is None


def test_a_broken_configuration_does_not_tell_its_secrets(home: Path, log: pytest.LogCaptureFixture) -> None:
    configure(home, f'{{"auths": {{"ghcr.io": {{"password": "{SECRET}}}')
    assert credentials_for("ghcr.io") is None
    assert "is not JSON" in log.text
    assert SECRET not in log.text


def test_the_configuration_may_lie_elsewhere(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / "config.json").write_text(json.dumps({"auths": {"ghcr.io": entry()}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(home))
    assert credentials_for("ghcr.io") == basic()
    monkeypatch.setenv("DOCKER_CONFIG", str(home / "bin"))
    assert credentials_for("ghcr.io") is None


@pytest.mark.parametrize(("host", "asked"), [("h.io:5", "h.io:5"), ("docker.io", "https://index.docker.io/v1/")])
@pytest.mark.parametrize("section", ["credHelpers", "credsStore"])
def test_a_helper_is_asked_for_the_host(home: Path, host: str, asked: str, section: str) -> None:
    question = helper(home, "x.Y-1_", answer())
    configure(home, {section: {asked: "x.Y-1_"} if section == "credHelpers" else "x.Y-1_"})
    assert credentials_for(host) == basic()
    assert question.read_text() == f"get\n{asked}"


def test_a_helper_has_an_identity_token(home: Path) -> None:
    helper(home, "x", answer("<token>"))
    configure(home, {"credsStore": "x"})
    assert credentials_for("h.io") == Credentials("identity", SECRET)


@pytest.mark.parametrize("name", ["../x", "/bin/sh", "a b", "x\n", "$(id)", 5, ["x"], {}, True])
def test_a_helper_has_a_harmless_name(home: Path, log: pytest.LogCaptureFixture, name: object) -> None:
    asked = helper(home, "x", answer())
    configure(home, {"credsStore": name})
    assert credentials_for("h.io") is None
    assert "impossible name" in log.text
    assert not asked.exists()


@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        (f"{answer()}; exit 1", "exit status 1"),
        ("kill -9 $$", "exit status -9"),
        ("echo no", "no Username and Secret"),
        ("echo '[]'", "no Username and Secret"),
        ('echo \'{"Username": "x"}\'', "no Username and Secret"),
        (f'echo \'{{"Username": 5, "Secret": "{SECRET}"}}\'', "no Username and Secret"),
        (answer("me", ""), "empty"),
        ("yes hunter2-Geheim", "too long"),
        ("exec 2>&1; echo hunter2-Geheim; exec sleep 60", "no answer in 0.5 seconds"),
        ("echo hunter2-Geheim; exec >&-; exec sleep 60", "no end in 0.5 seconds"),
        ("sleep 2 & exit 1", "no answer in 0.5 seconds"),
    ],
)
def test_a_helper_that_fails_is_logged_and_not_quoted(
    home: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture, script: str, complaint: str
) -> None:
    monkeypatch.setattr(auth, "HELPER_TIMEOUT", 0.5)
    helper(home, "x", script)
    configure(home, {"credsStore": "x"})
    start = time.monotonic()
    assert credentials_for("h.io") is None
    assert time.monotonic() - start < 10
    assert complaint in log.text
    assert SECRET not in log.text


def test_a_helper_that_is_missing_does_not_hide_what_comes_after(home: Path, log: pytest.LogCaptureFixture) -> None:
    configure(home, {"credHelpers": {"h.io": "missing"}, "auths": {"h.io": entry()}})
    assert credentials_for("h.io") == basic()
    assert "docker-credential-missing for h.io: No such file or directory" in log.text


def test_a_helper_that_does_not_read_the_question(home: Path) -> None:
    helper(home, "x", "")
    (home / "bin/docker-credential-x").write_text(f"#!/bin/sh\nexec <&-\n{answer()}\n")
    configure(home, {"credsStore": "x"})
    assert credentials_for("h.io") == basic()


def test_a_helper_without_credentials_is_nothing_to_warn_of(home: Path, log: pytest.LogCaptureFixture) -> None:
    helper(home, "x", "echo credentials not found in native keychain; exit 1")
    configure(home, {"credsStore": "x"})
    assert credentials_for("h.io") is None
    assert [record.levelname for record in log.records] == ["DEBUG"]


@pytest.mark.parametrize("kind", ["basic", "bearer", "identity"])
def test_secrets_are_not_shown(kind: Any) -> None:
    credentials = Credentials(kind, SECRET, "me")
    assert SECRET not in repr(credentials) + str(credentials) + f"{credentials}"
    assert "me" in repr(credentials)


def test_no_secret_is_logged(home: Path, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture) -> None:
    helper(home, "x", answer())
    for config in ({"credsStore": "x"}, {"credHelpers": {"h.io": "x"}}, {"auths": {"h.io": entry()}}):
        configure(home, config)
        assert credentials_for("h.io") is not None
    monkeypatch.setenv("VMETTE_OCI_AUTH_H_IO", SECRET)
    assert credentials_for("h.io") is not None
    assert len(log.records) == 4
    assert SECRET not in log.text
    assert entry()["auth"] not in log.text

"""Providers of other packages, found by their entry points: a distribution that is really built and installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PYPROJECT = """
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "vmette-plugins"
version = "1.0"

[project.entry-points."vmette.providers"]
broken = "vmette_plugins_broken:Provider"
echo = "vmette_plugins:EchoProvider"
failing = "vmette_plugins:FailingProvider"
lacking = "vmette_plugins:no_provider"
missing = "vmette_plugins:there_is_no_such_thing"
moody = "vmette_plugins:MoodyProvider"
zulu = "vmette_plugins:make_zulu"

[tool.setuptools]
py-modules = ["vmette_plugins", "vmette_plugins_broken"]
"""

# EchoProvider is the example of the seed.
PLUGINS = """
from vmette.providers import Artifact, Context, Directory


class EchoProvider:
    name = "echo"

    def matches(self, spec: str) -> bool:
        return spec.startswith("echo://")

    def provide(self, spec: str, context: Context) -> Artifact:
        destination = context.provider_cache("echo") / spec.removeprefix("echo://")
        destination.mkdir(parents=True, exist_ok=True)
        return Directory(destination, read_only=False)


class FailingProvider(EchoProvider):
    def __init__(self):
        raise RuntimeError("not today")


class MoodyProvider(EchoProvider):
    @property
    def name(self):
        raise RuntimeError("no name")


def no_provider():
    return object()


def make_zulu():
    zulu = EchoProvider()
    zulu.name = "zulu"
    return zulu
"""

BROKEN = 'raise ImportError("its dependency is missing")\n'


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for PYTHONPATH with the plugins installed."""
    base = tmp_path_factory.mktemp("plugins")
    source, target = base / "source", base / "site"
    source.mkdir()
    (source / "pyproject.toml").write_text(PYPROJECT)
    (source / "vmette_plugins.py").write_text(PLUGINS)
    (source / "vmette_plugins_broken.py").write_text(BROKEN)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    offline = ["--no-build-isolation", "--no-deps", "--no-index", "--target", str(target)]
    # Without this, root is told each time that he is root.
    environment = {**os.environ, "PIP_ROOT_USER_ACTION": "ignore"}
    subprocess.run([*pip, *offline, str(source)], check=True, env=environment)
    return target


SCRIPT = """
import json, logging, sys
from pathlib import Path
logging.basicConfig(format="%(levelname)s %(name)s %(message)s")
from vmette.providers import Context, InvalidSpec, default_registry

registry = default_registry()
context = Context(Path(sys.argv[1]))
answers = []
for spec in sys.argv[2:]:
    try:
        artifact = registry.resolve(spec, context) if spec != "names" else registry.names
        answers.append(artifact if isinstance(artifact, list) else [str(artifact.path), artifact.read_only])
    except InvalidSpec as error:
        answers.append(str(error))
    answers.append("vmette_plugins" in sys.modules)
print(json.dumps(answers))
"""


def ask(site: Path, cache: Path, *specs: str) -> tuple[list[object], list[str]]:
    """For each spec what it resolves to and whether plugins have been loaded by then; and what was logged."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, cache, *specs],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=True,
    )
    answers = json.loads(done.stdout)
    assert isinstance(answers, list)
    return answers, done.stderr.splitlines()


def test_a_plugin_resolves_its_specs(site: Path, tmp_path: Path) -> None:
    (artifact, loaded), _ = ask(site, tmp_path, "echo://x/y")
    assert artifact == [str(tmp_path / "echo/x/y"), False]
    assert (tmp_path / "echo/x/y").is_dir()
    assert loaded is True


def test_a_command_runs_in_what_a_plugin_provides(site: Path, tmp_path: Path) -> None:
    tree = tmp_path / "echo/tree"
    (tree / "bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin/busybox")
    done = subprocess.run(
        [sys.executable, "-m", "vmette", "run", "--quiet", "echo://tree", "--", "busybox", "echo", "from a plugin"],
        env={**os.environ, "PYTHONPATH": str(site), "VMETTE_CACHE_DIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "from a plugin\n"), done.stderr


def test_plugins_come_after_the_built_in_providers_in_the_order_of_their_names(site: Path, tmp_path: Path) -> None:
    (names, _), _ = ask(site, tmp_path, "names")
    assert names == ["builtin", "squashfs", "tar", "dir", "echo", "zulu", "oci"]


def test_plugins_that_do_not_work_are_logged_and_left_out(site: Path, tmp_path: Path) -> None:
    _, log = ask(site, tmp_path, "names", "names", "echo://x")
    start = "WARNING vmette.providers.registry provider"
    assert log == [
        f"{start} broken (vmette_plugins_broken:Provider) does not load: its dependency is missing",
        f"{start} failing (vmette_plugins:FailingProvider) does not load: not today",
        f"{start} lacking (vmette_plugins:no_provider) is no provider: it lacks name, matches or provide",
        f"{start} missing (vmette_plugins:there_is_no_such_thing) does not load: "
        "module 'vmette_plugins' has no attribute 'there_is_no_such_thing'",
        f"{start} moody (vmette_plugins:MoodyProvider) does not load: no name",
    ]


def test_no_plugin_is_loaded_for_what_a_built_in_provider_claims(site: Path, tmp_path: Path) -> None:
    answers, log = ask(site, tmp_path, str(tmp_path), "builtin://other", "./missing")
    assert answers[1::2] == [False, False, False]
    assert answers[0] == [str(tmp_path), False]
    assert log == []


def test_a_spec_that_nobody_claims_has_been_shown_to_the_plugins(site: Path, tmp_path: Path) -> None:
    (error, loaded), _ = ask(site, tmp_path, "other://x")
    assert (
        error
        == 'invalid spec: no provider claims "other://x"; registered: [builtin, squashfs, tar, dir, echo, zulu, oci]'
    )
    assert loaded is True


def test_without_plugins_there_are_the_built_in_providers(tmp_path: Path) -> None:
    (names, loaded), log = ask(tmp_path, tmp_path, "names")
    assert names == ["builtin", "squashfs", "tar", "dir", "oci"]
    assert loaded is False
    assert log == []

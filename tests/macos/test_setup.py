"""setup.py as a Mac would run it, with stand-ins for Apple's programs."""

from __future__ import annotations

import itertools
import os
import plistlib
import runpy
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import setuptools

from tools import macos_sdk

ROOT = Path(__file__).parents[2]
PROGRAM = "vmette/_payload/macos/vmette-vz"


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The command lines that were run. What they would write, is written."""
    lines: list[list[str]] = []

    def run(command: list[str], *, check: bool) -> None:
        assert check
        lines.append(command)
        if "-o" in command:
            Path(command[command.index("-o") + 1]).write_text("program\n")

    monkeypatch.setattr(subprocess, "run", run)
    return lines


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Without what this machine has set."""
    for name in ("ARCHFLAGS", "MACOSX_DEPLOYMENT_TARGET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return os.environ  # type: ignore[return-value]  # it is a plain dictionary now


def arguments(monkeypatch: pytest.MonkeyPatch, system: str, built_for: str | None = "11.0") -> dict[str, Any]:
    """What setup.py gives to setuptools on `system`."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", lambda **keywords: given.update(keywords))
    variables = {"MACOSX_DEPLOYMENT_TARGET": built_for}
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", system)
        patch.setattr(sysconfig, "get_config_var", variables.get)
        runpy.run_path(str(ROOT / "setup.py"))
    return given


def test_linux_has_one_module(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    given = arguments(monkeypatch, "linux")
    assert given["cffi_modules"] == ["csrc/native_build.py:ffi"]
    assert given["cmdclass"] == {}
    assert not environment.keys() & {"ARCHFLAGS", "MACOSX_DEPLOYMENT_TARGET"}


@pytest.mark.parametrize("inplace", [False, True])
def test_a_mac_builds_and_signs_the_program(
    inplace: bool,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    commands: list[list[str]],
    tmp_path: Path,
) -> None:
    given = arguments(monkeypatch, "darwin")
    assert given["cffi_modules"] == ["csrc/native_build.py:ffi", "csrc/vz_build.py:ffi"]
    assert (environment["ARCHFLAGS"], environment["MACOSX_DEPLOYMENT_TARGET"]) == ("-arch arm64", "13.0")
    monkeypatch.chdir(tmp_path)
    command = given["cmdclass"]["build_ext"](setuptools.Distribution())
    command.inplace = inplace
    command.build_lib = "lib"
    command.ensure_finalized()
    command.run()
    where = PROGRAM if inplace else f"lib/{PROGRAM}"
    assert Path(where).read_text() == "program\n"
    compiler, signer = commands
    assert compiler[:4] == ["clang", "-arch", "arm64", "-mmacosx-version-min=13.0"]
    assert {"-fobjc-arc", "csrc/vmm_main.c", "csrc/vz_shim.m"} < set(compiler)
    frameworks = [word for before, word in itertools.pairwise(compiler) if before == "-framework"]
    assert frameworks == [*macos_sdk.FRAMEWORKS]
    assert signer[:4] == ["/usr/bin/codesign", "--sign", "-", "--force"]
    assert signer[-3:] == ["--entitlements", "vmette/vmm/vmette-vz.entitlements", where]
    assert plistlib.loads((ROOT / signer[-2]).read_bytes()) == {"com.apple.security.virtualization": True}


@pytest.mark.parametrize(
    ("built_for", "expected"), [(None, "13.0"), ("10.13", "13.0"), ("13.0", None), ("14.0", None), ("26", None)]
)
def test_no_earlier_macos_than_that_of_python(
    built_for: str | None, expected: str | None, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    arguments(monkeypatch, "darwin", built_for)
    assert environment.get("MACOSX_DEPLOYMENT_TARGET") == expected


def test_what_is_set_stays(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    environment |= {"ARCHFLAGS": "-arch arm64e", "MACOSX_DEPLOYMENT_TARGET": "15.0"}
    arguments(monkeypatch, "darwin")
    assert (environment["ARCHFLAGS"], environment["MACOSX_DEPLOYMENT_TARGET"]) == ("-arch arm64e", "15.0")

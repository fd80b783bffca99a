"""The plugin of pytest, in a pytest of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

INSTALLED = [point.value for point in entry_points(group="pytest11") if point.name == "vmette"]


def run_pytest(directory: Path, tests: str, ini: str = "") -> subprocess.CompletedProcess[str]:
    """Of a project that has one file with `tests`."""
    (directory / "pytest.ini").write_text(f"[pytest]\naddopts = --strict-markers -p no:cacheprovider\n{ini}")
    (directory / "test_it.py").write_text(f"import pytest, vmette\n{tests}")
    named = [] if INSTALLED else ["-p", "vmette.pytest_plugin"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *named, "-v", "."],
        cwd=directory,
        env={**os.environ, "PYTEST_ADDOPTS": "", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_a_fresh_sandbox_for_each_test(tmp_path: Path) -> None:
    tests = """
seen = []

@pytest.mark.parametrize("number", [1, 2])
def test_fresh(vmette_sandbox, number):
    assert vmette_sandbox.run(["mkdir", "/tmp/left"]).returncode == 0
    seen.append(vmette_sandbox)

def test_all_are_closed():
    assert len(seen) == 2 and all(sandbox.closed for sandbox in seen)

def test_that_fails(vmette_sandbox):
    assert vmette_sandbox.run(["false"]).returncode == 0
"""
    done = run_pytest(tmp_path, tests)
    assert "3 passed" in done.stdout and "1 failed" in done.stdout, done.stdout + done.stderr


def test_options_come_from_markers(tmp_path: Path) -> None:
    tests = """
pytestmark = pytest.mark.vmette(mem_mib=128, vcpus=2)

def memory(sandbox):
    return int(sandbox.run(["awk", "/MemTotal/ {print $2}", "/proc/meminfo"], text=True).stdout) >> 10

def test_of_the_module(vmette_sandbox):
    assert memory(vmette_sandbox) < 128
    assert vmette_sandbox.run(["nproc"], text=True).stdout == "2\\n"

@pytest.mark.vmette(mem_mib=384)
def test_of_its_own(vmette_sandbox):
    assert 256 < memory(vmette_sandbox) < 384
    assert vmette_sandbox.run(["nproc"], text=True).stdout == "2\\n"

@pytest.mark.vmette(rootfs="/nothing/there")
def test_another_root(vmette_sandbox):
    pass

@pytest.mark.vmette("alpine:3.20")
def test_without_a_name(vmette_sandbox):
    pass
"""
    done = run_pytest(tmp_path, tests)
    assert "2 passed, 2 errors" in done.stdout, done.stdout + done.stderr
    assert "/nothing/there" in done.stdout
    assert "the marker vmette takes options by their names, not 'alpine:3.20'" in done.stdout


def test_the_root_comes_from_the_settings(tmp_path: Path) -> None:
    done = run_pytest(tmp_path, "def test(vmette_sandbox): pass", "vmette_rootfs = /no/such/root")
    assert "1 error" in done.stdout, done.stdout + done.stderr
    assert "/no/such/root" in done.stdout


def test_loading_it_costs_other_projects_nothing() -> None:
    code = "import sys, json, vmette.pytest_plugin; print(json.dumps([*sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd="/", stdout=subprocess.PIPE, check=True)
    loaded = {name for name in json.loads(done.stdout) if name.partition(".")[0] == "vmette"}
    assert loaded == {"vmette", "vmette._version", "vmette.pytest_plugin"}

"""GitHub's workflows, which nothing here runs: that they are well-formed, ask for little, and name what exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / ".github" / "workflows"
WORKFLOWS = sorted(DIRECTORY.glob("*.yml"))
TEXT = "".join(path.read_text() for path in WORKFLOWS)


def test_they_keep_to_the_schema() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    done = subprocess.run([*command, *map(str, WORKFLOWS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(WORKFLOWS) == 3


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_they_may_read_and_no_more(path: Path) -> None:
    text = path.read_text()
    assert "\npermissions:\n  contents: read\n\n" in text
    assert re.findall(r"\b[\w-]+: write\b", text) == (["id-token: write"] if path.name == "release.yml" else [])


def test_actions_are_of_a_major_version() -> None:
    used = set(re.findall(r"uses: (\S+)", TEXT))
    assert used
    for name in used - {"./.github/workflows/wheels.yml", "pypa/gh-action-pypi-publish@release/v1"}:
        assert re.fullmatch(r"actions/[a-z-]+@v\d+", name), name


def test_what_they_run_is_there() -> None:
    scripts = set(re.findall(r"(?:\.github/workflows/\w[\w-]*\.sh|\.ci/run)\b", TEXT))
    assert scripts == {".ci/run", *(path.relative_to(ROOT).as_posix() for path in DIRECTORY.glob("*.sh"))}
    for name in scripts:
        assert os.access(ROOT / name, os.X_OK), name
        subprocess.run(["bash", "-n", ROOT / name], check=True)
    for name in re.findall(r"tests/\w[\w/]*\.py", TEXT):
        assert (ROOT / name).is_file(), name
    rules = (ROOT / "Makefile").read_text()
    for target in re.search(r"run: make (.+)", TEXT).group(1).split():  # type: ignore[union-attr]
        assert re.search(rf"^([\w-]+ )*{target}( [\w-]+)*:", rules, re.MULTILINE), target

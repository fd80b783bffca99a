"""Every example of the documentation, run as it stands there."""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vmette
import vmette.sandbox
from tests.terminals import Terminal

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

FAR = {
    "alpine:3.20": "builtin://base",  # the tests reach no registry but their own
    "mmdebstrap bookworm tree": "mkdir -p tree/bin && cp /bin/busybox tree/bin/ && ln -sf busybox tree/bin/apt",
    "apt list": "apt sh -c true || true",
}
"""What cannot be had in a test, and what stands for it."""


def blocks(language: str) -> list[Any]:
    found = []
    for page in PAGES:
        for number, match in enumerate(BLOCK.finditer(page.read_text())):
            if match[1] == language:
                found.append(pytest.param(match[2], id=f"{page.name}-{number}"))
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the files that examples speak of."""
    place = tmp_path / "place"
    (place / "results").mkdir(parents=True)
    (place / "names").mkdir()
    (place / "names" / "names").write_text("b\na\n")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("VMETTE_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.chdir(place)
    return place


@pytest.mark.parametrize("text", blocks("python"))
def test_python(text: str, place: Path) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", text], stderr=subprocess.PIPE, timeout=240, check=False)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize("text", blocks("sh"))
def test_shell(text: str, place: Path) -> None:
    for far, near in FAR.items():
        text = text.replace(far, near)
    for line in text.splitlines():
        command, _, comment = line.partition("  #")
        if "vmette " not in command:  # `make run`, and what it needs: these tests are within it
            continue
        if "-it " in command:
            with Terminal(command.split()) as terminal:
                terminal.type("exit 0\r")
                assert terminal.ended() == 0
            continue
        status = int(match[1]) if (match := re.search(r"exit code (\d+)", comment)) else 0
        done = subprocess.run(command, shell=True, capture_output=True, timeout=240, check=False)
        assert done.returncode == status, f"{command}: {done.stderr.decode()}"


@pytest.mark.parametrize("module", [vmette, vmette.sandbox], ids=lambda module: module.__name__)
def test_docstrings(module: object, place: Path) -> None:
    result = doctest.testmod(module, extraglobs={"vmette": vmette})  # type: ignore[arg-type]
    assert result.attempted
    assert not result.failed

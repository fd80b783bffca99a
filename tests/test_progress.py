"""The display of `vmette pull`: in place on a terminal, a line a layer elsewhere."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.images.layout import Layout, member, tar
from vmette.cli import progress as module
from vmette.cli.progress import ProgressDisplay, human
from vmette.providers.base import Progress


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (9949, "9.9 kB"),
        (9951, "10 kB"),
        (999_499, "999 kB"),
        (999_500, "1.0 MB"),
        (216_102_400, "216 MB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_sizes_in_words(size: int, words: str) -> None:
    assert human(size) == words


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(text: str) -> list[str]:
    """What a terminal shows in the end: it knows "up N lines" and "clear from here"."""
    lines: list[str] = [""]
    for part in re.split(r"(\x1b\[\d+F\x1b\[J|\n)", text):
        if part == "\n":
            lines.append("")
        elif match := re.fullmatch(r"\x1b\[(\d+)F\x1b\[J", part):
            del lines[-1 - int(match[1]) :]
            lines.append("")
        else:
            assert "\x1b" not in part
            lines[-1] += part
    return lines


def test_a_terminal_is_redrawn_and_left_clean(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(module, "REDRAW_SECONDS", 0)
    with ProgressDisplay() as display:
        display(Progress("aaaa", "downloading", 0, 1000))
        display(Progress("bbbb", "cached"))
        display(Progress("aaaa", "downloading", 500, 1000))
        display(Progress("cccc", "unpacking"))
        shown = screen(terminal.getvalue())
        display(Progress("aaaa", "ready"))
        display(Progress("cccc", "ready"))
    assert shown == [
        "aaaa         downloading [############............] 500 B of 1.0 kB",
        "cccc         unpacking  ",
        "1 of 3 layers ready",
        "",
    ]
    assert screen(terminal.getvalue()) == [""]


def test_more_layers_than_lines_and_narrow_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("LINES", "10")
    monkeypatch.setenv("COLUMNS", "20")
    with ProgressDisplay() as display:
        for number in range(50):
            display(Progress(f"{number:012}", "downloading", 1, 10**9))
        shown = screen(terminal.getvalue())
        assert len(shown) == 9
        assert max(map(len, shown)) == 19
    assert screen(terminal.getvalue()) == [""]


def test_a_closed_stderr_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with ProgressDisplay() as display:
        display(Progress("aaaa", "downloading", 0, 1000))
        terminal.close()
        display(Progress("aaaa", "ready"))


def test_a_pull_elsewhere_is_a_line_a_layer_and_quiet_is_quiet(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    spec = layout.tag("x", layout.manifest([tar([member(name)]) for name in ("a", "b")]))
    for options, lines in (([], 3), (["--quiet"], 0)):
        environment = {**os.environ, "VMETTE_CACHE_DIR": str(tmp_path / f"cache{lines}")}
        argv = [sys.executable, "-m", "vmette", "pull", *options, spec]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
        assert len(done.stdout.splitlines()) == 1
        said = done.stderr.splitlines()
        assert len(said) == lines
        assert sum(bool(re.fullmatch("[0-9a-f]{12} ready", line)) for line in said) == (2 if lines else 0)
        again = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
        assert again.stdout == done.stdout
        assert "ready" not in again.stderr


def test_a_pull_on_a_terminal(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    spec = layout.tag("x", layout.manifest([tar([member("a", os.urandom(5_000_000))])]))
    controller, terminal = pty.openpty()
    environment = {**os.environ, "VMETTE_CACHE_DIR": str(tmp_path / "cache")}
    argv = [sys.executable, "-m", "vmette", "pull", spec]
    process = subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=terminal)
    os.close(terminal)
    said = b""
    while True:
        try:
            data = os.read(controller, 4096)
        except OSError:  # EIO: the other end is closed
            break
        if not data:
            break
        said += data
    os.close(controller)
    assert process.wait() == 0
    text = said.decode().replace("\r\n", "\n")
    assert "unpacking" in text
    assert re.fullmatch(r"erofs, 5\.0 MB", screen(text)[0])

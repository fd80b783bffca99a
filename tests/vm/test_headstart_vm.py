"""Runs that begin before it is known what they are."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import vmette
from tests.vm.support import BASE, Cli, command, vmms, wait_until
from tests.vm.test_templates import build, builders
from vmette import headstart

pytestmark = pytest.mark.only_qemu

TAKEN = b"vmette: a head start: it runs already\n"


@pytest.fixture(autouse=True)
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the notes are, of this test alone."""
    monkeypatch.setenv("VMETTE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("VMETTE_STATE_DIR", str(tmp_path / "state"))
    yield tmp_path / "state/starts"
    wait_until(lambda: not builders(), "the end of all that makes templates")


@pytest.fixture
def woken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines wake from a template, which there is."""
    monkeypatch.delenv("VMETTE_TEMPLATES", raising=False)
    build()


def test_a_boot(cli: Cli) -> None:
    first = cli("run", "--debug", BASE, "sh", "-c", "echo out; exit 3")
    assert TAKEN not in first.stderr
    second = cli("run", "--debug", BASE, "cat", input=b"x" * 100_000)
    assert (second.returncode, second.stdout) == (0, b"x" * 100_000)
    assert TAKEN in second.stderr


@pytest.mark.usefixtures("woken")
def test_a_machine_that_wakes(cli: Cli) -> None:
    script = "hostname; cat /etc/machine-id /proc/sys/kernel/random/uuid; head -c 16 /dev/urandom | xxd -p; date +%s"
    first = cli("run", "--debug", "--hostname", "other", BASE, "true")
    assert (first.returncode, TAKEN in first.stderr) == (0, False)
    seen = []
    for _ in range(3):
        done = cli("run", "--debug", "--hostname", "other", BASE, "sh", "-c", script)
        assert TAKEN in done.stderr
        name, *identities, now = done.stdout.decode().split()
        assert name == "other"
        assert abs(int(now) - time.time()) < 30
        seen += identities
    assert len(seen) == len(set(seen)) >= 6


@pytest.mark.usefixtures("woken")
def test_shares(tmp_path: Path, cli: Cli) -> None:
    (tmp_path / "shared").mkdir()
    build(shares=[vmette.Share("share", tmp_path)])
    options = ["run", "--debug", "-v", f"{tmp_path}/shared:/work", BASE]
    for number in range(3):
        done = cli(*options, "sh", "-c", f"echo {number} > /work/{number}; ls /work")
        assert done.stdout.decode().split() == [str(name) for name in range(number + 1)]
        assert (TAKEN in done.stderr) == (number > 0)
    assert (tmp_path / "shared/2").read_text() == "2\n"


@pytest.mark.usefixtures("woken")
def test_what_has_changed_meanwhile(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        done = cli("run", "--debug", BASE, "true")
    assert TAKEN in done.stderr
    monkeypatch.setenv("VMETTE_TEMPLATES", "0")
    for taken in (False, True):
        done = cli("run", "--debug", BASE, "echo", "out")
        assert (done.stdout, TAKEN in done.stderr) == (b"out\n", taken), done


def test_a_note_decides_nothing(starts: Path, cli: Cli) -> None:
    assert cli("run", BASE, "true").returncode == 0
    (note,) = starts.iterdir()
    start = headstart.Start.decode(note.read_bytes())
    start.argv[start.argv.index("512M")] = "256M"
    note.write_bytes(start.encode())
    done = cli("run", "--debug", BASE, "sh", "-c", "grep MemTotal /proc/meminfo")
    assert TAKEN not in done.stderr
    assert int(done.stdout.split()[1]) > 300_000


def test_a_run_that_comes_to_nothing_leaves_nothing(starts: Path, cli: Cli) -> None:
    assert cli("run", BASE, "true").returncode == 0
    # What these say is wrong, and the same words as before come first.
    (note,) = starts.iterdir()
    for options in (["--mem-mib", "1"], ["--share", "none"], ["--snapshot", "nothing"]):
        words = ["run", *options, BASE]
        os.link(note, headstart._path(words))
        assert cli(*words, "true").returncode in {2, 125}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_before_it_is_known_what_is_wanted(number: signal.Signals, cli: Cli) -> None:
    assert cli("run", BASE, "true").returncode == 0
    before = vmms()
    with subprocess.Popen(command(["run", BASE, "sleep", "1000"]), stderr=subprocess.PIPE) as process:
        wait_until(lambda: bool(vmms() - before), "a head start")
        process.send_signal(number)
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()
    assert process.returncode in {128 + number, -number}
    wait_until(lambda: vmms() == before, "the end of the VM")


def test_a_disk_is_free_when_it_is_wanted(tmp_path: Path, cli: Cli) -> None:
    """A machine that is not wanted holds its lock no longer."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    options = ["run", "--debug", "--disk", disk, "--rootfs", BASE]
    assert cli(*options, "true").returncode == 0
    done = cli(*options, "--net", "true")
    assert (done.returncode, TAKEN in done.stderr) == (0, False)
    done = cli(*options, "true")
    assert (done.returncode, TAKEN in done.stderr) == (0, True)


def test_a_snapshot(tmp_path: Path, cli: Cli) -> None:
    with vmette.Sandbox(BASE) as sandbox:
        sandbox.run(["touch", "/run/there"])
        sandbox.snapshot(tmp_path / "snapshot")
    for taken in (False, True, True):
        done = cli("run", "--debug", "--snapshot", tmp_path / "snapshot", "ls", "/run/there")
        assert (done.stdout, TAKEN in done.stderr) == (b"/run/there\n", taken)

"""The aarch64 payload, booted under emulation: `make test-aarch64` builds it and runs this (see conftest.py)."""

from __future__ import annotations

from pathlib import Path

import vmette
from tests.vm.support import BASE, Cli


def test_it_boots_and_runs_a_command(cli: Cli) -> None:
    done = cli("run", "--arch", "aarch64", BASE, "--", "sh", "-c", "uname -m; cat; echo err >&2; exit 5", input=b"in\n")
    assert (done.returncode, done.stdout, done.stderr) == (5, b"aarch64\nin\n", b"err\n")


def test_shares(tmp_path: Path) -> None:
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "in/file").write_text("of the host\n")
    shares = [vmette.Share("in", tmp_path / "in", read_only=True), vmette.Share("out", tmp_path / "out")]
    script = "cp /mnt/in/file /mnt/out/copy && ! touch /mnt/in/new"
    assert vmette.run(BASE, ["sh", "-c", script], shares=shares, arch="aarch64").returncode == 0
    assert (tmp_path / "out/copy").read_text() == "of the host\n"
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["file"]


def test_a_panic_ends_the_vm(cli: Cli) -> None:
    done = cli("run", "--arch", "aarch64", "--cmdline", "rdinit=/nothing", BASE, "--", "true")
    assert done.returncode == 125
    assert b"Kernel panic" in done.stderr


def test_twenty_runs() -> None:
    for number in range(20):
        done = vmette.run(BASE, ["echo", str(number)], arch="aarch64", timeout=60, vcpus=1 + number % 2)
        assert done.stdout == b"%d\n" % number

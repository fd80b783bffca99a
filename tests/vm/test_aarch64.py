"""The aarch64 payload, booted under emulation: `make test-aarch64` builds it and runs this (see conftest.py)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import vmette
from tests.vm.support import BASE, Cli
from vmette.machine import prepare
from vmette.templates import Template
from vmette.vmm import qemu


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


def test_it_wakes_and_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VMETTE_TEMPLATES")
    monkeypatch.setenv("VMETTE_CACHE_DIR", str(tmp_path))
    Template(prepare(BASE, {"arch": "aarch64", "scratch": 64}).config).make()
    with vmette.Sandbox(BASE, arch="aarch64", scratch=64, hostname="woken") as sandbox:
        assert sandbox.came_up == "woken from a template"
        sandbox.run(["sh", "-c", "echo 1 >/x"], check=True)
        with sandbox.fork()[0] as copy:
            assert copy.run(["sh", "-c", "uname -m; hostname; cat /x"], text=True).stdout == "aarch64\nwoken-1\n1\n"


Change = Callable[[Callable[[list[str]], list[str]]], None]


@pytest.fixture
def qemu_argv(monkeypatch: pytest.MonkeyPatch) -> Change:
    """Has QEMU's command line changed before it is used."""

    def change(function: Callable[[list[str]], list[str]]) -> None:
        plain = qemu.command_line
        monkeypatch.setattr(qemu, "command_line", lambda *args: function(plain(*args)))

    return change


def on_pci(argv: list[str]) -> list[str]:
    """QEMU's arguments with devices on the PCI bus, whose disks are found in their order."""
    places = [at for at, word in enumerate(argv) if word == "-blockdev"]
    disks = [argv[at : at + 4] for at in places]
    for at, disk in zip(places, reversed(disks), strict=True):
        argv[at : at + 4] = disk
    return [word if word.startswith("-") else word.replace("-device", "-pci") for word in argv]


def test_devices_on_pci_as_virtualization_framework_has_them(tmp_path: Path, qemu_argv: Change) -> None:
    qemu_argv(on_pci)
    disk = tmp_path / "disk"
    disk.write_bytes(b"of the host".ljust(1024, b"\0"))
    script = "cat /proc/interrupts && head -c 11 /dev/vdb && touch /mnt/tag/new && cat /sys/class/net/eth0/address"
    done = vmette.run(
        BASE,
        ["sh", "-c", script],
        arch="aarch64",
        disks=[vmette.Disk(disk)],
        shares=[vmette.Share("tag", tmp_path)],
        net=True,
        scratch=64,
        text=True,
        check=True,
    )
    assert "PCI-MSIX" in done.stdout
    assert "of the host" in done.stdout
    assert (tmp_path / "new").exists()


ROSETTA = """
#include <stdio.h>
#include <string.h>
int main(int argc, char **argv) {
    FILE *program = argc > 1 ? fopen(argv[1], "rb") : NULL;
    unsigned char head[20];
    if (program == NULL || fread(head, sizeof head, 1, program) != 1) return 1;
    printf("machine %d, %d arguments, the last is %s\\n", head[18] | head[19] << 8, argc - 2, argv[argc - 1]);
    return 7;
}
"""


def compiled(arch: str, source: str, output: Path) -> None:
    target = ["-target", f"{arch}-linux-musl", "-static", "-x", "c", "-", "-o", str(output)]
    subprocess.run([sys.executable, "-m", "ziglang", "cc", *target], input=source.encode(), check=True)


def test_programs_for_x86_64_are_given_to_rosetta(tmp_path: Path, qemu_argv: Change) -> None:
    """With a program of ours in the place of Apple's, which is where a Mac's share has it."""
    for name in ("apple", "work"):
        (tmp_path / name).mkdir()
    compiled("aarch64", ROSETTA, tmp_path / "apple/rosetta")
    compiled("x86_64", "int main(void) { return 0; }", tmp_path / "work/program")
    share = ["-fsdev", f"local,id=apple,path={tmp_path}/apple,security_model=none,readonly=on"]
    share += ["-device", "virtio-9p-device,fsdev=apple,mount_tag=vmette-rosetta"]
    qemu_argv(lambda argv: [*argv, *share])
    done = vmette.run(
        BASE,
        ["/mnt/work/program", "a", "b c"],
        arch="aarch64",
        cmdline="vmette.rosetta=9p:vmette-rosetta",
        shares=[vmette.Share("work", tmp_path / "work", read_only=True)],
        text=True,
    )
    assert (done.returncode, done.stdout) == (7, "machine 62, 2 arguments, the last is b c\n")


def test_the_platform_of_an_image_chooses_the_machine(cli: Cli) -> None:
    done = cli("run", "--platform", "linux/arm64", BASE, "--", "uname", "-m")
    assert (done.returncode, done.stdout) == (0, b"aarch64\n")

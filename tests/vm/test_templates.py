"""Machines that wake where others have booted."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import vmette
from tests.vm.support import BASE, Cli, command, vmm_processes, vz, wait_until
from vmette import saved, templates
from vmette.config import MachineConfig
from vmette.machine import prepare
from vmette.providers.base import ImageConfig
from vmette.staging import SUFFIX
from vmette.templates import Template

WOKEN = "woken from a template"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory for templates, of this test alone."""
    monkeypatch.delenv("VMETTE_TEMPLATES", raising=False)
    monkeypatch.setenv("VMETTE_CACHE_DIR", str(tmp_path / "cache"))
    yield tmp_path / "cache/store/templates"
    wait_until(lambda: not builders(), "the end of all that makes templates")


def builders() -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and b"vmette.templates" in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def made(place: Path) -> list[Path]:
    return sorted(place.glob("[!.]*"))


def build(**options: Any) -> Template:
    """The template for a machine with these options."""
    machine = prepare(BASE, options)  # type: ignore[arg-type]
    template = Template(machine.config)
    template.make()
    assert template.problem() is None
    return template


def run(script: str, **options: Any) -> str:
    """What it says in a machine that must have woken."""
    with vmette.Sandbox(BASE, **options) as sandbox:
        assert sandbox.came_up == WOKEN
        return str(sandbox.run(["sh", "-c", script], text=True, check=True).stdout)


def way(done: subprocess.CompletedProcess[bytes]) -> str:
    return done.stderr.decode().splitlines()[-1]


def test_the_first_run_boots_and_the_next_one_wakes(place: Path, cli: Cli) -> None:
    done = cli("run", "--quiet", "--timings", BASE, "sh", "-c", "echo out; exit 3")
    assert (done.returncode, done.stdout, way(done)) == (3, b"out\n", "booted: there is no template yet")
    wait_until(lambda: bool(made(place)), "a template")
    done = cli("run", "--timings", "--hostname", "other", BASE, "sh", "-c", "hostname; echo err >&2; exit 4")
    assert (done.returncode, done.stdout, way(done)) == (4, b"other\n", WOKEN)
    assert done.stderr.startswith(b"err\n")
    assert b"guest: kernel" not in done.stderr
    done = cli("run", "--timings", "--no-template", BASE, "true")
    assert b"guest: kernel" in done.stderr
    assert b"template" not in done.stderr
    assert cli("run", BASE, "cat", input=b"x" * 1_000_000).stdout == b"x" * 1_000_000
    assert len(made(place)) == 1
    assert [path.name for path in place.iterdir() if path.name.startswith(".")] == [".lock"]


def test_the_builder_does_not_hold_the_run_up(place: Path, cli: Cli) -> None:
    """It has neither its streams nor its process group, and is not its child."""
    argv = command(["run", "--quiet", BASE, "true"])
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.communicate(timeout=60) == (b"", b"")  # ends when nobody has them open
    wait_until(lambda: bool(made(place)), "a template")


def test_the_builder_holds_nothing_of_whoever_started_the_run(place: Path, cli: Cli) -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    assert cli("run", BASE, "true", pass_fds=[writer]).returncode == 0
    os.close(writer)
    wait_until(lambda: bool(builders() or made(place)), "a process that makes the template")
    with os.fdopen(reader, "rb") as rest:
        assert rest.read() == b""
    assert builders()  # it goes on, and without the pipe's end
    wait_until(lambda: bool(made(place)), "a template")


def test_an_image_with_much_to_say_of_itself(place: Path) -> None:
    """More than a pipe holds is told to the builder's process, or would be: it needs none of it."""
    machine = prepare(BASE, {})
    assert machine.config.root is not None
    image = ImageConfig(env=tuple((f"NAME{number}", "value" * 10) for number in range(5000)))
    config = replace(machine.config, root=replace(machine.config.root, config=image))
    Template(config).make_later()
    wait_until(lambda: bool(made(place)), "a template")


def test_a_sandbox_has_one_made_while_it_lives(place: Path) -> None:
    with vmette.Sandbox(BASE) as sandbox:
        assert sandbox.came_up == "booted: there is no template yet"
        wait_until(lambda: bool(made(place)), "a template")
        assert sandbox.run(["true"]).returncode == 0
    assert run("echo hi") == "hi\n"


def test_an_image_of_the_cache(place: Path, tmp_path: Path, cli: Cli) -> None:
    """Each use of it is noted, at the image itself."""
    archive = tmp_path / "image.tar"
    root = tmp_path / "root"
    subprocess.run(["unsquashfs", "-q", "-n", "-d", root, vmette.assets.base_image()], check=True, capture_output=True)
    subprocess.run(["tar", "-cf", archive, "-C", root, "."], check=True)
    spec = f"tar+file://{archive}"
    assert way(cli("run", "--quiet", "--timings", spec, "true")) == "booted: there is no template yet"
    wait_until(lambda: bool(made(place)), "a template")
    for _ in range(2):
        time.sleep(0.05)
        assert way(cli("run", "--timings", spec, "true")) == WOKEN
    (root / "new").touch()
    subprocess.run(["tar", "-cf", archive, "-C", root, "."], check=True)
    done = cli("run", "--quiet", "--timings", spec, "ls", "/new")
    assert (done.stdout, way(done)) == (b"/new\n", "booted: there is no template yet")


def test_many_first_runs_make_one(place: Path, cli: Cli) -> None:
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: cli("run", BASE, "echo", "hi").stdout, range(4)))
    assert done == [b"hi\n"] * 4
    wait_until(lambda: bool(made(place)) and not builders(), "the end of all that makes templates")
    assert len(made(place)) == 1


def test_it_is_private_and_has_nothing_of_the_run(place: Path, cli: Cli) -> None:
    environment = {**os.environ, "TOKEN": "a-secret-that-is-in-no-template"}
    done = cli(
        *("run", "--secret", "TOKEN", "-e", "X=a-value-that-is-in-no-template", BASE, "sh", "-c"),
        "cat /run/secrets/TOKEN; echo a-word-that-is-in-no-template >/x",
        env=environment,
    )
    assert done.stdout == b"a-secret-that-is-in-no-template"
    wait_until(lambda: bool(made(place)), "a template")
    (template,) = made(place)
    assert place.stat().st_mode & 0o777 == template.stat().st_mode & 0o777 == 0o700
    for path in template.iterdir():
        assert path.stat().st_mode & 0o077 == 0
        assert b"is-in-no-template" not in path.read_bytes()


# --- What wakes is a machine of its own

IDENTITY = """
head -c 16 /dev/urandom | od -An -tx1 | tr -d '\\n'; echo
cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id
awk '{ print $1 }' /etc/machine-id
cat /sys/class/net/eth0/address
(nc -l -p 4433 >/tmp/hello) & sleep 0.3
(nc 127.0.0.1 4433 -e ssl_client -s 0 2>/dev/null) & sleep 0.7
dd if=/tmp/hello bs=1 skip=11 count=32 2>/dev/null | od -An -v -tx1 | tr -d ' \\n'; echo
hostname
date +%s
"""
"""The last but two is the random of a TLS ClientHello (RFC 5246, 7.4.1.2)."""


@pytest.mark.only_qemu  # whose network card is not of the test's making
def test_no_two_are_the_same(place: Path, tmp_path: Path) -> None:
    root = tmp_path / "root.squashfs"
    tree = tmp_path / "tree"
    subprocess.run(["unsquashfs", "-q", "-d", tree, vmette.assets.base_image()], check=True, capture_output=True)
    (tree / "etc/machine-id").write_text(f"{0:032x}\n")
    subprocess.run(["mksquashfs", tree, root, "-quiet", "-no-progress"], check=True, capture_output=True)
    spec = f"squashfs+file://{root}"
    template = Template(prepare(spec, {"net": True}).config)
    template.make()

    def identity(number: int) -> list[str]:
        with vmette.Sandbox(spec, net=True, hostname=f"clone{number}") as sandbox:
            assert sandbox.came_up == WOKEN
            return str(sandbox.run(["sh", "-c", IDENTITY], text=True).stdout).splitlines()

    before = time.time()
    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(identity, range(6)))
    for what in range(6):
        assert len({lines[what] for lines in said}) == 6, (what, said)
    for lines in said:
        assert re.fullmatch("[0-9a-f]{12}4[0-9a-f]{3}[89ab][0-9a-f]{15}", lines[3])
        assert re.fullmatch("52:54:00(:[0-9a-f]{2}){3}", lines[4])
        assert re.fullmatch("[0-9a-f]{64}", lines[5])
        assert before - 2 <= int(lines[7]) <= time.time() + 2
    assert {lines[6] for lines in said} == {f"clone{number}" for number in range(6)}


def test_what_one_writes_is_its_own(place: Path) -> None:
    build()
    assert run("echo mine >/tmp/x; echo mine >/x; cat /tmp/x /x") == "mine\nmine\n"
    assert run("ls /tmp /x 2>&1 | grep -c x") == "1\n"  # the complaint that there is none


def test_scratch_disks(place: Path) -> None:
    build(scratch=64)
    mounts = run("df -m / | tail -1; dd if=/dev/zero of=/big bs=1M count=40 2>/dev/null; ls -l /big", scratch=64)
    assert "41943040" in mounts
    assert run("ls /big 2>&1; df -m / | tail -1 | awk '{ print $2 }'", scratch=64).startswith("ls: /big: No such")


@pytest.mark.only_qemu  # another VMM's machines with shares boot
def test_shares(place: Path, tmp_path: Path) -> None:
    """They are mounted when the machine wakes, whatever they were called in another one."""
    build(shares=[vmette.Share("a", tmp_path), vmette.Share("b", tmp_path, read_only=True)])
    for number in range(2):
        mine, theirs = tmp_path / f"mine{number}", tmp_path / f"theirs{number}"
        mine.mkdir()
        theirs.mkdir()
        (theirs / "file").write_text(f"text {number}\n")
        shares = [vmette.Share("data", mine), vmette.Share("", theirs, read_only=True, target="/opt/a place")]
        script = (
            "cat '/opt/a place/file'; echo back >/mnt/data/out; "
            "echo no >'/opt/a place/new' || mount -o remount,rw '/opt/a place' && echo no >'/opt/a place/new' || "
            "echo refused"
        )
        assert run(script, shares=shares).endswith(f"text {number}\nrefused\n")
        assert (mine / "out").read_text() == "back\n"
        assert [path.name for path in theirs.iterdir()] == ["file"]


@pytest.mark.only_qemu
def test_a_share_that_cannot_be_mounted_is_told_as_at_a_boot(place: Path, tmp_path: Path, cli: Cli) -> None:
    build(shares=[vmette.Share("a", tmp_path)])
    done = cli("run", "-v", f"{tmp_path}:/etc/passwd/x", BASE, "true")
    assert done.returncode == 125
    assert b"cannot make /etc/passwd/x in the root filesystem" in done.stderr


def test_a_read_only_root(place: Path, tmp_path: Path) -> None:
    build(rootfs_ro=True)
    script = "touch /x 2>&1; hostname; grep -o only /etc/hosts; touch /tmp/x && echo fine"
    assert run(script, rootfs_ro=True, hostname="only") == ("touch: /x: Read-only file system\nonly\nonly\nfine\n")


@pytest.mark.only_qemu  # the stand-in's network is QEMU's, too, but its devices are not the same twice
def test_the_network(place: Path) -> None:
    build(net=True)
    said = run("ip addr show eth0; ip route; cat /etc/resolv.conf; nslookup localhost 2>&1 | tail -1", net=True)
    assert "inet " in said
    assert "default via" in said
    assert "nameserver" in said
    assert "Network is unreachable" not in said


def test_limits_are_the_machine_s(place: Path) -> None:
    build(pids=50, nofile=64)
    assert run("ulimit -n; cat /sys/fs/cgroup/vmette/pids.max", pids=50, nofile=64) == "64\n50\n"


def test_services(place: Path) -> None:
    build()
    script = "cat /run/secrets/A; echo; echo $HTTP_PROXY; id -u nobody"
    said = run(script, secrets={"A": "b"}, allow_hosts=["example.com"], publish=["0:80"])
    assert said.splitlines()[:2] == ["b", "http://127.0.0.1:3128"]


# --- What boots


def test_what_boots_and_why(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    with vmette.Sandbox(BASE, disks=[vmette.Disk(image)]) as sandbox:
        assert sandbox.came_up == "booted: it has disks of its own"
    with vmette.Sandbox(BASE, template=False) as sandbox:
        assert sandbox.came_up == ""
    monkeypatch.setenv("VMETTE_TEMPLATES", "0")
    with vmette.Sandbox(BASE) as sandbox:
        assert sandbox.came_up == "booted: VMETTE_TEMPLATES is 0"
    assert not made(place)
    assert not builders()


@pytest.mark.only_qemu
def test_shares_with_names_that_do_not_fit_boot(place: Path, tmp_path: Path) -> None:
    long = ["/" + f"{number}" * 1200 for number in range(3)]
    shares = [
        vmette.Share("", tmp_path, target="/".join(path[at : at + 200] for at in range(0, 1200, 200))) for path in long
    ]
    with pytest.raises(vmette.ConfigError, match="the kernel command line"):
        vmette.Sandbox(BASE, shares=shares)
    build(shares=shares[:1])
    assert run("echo fine", shares=shares[:1]) == "fine\n"


def test_a_directory_boots(place: Path, tmp_path: Path) -> None:
    machine = prepare(tmp_path, {})
    assert templates.unfit(machine.config) == "its root filesystem is a directory"


# --- What is of no use


def part(template: Template) -> Path:
    """The file with the memory."""
    return template.saved.path("state" if vz() else "ram")


@pytest.mark.parametrize("change", ["truncated", "overwritten", "gone", "foreign", "meta", "empty"])
def test_one_that_is_damaged_is_dropped(change: str, place: Path, tmp_path: Path) -> None:
    template = build()
    meta = template.path / "meta.json"
    if change == "truncated":
        os.truncate(part(template), 1 << 20)
    elif change == "overwritten":
        with part(template).open("r+b") as file:
            file.seek(1 << 17)
            file.write(b"overwritten" * 100)
    elif change == "gone":
        template.saved.path("state").unlink()
    elif change == "foreign":
        meta.write_text(meta.read_text().replace('"vcpus\\": 1', '"vcpus\\": 2'))
    elif change == "meta":
        meta.write_text("[]")
    else:
        shutil.rmtree(template.path)
        template.path.mkdir()
    with vmette.Sandbox(BASE) as sandbox:
        assert sandbox.came_up == "booted: the template was of no more use"
        assert sandbox.run(["echo", "fine"]).stdout == b"fine\n"
        wait_until(lambda: (template.path / "meta.json").exists() and not builders(), "another template")
    assert run("echo fine") == "fine\n"


@pytest.mark.parametrize("file", ["state", "ram"])
def test_one_that_does_not_wake_is_dropped_and_the_machine_boots(
    file: str, place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The check passes, and the VMM or the guest has the last word."""
    template = build()
    if vz() and file == "ram":
        file = "state"
    path = template.saved.path(file)
    with path.open("r+b") as opened:
        opened.truncate(0)
        opened.truncate(path.stat().st_size or (512 << 20 if file == "ram" else 100_000))
    monkeypatch.setattr("vmette.saved.check", lambda *_: None)
    monkeypatch.setattr("vmette.machine.WAKE_SECONDS", 2.0)
    with vmette.Sandbox(BASE) as sandbox:
        assert sandbox.came_up == "booted: the template was of no use"
        assert sandbox.run(["echo", "fine"]).stdout == b"fine\n"
    assert "a machine did not wake, and boots" in caplog.text
    assert not made(place)
    assert [*place.glob(".*.failed")]  # nor is the next one made at once, to fail again
    assert not builders()


def test_one_that_others_can_change_is_not_woken(place: Path) -> None:
    template = build()
    template.path.chmod(0o720)
    with vmette.Sandbox(BASE) as sandbox:
        assert sandbox.came_up == "booted: the template cannot be read: others can change it"
    template.path.chmod(0o700)
    assert run("echo fine") == "fine\n"


def test_one_that_is_too_large_is_not_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmette.templates.MAX_SIZE", 1 << 20)
    with pytest.raises(vmette.VmetteError, match="MiB after its start: that is too much to keep"):
        Template(prepare(BASE, {}).config).make()
    assert not made(place)
    assert not [*place.glob(f".*{SUFFIX}")]


def test_what_the_machine_is_made_of_is_looked_at_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build()
    facts, asked = saved.facts, []

    def counted(config: MachineConfig) -> dict[str, str]:
        asked.append(config)
        return facts(config)

    monkeypatch.setattr(saved, "facts", counted)
    assert vmette.run(BASE, ["echo", "fine"]).stdout == b"fine\n"
    assert len(asked) == 1


def test_another_guest_is_another_template(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = build()
    shutil.copytree(vmette.assets.PAYLOAD, tmp_path / "payload", dirs_exist_ok=True)
    monkeypatch.setenv("VMETTE_ASSETS_DIR", str(tmp_path / "payload"))
    other = Template(prepare(BASE, {}).config)
    assert other.path != template.path
    assert other.problem() == "there is no template yet"
    for options in ({"mem_mib": 256}, {"vcpus": 2}, {"rootfs_ro": True}, {"scratch": 64}, {"cmdline": "a=b"}):
        assert Template(prepare(BASE, options).config).path != other.path  # type: ignore[arg-type]
    assert Template(prepare(BASE, {"hostname": "x"}).config).path == other.path


def test_those_that_were_used_last_are_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MAX_TEMPLATES", 2)
    first, second = build(), build(mem_mib=256)
    os.utime(second.path, (1, 1))
    os.utime(first.path, (2, 2))
    third = build(mem_mib=128)
    assert made(place) == sorted([first.path, third.path])
    with vmette.Sandbox(BASE) as sandbox:
        assert sandbox.came_up == WOKEN
        shutil.rmtree(first.path)  # while a machine lives that woke from it
        assert sandbox.run(["md5sum", "/bin/busybox"]).returncode == 0


def test_they_are_of_the_cache(place: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build()
    assert any(line.split()[:2] == [b"templates", b"1"] for line in cli("cache", "df").stdout.splitlines())
    assert any(line.split()[:3] == [b"templates", b"ok", b"1,"] for line in cli("doctor").stdout.splitlines())
    os.utime(first.path, (1, 1))
    monkeypatch.setenv(
        "VMETTE_CACHE_MAX_BYTES", str(first_size := sum(each.stat().st_blocks * 512 for each in first.path.iterdir()))
    )
    second = build(mem_mib=256)
    assert first_size > 10 << 20
    assert made(place) == [second.path]
    os.utime(second.path, (1, 1))
    assert cli("cache", "prune", "--all").stdout.startswith(b"removed 1 entries")
    assert made(place) == []


# --- What becomes of a builder


def start_builder(place: Path, **options: Any) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-c", "from vmette.templates import main; main()"]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE)
    assert process.stdin is not None
    with process.stdin:
        process.stdin.write(pickle.dumps(Template(prepare(BASE, options).config).config))  # type: ignore[arg-type]
    return process


def test_one_that_is_killed_leaves_nothing_in_the_way(place: Path) -> None:
    with start_builder(place) as process:
        wait_until(lambda: bool(vmm_processes()), "its machine")
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: not vmm_processes(), "the end of its machine")
    assert len(list(place.glob(f".*{SUFFIX}"))) == 1
    fresh, old = place / ".fresh", place / ".old"  # of write_atomically
    fresh.touch()
    old.touch()
    os.utime(old, (1, 1))
    os.utime(place / ".lock", (1, 1))
    template = build()
    assert {path.name for path in place.iterdir()} == {template.path.name, ".lock", ".fresh"}


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    monkeypatch.setenv("VMETTE_CACHE_DIR", str(disk))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], check=True)
    try:
        template = Template(prepare(BASE, {}).config)
        with pytest.raises(vmette.VmetteError, match="too little room"):
            template.make()
        monkeypatch.setattr(templates, "MIN_FREE", 0)
        with pytest.raises((vmette.VmetteError, OSError)):
            template.make()
        names = {path.name for path in (disk / "store/templates").iterdir()}
        assert names <= {".lock", f".{template.path.name}.failed"}
    finally:
        subprocess.run(["umount", disk], check=True)


def image_with(true: str | None, tmp_path: Path) -> str:
    """The spec of an image whose `true` is this script, or that has none."""
    root, image = tmp_path / "root", tmp_path / "image.squashfs"
    subprocess.run(["unsquashfs", "-q", "-n", "-d", root, vmette.assets.base_image()], check=True, capture_output=True)
    for path in root.glob("**/bin/true"):
        path.unlink()
        if true is not None:
            path.write_text(true)
            path.chmod(0o755)
    subprocess.run(["mksquashfs", root, image, "-quiet", "-no-progress"], check=True, capture_output=True)
    return f"squashfs+file://{image}"


def test_an_image_without_a_true(place: Path, tmp_path: Path) -> None:
    template = Template(prepare(image_with(None, tmp_path), {}).config)
    template.make()
    assert template.problem() is None


def test_an_image_whose_true_does_not_end(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "WARM_UP_SECONDS", 1.0)
    template = Template(prepare(image_with("#!/bin/sh\nwhile :; do sleep 1; done\n", tmp_path), {}).config)
    with pytest.raises(vmette.VmetteError, match="the image's `true` does not end"):
        template.make()
    assert made(place) == []


LEAVING = """#!/bin/sh
setsid sh -c 'touch /in-a-session; exec sleep 1001' &
setsid sh -c 'echo 0 >/sys/fs/cgroup/cgroup.procs && touch /in-no-cgroup; exec sleep 1002' &
mount -t tmpfs left /mnt && touch /mounted
until [ -e /in-a-session -a -e /in-no-cgroup ]; do sleep 0.01; done
"""
"""A `true` that leaves processes in sessions of their own, one of them in no command's cgroup, and a mount."""


def test_nothing_of_the_image_s_true_runs_on(place: Path, tmp_path: Path) -> None:
    spec = image_with(LEAVING, tmp_path)
    Template(prepare(spec, {}).config).make()
    with vmette.Sandbox(spec) as sandbox:
        assert sandbox.came_up == WOKEN
        sandbox.run(["ls", "/in-a-session", "/in-no-cgroup", "/mounted"], check=True)
        said = sandbox.run(["sh", "-c", "ps -o args; cat /proc/mounts"], text=True, check=True).stdout
    assert "ps -o args" in said
    assert "sleep" not in said
    assert "left" not in said


def test_after_a_failure_it_is_not_tried_at_each_run(place: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setattr(templates, "MIN_FREE", 1 << 62)
    template = Template(prepare(BASE, {}).config)
    with pytest.raises(vmette.VmetteError):
        template.make()
    template.make_later()
    assert not builders()
    assert b"one was not made: there is too little room" in cli("doctor").stdout
    os.utime(place / f".{template.path.name}.failed", (1, 1))
    template.make_later()
    wait_until(lambda: bool(made(place)), "a template")
    assert {path.name for path in place.iterdir()} == {template.path.name, ".lock"}

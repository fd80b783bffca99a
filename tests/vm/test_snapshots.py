"""Machines that are saved, and others that wake from them."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import shutil
import signal
import stat
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import vmette
from tests.vm.support import BASE, Cli, command, vmm_processes, vz, wait_until
from vmette import assets, saved, snapshots
from vmette.providers.base import Cancelled
from vmette.vmm.spawn import Child, spawn

WARM_UP = "echo warm >/tmp/warm; mkdir /www; echo served >/www/index.html; httpd -p 127.0.0.1:8080 -h /www"


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the snapshot `warm`, which tests do not change."""
    directory = tmp_path_factory.mktemp("state")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMETTE_STATE_DIR", str(directory))
        snapshots.create("warm", BASE, ["sh", "-c", WARM_UP])
    return directory


@pytest.fixture
def warm(state: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VMETTE_STATE_DIR", str(state))
    return state / "snapshots/warm"


@pytest.fixture
def own(state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, to be changed."""
    directory = tmp_path / "state"
    subprocess.run(["cp", "-r", "--sparse=always", state, directory], check=True)
    monkeypatch.setenv("VMETTE_STATE_DIR", str(directory))
    return directory / "snapshots/warm"


def output(name: str, script: str, **options: object) -> str:
    done = vmette.run(f"snapshot:{name}", ["sh", "-c", script], text=True, check=True, **options)  # type: ignore[call-overload]
    return str(done.stdout)


def test_from_the_command_line(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMETTE_STATE_DIR", str(tmp_path / "state"))
    done = cli("snapshot", "create", "--run", "echo warm >/tmp/warm", BASE, "one")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"one: ")
    assert b"one" in cli("snapshot", "ls").stdout
    done = cli(
        "run",
        "--snapshot",
        "one",
        "--hostname",
        "other",
        "-e",
        "A=b",
        "--",
        "sh",
        "-c",
        "cat /tmp/warm; hostname; echo $A; exit 3",
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, b"warm\nother\nb\n", b"")
    done = cli("run", "--timings", "snapshot:one", "true")
    assert done.returncode == 0
    assert b"guest: kernel" not in done.stderr  # which it would have if it had booted
    assert cli("snapshot", "create", BASE, "one").returncode == 2
    assert cli("snapshot", "rm", "one").returncode == 0
    done = cli("run", "--snapshot", "one", "true")
    assert (done.returncode, done.stderr) == (2, b"vmette: there is no snapshot 'one'; there are: none\n")
    assert list((tmp_path / "state/snapshots").iterdir()) == []


def test_what_was_running_goes_on(warm: Path) -> None:
    assert output("warm", "cat /tmp/warm; wget -qO- http://127.0.0.1:8080/") == "warm\nserved\n"


def test_it_is_private(warm: Path) -> None:
    assert warm.stat().st_mode & 0o777 == warm.parent.stat().st_mode & 0o777 == 0o700
    for path in warm.iterdir():
        assert path.stat().st_mode & 0o077 == 0


IDENTITY = """
head -c 16 /dev/urandom | od -An -tx1 | tr -d '\\n'; echo
cat /proc/sys/kernel/random/uuid
hostname
date +%s
cat /etc/hosts
"""


def test_no_two_are_the_same(warm: Path) -> None:
    before = time.time()
    with ThreadPoolExecutor(4) as pool:
        said = list(pool.map(lambda number: output("warm", IDENTITY, hostname=f"clone{number}"), range(8)))
    lines = [text.splitlines() for text in said]
    assert len({line[0] for line in lines}) == len({line[1] for line in lines}) == 8
    assert {line[2] for line in lines} == {f"clone{number}" for number in range(8)}
    for line in lines:
        assert before - 2 <= int(line[3]) <= time.time() + 2
        assert line[4] == f"127.0.0.1\tlocalhost {line[2]}"


def test_what_one_writes_is_its_own(warm: Path) -> None:
    assert output("warm", "echo mine >/tmp/warm; echo mine >/www/index.html; cat /tmp/warm") == "mine\n"
    assert output("warm", "cat /tmp/warm /www/index.html") == "warm\nserved\n"


def test_a_sandbox_wakes_and_runs_many(warm: Path) -> None:
    with vmette.Sandbox("snapshot:warm", secrets={"TOKEN": "hidden-in-no-snapshot"}, publish=["0:8080"]) as sandbox:
        assert sandbox.run(["cat", "/run/secrets/TOKEN"], text=True).stdout == "hidden-in-no-snapshot"
        assert sandbox.files.read("/tmp/warm") == b"warm\n"
        processes = [sandbox.popen(["sh", "-c", f"echo {number}"]) for number in range(5)]
        assert [process.communicate()[0] for process in processes] == [b"%d\n" % number for number in range(5)]
    for path in warm.iterdir():
        assert b"hidden-in-no-snapshot" not in path.read_bytes()


def test_a_machine_that_stays(warm: Path, cli: Cli) -> None:
    done = cli("run", "-d", "--name", "woken", "--snapshot", "warm", "sleep", "1000")
    assert done.returncode == 0, done.stderr
    assert cli("exec", "woken", "cat", "/tmp/warm").stdout == b"warm\n"
    assert cli("rm", "-f", "woken").returncode == 0


def test_one_that_is_removed_while_machines_live(own: Path) -> None:
    with vmette.Sandbox("snapshot:warm") as sandbox:
        snapshots.remove("warm")
        assert sandbox.run(["md5sum", "/bin/busybox"]).returncode == 0
        assert sandbox.run(["cat", "/tmp/warm"], text=True).stdout == "warm\n"
    with pytest.raises(vmette.ConfigError, match="there is no snapshot 'warm'; there are: none"):
        snapshots.remove("warm")


@pytest.mark.parametrize(
    ("spec", "kept"),
    [
        ("squashfs+https://example.com/a?signature=hidden#sha256=0", "squashfs+https://example.com/a"),
        ("other+https://user:hidden@example.com/a", "other+https://example.com/a"),
        ("alpine:3.20", "alpine:3.20"),
    ],
)
def test_what_is_secret_of_a_url_is_not_written_down(spec: str, kept: str, tmp_path: Path) -> None:
    with vmette.Sandbox(BASE) as sandbox:
        sandbox.rootfs = spec
        assert sandbox.snapshot(tmp_path / "place").rootfs == kept
    meta = (tmp_path / "place/meta.json").read_text()
    assert json.loads(meta)["rootfs"] == kept
    assert "hidden" not in meta


# --- What cannot be saved


@pytest.mark.parametrize("options", [{"secrets": {"A": "b"}}, {"publish": ["0:80"]}], ids=["secrets", "publish"])
def test_services_are_given_to_those_that_wake(options: dict[str, Any], own: Path) -> None:
    with pytest.raises(vmette.ConfigError, match="are given to the machines that wake from a snapshot"):
        snapshots.create("other", BASE, **options)
    assert [path.name for path in own.parent.iterdir()] == ["warm"]


def test_what_a_snapshot_does_not_hold(own: Path, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    with pytest.raises(vmette.ConfigError, match="holds no shares"):
        snapshots.create("other", BASE, shares=[vmette.Share("tag", tmp_path)])
    with pytest.raises(vmette.ConfigError, match="holds no disks"):
        snapshots.create("other", BASE, disks=[vmette.Disk(image)])
    with pytest.raises(vmette.ConfigError, match="a directory for its root, cannot be saved"):
        snapshots.create("other", tmp_path)
    assert [path.name for path in own.parent.iterdir()] == ["warm"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/..", "/", "a b", "x" * 64, ".hidden", "a\0b", "/a\0b"])
def test_names_that_are_none(name: str, own: Path) -> None:
    for use in (lambda: snapshots.create(name, BASE), lambda: snapshots.remove(name), lambda: output(name, "true")):
        with pytest.raises((vmette.ConfigError, ValueError)):
            use()


@pytest.mark.parametrize(
    ("warm_up", "timeout", "error"),
    [
        (["sh", "-c", "echo why >&2; exit 3"], None, vmette.CalledProcessError),
        (["nothing"], None, vmette.CommandNotStarted),
        (["sleep", "1000"], 0.5, vmette.TimeoutExpired),
        (["poweroff", "-f"], None, vmette.GuestError),
    ],
)
def test_a_warm_up_that_fails_leaves_nothing(
    warm_up: list[str], timeout: float | None, error: type[Exception], own: Path
) -> None:
    with pytest.raises(error):
        snapshots.create("other", BASE, warm_up, timeout=timeout)
    assert sorted(path.name for path in own.parent.iterdir()) == ["warm"]


def test_one_that_is_being_made_and_is_killed_leaves_nothing_in_the_way(own: Path) -> None:
    argv = command(["snapshot", "create", "--run", "sleep 1000", BASE, "other"])
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as process:
        wait_until(lambda: bool(vmm_processes()), "the machine")
        time.sleep(0.3)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert [snapshot.name for snapshot in snapshots.snapshots()] == ["warm"]
    assert len(list(own.parent.iterdir())) == 2
    snapshots.create("another", BASE)
    assert sorted(path.name for path in own.parent.iterdir()) == ["another", "warm"]


@pytest.mark.parametrize("beside", ["meta alone", "another file"])
def test_what_is_no_snapshot_is_not_removed(beside: str, own: Path, tmp_path: Path, cli: Cli) -> None:
    place = tmp_path / "mine"
    if beside == "another file":
        with vmette.Sandbox(BASE) as sandbox:
            sandbox.snapshot(place)
        (place / "notes").write_text("mine")
    else:
        place.mkdir()
        (place / "meta.json").write_text('{"name": "something else"}')
    done = cli("snapshot", "rm", str(place))
    assert done.returncode == 2
    assert b"there is no snapshot" in done.stderr
    assert (place / "meta.json").exists()


def test_two_that_are_made_at_once(own: Path) -> None:
    argv = command(["snapshot", "create", "--run", "until [ -e /tmp/no ]; do sleep 1; done", BASE, "slow"])
    with subprocess.Popen(argv, stdin=subprocess.DEVNULL) as process:
        wait_until(lambda: bool([*own.parent.glob(".slow.*")]), "the first one's beginning")
        with pytest.raises(vmette.ConfigError, match="snapshot 'slow' is being made"):
            snapshots.create("slow", BASE)
        snapshots.create("other", BASE)
        snapshots.remove("other")
        process.terminate()
        assert process.wait(30) == 143
    assert sorted(path.name for path in own.parent.iterdir()) == ["warm"]


def test_a_directory_that_others_can_write_to(tmp_path: Path) -> None:
    """They may hold its lock, and have made what looks like the beginning of a snapshot."""
    shared = tmp_path / "shared"
    theirs = [shared / ".name.part", shared / ".name.gone"]
    for path in theirs:
        (path / "file").mkdir(parents=True)
    with ExitStack() as stack:
        for path in (shared, *theirs):
            fd = os.open(path, os.O_RDONLY)
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX)
        with vmette.Sandbox(BASE) as sandbox:
            sandbox.snapshot(shared / "name")
        with pytest.raises(vmette.ConfigError, match="there is a snapshot 'name' already"):
            snapshots.create(shared / "name", BASE)
        snapshots.remove(shared / "name")
    assert sorted(shared.glob(".*/*")) == [path / "file" for path in sorted(theirs)]
    assert sorted(shared.iterdir()) == sorted(theirs)


def test_a_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], check=True)
    try:
        with vmette.Sandbox(BASE) as sandbox:
            with pytest.raises(vmette.VmetteError):
                sandbox.snapshot(disk / "name")
            assert sandbox.run(["echo", "fine"]).stdout == b"fine\n"
        assert not [*disk.iterdir()]
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_name_that_somebody_else_takes_meanwhile(tmp_path: Path) -> None:
    place = tmp_path / "place"
    with vmette.Sandbox(BASE) as sandbox, pytest.MonkeyPatch.context() as patch:
        seal = saved.seal

        def overtaken(*arguments: Any) -> None:
            seal(*arguments)
            (place / "theirs").mkdir(parents=True)

        patch.setattr("vmette.saved.seal", overtaken)
        with pytest.raises(vmette.ConfigError, match="there is a snapshot 'place' already"):
            sandbox.snapshot(place)
    assert [path.name for path in place.iterdir()] == ["theirs"]
    assert not [*tmp_path.glob(".*")]


def test_a_creation_that_is_given_up(own: Path) -> None:
    with pytest.raises(Cancelled):
        snapshots.create("other", BASE, cancelled=lambda: True)
    assert sorted(path.name for path in own.parent.iterdir()) == ["warm"]


# --- What does not wake


@pytest.mark.parametrize(
    "options",
    [{"vcpus": 1}, {"mem_mib": 512}, {"net": True}, {"scratch": 64}, {"rootfs_ro": True}, {"arch": "x86_64"}],
    ids=lambda options: next(iter(options)),
)
def test_what_was_settled(options: dict[str, object], warm: Path) -> None:
    (name,) = options
    with pytest.raises(
        vmette.ConfigError, match=f"^{name} was settled when the snapshot 'warm' was made: leave it out"
    ):
        output("warm", "true", **options)


def test_damage_is_found(own: Path) -> None:
    def refused(what: str) -> None:
        with pytest.raises(vmette.VmmError, match=f"^snapshot 'warm': {what}.*create it anew"):
            output("warm", "true")

    files = {path: path.read_bytes() for path in own.iterdir() if path.name != "ram"}
    for change in (b"", files[own / "state"][:-1], bytes(len(files[own / "state"]))):
        (own / "state").write_bytes(change)
        refused("it is damaged: state is not as it was")
    (own / "state").unlink()
    refused("it is damaged: a file is missing")
    (own / "state").write_bytes(files[own / "state"])
    for meta in (b"", b"{}", b"[]", b"null", b'{"format": 1}', files[own / "meta.json"][:-10]):
        (own / "meta.json").write_bytes(meta)
        refused("it is damaged, or of another version of vmette")
    (own / "meta.json").write_bytes(files[own / "meta.json"])
    assert output("warm", "cat /tmp/warm") == "warm\n"
    if not vz():  # with Virtualization.framework the memory is in the state
        with (own / "ram").open("r+b") as file:
            file.seek(1 << 20)
            file.write(b"x")
        refused("it is damaged: ram is not as it was")
        os.truncate(own / "ram", 4096)
        refused("it is damaged: ram is not as it was")


def test_what_is_on_the_disk_is_read_again_after_a_restart(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that nobody has written to can have changed then, as when the power has failed."""
    part = own / ("state" if vz() else "ram")
    status = part.stat()
    with part.open("r+b") as file:
        file.seek(1 << 16)
        byte = file.read(1)
        file.seek(1 << 16)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(part, ns=(status.st_atime_ns, status.st_mtime_ns))
    known = json.loads((own / "checked.json").read_bytes())
    now = part.stat()
    known["files"][part.name] = [now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino]
    (own / "checked.json").write_text(json.dumps(known))
    boot = own / "boot_id"
    boot.write_text("another")
    monkeypatch.setattr("vmette.vmm.probe.BOOT_ID", boot)
    with pytest.raises(vmette.VmmError, match=f"it is damaged: {part.name} is not as it was"):
        output("warm", "true")


@pytest.mark.only_qemu  # another VMM's program is told the paths
def test_what_is_checked_is_what_wakes(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever can rename the directory cannot put another one in its place meanwhile."""
    read, check = saved.read, saved.check
    away, other = tmp_path / "away", tmp_path / "other"
    shutil.copytree(own, other)
    (other / "meta.json").write_text("[]")
    other.chmod(0o777)

    def exchanged(*arguments: Any) -> Any:
        own.rename(away)
        other.rename(own)
        return read(*arguments)

    def exchanged_again(*arguments: Any) -> None:
        check(*arguments)
        (own / "state").write_bytes(b"another")

    monkeypatch.setattr(saved, "read", exchanged)
    monkeypatch.setattr(saved, "check", exchanged_again)
    assert output("warm", "cat /tmp/warm") == "warm\n"
    gc.collect()
    assert str(away) not in [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]


@pytest.mark.only_qemu
@pytest.mark.parametrize("kind", ["a pipe", "a file"])
def test_how_the_vmm_gets_the_state(kind: str, warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a pipe, and as a file if a pipe does not take it."""
    pipes: list[bool] = []

    def spawned(argv: list[str], fds: dict[int, int], environment: dict[str, str]) -> Child:
        number = int(argv[argv.index("-incoming") + 1].removeprefix("fd:"))
        pipes.append(stat.S_ISFIFO(os.fstat(fds[number]).st_mode))
        return spawn(argv, fds, environment)

    monkeypatch.setattr("vmette.vmm.qemu.spawn", spawned)
    if kind == "a file":
        monkeypatch.setattr("vmette.headstart.MAX_PIPE", 1000)
    assert output("warm", "cat /tmp/warm") == "warm\n"
    assert pipes == [kind == "a pipe"]


def test_another_kernel_is_another_machine(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(assets.PAYLOAD, tmp_path / "payload", dirs_exist_ok=True)
    monkeypatch.setenv("VMETTE_ASSETS_DIR", str(tmp_path / "payload"))
    snapshots.remove("warm")
    snapshots.create("warm", BASE)
    assert output("warm", "echo woken") == "woken\n"
    with vmette.Sandbox(BASE) as sandbox:
        assets.kernel(assets.host_arch()).touch()
        with pytest.raises(vmette.VmmError, match="the guest's kernel is another one now than when it was started"):
            sandbox.snapshot("late")
        assert sandbox.run(["true"]).returncode == 0
    with pytest.raises(vmette.VmmError, match="made with another version of the guest's kernel; create it anew"):
        output("warm", "true")


def test_one_that_the_vmm_does_not_take(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check passes, and the VMM has the last word."""
    monkeypatch.setattr("vmette.saved.check", lambda *_: None)
    (own / "state").write_bytes(b"no state of QEMU's" * 100)
    with pytest.raises(vmette.VmmError, match=r"QEMU|cannot be restored"):
        output("warm", "true")

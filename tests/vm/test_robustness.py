"""What a hostile root of the guest can do to the agent, and a hostile guest to this side: end its own VM, at most."""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest

import vmette
from tests.vm.hostile import compiled, initramfs
from tests.vm.support import BASE, wait_until
from vmette import guest as guest_module
from vmette.protocol import HEADER, U32, FrameType, Tag, encode_record

PATIENCE = 60.0
"""Seconds for what takes none."""


@pytest.fixture
def sandbox() -> Iterator[vmette.Sandbox]:
    with vmette.Sandbox(BASE) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def neighbour() -> Iterator[vmette.Sandbox]:
    """Another VM, which must not notice anything."""
    with vmette.Sandbox(BASE) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("programs")
    return {name: compiled(name, directory) for name in ("intruder", "hog", "hostile_init")}


def root(sandbox: vmette.Sandbox, script: str, timeout: float = PATIENCE) -> vmette.CompletedProcess[str]:
    """What the guest's root does."""
    return sandbox.run(["sh", "-c", script], text=True, timeout=timeout)


def assert_alive(sandbox: vmette.Sandbox) -> None:
    assert sandbox.run(["echo", "alive"], timeout=PATIENCE).stdout == b"alive\n"


def assert_useful(sandbox: vmette.Sandbox, directory: str = "/tmp") -> None:
    """Commands and files work."""
    assert_alive(sandbox)
    path = f"{directory}/useful"
    sandbox.files.write(path, b"data")
    assert sandbox.files.read(path) == b"data"
    sandbox.files.remove(path)


def numbers(sandbox: vmette.Sandbox, *paths: str) -> list[int]:
    return [int(word) for word in sandbox.run(["cat", *paths], timeout=PATIENCE, check=True).stdout.split()]


# --- Processes


def test_killing_everything_leaves_the_agent(sandbox: vmette.Sandbox) -> None:
    bystander = sandbox.popen(["sleep", "1000"], stdout=DEVNULL, stderr=DEVNULL)
    root(sandbox, "kill -9 -1")
    assert bystander.wait(PATIENCE) == -signal.SIGKILL
    root(sandbox, "for signal in TERM INT HUP USR1 USR2 SEGV STOP KILL; do kill -$signal 1; done")
    assert_useful(sandbox)


BOMB = "bomb() { bomb | bomb & }; bomb"
PIDS = "/sys/fs/cgroup/vmette/pids"


def test_a_fork_bomb_is_held_and_ends_with_its_command(neighbour: vmette.Sandbox) -> None:
    with vmette.Sandbox(BASE, pids=200) as sandbox:
        bomb = sandbox.popen(["sh", "-c", f"{BOMB}; exec tail -f /dev/null"], stdout=DEVNULL, stderr=DEVNULL)
        wait_until(lambda: numbers(sandbox, f"{PIDS}.peak")[0] >= 200, "200 processes")
        for _ in range(20):
            assert_useful(sandbox)
        assert_alive(neighbour)
        bomb.kill()
        assert bomb.wait(PATIENCE) == -signal.SIGKILL
        wait_until(lambda: numbers(sandbox, f"{PIDS}.current") == [1], "the end of the bomb")
        with pytest.raises(vmette.TimeoutExpired):
            root(sandbox, f"{BOMB}; exec tail -f /dev/null", timeout=2)
        wait_until(lambda: numbers(sandbox, f"{PIDS}.current") == [1], "the end of the bomb")


def test_a_fork_bomb_whose_command_has_ended_can_be_ended_by_another(sandbox: vmette.Sandbox) -> None:
    assert root(sandbox, f"echo 100 >{PIDS}.max; {BOMB}").returncode == 0
    wait_until(lambda: numbers(sandbox, f"{PIDS}.peak")[0] >= 100, "100 processes")
    root(sandbox, "kill -9 -1")
    wait_until(lambda: numbers(sandbox, f"{PIDS}.current") == [1], "the end of the bomb")


def test_not_one_process_is_allowed(sandbox: vmette.Sandbox) -> None:
    assert root(sandbox, f"echo 0 >{PIDS}.max").returncode == 0
    assert_useful(sandbox)


def test_a_command_that_has_left_its_cgroup_is_killed_too(sandbox: vmette.Sandbox) -> None:
    with pytest.raises(vmette.TimeoutExpired):
        root(sandbox, "echo $$ >/sys/fs/cgroup/cgroup.procs; exec tail -f /dev/null", timeout=2)
    assert_useful(sandbox)


def test_a_command_that_freezes_all_is_killed_all_the_same(sandbox: vmette.Sandbox) -> None:
    for script in ("echo 1 >/sys/fs/cgroup/vmette/cgroup.freeze", "true"):
        with pytest.raises(vmette.TimeoutExpired):
            root(sandbox, script, timeout=2)


def test_a_command_of_the_highest_priority(sandbox: vmette.Sandbox, programs: dict[str, Path]) -> None:
    sandbox.files.write("/tmp/hog", programs["hog"].read_bytes(), mode=0o755)
    with sandbox.popen(["/tmp/hog", "priority"]) as hog:
        assert next(hog.lines()) == "on"
        assert_useful(sandbox)
        assert hog.poll() is None
        hog.kill()
    assert hog.returncode == -signal.SIGKILL


def test_the_agent_cannot_be_traced(sandbox: vmette.Sandbox, programs: dict[str, Path]) -> None:
    sandbox.files.write("/tmp/intruder", programs["intruder"].read_bytes(), mode=0o755)
    done = sandbox.run(["/tmp/intruder"], text=True, check=True, timeout=PATIENCE)
    child, agent = done.stdout.removeprefix("child\n").split("agent\n")
    attempts = dict(line.split() for line in child.splitlines())
    assert set(attempts.values()) == {"0"}  # debuggers work
    refused = dict(line.split() for line in agent.splitlines())
    assert refused.keys() == attempts.keys()
    assert set(refused.values()) <= {str(errno.EPERM), str(errno.EACCES)}
    assert_useful(sandbox)


def test_the_control_port_has_one_opener(sandbox: vmette.Sandbox) -> None:
    script = """
        cd /sys/class/virtio-ports
        for port in *; do
            mknod /$port c $(tr : ' ' <$port/dev)
            for path in /dev/$port /$port; do echo x >$path; done
        done
    """
    said = root(sandbox, script).stderr
    assert said.count("Device or resource busy") == 2
    assert said.count("No such device") == 2  # the console, which is no port
    assert_useful(sandbox)


# --- Bytes


@pytest.mark.parametrize("directory", ["/", "/tmp", "/run", "/dev/shm"])
def test_a_filesystem_that_is_full(sandbox: vmette.Sandbox, directory: str) -> None:
    path = str(Path(directory, "filler"))
    done = root(sandbox, f"dd if=/dev/zero of={path} bs=1M")
    assert (done.returncode, "No space left on device" in done.stderr) == (1, True)
    assert_useful(sandbox, "/dev/shm" if directory == "/tmp" else "/tmp")
    with pytest.raises(vmette.GuestFileError, match="No space left") as caught:
        sandbox.files.write(f"{path}.more", b"x" * 100_000)
    assert caught.value.errno == errno.ENOSPC
    sandbox.files.remove(path)
    assert_useful(sandbox, directory.rstrip("/"))


def test_output_that_nobody_reads_and_input_that_nobody_takes(
    sandbox: vmette.Sandbox, neighbour: vmette.Sandbox
) -> None:
    floods = [sandbox.popen(["sh", "-c", f"exec yes >&{number}"]) for number in (1, 2, 1, 2)]
    idler = sandbox.popen(["sleep", "1000"], stdin=PIPE)
    with pytest.raises(vmette.TimeoutExpired):
        idler.communicate(b"x" * (10 << 20), timeout=2)
    for _ in range(20):
        assert_useful(sandbox)
    assert_alive(neighbour)
    for command in (*floods, idler):
        assert command.poll() is None
        command.kill()
        command.communicate()
        assert command.returncode == -signal.SIGKILL


# --- What is left behind

COUNTS = """
    ls /proc/1/fd | wc -l
    grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l
    ls -d /sys/fs/cgroup/vmette/*/ | wc -l
"""
"""The agent's descriptors, zombies, and cgroups, of which this command has one."""


def own_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_three_hundred_commands_leave_nothing(sandbox: vmette.Sandbox) -> None:
    before = root(sandbox, COUNTS).stdout.split()
    assert before[1:] == ["0", "1"]
    files, threads = own_files(), threading.active_count()
    for number in range(100):
        assert sandbox.run(["echo", str(number)], timeout=PATIENCE).stdout == b"%d\n" % number
        assert root(sandbox, "(true &); (sh -c 'exit 3' &); exit 7").returncode == 7
        with pytest.raises(vmette.CommandNotStarted):
            sandbox.run(["nothing"])
    wait_until(lambda: root(sandbox, COUNTS).stdout.split() == before, "the end of all that was left")
    assert (own_files(), threading.active_count()) == (files, threads)


def test_what_a_command_leaves_running_goes_on_and_is_reaped(sandbox: vmette.Sandbox) -> None:
    before = root(sandbox, COUNTS).stdout.split()
    for _ in range(10):
        root(sandbox, "for i in 1 2 3; do (setsid tail -f /dev/null &); done")
    assert len(root(sandbox, "pidof tail").stdout.split()) == 30
    with_them = [*before[:2], "11"]
    wait_until(lambda: root(sandbox, COUNTS).stdout.split() == with_them, "the end of what started them")
    root(sandbox, "killall -9 tail")
    wait_until(lambda: root(sandbox, COUNTS).stdout.split() == before, "the end of all that was left")


# --- The system


@pytest.mark.parametrize(
    "script",
    [
        "for path in /proc /sys/fs/cgroup /sys /dev/pts /dev/shm /dev /run /tmp; do umount -l $path; done",
        "for path in /sys/fs/cgroup /proc /sys /dev /run /tmp /; do mount -t tmpfs none $path; done",
        "rm -rf /dev/*",
        "cd /sys/fs/cgroup/vmette; echo '-cpu -memory -pids' >cgroup.subtree_control",
        "cd /sys/fs/cgroup/vmette; mkdir 1/1; for number in $(seq 2 300); do mkdir $number; done",
        "echo 1 >/sys/fs/cgroup/vmette/cgroup.kill",
        "for limit in file-max nr_open; do echo 1 >/proc/sys/fs/$limit; done",
        "chroot /proc/1/root true; nsenter -t 1 -m true",
        "reboot; poweroff; halt",
    ],
)
def test_a_system_that_is_taken_apart(sandbox: vmette.Sandbox, script: str) -> None:
    """The agent needs none of it: it holds what it works with."""
    root(sandbox, script)
    assert_useful(sandbox)


def test_a_root_that_nothing_can_be_written_to(sandbox: vmette.Sandbox) -> None:
    assert root(sandbox, "mount -o remount,ro / && ! touch /file").returncode == 0
    assert_useful(sandbox)


def test_a_root_that_is_gone(sandbox: vmette.Sandbox) -> None:
    root(sandbox, "rm -rf / 2>/dev/null")
    with pytest.raises(vmette.CommandNotStarted, match="no command 'sh'"):
        root(sandbox, "true")
    sandbox.files.write("/file", b"data")
    assert sandbox.files.read("/file") == b"data"


def test_a_kernel_that_allows_no_threads(sandbox: vmette.Sandbox) -> None:
    root(sandbox, "sysctl -w kernel.threads-max=20")
    with pytest.raises(vmette.CommandNotStarted, match="fork: Resource temporarily unavailable"):
        root(sandbox, "true")


def test_no_memory_is_allowed(sandbox: vmette.Sandbox) -> None:
    with suppress(vmette.CommandNotStarted):
        root(sandbox, "echo 1 >/sys/fs/cgroup/vmette/memory.max")
    with pytest.raises(vmette.CommandNotStarted, match="Out of memory"):
        sandbox.run(["true"], timeout=PATIENCE)


@pytest.mark.parametrize("script", ["reboot -f", "poweroff -f"])
def test_a_root_that_ends_its_machine(sandbox: vmette.Sandbox, script: str) -> None:
    with pytest.raises(vmette.GuestError, match=r"the guest ended before the command did$"):
        root(sandbox, script)
    with pytest.raises(vmette.GuestError):
        root(sandbox, "true")
    assert sandbox.closed


def test_a_root_that_halts_its_machine(sandbox: vmette.Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guest_module, "KILL_SECONDS", 2.0)
    with pytest.raises(vmette.TimeoutExpired):
        root(sandbox, "halt -f", timeout=2)
    with pytest.raises(vmette.GuestError, match="did not kill a command within 2 seconds"):
        root(sandbox, "true")


def test_a_root_that_panics_its_kernel(sandbox: vmette.Sandbox) -> None:
    assert not sandbox.files.exists("/proc/sysrq-trigger")
    with pytest.raises(vmette.GuestError, match="Kernel panic - not syncing: Out of memory") as caught:
        root(sandbox, "echo 2 >/proc/sys/vm/panic_on_oom; exec tail /dev/zero")
    assert caught.value.console


# --- A guest that is not ours


def frame(kind: int, stream: int = 0, payload: bytes = b"", length: int | None = None) -> bytes:
    return HEADER.pack(kind, 0, 0, stream, len(payload) if length is None else length) + payload


def hello(version: int = 1) -> bytes:
    return frame(FrameType.HELLO, 0, encode_record([(Tag.VERSION, U32.pack(version)), (Tag.KERNEL, b"mine")]))


EXITED = encode_record([(Tag.CODE, U32.pack(0))])

TALK: dict[str, tuple[bytes, type[vmette.VmetteError], str]] = {
    "text": (b"localhost login: ", vmette.ProtocolError, "bad frame"),
    "ones": (b"\xff" * 4096, vmette.ProtocolError, "bad frame"),
    "zeros": (bytes(4096), vmette.ProtocolError, "bad frame"),
    "huge": (frame(FrameType.HELLO, length=0xFFFF_FFFF), vmette.ProtocolError, "bad frame"),
    "large": (frame(FrameType.HELLO, length=4097), vmette.ProtocolError, "bad frame"),
    "no hello": (frame(FrameType.STDOUT, 1, b"x"), vmette.ProtocolError, "did not say hello"),
    "another version": (hello(2), vmette.ProtocolError, "speaks control protocol 2"),
    "hello again": (hello() * 2, vmette.ProtocolError, "hello twice"),
    "no record": (frame(FrameType.HELLO, 0, b"x"), vmette.ProtocolError, "record"),
    "no stream": (hello() + frame(FrameType.STDOUT, 77, b"x"), vmette.ProtocolError, "stream 77"),
    "no listener": (hello() + frame(FrameType.ACCEPTED, 1 << 31), vmette.ProtocolError, "."),
    "an exit of all": (hello() + frame(FrameType.EXIT, 0, EXITED), vmette.ProtocolError, "stream 0"),
    "half a frame": (hello()[:-1], vmette.GuestError, "did not boot within"),
    "silence": (b"", vmette.GuestError, "did not boot within"),
    "its own failure": (
        frame(FrameType.ERROR, 0, encode_record([(Tag.ERRNO, U32.pack(0)), (Tag.TEXT, b"no\x1b[2J\nway")])),
        vmette.GuestError,
        "could not set itself up: no",
    ),
}


def boot(
    programs: dict[str, Path], tmp_path: Path, said: bytes, *flags: str, in_sandbox: bool, timeout: float | None = None
) -> None:
    """Boots a guest that says this, for a command."""
    image = initramfs(programs["hostile_init"], {"say": said, **dict.fromkeys(flags, b"")}, tmp_path / "initramfs")
    if in_sandbox:
        with vmette.Sandbox(BASE, initramfs=image) as sandbox:
            sandbox.run(["true"], timeout=timeout)
    else:
        vmette.run(BASE, ["true"], initramfs=image, timeout=timeout)


@pytest.mark.parametrize("in_sandbox", [False, True], ids=["run", "sandbox"])
@pytest.mark.parametrize("talk", TALK)
def test_a_guest_that_talks_nonsense(
    programs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, talk: str, in_sandbox: bool
) -> None:
    said, kind, text = TALK[talk]
    if "boot" in text:
        monkeypatch.setattr(guest_module, "BOOT_SECONDS", 2.0)
    with pytest.raises(kind, match=text) as caught:
        boot(programs, tmp_path, said, in_sandbox=in_sandbox)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("in_sandbox", [False, True], ids=["run", "sandbox"])
@pytest.mark.parametrize("said", [hello(), frame(FrameType.WINDOW, 1, bytes(5))], ids=["hellos", "frames"])
def test_a_guest_that_never_stops(programs: dict[str, Path], tmp_path: Path, said: bytes, in_sandbox: bool) -> None:
    with pytest.raises(vmette.ProtocolError):
        boot(programs, tmp_path, said * 1000, "endless", in_sandbox=in_sandbox)


@pytest.mark.parametrize("in_sandbox", [False, True], ids=["run", "sandbox"])
@pytest.mark.parametrize("rest", [b"", frame(FrameType.HELLO)[:5]], ids=["silence", "half a frame"])
def test_a_guest_that_greets_and_does_nothing(
    programs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rest: bytes, in_sandbox: bool
) -> None:
    monkeypatch.setattr(guest_module, "KILL_SECONDS", 1.0)
    with pytest.raises(vmette.TimeoutExpired):
        boot(programs, tmp_path, hello() + rest, in_sandbox=in_sandbox, timeout=3)


@pytest.mark.parametrize("in_sandbox", [False, True], ids=["run", "sandbox"])
def test_a_guest_whose_init_ends(programs: dict[str, Path], tmp_path: Path, in_sandbox: bool) -> None:
    with pytest.raises(vmette.GuestError, match="Kernel panic - not syncing: Attempted to kill init"):
        boot(programs, tmp_path, hello(), "end", in_sandbox=in_sandbox)


@pytest.mark.parametrize("in_sandbox", [False, True], ids=["run", "sandbox"])
def test_output_without_an_end(
    programs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_sandbox: bool
) -> None:
    """It keeps to the windows no more than to anything else, but what is taken of it is bounded."""
    monkeypatch.setattr(guest_module, "KILL_SECONDS", 1.0)
    said = hello() + frame(FrameType.STDOUT, 1, bytes(65536)) * 15
    with pytest.raises((vmette.OutputTooLarge, vmette.ProtocolError)):
        boot(programs, tmp_path, said, "endless", in_sandbox=in_sandbox)


def test_what_is_mounted_over_the_files_of_a_cgroup_stops_nothing(sandbox: vmette.Sandbox) -> None:
    script = (
        "mkfifo /tmp/fifo; cd /sys/fs/cgroup$(sed s/^0::// /proc/self/cgroup);"
        "for file in memory.peak memory.events cgroup.kill; do mount --bind /tmp/fifo $file; done; echo done"
    )
    done = sandbox.run(["sh", "-c", script], text=True)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert done.usage is not None
    assert (done.usage.peak_memory, done.usage.oom_kills) == (None, 0)
    with pytest.raises(vmette.TimeoutExpired):
        sandbox.run(["sh", "-c", script + "; exec sleep 1000"], timeout=3)
    assert sandbox.run(["echo", "on"]).stdout == b"on\n"


def test_a_helper_of_the_kernel_cannot_trace_the_agent_either(sandbox: vmette.Sandbox) -> None:
    """The kernel executes what core_pattern names, as root and outside of every command."""
    helper = "#!/bin/sh\ngrep Cap /proc/self/status >/caps.part; ls -l /proc/1/fd >/fds 2>&1; mv /caps.part /caps\n"
    sandbox.files.write("/helper", helper.encode(), mode=0o755)
    script = (
        "ulimit -c unlimited; echo '|/helper' >/proc/sys/kernel/core_pattern; sh -c 'kill -SEGV $$';"
        "until [ -e /caps ]; do sleep 0.1; done; cat /caps; cat /fds >&2"
    )
    done = sandbox.run(["sh", "-c", script], text=True)
    sets = {line.split()[0]: int(line.split()[1], 16) for line in done.stdout.splitlines()}
    assert sets["CapEff:"]
    assert [name for name, bits in sets.items() if bits >> 19 & 1] == []  # CAP_SYS_PTRACE
    assert "vport" not in done.stderr

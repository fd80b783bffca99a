"""`vmette.Sandbox`: many commands in one VM."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT

import pytest

import vmette
from tests.vm.support import BASE, vmm_name, vmm_processes, vmms, wait_until


@pytest.fixture
def sandbox() -> Iterator[vmette.Sandbox]:
    with vmette.Sandbox(BASE) as sandbox:
        yield sandbox


def running(sandbox: vmette.Sandbox, name: str) -> int:
    """How many processes of that name there are in the guest."""
    return len(sandbox.run(["pidof", name], text=True).stdout.split())


# --- run


def test_commands_share_the_machine(sandbox: vmette.Sandbox) -> None:
    sandbox.run(["sh", "-c", "echo kept >/tmp/file"], check=True)
    done = sandbox.run(["sh", "-c", "cat /tmp/file; echo err >&2; exit 3"])
    assert done == vmette.CompletedProcess(("sh", "-c", "cat /tmp/file; echo err >&2; exit 3"), 3, b"kept\n", b"err\n")
    assert sandbox.run(["sh", "-c", "kill -USR1 $$"]).returncode == -signal.SIGUSR1


def test_users_are_found_whatever_else_their_files_say(sandbox: vmette.Sandbox) -> None:
    users = [
        b"",
        b":::",
        b"last:x:7",
        b"last:x:no:1::/:",
        b"last:x:1:-1::/:",
        b"y" * 70000,
        b"first:x:1001:1001::/first:",
        b"max:x:4294967295:1::/:",
        b"homeless:x:1004:1004:::",
        b"last:x:1002:1003:Last:/last:/bin/sh",
    ]
    groups = [
        b"g:x",
        b"no:x:no:last",
        b"many:x:50:%s,last" % b",".join(b"u%d" % i for i in range(3000)),
        b"few:x:51:other,last,",
        b"almost:x:52:las,lasts",
        b"too-long:x:53:%slast" % (b"y," * 40000),
        b"e:x:54:last",
    ]
    sandbox.files.write("/etc/passwd", b"\n".join(users))
    sandbox.files.write("/etc/group", b"\n".join(groups))

    def identity(user: str) -> str:
        done = sandbox.run(["sh", "-c", "echo $(id -u) $(id -G) $HOME"], user=user, text=True, check=True)
        return str(done.stdout).strip()

    assert identity("last") == identity("1002") == "1002 1003 50 51 54 /last"
    assert identity("last:few") == "1002 51 /last"
    assert identity("homeless") == "1004 1004 /"
    assert identity("77") == "77 0 /"
    for unknown in ("max", "y" * 100, "no", "last:no", "last:too-long2"):
        with pytest.raises(vmette.CommandNotStarted):
            sandbox.run(["true"], user=unknown)


def test_run_takes_what_vmette_run_takes(sandbox: vmette.Sandbox) -> None:
    done = sandbox.run(
        ["sh", "-c", "cat; echo $A; pwd; id -u"], input="in\n", env={"A": "b c"}, cwd="/usr", user="12:34", text=True
    )
    assert done.stdout == "in\nb c\n/usr\n12\n"
    with pytest.raises(vmette.CalledProcessError):
        sandbox.run(["false"], check=True)
    with pytest.raises(vmette.ConfigError):
        sandbox.run("true")  # a string is no list of words


def test_a_missing_command_leaves_the_sandbox_as_it_was(sandbox: vmette.Sandbox) -> None:
    with pytest.raises(vmette.CommandNotStarted, match="no command 'nothing'"):
        sandbox.run(["nothing"])
    assert sandbox.run(["echo", "on"]).stdout == b"on\n"


def test_what_a_command_took_of_the_machine(sandbox: vmette.Sandbox) -> None:
    script = "dd if=/dev/zero of=/dev/null bs=32M count=1 2>/dev/null; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done"
    usage = sandbox.run(["sh", "-c", script]).usage
    assert usage is not None
    assert usage.user_seconds > 0
    assert usage.max_rss > 1 << 20
    assert usage.peak_memory is not None
    assert 32 << 20 <= usage.peak_memory < 128 << 20
    assert usage.oom_kills == 0


def test_a_time_out_kills_all_that_the_command_started_and_nothing_else(sandbox: vmette.Sandbox) -> None:
    with sandbox.popen(["sleep", "1000"], stdout=DEVNULL, stderr=DEVNULL) as other:
        with pytest.raises(vmette.TimeoutExpired) as caught:
            sandbox.run(
                ["sh", "-c", "echo out; (setsid tail -f /dev/null &) ; tail -f /dev/null"], timeout=3, text=True
            )
        assert caught.value.stdout == "out\n"
        assert running(sandbox, "tail") == 0
        assert other.poll() is None
        other.kill()
    assert sandbox.run(["echo", "on"]).stdout == b"on\n"


def test_output_is_bounded_and_the_sandbox_lives(sandbox: vmette.Sandbox) -> None:
    with pytest.raises(vmette.OutputTooLarge, match="more than 100000 bytes"):
        sandbox.run(["yes"], max_output=100_000)
    assert running(sandbox, "yes") == 0


def test_many_commands_at_once_from_many_threads(sandbox: vmette.Sandbox) -> None:
    def one(number: int) -> bytes:
        return sandbox.run(["sh", "-c", f"head -c 300000 /dev/zero | tr '\\0' {number % 10}"]).stdout

    with ThreadPoolExecutor(12) as pool:
        for number, output in enumerate(pool.map(one, range(36))):
            assert output == b"%d" % (number % 10) * 300_000


def test_more_commands_than_there_can_be(sandbox: vmette.Sandbox) -> None:
    commands = [sandbox.popen(["sleep", "1000"], stdout=DEVNULL, stderr=DEVNULL) for _ in range(256)]
    with pytest.raises(vmette.CommandNotStarted, match="Resource temporarily unavailable"):
        sandbox.run(["true"])
    for command in commands:
        command.kill()
    assert {command.wait() for command in commands} == {-signal.SIGKILL}
    assert sandbox.run(["true"]).returncode == 0


def test_an_interrupted_call_kills_its_command(sandbox: vmette.Sandbox) -> None:
    interrupt = threading.Timer(1.5, os.kill, (os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        sandbox.run(["tail", "-f", "/dev/null"])
    interrupt.join()
    assert running(sandbox, "tail") == 0


# --- popen


def test_streams_are_files(sandbox: vmette.Sandbox) -> None:
    with sandbox.popen(["sh", "-c", "while read line; do echo got $line; done; echo end >&2"], stdin=PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        for word in (b"one", b"two"):
            process.stdin.write(word + b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"got " + word + b"\n"
        assert process.poll() is None
        process.stdin.close()
        assert process.stdout.read() == b""
        assert process.stderr.read() == b"end\n"
        assert process.wait() == process.returncode == 0
        assert process.usage is not None


def test_communicate(sandbox: vmette.Sandbox) -> None:
    data = os.urandom(3_000_000)
    process = sandbox.popen(["sh", "-c", "cat; echo err >&2; exit 7"], stdin=PIPE)
    assert process.communicate(data) == (data, b"err\n")
    assert process.returncode == 7
    process = sandbox.popen(["true"], stdin=PIPE)  # which reads nothing
    assert process.communicate(data) == (b"", b"")
    process = sandbox.popen(["sh", "-c", "echo out; exec tail -f /dev/null"], stdin=PIPE)
    with pytest.raises(vmette.TimeoutExpired) as caught:
        process.communicate(timeout=3)
    assert caught.value.stdout == b"out\n"
    assert process.poll() is None
    process.kill()
    assert process.communicate() == (b"out\n", b"")  # what there was before is not lost


def test_chunks_and_lines(sandbox: vmette.Sandbox) -> None:
    process = sandbox.popen(["sh", "-c", "echo one; echo two >&2; printf three"])
    taken = {1: b"", 2: b""}
    for number, data in process.chunks():
        taken[number] += data
    assert taken == {1: b"one\nthree", 2: b"two\n"}
    assert process.wait() == 0
    with sandbox.popen(["printf", r"a\n\nb"], stderr=DEVNULL) as process:
        assert list(process.lines()) == ["a", "", "b"]


def test_where_streams_go(sandbox: vmette.Sandbox, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with out.open("wb") as file:
        process = sandbox.popen(["sh", "-c", "echo a; echo b >&2"], stdout=file, stderr=STDOUT)
    assert process.wait() == 0  # the file that was closed here was its own there
    assert sorted(out.read_bytes().split()) == [b"a", b"b"]
    with out.open("rb") as file:
        process = sandbox.popen(["cat"], stdin=file, stderr=STDOUT)
    assert process.communicate()[0] in {b"a\nb\n", b"b\na\n"}
    process = sandbox.popen(["sh", "-c", "echo a; echo b >&2"], stderr=STDOUT)
    assert sorted(process.communicate()[0].split()) == [b"a", b"b"]


def test_a_reader_that_goes_away_is_a_broken_pipe_there(sandbox: vmette.Sandbox) -> None:
    with sandbox.popen(["yes"], stderr=DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"y\n"
    assert process.returncode == -signal.SIGPIPE


def test_signals(sandbox: vmette.Sandbox) -> None:
    script = "trap 'echo caught; exit 5' USR1; echo up; while :; do sleep 0.1; done"
    with sandbox.popen(["sh", "-c", script], stderr=DEVNULL) as process:
        lines = process.lines()
        assert next(lines) == "up"
        process.send_signal("SIGUSR1")
        assert next(lines) == "caught"
        assert process.wait() == 5
        process.send_signal(9)  # it has ended: nothing happens
        with pytest.raises(vmette.ConfigError):
            process.send_signal("NOTHING")
    process = sandbox.popen(["sleep", "1000"], stdout=DEVNULL, stderr=DEVNULL)
    process.terminate()
    assert process.wait() == -signal.SIGTERM


def test_kill_reaches_what_left_its_session(sandbox: vmette.Sandbox) -> None:
    script = "setsid tail -f /dev/null & setsid tail -f /dev/null & echo up; wait"
    with sandbox.popen(["sh", "-c", script], stderr=DEVNULL) as process:
        assert next(process.lines()) == "up"
        process.kill()
        process.wait()
        assert running(sandbox, "tail") == 0


def test_a_terminal(sandbox: vmette.Sandbox) -> None:
    script = "stty size; tty; read x; stty size"
    with sandbox.popen(["sh", "-c", script], stdin=PIPE, stderr=DEVNULL, terminal=(33, 111)) as process:
        lines = process.lines()
        assert [next(lines), next(lines)] == ["33 111\r", "/dev/pts/0\r"]
        process.resize(10, 20)
        assert process.stdin is not None
        process.stdin.write(b"x\r")
        process.stdin.flush()
        assert list(lines) == ["x\r", "10 20\r"]
        assert process.wait() == 0


def test_a_wait_can_be_given_up(sandbox: vmette.Sandbox) -> None:
    process = sandbox.popen(["sleep", "1000"], stdout=DEVNULL, stderr=DEVNULL)
    with pytest.raises(vmette.TimeoutExpired):
        process.wait(0.2)
    assert process.poll() is None
    process.kill()
    assert process.wait() == -signal.SIGKILL


# --- the end


def test_after_its_end_it_says_so() -> None:
    sandbox = vmette.Sandbox(BASE)
    process = sandbox.popen(["sleep", "1000"], stdout=DEVNULL, stderr=DEVNULL)
    sandbox.close()
    sandbox.close()
    assert sandbox.closed
    for use in (lambda: sandbox.run(["true"]), process.wait, process.poll, lambda: sandbox.popen(["true"])):
        with pytest.raises(vmette.SandboxClosed, match="has been closed"):
            use()
    process.kill()


def test_an_idle_sandbox_ends() -> None:
    sandbox = vmette.Sandbox(BASE, idle_timeout=1)
    sandbox.run(["sleep", "2"], check=True)  # which is not idle
    wait_until(lambda: sandbox.closed, "the end of an idle sandbox")
    with pytest.raises(vmette.SandboxClosed, match="it was idle for 1 seconds"):
        sandbox.run(["true"])


def test_a_sandbox_ends_with_its_lifetime() -> None:
    sandbox = vmette.Sandbox(BASE, max_lifetime=2)
    with pytest.raises(vmette.SandboxClosed, match="its lifetime of 2 seconds is over"):
        sandbox.run(["tail", "-f", "/dev/null"])
    assert sandbox.closed


def test_a_guest_that_powers_off_is_told(sandbox: vmette.Sandbox) -> None:
    with pytest.raises(vmette.GuestError, match="the guest ended"):
        sandbox.run(["poweroff", "-f"])
    with pytest.raises(vmette.GuestError, match="the guest ended"):
        sandbox.run(["true"])
    assert sandbox.closed


def test_a_vmm_that_is_killed_is_told(sandbox: vmette.Sandbox) -> None:
    process = sandbox.popen(["sleep", "1000"], stdout=DEVNULL, stderr=DEVNULL)
    for pid in vmms():
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(vmette.VmmError, match=f"{vmm_name()} was killed by signal 9"):
        process.wait()


def test_garbage_collection_ends_the_vm() -> None:
    sandbox = vmette.Sandbox(BASE)
    process = sandbox.popen(["sleep", "1000"], stdout=DEVNULL, stderr=DEVNULL)
    assert vmm_processes()
    del sandbox, process
    gc.collect()
    wait_until(lambda: not vmm_processes(), "the end of a sandbox that nobody has")


SCRIPT = f"""
import os, vmette
sandbox = vmette.Sandbox({BASE!r})
sandbox.popen(["sleep", "1000"], stdout=-3, stderr=-3)
print("up", flush=True)
"""


@pytest.mark.parametrize(
    "end",
    ["", "raise SystemExit(0)", "1 / 0", "os._exit(0)", "os.kill(os.getpid(), 9)", "input()"],
    ids=["end", "exit", "exception", "_exit", "kill", "killed from outside"],
)
def test_the_vm_does_not_outlive_the_program(end: str) -> None:
    with subprocess.Popen([sys.executable, "-c", SCRIPT + end], stdin=PIPE, stdout=PIPE, stderr=PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        if end == "input()":
            process.kill()
        process.communicate()
    wait_until(lambda: not vmm_processes(), "the end of the VM")


def test_a_forked_child_leaves_the_sandbox_alone(sandbox: vmette.Sandbox) -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]):
        pass
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            sandbox.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert sandbox.run(["echo", "on"]).stdout == b"on\n"


def test_two_sandboxes_know_nothing_of_each_other(sandbox: vmette.Sandbox) -> None:
    with vmette.Sandbox(BASE) as other:
        sandbox.run(["touch", "/tmp/here"], check=True)
        assert other.run(["ls", "/tmp"]).stdout == b""


def test_writes_to_a_share_are_there_after_the_end(tmp_path: Path) -> None:
    with vmette.Sandbox(BASE, shares=[vmette.Share("out", tmp_path)]) as sandbox:
        sandbox.run(["sh", "-c", "echo kept >/mnt/out/file"], check=True)
    assert (tmp_path / "file").read_text() == "kept\n"


def test_an_unknown_option_is_an_error() -> None:
    with pytest.raises(TypeError, match="memory"):
        vmette.Sandbox(BASE, memory=5)  # type: ignore[call-arg]
    for options in ({"max_lifetime": -1.0}, {"idle_timeout": float("nan")}):
        with pytest.raises(vmette.ConfigError, match="cannot be kept"):
            vmette.Sandbox(BASE, **options)  # type: ignore[arg-type]


def test_the_clock_is_set_on_demand(sandbox: vmette.Sandbox) -> None:
    sandbox.run(["date", "-s", "@1000000000"], check=True)
    sandbox.sync_clock()
    assert abs(int(sandbox.run(["date", "+%s"]).stdout) - time.time()) < 60

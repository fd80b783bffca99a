"""The guest agent (csrc/guest/agent.c) on this host: commands, and a host that breaks the protocol."""

from __future__ import annotations

import errno
import fcntl
import os
import pwd
import resource
import select
import signal
import socket
import struct
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.agent_harness import (
    AGENT_KERNEL,
    BROKEN,
    CLEAN,
    HELLO,
    MIB,
    OWN_HOME,
    OWN_USER,
    PATIENCE,
    PAUSE,
    PIPE,
    WAKING,
    WAKING_FIELDS,
    Agent,
    Stream,
    build,
    converse,
    descriptors,
    drain,
    eventually,
    exec_frame,
    exists,
    fields,
    frame,
    noise,
    parse,
    spawn,
)
from vmette import config
from vmette.config import Command
from vmette.protocol import (
    CREDIT,
    FIELD,
    FROM_GUEST,
    HEADER,
    MAX_CONTROL,
    MAX_DATA,
    MAX_EXEC,
    MAX_STREAMS,
    U32,
    WINDOW,
    WINSIZE,
    Channel,
    Connection,
    ExecFlag,
    Exited,
    Failure,
    FrameType,
    Hello,
    Milestone,
    SignalFlag,
    Tag,
    decode_error,
    decode_record,
    encode_exec,
)


@pytest.fixture(scope="module")
def program() -> Path:
    return build()


@pytest.fixture
def agent(program: Path) -> Iterator[Agent]:
    """An agent that must find nothing wrong, and end without a fault when the host goes."""
    with Agent(program) as agent:
        yield agent
        agent.port.close()
        assert agent.ended() == CLEAN


# --- What a command gets --------------------------------------------------------------------------------------------


def test_hello(agent: Agent) -> None:
    agent.until(lambda: agent.hello is not None)
    assert agent.hello == Hello(AGENT_KERNEL, (Milestone("init", 1), Milestone("ready", 0x123456789ABCDEF)))


def test_hello_that_does_not_fit_is_cut_short(program: Path) -> None:
    with Agent(program, kernel="k" * 10000) as agent:
        agent.until(lambda: agent.hello is not None)
        assert agent.hello == Hello("k" * 256, ())


def test_arguments_and_environment(agent: Agent) -> None:
    argv: list[str | bytes] = ["/bin/sh", "-c", 'printf "<%s>" "$@"; env', "sh", "", "a b", b"\xff\n\x01", "*"]
    command = agent.run(*argv, env=(b"PATH=/bin:/usr/bin", b"HOME=/h", b"EMPTY=", b"TWO=x=y\n"))
    assert command.stdout.startswith(b"<><a b><\xff\n\x01><*>")
    lines = command.stdout.split(b"<*>")[1].split(b"\n")
    assert {b"PATH=/bin:/usr/bin", b"HOME=/h", b"EMPTY=", b"TWO=x=y"} <= set(lines)
    assert command.status == 0


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ((), {f"HOME={OWN_HOME}", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}),
        ((b"PATH=/usr/bin", b"X=1"), {f"HOME={OWN_HOME}", "PATH=/usr/bin", "X=1"}),
        ((b"HOME=", b"PATH=", b"HOMER=1"), {"HOME=", "PATH=", "HOMER=1"}),
    ],
)
def test_home_and_path_are_added_where_they_are_missing(
    agent: Agent, env: tuple[bytes, ...], expected: set[str]
) -> None:
    command = agent.run("/usr/bin/env", env=env)
    assert command.status == 0
    assert set(command.stdout.decode().splitlines()) == expected


def test_large_exec(agent: Agent) -> None:
    args = [noise(100_000, seed).hex()[:100_000] for seed in range(15)]
    command = agent.run("/bin/sh", "-c", 'printf "%s\\n" "$@"', "sh", *args)
    assert command.stdout.decode().splitlines() == args


@pytest.mark.parametrize(("cwd", "expected"), [(None, b"/\n"), (b"/usr", b"/usr\n"), (b"/usr/..", b"/\n")])
def test_directory(agent: Agent, cwd: bytes | None, expected: bytes) -> None:
    assert agent.run("pwd", cwd=cwd).stdout == expected


CAP_SYS_PTRACE = 19
NOBODY = pwd.getpwnam("nobody")
USERS = {OWN_USER: (os.getuid(), pwd.getpwuid(os.getuid()).pw_gid, OWN_HOME)}
if os.getuid() == 0:  # nobody else can become another
    USERS |= {
        b"nobody": (NOBODY.pw_uid, NOBODY.pw_gid, NOBODY.pw_dir),
        b"%d" % NOBODY.pw_uid: (NOBODY.pw_uid, NOBODY.pw_gid, NOBODY.pw_dir),
        b"nobody:7": (NOBODY.pw_uid, 7, NOBODY.pw_dir),
        b"nobody:root": (NOBODY.pw_uid, 0, NOBODY.pw_dir),
        b"nobody:": (NOBODY.pw_uid, NOBODY.pw_gid, NOBODY.pw_dir),
        b"0:nogroup": (0, NOBODY.pw_gid, OWN_HOME),
        b"123456": (123456, 0, "/"),
        b"123456:789": (123456, 789, "/"),
    }


@pytest.mark.parametrize("user", USERS)
def test_user(agent: Agent, user: bytes) -> None:
    uid, gid, home = USERS[user]
    groups = [str(gid)]
    if os.getuid() != 0:
        groups = [str(group) for group in sorted(os.getgroups())]
    elif user.isalnum() and uid != 123456:
        groups = [str(group) for group in sorted(os.getgrouplist(pwd.getpwuid(uid).pw_name, gid))]
    command = agent.run("/bin/sh", "-c", "grep -E '^(Uid|Gid|Groups):' /proc/self/status; echo $HOME", user=user)
    expected = ["Uid:", *[str(uid)] * 4, "Gid:", *[str(gid)] * 4, "Groups:", *groups, home]
    assert command.stdout.decode().split() == expected


def test_descriptors_and_signals_are_a_fresh_process_s(agent: Agent) -> None:
    others = [agent.start("cat", eof=False) for _ in range(3)]
    assert agent.run("ls", "/proc/self/fd").stdout.split() == [b"0", b"1", b"2", b"3"]  # the last one is its own
    _, blocked, _, ignored = agent.run("grep", "-E", "^Sig(Blk|Ign)", "/proc/self/status").stdout.split()
    assert int(blocked, 16) == 0
    assert int(ignored, 16) & 1 << (signal.SIGPIPE - 1) == 0
    pid, group, session = agent.run("cut", "-d ", "-f1,5,6", "/proc/self/stat").stdout.split()
    assert group == session == pid
    assert not any(other.end for other in others)


def test_limits_are_not_the_agent_s(agent: Agent) -> None:
    """The agent may open more files and is never killed for lack of memory; its commands are like any others."""
    assert agent.run("/bin/sh", "-c", "ulimit -Sn; ulimit -Hn").stdout.split() == [
        str(limit).encode() for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    ]
    assert agent.run("cat", "/proc/self/oom_score_adj").stdout == b"0\n"
    spare = "echo -1000 >/proc/self/oom_score_adj; read score </proc/self/oom_score_adj; echo $score"
    possible = subprocess.run(["/bin/sh", "-c", spare], capture_output=True, text=True).stdout  # takes CAP_SYS_RESOURCE
    assert Path(f"/proc/{agent.process.pid}/oom_score_adj").read_text() == possible


def test_agent_cannot_be_traced(agent: Agent) -> None:
    """Nor its descriptors be had. Root needs a capability for that which no program has; an agent that is not root is
    nothing special."""
    has_it = Path(f"/proc/{agent.process.pid}/status").read_text().partition("CapPrm:\t")[2].split()[0]
    safe = int(has_it, 16) >> CAP_SYS_PTRACE & 1
    assert agent.run("readlink", f"/proc/{agent.process.pid}/fd/0").status == safe
    assert (
        agent.run("/bin/sh", "-c", "sleep 600 & readlink /proc/$!/fd/0; result=$?; kill $!; exit $result").status == 0
    )


@pytest.mark.parametrize("cwd", [b"", b".", b"usr", b"~"])
def test_directory_that_is_not_absolute(agent: Agent, cwd: bytes) -> None:
    assert agent.run("true", cwd=cwd).failure == (errno.EINVAL, "chdir")


@pytest.mark.parametrize("flags", [16, 0x80000000, 0xFFFFFFFF])
def test_flags_that_the_agent_does_not_know(agent: Agent, flags: int) -> None:
    number = agent.connection.exec(config.Command((b"true",)))
    agent.streams[number] = command = Stream(number)
    outgoing = agent.connection.outgoing
    outgoing[-U32.size :] = U32.pack(flags)  # the last field of EXEC
    agent.wait(command)
    assert command.failure == (errno.EINVAL, "flags")


# --- Functions of the agent: the one of agent_host.c ------------------------------------------------------------------


def test_builtin(agent: Agent) -> None:
    others = [agent.start("cat", eof=False) for _ in range(3)]
    command = agent.run("show", "7", "a b", builtin=True, cwd=b"/usr", stdin=noise(MIB))
    said = f"show\n7\na b\n/usr {os.getuid()} 3 {OWN_HOME}\n".encode()  # 3 descriptors: nothing of the agent's
    assert command.stdout == said + noise(MIB)
    assert command.status == 7
    assert not any(other.end for other in others)


def test_builtin_that_cannot_start(agent: Agent) -> None:
    assert agent.run("show", builtin=True, cwd=b"/no/such").failure == (errno.ENOENT, "chdir")
    assert agent.run("show", builtin=True, user=b"no-such-user").failure == (errno.ENOENT, "user")


# --- Terminals --------------------------------------------------------------------------------------------------------


def test_terminal(agent: Agent) -> None:
    script = "stty size; test -t 0 && test -t 1 && test -t 2 && echo err >&2; ps -o tty= -p $$ >/dev/tty; tty"
    command = agent.start("/bin/sh", "-c", script, terminal=(33, 111))
    agent.wait(command)
    size, error, controlling, name = command.stdout.decode().split("\r\n")[:-1]
    assert (size, error) == ("33 111", "err")
    assert name == f"/dev/{controlling.strip()}"
    assert command.stderr == b""
    assert command.status == 0


def test_terminal_belongs_to_the_user(agent: Agent) -> None:
    command = agent.start("/bin/sh", "-c", 'stat -c %u "$(tty)"', user=OWN_USER, terminal=(1, 1))
    agent.wait(command)
    assert command.stdout == OWN_USER + b"\r\n"
    if os.getuid() == 0:
        command = agent.start("/bin/sh", "-c", 'stat -c %u "$(tty)"; echo x > $(tty)', user=b"nobody", terminal=(1, 1))
        agent.wait(command)
        assert command.stdout == b"%d\r\nx\r\n" % NOBODY.pw_uid


def test_terminal_that_changes_its_size(agent: Agent) -> None:
    script = "trap 'stty size; exit' WINCH; echo ready; while :; do sleep 0.01; done"
    command = agent.start("/bin/sh", "-c", script, terminal=(24, 80), eof=False)
    agent.until(lambda: command.stdout == b"ready\r\n")
    agent.connection.resize(command.number, 50, 65535)
    agent.wait(command)
    assert command.stdout == b"ready\r\n50 65535\r\n"


def test_size_of_no_terminal(agent: Agent) -> None:
    command = agent.start("cat", eof=False)
    agent.connection.resize(command.number, 1, 1)
    command.eof = True
    agent.wait(command)
    assert command.status == 0


@pytest.mark.parametrize("typed", [b"", b"line\n", b"line\npart", b"part", b"line\r"])
def test_end_of_what_is_typed(agent: Agent, typed: bytes) -> None:
    command = agent.start("/bin/sh", "-c", "stty -echo; echo ready; cat; echo end", terminal=(24, 80), eof=False)
    agent.until(lambda: command.stdout == b"ready\r\n")
    command.stdin, command.eof = memoryview(typed), True
    agent.wait(command)
    heard = typed.replace(b"\r", b"\n").replace(b"\n", b"\r\n")
    assert command.stdout == b"ready\r\n" + heard + b"end\r\n"
    assert command.status == 0


def test_end_of_what_is_typed_in_raw_mode(agent: Agent) -> None:
    """It is a byte like any other there, and no input is lost."""
    script = "stty raw -echo; echo ready; head -c 1000001 | tee /dev/stderr | tail -c 2 | od -An -tx1 >&2"
    command = agent.start("/bin/sh", "-c", script, terminal=(24, 80), eof=False)
    agent.until(lambda: command.stdout == b"ready\n")
    data = noise(1_000_000)
    command.stdin, command.eof = memoryview(data), True
    agent.wait(command)
    assert command.stdout == b"ready\n" + data + b"\4" + f" {data[-1]:02x} 04\n".encode()


@pytest.mark.parametrize(("key", "number"), [(b"\x03", signal.SIGINT), (b"\x1c", signal.SIGQUIT)])
def test_keys_that_are_signals(agent: Agent, key: bytes, number: int) -> None:
    script = "ulimit -c 0; echo ready; exec sleep 600"
    command = agent.start("/bin/sh", "-c", script, terminal=(24, 80), stdin=b"", eof=False)
    agent.until(lambda: command.stdout == b"ready\r\n")
    command.stdin = memoryview(key)
    agent.wait(command)
    assert command.status == -number


@pytest.mark.parametrize("size", [1, WINDOW - 2, WINDOW, MIB])
def test_terminal_output_comes_before_the_end(agent: Agent, size: int) -> None:
    """Also when it waits for the window; and nothing that is not there is waited for."""
    script = f"head -c {size} /dev/zero | tr '\\0' x"
    commands = [agent.start("/bin/sh", "-c", script, terminal=(24, 80), reads=False) for _ in range(8)]
    agent.until(lambda: all(len(command.stdout) == min(size, WINDOW) for command in commands))
    if size <= WINDOW:
        agent.wait(*commands)
    for command in commands:
        command.reads = True
        agent.give_back(command)
    agent.wait(*commands)
    assert {command.stdout for command in commands} == {b"x" * size}
    assert {command.status for command in commands} == {0}


def test_background_that_fills_the_terminal_does_not_delay_the_end(agent: Agent) -> None:
    script = "trap '' HUP; yes & yes & exit 3"
    command = agent.start("/bin/sh", "-c", script, terminal=(24, 80))
    agent.wait(command)
    assert command.status == 3


def test_terminal_that_is_closed_and_opened_again(agent: Agent) -> None:
    script = "exec <&- >&- 2>&-; sleep 0.1; echo back >/dev/tty"
    command = agent.start("/bin/sh", "-c", script, terminal=(24, 80), eof=False)
    agent.wait(command)
    assert command.stdout == b"back\r\n"
    assert command.status == 0


def test_terminal_that_nobody_reads_hangs_up(agent: Agent) -> None:
    command = agent.start("/bin/sh", "-c", "echo ready; exec sleep 600", terminal=(24, 80), eof=False)
    agent.until(lambda: command.stdout == b"ready\r\n")
    agent.connection.send_eof(command.number, Channel.STDERR)  # it has none
    agent.connection.send_eof(command.number, Channel.STDOUT)
    agent.wait(command)
    assert command.status == -signal.SIGHUP


# --- An init of its own -----------------------------------------------------------------------------------------------

OWN_PIDS = str(Path("/proc/self/ns/pid").readlink()).encode()
NAMESPACES = subprocess.run(["unshare", "--pid", "--mount", "--fork", "true"], capture_output=True).returncode == 0
"""Whether whoever runs the tests may make namespaces."""


def test_init(agent: Agent) -> None:
    """The commands after it are in its namespaces, and in the agent's again when it has ended."""
    script = "mount -t tmpfs none /mnt && touch /mnt/x && echo $$ $container; ls -d /proc/[0-9]*; trap exit TERM; "
    init = agent.start("/bin/sh", "-c", script + "while :; do sleep 0.01; done", init=True)
    inside = agent.start("/bin/sh", "-c", "ls /mnt; readlink /proc/1/ns/pid /proc/self/ns/pid")
    if not NAMESPACES:
        agent.wait(init, inside)
        assert init.failure == (errno.EPERM, "init")
        return
    agent.wait(inside)
    agent.until(lambda: init.stdout.count(b"\n") >= 2)
    assert init.stdout.startswith(b"1 vmette\n/proc/1\n")
    again = agent.run("true", init=True)
    assert again.failure == (errno.EBUSY, "init")
    *_, own, self = inside.stdout.split()
    assert own == self != OWN_PIDS
    assert agent.run("ls", "/mnt").stdout == b"x\n"
    assert agent.run("show", builtin=True, cwd=b"/mnt").stdout.startswith(b"show\n/mnt ")
    left = agent.start("sleep", "600")
    agent.connection.signal(init.number, signal.SIGTERM)
    agent.wait(init, left)
    assert init.status == 0
    assert left.status == -signal.SIGKILL
    assert agent.run("readlink", "/proc/self/ns/pid").stdout.split() == [OWN_PIDS]


def test_init_that_cannot_be_executed(agent: Agent) -> None:
    expected = (errno.ENOENT, "exec") if NAMESPACES else (errno.EPERM, "init")
    for _ in range(3):
        assert agent.run("/no/such", init=True).failure == expected
        assert agent.run("true").status == 0


# --- How it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 127, 255])
def test_exit_code(agent: Agent, code: int) -> None:
    assert agent.run("/bin/sh", "-c", f"exit {code}").status == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGPIPE])
def test_death_by_signal(agent: Agent, number: int) -> None:
    assert agent.run("/bin/sh", "-c", f"kill -{number} $$").status == -number


def test_what_it_used(agent: Agent) -> None:
    little, much = (
        agent.run("true"),
        agent.run("/bin/sh", "-c", "head -c 50000000 /dev/zero | tail -c 50000000 | wc -c"),
    )
    assert isinstance(little.end, Exited)
    assert isinstance(much.end, Exited)
    assert little.end.usage is not None
    assert much.end.usage is not None
    assert 0 < little.end.usage.max_rss < 40_000_000 < much.end.usage.max_rss
    assert much.end.usage.user_seconds + much.end.usage.system_seconds > 0
    assert little.end.usage.peak_memory is None  # this host has no cgroup for the agent's commands


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["/no/such/program"], errno.ENOENT),
        (["no-such-program"], errno.ENOENT),
        ([""], errno.ENOENT),
        (["/etc/passwd"], errno.EACCES),
        (["/"], errno.EACCES),
        (["/bin/true/x"], errno.ENOTDIR),
        (["true", "x" * 200_000], errno.E2BIG),
    ],
)
def test_program_that_cannot_be_executed(agent: Agent, argv: list[str], error: int) -> None:
    assert agent.run(*argv).failure == (error, "exec")
    assert agent.run("true").status == 0


def test_path_of_the_environment_is_searched(agent: Agent) -> None:
    assert agent.run("true", env=(b"PATH=/nowhere",)).failure == (errno.ENOENT, "exec")


@pytest.mark.parametrize(("cwd", "error"), [(b"/no/such/dir", errno.ENOENT), (b"/bin/true", errno.ENOTDIR)])
def test_directory_that_cannot_be_entered(agent: Agent, cwd: bytes, error: int) -> None:
    assert agent.run("true", cwd=cwd).failure == (error, "chdir")


@pytest.mark.parametrize(
    ("user", "error", "stage"),
    [
        (b"no-such-user", errno.ENOENT, "user"),
        (b"", errno.ENOENT, "user"),
        (b":0", errno.ENOENT, "user"),
        (b"-1", errno.ENOENT, "user"),
        (b"4294967295", errno.ENOENT, "user"),  # (uid_t)-1 would mean: leave it as it is
        (b"u" * 256, errno.ENAMETOOLONG, "user"),
        (OWN_USER + b":no-such-group", errno.ENOENT, "group"),
        (OWN_USER + b":4294967295", errno.ENOENT, "group"),
        (OWN_USER + b":0:0", errno.ENOENT, "group"),
    ],
)
def test_user_that_there_is_not(agent: Agent, user: bytes, error: int, stage: str) -> None:
    assert agent.run("true", user=user).failure == (error, stage)


@pytest.mark.parametrize("builtin", [False, True])
def test_start_that_is_announced(agent: Agent, builtin: bool) -> None:
    command = agent.start("cat", announced=True, builtin=builtin, stdin=b"x", eof=False)
    agent.until(lambda: command.opened and command.stdout.endswith(b"x"))
    command.eof = True
    agent.wait(command)
    assert command.status == 0
    assert not agent.run("true").opened


def test_start_that_fails_is_not_announced(agent: Agent) -> None:
    command = agent.start("/no/such", announced=True)
    agent.wait(command)
    assert command.failure == (errno.ENOENT, "exec")
    assert not command.opened


# --- Its streams -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, PIPE, WINDOW, WINDOW + 1, 5 * MIB + 3])
def test_stdin_and_stdout_byte_for_byte(agent: Agent, size: int) -> None:
    data = noise(size)
    command = agent.run("cat", stdin=data)
    assert command.stdout == data
    assert command.stderr == b""
    assert command.status == 0


def test_stdout_and_stderr_apart(agent: Agent) -> None:
    data = noise(2 * MIB)
    command = agent.run("/bin/sh", "-c", "tee /dev/stderr", stdin=data)
    assert command.stdout == data
    assert command.stderr == data


def test_eof_that_comes_alone(agent: Agent) -> None:
    command = agent.start("cat", stdin=b"x", eof=False)
    agent.until(lambda: command.stdout == b"x" and agent.connection.stdin_room(command.number) == WINDOW)
    command.eof = True
    agent.wait(command)
    assert command.status == 0


@pytest.mark.parametrize("size", [1, WINDOW])
def test_stdin_that_the_command_has_closed_is_dropped(agent: Agent, size: int) -> None:
    command = agent.start("/bin/sh", "-c", "exec <&-; echo closed; exec sleep 600", eof=False)
    agent.until(lambda: command.stdout == b"closed\n")
    for _ in range(3):
        command.stdin = memoryview(noise(size))
        agent.until(lambda: not command.stdin and agent.connection.stdin_room(command.number) == WINDOW)


@pytest.mark.parametrize("size", [1, 1 << 16, MIB])
def test_output_written_before_the_end_comes_before_it(agent: Agent, size: int) -> None:
    commands = [
        agent.start("/bin/sh", "-c", f"head -c {size} /dev/zero | tee /dev/stderr", reads=False) for _ in range(8)
    ]
    agent.until(lambda: all(len(command.stdout) == min(size, WINDOW) for command in commands))
    for command in commands:
        command.reads = True
        agent.give_back(command)
    agent.wait(*commands)
    for command in commands:
        assert command.stdout == command.stderr == bytes(size)
        assert command.status == 0


@pytest.mark.parametrize("channel", [Channel.STDOUT, Channel.STDERR])
def test_output_that_nobody_reads(agent: Agent, channel: Channel) -> None:
    """The command finds out by SIGPIPE; its other output goes on."""
    script = "yes >&2; echo $?" if channel is Channel.STDERR else "yes; echo $? >&2"
    command = agent.start("/bin/sh", "-c", script, reads=False)
    agent.until(lambda: len(command.data[channel]) == WINDOW)
    agent.connection.send_eof(command.number, channel)
    agent.wait(command)
    other = command.stdout if channel is Channel.STDERR else command.stderr
    assert other == b"%d\n" % (128 + signal.SIGPIPE)
    assert command.status == 0


def test_small_window(agent: Agent) -> None:
    """The host may give back as little as it likes."""
    command = agent.start("head", "-c", str(WINDOW + 10), "/dev/zero", reads=False)
    agent.until(lambda: len(command.stdout) == WINDOW)
    for size in range(WINDOW, WINDOW + 10):
        assert len(command.stdout) == size
        assert command.end is None
        agent.port.sendall(frame(FrameType.WINDOW, command.number, CREDIT.pack(Channel.STDOUT, 1)))
        agent.connection._streams[command.number].windows[Channel.STDOUT] += 1
        while len(command.stdout) == size:
            agent.turn()
    agent.wait(command)


def test_background_that_holds_the_pipe_does_not_delay_the_end(agent: Agent) -> None:
    command = agent.run("/bin/sh", "-c", "sleep 600 & echo $!")
    assert command.status == 0
    assert exists(int(command.stdout))


@pytest.mark.parametrize("redirect", ["", ">&2"])
def test_background_that_fills_the_pipe_does_not_delay_the_end(agent: Agent, redirect: str) -> None:
    script = f"for i in 1 2 3 4; do cat /dev/zero {redirect} & done; exit 3"
    command = agent.start("/bin/sh", "-c", script)
    # The end comes after what the pipe holds then, a megabyte; before it, the shell may be slow to get its turn.
    agent.until(lambda: command.end is not None or len(command.stdout) + len(command.stderr) > 256 * MIB)
    assert command.status == 3


# --- Many at once ----------------------------------------------------------------------------------------------------


def test_as_many_commands_as_there_may_be_and_one_more(agent: Agent) -> None:
    cats = [agent.start("cat", eof=False) for _ in range(MAX_STREAMS)]
    assert agent.run("true").failure == (errno.EAGAIN, "fork")
    cats[17].eof = True
    agent.wait(cats[17])
    assert agent.run("true").status == 0
    for index, cat in enumerate(cats):
        if index != 17:
            cat.stdin = memoryview(noise(100_000, index))
            cat.eof = True
    agent.wait(*cats)
    assert all(cat.stdout == (b"" if index == 17 else noise(100_000, index)) for index, cat in enumerate(cats))


def test_stream_number_is_free_after_the_end(agent: Agent) -> None:
    for argv in (["true"], ["/no/such"], ["cat"]):
        agent.connection._last_stream = 0  # our host never uses a number again; others may
        command = agent.run(*argv, stdin=b"again")
        assert command.number == 1
    assert command.stdout == b"again"


def test_command_that_nobody_reads_stalls_no_other(agent: Agent) -> None:
    slow = [agent.start("yes", reads=False) for _ in range(10)]
    agent.until(lambda: all(len(command.stdout) == WINDOW for command in slow))
    data = noise(2 * MIB)
    assert agent.run("cat", stdin=data).stdout == data
    assert all(len(command.stdout) == WINDOW for command in slow)


def test_command_that_does_not_read_stalls_no_other(agent: Agent) -> None:
    deaf = [agent.start("sleep", "600", stdin=bytes(MIB)) for _ in range(10)]
    agent.until(lambda: all(len(command.stdin) == MIB - WINDOW - PIPE for command in deaf))
    data = noise(2 * MIB)
    assert agent.run("cat", stdin=data).stdout == data
    assert all(len(command.stdin) == MIB - WINDOW - PIPE for command in deaf)


def test_every_command_is_answered_when_the_host_reads_late(agent: Agent) -> None:
    """There are more answers than the port and all buffers have room for, full of output as they are."""
    floods = fill_the_port(agent)
    failing = [agent.start("/no/such") for _ in range(2000)]
    agent.port.sendall(agent.connection.outgoing)
    agent.connection.outgoing.clear()
    eventually(lambda: waits_for_room(agent))
    agent.wait(*failing)
    assert {command.failure for command in failing} <= {(errno.ENOENT, "exec"), (errno.EAGAIN, "fork")}
    assert not any(command.end for command in floods)


def test_nothing_is_left_open(agent: Agent) -> None:
    before = descriptors(agent)
    for _ in range(3):
        commands = [agent.start(path, stdin=b"x") for path in ("cat", "/no/such", "true") * 30]
        agent.wait(*commands)
    assert descriptors(agent) == before


@pytest.mark.parametrize("pipes", [0, 1, 3])
def test_no_descriptors_for_another_command(agent: Agent, pipes: int) -> None:
    """It needs four pipes, and gets `pipes`."""
    before = descriptors(agent)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [fd for fd in range(20) if fd not in before]
    resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE, (free[2 * pipes], hard))
    assert agent.run("true").failure == (errno.EMFILE, "fork")
    assert descriptors(agent) == before
    resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert agent.run("true").status == 0


# --- Signals and processes -------------------------------------------------------------------------------------------


def test_signal_to_all(agent: Agent) -> None:
    """Here there is no cgroup, and it is the process group that is killed: whatever the signal is."""
    command = agent.start("/bin/sh", "-c", "trap '' TERM; sleep 600 & echo $!; wait")
    agent.until(lambda: command.stdout.endswith(b"\n"))
    agent.connection.signal(command.number, signal.SIGTERM, SignalFlag.ALL)
    agent.wait(command)
    assert command.status == -signal.SIGKILL
    eventually(lambda: not exists(int(command.stdout)))


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, 64])
def test_signal(agent: Agent, number: int, group: bool) -> None:
    command = agent.start("/bin/sh", "-c", "sleep 600 & echo $!; wait")
    agent.until(lambda: command.stdout.endswith(b"\n"))
    agent.connection.signal(command.number, number, SignalFlag.GROUP if group else SignalFlag.PROCESS)
    agent.wait(command)
    assert command.status == -number
    child = int(command.stdout)
    if group:
        eventually(lambda: not exists(child))
    else:
        assert exists(child)


def test_signal_that_comes_with_its_command(agent: Agent) -> None:
    """Before the child is in a group of its own, before it has executed anything."""
    commands = []
    for _ in range(30):
        commands.append(agent.start("sleep", "600"))
        agent.connection.signal(commands[-1].number, signal.SIGKILL)
    agent.wait(*commands)
    assert {command.status for command in commands} == {-signal.SIGKILL}


def test_command_that_is_stopped_goes_on(agent: Agent) -> None:
    command = agent.start("cat", eof=False)
    agent.connection.signal(command.number, signal.SIGSTOP)
    agent.connection.signal(command.number, signal.SIGCONT)
    command.eof = True
    agent.wait(command)
    assert command.status == 0


def test_orphans_are_reaped(agent: Agent) -> None:
    command = agent.run("/bin/sh", "-c", "for i in 1 2 3 4 5; do (true & echo $!); done")
    orphans = [int(pid) for pid in command.stdout.split()]
    assert len(orphans) == 5
    eventually(lambda: not any(map(exists, orphans)))


@pytest.mark.parametrize("how", ["shutdown", "close", "half-close"])
@pytest.mark.parametrize("reads", [False, True])
def test_end_of_the_machine(agent: Agent, how: str, reads: bool) -> None:
    """Commands that run, and output that nobody takes, do not hold the agent up."""
    command = agent.start("/bin/sh", "-c", "echo $$; exec sleep 600", eof=False)
    agent.until(lambda: command.stdout.endswith(b"\n"))
    if not reads:
        fill_the_port(agent)
    if how == "shutdown":
        agent.port.sendall(frame(FrameType.SHUTDOWN, 0))
    elif how == "close":
        agent.port.close()
    else:
        agent.port.shutdown(socket.SHUT_WR)
    if how != "close":  # an agent whose output waits need not look at its input
        drain(agent.port)
    assert agent.ended() == CLEAN
    assert agent.left == 0


def test_host_that_only_writes(agent: Agent) -> None:
    """The agent is told by a write that fails, for no read does."""
    agent.until(lambda: agent.hello is not None)
    agent.port.shutdown(socket.SHUT_RD)
    agent.port.sendall(exec_frame(b"true"))
    assert agent.ended() == CLEAN


def test_broken_protocol_when_the_port_is_full(program: Path) -> None:
    """The report must not begin within the frame that was on its way."""
    with Agent(program) as agent:
        fill_the_port(agent)
        agent.port.sendall(frame(0, 0))
        *_, last = parse(drain(agent.port), whole=True)
        assert (last.kind, last.stream) == (FrameType.ERROR, 0)
        assert agent.ended() == BROKEN
        assert agent.left == 0


def fill_the_port(agent: Agent) -> list[Stream]:
    """Commands that write much, and nobody reads yet."""
    agent.until(lambda: agent.hello is not None)
    commands = [agent.start("yes") for _ in range(10)]
    agent.port.sendall(agent.connection.outgoing)
    agent.connection.outgoing.clear()
    eventually(lambda: waits_for_room(agent))
    return commands


def waits_for_room(agent: Agent) -> bool:
    """Whether the agent sleeps because the port takes no more."""
    queued = int(struct.unpack("i", fcntl.ioctl(agent.port, termios.FIONREAD, bytes(4)))[0])
    state = Path(f"/proc/{agent.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    return queued > 100_000 and state == "S"


@pytest.mark.parametrize("text", ["cannot mount it", "", "x" * 5000])
def test_report(program: Path, text: str) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs, spawn(program, "report", theirs, "19", "mount", text) as process:
            _, said = process.communicate(timeout=PATIENCE)
        assert (process.returncode, said) == (0, b"")
        assert list(Connection().receive(drain(ours))) == [Failure(0, errno.ENODEV, "mount", text[:1024])]


# --- A host that breaks the protocol ---------------------------------------------------------------------------------


SLEEP = exec_frame(b"/bin/sleep", b"600")
TRUE = (Tag.ARG, b"/bin/true")
VERSION_1 = (Tag.VERSION, U32.pack(1))
FROM_HOST = {
    FrameType.EXEC: fields(TRUE),
    FrameType.STDIN: b"x",
    FrameType.EOF: b"\0",
    FrameType.WINDOW: CREDIT.pack(1, 0),
    FrameType.SIGNAL: b"\x0f\0",
    FrameType.RESIZE: WINSIZE.pack(24, 80),
    FrameType.CONNECT: fields((Tag.ADDRESS, b"unix:/no/such")),
    FrameType.LISTEN: fields((Tag.ADDRESS, b"unix:/no/such/socket")),
}
"""A good frame's payload for each type that concerns a stream."""

LIMITS = {FrameType.EXEC: MAX_EXEC, FrameType.STDIN: MAX_DATA}
OPENING = (FrameType.EXEC, FrameType.CONNECT, FrameType.LISTEN)
LISTENING = frame(FrameType.LISTEN, 1, fields((Tag.ADDRESS, b"tcp:127.0.0.1:0")))

BROKEN_SESSIONS = {
    "hello with another version": frame(FrameType.HELLO, 0, fields((Tag.VERSION, U32.pack(2)))),
    "hello without a version": frame(FrameType.HELLO, 0),
    "hello with a short version": frame(FrameType.HELLO, 0, fields((Tag.VERSION, b"\1\0\0"))),
    "hello on a stream": frame(FrameType.HELLO, 1, fields(VERSION_1)),
    "hello that is no record": frame(FrameType.HELLO, 0, fields(VERSION_1) + b"\0"),
    "hello twice": HELLO + HELLO,
    "waking without a pause": HELLO + WAKING,
    "waking as the first thing": WAKING,
    "waking with another version": HELLO
    + PAUSE
    + frame(FrameType.HELLO, 0, fields((Tag.VERSION, U32.pack(2)), (Tag.SEED, WAKING_FIELDS[Tag.SEED]))),
    "waking with half a name": HELLO
    + PAUSE
    + frame(FrameType.HELLO, 0, fields(*{**WAKING_FIELDS, Tag.HOSTNAME: b"wo\0ken"}.items())),
    "waking with too many shares": HELLO
    + PAUSE
    + frame(FrameType.HELLO, 0, fields(*WAKING_FIELDS.items(), *[(Tag.SHARE, b"9p:s:ro")] * 40)),
    "an ordinary hello in a pause": HELLO + PAUSE + HELLO,
    "a command in a pause": HELLO + PAUSE + SLEEP,
    "a pause in a pause": HELLO + PAUSE + PAUSE,
    "a pause on a stream": HELLO + frame(FrameType.PAUSE, 1),
    "a pause with a payload": HELLO + frame(FrameType.PAUSE, 0, b"x"),
    "going on without a pause": HELLO + frame(FrameType.RESUME, 0),
    "going on on a stream": HELLO + PAUSE + frame(FrameType.RESUME, 1),
    "shutdown before hello": frame(FrameType.SHUTDOWN, 0),
    "shutdown on a stream": HELLO + frame(FrameType.SHUTDOWN, 1),
    "shutdown with a payload": HELLO + frame(FrameType.SHUTDOWN, 0, b"x"),
    **{f"{kind.name} before hello": frame(kind, 1, payload) for kind, payload in FROM_HOST.items()},
    **{f"{kind.name} on stream 0": HELLO + frame(kind, 0, payload) for kind, payload in FROM_HOST.items()},
    **{
        f"type {kind}": HELLO + SLEEP + frame(kind, 1)
        for kind in (
            0,
            FrameType.ERROR,
            FrameType.STDOUT,
            FrameType.STDERR,
            FrameType.EXIT,
            FrameType.OPENED,
            FrameType.ACCEPTED,
            17,
            255,
        )
    },
    **{
        f"reserved {reserved:#08x}": HELLO + frame(FrameType.EXEC, 1, fields(TRUE), reserved=reserved)
        for reserved in (1, 0x100, 0x800000)
    },
    **{
        f"{kind.name} of {length} bytes": HELLO + frame(kind, 1, length=length)
        for kind in (*FROM_HOST, FrameType.SHUTDOWN)
        for length in (LIMITS.get(kind, MAX_CONTROL) + 1, 0x7FFFFFFF, 0xFFFFFFFF)
    },
    **{f"{kind.name} of a stream that is open": HELLO + SLEEP + frame(kind, 1, FROM_HOST[kind]) for kind in OPENING},
    **{
        f"{kind.name} with a number of the guest's": HELLO + frame(kind, FROM_GUEST | 1, FROM_HOST[kind])
        for kind in OPENING
    },
    **{
        f"{kind.name} {what}": HELLO + frame(kind, 1, payload)
        for kind in (FrameType.CONNECT, FrameType.LISTEN)
        for what, payload in {
            "without an address": fields(TRUE),
            "without a payload": b"",
            "that is no record": FROM_HOST[kind] + b"\0",
        }.items()
    },
    **{
        f"{kind.name} to a listener": HELLO + LISTENING + frame(kind, 1, FROM_HOST[kind])
        for kind in (FrameType.STDIN, FrameType.EOF)
    },
    **{
        f"exec with {tag.name} of {length} bytes": HELLO + frame(FrameType.EXEC, 1, fields(TRUE, (tag, bytes(length))))
        for tag in (Tag.FLAGS, Tag.WINSIZE)
        for length in (0, 3, 5)
    },
    **{f"resize of {length} bytes": HELLO + SLEEP + frame(FrameType.RESIZE, 1, bytes(length)) for length in (0, 3, 5)},
    "exec without a payload": HELLO + frame(FrameType.EXEC, 1),
    "exec without arguments": HELLO + frame(FrameType.EXEC, 1, fields((Tag.ENV, b"A=B"), (Tag.CWD, b"/"))),
    **{
        f"exec with a NUL in {tag.name}": HELLO + frame(FrameType.EXEC, 1, fields(TRUE, (tag, value)))
        for tag, value in {Tag.ARG: b"a\0", Tag.ENV: b"A=\0B", Tag.CWD: b"/\0", Tag.USER: b"\0"}.items()
    },
    **{
        f"exec of {size} bytes with {name}": HELLO
        + frame(FrameType.EXEC, 1, fields(TRUE, (Tag.ENV, b"x" * size)) + rest)
        for size in (0, 70_000)  # within the agent's input, and in a block of its own
        for name, rest in {
            "half a field": FIELD.pack(Tag.ARG, 0, 0)[:-1],
            "a field beyond the payload": FIELD.pack(Tag.ARG, 0, 1),
            "a field of 4 GiB": FIELD.pack(Tag.ARG, 0, 0xFFFFFFFF) + b"x",
            "a field whose end wraps": FIELD.pack(Tag.ARG, 0, 0xFFFFFFF8) + b"x",
            "a field with reserved bytes": FIELD.pack(Tag.ARG, 1, 1) + b"x",
        }.items()
    },
    "stdin beyond the window": HELLO
    + SLEEP
    + frame(FrameType.STDIN, 1, bytes(MAX_DATA)) * 5
    + frame(FrameType.STDIN, 1, b"x"),
    "empty stdin": HELLO + SLEEP + frame(FrameType.STDIN, 1),
    "stdin after its end": HELLO + SLEEP + frame(FrameType.EOF, 1, b"\0") + frame(FrameType.STDIN, 1, b"x"),
    **{
        f"end of channel {payload.hex()}": HELLO + SLEEP + frame(FrameType.EOF, 1, payload)
        for payload in (b"", b"\3", b"\xff", b"\0\0")
    },
    **{
        f"window {payload.hex()}": HELLO + SLEEP + frame(FrameType.WINDOW, 1, payload)
        for payload in (
            b"",
            CREDIT.pack(1, 0)[:-1],
            CREDIT.pack(1, 0) + b"\0",
            CREDIT.pack(0, 0),
            CREDIT.pack(3, 0),
            CREDIT.pack(1, 1),
            CREDIT.pack(2, WINDOW),
            CREDIT.pack(1, 0xFFFFFFFF),
        )
    },
    **{
        f"signal {payload.hex()}": HELLO + SLEEP + frame(FrameType.SIGNAL, 1, payload)
        for payload in (b"", b"\x0f", b"\x0f\0\0", b"\0\1", b"\x41\1", b"\xff\0")
    },
}


@pytest.mark.parametrize("data", BROKEN_SESSIONS.values(), ids=BROKEN_SESSIONS.keys())
def test_broken_protocol(program: Path, data: bytes) -> None:
    status, _ = converse(program, data)
    assert status == BROKEN


@pytest.mark.parametrize("kind", [kind for kind in FROM_HOST if kind not in OPENING])
def test_frame_for_a_command_that_has_ended_is_ignored(agent: Agent, kind: FrameType) -> None:
    agent.run("true")
    agent.port.sendall(frame(kind, 1, FROM_HOST[kind]))
    assert agent.run("true").status == 0


# --- A machine that was saved, and wakes


class Host:
    """The host's side of an agent's port, frame by frame."""

    def __init__(self, program: Path) -> None:
        self.port, theirs = socket.socketpair()
        self.port.settimeout(PATIENCE)
        with theirs:
            self.process = spawn(program, "serve", theirs, AGENT_KERNEL)
        self._rest = b""

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *args: object) -> None:
        self.port.close()
        self.process.wait(PATIENCE)
        self.process.__exit__(None, None, None)

    def say(self, *frames: bytes) -> None:
        self.port.sendall(b"".join(frames))

    def hear(self, *expected: FrameType) -> list[bytes]:
        """The payloads of the next frames, which are of these types (and windows in between)."""
        payloads = []
        for kind in expected:
            while (heard := self._frame())[0] == FrameType.WINDOW:
                pass
            assert heard[0] == kind, heard
            payloads.append(heard[1])
        return payloads

    def pause(self) -> None:
        """Has it fall silent."""
        self.say(PAUSE)
        while self._frame()[0] != FrameType.PAUSE:
            pass

    def _frame(self) -> tuple[int, bytes]:
        while len(self._rest) < HEADER.size or len(self._rest) < HEADER.size + HEADER.unpack_from(self._rest)[4]:
            data = self.port.recv(65536)
            assert data
            self._rest += data
        kind, _, _, _, size = HEADER.unpack_from(self._rest)
        payload = self._rest[HEADER.size : HEADER.size + size]
        self._rest = self._rest[HEADER.size + size :]
        return kind, payload

    def is_silent(self) -> bool:
        """Whether the agent says nothing for a while."""
        return not self._rest and not select.select([self.port], [], [], 0.3)[0]

    def end(self) -> None:
        """Ends it, and checks that it has nothing more to say."""
        self.say(frame(FrameType.SHUTDOWN, 0))
        assert self.process.wait(PATIENCE) == CLEAN
        assert self._rest + self.port.recv(65536) == b""


def test_one_that_wakes_says_hello_again(program: Path) -> None:
    with Host(program) as host:
        host.say(HELLO, PAUSE)
        first, _ = host.hear(FrameType.HELLO, FrameType.PAUSE)
        for _ in range(3):
            host.say(WAKING, PAUSE)
            again, nothing = host.hear(FrameType.HELLO, FrameType.PAUSE)
            (hello,) = Connection().receive(HEADER.pack(FrameType.HELLO, 0, 0, 0, len(again)) + again)
            assert hello == Hello(AGENT_KERNEL, ())
            assert len(again) < len(first)
            assert nothing == b""
        host.end()


@pytest.mark.parametrize("tag", [Tag.SEED, Tag.CLOCK, Tag.HOSTNAME, Tag.SHARE])
def test_what_cannot_be_done_at_waking_is_told(program: Path, tag: Tag) -> None:
    """(The stand-in for init.c's part takes these values alone.)"""
    wrong = {**WAKING_FIELDS, tag: bytes(63) if tag == Tag.SEED else WAKING_FIELDS[tag][:-1] + b"x"}
    with Host(program) as host:
        host.say(HELLO, PAUSE, frame(FrameType.HELLO, 0, fields((Tag.SHARE, b"9p:share0:rw:/a"), *wrong.items())))
        *_, told = host.hear(FrameType.HELLO, FrameType.PAUSE, FrameType.ERROR)
        number = {Tag.HOSTNAME: errno.EPERM, Tag.SHARE: errno.ENODEV}.get(tag, errno.EINVAL)
        stage = "shares" if tag == Tag.SHARE else "hostname"
        assert decode_error(0, told) == Failure(0, number, stage, os.strerror(number))
        host.end()


def children(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


CHATTER = exec_frame(b"sh", b"-c", b"while echo x; do sleep 0.01; done")


def test_one_that_pauses_says_nothing_until_it_goes_on(program: Path) -> None:
    with Host(program) as host:
        host.say(HELLO, CHATTER)
        host.hear(FrameType.HELLO, FrameType.STDOUT)
        host.pause()
        assert host.is_silent()
        host.say(frame(FrameType.RESUME, 0))
        host.hear(FrameType.STDOUT, FrameType.STDOUT)


def test_a_command_goes_on_after_a_pause(program: Path) -> None:
    with Host(program) as host:
        host.say(HELLO, exec_frame(b"sh", b"-c", b"read -r line; echo $line"), PAUSE)
        host.hear(FrameType.HELLO, FrameType.PAUSE)
        assert host.is_silent()
        host.say(frame(FrameType.RESUME, 0), frame(FrameType.STDIN, 1, b"text\n"))
        assert host.hear(FrameType.STDOUT, FrameType.EXIT)[0] == b"text\n"
        host.end()


def test_what_another_host_had_open_is_gone_when_it_wakes(program: Path, tmp_path: Path) -> None:
    """Commands go on, with their input at its end and their output going nowhere."""
    lines = f"cat >/dev/null; yes | head -c 1000000; yes | head -c 1000000 >&2; echo done >{tmp_path}/done"
    listening = socket.create_server(("127.0.0.1", 0))
    address = f"tcp:127.0.0.1:{listening.getsockname()[1]}".encode()
    with listening, Host(program) as host:
        host.say(HELLO, exec_frame(b"sh", b"-c", lines.encode()), frame(FrameType.STDIN, 1, b"half a li"))
        host.say(frame(FrameType.CONNECT, 2, fields((Tag.ADDRESS, address))))
        host.hear(FrameType.HELLO)
        connection, _ = listening.accept()
        host.pause()
        assert not (tmp_path / "done").exists()
        host.say(WAKING, exec_frame(b"echo", b"new"))  # under a number that the other host had in use
        _, output, _ = host.hear(FrameType.HELLO, FrameType.STDOUT, FrameType.EXIT)
        assert output == b"new\n"
        with connection, pytest.raises(ConnectionResetError):
            connection.recv(1)
        eventually(lambda: (tmp_path / "done").exists())
        host.end()


def test_a_function_of_the_agent_does_not_outlive_its_host(program: Path) -> None:
    """It might take the end of its input for the whole."""
    with Host(program) as host:
        host.say(HELLO, frame(FrameType.EXEC, 1, fields((Tag.ARG, b"copy"), (Tag.FLAGS, U32.pack(ExecFlag.BUILTIN)))))
        host.hear(FrameType.HELLO)
        eventually(lambda: len(children(host.process.pid)) == 1)
        function = children(host.process.pid)
        host.pause()
        host.say(WAKING)
        host.hear(FrameType.HELLO)
        eventually(lambda: not {*function} & {*children(host.process.pid)})
        host.end()


def test_a_terminal_hangs_up_when_its_host_is_gone(program: Path, tmp_path: Path) -> None:
    script = f"trap 'echo hung up >{tmp_path}/told; exit' HUP; echo ready; while :; do sleep 0.05; done"
    request = encode_exec(Command((b"sh", b"-c", script.encode()), terminal=(24, 80)))
    with Host(program) as host:
        host.say(HELLO, frame(FrameType.EXEC, 1, request))
        host.hear(FrameType.HELLO, FrameType.STDOUT)
        host.say(PAUSE)
        host.hear(FrameType.PAUSE)
        host.say(WAKING)
        host.hear(FrameType.HELLO)
        eventually(lambda: (tmp_path / "told").exists())
        host.end()


def paused(host: Host) -> str:
    """The number of the process that the agent has ready for the next command, once it is told to pause."""
    host.say(HELLO)
    host.hear(FrameType.HELLO)
    host.pause()
    (spare,) = children(host.process.pid)
    return spare


@pytest.mark.parametrize("next_host", [WAKING, frame(FrameType.RESUME, 0)], ids=["another", "the same"])
def test_the_first_command_after_a_pause_is_a_process_that_was_there(program: Path, next_host: bytes) -> None:
    script = b'read -r line; echo "$$ $0 $line $A $PWD"; echo error >&2; exit 3'
    request = encode_exec(Command((b"sh", b"-c", script, b"x"), (b"A=b",), b"/tmp", OWN_USER))
    with Host(program) as host:
        spare = paused(host)
        host.say(next_host, frame(FrameType.EXEC, 1, request), frame(FrameType.STDIN, 1, b"text\n"))
        if next_host == WAKING:
            host.hear(FrameType.HELLO)
        output, error, ending = host.hear(FrameType.STDOUT, FrameType.STDERR, FrameType.EXIT)
        assert output.decode() == f"{spare} x text b /tmp\n"
        assert error == b"error\n"
        assert dict(decode_record(ending))[Tag.CODE] == U32.pack(3)
        host.say(exec_frame(b"sh", b"-c", b"echo $$"))
        assert host.hear(FrameType.STDOUT, FrameType.EXIT)[0].strip() != spare.encode()
        host.end()


@pytest.mark.parametrize(
    ("request_", "stage", "error"),
    [
        (Command((b"no-such-program",), user=OWN_USER), b"exec", errno.ENOENT),
        (Command((b"true",), cwd=b"/no/such", user=OWN_USER), b"chdir", errno.ENOENT),
        (Command((b"true",), user=b"no-such-user"), b"user", errno.ENOENT),
    ],
)
def test_it_tells_why_it_cannot_become_the_command(program: Path, request_: Command, stage: bytes, error: int) -> None:
    with Host(program) as host:
        paused(host)
        host.say(WAKING, frame(FrameType.EXEC, 1, encode_exec(request_)))
        _, told = host.hear(FrameType.HELLO, FrameType.ERROR)
        record = dict(decode_record(told))
        assert (record[Tag.STAGE], record[Tag.ERRNO]) == (stage, U32.pack(error))
        host.end()


@pytest.mark.parametrize(
    "request_",
    [
        Command((b"sh", b"-c", b"echo $$", b"x" * 5000), user=OWN_USER),
        Command((b"sh", b"-c", b"echo $$"), user=OWN_USER, terminal=(24, 80)),
    ],
    ids=["large", "terminal"],
)
def test_a_command_that_it_cannot_be_is_another_process(program: Path, request_: Command) -> None:
    with Host(program) as host:
        spare = paused(host)
        host.say(WAKING, frame(FrameType.EXEC, 1, encode_exec(request_)))
        _, output, _ = host.hear(FrameType.HELLO, FrameType.STDOUT, FrameType.EXIT)
        assert output.strip() not in {b"", spare.encode()}
        eventually(lambda: spare not in children(host.process.pid))
        host.end()


@pytest.mark.parametrize("when", ["before", "after"], ids=["asleep", "awake"])
def test_nothing_is_lost_when_somebody_kills_it(program: Path, when: str) -> None:
    with Host(program) as host:
        spare = paused(host)
        if when == "before":
            os.kill(int(spare), signal.SIGKILL)
        host.say(WAKING)
        host.hear(FrameType.HELLO)
        if when == "after":
            os.kill(int(spare), signal.SIGKILL)
        eventually(lambda: spare not in children(host.process.pid))
        host.say(exec_frame(b"echo", b"fine"))
        assert host.hear(FrameType.STDOUT, FrameType.EXIT)[0] == b"fine\n"
        host.end()


def test_it_goes_with_the_agent(program: Path) -> None:
    with Host(program) as host:
        spare = paused(host)
        host.say(WAKING)
        host.hear(FrameType.HELLO)
        host.end()
        eventually(lambda: not Path("/proc", spare).exists())


def test_fields_that_the_agent_does_not_know_are_ignored(program: Path) -> None:
    unknown = FIELD.pack(999, 0, 3) + b"\0?\0"
    hello = frame(FrameType.HELLO, 0, unknown + fields(VERSION_1))
    status, _ = converse(program, hello + frame(FrameType.EXEC, 1, unknown + fields(TRUE)))
    assert status == CLEAN


@pytest.mark.parametrize("size", [1, 65523, 65524, 65525, MAX_DATA])  # 65524: what the agent's own buffer holds
def test_frame_sizes_around_the_buffer_s(agent: Agent, size: int) -> None:
    data = noise(size)
    command = agent.run("cat", stdin=data)
    assert command.stdout == data


def test_frames_that_come_byte_by_byte(agent: Agent) -> None:
    command = agent.start("cat", stdin=b"slowly")
    agent.feed(command)
    for byte in bytes(agent.connection.outgoing):
        agent.port.sendall(bytes([byte]))
    agent.connection.outgoing.clear()
    agent.wait(command)
    assert command.stdout == b"slowly"


# --- Fuzzing. Whatever is generated, the only program that there is to run is /bin/true. ------------------------------

streams = st.sampled_from([1, 1, 1, 2, 3, 4, 0, FROM_GUEST | 1, 0xFFFFFFFF])
lengths_off = st.sampled_from([0] * 12 + [-1, 1, 8, -8, 0xFFFF])
harmless = st.sampled_from(
    [b"/bin/true", b"/", b"", b"a=b", b"HOME=", b"PATH=", b"1", b"nobody:nogroup", b"\0", b"x" * 300]
)


@st.composite
def exec_payloads(draw: st.DrawFn) -> bytes:
    payload = bytearray(fields(TRUE))
    for _ in range(draw(st.integers(0, 4))):
        tag = draw(st.sampled_from([Tag.ARG, Tag.ENV, Tag.CWD, Tag.USER, Tag.FLAGS, Tag.WINSIZE, 0, 999]))
        value = draw(st.builds(U32.pack, st.integers(0, 16)) if tag in {Tag.FLAGS, Tag.WINSIZE} else harmless)
        zero = draw(st.sampled_from([0] * 12 + [1]))
        payload += FIELD.pack(tag, zero, max(0, len(value) + draw(lengths_off))) + value
    return bytes(payload)


@st.composite
def address_payloads(draw: st.DrawFn) -> bytes:
    address = draw(
        st.sampled_from([b"tcp:127.0.0.1:0", b"tcp:[::1]:0", b"unix:/no/such/socket", b"vsock:any:", b"", b":"])
    )
    return fields((Tag.ADDRESS, address), *draw(st.sampled_from([(), (TRUE,), ((Tag.ADDRESS, b"\0"),)])))


@st.composite
def frames_of_a_host(draw: st.DrawFn) -> bytes:
    kind = draw(st.sampled_from([*FROM_HOST] * 4 + [*FrameType]))
    payloads = {
        FrameType.EXEC: exec_payloads(),
        FrameType.STDIN: st.binary(max_size=20) | st.sampled_from([bytes(MAX_DATA), bytes(MAX_DATA + 1), bytes(65524)]),
        FrameType.WINDOW: st.builds(CREDIT.pack, st.integers(0, 3), st.sampled_from([0, 1, WINDOW, 0xFFFFFFFF])),
        FrameType.SIGNAL: st.builds(
            lambda number, flags: bytes([number, flags]), st.integers(0, 66), st.integers(0, 3)
        ),
        FrameType.EOF: st.builds(lambda channel: bytes([channel]), st.integers(0, 3)),
        FrameType.RESIZE: st.just(WINSIZE.pack(1, 2)),
        FrameType.CONNECT: address_payloads(),
        FrameType.LISTEN: address_payloads(),
        FrameType.HELLO: st.just(fields(VERSION_1)),
    }
    payload = draw(payloads.get(kind, st.sampled_from([b"", b"", b"", b"x"])))
    stream = draw(streams) if kind is not FrameType.SHUTDOWN else 0
    reserved = draw(st.sampled_from([0] * 20 + [1, 0x800000]))
    return frame(kind, stream, payload, reserved=reserved, length=max(0, len(payload) + draw(lengths_off)))


@st.composite
def sessions(draw: st.DrawFn) -> bytes:
    """A session that begins well; sometimes with a piece of it cut out or doubled."""
    data = HELLO + exec_frame(b"/bin/true") + b"".join(draw(st.lists(frames_of_a_host(), max_size=8)))
    if draw(st.integers(0, 3)) == 0:
        start, end = sorted(draw(st.tuples(*[st.integers(0, min(len(data), 400))] * 2)))
        data = data[:start] + data[start:end] * draw(st.sampled_from([0, 2])) + data[end:]
    return data


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200) | st.binary(max_size=200).map(lambda rest: HELLO + rest))
def test_fuzz_with_random_bytes(program: Path, data: bytes) -> None:
    converse(program, data)


@settings(max_examples=800, deadline=None)
@given(data=sessions())
@example(data=HELLO + exec_frame(b"/bin/true") + frame(FrameType.PAUSE, 0))
def test_fuzz_with_sessions(program: Path, data: bytes) -> None:
    converse(program, data)

"""The guest agent (csrc/guest/agent.c) on this host: against the host's half of the protocol, and against nonsense."""

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
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmette import config
from vmette.protocol import (
    CREDIT,
    FIELD,
    HEADER,
    MAX_CONTROL,
    MAX_DATA,
    MAX_EXEC,
    U32,
    WINDOW,
    Channel,
    Connection,
    Event,
    Exited,
    Failure,
    FrameType,
    Hello,
    Milestone,
    Output,
    Tag,
    decode_record,
    encode_exec,
    encode_record,
)

ROOT = Path(__file__).parent.parent
SOURCES = ("tests/agent_host.c", "csrc/guest/agent.c")
COMPILE = ("cc", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-Icsrc/guest")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
WRAPPED = ("poll", "read", "write", "initgroups", "setgroups")
SANITIZER_STATUS = 99

CLEAN, BROKEN = 0, 3
"""How agent_host ends: as the host wished, or because it broke the protocol."""

MAX_STREAMS = 64
PIPE = 65536
"""What the kernel holds of a command's stdin."""

PATIENCE = 60.0
"""Seconds without any progress that mean a hang."""

MIB = 1 << 20
AGENT_KERNEL = "6.12.0-test"
HELLO = HEADER.pack(FrameType.HELLO, 0, 0, 0, 12) + encode_record([(Tag.VERSION, U32.pack(1))])
OWN_USER = str(os.getuid()).encode()
OWN_HOME = pwd.getpwuid(os.getuid()).pw_dir


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("agent") / "agent_host"
    wrap = [f"-Wl,--wrap={name}" for name in WRAPPED]
    subprocess.run([*COMPILE, *SANITIZE, *wrap, *SOURCES, "-o", output], cwd=ROOT, check=True)
    return output


@dataclass
class Command:
    """What the agent was asked to run, and what has come of it."""

    stream: int
    stdin: memoryview
    eof: bool
    """Its stdin ends after `stdin`."""
    reads: bool
    """Somebody takes its output; or else it stays in the window."""
    data: dict[Channel, bytearray] = field(
        default_factory=lambda: {Channel.STDOUT: bytearray(), Channel.STDERR: bytearray()}
    )
    held: list[Output] = field(default_factory=list)
    end: Exited | Failure | None = None

    @property
    def stdout(self) -> bytes:
        return bytes(self.data[Channel.STDOUT])

    @property
    def stderr(self) -> bytes:
        return bytes(self.data[Channel.STDERR])

    @property
    def status(self) -> int:
        """As in subprocess: negative for the signal that killed it."""
        assert isinstance(self.end, Exited), self.end
        return self.end.code if self.end.code is not None else -(self.end.signal or 0)

    @property
    def failure(self) -> tuple[int, str]:
        assert isinstance(self.end, Failure), self.end
        assert self.end.text == os.strerror(self.end.errno)
        return self.end.errno, self.end.stage


class Agent:
    """An agent that runs, and the host that it talks to."""

    def __init__(self, program: Path, kernel: str = AGENT_KERNEL) -> None:
        self.connection = Connection()
        self.hello: Hello | None = None
        self.commands: dict[int, Command] = {}
        self.left = 0
        """Processes that were still there when it had ended."""
        self.port, theirs = socket.socketpair()
        self.port.settimeout(PATIENCE)
        with theirs:
            self.process = spawn(program, "serve", theirs, kernel)

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.port.close()
        with self.process:
            self.process.kill()

    def ended(self) -> int:
        """Its exit status. A sanitizer that has something to say fails the test."""
        left, said = self.process.communicate(timeout=PATIENCE)
        assert said.decode() == ""
        self.left = int(left)
        return self.process.returncode

    def start(
        self,
        *argv: str | bytes,
        env: tuple[bytes, ...] = (),
        cwd: bytes | None = None,
        user: bytes | None = OWN_USER,
        stdin: bytes = b"",
        eof: bool = True,
        reads: bool = True,
    ) -> Command:
        stream = self.connection.exec(config.Command(tuple(os.fsencode(arg) for arg in argv), env, cwd, user))
        self.commands[stream] = Command(stream, memoryview(stdin), eof, reads)
        return self.commands[stream]

    def run(
        self,
        *argv: str | bytes,
        env: tuple[bytes, ...] = (),
        cwd: bytes | None = None,
        user: bytes | None = OWN_USER,
        stdin: bytes = b"",
    ) -> Command:
        command = self.start(*argv, env=env, cwd=cwd, user=user, stdin=stdin)
        self.wait(command)
        return command

    def wait(self, *commands: Command) -> None:
        self.until(lambda: all(command.end is not None for command in commands))

    def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.turn()

    def turn(self) -> None:
        """Moves what can be moved, both ways. Waits for the agent if nothing can."""
        for command in self.commands.values():
            self._feed(command)
        outgoing = self.connection.outgoing
        readable, writable, _ = select.select([self.port], [self.port] if outgoing else [], [], PATIENCE)
        assert readable or writable, "the agent hangs"
        if writable:
            sent = self.port.send(memoryview(outgoing)[:PIPE])
            del outgoing[:sent]
        if readable:
            data = self.port.recv(MIB)
            assert data, "the agent has closed the port"
            for event in self.connection.receive(data):
                self._take(event)

    def _feed(self, command: Command) -> None:
        piece = command.stdin[: self.connection.stdin_room(command.stream)]
        if piece:
            self.connection.send_stdin(command.stream, bytes(piece))
            command.stdin = command.stdin[len(piece) :]
        if command.eof and not command.stdin:
            self.connection.send_eof(command.stream)

    def _take(self, event: Event) -> None:
        if isinstance(event, Hello):
            self.hello = event
        elif isinstance(event, Output):
            command = self.commands[event.stream]
            assert command.end is None
            command.data[event.channel] += event.data
            command.held.append(event)
            if command.reads:
                self.give_back(command)
        elif isinstance(event, Exited | Failure):
            assert event.stream, event
            self.commands[event.stream].end = event

    def give_back(self, command: Command) -> None:
        """Takes what `command` has written out of the window."""
        for output in command.held:
            self.connection.consumed(output)
        command.held.clear()


def spawn(program: Path, mode: str, port: socket.socket, *args: str) -> subprocess.Popen[bytes]:
    """agent_host, in a session of its own: a signal to its group, by whatever mistake, is its own affair."""
    options = f"exitcode={SANITIZER_STATUS}:print_stacktrace=1:detect_stack_use_after_return=1"
    return subprocess.Popen(
        [program, mode, str(port.fileno()), *args],
        pass_fds=[port.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict.fromkeys(("ASAN_OPTIONS", "UBSAN_OPTIONS", "LSAN_OPTIONS"), options),
        start_new_session=True,
    )


@pytest.fixture
def agent(program: Path) -> Iterator[Agent]:
    """An agent that must find nothing wrong, and end without a fault when the host goes."""
    with Agent(program) as agent:
        yield agent
        agent.port.close()
        assert agent.ended() == CLEAN


def eventually(condition: Callable[[], bool]) -> None:
    """Waits for what the agent does without a word."""
    give_up = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < give_up, "it does not happen"
        time.sleep(0.002)


def exists(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def noise(size: int, seed: int = 1) -> bytes:
    """Bytes in which a piece that is lost, doubled or out of place shows."""
    return b"".join(struct.pack("<II", seed, at) for at in range(0, size, 8))[:size]


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


# --- How it ends -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [0, 1, 127, 255])
def test_exit_code(agent: Agent, code: int) -> None:
    assert agent.run("/bin/sh", "-c", f"exit {code}").status == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGPIPE])
def test_death_by_signal(agent: Agent, number: int) -> None:
    assert agent.run("/bin/sh", "-c", f"kill -{number} $$").status == -number


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
    agent.until(lambda: command.stdout == b"x" and agent.connection.stdin_room(command.stream) == WINDOW)
    command.eof = True
    agent.wait(command)
    assert command.status == 0


@pytest.mark.parametrize("size", [1, WINDOW])
def test_stdin_that_the_command_has_closed_is_dropped(agent: Agent, size: int) -> None:
    command = agent.start("/bin/sh", "-c", "exec <&-; echo closed; exec sleep 600", eof=False)
    agent.until(lambda: command.stdout == b"closed\n")
    for _ in range(3):
        command.stdin = memoryview(noise(size))
        agent.until(lambda: not command.stdin and agent.connection.stdin_room(command.stream) == WINDOW)


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


def test_small_window(agent: Agent) -> None:
    """The host may give back as little as it likes."""
    command = agent.start("head", "-c", str(WINDOW + 10), "/dev/zero", reads=False)
    agent.until(lambda: len(command.stdout) == WINDOW)
    for size in range(WINDOW, WINDOW + 10):
        assert len(command.stdout) == size
        assert command.end is None
        agent.port.sendall(frame(FrameType.WINDOW, command.stream, CREDIT.pack(Channel.STDOUT, 1)))
        agent.connection._streams[command.stream].windows[Channel.STDOUT] += 1
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
        assert command.stream == 1
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


def descriptors(agent: Agent) -> set[int]:
    agent.until(lambda: agent.hello is not None)
    return {int(path.name) for path in Path(f"/proc/{agent.process.pid}/fd").iterdir()}


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


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, 64])
def test_signal(agent: Agent, number: int, group: bool) -> None:
    command = agent.start("/bin/sh", "-c", "sleep 600 & echo $!; wait")
    agent.until(lambda: command.stdout.endswith(b"\n"))
    agent.connection.signal(command.stream, number, group=group)
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
        agent.connection.signal(commands[-1].stream, signal.SIGKILL)
    agent.wait(*commands)
    assert {command.status for command in commands} == {-signal.SIGKILL}


def test_command_that_is_stopped_goes_on(agent: Agent) -> None:
    command = agent.start("cat", eof=False)
    agent.connection.signal(command.stream, signal.SIGSTOP)
    agent.connection.signal(command.stream, signal.SIGCONT)
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


def fill_the_port(agent: Agent) -> list[Command]:
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


def drain(port: socket.socket) -> bytes:
    """All that the agent says until it ends."""
    data = bytearray()
    try:
        while piece := port.recv(MIB):
            data += piece
    except ConnectionResetError:  # it ended without having read all that it was sent
        pass
    return bytes(data)


@pytest.mark.parametrize("text", ["cannot mount it", "", "x" * 5000])
def test_report(program: Path, text: str) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs, spawn(program, "report", theirs, "19", "mount", text) as process:
            _, said = process.communicate(timeout=PATIENCE)
        assert (process.returncode, said) == (0, b"")
        assert list(Connection().receive(drain(ours))) == [Failure(0, errno.ENODEV, "mount", text[:1024])]


# --- A host that breaks the protocol ---------------------------------------------------------------------------------


class Frame(NamedTuple):
    kind: int
    stream: int
    payload: bytes


def frame(kind: int, stream: int, payload: bytes = b"", *, reserved: int = 0, length: int | None = None) -> bytes:
    header = struct.pack(
        "<B3sII", kind, reserved.to_bytes(3, "little"), stream, len(payload) if length is None else length
    )
    return header + payload


def fields(*items: tuple[Tag, bytes]) -> bytes:
    return encode_record(items)


def parse(data: bytes, *, whole: bool) -> list[Frame]:
    """The frames of the agent. It may stop within one only if the host is gone."""
    found = []
    while len(data) >= HEADER.size:
        kind, zero8, zero16, stream, length = HEADER.unpack_from(data)
        assert not zero8
        assert not zero16
        assert length <= (MAX_DATA if kind in {FrameType.STDOUT, FrameType.STDERR} else MAX_CONTROL)
        if len(data) - HEADER.size < length:
            break
        found.append(Frame(FrameType(kind), stream, data[HEADER.size : HEADER.size + length]))
        data = data[HEADER.size + length :]
    assert not (whole and data)
    return found


def converse(program: Path, data: bytes) -> tuple[int, list[Frame]]:
    """Says `data` to a new agent and nothing more; returns how it ended and what it said."""
    with Agent(program) as agent:
        try:
            agent.port.sendall(data)
            agent.port.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has heard enough
        said = drain(agent.port)
        status = agent.ended()
    frames = parse(said, whole=status == BROKEN)
    assert status in {CLEAN, BROKEN}
    assert frames[0].kind == FrameType.HELLO
    last = frames[-1]
    if status == BROKEN:
        assert (last.kind, last.stream) == (FrameType.ERROR, 0)
        record = dict(decode_record(last.payload))
        assert record[Tag.ERRNO] == U32.pack(errno.EPROTO)
        assert record[Tag.STAGE] == b"protocol"
    else:
        assert not any(each.stream == 0 for each in frames[1:])
    return status, frames


def exec_frame(*argv: bytes, stream: int = 1) -> bytes:
    return frame(FrameType.EXEC, stream, encode_exec(config.Command(argv, user=OWN_USER)))


SLEEP = exec_frame(b"/bin/sleep", b"600")
TRUE = (Tag.ARG, b"/bin/true")
VERSION_1 = (Tag.VERSION, U32.pack(1))
FROM_HOST = {
    FrameType.EXEC: fields(TRUE),
    FrameType.STDIN: b"x",
    FrameType.STDIN_EOF: b"",
    FrameType.WINDOW: CREDIT.pack(1, 0),
    FrameType.SIGNAL: b"\x0f\0",
}
"""A good frame's payload for each type that concerns a stream."""

BROKEN_SESSIONS = {
    "hello with another version": frame(FrameType.HELLO, 0, fields((Tag.VERSION, U32.pack(2)))),
    "hello without a version": frame(FrameType.HELLO, 0),
    "hello with a short version": frame(FrameType.HELLO, 0, fields((Tag.VERSION, b"\1\0\0"))),
    "hello on a stream": frame(FrameType.HELLO, 1, fields(VERSION_1)),
    "hello that is no record": frame(FrameType.HELLO, 0, fields(VERSION_1) + b"\0"),
    "hello twice": HELLO + HELLO,
    "shutdown before hello": frame(FrameType.SHUTDOWN, 0),
    "shutdown on a stream": HELLO + frame(FrameType.SHUTDOWN, 1),
    "shutdown with a payload": HELLO + frame(FrameType.SHUTDOWN, 0, b"x"),
    **{f"{kind.name} before hello": frame(kind, 1, payload) for kind, payload in FROM_HOST.items()},
    **{f"{kind.name} on stream 0": HELLO + frame(kind, 0, payload) for kind, payload in FROM_HOST.items()},
    **{
        f"type {kind}": HELLO + SLEEP + frame(kind, 1)
        for kind in (0, FrameType.ERROR, FrameType.STDOUT, FrameType.STDERR, FrameType.EXIT, 12, 255)
    },
    **{
        f"reserved {reserved:#08x}": HELLO + frame(FrameType.EXEC, 1, fields(TRUE), reserved=reserved)
        for reserved in (1, 0x100, 0x800000)
    },
    **{
        f"{kind.name} of {length} bytes": HELLO + frame(kind, 1, length=length)
        for kind, limit in {
            FrameType.EXEC: MAX_EXEC,
            FrameType.STDIN: MAX_DATA,
            **dict.fromkeys((FrameType.STDIN_EOF, FrameType.WINDOW, FrameType.SIGNAL, FrameType.SHUTDOWN), MAX_CONTROL),
        }.items()
        for length in (limit + 1, 0x7FFFFFFF, 0xFFFFFFFF)
    },
    "exec of a command that runs": HELLO + SLEEP + SLEEP,
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
    "stdin after its end": HELLO + SLEEP + frame(FrameType.STDIN_EOF, 1) + frame(FrameType.STDIN, 1, b"x"),
    "end of stdin with a payload": HELLO + SLEEP + frame(FrameType.STDIN_EOF, 1, b"x"),
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


@pytest.mark.parametrize("kind", [kind for kind in FROM_HOST if kind is not FrameType.EXEC])
def test_frame_for_a_command_that_has_ended_is_ignored(agent: Agent, kind: FrameType) -> None:
    agent.run("true")
    agent.port.sendall(frame(kind, 1, FROM_HOST[kind]))
    assert agent.run("true").status == 0


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
    agent._feed(command)
    for byte in bytes(agent.connection.outgoing):
        agent.port.sendall(bytes([byte]))
    agent.connection.outgoing.clear()
    agent.wait(command)
    assert command.stdout == b"slowly"


# --- Fuzzing. Whatever is generated, the only program that there is to run is /bin/true. ------------------------------

streams = st.sampled_from([1, 1, 1, 2, 3, 0, 0xFFFFFFFF])
lengths_off = st.sampled_from([0] * 12 + [-1, 1, 8, -8, 0xFFFF])
harmless = st.sampled_from(
    [b"/bin/true", b"/", b"", b"a=b", b"HOME=", b"PATH=", b"1", b"nobody:nogroup", b"\0", b"x" * 300]
)


@st.composite
def exec_payloads(draw: st.DrawFn) -> bytes:
    payload = bytearray(fields(TRUE))
    for _ in range(draw(st.integers(0, 4))):
        tag = draw(st.sampled_from([Tag.ARG, Tag.ENV, Tag.CWD, Tag.USER, Tag.FLAGS, 0, 999]))
        value = draw(harmless)
        zero = draw(st.sampled_from([0] * 12 + [1]))
        payload += FIELD.pack(tag, zero, max(0, len(value) + draw(lengths_off))) + value
    return bytes(payload)


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
def test_fuzz_with_sessions(program: Path, data: bytes) -> None:
    converse(program, data)

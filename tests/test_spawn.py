"""`vmette.vmm.spawn`: what a child gets, and that it never outlives what it belongs to."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmette.errors import VmmError
from vmette.vmm import spawn as spawn_module
from vmette.vmm.spawn import Child, find_program, spawn

CAT, SLEEP, SHELL = "/bin/cat", "/bin/sleep", "/bin/sh"
OWN_FDS = Path("/proc/self/fd")


class Cat:
    """A `cat` that is up: it has answered. What it has can be read in /proc."""

    def __init__(
        self,
        fds: Mapping[int, int] | None = None,
        env: Mapping[str, str] | None = None,
        arguments: tuple[str, ...] = (),
        thread: Executor | None = None,
    ) -> None:
        with ExitStack() as theirs:
            read, self._to = os.pipe()
            theirs.callback(os.close, read)
            self._from, write = os.pipe()
            theirs.callback(os.close, write)
            what = ([CAT, *arguments], {0: read, 1: write, 2: write, **(fds or {})}, env or {})
            try:
                self.child = spawn(*what) if thread is None else thread.submit(spawn, *what).result()
            except BaseException:
                self._hang_up()
                raise
        self.proc = Path(f"/proc/{self.child.pid}")

    def __enter__(self) -> Cat:
        assert self.answers()
        return self

    def __exit__(self, *args: object) -> None:
        self.child.kill()
        self._hang_up()

    def _hang_up(self) -> None:
        os.close(self._to)
        os.close(self._from)

    def answers(self) -> bool:
        with suppress(BrokenPipeError):
            os.write(self._to, b"?")
            return os.read(self._from, 1) == b"?"
        return False

    def status(self) -> dict[str, str]:
        lines = (self.proc / "status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@pytest.fixture(params=["main thread", "other thread"])
def thread(request: pytest.FixtureRequest) -> Iterator[Executor | None]:
    """Where `spawn` is called."""
    if request.param == "main thread":
        yield None
        return
    with ThreadPoolExecutor(1) as executor:
        yield executor


def children() -> set[int]:
    """Of this process, zombies too."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                found.add(int(path.parent.name))
    return found


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    before = set(OWN_FDS.iterdir()), children()
    yield
    assert (set(OWN_FDS.iterdir()), children()) == before


def attempt(thread: Executor | None, argv: list[str], fds: Mapping[int, int], env: Mapping[str, str]) -> Child:
    return spawn(argv, fds, env) if thread is None else thread.submit(spawn, argv, fds, env).result()


def wait_for_end(pidfd: int) -> None:
    with select.epoll() as poll:
        poll.register(pidfd, select.EPOLLIN)
        while not poll.poll():
            pass


# --- descriptors


@settings(max_examples=100, deadline=None)
@given(numbers=st.dictionaries(st.integers(3, 30), st.integers(0, 5), max_size=20))
def test_descriptors_arrive_at_their_numbers_and_nothing_else_does(numbers: dict[int, int]) -> None:
    with ExitStack() as stack:
        files = [os.memfd_create(f"file{i}") for i in range(6)]  # their own numbers are in that range, too
        # What this process lets its children inherit: amidst the targets, and above.
        files += [fcntl.fcntl(files[0], fcntl.F_DUPFD, at) for at in (3, 25, 200)]
        for fd in files:
            stack.callback(os.close, fd)
        cat = stack.enter_context(Cat({target: files[index] for target, index in numbers.items()}))
        there = {int(path.name): str(path.readlink()) for path in (cat.proc / "fd").iterdir()}
        assert there.keys() == {0, 1, 2} | numbers.keys()
        for target, index in numbers.items():
            assert there[target] == f"/memfd:file{index} (deleted)"


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_descriptors_that_take_each_others_place(thread: Executor | None, turn: int) -> None:
    files = [os.memfd_create(f"file{i}") for i in range(3)]
    try:
        with Cat({files[(i + turn) % 3]: files[i] for i in range(3)}, thread=thread) as cat:
            for i in range(3):
                assert (cat.proc / f"fd/{files[(i + turn) % 3]}").samefile(OWN_FDS / str(files[i]))
    finally:
        for fd in files:
            os.close(fd)


def test_standard_streams_that_are_not_given_are_inherited() -> None:
    read, write = os.pipe()
    try:
        child = spawn([SLEEP, "1000"], {0: read}, {})
        try:
            for number, own in ((0, read), (1, 1), (2, 2)):
                assert Path(f"/proc/{child.pid}/fd/{number}").samefile(OWN_FDS / str(own))
        finally:
            child.kill()
    finally:
        os.close(read)
        os.close(write)


def test_a_missing_program_is_reported_even_if_the_report_was_in_the_way_of_a_target(
    thread: Executor | None, tmp_path: Path
) -> None:
    ends = os.pipe()  # vmette_spawn's own pipe will get the next numbers
    report = os.pipe()
    for fd in report:
        os.close(fd)
    with (tmp_path / "file").open("w") as file:
        fds = dict.fromkeys((*report, *(fd + 1 for fd in report)), file.fileno())
        with pytest.raises(VmmError, match="No such file"):
            attempt(thread, ["/missing"], fds, {})
    assert (tmp_path / "file").read_bytes() == b""
    for fd in ends:
        os.close(fd)


@pytest.mark.parametrize(
    ("fds", "reason"),
    [
        ({3: 12345}, errno.EBADF),
        ({3: -1}, errno.EBADF),
        ({-1: 0}, errno.EBADF),
        ({1024: 0}, errno.EBADF),
        ({2**31 - 1: 0}, errno.EBADF),
        (dict.fromkeys(range(65), 0), errno.EINVAL),
    ],
)
def test_descriptors_that_cannot_be_had(thread: Executor | None, fds: dict[int, int], reason: int) -> None:
    with pytest.raises(VmmError, match=os.strerror(reason)):
        attempt(thread, [CAT], fds, {})


def test_more_descriptors_than_the_process_may_have(thread: Executor | None) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with pytest.raises(VmmError):
            attempt(thread, [CAT], {2: 2, 256: 0}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_as_many_descriptors_as_there_can_be(thread: Executor | None) -> None:
    with Cat(dict.fromkeys(range(3, 64), 2), thread=thread) as cat:
        assert len(list((cat.proc / "fd").iterdir())) == 64


def test_200_children_leave_no_descriptor_and_no_zombie(thread: Executor | None) -> None:
    before = set(OWN_FDS.iterdir()), children()
    for number in range(200):
        with suppress(VmmError):
            attempt(thread, [SLEEP if number % 2 else "/missing", "1000"], {0: 2, 1: 2, 7: 2}, {}).kill()
    assert (set(OWN_FDS.iterdir()), children()) == before


def test_children_of_many_threads_at_once() -> None:
    def start(number: int) -> tuple[bytes, set[str]]:
        with Cat(env={"N": str(number)}) as cat:
            return (cat.proc / "environ").read_bytes(), {path.name for path in (cat.proc / "fd").iterdir()}

    with ThreadPoolExecutor(8) as executor:
        found = list(executor.map(start, range(80)))
    assert found == [(b"N=%d\0" % number, {"0", "1", "2"}) for number in range(80)]


# --- the rest of what a child gets


def test_signals_are_as_if_new(thread: Executor | None) -> None:
    handled, ignored, blocked = signal.SIGUSR1, (signal.SIGTERM, signal.SIGPIPE, signal.SIGRTMIN), signal.SIGUSR2
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}
    before[handled] = signal.signal(handled, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, [blocked])
    try:
        with Cat(thread=thread) as cat:
            status = cat.status()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == {blocked}
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [blocked])
        for number, handler in before.items():
            signal.signal(number, handler)
    # 32 and 33 are the C library's own, out of reach of its sigaction; glibc 2.36 has posix_spawn ignore one of them.
    internal = 1 << 31 | 1 << 32
    masks = {int(status[name], 16) & ~internal for name in ("SigBlk", "SigIgn", "SigCgt", "SigPnd", "ShdPnd")}
    assert masks == {0}


def test_session_is_its_own(thread: Executor | None) -> None:
    with Cat(thread=thread) as cat:
        assert os.getsid(cat.child.pid) == os.getpgid(cat.child.pid) == cat.child.pid


ENVIRONMENTS: list[dict[str, str]] = [
    {},
    {"A": "1"},
    {"B": "", "A": "a b=c\n", "PATH": "/bin", "N": os.fsdecode(b"\xff")},
]


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_environment_is_what_was_given(thread: Executor | None, env: dict[str, str]) -> None:
    with Cat(env=env, thread=thread) as cat:
        environ = (cat.proc / "environ").read_bytes()
    assert environ == b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in env.items())


def test_arguments_are_what_was_given(thread: Executor | None) -> None:
    arguments = ("-u", "--", "-", os.fsdecode(b"\xff"), "a b", "")
    with Cat(arguments=arguments, thread=thread) as cat:
        assert (cat.proc / "cmdline").read_bytes() == b"".join(os.fsencode(a) + b"\0" for a in (CAT, *arguments))


@pytest.mark.parametrize(
    ("argv", "env"),
    [
        (["/bin/ca\0t"], {}),
        ([CAT, "a\0b"], {}),
        ([CAT], {"A\0": "1"}),
        ([CAT], {"A": "1\0"}),
    ],
)
def test_nul_is_refused(argv: list[str], env: dict[str, str]) -> None:
    with pytest.raises(VmmError, match="NUL"):
        spawn(argv, {}, env)


# --- programs that cannot be started


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("missing", errno.ENOENT),
        ("", errno.EACCES),
        ("plain", errno.EACCES),
        ("plain/x", errno.ENOTDIR),
        ("junk", errno.ENOEXEC),
        ("script", errno.ENOENT),
    ],
)
def test_a_program_that_cannot_be_started(thread: Executor | None, tmp_path: Path, name: str, reason: int) -> None:
    (tmp_path / "plain").write_text("")
    (tmp_path / "junk").write_text("junk")
    (tmp_path / "script").write_text("#!/missing/interpreter\n")
    for executable in ("junk", "script"):
        (tmp_path / executable).chmod(0o755)
    with pytest.raises(VmmError) as caught:
        attempt(thread, [str(tmp_path / name)], {0: 2, 1: 2, 2: 2}, {})
    assert str(caught.value) == f"cannot start {tmp_path / name}: {os.strerror(reason)}"


def test_an_interrupted_wait_for_a_child_that_did_not_start_goes_on() -> None:
    before = children()
    handler = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        for _ in range(200):
            with pytest.raises(VmmError, match="No such file"):
                spawn(["/missing"], {}, {})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert children() == before


def test_an_error_in_the_lasting_thread_is_the_callers(thread: Executor | None) -> None:
    with pytest.raises(OverflowError):
        attempt(thread, [CAT], {2**40: 0}, {})
    with Cat(thread=thread):
        pass


# --- its end


def test_kill_ends_and_reaps(thread: Executor | None) -> None:
    cat = Cat(thread=thread)
    with cat:
        os.kill(cat.child.pid, signal.SIGSTOP)
        assert not cat.child.poll()
        for _ in range(3):
            cat.child.kill()
            assert cat.child.poll()
            assert cat.child.status == signal.SIGKILL
            assert cat.child.pid not in children()


@pytest.mark.parametrize("status", [0, 3])
def test_a_child_that_ends_by_itself(thread: Executor | None, status: int) -> None:
    child = attempt(thread, [SHELL, "-c", f"exit {status}"], {0: 2, 1: 2, 2: 2}, {})
    assert child.poll(wait=True)
    child.kill()
    assert os.waitstatus_to_exitcode(child.status or 0) == status


def test_the_number_of_a_child_that_somebody_else_reaped_is_not_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    child = spawn([SHELL, "-c", "exit 3"], {0: 2, 1: 2, 2: 2}, {})
    os.waitpid(child.pid, 0)
    killed: list[int] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    child.kill()
    assert killed == []
    assert child.poll()


def test_a_child_outlives_the_thread_that_asked_for_it() -> None:
    cats: list[Cat] = []
    thread = threading.Thread(target=lambda: cats.append(Cat()))
    thread.start()
    thread.join()
    while Path(f"/proc/self/task/{thread.native_id}").exists():
        time.sleep(0.001)  # the kernel's thread ends a little later
    with cats[0] as cat:
        assert cat.answers()


PARENT = """
import os, sys, threading
from vmette.vmm.spawn import spawn

def start():
    child = spawn(["/bin/sleep", "1000"], {0: 0, 1: 2, 2: 2}, {})
    print(child.pid, flush=True)

def start_in_thread():
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()

STARTS[0]()
sys.stdin.read(1)
ENDS[0]()
"""


@pytest.mark.parametrize("start", ["start", "start_in_thread"])
@pytest.mark.parametrize("end", ["SIGKILL", "sys.exit", "os.abort", "lambda: os._exit(0)"])
def test_a_child_ends_with_this_process(start: str, end: str) -> None:
    code = PARENT.replace("STARTS[0]", start).replace("ENDS[0]", f"({end})" if end != "SIGKILL" else "print")
    code = f"import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n{code}"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        try:
            if end == "SIGKILL":
                parent.kill()
            else:
                parent.stdin.write(b"\n")
                parent.stdin.close()
            parent.wait()
            wait_for_end(pidfd)
        finally:
            os.close(pidfd)


AFTER_FORK = """
import os, sys
sys.path.insert(0, sys.argv[1])
from concurrent.futures import ThreadPoolExecutor
from vmette.vmm import spawn as module
from test_spawn import Cat

with ThreadPoolExecutor(1) as threads, Cat(thread=threads) as ours:
    module._spawner_lock.acquire()  # as another thread might have
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            ours.child.kill()
            assert ours.child.poll()
            with ThreadPoolExecutor(1) as fresh, Cat() as one, Cat(thread=fresh) as other:
                assert one.answers() and other.answers()
            status = 0
        finally:
            os._exit(status)
    module._spawner_lock.release()
    assert os.waitpid(pid, 0) == (pid, 0)
    assert ours.answers()
    assert not ours.child.poll()
    with Cat(thread=threads) as another:
        assert another.answers()
"""


def test_after_a_fork_children_can_be_started_and_those_of_the_parent_are_left_alone() -> None:
    directory = str(Path(__file__).parent)
    subprocess.run([sys.executable, "-W", "ignore", "-c", AFTER_FORK, directory], check=True)


def test_the_lasting_thread_is_one() -> None:
    def count() -> int:
        return sum(each.name == "vmette-spawner" for each in threading.enumerate())

    with ThreadPoolExecutor(4) as executor:
        for cat in executor.map(lambda _: Cat(), range(8)):
            with cat:
                pass
    assert spawn_module._spawner is not None
    assert count() == 1


def test_finding_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past all that is none, and where is_file() raises, as it does in directories that the user cannot search."""
    directory, text, program = (tmp_path / name / "tool" for name in ("directory", "text", "program"))
    directory.mkdir(parents=True)
    for path, mode in {text: 0o644, program: 0o755}.items():
        path.parent.mkdir()
        path.touch(mode)
    places = [tmp_path / "none", "/x" * 3000, directory.parent, text.parent, program.parent]
    monkeypatch.setenv("PATH", ":".join(map(str, places)))
    assert find_program("tool") == program
    monkeypatch.setenv("PATH", ":".join(map(str, places[:-1])))
    assert find_program("tool") is None

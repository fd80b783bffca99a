"""Machines that run by themselves, as a user has them: `vmette run --detach` and all that follows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.images.layout import Layout, member, tar
from tests.terminals import Terminal
from tests.vm.support import BASE, Cli, command, vmm_name, vmm_processes, wait_until

# pexpect forks, and Python 3.12 warns of that where there are threads.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")

ENDLESS = ("sh", "-c", "echo running; exec sleep 100000")
STUBBORN = ("sh", "-c", "trap '' TERM; echo running; while :; do sleep 1; done")


@pytest.fixture(scope="module", autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory for the machines of these tests, far too long for a socket's address. No machine is left in it."""
    subprocess.run(command(["run", "--quiet", BASE, "true"]), check=True)  # it is known now what KVM can do here
    root = tmp_path_factory.mktemp("state") / ("deep" * 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMETTE_STATE_DIR", str(root))
        yield root
        left = machines("-a")
        if left:  # of a test that failed
            subprocess.run(command(["rm", "-f", *left]), check=True)


@pytest.fixture(scope="module")
def box(state: Path) -> Iterator[str]:
    """A machine for tests that leave it as it is. Its main command idles."""
    words = ["run", "-d", "--name", "shared", "-e", "COLOUR=red", "-w", "/tmp", "-u", "1234:5678", BASE]
    assert subprocess.run(command(words), capture_output=True, check=True).stdout == b"shared\n"
    yield "shared"
    subprocess.run(command(["rm", "-f", "shared"]), check=True)


def machines(*options: str) -> dict[str, dict[str, Any]]:
    done = subprocess.run(command(["ps", "--json", *options]), capture_output=True, check=True)
    return {machine["name"]: machine for machine in json.loads(done.stdout)}


def logged(name: str) -> bytes:
    return subprocess.run(command(["logs", name]), capture_output=True, check=True).stdout


def wait_until_logged(name: str, text: bytes) -> None:
    wait_until(lambda: text in logged(name), f"{text!r} in the log of {name}")


def supervisors(name: str) -> list[int]:
    """The supervisor of a machine, by what a process list shows."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if (entry / "cmdline").read_bytes().endswith(f"\0-m\0vmette.detached\0{name}\0".encode()):
                found.append(int(entry.name))
    return found


def vms(name: str) -> list[int]:
    """The VM of a machine."""
    found = []
    for pid in vmm_processes():
        with suppress(OSError):
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            found += [pid] if parent in supervisors(name) else []
    return found


def ok(done: subprocess.CompletedProcess[bytes], stdout: bytes | None = None) -> None:
    assert done.returncode == 0, done.stderr
    assert stdout is None or done.stdout == stdout


# --- a machine's life


def test_a_whole_life(cli: Cli, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    files = [
        member("bin", kind="d"),
        member("bin/sh", kind="l", target="busybox"),
        member("bin/busybox", Path("/bin/busybox").read_bytes(), mode=0o755),
    ]
    script = "echo out; echo err >&2; trap 'echo bye; exit 7' QUIT; while :; do busybox sleep 1; done"
    config = {"Cmd": ["/bin/sh", "-c", script], "StopSignal": "SIGQUIT"}
    spec = layout.tag("x", layout.manifest([tar(files)], config))
    ok(cli("run", "--quiet", "--detach", "--name", "life", spec), b"life\n")
    machine = machines()["life"]
    assert machine["status"] == "running"
    assert machine["command"] == config["Cmd"]
    assert machine["created"] <= machine["started"]
    table = cli("ps").stdout.decode().splitlines()
    assert any(line.startswith("life ") and "running, now" in line for line in table)
    wait_until_logged("life", b"out\n")
    ok(cli("exec", "life", "busybox", "echo", "hello"), b"hello\n")
    refused = cli("rm", "life")
    assert refused.returncode == 125
    assert b"is running" in refused.stderr

    ok(cli("stop", "life"), b"life\n")
    assert "life" not in machines()
    machine = machines("-a")["life"]
    assert (machine["status"], machine["exit_code"], machine["error"]) == ("ended", 7, None)
    assert b"exited (7)" in cli("ps", "-a").stdout
    log = cli("logs", "life")
    assert (log.stdout, log.stderr) == (b"out\nbye\n", b"err\n")
    assert cli("exec", "life", "true").returncode == 125
    ok(cli("stop", "life"))
    assert cli("kill", "life").returncode == 125

    ok(cli("rm", "life"), b"life\n")
    assert "life" not in machines("-a")
    gone = cli("exec", "life", "true")
    assert gone.returncode == 2
    assert gone.stderr.startswith(b"vmette: there is no machine 'life'")


def test_the_end_of_the_command_is_the_end_of_the_machine(cli: Cli) -> None:
    ok(cli("run", "-d", "--name", "brief", BASE, "sh", "-c", "exit 3"))
    ok(cli("logs", "-f", "brief"), b"")
    assert machines("-a")["brief"]["exit_code"] == 3
    ok(cli("rm", "brief"))


def test_rm_and_a_name_that_nobody_chose(cli: Cli) -> None:
    done = cli("run", "-d", "--rm", BASE, *ENDLESS)
    ok(done)
    name = done.stdout.decode().strip()
    assert name in machines()
    ok(cli("stop", name))
    assert name not in machines("-a")


def test_names_clash(cli: Cli, box: str) -> None:
    done = cli("run", "-d", "--name", box, BASE)
    assert done.returncode == 2
    assert b"already" in done.stderr
    ok(cli("exec", box, "true"))


def test_two_at_once(cli: Cli) -> None:
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: cli("run", "-d", "--name", "twin", BASE, *ENDLESS), range(2)))
    assert sorted(result.returncode for result in done) == [0, 2]
    assert machines()["twin"]["status"] == "running"
    ok(cli("rm", "-f", "twin"))


def test_several_names_and_an_error(cli: Cli) -> None:
    for name in ("one", "two"):
        ok(cli("run", "-d", "--name", name, BASE))
    done = cli("stop", "one", "nobody", "two")
    assert (done.returncode, done.stdout) == (125, b"one\ntwo\n")
    assert done.stderr.count(b"\n") == 1
    ok(cli("rm", "one", "two"), b"one\ntwo\n")


# --- how it ends


@pytest.mark.parametrize(
    ("words", "status"),
    [(["stop", "-t", "0"], 137), (["kill"], 137), (["kill", "-s", "USR1"], 138), (["kill", "-s", "15"], None)],
    ids=["stop", "kill", "a signal", "an ignored signal"],
)
def test_signals(cli: Cli, words: list[str], status: int | None) -> None:
    ok(cli("run", "-d", "--name", "stubborn", BASE, *STUBBORN))
    wait_until_logged("stubborn", b"running\n")
    ok(cli(*words, "stubborn"))
    if status is None:
        ok(cli("exec", "stubborn", "true"))
    else:
        ok(cli("logs", "-f", "stubborn"))
        assert machines("-a")["stubborn"]["exit_code"] == status
    ok(cli("rm", "-f", "stubborn"))


def test_a_machine_without_a_command(cli: Cli) -> None:
    ok(cli("run", "-d", "--name", "idle", BASE))
    assert machines()["idle"]["command"] == []
    assert b"it idles" in cli("kill", "-s", "USR1", "idle").stderr
    ok(cli("stop", "idle"))
    assert machines("-a")["idle"]["exit_code"] == 0
    ok(cli("rm", "idle"))


def test_a_lifetime(cli: Cli) -> None:
    ok(cli("run", "-d", "--name", "mayfly", "--timeout", "0.5", BASE, *ENDLESS))
    ok(cli("logs", "-f", "mayfly"))
    machine = machines("-a")["mayfly"]
    assert (machine["exit_code"], machine["error"]) == (124, "timed out after 0.5 seconds")
    ok(cli("rm", "mayfly"))


def test_much_patience(cli: Cli) -> None:
    """More seconds than poll(2) can wait, and 4294968 are 0.7 to whoever takes its milliseconds for an int."""
    ok(cli("run", "-d", "--name", "patient", "--timeout", "3000000", BASE, *ENDLESS))
    ok(cli("exec", "--timeout", "4294968", "patient", "sh", "-c", "sleep 2; echo x"), b"x\n")
    ok(cli("stop", "-t", "3000000", "patient"))
    assert machines("-a")["patient"]["exit_code"] == 128 + signal.SIGTERM
    ok(cli("rm", "patient"))


def test_a_supervisor_does_not_keep_secrets(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEY", "hush")
    ok(cli("run", "-d", "--name", "discreet", "--secret", "key=API_KEY", BASE))
    ok(cli("exec", "discreet", "cat", "/run/secrets/key"), b"hush")
    environment = Path(f"/proc/{machines()['discreet']['pid']}/environ").read_bytes()
    assert b"hush" not in environment
    assert b"VMETTE_STATE_DIR=" in environment
    ok(cli("rm", "-f", "discreet"))


def test_a_supervisor_that_is_killed_leaves_nothing(cli: Cli) -> None:
    ok(cli("run", "-d", "--name", "victim", BASE, *ENDLESS))
    (vm,) = vms("victim")
    os.kill(machines()["victim"]["pid"], signal.SIGKILL)
    wait_until(lambda: vm not in vmm_processes(), "the end of its VM")
    assert "victim" not in machines("-a")
    ok(cli("run", "-d", "--name", "victim", BASE))
    ok(cli("rm", "-f", "victim"))


def test_a_vm_that_is_killed_is_an_end(cli: Cli) -> None:
    ok(cli("run", "-d", "--name", "crash", BASE, *ENDLESS))
    (vm,) = vms("crash")
    running = subprocess.Popen(command(["exec", "crash", *ENDLESS]), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert running.stdout
    assert running.stdout.readline() == b"running\n"
    os.kill(vm, signal.SIGKILL)
    assert running.communicate()[1] == b"vmette: the machine has ended\n"
    assert running.returncode == 125
    done = cli("logs", "-f", "crash")
    assert done.stderr == f"vmette: {vmm_name()} was killed by signal 9\n".encode()
    machine = machines("-a")["crash"]
    assert (machine["exit_code"], machine["error"]) == (125, f"{vmm_name()} was killed by signal 9")
    ok(cli("rm", "crash"))


def test_signals_of_the_host(cli: Cli) -> None:
    ok(
        cli(
            "run", "-d", "--name", "polite", BASE, "sh", "-c", "trap 'echo bye; exit 4' TERM; while :; do sleep 1; done"
        )
    )
    pid = machines()["polite"]["pid"]
    assert os.getsid(pid) == pid  # not in the session of whoever logs out
    os.kill(pid, signal.SIGHUP)
    os.kill(pid, signal.SIGINT)
    ok(cli("exec", "polite", "true"))
    os.kill(pid, signal.SIGTERM)
    ok(cli("logs", "-f", "polite"), b"bye\n")
    assert machines("-a")["polite"]["exit_code"] == 4
    ok(cli("rm", "polite"))


# --- how it does not begin


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ([BASE, "no-such-command"], 127, b"no command 'no-such-command'"),
        ([BASE, "/etc"], 126, b"cannot execute '/etc'"),
        (["-u", "nobody-at-all", BASE, "true"], 125, b"user"),
        (["/nowhere"], 125, b"/nowhere"),
        (["--cmdline", "init=/none rdinit=/none", BASE], 125, b"guest"),
        (["--name", "No Name", BASE], 2, b"No Name"),
        (["-t", BASE], 2, b"--tty"),
        (["--timeout", "nan", BASE], 2, b"time-out"),
    ],
)
def test_a_bad_start(cli: Cli, words: list[str], status: int, says: bytes) -> None:
    before = machines("-a")
    done = cli("run", "--quiet", "-d", *words)
    assert (done.returncode, done.stdout) == (status, b"")
    assert says in done.stderr.splitlines()[-1]
    assert machines("-a") == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_start_that_is_interrupted(number: signal.Signals) -> None:
    starting = subprocess.Popen(command(["run", "-d", "--name", "abandoned", BASE]))
    wait_until(lambda: bool(vms("abandoned")), "a VM")
    os.kill(vms("abandoned")[0], signal.SIGSTOP)  # so that it never comes up
    starting.send_signal(number)
    starting.wait()
    wait_until(lambda: not supervisors("abandoned"), "the end of its supervisor")
    wait_until(lambda: "abandoned" not in machines("-a"), "the end of its entry")


def test_only_a_machine_that_is_left_has_a_name(cli: Cli) -> None:
    assert b"--detach" in cli("run", "--name", "x", BASE, "true").stderr
    ok(cli("run", "--rm", BASE, "true"))


# --- exec


def test_many_commands_at_once(cli: Cli, box: str) -> None:
    def one(number: int) -> tuple[int, bytes, bytes]:
        script = f"cat; echo {number} >&2; exit {number}"
        done = cli("exec", "-i", box, "sh", "-c", script, input=b"%d" % number * 100_000)
        return done.returncode, done.stdout, done.stderr

    with ThreadPoolExecutor(6) as pool:
        for number, done in enumerate(pool.map(one, range(6))):
            assert done == (number, b"%d" % number * 100_000, b"%d\n" % number)


def test_what_a_command_has(cli: Cli, box: str) -> None:
    script = "echo $COLOUR $SIZE; pwd; id -u; id -g; cat"
    ok(cli("exec", box, "sh", "-c", script, input=b"not for it"), b"red\n/tmp\n1234\n5678\n")
    own = ["-e", "COLOUR=blue", "-e", "SIZE=9", "-w", "/etc", "-u", "0"]
    ok(cli("exec", *own, box, "--", "sh", "-c", script), b"blue 9\n/etc\n0\n0\n")


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (["sh", "-c", "kill -TERM $$"], 143, b""),
        (["no-such-command"], 127, b"vmette: the root filesystem has no command 'no-such-command'\n"),
        (["/etc"], 126, b"vmette: cannot execute '/etc': Permission denied\n"),
        ([""], 2, b"vmette: there is no command to run; give a program and its arguments\n"),
    ],
)
def test_exit_codes(cli: Cli, box: str, words: list[str], status: int, says: bytes) -> None:
    done = cli("exec", box, *words)
    assert (done.returncode, done.stderr) == (status, says)


def test_long_words(cli: Cli, box: str) -> None:
    argument = os.fsdecode(b'\xff\n"') * 40_000
    ok(cli("exec", box, "printf", "%s", argument), os.fsencode(argument))


def test_a_time_out(cli: Cli, box: str) -> None:
    done = cli("exec", "--timeout", "1", box, "sh", "-c", "echo $$; exec sleep 100000")
    assert done.returncode == 124
    assert b"timed out after 1 seconds" in done.stderr
    wait_until_dead(cli, box, done.stdout)


@pytest.mark.parametrize("seconds", ["inf", "nan", "-1"])
def test_a_time_out_that_is_none(cli: Cli, box: str, seconds: str) -> None:
    done = cli("exec", f"--timeout={seconds}", box, "true")
    assert done.returncode == 2
    assert b"cannot be kept" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_client_that_is_gone(cli: Cli, box: str, number: signal.Signals) -> None:
    words = ["exec", box, "sh", "-c", "trap '' HUP TERM INT; echo $$; while :; do sleep 1; done"]
    with subprocess.Popen(command(words), stdout=subprocess.PIPE) as client:
        assert client.stdout
        pid = client.stdout.readline()
        client.send_signal(number)
    assert client.returncode == (130 if number == signal.SIGINT else -9)
    wait_until_dead(cli, box, pid)


def wait_until_dead(cli: Cli, box: str, pid: bytes) -> None:
    words = ["exec", "-u", "0", box, "kill", "-0", pid.decode().strip()]
    wait_until(lambda: cli(*words).returncode != 0, f"the end of process {pid!r} in the guest")


def test_nobody_waits_for_a_slow_reader(cli: Cli, box: str) -> None:
    with subprocess.Popen(command(["exec", box, "yes"]), stdout=subprocess.PIPE) as slow:
        assert slow.stdout
        assert slow.stdout.read(2) == b"y\n"
        ok(cli("exec", box, "echo", "quick"), b"quick\n")
        slow.stdout.close()
        assert slow.wait() == 128 + signal.SIGPIPE


def test_input_that_is_held_back(cli: Cli, box: str) -> None:
    with subprocess.Popen(command(["exec", "-i", box, "cat"]), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as slow:
        assert slow.stdin
        assert slow.stdout
        for text in (b"one\n", b"two\n"):
            slow.stdin.write(text)
            slow.stdin.flush()
            assert slow.stdout.readline() == text
            ok(cli("exec", box, "true"))
        slow.stdin.close()
        assert slow.wait() == 0


def test_a_terminal(box: str) -> None:
    with Terminal(command(["exec", "-it", box, "sh"]), rows=33, columns=101) as terminal:
        terminal.until("$ ")
        terminal.type("stty size\r")
        terminal.until("\r\n33 101\r\n")
        terminal.until("$ ")
        terminal.type("sh -c 'trap \"stty size; exit\" WINCH; echo wait''ing; while :; do sleep 1; done'\r")
        terminal.until("waiting\r\n")
        terminal.child.setwinsize(44, 123)
        terminal.until("44 123\r\n")
        terminal.until("$ ")
        terminal.type("sh -c 'echo run''ning; exec sleep 100000'\r")
        terminal.until("running\r\n")
        terminal.type("\x03")
        terminal.until("$ ")
        terminal.type("exit 5\r")
        assert terminal.ended() == 5


def test_a_terminal_whose_client_is_told_to_end(cli: Cli, box: str) -> None:
    with Terminal(command(["exec", "-it", box, "sh", "-c", "echo pid $$.; exec sleep 100000"])) as terminal:
        (pid,) = terminal.groups(r"pid ([0-9]+)\.\r\n")
        os.kill(terminal.pid, signal.SIGTERM)
        assert terminal.ended() == 143
    wait_until_dead(cli, box, pid)


# --- logs


def test_a_log_that_is_followed(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    script = (
        "cd /mnt/share; printf '\\000\\377'; echo err >&2; until [ -e go ]; do sleep 0.2; done;"
        "head -c 3000000 /dev/urandom >data; cat data"
    )
    share = f"share={tmp_path / 'share'}"
    ok(cli("run", "-d", "--rm", "--name", "talker", "--share", share, BASE, "sh", "-c", script))
    words = command(["logs", "--follow", "talker"])
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as follower:
        assert follower.stdout
        assert follower.stderr
        assert follower.stdout.read(2) == b"\x00\xff"
        assert follower.stderr.readline() == b"err\n"
        (tmp_path / "share/go").touch()
        out, err = follower.communicate()
    assert (out, err) == ((tmp_path / "share/data").read_bytes(), b"")
    assert follower.returncode == 0
    assert "talker" not in machines("-a")


def test_no_log_of_what_is_not_there(cli: Cli) -> None:
    assert cli("logs", "nobody").returncode == 2
    assert cli("logs", "-f", "../x").returncode == 2


# --- cp


def listing(directory: Path) -> dict[str, object]:
    """What is below `directory`: links, and modes and contents of the rest."""
    found: dict[str, object] = {}
    for path in directory.rglob("*"):
        contents = path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(directory))] = (
            path.readlink() if path.is_symlink() else (path.stat().st_mode, contents)
        )
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "sub/deep").mkdir(parents=True)
    (root / "sub").chmod(0o750)
    (root / "run").write_bytes(b"#!/bin/sh\n")
    (root / "run").chmod(0o751)
    (root / "sub/large").write_bytes(os.urandom(3_000_000))
    (root / "sub/link").symlink_to("../run")
    (root / "sub/out").symlink_to("/etc/passwd")
    (root / os.fsdecode(b"raw \xff\n")).write_bytes(b"")
    return root


@pytest.fixture
def place(cli: Cli, box: str) -> Iterator[str]:
    """A directory of the guest for the test alone."""
    ok(cli("exec", "-u", "0", box, "mkdir", "/tmp/place"))
    yield "/tmp/place"
    ok(cli("exec", "-u", "0", box, "rm", "-r", "/tmp/place"))


def test_there_and_back(cli: Cli, box: str, tree: Path, place: str, tmp_path: Path) -> None:
    ok(cli("cp", tree, f"{box}:{place}"))  # which is there: into it
    ok(cli("cp", tree, f"{box}:{place}/new"))  # which is not: as it
    ok(cli("cp", f"{tree}/.", f"{box}:{place}/new"))  # what is in it, once more
    ok(cli("exec", box, "ls", f"{place}/tree"), b"raw ??\nrun\nsub\n")
    ok(cli("exec", "-u", "0", box, "find", f"{place}/tree", f"{place}/new", "!", "-user", "0"), b"")
    (tmp_path / "back").mkdir()
    ok(cli("cp", f"{box}:{place}/tree", tmp_path / "back"))
    ok(cli("cp", f"{box}:{place}/new", tmp_path / "back/as"))
    ok(cli("cp", f"{box}:{place}/tree/.", tmp_path / "back/as"))
    assert listing(tmp_path / "back/tree") == listing(tree)
    assert listing(tmp_path / "back/as") == listing(tree)


def test_one_file(cli: Cli, box: str, tree: Path, place: str, tmp_path: Path) -> None:
    ok(cli("cp", tree / "run", f"{box}:{place}"))
    ok(cli("cp", tree / "run", f"{box}:{place}/other"))
    ok(cli("cp", tree / "run", f"{box}:{place[1:]}/relative"))
    ok(cli("exec", box, "sh", "-c", f"cd {place}; stat -c '%n %a' *"), b"other 751\nrelative 751\nrun 751\n")
    ok(cli("cp", f"{box}:{place}/other", tmp_path))
    ok(cli("cp", f"{box}:{place}/other", tmp_path / "renamed"))
    for name in ("other", "renamed"):
        assert (tmp_path / name).read_bytes() == b"#!/bin/sh\n"
        assert (tmp_path / name).stat().st_mode & 0o7777 == 0o751


def test_streams(cli: Cli, box: str, tree: Path, place: str, tmp_path: Path) -> None:
    archive = subprocess.run(["tar", "c", "-C", tree, "."], capture_output=True, check=True).stdout
    ok(cli("cp", "-", f"{box}:{place}/unpacked", input=archive))
    done = cli("cp", f"{box}:{place}/unpacked", "-")
    ok(done)
    (tmp_path / "back").mkdir()
    subprocess.run(["tar", "x", "-C", tmp_path / "back"], input=done.stdout, check=True)
    assert listing(tmp_path / "back") == listing(tree)


def test_what_cannot_be_copied(cli: Cli, box: str, place: str, tmp_path: Path) -> None:
    for words, says in [
        ((f"{box}:/nowhere", str(tmp_path)), b"/nowhere"),
        ((f"{box}:/etc", str(tmp_path / "no/such")), b"no such"),
        ((str(tmp_path / "nothing"), f"{box}:{place}"), b"nothing"),
        ((str(tmp_path), f"{box}:{place}/no/such"), b"no such"),
        ((f"{box}:/bin/busybox", str(tmp_path), "--max-bytes", "1000"), b"1000"),
        ((f"{box}:/a", f"{box}:/b"), b"NAME:PATH"),
        (("a", "b"), b"NAME:PATH"),
        (("nobody:/a", "b"), b"no machine"),
    ]:
        done = cli("cp", *words)
        assert done.returncode in {2, 125}
        assert says.lower() in done.stderr.lower()
    assert [path.name for path in tmp_path.iterdir()] == ["TMPDIR"]


def test_an_archive_that_leads_elsewhere(cli: Cli, box: str, place: str) -> None:
    done = cli("cp", "-", f"{box}:{place}", input=tar([member("../escaped", b"x")]))
    assert done.returncode == 125
    assert cli("exec", box, "test", "-e", "/tmp/escaped").returncode == 1

"""`vmette run`: what a command in the VM sees, and what comes out of it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vm.support import BASE, Cli, command

ALL_BYTES = bytes(range(256))


@pytest.mark.parametrize("code", [0, 1, 2, 7, 124, 125, 126, 127, 128, 255])
def test_exit_code_is_the_commands(cli: Cli, code: int) -> None:
    done = cli("run", BASE, "--", "sh", "-c", f"exit {code}")
    assert (done.returncode, done.stdout, done.stderr) == (code, b"", b"")


@pytest.mark.parametrize(("signal", "code"), [("KILL", 137), ("TERM", 143), ("SEGV", 139), ("INT", 130)])
def test_death_by_a_signal_is_128_and_its_number(cli: Cli, signal: str, code: int) -> None:
    assert cli("run", BASE, "--", "sh", "-c", f"kill -{signal} $$").returncode == code


def test_stdout_and_stderr_are_apart_and_byte_exact(cli: Cli) -> None:
    data = ALL_BYTES * 1000
    done = cli("run", BASE, "--", "sh", "-c", "tee /dev/stderr", input=data)
    assert done.returncode == 0
    assert done.stdout == data
    assert done.stderr == data


def test_stdin_ends(cli: Cli) -> None:
    assert cli("run", BASE, "--", "sh", "-c", "wc -c; echo end", input=b"12345").stdout == b"5\nend\n"


def test_a_closed_stdin_is_an_empty_one(cli: Cli) -> None:
    shell = 'exec "$@" <&-'
    done = subprocess.run(
        ["sh", "-c", shell, "sh", *command(["run", BASE, "--", "wc", "-c"])], capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, b"0\n")


def test_a_command_that_does_not_read_its_stdin_ends_all_the_same(cli: Cli) -> None:
    assert cli("run", BASE, "--", "echo", "done", input=bytes(4 << 20)).stdout == b"done\n"


def test_much_stdin_arrives_whole(cli: Cli) -> None:
    data = os.urandom(1 << 20) * 24
    done = cli("run", BASE, "--", "sha256sum", input=data)
    assert done.stdout.split()[0].decode() == hashlib.sha256(data).hexdigest()


def test_a_gibibyte_comes_whole_and_in_bounded_memory(tmp_path: Path) -> None:
    size = 1 << 30
    # The shell's child is vmette alone: the most memory of any child is its.
    watch = (
        "import resource, subprocess, sys\n"
        "process = subprocess.Popen(sys.argv[2:], stdout=int(sys.argv[1]))\n"
        "code = process.wait()\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)\n"
        "sys.exit(code)\n"
    )
    out, into = os.pipe()
    argv = command(["run", BASE, "--", "head", "-c", str(size), "/dev/zero"])
    with subprocess.Popen(
        [sys.executable, "-c", watch, str(into), *argv],
        stdout=subprocess.PIPE,
        pass_fds=[into],
        stdin=subprocess.DEVNULL,
    ) as process:
        os.close(into)
        total, zeros = 0, bytes(1 << 20)
        while data := os.read(out, 1 << 20):
            assert data == zeros[: len(data)]
            total += len(data)
        os.close(out)
        assert process.stdout is not None
        said = process.stdout.read()
    assert process.returncode == 0
    assert total == size
    # QEMU is a child's child and counted too: it maps the guest's 512 MiB.
    assert int(said) < 900 * 1024


def test_a_reader_that_goes_away_ends_the_run(cli: Cli) -> None:
    with subprocess.Popen(
        command(["run", BASE, "--", "yes"]), stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"y\n"
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""


def test_the_environment_is_only_what_was_given(cli: Cli) -> None:
    done = cli("run", "-e", "A=1", "--env", "B=x=y z", "-e", "EMPTY=", BASE, "--", "env")
    assert sorted(done.stdout.decode().splitlines()) == [
        "A=1",
        "B=x=y z",
        "EMPTY=",
        "HOME=/root",
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    ]


def test_arguments_arrive_as_they_are(cli: Cli) -> None:
    arguments = ["", " ", "$HOME", "a'b\"c", "\\n", "ä", "-x", "--", "*"]
    done = cli("run", BASE, "--", "sh", "-c", 'printf "[%s]" "$@"', "sh", *arguments)
    assert done.stdout.decode() == "".join(f"[{argument}]" for argument in arguments)


def test_a_long_command_line_arrives_whole(cli: Cli) -> None:
    """Longer than any kernel command line, and than a single argument of Linux may be."""
    arguments = ["x" * 100_000] * 10
    done = cli("run", BASE, "--", "sh", "-c", 'echo "$*" | wc -c; echo $#', "sh", *arguments)
    assert done.stdout.split() == [b"1000010", b"10"]


def test_user_and_directory(cli: Cli) -> None:
    done = cli("run", "-u", "nobody", "-w", "/etc", BASE, "--", "sh", "-c", "id -u; id -g; pwd; touch /etc/x")
    assert done.stdout == b"65534\n65534\n/etc\n"
    assert b"Permission denied" in done.stderr
    assert cli("run", "-u", "1000:1001", BASE, "--", "sh", "-c", "id -u; id -g").stdout == b"1000\n1001\n"


def test_a_shell_line(cli: Cli) -> None:
    assert cli("run", "--exec", "echo $((6 * 7)) | cat", BASE).stdout == b"42\n"
    assert cli("run", "--rootfs", BASE, "--exec", "exit 3").returncode == 3


def test_a_command_that_is_not_there(cli: Cli) -> None:
    done = cli("run", BASE, "--", "no-such-program")
    assert done.returncode == 127
    assert done.stderr == b"vmette: the root filesystem has no command 'no-such-program'\n"


def test_a_command_that_cannot_be_executed(cli: Cli) -> None:
    done = cli("run", BASE, "--", "/etc/passwd")
    assert done.returncode == 126
    assert done.stderr == b"vmette: cannot execute '/etc/passwd': Permission denied\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-w", "/nowhere"], "cannot run 'true': chdir: No such file or directory"),
        (["-u", "stranger"], "cannot run 'true': user: No such file or directory"),
    ],
)
def test_a_command_that_cannot_be_set_up(cli: Cli, options: list[str], message: str) -> None:
    done = cli("run", *options, BASE, "--", "true")
    assert (done.returncode, done.stderr.decode()) == (125, f"vmette: {message}\n")


def test_a_time_out(cli: Cli) -> None:
    done = cli("run", "--timeout", "8.5", BASE, "--", "sh", "-c", "echo before; sleep 1000")
    assert done.returncode == 124
    assert done.stdout == b"before\n"
    assert b"timed out after 8.5 seconds" in done.stderr


def test_a_time_out_of_zero_is_none(cli: Cli) -> None:
    assert cli("run", "--timeout", "0", BASE, "--", "true").returncode == 0


def test_a_time_out_before_the_guest_is_up(cli: Cli) -> None:
    assert cli("run", "--timeout", "0.05", BASE, "--", "true").returncode == 124


def test_processors_and_memory(cli: Cli) -> None:
    script = "nproc; awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo"
    processors, memory = cli("run", "--vcpus", "2", "--mem-mib", "256", BASE, "--", "sh", "-c", script).stdout.split()
    assert processors == b"2"
    assert 200 < int(memory) <= 256


def test_the_system_around_the_command(cli: Cli) -> None:
    done = cli(
        "run", BASE, "--", "sh", "-c", "cat /proc/mounts; echo; cat /etc/hosts; hostname; cat /sys/class/net/lo/flags"
    )
    mounts, rest = done.stdout.decode().split("\n\n")
    types = {(line.split()[1], line.split()[2]) for line in mounts.splitlines()}
    assert types >= {
        ("/", "overlay"),
        ("/proc", "proc"),
        ("/sys", "sysfs"),
        ("/sys/fs/cgroup", "cgroup2"),
        ("/dev", "devtmpfs"),
        ("/dev/pts", "devpts"),
        ("/dev/shm", "tmpfs"),
        ("/run", "tmpfs"),
        ("/tmp", "tmpfs"),
    }
    assert "127.0.0.1\tlocalhost vmette\n" in rest
    assert rest.endswith("vmette\n0x9\n")
    done = cli(
        "run", BASE, "--", "sh", "-c", "ping -c 1 localhost >/dev/null && ping -c 1 vmette >/dev/null && echo up"
    )
    assert done.stdout == b"up\n"


def test_orphans_are_reaped(cli: Cli) -> None:
    script = "for i in 1 2 3; do (sleep 0.1 &) ; done; sleep 1; ps -o stat,comm | grep -c '^Z'"
    assert cli("run", BASE, "--", "sh", "-c", script).stdout == b"0\n"


def test_what_stays_in_the_background_does_not_hold_the_run(cli: Cli) -> None:
    assert cli("run", BASE, "--", "sh", "-c", "sleep 1000 & echo started").stdout == b"started\n"


def test_writes_go_with_the_vm(cli: Cli) -> None:
    assert cli("run", BASE, "--", "sh", "-c", "echo x >/new && cat /new").stdout == b"x\n"
    assert cli("run", BASE, "--", "cat", "/new").returncode == 1


def test_a_read_only_root(cli: Cli) -> None:
    done = cli("run", "--rootfs-ro", BASE, "--", "sh", "-c", "echo x >/tmp/x && cat /tmp/x; touch /new")
    assert done.returncode == 1
    assert done.stdout == b"x\n"
    assert b"Read-only file system" in done.stderr


def test_timings_are_a_table_on_stderr(cli: Cli) -> None:
    done = cli("run", "--timings", BASE, "--", "echo", "out")
    assert done.stdout == b"out\n"
    _, *lines, way = done.stderr.decode().splitlines()
    assert way == "booted: VMETTE_TEMPLATES is 0"
    rows = [line.rsplit(maxsplit=4)[0] for line in lines]
    assert rows[0] == "python"
    assert rows[-1] == "end"
    assert {"rootfs", "vmm", "guest: kernel", "guest: init", "guest: root", "hello", "exit"} <= set(rows)


def test_debug_shows_the_console_on_stderr_only(cli: Cli) -> None:
    done = cli("run", "--debug", "--cmdline", "ignore_loglevel", BASE, "--", "echo", "out")
    assert done.stdout == b"out\n"
    assert b"[guest] Run /init as init process" in done.stderr


def test_a_guest_that_panics_is_told_apart(cli: Cli) -> None:
    done = cli("run", "--cmdline", "rdinit=/nothing", BASE, "--", "true")
    assert done.returncode == 125
    assert b"vmette: the guest ended before it was up: " in done.stderr
    assert b"Kernel panic" in done.stderr

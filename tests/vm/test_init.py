"""`switch_root`: an init system as PID 1 of the root, with the agent outside it."""

from __future__ import annotations

import platform
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE

import pytest

import vmette
from tests.vm.support import BASE, Cli, wait_until

PATIENCE = 120.0

INITTAB = b"""\
::sysinit:/bin/echo up
::respawn:/bin/sleep 1000
::shutdown:/bin/echo down
"""


@pytest.fixture
def sandbox() -> Iterator[vmette.Sandbox]:
    with vmette.Sandbox(BASE) as sandbox:
        sandbox.files.write("/etc/inittab", INITTAB)
        yield sandbox


def start(sandbox: vmette.Sandbox, *argv: str) -> vmette.Popen:
    """An init that has said `up`."""
    init = sandbox.popen(argv or ["init"], stderr=DEVNULL, switch_root=True)
    assert next(init.lines()) == "up"
    return init


def guest(sandbox: vmette.Sandbox, script: str) -> str:
    return sandbox.run(["sh", "-c", script], text=True, check=True, timeout=PATIENCE).stdout


def name_of_one(sandbox: vmette.Sandbox) -> str:
    return guest(sandbox, "cat /proc/1/comm").strip()


def test_later_commands_run_under_the_init_and_see_nothing_of_the_agent(sandbox: vmette.Sandbox) -> None:
    with start(sandbox) as init:
        assert name_of_one(sandbox) == "init"
        names = guest(sandbox, "cd /proc; for process in [0-9]*; do cat $process/comm; done").split()
        assert {"init", "sleep", "sh"} <= set(names)
        assert "kthreadd" not in names  # which is beside the agent
        assert guest(sandbox, "cat /proc/1/environ | tr '\\0' '\\n' | grep container") == "container=vmette\n"
        sandbox.files.write("/tmp/file", b"data")  # the agent's functions are inside, too
        assert sandbox.files.read("/proc/1/comm") == b"init\n"
        assert guest(sandbox, "cat /tmp/file") == "data"
        init.kill()
    assert guest(sandbox, "cat /proc/2/comm") == "kthreadd\n"


def test_the_init_supervises_and_reaps(sandbox: vmette.Sandbox) -> None:
    with start(sandbox) as init:
        wait_until(lambda: sandbox.run(["pidof", "sleep"]).returncode == 0, "the service")
        first = guest(sandbox, "pidof sleep")
        guest(sandbox, "kill -9 $(pidof sleep)")
        wait_until(lambda: sandbox.run(["pidof", "sleep"], text=True).stdout not in {"", first}, "its next start")
        guest(sandbox, "for i in 1 2 3; do (sh -c 'exit 3' &); done")
        zombies = "grep -l '^State:.Z' /proc/[0-9]*/status 2>/dev/null | wc -l"
        wait_until(lambda: guest(sandbox, zombies) == "0\n", "the end of the orphans")
        init.kill()


# What reboot(2) is in a PID namespace: https://man7.org/linux/man-pages/man2/reboot.2.html
@pytest.mark.parametrize(
    ("script", "ended_by"),
    [("poweroff", signal.SIGINT), ("reboot", signal.SIGHUP), ("halt", signal.SIGINT), ("kill -TERM 1", signal.SIGHUP)],
)
def test_an_init_that_ends_its_system(sandbox: vmette.Sandbox, script: str, ended_by: int) -> None:
    init = start(sandbox)
    bystander = sandbox.popen(["sleep", "1000"], stdout=DEVNULL, stderr=DEVNULL)
    with init:
        sandbox.run(["sh", "-c", script], timeout=PATIENCE)
        assert list(init.lines()) == ["down"]
    assert init.returncode == -ended_by
    assert bystander.wait(PATIENCE) < 0
    assert guest(sandbox, "echo alive") == "alive\n"  # outside again
    with start(sandbox) as init:  # and so there can be another
        init.kill()


def test_signals_of_the_host_reach_the_init(sandbox: vmette.Sandbox) -> None:
    script = "trap 'echo got; exit 5' TERM; echo up; while :; do sleep 0.1; done"
    with start(sandbox, "sh", "-c", script) as init:
        init.terminate()
        assert list(init.lines()) == ["got"]
    assert init.returncode == 5


def test_there_is_one_init(sandbox: vmette.Sandbox) -> None:
    with start(sandbox) as init:
        second = sandbox.popen(["init"], stdout=DEVNULL, stderr=DEVNULL, switch_root=True)
        with pytest.raises(vmette.CommandNotStarted, match="cannot run 'init': init: Resource busy"):
            second.wait(PATIENCE)
        assert name_of_one(sandbox) == "init"
        init.kill()


def test_an_init_that_is_not_there(sandbox: vmette.Sandbox) -> None:
    none = sandbox.popen(["nothing"], stdout=DEVNULL, stderr=DEVNULL, switch_root=True)
    with pytest.raises(vmette.CommandNotStarted, match="has no command 'nothing'"):
        none.wait(PATIENCE)
    assert guest(sandbox, "cat /proc/2/comm") == "kthreadd\n"
    with start(sandbox) as init:
        init.kill()


def test_a_run_whose_command_is_the_init(cli: Cli) -> None:
    script = "echo $$; ls -d /proc/[0-9]*; exit 7"
    done = vmette.run(BASE, ["sh", "-c", script], switch_root=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout.split()[:2]) == (7, ["1", "/proc/1"])
    printed = cli("run", "--switch-root", BASE, "--", "sh", "-c", script)
    assert (printed.returncode, printed.stdout.split()[:2]) == (7, [b"1", b"/proc/1"])


def test_a_command_that_is_an_init_and_has_a_terminal(sandbox: vmette.Sandbox) -> None:
    with sandbox.popen(["sh"], stdin=PIPE, terminal=(24, 80), switch_root=True) as init:
        out, _ = init.communicate(b"echo $$-$(tty)\nexit 3\n", timeout=PATIENCE)
    assert b"1-/dev/pts/0" in out
    assert init.returncode == 3


# --- systemd


@pytest.fixture(scope="module")
def systemd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Debian root filesystem, of this machine's release, with systemd in it, and what one of its units needs."""
    root = tmp_path_factory.mktemp("systemd") / "root"
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    mmdebstrap = ["mmdebstrap", "--variant=essential", "--include=systemd-sysv,kmod", "--quiet"]
    subprocess.run([*mmdebstrap, release, str(root)], check=True)
    return root


UNIT = b"""\
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'cat /proc/self/cgroup >/run/probe'
"""


def test_systemd_comes_up_and_goes_down(systemd: Path) -> None:
    with vmette.Sandbox(systemd, mem_mib=768) as sandbox:

        def systemctl(*words: str) -> str:
            return sandbox.run(["systemctl", *words], text=True, timeout=PATIENCE).stdout.strip()

        with sandbox.popen(["/sbin/init"], stdout=DEVNULL, stderr=DEVNULL, switch_root=True) as init:
            wait_until(lambda: systemctl("is-system-running") in {"running", "degraded"}, "systemd's start")
            assert name_of_one(sandbox) == "systemd"
            assert systemctl("is-active", "multi-user.target") == "active"
            assert systemctl("list-units", "--failed", "--plain", "--no-legend") == ""
            sandbox.files.write("/etc/systemd/system/probe.service", UNIT)
            systemctl("daemon-reload")
            systemctl("start", "probe")
            assert sandbox.files.read("/run/probe").endswith(b"/system.slice/probe.service\n")
            systemctl("poweroff")
            assert init.wait(PATIENCE) == -signal.SIGINT
        assert guest(sandbox, "echo alive") == "alive\n"

"""`vmette run -it`, from in front of a terminal."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.terminals import Terminal
from tests.vm.support import BASE, Cli, command, vmm_name, vmm_processes, vmms, wait_until

PROMPT = "/ # "
UP, LEFT, BACKSPACE, ESCAPE = "\x1b[A", "\x1b[D", "\x7f", "\x1b"
CTRL_C, CTRL_D, CTRL_Z, CTRL_BACKSLASH = "\x03", "\x04", "\x1a", "\x1c"

# Says that it runs, in words that differ from the line that is typed, and answers. (It is no shell: that of busybox
# sometimes loses a SIGQUIT that comes while it starts another program.)
PARROT = """awk 'BEGIN { print "run" "ning"; while ((getline line) > 0) print "<" line ">" }'\r"""


@contextmanager
def shell(*options: str, rows: int = 24, columns: int = 80) -> Iterator[Terminal]:
    """The guest's shell, which has given its prompt."""
    with Terminal(command(["run", "-it", *options, BASE, "sh"]), rows=rows, columns=columns) as terminal:
        terminal.until(PROMPT)
        yield terminal


def test_a_prompt_and_a_line_that_is_edited() -> None:
    with shell() as terminal:
        terminal.type(f"echo wrlx{BACKSPACE}d{LEFT * 3}o\r")
        terminal.until("\r\nworld\r\n")
        terminal.until(PROMPT)
        terminal.type(f"{UP}ly\r")
        terminal.until("\r\nworldly\r\n")
        terminal.type("exit 7\r")
        assert terminal.ended() == 7


def test_what_is_typed_while_the_guest_boots_is_kept() -> None:
    with Terminal(command(["run", "-it", "--exec", "read line; echo got=$line.", BASE])) as terminal:
        terminal.type("early bird\r")
        terminal.until("got=early bird.\r\n")
        assert terminal.ended() == 0


def test_size() -> None:
    with shell(rows=33, columns=101) as terminal:
        terminal.type("stty size\r")
        terminal.until("\r\n33 101\r\n")
        terminal.until(PROMPT)
        terminal.type("sh -c 'trap \"stty size; exit\" WINCH; echo wait''ing; while :; do sleep 1; done'\r")
        terminal.until("waiting\r\n")
        terminal.child.setwinsize(44, 123)
        terminal.until("44 123\r\n")
        terminal.until(PROMPT)
        terminal.type("exit\r")
        assert terminal.ended() == 0


def test_a_new_size_while_the_guest_boots() -> None:
    before = vmm_processes().keys()
    with Terminal(command(["run", "-it", BASE, "sh"]), rows=20, columns=70) as terminal:
        wait_until(lambda: bool(vmm_processes().keys() - before), "the start of the VM")
        terminal.child.setwinsize(21, 71)
        terminal.until(PROMPT)
        terminal.type("stty size; exit\r")
        terminal.until("\r\n21 71\r\n")
        assert terminal.ended() == 0


@pytest.mark.parametrize(("key", "status"), [(CTRL_C, 130), (CTRL_BACKSLASH, 131)], ids=["interrupt", "quit"])
def test_keys_that_end_a_program_and_not_the_shell(key: str, status: int) -> None:
    with shell() as terminal:
        terminal.type(PARROT)
        terminal.until("running\r\n")
        terminal.type(key)
        terminal.until(PROMPT)
        terminal.type("echo status=$?\r")
        terminal.until(f"status={status}\r\n")
        terminal.until(PROMPT)
        terminal.type("exit\r")
        assert terminal.ended() == 0


def test_job_control() -> None:
    with shell() as terminal:
        terminal.type(PARROT)
        terminal.until("running\r\n")
        terminal.type("once\r")
        terminal.until("<once>\r\n")
        terminal.type(CTRL_Z)
        terminal.until("Stopped")
        terminal.until(PROMPT)
        terminal.type("jobs\r")
        terminal.until("Stopped")
        terminal.until(PROMPT)
        terminal.type("fg\r")
        terminal.until("\r\nawk ")
        terminal.type("again\r")
        terminal.until("<again>\r\n")
        terminal.type(CTRL_C)
        terminal.until(PROMPT)
        terminal.type("jobs; echo no more''  jobs\r")
        assert b"Stopped" not in terminal.until("no more jobs\r\n")


def test_the_end_of_input_ends_the_shell_with_its_status() -> None:
    with shell() as terminal:
        terminal.type("(exit 9)\r")
        terminal.until(PROMPT)
        terminal.type(CTRL_D)
        assert terminal.ended() == 9


def test_an_editor_on_the_full_screen() -> None:
    with shell(rows=15, columns=60) as terminal:
        terminal.type("vi /tmp/letter\r")
        terminal.until_screen(lambda lines: lines[1:14] == ["~"] * 13 and "/tmp/letter" in lines[14])
        terminal.type("iDear guest\rGoodbye")
        terminal.until_screen(lambda lines: "Goodbye" in lines)
        terminal.type(ESCAPE)  # and nothing more at once, which would be some other key
        terminal.until_screen(lambda lines: lines[14].startswith("- /tmp/letter"))
        terminal.type(":wq\r")
        terminal.until(PROMPT)
        terminal.type("cat /tmp/letter; exit\r")
        terminal.until("\r\nDear guest\r\nGoodbye\r\n")
        assert terminal.ended() == 0


def test_top_fills_the_screen() -> None:
    with shell(rows=12, columns=90) as terminal:
        terminal.type("top\r")
        terminal.until_screen(lambda lines: lines[0].startswith("Mem: ") and "COMMAND" in lines[3])
        terminal.type("q")
        terminal.until(PROMPT)
        terminal.type("exit\r")
        assert terminal.ended() == 0


def test_all_bytes_both_ways() -> None:
    every = bytes(range(256)) * 4
    script = "stty raw -echo; echo ready; head -c 1024; stty sane; echo; echo done"
    with Terminal(command(["run", "-it", "--exec", script, BASE])) as terminal:
        terminal.until("ready\n")
        terminal.type(every)
        assert terminal.until("\r\ndone\r\n") == every
        assert terminal.ended() == 0


def test_the_end_of_much_output_comes() -> None:
    with Terminal(command(["run", "-t", "--exec", "seq 1 50000; printf end; exit 3", BASE])) as terminal:
        output = terminal.until("end")
        assert output == b"".join(b"%d\r\n" % number for number in range(1, 50001))
        assert terminal.ended() == 3


def test_words_that_are_not_shown() -> None:
    with shell() as terminal:
        terminal.type("stty -echo; printf 'pass''word: '; read word; echo; echo got=$word.\r")
        terminal.until("password: ")
        terminal.type("mellon\r")
        assert terminal.until("got=mellon.\r\n") == b"\r\n"


def test_what_the_command_is_told_of_the_host() -> None:
    shown = "echo term=$TERM lang=$LANG."
    for options, told in [([], "xterm-256color"), (["-e", "TERM=vt100"], "vt100")]:
        argv = command(["run", "-t", *options, "--exec", shown, BASE])
        with Terminal(argv, env={**os.environ, "TERM": "xterm-256color", "LANG": "de_AT.UTF-8"}) as terminal:
            terminal.until(f"term={told} lang=.\r\n")
            assert terminal.ended() == 0


# --- ways out


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)], ids=str
)
def test_a_signal_ends_it(number: int, code: int) -> None:
    with shell() as terminal:
        os.kill(terminal.pid, number)
        assert terminal.ended() == code


def test_a_person_who_does_not_wait_for_the_guest() -> None:
    before = vmm_processes().keys()
    with Terminal(command(["run", "-it", BASE, "cat"])) as terminal:
        wait_until(lambda: bool(vmm_processes().keys() - before), "the start of the VM")
        terminal.type(CTRL_C)  # ends vmette, or the command if it is there already
        assert terminal.ended() == 130


def test_a_time_out() -> None:
    with Terminal(command(["run", "-it", "--timeout", "10", BASE, "cat"])) as terminal:
        assert terminal.ended() == 124


def test_the_guest_powers_off() -> None:
    with shell() as terminal:
        terminal.type("poweroff -f\r")
        assert terminal.ended() == 125


def test_the_vmm_is_killed() -> None:
    with shell() as terminal:
        children = Path(f"/proc/{terminal.pid}/task/{terminal.pid}/children").read_text().split()
        for pid in vmms() & set(map(int, children)):
            os.kill(pid, signal.SIGKILL)
        terminal.until(f"vmette: {vmm_name()} was killed by signal 9\r\n")
        assert terminal.ended() == 125


def test_a_command_that_does_not_start() -> None:
    with Terminal(command(["run", "-it", BASE, "nonesuch"])) as terminal:
        terminal.until("vmette: the root filesystem has no command 'nonesuch'\r\n")
        assert terminal.ended() == 127


def test_a_terminal_that_goes_takes_the_vm_along() -> None:
    before = vmm_processes().keys()
    with shell() as terminal:
        assert vmm_processes().keys() - before
        terminal.child.close()
        wait_until(lambda: not vmm_processes().keys() - before, "the end of the VM")


@pytest.mark.parametrize("number", [signal.SIGTSTP, signal.SIGSTOP], ids=["asked to stop", "made to stop"])
def test_stopped_and_continued_by_the_hosts_shell(number: int) -> None:
    """While it is aside the terminal becomes larger, which only the program in the foreground is told: the shell."""
    with Terminal(["dash", "-i"], env={**os.environ, "PS1": "host> "}) as terminal:
        terminal.until("host> ")
        terminal.type("sh -c 'echo vmette=$$; exec \"$@\"' sh " + " ".join(command(["run", "-it", BASE, "sh"])) + "\r")
        pid = int(terminal.groups(r"vmette=([0-9]+)\r\n")[0])
        terminal.until(PROMPT)
        os.kill(pid, number)
        terminal.until("host> ")
        if number == signal.SIGTSTP:
            terminal.type("stty -g\r")
            terminal.until(b"stty -g\r\n" + terminal.before + b"\r\n")
        else:  # which leaves no time to give the terminal back: most shells set it right, but not this one
            terminal.type("stty sane\n")
        terminal.until("host> ")
        terminal.child.setwinsize(33, 99)
        terminal.type("fg\r")
        terminal.until("run -it")
        terminal.type("stty size\r")
        terminal.until("\r\n33 99\r\n")
        terminal.until(PROMPT)
        terminal.type("exit 5\r")
        terminal.until("host> ")
        terminal.type("exit $?\r")
        assert terminal.ended() == 5


# --- without a terminal


@pytest.mark.parametrize("options", [["-t"], ["-it"], ["-i", "--tty"]], ids=" ".join)
def test_a_terminal_needs_one(cli: Cli, options: list[str]) -> None:
    done = cli("run", *options, BASE, "cat")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"vmette: the input is no terminal: use -i without -t\n"


@pytest.mark.parametrize("options", [["-i"], ["--interactive"], []], ids=" ".join)
def test_a_pipe_is_passed_on(cli: Cli, options: list[str]) -> None:
    done = cli("run", *options, BASE, "bc", input=b"2+2\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"4\n", b"")


def test_output_that_goes_elsewhere(tmp_path: Path) -> None:
    """As under Docker, it is the input that makes the terminal; all output is one stream."""
    words = command(["run", "-it", "--exec", "stty size; echo out; echo err >&2", BASE])
    script = 'exec "$@" >' + str(tmp_path / "output")
    with Terminal(["sh", "-c", script, "sh", *words], rows=25, columns=81) as terminal:
        assert terminal.ended() == 0
    assert (tmp_path / "output").read_bytes() == b"25 81\r\nout\r\nerr\r\n"

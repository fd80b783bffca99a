"""csrc/vmm_main.c: vmette-vz by its own interface, over the stand-in (tests/fake_vz/), built with sanitizers."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.fake_vz.build import program
from vmette import assets
from vmette.descriptors import receive
from vmette.vmm.vz_link import HEADER, MAX_PAYLOAD, PORT, Event, FrameworkError, Request

ARCH = assets.host_arch()
OPTIONS = "exitcode=99:detect_leaks=0"
"""For the sanitizers. The program ends in the middle of things, as it is meant to."""

DEPRECATED = "fd: migration to a file is deprecated"
"""QEMU 10's word on how the stand-in saves a machine and wakes one; QEMU 7.2 knows no other way."""

Frame = tuple[int, int, bytes, int | None]


@pytest.fixture(scope="module")
def vmette_vz() -> Path:
    return program(sanitized=True)


def environment(faults: str = "") -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "FAKE_VZ_FAULT": faults, "ASAN_OPTIONS": OPTIONS, "UBSAN_OPTIONS": OPTIONS}


class Vz:
    """A running vmette-vz. `guest` is the other end of its control port."""

    def __init__(self, path: Path, records: Sequence[bytes], faults: str = "") -> None:
        self.connection, connection = socket.socketpair()
        self.guest, control = socket.socketpair()
        for ours in (self.connection, self.guest):
            ours.settimeout(60)
        reader, writer = os.pipe()
        fds = (reader, connection.fileno(), control.fileno())
        described = b"".join(record.replace(b"CONTROL", b"%d" % fds[2]) + b"\0" for record in records)
        try:
            self.process = subprocess.Popen(
                [path, str(fds[0]), str(fds[1])], pass_fds=fds, env=environment(faults), stderr=subprocess.PIPE
            )
        finally:
            for end in (connection, control):
                end.close()
            os.close(reader)
        with suppress(BrokenPipeError), os.fdopen(writer, "wb", buffering=0) as file:
            file.write(described)

    def send(self, kind: int, number: int = 1, payload: bytes = b"") -> None:
        self.connection.sendall(HEADER.pack(kind, number, len(payload)) + payload)

    def heard(self) -> Frame:
        """The next frame; (0, 0, b"", None) at the end."""
        data, fds = receive(self.connection, HEADER.size, 1)
        if not data:
            return 0, 0, b"", None
        kind, number, size = HEADER.unpack(data)
        payload = b""
        while len(payload) < size:
            payload += self.connection.recv(size - len(payload))
        return kind, number, payload, fds[0] if fds else None

    def asked(self, kind: int, payload: bytes = b"") -> bytes:
        """What a request is answered with.

        Raises:
            FrameworkError: it is refused.
        """
        self.send(kind, 7, payload)
        event, number, answer, _ = self.heard()
        assert number == 7
        if event == Event.FAILED:
            raise FrameworkError.decode(answer)
        assert event == Event.DONE
        return answer

    def ended(self) -> tuple[int, str]:
        """Its exit status and what it said on stderr, once it has ended."""
        _, said = self.process.communicate(timeout=60)
        lines = [line for line in said.decode().splitlines(keepends=True) if DEPRECATED not in line]
        return self.process.returncode, "".join(lines)

    def qemu(self) -> set[int]:
        """Its child processes."""
        found = set()
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            found |= {int(pid) for pid in (task / "children").read_text().split()}
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()
        self.connection.close()
        self.guest.close()


def gone(pid: int) -> None:
    end = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < end, f"{pid} is still there"
        time.sleep(0.02)


def machine(*more: bytes, kernel: str | None = None) -> list[bytes]:
    """A machine whose guest says that it lacks a root, and powers off."""
    named = {"kernel": kernel or str(assets.kernel(ARCH)), "initrd": str(assets.initramfs(ARCH))}
    records = [f"{name}={value}".encode() for name, value in named.items()]
    records += [b"cmdline=console=hvc0 quiet panic=-1", b"cpus=1", b"memory=268435456", b"entropy="]
    return [*records, b"port=CONTROL:vmette.control", *more]


@contextmanager
def running(path: Path, records: Sequence[bytes], faults: str = "") -> Iterator[Vz]:
    vz = Vz(path, records, faults)
    try:
        yield vz
        for pid in vz.qemu() if vz.process.poll() is None else ():
            os.kill(pid, 0)
    finally:
        children = vz.qemu() if vz.process.poll() is None else set()
        vz.close()
        for pid in children:
            gone(pid)


def created(vz: Vz) -> None:
    assert vz.heard()[:3] == (Event.CREATED, 0, b"")


# --- Before there is a machine


def test_capabilities(vmette_vz: Path) -> None:
    done = subprocess.run([vmette_vz, "--capabilities"], env=environment(), capture_output=True, text=True, check=True)
    said = dict(line.split("=") for line in done.stdout.splitlines())
    assert (said["supported"], said["entitled"], said["rosetta"], said["macos"]) == (
        "1",
        "1",
        "not-supported",
        "14.0.0",
    )
    assert 1 == int(said["min_cpus"]) <= int(said["max_cpus"])
    assert 0 < int(said["min_memory"]) < int(said["max_memory"])


@pytest.mark.parametrize("arguments", [[], ["1"], ["--help"], ["1", "2", "3"]])
def test_wrong_usage(vmette_vz: Path, arguments: list[str]) -> None:
    done = subprocess.run([vmette_vz, *arguments], env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: vmette-vz ")


@pytest.mark.parametrize(
    ("records", "complaint"),
    [
        ([], "the configuration ends within a record"),
        ([b"cpus=1"], "the configuration names no kernel"),
        ([b""], "a record without a value"),
        ([b"kernel"], "a record without a value"),
        ([b"colour=red"], "an unknown record: colour"),
        ([b"=x"], "an unknown record"),
        ([b"vsock=yes"], "an unknown record: vsock"),
        ([b"cpus="], "no number: cpus"),
        ([b"cpus=one"], "no number, or too large a one: cpus"),
        ([b"cpus=-1"], "no number, or too large a one: cpus"),
        ([b"cpus= 1"], "no number, or too large a one: cpus"),
        ([b"cpus=4294967296"], "no number, or too large a one: cpus"),
        ([b"memory=18446744073709551616"], "no number, or too large a one: memory"),
        ([b"console=900"], "a descriptor that is not open: console"),
        ([b"console=2147483648"], "no number, or too large a one: console"),
        ([b"port=1"], "a record without all its parts: port"),
        ([b"port=900:name"], "a descriptor that is not open: port"),
        ([b"disk=/path"], "a record without all its parts: disk"),
        ([b"disk=rx:/path"], "a record with an unknown word: disk"),
        ([b"share=ro:tag"], "a record without all its parts: share"),
        ([b"share=kept:tag:/path"], "a record with an unknown word: share"),
        ([b"identifier=0"], "a malformed record: identifier"),
        ([b"identifier=0x"], "a malformed record: identifier"),
        ([b"identifier="], "a malformed record: identifier"),
        ([b"identifier=" + b"00" * 1025], "a malformed record: identifier"),
        ([b"disk=ro:/x"] * 65, "too many records: disk"),
        ([b"share=ro:t:/x"] * 65, "too many records: share"),
        ([b"port=2:x"] * 65, "too many records: port"),
        ([b"cmdline=" + b"x" * (256 << 10)], "the configuration is too long"),
    ],
)
def test_a_configuration_that_is_none(vmette_vz: Path, records: list[bytes], complaint: str) -> None:
    with running(vmette_vz, records) as vz:
        status, said = vz.ended()
        assert (status, said) == (1, f"vmette-vz: {complaint}\n")
        assert vz.heard()[0] == 0


def test_a_configuration_that_is_cut_short(vmette_vz: Path) -> None:
    with running(vmette_vz, machine()) as vz:
        created(vz)
    reader, writer = os.pipe()
    os.write(writer, b"kernel=/x\0cpus=1")
    os.close(writer)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        argv = [str(vmette_vz), str(reader), str(theirs.fileno())]
        done = subprocess.run(
            argv, pass_fds=(reader, theirs.fileno()), env=environment(), capture_output=True, text=True, check=False
        )
    os.close(reader)
    assert (done.returncode, done.stderr) == (1, "vmette-vz: the configuration ends within a record\n")


@pytest.mark.parametrize(
    ("more", "faults", "domain", "code", "text"),
    [
        ([], "unsupported", "vmette", errno.ENOTSUP, "this computer cannot virtualize"),
        ([], "unentitled", "vmette", errno.EPERM, "entitlement com.apple.security.virtualization"),
        ([], "validate", "VZErrorDomain", 2, "A fault."),
        ([b"cpus=99"], "", "VZErrorDomain", 2, "number of CPUs"),
        ([b"memory=1048577"], "", "VZErrorDomain", 2, "memory size"),
        ([b"disk=ro:/nothing"], "", "NSPOSIXErrorDomain", errno.ENOENT, "/nothing cannot be opened"),
        ([b"disk=ro:/etc/hostname"], "", "VZErrorDomain", 5, "Invalid disk image."),
        ([b"share=ro:tag:/nothing"], "", "VZErrorDomain", 2, "Cannot read /nothing"),
        ([b"share=ro:" + b"t" * 36 + b":/tmp"], "", "VZErrorDomain", 2, "tag is malformed"),
        ([b"rosetta=tag"], "", "VZErrorDomain", 2, "no Rosetta"),
        ([b"kernel=/nothing"], "", "VZErrorDomain", 2, "Cannot read /nothing"),
    ],
)
def test_a_machine_that_cannot_be_made(
    vmette_vz: Path, more: list[bytes], faults: str, domain: str, code: int, text: str
) -> None:
    with running(vmette_vz, machine(*more), faults) as vz:
        kind, number, payload, _ = vz.heard()
        assert (kind, number) == (Event.FAILED, 0)
        error = FrameworkError.decode(payload)
        assert (error.domain, error.code) == (domain, code)
        assert text in str(error)
        status, said = vz.ended()
        assert status == 1
        assert said.endswith(f"({domain} {code})\n")


# --- Requests


@pytest.mark.parametrize(
    ("frame", "complaint"),
    [
        (HEADER.pack(Request.START, 0, 0), "a malformed request: header"),
        (HEADER.pack(Request.START, 1, MAX_PAYLOAD + 1), "a malformed request: header"),
        (HEADER.pack(Request.START, 1, 0xFFFFFFFF), "a malformed request: header"),
        (HEADER.pack(0, 1, 0), "an unknown request"),
        (HEADER.pack(13, 1, 0), "an unknown request"),
        (HEADER.pack(0xFFFFFFFF, 1, 0), "an unknown request"),
        (HEADER.pack(Request.CONNECT, 1, 3) + b"abc", "a malformed request: port"),
        (HEADER.pack(Request.LISTEN, 1, 0), "a malformed request: port"),
        (HEADER.pack(Request.UNLISTEN, 1, 5) + b"abcde", "a malformed request: port"),
        (HEADER.pack(Request.SAVE, 1, 0), "a malformed request: path"),
        (HEADER.pack(Request.RESTORE, 1, 4) + b"/a\0b", "a malformed request: path"),
    ],
)
def test_a_request_that_is_none(vmette_vz: Path, frame: bytes, complaint: str) -> None:
    with running(vmette_vz, machine()) as vz:
        created(vz)
        vz.connection.sendall(frame)
        assert vz.ended() == (1, f"vmette-vz: {complaint}\n")


@pytest.mark.parametrize("part", [1, 11, 13])
def test_a_request_that_is_cut_short(vmette_vz: Path, part: int) -> None:
    with running(vmette_vz, machine()) as vz:
        created(vz)
        vz.connection.sendall((HEADER.pack(Request.SAVE, 1, 5) + b"/path")[:part])
        vz.connection.shutdown(socket.SHUT_WR)
        assert vz.ended() == (0, "")


def test_a_whole_life(vmette_vz: Path, tmp_path: Path) -> None:
    """Start, pause, save, resume, stop; and again, from what was saved."""
    saved = bytes(tmp_path / "saved")
    with running(vmette_vz, machine(b"identifier=" + b"ab" * 16)) as vz:
        created(vz)
        assert vz.asked(Request.IDENTIFIER) == b"\xab" * 16
        for request in (Request.PAUSE, Request.RESUME, Request.REQUEST_STOP):
            with pytest.raises(FrameworkError, match=r"VZErrorDomain 3"):
                vz.asked(request)
        vz.asked(Request.VALIDATE_SAVE)
        vz.asked(Request.START)
        with pytest.raises(FrameworkError, match=r"VZErrorDomain 3"):
            vz.asked(Request.START)
        vz.asked(Request.PAUSE)
        with pytest.raises(FrameworkError, match=r"VZErrorDomain 3"):
            vz.asked(Request.PAUSE)
        vz.asked(Request.SAVE, saved)
        with pytest.raises(FrameworkError, match=rf"NSPOSIXErrorDomain {errno.EEXIST}"):
            vz.asked(Request.SAVE, saved)
        vz.asked(Request.RESUME)
        assert vz.guest.recv(1)
        vz.send(Request.STOP)
        while (frame := vz.heard())[0] == Event.DONE:
            pass
        assert frame == (Event.ENDED, 0, b"", None)
        assert vz.ended() == (0, "")
    assert Path(os.fsdecode(saved)).stat().st_mode & 0o777 == 0o600
    with running(vmette_vz, machine()) as vz:
        created(vz)
        vz.asked(Request.RESTORE, saved)
        vz.asked(Request.RESUME)
        assert vz.guest.recv(1)  # it had said nothing yet when it was saved
        assert vz.heard() == (Event.ENDED, 0, b"", None)
        assert vz.ended() == (0, "")


def test_a_guest_that_powers_off_is_an_end(vmette_vz: Path) -> None:
    with running(vmette_vz, machine()) as vz:
        created(vz)
        vz.asked(Request.START)
        assert vz.heard() == (Event.ENDED, 0, b"", None)
        assert vz.ended() == (0, "")
        with vz.guest.makefile("rb") as file:
            assert file.read()  # the guest's last words, and then the end of the port


@pytest.mark.parametrize("content", [None, b"", b"QEV", b"nonsense" * 100])
def test_what_was_never_saved_is_not_restored(vmette_vz: Path, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "saved"
    if content is not None:
        path.write_bytes(content)
    with running(vmette_vz, machine()) as vz:
        created(vz)
        with pytest.raises(FrameworkError) as caught:
            vz.asked(Request.RESTORE, bytes(path))
        expected = ("NSPOSIXErrorDomain", errno.ENOENT) if content is None else ("VZErrorDomain", 12)
        assert (caught.value.domain, caught.value.code) == expected


@pytest.mark.parametrize(("fault", "code"), [("start", 1), ("limit", 6)])
def test_a_start_that_fails(vmette_vz: Path, fault: str, code: int) -> None:
    with running(vmette_vz, machine(), fault) as vz:
        created(vz)
        with pytest.raises(FrameworkError) as caught:
            vz.asked(Request.START)
        assert (caught.value.domain, caught.value.code) == ("VZErrorDomain", code)


def test_a_machine_that_comes_to_grief(vmette_vz: Path) -> None:
    with running(vmette_vz, machine(b"port=CONTROL:other"), "guest-error") as vz:
        created(vz)
        vz.asked(Request.START)
        vz.asked(Request.PAUSE)  # or it would be done before
        kind, number, payload, _ = vz.heard()
        assert (kind, number) == (Event.ENDED, 0)
        error = FrameworkError.decode(payload)
        assert (error.domain, error.code) == ("VZErrorDomain", 1)
        status, said = vz.ended()
        assert (status, said.count("\n")) == (1, 1)


# --- vsock


def connected(vz: Vz, port: int) -> socket.socket:
    vz.send(Request.CONNECT, 9, PORT.pack(port))
    kind, number, payload, fd = vz.heard()
    assert (kind, number, payload) == (Event.DONE, 9, b"")
    assert fd is not None
    return socket.socket(fileno=fd)


def test_descriptors_are_handed_over_and_not_kept(vmette_vz: Path) -> None:
    with running(vmette_vz, machine()) as vz:
        created(vz)
        with connected(vz, 5000):
            pass
        directory = Path(f"/proc/{vz.process.pid}/fd")
        before = len(list(directory.iterdir()))
        for _ in range(100):
            with connected(vz, 5000) as connection:
                connection.sendall(b"echo")
                assert connection.recv(4, socket.MSG_WAITALL) == b"echo"
        end = time.monotonic() + 30
        while len(list(directory.iterdir())) > before:
            assert time.monotonic() < end
            time.sleep(0.01)
        with pytest.raises(FrameworkError, match=rf"NSPOSIXErrorDomain {errno.ECONNRESET}"):
            vz.asked(Request.CONNECT, PORT.pack(80))


def test_connections_of_the_guest_are_handed_over(vmette_vz: Path) -> None:
    with running(vmette_vz, machine()) as vz:
        created(vz)
        vz.asked(Request.LISTEN, PORT.pack(5000))
        with pytest.raises(FrameworkError) as caught:
            vz.asked(Request.LISTEN, PORT.pack(5000))
        assert (caught.value.domain, caught.value.code) == ("vmette", errno.EADDRINUSE)
        vz.send(Request.CONNECT, 3, PORT.pack(5000))
        frames = {vz.heard()[0]: None, vz.heard()[0]: None}
        assert frames.keys() == {Event.ACCEPTED, Event.DONE}
        vz.asked(Request.UNLISTEN, PORT.pack(5000))
        vz.asked(Request.UNLISTEN, PORT.pack(5000))
        vz.asked(Request.LISTEN, PORT.pack(5000))


# --- Its own end


@pytest.mark.parametrize("when", ["before it is made", "before its start", "in its start", "later"])
def test_a_connection_that_is_closed_ends_it(vmette_vz: Path, when: str) -> None:
    with running(vmette_vz, machine(), "slow-start" if when == "in its start" else "") as vz:
        if when != "before it is made":
            created(vz)
        if when == "in its start":
            vz.send(Request.START)
        if when == "later":
            vz.asked(Request.START)
        vz.connection.shutdown(socket.SHUT_RDWR)
        status, said = vz.ended()
        assert (status, said) == (0, "")


PARENT = """
import os, sys
from pathlib import Path
from tests.test_vmm_main import Vz, machine, created
from vmette.vmm.vz_link import Request
vz = Vz(Path(sys.argv[1]), machine())
created(vz)
vz.asked(Request.START)
vz.asked(Request.PAUSE)
print(vz.process.pid, *vz.qemu(), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_does_not_outlive_its_parent(vmette_vz: Path, number: int) -> None:
    """By the end of the connection: what vmette adds to that on Linux, the kernel's word, is not asked for here."""
    argv = [sys.executable, "-c", PARENT, str(vmette_vz)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.send_signal(number)
        parent.wait(30)
    for pid in pids:
        gone(pid)


def test_one_that_is_killed_takes_its_machine_along(vmette_vz: Path) -> None:
    with running(vmette_vz, machine()) as vz:
        created(vz)
        vz.asked(Request.START)
        vz.asked(Request.PAUSE)
        (pid,) = vz.qemu()
        vz.process.kill()
        gone(pid)

"""`vmette.vmm.vz`: what it asks of a vmette-vz, and what it makes of the answers. (tests/vm/ has machines that run.)"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from vmette import assets
from vmette.config import Disk, MachineConfig, Share
from vmette.errors import ConfigError, PayloadError, VmmError
from vmette.providers.base import BlockFs, BlockImage, Directory
from vmette.vmm import vz
from vmette.vmm.vz_link import HEADER, Event, FrameworkError, Link, Request, VzVsock

ARCH = assets.host_arch()

CAPABILITIES = {
    "supported": "1",
    "entitled": "1",
    "save_restore": "1",
    "rosetta": "installed",
    "macos": "14.5",
    "min_cpus": "1",
    "max_cpus": "8",
    "min_memory": str(64 << 20),
    "max_memory": str(8 << 30),
}


def program(**changes: str) -> vz.Program:
    said = CAPABILITIES | changes
    cpus, memory = (1, int(said["max_cpus"])), (int(said["min_memory"]), int(said["max_memory"]))
    return vz.Program(Path("/vmette-vz"), True, True, True, said["rosetta"], said["macos"], cpus, memory)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VMETTE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- The program


def script(path: Path, body: str = "", **changes: str) -> Path:
    """A vmette-vz that says of this computer what `changes` do."""
    lines = [f"echo {name}='{value}'" for name, value in (CAPABILITIES | changes).items()]
    path.write_text("\n".join(["#!/bin/sh", body, *lines]))
    path.chmod(0o755)
    return path


@pytest.fixture
def ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "vmette-vz"
    monkeypatch.setenv("VMETTE_VZ", str(path))
    return path


def test_what_it_says_is_remembered_until_it_changes(ours: Path, tmp_path: Path) -> None:
    script(ours, f"echo asked >>{tmp_path}/log")
    first = vz.program()
    assert (first.cpus, first.memory, first.macos) == ((1, 8), (64 << 20, 8 << 30), "14.5")
    assert vz.program() == first
    assert (tmp_path / "log").read_text() == "asked\n"
    script(ours, f"echo asked >>{tmp_path}/log", max_cpus="4 ")
    assert vz.program().cpus == (1, 4)


@pytest.mark.parametrize("said", ["", "supported=1", "supported=1\nentitled=1\nmin_cpus=many"])
def test_one_that_says_something_else(ours: Path, said: str) -> None:
    ours.write_text(f"#!/bin/sh\nprintf '{said}'")
    ours.chmod(0o755)
    with pytest.raises(VmmError, match="does not say what this computer can do: install vmette anew"):
        vz.program()


@pytest.mark.parametrize("body", ["exit 1", "kill -9 $$"])
def test_one_that_does_not_run(ours: Path, body: str) -> None:
    script(ours, body)
    with pytest.raises(VmmError, match="vmette-vz does not run: "):
        vz.program()


def test_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VMETTE_VZ", raising=False)
    monkeypatch.setattr(assets, "PAYLOAD", tmp_path)
    with pytest.raises(
        PayloadError, match="macos/vmette-vz is missing: install vmette's wheel for macOS, or set VMETTE"
    ):
        vz.program()


CODESIGN = """#!/bin/sh
echo "$@" >>{log}
for last; do :; done
sed -i "s/entitled='0'/entitled='1'/" "$last"
"""


@pytest.fixture
def codesign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of macOS's; what it is told stands in the file that is returned."""
    path, log = tmp_path / "codesign", tmp_path / "codesign.log"
    path.write_text(CODESIGN.format(log=log))
    path.chmod(0o755)
    monkeypatch.setattr(vz, "CODESIGN", path)
    return log


def test_one_without_the_entitlement_is_signed_once(ours: Path, codesign: Path, cache: Path) -> None:
    before = script(ours, entitled="0").read_text()
    found = vz.program()
    assert found.entitled
    assert found.path.parent == cache / "vmm"
    assert found.path.stat().st_mode & 0o777 == 0o700
    assert vz.program() == found
    (line,) = codesign.read_text().splitlines()
    assert line.startswith(f"--sign - --force --entitlements {vz.ENTITLEMENTS} ")
    assert vz.ENTITLEMENTS.is_file()
    assert ours.read_text() == before
    assert sorted(path.name for path in found.path.parent.iterdir()) == ["lock", found.path.name]


def test_many_at_once_sign_one(ours: Path, codesign: Path) -> None:
    script(ours, entitled="0")
    found: list[vz.Program] = []
    threads = [threading.Thread(target=lambda: found.append(vz.program())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(codesign.read_text().splitlines()) == 1


def test_a_signature_that_gives_nothing(ours: Path, codesign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(ours, entitled="0")
    monkeypatch.setattr(vz, "CODESIGN", Path("/bin/true"))
    with pytest.raises(VmmError, match="may not run virtual machines: codesign has not given it the entitlement"):
        vz.program()


def test_a_signature_that_fails(ours: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(ours, entitled="0")
    failing = script(tmp_path / "failing", "echo 'no\nidentity' >&2; exit 1")
    monkeypatch.setattr(vz, "CODESIGN", failing)
    with pytest.raises(VmmError, match=r"^codesign does not sign .*\.part: no identity$"):
        vz.program()
    monkeypatch.setattr(vz, "CODESIGN", Path("/nothing"))
    with pytest.raises(VmmError, match=r"^vmette-vz has no entitlement, and cannot be signed in .*vmm: "):
        vz.program()
    assert [path.name for path in (cache / "vmm").iterdir() if not path.name.endswith((".part", "lock"))] == []


def test_one_in_quarantine_is_not_run_but_copied(
    ours: Path, codesign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(ours, f'[ "$0" != {ours} ] || touch {tmp_path}/was-run')
    monkeypatch.setattr(vz, "quarantined", lambda path: path == ours)
    assert vz.program().path != ours
    assert not (tmp_path / "was-run").exists()


def test_quarantine_is_an_attribute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux lets users have attributes of the namespace `user` alone."""
    monkeypatch.setattr(vz, "QUARANTINE", "user.quarantine")
    path = script(tmp_path / "file")
    assert not vz.quarantined(path)
    os.setxattr(path, "user.quarantine", b"0081;")
    assert vz.quarantined(path)
    vz._unquarantine(path)
    assert not vz.quarantined(path)
    vz._unquarantine(path)
    assert not vz.quarantined(tmp_path / "nothing")


def test_a_computer_that_cannot(ours: Path) -> None:
    script(ours, supported="0")
    with pytest.raises(VmmError, match="this Mac cannot virtualize"):
        vz.program()


@pytest.mark.parametrize(
    ("version", "machine", "translated", "problem"),
    [
        ("13.0", "arm64", False, None),
        ("26.1", "arm64", False, None),
        ("12.7.6", "arm64", False, "this Mac has macOS 12.7.6, and vmette needs 13.0 or later: update it"),
        ("14.1", "x86_64", False, "this is an Intel Mac, and vmette runs on Apple silicon only"),
        ("14.1", "x86_64", True, "this Python is one for Intel Macs, run by Rosetta: use one for Apple silicon"),
    ],
)
def test_macs(
    monkeypatch: pytest.MonkeyPatch, version: str, machine: str, translated: bool, problem: str | None
) -> None:
    host = os.uname_result(("Darwin", "mac", "23", "Darwin Kernel", machine))
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("platform.mac_ver", lambda: (version, ("", "", ""), machine))
    monkeypatch.setattr("os.uname", lambda: host)
    monkeypatch.setattr(vz, "_translated", lambda: translated)
    assert vz.host_problem() == problem
    if problem is not None:
        with pytest.raises(VmmError) as caught:
            vz.program()
        assert str(caught.value) == problem


# --- What it is told


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(1024))
    return path


def records_of(**fields: Any) -> list[tuple[str, str]]:
    config = MachineConfig(**{"root": None, "arch": ARCH, **fields})
    root = config.root.path if isinstance(config.root, BlockImage) else None
    return list(vz.records(config, root, Path("/scratch") if config.scratch_mib else None))


def test_a_machine_is_told_whole_and_in_the_order_of_its_disks(image: Path, tmp_path: Path) -> None:
    told = records_of(
        root=BlockImage(image, BlockFs.EROFS),
        disks=(Disk(image), Disk(image, read_only=True)),
        scratch_mib=64,
        shares=(Share("a", tmp_path), Share("b", tmp_path, read_only=True)),
        network=True,
        vsock=True,
        rosetta=True,
        vcpus=2,
        mem_mib=256,
    )
    assert [value for name, value in told if name == "disk"] == [
        f"ro:{image}",
        f"kept:{image}",
        f"ro:{image}",
        "rw:/scratch",
    ]
    assert [value for name, value in told if name == "share"] == [f"rw:a:{tmp_path}", f"ro:b:{tmp_path}"]
    rest = {name: value for name, value in told if name not in {"disk", "share", "kernel", "initrd", "cmdline"}}
    assert rest == {
        "cpus": "2",
        "memory": str(256 << 20),
        "console": "6",
        "port": "5:vmette.control",
        "entropy": "",
        "network": "",
        "vsock": "",
        "rosetta": "vmette-rosetta",
    }
    tokens = dict(told)["cmdline"].split()
    expected = {"vmette.rootfs_block=erofs", "vmette.scratch=/dev/vdd", "vmette.net=dhcp"}
    expected |= {"vmette.share=virtiofs:a:rw", "vmette.share=virtiofs:b:ro", "vmette.rosetta=virtiofs:vmette-rosetta"}
    assert expected <= set(tokens)


def test_what_is_not_asked_for_is_not_there(tmp_path: Path) -> None:
    told = dict(records_of(root=Directory(tmp_path)))
    assert not {"network", "vsock", "rosetta", "disk", "balloon"} & told.keys()
    assert told["share"] == f"ro:rootfs:{tmp_path}"
    assert "vmette.rootfs_share=virtiofs:rootfs" in told["cmdline"].split()


def test_records_are_ended_by_nul(tmp_path: Path) -> None:
    assert vz.encode([("a", "b c"), ("d", "")]) == b"a=b c\0d=\0"
    assert vz.encode([("share", os.fsdecode(b"\xff"))]) == b"share=\xff\0"
    with pytest.raises(ConfigError, match="share has a NUL byte"):
        vz.encode([("share", "a\0kernel=/evil")])


OTHER = {"x86_64": "aarch64", "aarch64": "x86_64"}[ARCH]


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        ({"accel": "tcg"}, {}, "accelerator 'tcg' is QEMU's; Virtualization.framework has no choice of them"),
        ({"vcpus": 9}, {}, "9 vcpus: a machine of this Mac can have 1 to 8"),
        ({"mem_mib": 8193}, {}, "8193 MiB of memory: a machine of this Mac can have 64 to 8192"),
        ({"rosetta": True}, {"rosetta": "not-installed"}, "which is not installed: softwareupdate --install-rosetta"),
        ({"rosetta": True}, {"rosetta": "not-supported"}, "amd64 programs need Rosetta, which this computer has not"),
    ],
)
def test_what_a_mac_has_not_is_refused_by_name(fields: dict[str, Any], changes: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        vz.check(MachineConfig(None, **fields), program(**changes))


def test_another_architecture_is_refused(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MachineConfig(None, arch=ARCH)
    monkeypatch.setattr(assets, "host_arch", lambda: OTHER)
    with pytest.raises(ConfigError, match=f"runs {OTHER} machines, and none of {ARCH}; --platform linux/amd64"):
        vz.check(config, program())


def test_a_device_is_no_disk_here(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Disk, "is_device", property(lambda self: True))
    with pytest.raises(ConfigError, match="is a block device; on macOS a disk is a raw image"):
        vz.check(MachineConfig(None, disks=(Disk(image),)), program())


# --- What it says

CODE = struct.Struct("<q")


def failed(domain: str, code: int, text: str) -> bytes:
    return CODE.pack(code) + domain.encode() + b"\0" + text.encode()


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (failed("vmette", errno.EPERM, "not entitled"), "may not run virtual machines, for want of an entitlement"),
        (failed("VZErrorDomain", 2, "The process lacks the entitlement x"), "for want of an entitlement: `vmette doc"),
        (failed("VZErrorDomain", 2, "Invalid. Odd"), r"^Virtualization.framework: Invalid. Odd \(VZErrorDomain 2\)$"),
        (failed("VZErrorDomain", 6, "Limit."), "runs as many virtual machines as macOS allows: end another one first"),
        (failed("VZErrorDomain", 8, "Full."), "this Mac's disk is full: make room"),
        (failed("VZErrorDomain", 12, "Restore."), "cannot be restored by this Mac, as after an update of macOS"),
        (failed("NSPOSIXErrorDomain", 13, "a\nb\x1b"), r"^Virtualization.framework: a b.* \(NSPOSIXErrorDomain 13\)$"),
        (b"short", r"\( 0\)$"),
        (b"", r"\( 0\)$"),
    ],
)
def test_errors_say_what_to_do(payload: bytes, message: str) -> None:
    with pytest.raises(VmmError, match=message):
        raise FrameworkError.decode(payload)


class Peer:
    """The other end of a link, in the test's hands."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection

    def heard(self) -> tuple[int, int, bytes]:
        kind, number, size = HEADER.unpack(self._read(HEADER.size))
        return kind, number, self._read(size)

    def _read(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            data += self.connection.recv(size - len(data))
        return data

    def say(self, kind: int, number: int = 0, payload: bytes = b"", fd: int | None = None) -> None:
        frame = HEADER.pack(kind, number, len(payload)) + payload
        sent = socket.send_fds(self.connection, [frame], [] if fd is None else [fd])
        self.connection.sendall(frame[sent:])


@contextmanager
def linked() -> Iterator[tuple[Link, Peer, list[FrameworkError | None]]]:
    ours, theirs = socket.socketpair()
    theirs.settimeout(30)
    ends: list[FrameworkError | None] = []
    link = Link(ours, ends.append)
    with theirs:
        try:
            yield link, Peer(theirs), ends
        finally:
            link.close()


def in_thread(function: Callable[[], object]) -> Callable[[], object]:
    """Starts it; what is returned waits for it, and gives what it returned or the exception that it raised."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def result() -> object:
        thread.join(30)
        return results[0]

    return result


def test_answers_find_their_requests() -> None:
    with linked() as (link, peer, _):
        first = in_thread(lambda: link.request(Request.IDENTIFIER).payload)
        kind, number, _ = peer.heard()
        assert kind == Request.IDENTIFIER
        second = in_thread(lambda: link.request(Request.SAVE, b"/path").payload)
        another = peer.heard()
        assert another[::2] == (Request.SAVE, b"/path")
        peer.say(Event.FAILED, another[1], failed("VZErrorDomain", 11, "Save."))
        peer.say(Event.DONE, number, b"identity")
        assert first() == b"identity"
        error = second()
        assert isinstance(error, FrameworkError)
        assert (error.domain, error.code) == ("VZErrorDomain", 11)


def test_an_answer_that_takes_too_long_is_dropped_with_its_descriptor() -> None:
    with linked() as (link, peer, _):
        with pytest.raises(TimeoutError):
            link.request(Request.CONNECT, b"\0\0\0\0", timeout=0.05)
        _, number, _ = peer.heard()
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                peer.say(Event.DONE, number, fd=theirs.fileno())
            ours.settimeout(30)
            assert ours.recv(1) == b""  # nobody has the other end


def test_who_waits_hears_of_the_end() -> None:
    with linked() as (link, peer, ends):
        waiting = in_thread(lambda: link.request(Request.START))
        peer.heard()
        peer.say(Event.ENDED, 0, failed("VZErrorDomain", 1, "Internal."))
        peer.connection.close()
        assert str(waiting()) == "the VM has ended"
        link.join()
        (end,) = ends
        assert isinstance(end, FrameworkError)
        with pytest.raises(VmmError, match="the VM has ended"):
            link.request(Request.PAUSE)


@pytest.mark.parametrize(
    "said",
    [
        HEADER.pack(Event.DONE, 1, 1 << 20),
        HEADER.pack(Event.DONE, 1, 100) + b"too short",
        HEADER.pack(99, 1, 0),
        HEADER.pack(Event.DONE, 77, 4) + b"none",
        b"x",
    ],
)
def test_nonsense_ends_the_link_or_is_passed_over(said: bytes) -> None:
    with linked() as (link, peer, ends):
        waiting = in_thread(lambda: link.request(Request.START))
        peer.heard()
        peer.connection.sendall(said)
        peer.connection.shutdown(socket.SHUT_WR)
        assert str(waiting()) == "the VM has ended"
        assert ends == []


def test_vsock_connects() -> None:
    with linked() as (link, peer, _):
        device = VzVsock(link)
        waiting = in_thread(lambda: device.connect(1024, 30))
        kind, number, payload = peer.heard()
        assert (kind, payload) == (Request.CONNECT, (1024).to_bytes(4, "little"))
        ours, theirs = socket.socketpair()
        with ours, theirs:
            peer.say(Event.DONE, number, fd=theirs.fileno())
            connection = waiting()
            assert isinstance(connection, socket.socket)
            with connection:
                assert not connection.get_inheritable()
                ours.sendall(b"hello")
                assert connection.recv(5, socket.MSG_WAITALL) == b"hello"
        refused = in_thread(lambda: device.connect(1024, 30))
        _, number, _ = peer.heard()
        peer.say(Event.FAILED, number, failed("NSPOSIXErrorDomain", 54, "Connection reset by peer"))
        assert isinstance(refused(), ConnectionRefusedError)


def listening(link: Link, peer: Peer, port: int) -> Any:
    waiting = in_thread(lambda: link.listen(port))
    kind, number, payload = peer.heard()
    assert (kind, payload) == (Request.LISTEN, port.to_bytes(4, "little"))
    peer.say(Event.DONE, number)
    return waiting()


def test_vsock_listens() -> None:
    with linked() as (link, peer, _):
        listener = listening(link, peer, 5000)
        with pytest.raises(OSError, match="Address already in use"):
            link.listen(5000)
        assert listener.accept() is None
        ours, theirs = socket.socketpair()
        with ours, theirs:
            peer.say(Event.ACCEPTED, 5000, fd=theirs.fileno())
            peer.say(Event.ACCEPTED, 5001, fd=theirs.fileno())  # nobody listens there
        end = time.monotonic() + 30
        while (connection := listener.accept()) is None:
            assert time.monotonic() < end
        connection.close()
        with closing(listener):
            pass
        kind, number, payload = peer.heard()
        assert (kind, payload) == (Request.UNLISTEN, (5000).to_bytes(4, "little"))
        peer.say(Event.DONE, number)
        listening(link, peer, 5000).close()


def test_a_port_that_is_refused_can_be_tried_again() -> None:
    with linked() as (link, peer, _):
        waiting = in_thread(lambda: link.listen(5000))
        _, number, _ = peer.heard()
        peer.say(Event.FAILED, number, failed("vmette", errno.EADDRINUSE, "in use"))
        assert isinstance(waiting(), FrameworkError)
        listening(link, peer, 5000).close()

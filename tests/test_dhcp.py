"""The guest's DHCP client (csrc/guest/dhcp.c) against a server of ours, under the sanitizers."""

from __future__ import annotations

import errno
import ipaddress
import socket
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
COMPILE = ("cc", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-Icsrc/guest")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")

MAC = bytes.fromhex("525400123456")
XID = 0x01020304
DISCOVER, OFFER, REQUEST, ACK, NAK = 1, 2, 3, 5, 6
NETMASK, ROUTER, DNS, MTU, ADDRESS, TYPE, SERVER, WANTED, END = 1, 3, 6, 26, 50, 53, 54, 55, 255
COOKIE = bytes([99, 130, 83, 99])


def ip(text: str) -> bytes:
    return ipaddress.IPv4Address(text).packed


OPTIONS = {
    SERVER: ip("10.0.2.2"),
    NETMASK: ip("255.255.255.0"),
    ROUTER: ip("10.0.2.2"),
    DNS: ip("10.0.2.3") + ip("10.0.2.4"),
    MTU: (1400).to_bytes(2, "big"),
}
LEASE = "10.0.2.15 255.255.255.0 10.0.2.2 10.0.2.2 1400 10.0.2.3 10.0.2.4"


@dataclass
class Answer:
    """An Ethernet frame of a DHCP server."""

    kind: int = OFFER
    xid: bytes = XID.to_bytes(4, "little")
    address: str = "10.0.2.15"
    options: dict[int, bytes] = field(default_factory=lambda: dict(OPTIONS))
    mac: bytes = MAC
    op: int = 2
    cookie: bytes = COOKIE
    ports: tuple[int, int] = (67, 68)
    ethertype: int = 0x0800
    version: int = 4
    header_words: int = 5
    fragment: int = 0
    protocol: int = 17
    udp_extra: int = 0
    ip_extra: int = 0
    tail: bytes = bytes([END])
    padding: bytes = b""

    def encode(self) -> bytes:
        options = b"".join(bytes([code, len(data)]) + data for code, data in self.options.items())
        message = struct.pack(">4B4s2H", self.op, 1, 6, 0, self.xid, 0, 0) + bytes(4) + ip(self.address) + bytes(8)
        message += self.mac + bytes(10 + 64 + 128) + self.cookie + bytes([TYPE, 1, self.kind]) + options + self.tail
        udp = struct.pack(">4H", *self.ports, 8 + len(message) + self.udp_extra, 0) + message
        more = bytes((self.header_words - 5) * 4) if self.header_words > 5 else b""
        total = 20 + len(more) + len(udp) + self.ip_extra
        head = [self.version << 4 | self.header_words, 0, total, 0, self.fragment, 64, self.protocol, 0]
        header = struct.pack(">BBHHHBBH", *head) + ip("10.0.2.2") + ip("255.255.255.255") + more
        return b"\xff" * 6 + bytes(6) + self.ethertype.to_bytes(2, "big") + header + udp + self.padding


@dataclass
class Question:
    """What the client asked."""

    kind: int
    xid: bytes
    options: dict[int, bytes]

    @classmethod
    def decode(cls, frame: bytes) -> Question:
        assert frame[:14] == b"\xff" * 6 + MAC + b"\x08\x00"
        header, udp = frame[14:34], frame[34:42]
        assert header[0] == 0x45
        assert header[9] == 17
        words = struct.unpack(">10H", header)
        total = sum(words)
        assert (total & 0xFFFF) + (total >> 16) == 0xFFFF, "the checksum of RFC 791"
        assert words[1] == len(frame) - 14
        assert header[12:20] == ip("0.0.0.0") + ip("255.255.255.255")
        assert struct.unpack(">4H", udp) == (68, 67, len(frame) - 34, 0)
        message = frame[42:]
        assert len(message) >= 300
        assert message[:4] == bytes([1, 1, 6, 0])
        assert message[10:28] == b"\x80\x00" + bytes(16)
        assert message[28:44] == MAC + bytes(10)
        assert message[236:240] == COOKIE
        options, at = {}, 240
        while message[at] != END:
            length = message[at + 1]
            options[message[at]] = message[at + 2 : at + 2 + length]
            at += 2 + length
        assert not any(message[at + 1 :])
        return cls(options.pop(TYPE)[0], message[4:8], options)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("dhcp") / "dhcp_host"
    sources = ["tests/dhcp_host.c", "csrc/guest/dhcp.c"]
    subprocess.run([*COMPILE, *SANITIZE, *sources, "-o", str(output)], cwd=ROOT, check=True)
    return output


class Parser:
    """`dhcp_parse`, frame by frame, of one transaction."""

    def __init__(self, program: Path) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            argv = [str(program), "parse", str(XID)]
            self._process = subprocess.Popen(argv, stdin=theirs.fileno(), stdout=subprocess.PIPE, text=True)

    def __call__(self, frame: bytes) -> str:
        self._socket.send(frame)
        assert self._process.stdout is not None
        line: str = self._process.stdout.readline()
        assert line, f"it died of {frame.hex()}"
        return line.strip()

    def close(self) -> None:
        self._socket.close()
        assert self._process.wait() == 0
        assert self._process.stdout is not None
        self._process.stdout.close()


@pytest.fixture(scope="module")
def parse(program: Path) -> Iterator[Parser]:
    parser = Parser(program)
    yield parser
    parser.close()


# --- Answers


def test_an_answer_is_read(parse: Parser) -> None:
    assert parse(Answer().encode()) == f"{OFFER} {LEASE}"
    assert parse(Answer(ACK).encode()) == f"{ACK} {LEASE}"
    assert parse(Answer(NAK, address="0.0.0.0", options={}).encode()) == str(NAK)
    assert parse(Answer(header_words=8, padding=b"fill").encode()) == f"{OFFER} {LEASE}"


@pytest.mark.parametrize(
    ("options", "lease"),
    [
        ({ROUTER: b""}, None),
        ({ROUTER: ip("0.0.0.0")}, "10.0.2.15 255.255.255.0 0.0.0.0 10.0.2.2 1400 10.0.2.3 10.0.2.4"),
        ({ROUTER: ip("127.0.0.1")}, None),
        ({ROUTER: ip("10.0.2.9") + ip("10.0.2.8")}, LEASE.replace("10.0.2.2", "10.0.2.9", 1)),
        ({DNS: b""}, "10.0.2.15 255.255.255.0 10.0.2.2 10.0.2.2 1400"),
        ({DNS: ip("1.1.1.1") * 5 + b"x"}, "10.0.2.15 255.255.255.0 10.0.2.2 10.0.2.2 1400" + " 1.1.1.1" * 3),
        ({MTU: b"\0\0"}, LEASE.replace("1400", "0")),
        ({MTU: b"\x02\x3f"}, LEASE.replace("1400", "0")),
        ({MTU: b"\x02\x40"}, LEASE.replace("1400", "576")),
        ({MTU: b"\xff\xff"}, LEASE.replace("1400", "65535")),
        ({MTU: b"\xff"}, None),
        ({NETMASK: b"\xff\xff\xff"}, None),
        ({NETMASK: ip("255.0.255.0")}, None),
        ({NETMASK: ip("0.0.0.0")}, None),
        ({NETMASK: ip("255.255.255.255")}, LEASE.replace("255.255.255.0", "255.255.255.255")),
        ({SERVER: ip("0.0.0.0")}, None),
        ({TYPE: b""}, None),
        ({TYPE: b"\1"}, None),
        ({0x77: bytes(255)}, LEASE),
    ],
)
def test_options(parse: Parser, options: dict[int, bytes], lease: str | None) -> None:
    assert parse(Answer(options={**OPTIONS, **options}).encode()) == ("0" if lease is None else f"{OFFER} {lease}")


@pytest.mark.parametrize("missing", [NETMASK, SERVER])
def test_options_that_must_be_there(parse: Parser, missing: int) -> None:
    options = {code: data for code, data in OPTIONS.items() if code != missing}
    assert parse(Answer(options=options).encode()) == "0"


@pytest.mark.parametrize(
    "answer",
    [
        Answer(xid=bytes(4)),
        Answer(mac=bytes(6)),
        Answer(op=1),
        Answer(kind=DISCOVER),
        Answer(kind=4),
        Answer(kind=0),
        Answer(cookie=bytes(4)),
        Answer(ports=(68, 67)),
        Answer(ports=(67, 67)),
        Answer(ethertype=0x86DD),
        Answer(version=6),
        Answer(header_words=4),
        Answer(header_words=0),
        Answer(fragment=0x2000),
        Answer(fragment=1),
        Answer(protocol=6),
        Answer(udp_extra=1),
        Answer(udp_extra=-100),
        Answer(ip_extra=1),
        Answer(ip_extra=-1),
        Answer(address="0.0.0.0"),
        Answer(address="127.0.0.1"),
        Answer(address="224.0.0.1"),
        Answer(address="255.255.255.255"),
        Answer(tail=bytes([DNS])),
        Answer(tail=bytes([DNS, 1])),
        Answer(tail=bytes([DNS, 255, 1])),
    ],
)
def test_answers_that_are_none(parse: Parser, answer: Answer) -> None:
    assert parse(answer.encode()) == "0"


def test_an_answer_that_is_cut_short_anywhere_is_none(parse: Parser) -> None:
    frame = Answer().encode()
    assert {parse(frame[:size]) for size in range(1, len(frame))} == {"0"}


EDITS = st.lists(st.tuples(st.integers(0, 340), st.integers(0, 255)), min_size=1, max_size=6)


@settings(deadline=None, max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=EDITS, size=st.integers(1, 340), junk=st.binary(max_size=40))
def test_whatever_comes_is_survived(parse: Parser, edits: list[tuple[int, int]], size: int, junk: bytes) -> None:
    frame = bytearray(Answer().encode())
    for at, byte in edits:
        frame[at % len(frame)] = byte
    for variant in (bytes(frame), bytes(frame[:size]) + junk, bytes(frame) + junk):
        words = parse(variant).split()
        assert words[0] in {"0", str(OFFER), str(ACK), str(NAK)}
        if len(words) > 1:
            address, netmask, router, server = map(ipaddress.IPv4Address, words[1:5])
            assert not address.is_loopback
            assert not address.is_multicast
            assert f"{int(netmask):032b}".strip("0").count("0") == 0
            assert int(netmask)
            assert not router.is_loopback
            assert int(server)
            assert int(words[5]) == 0 or 576 <= int(words[5]) <= 65535
            assert len(words) <= 9


# --- The exchange


@dataclass
class Client:
    """`dhcp_obtain`, which talks to us."""

    process: subprocess.Popen[str]
    socket: socket.socket

    def asks(self, kind: int) -> Question:
        question = Question.decode(self.socket.recv(2048))
        assert question.kind == kind
        assert question.options.pop(WANTED) == bytes([NETMASK, ROUTER, DNS, MTU])
        return question

    def ends(self) -> tuple[int, str]:
        output, _ = self.process.communicate()
        return self.process.returncode, output.strip()


@pytest.fixture
def client(program: Path) -> Iterator[Client]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen([str(program), "obtain"], stdin=theirs.fileno(), stdout=subprocess.PIPE, text=True)
    ours.settimeout(60)
    with ours, process:
        yield Client(process, ours)
        process.kill()


def test_a_lease_is_got(client: Client) -> None:
    question = client.asks(DISCOVER)
    assert question.options == {}
    client.socket.send(Answer(OFFER, question.xid).encode())
    request = client.asks(REQUEST)
    assert request.xid == question.xid
    assert request.options == {ADDRESS: ip("10.0.2.15"), SERVER: ip("10.0.2.2")}
    client.socket.send(Answer(ACK, question.xid).encode())
    assert client.ends() == (0, LEASE)


def test_each_transaction_has_its_number(program: Path) -> None:
    numbers = set()
    for _ in range(3):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with (
            ours,
            theirs,
            subprocess.Popen([str(program), "obtain"], stdin=theirs.fileno(), stdout=subprocess.DEVNULL) as process,
        ):
            numbers.add(Question.decode(ours.recv(2048)).xid)
            process.kill()
    assert len(numbers) == 3


def test_what_gets_lost_is_asked_again(client: Client) -> None:
    client.asks(DISCOVER)
    question = client.asks(DISCOVER)
    client.socket.send(Answer(OFFER, question.xid).encode())
    client.asks(REQUEST)
    client.asks(REQUEST)
    client.socket.send(Answer(ACK, question.xid).encode())
    assert client.ends() == (0, LEASE)


def test_a_refusal_begins_it_anew(client: Client) -> None:
    question = client.asks(DISCOVER)
    client.socket.send(Answer(OFFER, question.xid).encode())
    client.asks(REQUEST)
    client.socket.send(Answer(NAK, question.xid, options={}).encode())
    question = client.asks(DISCOVER)
    client.socket.send(Answer(OFFER, question.xid, "10.0.2.16").encode())
    assert client.asks(REQUEST).options[ADDRESS] == ip("10.0.2.16")
    client.socket.send(Answer(ACK, question.xid, "10.0.2.16").encode())
    assert client.ends() == (0, LEASE.replace("10.0.2.15", "10.0.2.16"))


def test_what_is_no_answer_to_the_question_is_passed_over(client: Client) -> None:
    question = client.asks(DISCOVER)
    for answer in (Answer(ACK, question.xid), Answer(OFFER, bytes(4)), Answer(OFFER, question.xid, mac=bytes(6))):
        client.socket.send(answer.encode())
    client.socket.send(b"x")
    client.socket.send(Answer(OFFER, question.xid).encode())
    client.asks(REQUEST)
    client.socket.send(Answer(OFFER, question.xid, "10.0.2.99").encode())
    client.socket.send(Answer(ACK, question.xid, options={**OPTIONS, SERVER: ip("10.0.2.66")}).encode())
    client.socket.send(Answer(ACK, question.xid).encode())
    assert client.ends() == (0, LEASE)


def test_nobody_answers(client: Client) -> None:
    assert client.ends() == (1, str(errno.ETIMEDOUT))


def test_the_network_goes_away(client: Client) -> None:
    client.asks(DISCOVER)
    client.socket.close()
    status, _ = client.ends()
    assert status == 1

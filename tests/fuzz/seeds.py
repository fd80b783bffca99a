"""What the fuzzers begin with: one or a few good inputs of each target, and the words of its language."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from random import Random

from tests.agent_harness import HELLO, PAUSE, WAKING, exec_frame, fields, frame
from tests.test_dhcp import ACK, NAK, Answer
from vmette.config import Command
from vmette.protocol import (
    CREDIT,
    FROM_GUEST,
    MAX_DATA,
    U32,
    U64,
    USAGE,
    VERSION,
    WINDOW,
    WINSIZE,
    Channel,
    ExecFlag,
    FrameType,
    Tag,
    encode_exec,
)

# --- The guest's parsers ----------------------------------------------------------------------------------------------


def script(choices: bytes, data: bytes) -> bytes:
    """An input of a C target with a world of its own (script.h)."""
    return struct.pack("<H", len(choices)) + choices + data


def _address(text: bytes) -> bytes:
    return fields((Tag.ADDRESS, text))


def _exec(stream: int, command: Command, *, announced: bool = False) -> bytes:
    return frame(FrameType.EXEC, stream, encode_exec(command, announced=announced))


def _signal(stream: int, number: int, flags: int) -> bytes:
    return frame(FrameType.SIGNAL, stream, bytes((number, flags)))


def _eof(stream: int, channel: Channel) -> bytes:
    return frame(FrameType.EOF, stream, bytes((channel,)))


def _window(stream: int, channel: Channel, size: int) -> bytes:
    return frame(FrameType.WINDOW, stream, CREDIT.pack(channel, size))


def agent() -> list[bytes]:
    """Sessions: commands, a terminal, a namespace's init, connections, a listener."""
    shutdown = frame(FrameType.SHUTDOWN, 0)
    data = frame(FrameType.STDIN, 1, b"x" * 100)
    stdin = data + _eof(1, Channel.STDIN)
    commands = (
        exec_frame(b"cat", b"-") + 3 * data + stdin + _exec(2, Command((b"true",), env=(b"A=b",)), announced=True)
    )
    terminal = _exec(1, Command((b"sh",), terminal=(24, 80))) + stdin + frame(FrameType.RESIZE, 1, WINSIZE.pack(1, 2))
    init = _exec(1, Command((b"init",), init=True)) + _exec(2, Command((b"list", b"/"), builtin=True, user=b"1:1"))
    sockets = frame(FrameType.CONNECT, 1, _address(b"tcp:127.0.0.1:80")) + stdin
    sockets += frame(FrameType.LISTEN, 2, _address(b"unix:/run/s"))
    sockets += frame(FrameType.LISTEN, 3, _address(b"vsock:any:1"))
    accepted = FROM_GUEST | 1
    sockets += frame(FrameType.STDIN, accepted, b"x") + _window(accepted, Channel.STDOUT, 0) + _signal(accepted, 9, 0)
    ends = _eof(2, Channel.STDOUT) + _eof(1, Channel.STDERR) + _signal(1, 15, 1) + _signal(1, 9, 2) + _signal(2, 9, 0)
    sessions = [commands + _window(1, Channel.STDOUT, 0) + ends, terminal + ends, init + ends, sockets + ends]
    # Larger than what the agent reads at once; fuzz_agent.c adds what is missing at the end.
    large = _exec(1, Command((b"echo",))) + frame(FrameType.STDIN, 1, b"x", length=MAX_DATA)
    argument = struct.pack("<HHI", Tag.ARG, 0, MAX_DATA)
    larger = frame(FrameType.EXEC, 1, argument, length=len(argument) + MAX_DATA)
    mixed = [bytes(Random(seed).choices((0, 0, 3, 16, 40, 112, 200), k=300)) for seed in range(3)]
    return [
        script(b"", HELLO + PAUSE + WAKING + shutdown),
        script(b"", HELLO + commands + PAUSE + WAKING + commands + shutdown),
        *(script(each, HELLO + commands + PAUSE + frame(FrameType.RESUME, 0) + shutdown) for each in mixed),
        *(script(each, HELLO + session) for session in (large, larger) for each in (b"", *mixed)),
        *(script(each, HELLO + session + shutdown) for session in sessions for each in (b"", *mixed)),
    ]


def records() -> list[bytes]:
    """EXEC, a record and addresses, each after the number of its parser."""
    command = Command((b"sh", b"-c", b"true"), (b"A=b", b"C="), b"/tmp", b"user:group", terminal=(24, 80))
    hello = fields((Tag.VERSION, U32.pack(VERSION)), (Tag.KERNEL, b"6.12"), (Tag.MILESTONE, U64.pack(1) + b"init"))
    addresses = [b"tcp:127.0.0.1:80", b"tcp:[::1]:80", b"vsock:any:1", b"vsock:3:4294967295", b"unix:/run/socket"]
    return [b"\0" + encode_exec(command), b"\1" + hello, *(b"\2" + address for address in addresses)]


def dhcp() -> list[bytes]:
    """Answers of a server."""
    return [answer.encode() for answer in (Answer(), Answer(ACK, header_words=8), Answer(NAK, options={}))]


def _archives() -> list[bytes]:
    """Archives of all formats, with entries of all kinds."""
    return [_archive(kind) for kind in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)]


def _archive(kind: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        types = {"d": tarfile.DIRTYPE, "d/p": tarfile.FIFOTYPE, "c": tarfile.CHRTYPE, "d/b": tarfile.BLKTYPE}
        links = {"d/s": tarfile.SYMTYPE, "h": tarfile.LNKTYPE}
        for name, entry_type in {".": tarfile.DIRTYPE, **types, **links}.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.mtime, info.mode = entry_type, "d/f" if name in links else "", 1, 0o755
            tar.addfile(info)
        info = tarfile.TarInfo("d/f")
        info.size = 600
        if kind == tarfile.PAX_FORMAT:
            info.pax_headers = {"SCHILY.xattr.user.a": "b", "mtime": "-1.5", "path": "d/f", "uid": "1", "comment": "c"}
        tar.addfile(info, io.BytesIO(bytes(600)))
        if kind != tarfile.USTAR_FORMAT:
            info = tarfile.TarInfo("long/" * 30 + "name")
            info.type, info.linkname = tarfile.SYMTYPE, "target/" * 20
            tar.addfile(info)
    return file.getvalue().rstrip(b"\0") + bytes(1024)


def untar() -> list[bytes]:
    """Archives, with owners and without."""
    choices = [b"", b"\1", b"\1" + bytes([0, 9, 2] * 50)]
    return [script(each, archive) for archive in _archives() for each in choices]


# --- The host's parsers -----------------------------------------------------------------------------------------------


def protocol() -> list[bytes]:
    """Guests that answer as they should, after the byte that cuts what they say into pieces."""
    usage = (Tag.USAGE, USAGE.pack(1, 2, 3)), (Tag.PEAK, U64.pack(4)), (Tag.OOM_KILLS, U32.pack(0))
    ended = frame(FrameType.EXIT, 1, fields((Tag.CODE, U32.pack(0)), *usage))
    killed = frame(FrameType.EXIT, 2, fields((Tag.SIGNAL, U32.pack(9))))
    failed = frame(FrameType.ERROR, 2, fields((Tag.ERRNO, U32.pack(2)), (Tag.STAGE, b"exec"), (Tag.TEXT, b"none")))
    output = frame(FrameType.STDOUT, 1, b"x" * 100) + frame(FrameType.STDERR, 1, b"y")
    stdin = _window(1, Channel.STDIN, 50)
    peer = fields((Tag.LISTENER, U32.pack(4)), (Tag.ADDRESS, b"tcp:127.0.0.1:1"))
    accepted = frame(FrameType.OPENED, 4) + frame(FrameType.ACCEPTED, FROM_GUEST | 1, peer)
    connection = frame(FrameType.OPENED, 3) + frame(FrameType.STDOUT, 3, b"z") + _eof(3, Channel.STDOUT)
    said = [output + stdin + ended, frame(FrameType.OPENED, 2) + killed, failed, connection + accepted + output]
    hello = fields((Tag.VERSION, U32.pack(VERSION)), (Tag.KERNEL, b"6.12"), (Tag.MILESTONE, U64.pack(1) + b"init"))
    return [bytes((pieces,)) + frame(FrameType.HELLO, 0, hello) + each for each in said for pieces in (0, 7)]


def archive() -> list[bytes]:
    """Archives, one of them compressed, after the byte that says whether they have whiteouts."""
    plain = _archives()
    whiteouts, compressed = plain[0].replace(b"d/p", b".wh."), gzip.compress(plain[0], mtime=0)
    return [*(b"\0" + each for each in plain), b"\xff" + whiteouts, b"\0" + compressed]


def proxy() -> list[bytes]:
    """Requests, after the byte that says in how large pieces they are read."""
    head = b" HTTP/1.1\r\nHost: allowed.test\r\n"
    return [
        b"\0CONNECT allowed.test:443" + head + b"\r\nhello",
        b"\0GET http://allowed.test/path?query" + head + b"Connection: close, x\r\nX: y\r\n\r\n",
        b"\7POST http://allowed.test:80/" + head + b"Content-Length: 5\r\n\r\nhello",
        b"\0PUT http://[2001:db8::1]:8080/" + head + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ]


def wire() -> list[bytes]:
    """Lines of a client, after the byte that cuts them into pieces and says how many descriptors come with them."""
    return [
        b'\3{"do": "exec", "argv": ["true"], "env": {"A": "b"}, "cwd": "/", "user": null, "terminal": [24, 80]}\n',
        b'\0{"do": "stop", "patience": 1.5}\n{"do": "signal", "signal": 9}\n{"resize": [1, 2]}\n',
    ]


# --- Words ------------------------------------------------------------------------------------------------------------

_HEADERS = [bytes((kind, 0, 0, 0, stream, 0, 0, 0)) for kind in FrameType for stream in (0, 1)]
_NUMBERS = [U32.pack(number) for number in (WINDOW, WINDOW + 1, FROM_GUEST | 1, *ExecFlag)]
_TAGS = [struct.pack("<HH", tag, 0) for tag in Tag]
_PAX = [b"path=", b"linkpath=", b"size=", b"uid=", b"gid=", b"mtime=", b"SCHILY.xattr.user.a=", b"30 mtime=-1.5\n"]
_SPARSE = [b"GNU.sparse." + word for word in (b"major=1", b"minor=0", b"map=", b"size=", b"realsize=", b"offset=")]

WORDS: dict[str, list[bytes]] = {
    "agent": [*_HEADERS, *_TAGS, *_NUMBERS],
    "records": [*_TAGS, b"tcp:", b"vsock:", b"unix:/", b"any:", b"[::]:1"],
    "dhcp": [bytes((99, 130, 83, 99)), b"\x35\1\2", b"\x35\1\5", b"\x35\1\6", b"\x1a\2\0\0"],
    "untar": [*_PAX, *_SPARSE, b"../", b"./", b"//", b"ustar\0"],
    "protocol": [*_HEADERS, *_TAGS, *_NUMBERS],
    "archive": [*_PAX, *_SPARSE, b"../", b".wh.", b".wh..wh..opq", b"ustar  \0"],
    "proxy": [b"HTTP/1.0", b"Content-Length: ", b"Transfer-Encoding: chunked", b"\r\n ", b"\r\n\r\n", b":443"],
    "wire": [b'"do": ', b'"exec"', b'"builtin": true', b"NaN", b"1e999", b"\\ud800", b"[" * 64, b"null", b"-1"],
}

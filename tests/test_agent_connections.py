"""Connections and listeners of the guest agent (csrc/guest/agent.c, address.c), on this host's loopback."""

from __future__ import annotations

import errno
import resource
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.agent_harness import CLEAN, MIB, PATIENCE, Agent, Stream, build, descriptors, eventually, exists, noise
from vmette.protocol import FROM_GUEST, MAX_STREAMS, WINDOW, Channel, SignalFlag

CLIENTS = 100
Peer = Callable[[socket.socket], bytes]


@pytest.fixture(scope="module")
def program() -> Path:
    return build()


@pytest.fixture
def agent(program: Path) -> Iterator[Agent]:
    """An agent that must find nothing wrong, leave nothing open, and end without a fault when the host goes."""
    with Agent(program) as agent:
        before = descriptors(agent)
        yield agent
        streams = [stream for stream in agent.streams.values() if stream.end is None]
        for stream in streams:
            agent.connection.signal(stream.number, signal.SIGKILL, SignalFlag.ALL)
        agent.wait(*streams)
        assert descriptors(agent) == before
        agent.port.close()
        assert agent.ended() == CLEAN


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """A thread for each peer: they wait for each other."""
    pool = ThreadPoolExecutor(CLIENTS)
    yield pool
    pool.shutdown(cancel_futures=True)


FAMILIES = {"tcp": socket.AF_INET, "tcp6": socket.AF_INET6, "unix": socket.AF_UNIX}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def place(family: str, directory: Path) -> str | tuple[str, int]:
    return {"tcp": ("127.0.0.1", 0), "tcp6": ("::1", 0)}.get(family, str(directory / "socket"))


def text(address: object) -> str:
    """The ADDRESS of what getsockname says."""
    if isinstance(address, tuple):
        host, port = address[:2]
        return f"tcp:[{host}]:{port}" if ":" in host else f"tcp:{host}:{port}"
    return f"unix:{address}"


class Server:
    """Listens, and has one function talk to each peer that comes, in threads."""

    def __init__(self, pool: ThreadPoolExecutor, family: str, directory: Path) -> None:
        self.pool = pool
        self.socket = socket.socket(FAMILIES[family])
        self.socket.settimeout(PATIENCE)
        self.socket.bind(place(family, directory))
        self.socket.listen()
        self.address = text(self.socket.getsockname())

    def serve(self, peer: Peer) -> Future[bytes]:
        return self.pool.submit(self._serve, peer)

    def _serve(self, peer: Peer) -> bytes:
        connection, _ = self.socket.accept()
        with connection:
            connection.settimeout(PATIENCE)
            return peer(connection)


@pytest.fixture
def server(pool: ThreadPoolExecutor, family: str, tmp_path: Path) -> Iterator[Server]:
    server = Server(pool, family, tmp_path)
    with server.socket:
        yield server


@pytest.fixture
def tcp_server(pool: ThreadPoolExecutor, tmp_path: Path) -> Iterator[Server]:
    server = Server(pool, "tcp", tmp_path)
    with server.socket:
        yield server


def read_all(connection: socket.socket) -> bytes:
    data = bytearray()
    while piece := connection.recv(MIB):
        data += piece
    return bytes(data)


def echo(connection: socket.socket) -> bytes:
    """What comes goes back while it comes."""
    data = bytearray()
    while piece := connection.recv(MIB):
        connection.sendall(piece)
        data += piece
    return bytes(data)


def send_reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


# --- Out of the guest -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, WINDOW, 5 * MIB + 3])
def test_bytes_go_both_ways(agent: Agent, server: Server, size: int) -> None:
    data = noise(size)
    peer = server.serve(echo)
    connection = agent.connect(server.address, data)
    agent.wait(connection)
    assert peer.result() == data
    assert connection.stdout == data
    assert connection.opened
    assert connection.ended
    assert connection.status == 0


def test_host_that_ends_first_still_reads(agent: Agent, server: Server) -> None:
    data = noise(3 * MIB)

    def peer(connection: socket.socket) -> bytes:
        heard = read_all(connection)
        connection.sendall(heard[::-1])
        return heard

    heard = server.serve(peer)
    connection = agent.connect(server.address, data)
    agent.wait(connection)
    assert heard.result() == data
    assert connection.stdout == data[::-1]


def test_peer_that_ends_first_still_reads(agent: Agent, server: Server) -> None:
    def peer(connection: socket.socket) -> bytes:
        connection.sendall(b"goodbye")
        connection.shutdown(socket.SHUT_WR)
        return read_all(connection)

    heard = server.serve(peer)
    connection = agent.connect(server.address, eof=False)
    agent.until(lambda: connection.ended)
    assert connection.stdout == b"goodbye"
    assert connection.end is None
    connection.stdin, connection.eof = memoryview(noise(MIB)), True
    agent.wait(connection)
    assert heard.result() == noise(MIB)
    assert connection.status == 0


def test_host_that_reads_late(agent: Agent, server: Server) -> None:
    """The peer is held up once the window and the kernel's buffers are full, and nobody else is."""
    data = noise(32 * MIB)

    def peer(connection: socket.socket) -> bytes:
        connection.sendall(data)
        return b""

    said = server.serve(peer)
    connection = agent.connect(server.address, reads=False)
    agent.until(lambda: len(connection.stdout) == WINDOW)
    assert agent.run("cat", stdin=noise(MIB)).stdout == noise(MIB)
    assert len(connection.stdout) == WINDOW
    assert not said.done()
    connection.reads = True
    agent.give_back(connection)
    agent.wait(connection)
    assert connection.stdout == data


def test_peer_that_reads_late(agent: Agent, server: Server, pool: ThreadPoolExecutor) -> None:
    """What it has not read is bounded by the window and the kernel's buffers; nobody else is held up."""
    go: Future[None] = Future()
    data = noise(32 * MIB)

    def peer(connection: socket.socket) -> bytes:
        go.result(PATIENCE)
        return read_all(connection)

    heard = server.serve(peer)
    connection = agent.connect(server.address, data)
    agent.until(lambda: connection.opened)
    for _ in range(3):
        assert agent.run("cat", stdin=noise(MIB)).stdout == noise(MIB)
    assert connection.stdin
    go.set_result(None)
    agent.wait(connection)
    assert heard.result() == data


def test_peer_that_does_not_want_to_hear_any_more(agent: Agent, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    """What is sent to it is taken and dropped, and what it says still arrives."""
    go: Future[None] = Future()
    server = Server(pool, "unix", tmp_path)

    def peer(connection: socket.socket) -> bytes:
        connection.shutdown(socket.SHUT_RD)
        connection.sendall(b"deaf")
        go.result(PATIENCE)
        connection.sendall(b", but not dumb")
        return b""

    with server.socket:
        heard = server.serve(peer)
        connection = agent.connect(server.address, eof=False)
        agent.until(lambda: connection.stdout == b"deaf")
        connection.stdin = memoryview(bytes(5 * MIB))
        agent.until(lambda: not connection.stdin and agent.connection.stdin_room(connection.number) == WINDOW)
        assert connection.end is None
        go.set_result(None)
        agent.wait(connection)
        heard.result()
    assert connection.stdout == b"deaf, but not dumb"
    assert connection.status == 0


def test_host_that_does_not_want_to_hear_any_more(agent: Agent, server: Server) -> None:
    go: Future[None] = Future()

    def peer(connection: socket.socket) -> bytes:
        connection.sendall(b"some")
        go.result(PATIENCE)
        return read_all(connection)

    heard = server.serve(peer)
    connection = agent.connect(server.address, eof=False)
    agent.until(lambda: connection.stdout == b"some")
    agent.connection.send_eof(connection.number, Channel.STDOUT)
    go.set_result(None)
    connection.stdin, connection.eof = memoryview(b"what it hears"), True
    agent.wait(connection)
    assert heard.result() == b"what it hears"
    assert connection.status == 0


def test_peer_that_resets(agent: Agent, tcp_server: Server) -> None:
    go: Future[None] = Future()

    def peer(connection: socket.socket) -> bytes:
        go.result(PATIENCE)
        send_reset(connection)
        return b""

    tcp_server.serve(peer)
    connection = agent.connect(tcp_server.address, eof=False)
    agent.until(lambda: connection.opened)
    go.set_result(None)
    agent.wait(connection)
    assert connection.failure == (errno.ECONNRESET, "connection")
    assert not connection.ended


def test_peer_that_resets_while_it_is_written_to(agent: Agent, tcp_server: Server) -> None:
    go: Future[None] = Future()

    def peer(connection: socket.socket) -> bytes:
        go.result(PATIENCE)
        send_reset(connection)
        return b""

    tcp_server.serve(peer)
    connection = agent.connect(tcp_server.address, bytes(32 * MIB))
    agent.until(lambda: len(connection.stdin) < 31 * MIB)
    go.set_result(None)
    agent.wait(connection)
    assert connection.failure == (errno.ECONNRESET, "connection")


def test_host_that_resets(agent: Agent, tcp_server: Server) -> None:
    def peer(connection: socket.socket) -> bytes:
        with pytest.raises(ConnectionResetError):
            read_all(connection)
        return b"reset"

    heard = tcp_server.serve(peer)
    connection = agent.connect(tcp_server.address, b"x", eof=False)
    agent.until(lambda: connection.opened)
    agent.connection.signal(connection.number, signal.SIGTERM)  # means nothing to a connection
    agent.connection.signal(connection.number, signal.SIGKILL)
    agent.wait(connection)
    assert connection.status == -signal.SIGKILL
    assert heard.result() == b"reset"


ADDRESSES = {
    **dict.fromkeys(
        [
            "",
            "tcp",
            "tcp:",
            "tcp:127.0.0.1",
            "tcp:127.0.0.1:",
            "tcp::80",
            "tcp:127.0.0.1:65536",
            "tcp:127.0.0.1:-1",
            "tcp:127.0.0.1:+1",
            "tcp:127.0.0.1:1x",
            "tcp:localhost:80",
            "tcp:127.1:80",
            "tcp:::1:80",
            "tcp:[::1]",
            "tcp:[]:80",
            "tcp:[::1:80",
            "tcp:[127.0.0.1]:80",
            "udp:127.0.0.1:80",
            "vsock:",
            "vsock:2",
            "vsock:2:",
            "vsock::2",
            "vsock:2:4294967296",
            "vsock:4294967296:1",
            "vsock:all:1",
            "unix:",
            "unix:relative",
            "unix:/with\0NUL",
            " tcp:127.0.0.1:80",
        ],
        errno.EINVAL,
    ),
    "unix:/" + "x" * 107: errno.ENAMETOOLONG,
    "tcp:" + "1" * 1000 + ":80": errno.ENAMETOOLONG,
}


@pytest.mark.parametrize("listener", [False, True])
@pytest.mark.parametrize("address", ADDRESSES)
def test_address_that_is_none(agent: Agent, address: str, listener: bool) -> None:
    stream = agent.listen(address) if listener else agent.connect(address)
    agent.wait(stream)
    assert stream.failure == (ADDRESSES[address], "address")


def test_nobody_there(agent: Agent, family: str, tmp_path: Path) -> None:
    with socket.socket(FAMILIES[family]) as silent:
        silent.bind(place(family, tmp_path))
        connection = agent.connect(text(silent.getsockname()))
        agent.wait(connection)
    assert connection.failure == (errno.ECONNREFUSED, "connect")
    assert not connection.opened


def test_no_such_socket(agent: Agent, tmp_path: Path) -> None:
    connection = agent.connect(f"unix:{tmp_path}/nothing")
    agent.wait(connection)
    assert connection.failure == (errno.ENOENT, "connect")


class Full:
    """A listener of which the kernel drops all requests, for its queue is full."""

    def __init__(self) -> None:
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.socket.listen(0)
        self.socket.settimeout(PATIENCE)
        self.first = socket.create_connection(self.socket.getsockname())
        self.address = text(self.socket.getsockname())

    def close(self) -> None:
        self.first.close()
        self.socket.close()


@pytest.fixture
def full() -> Iterator[Full]:
    full = Full()
    yield full
    full.close()


def test_connection_that_takes_its_time(agent: Agent, full: Full, pool: ThreadPoolExecutor) -> None:
    connection = agent.connect(full.address)
    assert agent.run("true").status == 0
    assert not connection.opened

    def take() -> bytes:
        full.socket.accept()[0].close()
        peer, _ = full.socket.accept()
        with peer:
            peer.sendall(b"here at last")
        return b""

    taken = pool.submit(take)
    agent.wait(connection)
    taken.result()
    assert connection.stdout == b"here at last"
    assert connection.status == 0


def test_connection_that_fails_late(agent: Agent, full: Full) -> None:
    connection = agent.connect(full.address)
    assert agent.run("true").status == 0
    assert not connection.opened
    full.close()
    agent.wait(connection)
    assert connection.failure == (errno.ECONNREFUSED, "connect")


def test_connection_that_is_given_up(agent: Agent, full: Full) -> None:
    connection = agent.connect(full.address)
    agent.connection.signal(connection.number, signal.SIGKILL)
    agent.wait(connection)
    assert connection.status == -signal.SIGKILL
    assert not connection.opened


# --- Into the guest ---------------------------------------------------------------------------------------------------


def free_address(family: str, directory: Path) -> str:
    """Where a listener may be: the kernel hands a TCP port out again only after all others."""
    if family == "unix":
        return f"unix:{directory}/socket"
    with socket.socket(FAMILIES[family]) as probe:
        probe.bind(place(family, directory))
        return text(probe.getsockname())


def dial(address: str) -> socket.socket:
    kind, _, rest = address.partition(":")
    if kind != "unix":
        host, _, port = rest.rpartition(":")
        return socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE)
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(PATIENCE)
    try:
        client.connect(rest)
    except OSError:
        client.close()
        raise
    return client


def answer_backwards(agent: Agent, streams: list[Stream]) -> None:
    """Waits for the end of what each peer says and says it backwards."""
    agent.until(lambda: all(stream.ended for stream in streams))
    for stream in streams:
        stream.stdin, stream.eof = memoryview(stream.stdout[::-1]), True
    agent.wait(*streams)


def test_many_connections_at_once(agent: Agent, pool: ThreadPoolExecutor, family: str, tmp_path: Path) -> None:
    size = 100_000
    address = free_address(family, tmp_path)
    listener = agent.listen(address)
    clients = [dial(address) for _ in range(CLIENTS)]

    def converse(index: int) -> bytes:
        with clients[index] as client:
            client.sendall(noise(size, index))
            client.shutdown(socket.SHUT_WR)
            return read_all(client)

    names = [text(client.getsockname()) for client in clients]
    heard = [pool.submit(converse, index) for index in range(CLIENTS)]
    agent.until(lambda: len(listener.accepted) == CLIENTS)
    assert [stream.peer for stream in listener.accepted] == names
    assert all(stream.number & FROM_GUEST for stream in listener.accepted)
    answer_backwards(agent, listener.accepted)
    assert [each.result() for each in heard] == [noise(size, index)[::-1] for index in range(CLIENTS)]
    assert {stream.status for stream in listener.accepted} == {0}


def test_listener_that_ends(agent: Agent, family: str, tmp_path: Path) -> None:
    """No more connections are taken; those that were go on."""
    address = free_address(family, tmp_path)
    listener = agent.listen(address)
    with dial(address) as client:
        agent.until(lambda: bool(listener.accepted))
        agent.connection.signal(listener.number, signal.SIGKILL)
        agent.wait(listener)
        assert listener.status == -signal.SIGKILL
        with pytest.raises(ConnectionRefusedError):
            dial(address)
        client.sendall(b"still here")
        client.shutdown(socket.SHUT_WR)
        answer_backwards(agent, listener.accepted)
        assert read_all(client) == b"ereh llits"


def test_address_in_use(agent: Agent, family: str, tmp_path: Path) -> None:
    address = free_address(family, tmp_path)
    assert agent.listen(address).opened
    assert agent.listen(address).failure == (errno.EADDRINUSE, "listen")


def test_address_is_free_after_the_listener(agent: Agent) -> None:
    """Although connections of it are still about."""
    address = free_address("tcp", Path())
    for _ in range(3):
        listener = agent.listen(address)
        assert listener.opened
        with dial(address):
            agent.until(lambda listener=listener: bool(listener.accepted))  # type: ignore[misc]
            listener.accepted[0].eof = True
            agent.connection.signal(listener.number, signal.SIGKILL)
            agent.wait(listener)
        agent.wait(*listener.accepted)


def test_everybody_may_connect_to_a_unix_socket(agent: Agent, tmp_path: Path) -> None:
    agent.listen(f"unix:{tmp_path}/socket")
    assert (tmp_path / "socket").stat().st_mode & 0o777 == 0o666


def test_ipv6_listener_leaves_ipv4_to_others(agent: Agent) -> None:
    port = free_address("tcp", Path()).rpartition(":")[2]
    assert agent.listen(f"tcp:[::]:{port}").opened
    assert agent.listen(f"tcp:0.0.0.0:{port}").opened


# --- Limits -----------------------------------------------------------------------------------------------------------


MAX_ACCEPTED = 128
"""Connections that listeners take: the other streams are for what the host opens, whatever the guest does."""


def test_as_many_streams_as_there_may_be(agent: Agent) -> None:
    """Those too many wait, and get in when there is room; the agent sleeps meanwhile."""
    address = free_address("tcp", Path())
    listener = agent.listen(address)
    clients = [dial(address) for _ in range(MAX_ACCEPTED + 10)]
    agent.until(lambda: len(listener.accepted) == MAX_ACCEPTED)
    others = [agent.start("sleep", "1000") for _ in range(MAX_STREAMS - MAX_ACCEPTED - 1)]  # there is room for these
    for refused, stage in [
        (agent.connect(address), "connect"),
        (agent.listen("tcp:127.0.0.1:0"), "listen"),
        (agent.start("true"), "fork"),
    ]:
        agent.wait(refused)
        assert refused.failure == (errno.EAGAIN, stage)
    assert len(listener.accepted) == MAX_ACCEPTED
    for other in others:
        agent.connection.signal(other.number, signal.SIGKILL)
    agent.wait(*others)
    for client in clients:
        client.close()
    for stream in listener.accepted:
        stream.eof = True
    agent.until(lambda: len(listener.accepted) == MAX_ACCEPTED + 10)
    for stream in listener.accepted:
        stream.eof = True
    agent.wait(*listener.accepted)
    assert len({stream.number for stream in listener.accepted}) == MAX_ACCEPTED + 10


def test_no_descriptors_for_another_connection(agent: Agent) -> None:
    """It waits, while the agent sleeps, and is taken when something else happens."""
    address = free_address("tcp", Path())
    listener = agent.listen(address)
    soft, hard = resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE, (3, hard))
    with dial(address):
        assert agent.run("true").failure == (errno.EMFILE, "fork")
        eventually(lambda: sleeps(agent))
        assert not listener.accepted
        resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert agent.run("true").status == 0
        agent.until(lambda: len(listener.accepted) == 1)
    listener.accepted[0].eof = True
    agent.wait(*listener.accepted)


def sleeps(agent: Agent) -> bool:
    assert exists(agent.process.pid)
    return Path(f"/proc/{agent.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def test_connections_of_an_agent_that_ends(program: Path, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    server = Server(pool, "unix", tmp_path)
    with server.socket, Agent(program) as agent:
        heard = server.serve(read_all)
        connection = agent.connect(server.address, b"in the middle of", eof=False)
        agent.listen(f"unix:{tmp_path}/other")
        agent.until(lambda: not connection.stdin)
        agent.until(lambda: agent.connection.stdin_room(connection.number) == WINDOW)
        agent.port.close()
        assert agent.ended() == CLEAN
        assert heard.result() == b"in the middle of"

"""What a guest is given over the control channel: secrets, certificates, and ways in and out without a network card."""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import vmette
from tests.vm.support import BASE, Cli, command, wait_until
from vmette import proxy

SECRET = "s3cr3t-Vm3773"


# --- secrets


def test_a_secret_is_a_file_of_the_user_alone(cli: Cli) -> None:
    script = "stat -f -c %T /run/secrets; ls -ln /run/secrets; cat /run/secrets/TOKEN"
    env = {**os.environ, "TOKEN": SECRET, "OTHER": "x\n"}
    options = ("-u", "12", "--secret", "TOKEN", "--secret", "also=OTHER")
    done = cli("run", *options, BASE, "--", "sh", "-c", script, env=env)
    assert done.returncode == 0
    lines = done.stdout.decode().splitlines()
    assert lines[0] == "tmpfs"
    assert re.fullmatch(r"-r-{8} +1 12 +\d+ +13 .* TOKEN", lines[2])
    assert re.fullmatch(r"-r-{8} +1 12 +\d+ +2 .* also", lines[3])
    assert lines[4:] == [SECRET]
    done = cli("run", "--secret", "TOKEN", BASE, "--", "su", "-s", "/bin/cat", "nobody", "/run/secrets/TOKEN", env=env)
    assert done.returncode != 0
    assert SECRET.encode() not in done.stdout


def test_a_secret_is_nowhere_else(tmp_path: Path) -> None:
    """Not on a command line, in an environment but the user's own, in a log, or in the guest's list of processes."""
    env = {**os.environ, "TOKEN": SECRET, "VMETTE_CACHE_DIR": str(tmp_path / "cache")}
    script = (
        "cat /proc/*/cmdline /proc/*/environ /proc/cmdline 2>/dev/null | tr '\\0' '\\n'; dmesg; echo up; sleep 1000"
    )
    argv = command(["run", "--debug", "--secret", "TOKEN", BASE, "--", "sh", "-c", script])
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        shown = b""
        while not shown.endswith(b"up\n"):
            shown += process.stdout.readline()
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                shown += (entry / "cmdline").read_bytes()
                if int(entry.name) != process.pid:
                    shown += (entry / "environ").read_bytes()
        process.terminate()
        shown += process.stderr.read()
    assert SECRET.encode() not in shown
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_secrets_from_python() -> None:
    with vmette.Sandbox(BASE, secrets={"a": "text", "b": b"\0\xff"}, secrets_user="nobody") as sandbox:
        assert sandbox.run(["cat", "/run/secrets/a", "/run/secrets/b"]).stdout == b"text\0\xff"
        assert sandbox.run(["cat", "/run/secrets/a"], user="nobody").stdout == b"text"
        assert sandbox.run(["cat", "/run/secrets/a"], user="12").returncode != 0


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".", "a b"])
def test_names_of_secrets_are_names(name: str) -> None:
    with pytest.raises(vmette.ConfigError, match="secret"):
        vmette.run(BASE, ["true"], secrets={name: "x"})


def test_a_secret_that_is_not_there_is_told(cli: Cli) -> None:
    done = cli("run", "--secret", "NOT_THERE", BASE, "--", "true")
    assert done.returncode == 2
    assert done.stderr == b"vmette: secret 'NOT_THERE': there is no environment variable 'NOT_THERE'\n"


def test_an_environment_file(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "env"
    file.write_text("# a comment\n\nA=1 2=3\nFROM_HERE\nNOT_HERE\nB=x\n")
    script = "echo $A; echo $FROM_HERE; echo $B; echo ${NOT_HERE-none}"
    argv = ("run", "--env-file", file, "-e", "B=y", BASE, "--", "sh", "-c", script)
    done = cli(*argv, env={**os.environ, "FROM_HERE": "here"})
    assert done.stdout == b"1 2=3\nhere\ny\nnone\n"
    file.write_text(f"A=1\n{SECRET} =x\n")
    done = cli("run", "--env-file", file, BASE, "--", "true")
    assert (done.returncode, SECRET.encode() in done.stderr) == (2, False)
    assert b"line 2 is malformed" in done.stderr


# --- certificates


def certificate(letter: str) -> str:
    return f"-----BEGIN CERTIFICATE-----\n{letter * 64}\n-----END CERTIFICATE-----"


def test_certificates_are_added_to_the_guests_bundle(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one.pem").write_text(f"text before\n{certificate('A')}\n{certificate('B')}\n")
    (tmp_path / "two.crt").write_text(certificate("C"))
    (tmp_path / "key.txt").write_text("PRIVATE")
    bundle = "/etc/ssl/certs/ca-certificates.crt"
    show = ("--", "cat", bundle)
    wanted = ["A" * 64, "B" * 64, "C" * 64]
    given = cli("run", "--ca-certs", tmp_path, BASE, *show).stdout.decode().split("\n")
    assert [line for line in given if line and not line.startswith("-----")] == wanted
    monkeypatch.setenv("VMETTE_CA_CERTS", str(tmp_path))
    assert vmette.run(BASE, ["cat", bundle], text=True).stdout.split("\n") == given
    monkeypatch.delenv("VMETTE_CA_CERTS")
    assert vmette.run(BASE, ["cat", bundle]).returncode == 1
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    (tmp_path / "config" / "vmette").mkdir(parents=True)
    (tmp_path / "config" / "vmette" / "certs").symlink_to(tmp_path)
    assert vmette.run(BASE, ["cat", bundle], text=True).stdout.split("\n") == given


def test_a_directory_without_certificates_is_told(cli: Cli, tmp_path: Path) -> None:
    for directory, message in ((tmp_path, b"there is no PEM certificate"), (tmp_path / "no", b"No such file")):
        done = cli("run", "--ca-certs", directory, BASE, "--", "true")
        assert (done.returncode, message in done.stderr) == (2, True)


# --- published ports


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def exchange(port: int, data: bytes) -> bytes:
    """Sends all, shuts down, and takes what comes back."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:

        def send() -> None:
            with suppress(OSError):  # the receiver says what there is to say
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        taken = b""
        while piece := connection.recv(1 << 20):
            taken += piece
        sender.join()
        return taken


def serve(sandbox: vmette.Sandbox, port: int, program: str) -> None:
    """Has busybox's nc serve each connection with `program`."""
    sandbox.popen(["nc", "-ll", "-p", str(port), "-e", *program.split()], stdout=-3, stderr=-3)
    listening = f":{port:04X} "
    wait_until(lambda: listening in sandbox.run(["cat", "/proc/net/tcp6", "/proc/net/tcp"], text=True).stdout, "nc")


def test_a_published_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmette.services.MAX_CONNECTIONS", 8)  # more have to wait
    port = free_port()
    with vmette.Sandbox(BASE, publish=[f"{port}:7"]) as sandbox:
        assert sandbox.run(["ls", "/sys/class/net"]).stdout == b"lo\n"
        serve(sandbox, 7, "cat")
        data = os.urandom(3_000_000)
        assert exchange(port, data) == data
        results: list[bytes] = []
        threads = [threading.Thread(target=lambda: results.append(exchange(port, data[:100_000]))) for _ in range(24)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [data[:100_000]] * 24
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.2", port))
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port))


def test_a_published_port_where_nothing_listens() -> None:
    port = free_port()
    with vmette.Sandbox(BASE, publish=[f"127.0.0.1:{port}:7"]) as sandbox:
        with suppress(ConnectionResetError):
            assert exchange(port, b"data") == b""
        assert sandbox.run(["echo", "on"]).stdout == b"on\n"


def test_a_run_publishes_too(cli: Cli) -> None:
    port = free_port()
    # The run ends when its stdin does, and not with the connection: what is on its way then is lost with the VM.
    script = "nc -l -p 80 -e cat </dev/null; cat"
    argv = command(["run", "-p", f"{port}:80", BASE, "--", "sh", "-c", script])
    with subprocess.Popen(argv, stdin=subprocess.PIPE) as process:
        taken: list[bytes] = []

        def answered() -> bool:
            with suppress(OSError):
                taken.append(exchange(port, b"hello"))
            return b"hello" in taken

        wait_until(answered, "an answer of the guest")
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0


def test_a_port_that_is_taken_or_malformed_is_told(cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = cli("run", "-p", f"{server.getsockname()[1]}:80", BASE, "--", "true")
        assert (done.returncode, b"Address already in use" in done.stderr) == (2, True)
    for text in ("80", "x:80", "1:2:3:4", "80:0", "70000:80", "80:", "300.0.0.1:80:80"):
        done = cli("run", "-p", text, BASE, "--", "true")
        assert done.returncode == 2, text


# --- allowed hosts


class Page(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = f"{self.headers['Host']} {self.path}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a web server which `allowed.test` leads to, as every other name does."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        local = partial(proxy.Proxy, allow_private=True, resolve=lambda name, port: ["127.0.0.1"])
        monkeypatch.setattr("vmette.proxy.Proxy", local)
        yield server.server_address[1]
        server.shutdown()


def test_an_allowed_host_is_reached_without_a_network_card(web: int, caplog: pytest.LogCaptureFixture) -> None:
    with vmette.Sandbox(BASE, allow_hosts=[f"allowed.test:{web}"]) as sandbox:
        assert sandbox.run(["ls", "/sys/class/net"]).stdout == b"lo\n"
        done = sandbox.run(["wget", "-q", "-O", "-", f"http://allowed.test:{web}/page?x=1"])
        assert done.stdout == f"allowed.test:{web} /page?x=1".encode()
        head = rf"CONNECT allowed.test:{web} HTTP/1.1\r\nHost: allowed.test:{web}\r\n\r\n"
        connect = f"printf '{head}'; printf 'GET /tunnel HTTP/1.0\\r\\n\\r\\n'"
        done = sandbox.run(["sh", "-c", f"({connect}; sleep 5) | nc 127.0.0.1 3128"])
        assert b" 200 " in done.stdout.split(b"\r\n")[0]
        assert b"/tunnel" in done.stdout
        with caplog.at_level(logging.WARNING, "vmette.proxy"):
            done = sandbox.run(["wget", "-O", "-", f"http://other.test:{web}/"])
        assert done.returncode != 0
        assert b"403" in done.stderr
        assert "other.test" in caplog.text


def test_private_addresses_are_refused(web: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vmette.proxy.Proxy", partial(proxy.Proxy, allow_private=False))
    with vmette.Sandbox(BASE, allow_hosts=[f"allowed.test:{web}", "*"]) as sandbox:
        for url in (f"http://allowed.test:{web}/", "http://127.0.0.1/", "http://169.254.169.254/", "http://10.0.0.1/"):
            done = sandbox.run(["wget", "-O", "-", url])
            assert done.returncode != 0
            assert b"403" in done.stderr


def test_many_requests_at_once(web: int) -> None:
    script = f"for i in $(seq 100); do wget -q -O - http://allowed.test:{web}/$i & done; wait"
    with vmette.Sandbox(BASE, allow_hosts=[f"allowed.test:{web}"]) as sandbox:
        done = sandbox.run(["sh", "-c", script], text=True)
    assert {int(number) for number in re.findall(r"/(\d+)", done.stdout)} >= set(range(1, 60))


def test_a_malformed_host_is_told(cli: Cli) -> None:
    done = cli("run", "--allow-host", "http://example.org/", BASE, "--", "true")
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1


def test_a_run_without_any_of_this_has_no_way_out(cli: Cli) -> None:
    script = "ls /sys/class/net; env; cat /proc/net/route | tail -n +2; wget -O - http://10.0.2.2/; nc 127.0.0.1 3128"
    done = cli("run", BASE, "--", "sh", "-c", script)
    assert done.stdout.decode().splitlines()[0] == "lo"
    assert b"PROXY" not in done.stdout.upper()
    assert done.returncode != 0


# --- vsock


@pytest.fixture
def vsock() -> Iterator[vmette.Sandbox]:
    with vmette.Sandbox(BASE, vsock=True) as sandbox:
        yield sandbox


def test_the_guest_sends_to_the_host(vsock: vmette.Sandbox) -> None:
    with vsock.vsock.listen(5000) as listener:
        sender = vsock.popen(["sh", "-c", "echo hello | vsock-send 5000"])
        with listener.accept(60) as connection:
            assert connection.recv(100) == b"hello\n"
            assert connection.recv(100) == b""  # half-closed
            connection.sendall(b"reply")
        assert sender.communicate() == (b"reply", b"")
        assert sender.returncode == 0
    assert vsock.run(["vsock-send", "5000"]).returncode != 0
    with pytest.raises(TimeoutError), vsock.vsock.listen(5000) as listener:
        listener.accept(0.1)


def test_the_host_runs_a_command_by_vsock_runner(vsock: vmette.Sandbox) -> None:
    with vsock.vsock.listen(5000) as listener:
        runner = vsock.popen(["vsock-runner", "5000", "6000"], stdout=-3, stderr=-3)
        with listener.accept(60) as connection:
            assert connection.recv(100) == b"READY\n"
        with vsock.vsock.connect(6000) as connection:
            connection.sendall(b"echo out; echo err >&2; exit 7")
            connection.shutdown(socket.SHUT_WR)
            with connection.makefile("rb") as reply:
                assert reply.read() == b"out\nerr\n__EXIT__:7\n"
        assert runner.wait() == 0


def test_ports_that_cannot_be(vsock: vmette.Sandbox) -> None:
    with pytest.raises(ConnectionRefusedError):
        vsock.vsock.connect(7000)
    with vsock.vsock.listen(5000), pytest.raises(vmette.GuestError, match="in use"):
        vsock.vsock.listen(5000)
    for port in (0, -1, 1 << 32):
        with pytest.raises(vmette.ConfigError):
            vsock.vsock.connect(port)


def test_waiting_for_a_guest_that_ends(vsock: vmette.Sandbox) -> None:
    listener = vsock.vsock.listen(5000)
    threading.Timer(0.5, vsock.close).start()
    with pytest.raises(vmette.GuestError):
        listener.accept()
    with pytest.raises(vmette.SandboxClosed):
        vsock.vsock.connect(1)


def test_the_command_line_logs_and_sends_back(cli: Cli) -> None:
    script = "printf 'one\\n\\033[31mtwo' | vsock-send $VMETTE_VSOCK_PORT; echo; echo $VMETTE_GUEST_VSOCK_PORT"
    done = cli("run", "--vsock-port", "0", "--guest-vsock-port", "6000", BASE, "--", "sh", "-c", script)
    assert done.stdout == b"one\n\033[31mtwo\n6000\n"
    assert done.stderr == b"vmette: vsock: one\nvmette: vsock: ?[31mtwo\n"
    assert (
        cli("run", "--vsock-port", "-1", BASE, "--", "sh", "-c", "echo ${VMETTE_VSOCK_PORT-none}").stdout == b"none\n"
    )


def test_helpers_are_there_whatever_the_root_is(tmp_path: Path, cli: Cli) -> None:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    busybox = vmette.run(BASE, ["cat", "/bin/busybox"]).stdout
    (root / "bin" / "busybox").write_bytes(busybox)
    (root / "bin" / "busybox").chmod(0o755)
    (root / "bin" / "sh").symlink_to("busybox")
    done = cli("run", "--vsock-port", "5001", root, "--", "sh", "-c", "echo hello | vsock-send $VMETTE_VSOCK_PORT")
    assert (done.stdout, done.stderr) == (b"hello\n", b"vmette: vsock: hello\n")
    assert sorted(path.name for path in root.rglob("*")) == ["bin", "busybox", "sh"]

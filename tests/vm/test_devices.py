"""What a machine can be given besides its root: volumes, disks, a scratch disk, a network card, vsock ports, limits."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import vmette
from tests.vm.support import BASE, children, wait_until
from vmette.config import Disk
from vmette.vmm import passt
from vmette.vmm.spawn import find_program

MIB = 1 << 20


def guest(script: str, root: str | Path = BASE, **options: Any) -> vmette.CompletedProcess[str]:
    return vmette.run(root, ["sh", "-c", script], text=True, **options)


def output(script: str, root: str | Path = BASE, **options: Any) -> str:
    done = guest(script, root, **options)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def image(path: Path, content: bytes, size: int = MIB) -> Path:
    with path.open("wb") as file:
        file.write(content)
        file.truncate(size)
    return path


def tree(path: Path) -> Path:
    """A root filesystem that is a directory: a busybox, and links for some of what it can do."""
    (path / "bin").mkdir(parents=True)
    (path / "bin/busybox").write_bytes(Path("/bin/busybox").read_bytes())
    (path / "bin/busybox").chmod(0o755)
    for name in ("sh", "cat", "ls", "readlink", "head", "mount", "vsock-send"):
        (path / "bin" / name).symlink_to("busybox")
    return path


# --- Volumes


def test_volumes_are_where_they_should_be(tmp_path: Path) -> None:
    outer, inner, odd = (tmp_path / name for name in ("outer", "inner", "odd, 100% \u00e9"))
    for path in (outer, inner, odd):
        path.mkdir()
        (path / "file").write_text(path.name)
    volumes = [f"{inner}:/data/x/y", f"{outer}:/data", f'{odd}:/opt/a b/100%/"\u00e9"::ro']
    script = """
        cat /data/file /data/x/y/file; cd '/opt/a b/100%'; echo *; cat */file
        echo >/data/x/y/new; ! touch */new 2>/dev/null
    """
    shares = [vmette.Share.volume(volume) for volume in volumes]
    assert output(script, shares=shares) == f'outerinner"\u00e9":\n{odd.name}'
    assert (inner / "new").exists()
    assert (outer / "x/y").is_dir()
    assert list((outer / "x/y").iterdir()) == []


def test_links_of_the_image_lead_to_where_a_volume_is_but_not_out_of_the_root(tmp_path: Path) -> None:
    root = tree(tmp_path / "root")
    (root / "var").mkdir()
    (root / "var/cache").symlink_to("/store")
    (root / "up").symlink_to("../../../../deep")
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "file").write_text("shared\n")
    shares = [vmette.Share("", shared, target=target) for target in ("/var/cache/app", "/up/there", "/mnt/last")]
    (root / "store").mkdir()
    (root / "deep").mkdir()
    assert output("cat /store/app/file /deep/there/file /mnt/last/file", root, shares=shares) == "shared\n" * 3
    assert sorted(path.name for path in root.iterdir()) == ["bin", "deep", "store", "up", "var"]
    assert list((root / "store").iterdir()) == []


@pytest.mark.parametrize(
    ("link", "target"),
    [("/nowhere", "/there"), ("/proc/1/root", "/there/x"), ("/proc/self/fd/3", "/there/x"), ("there", "/there/x")],
)
def test_links_that_lead_nowhere_for_a_volume(tmp_path: Path, link: str, target: str) -> None:
    root = tree(tmp_path / "root")
    (root / "there").symlink_to(link)
    with pytest.raises(vmette.GuestError, match=f"cannot make {target} in the root filesystem: "):
        guest("true", root, shares=[vmette.Share("", tmp_path, target=target)])


def test_a_file_is_no_place_for_a_volume(tmp_path: Path) -> None:
    with pytest.raises(vmette.GuestError, match="cannot make /etc/passwd/x in the root filesystem: Not a directory"):
        guest("true", shares=[vmette.Share("", tmp_path, target="/etc/passwd/x")])


# --- Disks


def test_disks_are_in_order_and_what_is_written_stays(tmp_path: Path) -> None:
    one, two, three = (image(tmp_path / name, name.encode() * 3, 1536) for name in "123")
    disks = [Disk(one), Disk(two, read_only=True), Disk(three)]
    script = """
        head -c3 /dev/vdb /dev/vdc /dev/vdd | tr -d '\\n'; cat /sys/block/vd?/size
        printf new | dd of=/dev/vdb bs=512 seek=2 conv=notrunc,fsync 2>/dev/null && echo written
        printf bad | dd of=/dev/vdc bs=512 conv=notrunc 2>/dev/null || echo refused
        blockdev --setrw /dev/vdc; (printf bad | dd of=/dev/vdc bs=512 conv=notrunc,fsync) 2>/dev/null || echo refused
    """
    lines = output(script, disks=disks).splitlines()
    assert lines[0].startswith("==> /dev/vdb <==111==> /dev/vdc <==222==> /dev/vdd <==333")
    assert lines[-6:] == ["3", "3", "3", "written", "refused", "refused"]
    assert one.read_bytes() == b"111" + bytes(1021) + b"new" + bytes(509)
    assert two.read_bytes() == b"222" + bytes(1533)


def test_disks_begin_at_the_first_letter_if_the_root_is_none(tmp_path: Path) -> None:
    disk = Disk(image(tmp_path / "disk", b"disk"))
    assert output("head -c4 /dev/vda; ls /dev/vdb 2>/dev/null || true", tree(tmp_path / "root"), disks=[disk]) == "disk"


def test_a_disk_with_a_file_system_on_it(tmp_path: Path) -> None:
    disk = image(tmp_path / "disk, with a comma", b"", 8 * MIB)
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    script = "mkdir /m && mount /dev/vdb /m && cat /m/file 2>/dev/null; echo kept >/m/file"
    assert output(script, disks=[Disk(disk)]) == ""
    assert output(script, disks=[Disk(disk)]) == "kept\n"


def test_what_is_discarded_is_given_back(tmp_path: Path) -> None:
    path = image(tmp_path / "disk", b"", 64 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", path], check=True)
    script = "mkdir /m && mount /dev/vdb /m && head -c 40000000 /dev/urandom >/m/file && sync && echo written"
    assert output(script, disks=[Disk(path)]) == "written\n"
    before = path.stat().st_blocks * 512
    assert before > 40_000_000
    output("mkdir /m && mount -o discard /dev/vdb /m && rm /m/file && sync", disks=[Disk(path)])
    assert path.stat().st_blocks * 512 < before - 30_000_000


@pytest.mark.only_qemu
def test_one_disk_is_not_written_by_two_machines(tmp_path: Path) -> None:
    path = image(tmp_path / "disk", b"")
    with vmette.Sandbox(BASE, disks=[Disk(path)]) as sandbox:
        assert sandbox.run(["true"]).returncode == 0
        for disk in (Disk(path), Disk(path, read_only=True)):
            with pytest.raises(vmette.VmmError, match=r"^QEMU failed with status 1: .*Failed to get .* lock") as caught:
                guest("true", disks=[disk])
            assert "\n" not in str(caught.value)
    readers = [Disk(path, read_only=True)]
    with vmette.Sandbox(BASE, disks=readers) as sandbox:
        assert sandbox.run(["true"]).returncode == 0
        assert guest("true", disks=readers).returncode == 0


# --- Scratch


def test_scratch_takes_what_memory_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """
        grep -c ' /tmp ext4 ' /proc/mounts; stat -c %a /tmp; stat -c %a /; ls -A /tmp
        dd if=/dev/zero of=/big bs=1M count=200 2>/dev/null && dd if=/dev/zero of=/tmp/big bs=1M count=200 2>/dev/null
        stat -c %s /big /tmp/big; echo changed >/etc/passwd; cat /etc/passwd
        printf 'echo runs' >/tmp/program; chmod 755 /tmp/program; /tmp/program
    """
    lines = output(script, scratch="1G", mem_mib=96).split()
    assert lines == ["1", "1777", "755", str(200 * MIB), str(200 * MIB), "changed", "runs"]


def test_scratch_with_a_directory_and_disks(tmp_path: Path) -> None:
    disk = Disk(image(tmp_path / "disk", b"disk"))
    script = "head -c4 /dev/vda; echo x >/new; cat /new; ls -d /tmp /lost+found 2>/dev/null || true"
    root = tree(tmp_path / "root")
    assert output(script, root, disks=[disk], scratch=64) == "diskx\n/tmp\n"
    assert not (root / "new").exists()


def test_scratch_that_is_full_is_the_guests_trouble(tmp_path: Path) -> None:
    script = """
        dd if=/dev/zero of=/tmp/big bs=1M 2>&1 | grep -o 'No space left on device'
        rm /tmp/big; echo on >/tmp/x; cat /tmp/x
    """
    assert output(script, scratch=32).splitlines() == ["No space left on device", "on"]


@pytest.fixture
def small_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache directory with room for 8 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", path], check=True)
    monkeypatch.setenv("VMETTE_CACHE_DIR", str(path))
    yield path

    def unmounted() -> bool:  # once nobody has a file there open
        return subprocess.run(["umount", path], stderr=subprocess.DEVNULL, check=False).returncode == 0

    wait_until(unmounted, f"the end of all users of {path}")


@pytest.mark.skipif(os.geteuid() != 0, reason="to mount a small file system takes root")
def test_a_host_that_is_full_is_an_error_for_the_guest_and_no_hang(small_cache: Path) -> None:
    script = "dd if=/dev/zero of=/tmp/big bs=1M count=32 conv=fsync 2>&1 | grep -o 'Input/output error'; echo alive"
    assert output(script, scratch=64, timeout=120).splitlines() == ["Input/output error", "alive"]
    assert list((small_cache / "scratch").iterdir()) == []


# --- Network


def test_without_a_network_there_is_no_card() -> None:
    script = (
        "ls /sys/class/net; tail -n +2 /proc/net/route; ls -d /sys/bus/virtio/drivers/virtio_net/virtio* 2>/dev/null"
    )
    assert guest(script).stdout == "lo\n"


@pytest.fixture
def greeter() -> Iterator[int]:
    """The port of a server on the host's loopback that greets whoever comes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.sendall(b"hello from the host\n")

        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.fixture
def no_passt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passt, "find", lambda: None)


@pytest.mark.only_qemu
def test_the_network_of_qemu(no_passt: None, greeter: int) -> None:
    script = f"""
        cat /etc/resolv.conf; ip -4 -o addr show eth0 | grep -o '10[^ ]*' | head -n 1; ip route | head -n 1
        nc 10.0.2.2 {greeter} </dev/null
    """
    assert output(script, net=True).splitlines() == [
        "nameserver 10.0.2.3",
        "10.0.2.15/24",
        "default via 10.0.2.2 dev eth0 ",
        "hello from the host",
    ]


def test_a_link_for_resolv_conf_is_replaced_and_not_followed(no_passt: None, tmp_path: Path) -> None:
    root = tree(tmp_path / "root")
    (root / "etc").mkdir()
    (root / "etc/resolv.conf").symlink_to("/precious")
    (root / "precious").write_text("precious\n")
    script = "cat /precious /etc/resolv.conf; readlink /etc/resolv.conf || true"
    assert output(script, root, net=True) == "precious\nnameserver 10.0.2.3\n"


def test_an_address_that_is_given(no_passt: None, greeter: int) -> None:
    script = f"""
        cat /etc/resolv.conf; ip -4 -o addr show eth0 | grep -o '10[^ ]*' | head -n 1
        nc 10.0.2.2 {greeter} </dev/null
    """
    done = output(script, net=True, cmdline="vmette.net=10.0.2.77/24,10.0.2.2,192.0.2.53")
    assert done.splitlines() == ["nameserver 192.0.2.53", "10.0.2.77/24", "hello from the host"]


@pytest.mark.parametrize(
    "how", ["10.0.2.77", "10.0.2.77/33", "10.0.2/24", "10.0.2.77/24,x", "10.0.2.77/24,10.0.2.2,x", ""]
)
def test_an_address_that_is_none(no_passt: None, how: str) -> None:
    with pytest.raises(vmette.GuestError, match=r"vmette\.net is malformed"):
        guest("true", net=True, cmdline=f"vmette.net={how}")


@pytest.mark.only_qemu
def test_nobody_answers_to_dhcp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = tmp_path / "passt"
    deaf.write_text("#!/bin/sh\nexec sleep 1000\n")
    deaf.chmod(0o755)
    monkeypatch.setattr(passt, "find", lambda: deaf)
    before = children()
    with pytest.raises(vmette.GuestError, match="no answer to DHCP"):
        guest("true", net=True)
    assert children() == before


def test_a_passt_that_does_not_work_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "passt"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("VMETTE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(passt, "_default_route", lambda: True)
    assert passt.find() is None
    assert [path.name.rpartition("-")[0] for path in (tmp_path / "cache/probes").iterdir()] == ["passt-works"]


@pytest.mark.only_qemu
def test_passt_is_used_and_the_hosts_loopback_is_out_of_reach(greeter: int) -> None:
    if find_program("passt") is None:
        pytest.skip("passt is not installed")
    assert passt.find() is not None, "it does not work here"
    before = children()
    script = f"""
        cat /etc/resolv.conf; ip route | grep -c ^default; cat /sys/class/net/eth0/mtu
        router=$(ip route | sed -n 's/default via \\([^ ]*\\).*/\\1/p')
        for host in $router $(sed 's/nameserver //' /etc/resolv.conf); do
            nc -w 3 $host {greeter} </dev/null 2>/dev/null | grep hello
        done; true
    """
    assert output(script, net=True).splitlines() == ["nameserver 169.254.53.53", "1", "65520"]
    wait_until(lambda: children() == before, "the end of passt")


# --- vsock


def test_the_guest_sends_and_is_answered() -> None:
    with vmette.Sandbox(BASE, vsock=True) as sandbox, sandbox.vsock.listen(5000) as listener:
        sent = os.urandom(300_000)
        received = bytearray()

        def serve() -> None:
            with listener.accept(60) as connection:
                while data := connection.recv(65536):
                    received.extend(data)
                connection.sendall(bytes(reversed(received)))

        thread = threading.Thread(target=serve)
        thread.start()
        done = sandbox.run(["vsock-send", "5000"], input=sent)
        thread.join()
        assert (done.returncode, done.stderr) == (0, b"")
        assert received == sent
        assert done.stdout == bytes(reversed(sent))


def test_a_reply_ends_it_though_stdin_goes_on() -> None:
    with (
        vmette.Sandbox(BASE, vsock=True) as sandbox,
        sandbox.vsock.listen(5000) as listener,
        sandbox.popen(["vsock-send", "5000"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as process,
    ):
        with listener.accept(60) as connection:
            connection.sendall(b"enough")
        assert process.stdout is not None
        assert process.stdout.read() == b"enough"
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("", 2, "usage: vsock-send PORT [CID]\n"),
        ("1 2 3", 2, "usage: vsock-send PORT [CID]\n"),
        ("x", 2, "vsock-send: port x is no number from 1 to 4294967294\n"),
        ("0", 2, "vsock-send: port 0 is no number from 1 to 4294967294\n"),
        ("4294967295", 2, "vsock-send: port 4294967295 is no number from 1 to 4294967294\n"),
        ("99999999999999999999", 2, "vsock-send: port 99999999999999999999 is no number from 1 to 4294967294\n"),
        ("5 -1", 2, "vsock-send: CID -1 is no number from 1 to 4294967294\n"),
        ("5", 1, "vsock-send: cannot connect to port 5 of CID 2: Connection reset by peer\n"),
    ],
)
def test_vsock_send_that_cannot_send(vsock_sandbox: vmette.Sandbox, arguments: str, status: int, message: str) -> None:
    done = vsock_sandbox.run(["vsock-send", *arguments.split()], text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", message)


@pytest.fixture(scope="module")
def vsock_sandbox() -> Iterator[vmette.Sandbox]:
    with vmette.Sandbox(BASE, vsock=True) as sandbox:
        yield sandbox


def read_all(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize(
    ("command", "answer"),
    [
        (b"echo out; echo err >&2; cat; exit 3", b"out\nerr\n__EXIT__:3\n"),
        (b"echo two\necho lines\n", b"two\nlines\n__EXIT__:0\n"),
        (b"kill -9 $$", b"__EXIT__:137\n"),
        (b"sleep 1000 & echo left", b"left\n__EXIT__:0\n"),
        (b"", b"__EXIT__:0\n"),
        (b": " + b"x" * 65533, b"__EXIT__:0\n"),
        (b": " + b"x" * 65534, b"vsock-runner: the command is longer than 65535 bytes\n__EXIT__:126\n"),
        (b": " + b"x" * 500_000, b"vsock-runner: the command is longer than 65535 bytes\n__EXIT__:126\n"),
        (b"echo a\0b", b"vsock-runner: there is a NUL in the command\n__EXIT__:126\n"),
    ],
)
def test_the_runner_runs_a_command(vsock_sandbox: vmette.Sandbox, command: bytes, answer: bytes) -> None:
    with vsock_sandbox.vsock.listen(6000) as listener:
        process = vsock_sandbox.popen(["vsock-runner", "6000", "6001"])
        with listener.accept(60) as ready:
            assert read_all(ready) == b"READY\n"
        with vsock_sandbox.vsock.connect(6001) as connection:
            connection.sendall(command)
            connection.shutdown(socket.SHUT_WR)
            assert read_all(connection) == answer
        assert process.communicate() == (b"", b"")
        assert process.returncode == 0


def test_the_helpers_come_to_any_root(tmp_path: Path) -> None:
    root = tree(tmp_path / "root")
    (root / "usr").mkdir()
    (root / "usr/local").symlink_to("/opt")
    (root / "opt/bin").mkdir(parents=True)
    (root / "opt/bin/vsock-send").write_text("#!/bin/sh\necho the image has its own\n")
    (root / "opt/bin/vsock-send").chmod(0o755)
    script = "/usr/local/bin/vsock-send; /opt/bin/vsock-runner"
    done = guest(script, root, vsock=True)
    assert (done.returncode, done.stdout) == (2, "the image has its own\n")
    assert done.stderr == "usage: vsock-runner SIGNAL_PORT LISTEN_PORT\n"
    assert [path.name for path in (root / "opt/bin").iterdir()] == ["vsock-send"]


# --- Limits and the name


def test_the_name_of_the_host() -> None:
    assert (
        output("hostname; grep -c 'localhost web-1.example' /etc/hosts", hostname="web-1.example")
        == "web-1.example\n1\n"
    )


def test_a_fork_bomb_ends_in_a_clear_result() -> None:
    with vmette.Sandbox(BASE, pids=100) as sandbox:
        done = sandbox.run(["sh", "-c", "while :; do sleep 1000 & done"], text=True)
        assert (done.returncode, done.stderr) == (2, "sh: can't fork: Resource temporarily unavailable\n")
        assert sandbox.run(["cat", "/sys/fs/cgroup/vmette/pids.peak"]).stdout == b"100\n"


def test_limits_are_set_by_the_size_of_the_machine() -> None:
    script = "cd /sys/fs/cgroup/vmette; cat pids.max memory.max; awk '/MemTotal:/ {print $2}' /proc/meminfo"
    for mib, least, most in ((64, 100, 300), (512, 1500, 2100), (2048, 4096, 4096)):
        pids, memory, total = map(int, output(script, mem_mib=mib).split())
        assert least <= pids <= most
        assert total * 1024 * 0.35 < memory <= total * 1024 - 8 * MIB


FILL = "for dir in /dev/shm /tmp /run; do dd if=/dev/zero of=$dir/x bs=1M & done; wait"


@pytest.mark.parametrize("hog", ["tail /dev/zero", FILL])
def test_whoever_takes_all_memory_is_ended_and_the_agent_is_not(hog: str) -> None:
    with vmette.Sandbox(BASE, mem_mib=128) as sandbox:
        sandbox.run(["sh", "-c", f"({hog}) 2>/dev/null; true"])
        sandbox.run(["rm", "-f", "/dev/shm/x", "/tmp/x", "/run/x"])
        said = sandbox.run(["dmesg"], text=True).stdout
        assert "Memory cgroup out of memory: Killed process" in said
        assert "global_oom" not in said
        assert sandbox.run(["echo", "alive"]).stdout == b"alive\n"


def test_open_files_are_limited() -> None:
    script = """
        ulimit -Sn; ulimit -Hn
        i=3; while [ $i -lt 40 ]; do (eval "exec $i</dev/null") 2>/dev/null || break; i=$((i + 1)); done; echo $i
    """
    assert output(script, nofile=16).split() == ["16", "16", "16"]
    assert output("ulimit -Sn; ulimit -Hn").split() == ["1024", "4096"]


# --- What else the kernel has to have


def test_the_kernel_has_what_the_agent_and_programs_need() -> None:
    script = """
        cat /sys/fs/cgroup/vmette/cgroup.controllers
        mkdir /sys/fs/cgroup/vmette/probe; cd /sys/fs/cgroup/vmette/probe
        ls memory.peak pids.peak cgroup.kill memory.events cpu.weight
        for name in mem kmem port; do ls /dev/$name 2>/dev/null; done
        ls /dev/fuse /dev/net/tun; grep -c Seccomp: /proc/self/status; ls /proc/sys/fs/mqueue/msg_max
    """
    assert output(script).split() == [
        *("cpu", "memory", "pids"),
        *("cgroup.kill", "cpu.weight", "memory.events", "memory.peak", "pids.peak"),
        *("/dev/fuse", "/dev/net/tun", "1", "/proc/sys/fs/mqueue/msg_max"),
    ]

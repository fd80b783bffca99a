"""Images in the guest: what their layers say is what its kernel shows, and their config is honoured."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import vmette
from tests.images.layout import Layout, member, tar
from tests.vm.support import Cli, command, wait_until
from vmette import TimeoutExpired

BUSYBOX = Path("/bin/busybox").read_bytes()
# cap_net_raw=ep, as the kernel's vfs_cap_data has it (revision 2, little-endian)
CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")[:20]
PASSWD = b"root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:an app:/home/app:/bin/sh\n"
GROUP = b"root:x:0:\napp:x:1001:\nextra:x:1002:app\n"

BASE = [
    member("bin", kind="d"),
    member("bin/busybox", BUSYBOX, mode=0o755),
    *[member(f"bin/{name}", kind="l", target="busybox") for name in ("sh", "cat", "stat", "id", "env", "find", "wc")],
    *[member(f"bin/{name}", kind="l", target="busybox") for name in ("pwd", "echo", "sha256sum", "test", "ls")],
    member("etc", kind="d"),
    member("etc/passwd", PASSWD),
    member("etc/group", GROUP),
    member("tmp", kind="d", mode=0o1777),
    member("home/app", kind="d", owner=(1000, 1001), mode=0o750),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, in which it is known already that KVM is not to be tried."""
    monkeypatch.setenv("VMETTE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run(cli: Cli, *args: str, **options: Any) -> str:
    done = cli("run", "--quiet", *args, **options)
    assert done.returncode == 0, done.stderr
    return str(done.stdout.decode())


@pytest.mark.parametrize("form", ["block", "directory"])
def test_the_guest_sees_what_the_layers_say(cli: Cli, tmp_path: Path, form: str) -> None:
    layout = Layout(tmp_path / "layout")
    lower = [
        *BASE,
        member("d/gone", b"x"),
        member("d/stays", b"stays"),
        member("opaque/old", b"x"),
        member("replaced", b"a file"),
        member("lib", kind="l", target="usr/lib"),
        member("usr/lib", kind="d"),
        member("first", b"shared", owner=(5, 6)),
    ]
    upper = [
        member("d/.wh.gone"),
        member("opaque/.wh..wh..opq"),
        member("opaque/new", b"n"),
        member("replaced", kind="d"),
        member("replaced/inside", b"i"),
        member("lib/through", b"the link"),
        member("second", kind="h", target="first"),
        member("setuid", b"#!", mode=0o4755, owner=(1, 2)),
        member("Case", b"upper"),
        member("case", b"lower"),
        member("null", kind="c", device=(1, 3), mode=0o666),
        member("disk", kind="b", device=(259, 1000), mode=0o600),
        member("fifo", kind="p", mode=0o622),
        member("raw\udcff\udcfe", b"not UTF-8"),
        member("empty", b""),
        member("large", bytes(range(256)) * 20000),
    ]
    spec = layout.tag("x", layout.manifest([tar(lower), tar(upper)]))
    script = (
        "cd /; for f in d/* opaque/* replaced/* usr/lib/* first second setuid Case case null disk fifo raw* empty; do "
        'stat -c "%n %F %a %u:%g %h %s %t,%T %Y" "$f"; done; cat Case case usr/lib/through; echo; sha256sum large'
    )
    lines = subprocess.run(
        command(["run", "--quiet", "--rootfs-form", form, spec, "sh", "-c", script]),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=True,
    ).stdout.decode("utf-8", "surrogateescape")
    t = 1_000_000_000
    assert lines.splitlines() == [
        f"d/stays regular file 644 0:0 1 5 0,0 {t}",
        f"opaque/new regular file 644 0:0 1 1 0,0 {t}",
        f"replaced/inside regular file 644 0:0 1 1 0,0 {t}",
        f"usr/lib/through regular file 644 0:0 1 8 0,0 {t}",
        f"first regular file 644 5:6 2 6 0,0 {t}",
        f"second regular file 644 5:6 2 6 0,0 {t}",
        f"setuid regular file 4755 1:2 1 2 0,0 {t}",
        f"Case regular file 644 0:0 1 5 0,0 {t}",
        f"case regular file 644 0:0 1 5 0,0 {t}",
        f"null character special file 666 0:0 1 0 1,3 {t}",
        f"disk block special file 600 0:0 1 0 103,3e8 {t}",
        f"fifo fifo 622 0:0 1 0 0,0 {t}",
        f"raw\udcff\udcfe regular file 644 0:0 1 9 0,0 {t}",
        f"empty regular empty file 644 0:0 1 0 0,0 {t}",
        "upperlowerthe link",
        f"{hashlib.sha256(bytes(range(256)) * 20000).hexdigest()}  large",
    ]


def test_setuid_and_file_capabilities_work(cli: Cli, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    layer = [
        *BASE,
        member("suid/busybox", BUSYBOX, mode=0o4755),
        member("capable/busybox", BUSYBOX, mode=0o755, xattrs={"security.capability": CAPABILITY}),
    ]
    spec = layout.tag("x", layout.manifest([tar(layer)]))
    # busybox gives up the rights of set-user-ID root, but not for ping, which needs a raw socket.
    ping = "ping -c 1 127.0.0.1 > /dev/null 2>&1 && echo yes || echo no"
    script = (
        f"/bin/busybox {ping}; /suid/busybox {ping}; for b in /bin /capable; do $b/busybox cat /proc/self/status; done"
    )
    out = run(cli, "-u", "app", spec, "sh", "-c", script).splitlines()
    assert out[:2] == ["no", "yes"]
    sets = [line.split()[1] for line in out if line.startswith("CapEff:")]
    assert sets == [f"{0:016x}", f"{1 << 13:016x}"]


CONFIG = {
    "Entrypoint": ["/bin/sh", "-c"],
    "Cmd": ['echo "$A $B" $(id -un):$(id -gn) $(pwd)'],
    "Env": ["A=image", "B=image"],
    "User": "app",
    "WorkingDir": "/home/app",
}


def test_the_config_is_honoured_and_overridden(cli: Cli, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    spec = layout.tag("x", layout.manifest([tar(BASE)], CONFIG))
    assert run(cli, spec) == "image image app:app /home/app\n"
    assert run(cli, "-e", "B=mine", spec) == "image mine app:app /home/app\n"
    assert run(cli, "-u", "0", "-w", "/tmp", spec) == "image image root:root /tmp\n"
    assert run(cli, spec, "echo other") == "other\n"
    assert run(cli, "--entrypoint", "/bin/echo", spec) == "\n"
    assert run(cli, "--entrypoint", "", spec, "echo", "plain") == "plain\n"
    assert run(cli, "--exec", "id -G", spec) == "1001 1002\n"
    done = cli("run", "--entrypoint", "", spec)
    assert (done.returncode, b"no command" in done.stderr) == (2, True)


def test_a_stop_signal_gives_the_command_time_to_end(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(tmp_path / "layout")
    config = {"Entrypoint": ["/bin/sh", "-c"], "StopSignal": "SIGQUIT"}
    spec = layout.tag("x", layout.manifest([tar(BASE)], config))
    none = layout.tag("y", layout.manifest([tar(BASE)], {"Entrypoint": ["/bin/sh", "-c"]}))
    waits = "trap 'echo in order; exit 3' QUIT; echo up; while :; do :; done"
    for image in (spec, none):  # making it is no part of the time
        assert cli("pull", image).returncode == 0
    done = cli("run", "--quiet", "--timeout", "8", spec, waits)
    assert (done.returncode, done.stdout) == (124, b"up\nin order\n")
    done = cli("run", "--quiet", "--timeout", "8", none, waits)
    assert (done.returncode, done.stdout) == (124, b"up\n")
    monkeypatch.setattr("vmette.guest.STOP_SECONDS", 0.5)
    with pytest.raises(TimeoutExpired) as caught:
        vmette.run(spec, ["trap '' QUIT; echo deaf; while :; do :; done"], timeout=8)
    assert caught.value.stdout == b"deaf\n"


def test_an_image_without_a_command_needs_one(cli: Cli, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    spec = layout.tag("x", layout.manifest([tar(BASE)]))
    done = cli("run", spec)
    assert done.returncode == 2
    assert b"there is no command to run" in done.stderr


def test_fifty_thousand_files(cli: Cli, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    files = [member(f"many/{n % 50}/{n}", str(n).encode()) for n in range(50_000)]
    spec = layout.tag("x", layout.manifest([tar(BASE), tar(files)]))
    assert run(cli, spec, "sh", "-c", "find /many -type f | wc -l; cat /many/49/49999") == "50000\n49999"


def test_the_wrong_platform_is_refused_by_name(cli: Cli, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    index = layout.index([layout.manifest([tar(BASE)], architecture=arch) for arch in ("s390x", "riscv64")])
    done = cli("run", layout.tag("x", index), "true")
    assert done.returncode == 125
    assert b"it is for linux/riscv64, linux/s390x" in done.stderr
    done = cli("run", "--platform", "linux/s390x", layout.tag("y", index), "true")
    assert done.returncode == 2
    assert done.stderr == (
        b"vmette: no machine here runs images for linux/s390x: there are linux/amd64 and linux/arm64\n"
    )


def test_a_running_vm_keeps_its_image(cli: Cli, tmp_path: Path, cache: Path) -> None:
    layout = Layout(tmp_path / "layout")
    spec = layout.tag("x", layout.manifest([tar(BASE)]))
    other = layout.tag("y", layout.manifest([tar([*BASE, member("other", b"x")])]))
    run(cli, other, "echo")
    with subprocess.Popen(
        command(["run", "--quiet", spec, "sh", "-c", "echo up; cat; cat /etc/passwd"]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as vm:
        assert vm.stdin is not None and vm.stdout is not None
        assert vm.stdout.readline() == b"up\n"
        long_ago = time.time() - 3600
        for entry in (*(cache / "store/images").iterdir(), *(cache / "store/layers").iterdir()):
            os.utime(entry, (long_ago, long_ago))
        assert len(list((cache / "store/images").iterdir())) == 2
        done = cli("cache", "prune", "--all")
        assert (done.returncode, done.stderr) == (0, b"")
        assert len(list((cache / "store/images").iterdir())) == 1
        vm.stdin.close()
        assert vm.stdout.read() == PASSWD
    assert vm.returncode == 0
    os.utime(next((cache / "store/images").iterdir()), (long_ago, long_ago))
    assert cli("cache", "prune", "--all").returncode == 0
    assert list((cache / "store/images").iterdir()) == list((cache / "store/layers").iterdir()) == []
    assert run(cli, spec, "echo", "again") == "again\n"


def test_a_killed_pull_leaves_nothing_that_is_taken_for_an_image(cli: Cli, tmp_path: Path, cache: Path) -> None:
    layout = Layout(tmp_path / "layout")
    layers = [tar([*BASE, member(f"large{n}", os.urandom(1 << 22) * 4)]) for n in range(3)]
    spec = layout.tag("x", layout.manifest(layers))
    for delay in (0.15, 0.2, 0.25, 0.3, 0.4, 0.5):
        pull = subprocess.Popen([sys.executable, "-m", "vmette", "pull", spec], stdout=subprocess.DEVNULL)
        time.sleep(delay)
        pull.kill()
        pull.wait()
    assert run(cli, spec, "sh", "-c", "wc -c < /large2") == f"{1 << 24}\n"
    wait_until(lambda: list((cache / "store/staging").iterdir()) == [], "an empty staging place")
    assert cli("cache", "prune", "--until", "7d").returncode == 0  # one may have died with all but its lock gone
    assert list((cache / "store/locks").iterdir()) == []


def test_archives_and_filesystem_images(cli: Cli, tmp_path: Path) -> None:
    archive = tmp_path / "root.tar"
    archive.write_bytes(tar([*BASE, member(".wh.kept", b"an ordinary name")]))
    subprocess.run(["zstd", "--quiet", str(archive)], check=True)
    subprocess.run(["xz", "--keep", str(archive)], check=True)
    tree = tmp_path / "tree"
    tree.mkdir()
    subprocess.run(["tar", "-xf", str(archive), "-C", str(tree)], check=True)
    subprocess.run(["mksquashfs", str(tree), str(tmp_path / "root.squashfs"), "-quiet", "-no-progress"], check=True)
    subprocess.run(["mkfs.erofs", "--quiet", str(tmp_path / "root.erofs"), str(tree)], check=True)
    specs = [f"tar+file://{archive}", f"{archive}.zst", f"{archive}.xz", f"{tmp_path}/root.squashfs"]
    specs += [f"erofs+file://{tmp_path}/root.erofs", f"squashfs+file://localhost{tmp_path}/root.squashfs"]
    for spec in specs:
        assert run(cli, spec, "cat", "/.wh.kept") == "an ordinary name", spec
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert run(cli, f"tar+file://{archive}#sha256={digest}", "echo", "right") == "right\n"
    done = cli("run", f"tar+file://{archive}#sha256={'0' * 64}", "true")
    assert (done.returncode, done.stderr.count(b"\n")) == (125, 1)

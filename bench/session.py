"""What a running session costs, against ssh into the same guest.

    .venv/bin/python -m bench.session [--runs N]

The guest is Debian with dropbear's server. ssh keeps one connection open (ControlMaster), as a session does, and its
packets go through QEMU's own network, past vmette.

- round trip: `true`, from the call to its exit status.
- stdout: 64 MiB of zeros from the guest.
- copy in: a file of 64 MiB into the guest's memory; ssh has `cat` write it.

They take turns. It prints medians and ratios. `ssh`, `ssh-keygen` and `mmdebstrap` must be there.
"""

from __future__ import annotations

import argparse
import os
import platform
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import vmette
from vmette.vmm import qemu

SIZE = 64 << 20


def free_port() -> int:
    """A TCP port of this machine that nothing listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def debian(directory: Path) -> str:
    """The spec of a Debian root filesystem with an ssh server."""
    archive = directory / "root.tar"
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    include = "--include=dropbear-bin"
    subprocess.run(["mmdebstrap", "--variant=minbase", include, "--quiet", release, archive], check=True)
    return f"tar+file://{archive}"


def forwarding(port: int) -> Callable[..., list[str]]:
    """QEMU's command line, with a port of this machine that leads to the guest's port 22."""
    original = qemu.command_line

    def command_line(*args: object, **kwargs: object) -> list[str]:
        words = original(*args, **kwargs)  # type: ignore[arg-type]
        return [word.replace("user,", f"user,hostfwd=tcp:127.0.0.1:{port}-:22,") for word in words]

    return command_line


class Ssh:
    """An open connection."""

    def __init__(self, directory: Path, port: int) -> None:
        self._options = ["-i", str(directory / "key"), "-p", str(port), "-o", f"ControlPath={directory}/ssh"]
        self._options += ["-o", "StrictHostKeyChecking=no", "-o", f"UserKnownHostsFile={directory}/hosts"]
        self._options += ["-o", "LogLevel=ERROR", "-o", "BatchMode=yes"]

    def run(self, *words: str, stdin: Path | None = None, options: tuple[str, ...] = ()) -> None:
        """Runs a command there and takes what it writes."""
        argv = ["ssh", *self._options, *options, "root@127.0.0.1", *words]
        with Path(stdin or os.devnull).open("rb") as source:
            subprocess.run(argv, stdin=source, stdout=subprocess.PIPE, check=True)


def seconds(action: Callable[[], object]) -> float:
    """What `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description="Measure a session of vmette against ssh.")
    parser.add_argument("--runs", type=int, default=10, help="runs of each (10)")
    runs: int = parser.parse_args().runs
    with tempfile.TemporaryDirectory(prefix="vmette-bench-") as name:
        directory = Path(name)
        port = free_port()
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", directory / "key"], check=True)
        data = directory / "data"
        data.write_bytes(os.urandom(SIZE))
        with (
            patch("vmette.vmm.qemu.command_line", forwarding(port)),
            patch("vmette.vmm.passt.find", return_value=None),
            vmette.Sandbox(debian(directory), net=True, mem_mib=1024) as sandbox,
        ):
            sandbox.files.mkdir("/root/.ssh", mode=0o700, parents=True, exist_ok=True)
            sandbox.files.write("/root/.ssh/authorized_keys", (directory / "key.pub").read_bytes(), mode=0o600)
            sandbox.files.mkdir("/etc/dropbear", exist_ok=True)
            server = sandbox.popen(["dropbear", "-F", "-R", "-p", "22"], stdout=-3, stderr=-3)
            ssh = Ssh(directory, port)
            master = ("-M", "-f", "-N", "-o", "ConnectTimeout=120")
            while seconds_until_up := sandbox.run(["sh", "-c", "grep -q ':0016 ' /proc/net/tcp"]).returncode:
                time.sleep(0.1 * seconds_until_up)
            ssh.run(options=master)
            flood = ("head", "-c", str(SIZE), "/dev/zero")
            actions: dict[str, dict[str, Callable[[], object]]] = {
                "round trip": {
                    "vmette": lambda: sandbox.run(["true"], check=True),
                    "ssh": lambda: ssh.run("true"),
                },
                "stdout": {
                    "vmette": lambda: sandbox.run(flood, check=True),
                    "ssh": lambda: ssh.run(*flood),
                },
                "copy in": {
                    "vmette": lambda: sandbox.files.copy_in(data, "/tmp/a"),
                    "ssh": lambda: ssh.run("cat >/tmp/b", stdin=data),
                },
            }
            for what, pair in actions.items():
                times: dict[str, list[float]] = {who: [] for who in pair}
                for run in range(runs + 1):
                    for who, action in pair.items():
                        took = seconds(action)
                        if run > 0:  # the first one translates code
                            times[who].append(took)
                median = {who: statistics.median(values) for who, values in times.items()}
                for who, value in median.items():
                    rate = "" if what == "round trip" else f"   {SIZE / value / 1e6:7.0f} MB/s"
                    print(f"{what:10} {who:6} {value * 1000:9.1f} ms{rate}", flush=True)
                print(f"{what:10} vmette / ssh = {median['vmette'] / median['ssh']:.2f}", flush=True)
            print("aims: round trip under 0.5, the others under 1 (times, not rates)")
            server.kill()


if __name__ == "__main__":
    main()

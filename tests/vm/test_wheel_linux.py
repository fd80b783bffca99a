"""The wheel for Linux on a machine that has nothing but Debian, Python and QEMU."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools import payload, wheel
from vmette import assets

INCLUDED = "ca-certificates,python3,python3-venv,qemu-system-x86"
COMPILERS = ("cc", "gcc", "clang", "tcc", "make", "ld", "as")
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
CERTIFICATES = Path("etc/ssl/certs/ca-certificates.crt")
OF_THE_HOST = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
"""How this machine reaches the package index, if it does in a way of its own."""

ENTER = """
mount -t proc proc "$ROOT/proc"
mount --rbind /dev "$ROOT/dev"
exec chroot "$ROOT" "$@"
"""


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A root of this machine's release, which has the index's certificates and name servers of this machine."""
    path = tmp_path / "root"
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    command = ["mmdebstrap", "--variant=apt", f"--include={INCLUDED}", "--quiet", release, str(path)]
    try:
        subprocess.run(command, check=True)
        shutil.copyfile("/etc/resolv.conf", path / "etc/resolv.conf")
        shutil.copyfile(os.environ.get("SSL_CERT_FILE", Path("/", CERTIFICATES)), path / CERTIFICATES)
        yield path
    finally:
        subprocess.run(["rm", "-rf", "--one-file-system", path], check=True)


def inside(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in `root`. What it mounts and leaves running ends with it."""
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"]
    certificates = dict.fromkeys(("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), f"/{CERTIFICATES}")
    names = (name for variable in OF_THE_HOST for name in (variable, variable.lower()))
    environment = {name: os.environ[name] for name in names if name in os.environ} | certificates
    environment |= {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", "ROOT": str(root)}
    whole = [*namespaces, "sh", "-euc", ENTER, "sh", *command]
    return subprocess.run(whole, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_it_is_all_that_is_needed_beside_qemu(root: Path, tmp_path: Path) -> None:
    built = wheel.build_linux(assets.host_arch(), payload.PAYLOAD, tmp_path / "dist")
    shutil.copy(built, root / "root")
    for name in COMPILERS:
        assert shutil.which(name, path=":".join(f"{root}{directory}" for directory in PATH.split(":"))) is None
    for command in (
        ["python3", "-m", "venv", "/root/venv"],
        ["/root/venv/bin/pip", "install", "--quiet", "--only-binary", ":all:", f"/root/{built.name}"],
    ):
        done = inside(root, *command)
        assert done.returncode == 0, done.stderr
    done = inside(root, "/root/venv/bin/vmette", "run", "builtin://base", "uname", "-a")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Linux ")
    assert os.uname().machine in done.stdout
    done = inside(root, "/root/venv/bin/vmette", "doctor")
    assert done.returncode == 0, done.stdout + done.stderr

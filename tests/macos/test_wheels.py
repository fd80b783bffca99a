"""The wheels that tools/wheel.py makes, with a small stand-in for what runs in the guest."""

from __future__ import annotations

import base64
import csv
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lief
import pytest
from packaging.tags import Tag, cpython_tags, mac_platforms
from packaging.utils import parse_wheel_filename

from tests.macos.code_signature import verify
from tools import wheel
from tools.artifacts import BuildError
from vmette._version import __version__

ROOT = Path(__file__).parents[2]
KERNELS = {"x86_64": "vmlinux", "aarch64": "Image"}
FILES = ("initramfs.cpio", "base.squashfs", "vsock-send", "vsock-runner")
WHEELS = ("macos", "x86_64", "aarch64")
ARCHITECTURES = {"macos": "aarch64", "x86_64": "x86_64", "aarch64": "aarch64"}
PLATFORMS = {
    "macos": "macosx_13_0_arm64",
    "x86_64": "manylinux_2_27_x86_64",
    "aarch64": "manylinux_2_27_aarch64",
}
NATIVE = {
    "macos": ["vmette/_native.abi3.so", "vmette/_payload/macos/vmette-vz", "vmette/_vz.abi3.so"],
    "x86_64": ["vmette/_native.abi3.so"],
    "aarch64": ["vmette/_native.abi3.so"],
}


@dataclass
class Wheel:
    kind: str
    path: Path
    members: dict[str, bytes]

    @property
    def metadata(self) -> str:
        return f"vmette-{__version__}.dist-info"


def fill(payload: Path) -> Path:
    """A stand-in for the files for both architectures."""
    for arch, kernel in KERNELS.items():
        (payload / arch).mkdir(parents=True)
        for name in (kernel, *FILES):
            (payload / arch / name).write_text(f"{name} for {arch}\n")
    (payload / "NOTICE").write_text("whose it is\n")
    return payload


def build(kind: str, payload: Path, output: Path) -> Path:
    return wheel.build_macos(payload, output) if kind == "macos" else wheel.build_linux(kind, payload, output)


@pytest.fixture(scope="module")
def payload(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("payload"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, payload: Path) -> dict[str, Wheel]:
    result = {}
    for kind in WHEELS:
        output = tmp_path_factory.mktemp(kind)
        path = build(kind, payload, output)
        assert list(output.iterdir()) == [path]
        with zipfile.ZipFile(path) as archive:
            result[kind] = Wheel(kind, path, {name: archive.read(name) for name in archive.namelist()})
    return result


@pytest.fixture(params=WHEELS)
def one(request: pytest.FixtureRequest, built: dict[str, Wheel]) -> Wheel:
    return built[request.param]


# --- What pip looks at


def test_tags(one: Wheel) -> None:
    name, version, build_number, tags = parse_wheel_filename(one.path.name)
    assert (name, str(version), build_number) == ("vmette", __version__, ())
    assert tags == {Tag("cp310", "abi3", PLATFORMS[one.kind])}
    fields = one.members[f"{one.metadata}/WHEEL"].decode().splitlines()
    assert {"Wheel-Version: 1.0", "Root-Is-Purelib: false", *(f"Tag: {tag}" for tag in tags)} < set(fields)


@pytest.mark.parametrize("minor", range(10, 15))
@pytest.mark.parametrize(
    ("macos", "arch", "taken"), [(12, "arm64", 0), (13, "arm64", 1), (26, "arm64", 1), (13, "x86_64", 0)]
)
def test_which_macs_and_pythons_take_it(
    built: dict[str, Wheel], minor: int, macos: int, arch: str, taken: bool
) -> None:
    *_, tags = parse_wheel_filename(built["macos"].path.name)
    platforms = list(mac_platforms((macos, 0), arch))
    assert bool(tags & set(cpython_tags((3, minor), platforms=platforms))) == bool(taken)
    assert not tags & set(cpython_tags((3, 9), platforms=platforms))


def test_the_record_has_every_member(one: Wheel) -> None:
    rows = list(csv.reader(one.members[f"{one.metadata}/RECORD"].decode().splitlines()))
    assert rows.pop() == [f"{one.metadata}/RECORD", "", ""]
    assert [name for name, _, _ in rows] == [name for name in one.members if not name.endswith("/RECORD")]
    for name, digest, size in rows:
        data = one.members[name]
        wanted = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        assert (digest, size) == (f"sha256={wanted}", str(len(data)))


def test_the_metadata(one: Wheel) -> None:
    text = one.members[f"{one.metadata}/METADATA"].decode()
    for line in (
        f"Version: {__version__}",
        "Requires-Python: >=3.10",
        "License-Expression: MIT",
        "License-File: LICENSE",
    ):
        assert f"\n{line}\n" in text
    assert one.members[f"{one.metadata}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert b"vmette = vmette.__main__:main\n" in one.members[f"{one.metadata}/entry_points.txt"]


# --- What is in it


def test_the_contents(one: Wheel) -> None:
    arch = ARCHITECTURES[one.kind]
    package = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "*.pyi", "py.typed", "*.entitlements")
        for path in (ROOT / "vmette").rglob(pattern)
    }
    guest = {f"vmette/_payload/{arch}/{name}" for name in (KERNELS[arch], *FILES)} | {"vmette/_payload/NOTICE"}
    names = [name for name in one.members if not name.startswith(one.metadata)]
    assert names == sorted(package | guest | set(NATIVE[one.kind]))
    assert list(one.members)[-1] == f"{one.metadata}/RECORD"
    for name in package:
        assert one.members[name] == (ROOT / name).read_bytes()
    assert one.members[f"vmette/_payload/{arch}/vsock-send"] == f"vsock-send for {arch}\n".encode()


def test_modes_and_times(one: Wheel) -> None:
    with zipfile.ZipFile(one.path) as archive:
        assert archive.testzip() is None
        for member in archive.infolist():
            mode = 0o100755 if member.filename.endswith("/vmette-vz") else 0o100644
            assert (member.external_attr >> 16, member.date_time) == (mode, (1980, 1, 1, 0, 0, 0)), member.filename


def test_no_path_of_the_building_machine(one: Wheel, payload: Path) -> None:
    places = {
        str(path) for path in (ROOT, Path.home(), Path(sys.prefix), Path(sys.base_prefix), one.path.parent, payload)
    }
    assert len(places) >= 4
    for name, data in one.members.items():
        if not name.endswith(".py"):
            for place in places - {"/", "/usr"}:  # which are the system's, as the target knows it too
                assert place.encode() not in data, f"{place} in {name}"


@pytest.mark.parametrize("kind", WHEELS)
def test_the_same_bytes_wherever_and_whenever(kind: str, built: dict[str, Wheel], tmp_path: Path) -> None:
    elsewhere = tmp_path / "another" / "place"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_payload", "fuzz", "vm")
    for name in ("vmette", "tools", "csrc"):
        shutil.copytree(ROOT / name, elsewhere / name, ignore=ignored, copy_function=shutil.copyfile)
    for name in wheel.PROJECT:
        shutil.copyfile(ROOT / name, elsewhere / name)
    call = "build_macos(" if kind == "macos" else f"build_linux({kind!r}, "
    script = (
        f"import os; os.umask(0o077); from pathlib import Path; from tools import wheel; wheel.{call}*map(Path, {{}}))"
    )
    places = [str(fill(tmp_path / "payload")), str(tmp_path / "output")]
    environment = {**os.environ, "TZ": "Asia/Kathmandu", "ZIG_LOCAL_CACHE_DIR": str(tmp_path / "cache")}
    environment.pop("SOURCE_DATE_EPOCH", None)
    subprocess.run([sys.executable, "-c", script.format(places)], cwd=elsewhere, env=environment, check=True)
    (again,) = (tmp_path / "output").iterdir()
    assert again.name == built[kind].path.name
    assert again.read_bytes() == built[kind].path.read_bytes()


def test_the_time_can_be_given(payload: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    with zipfile.ZipFile(build("x86_64", payload, tmp_path)) as archive:
        assert {member.date_time for member in archive.infolist()} == {(2023, 11, 14, 22, 13, 20)}


def test_a_payload_that_is_not_whole(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with pytest.raises(BuildError, match="the payload is missing"):
        build("macos", tmp_path / "none", output)
    payload = fill(tmp_path / "payload")
    (payload / "aarch64" / "Image").unlink()
    with pytest.raises(BuildError, match="has no Image"):
        build("macos", payload, output)
    assert list(output.iterdir()) == []


# --- Native code


def machos(built: dict[str, Wheel]) -> Iterator[tuple[str, bytes]]:
    yield from ((name, built["macos"].members[name]) for name in NATIVE["macos"])


def test_everything_for_macos_is_signed(built: dict[str, Wheel]) -> None:
    for name, data in machos(built):
        signature = verify(data)
        assert (signature.identifier, signature.flags) == (name.rpartition("/")[2], 0x2)
        wanted = {"com.apple.security.virtualization": True} if name.endswith("/vmette-vz") else None
        assert signature.entitlements == signature.der_entitlements == wanted
    program = verify(built["macos"].members["vmette/_payload/macos/vmette-vz"])
    assert program.blobs[5][8:] == built["macos"].members["vmette/vmm/vmette-vz.entitlements"]


def test_what_macos_loads(built: dict[str, Wheel]) -> None:
    for name, data in machos(built):
        fat = lief.MachO.parse(list(data))
        assert fat is not None
        assert fat.size == 1
        binary = fat.at(0)
        assert binary is not None
        program = name.endswith("/vmette-vz")
        assert binary.header.file_type.name in (("EXECUTE",) if program else ("DYLIB", "BUNDLE"))
        version = binary.build_version
        assert version is not None
        assert (version.platform.name, list(version.minos[:2])) == ("MACOS", [13, 0])
        assert not binary.has_rpath
        own: list[str] = []
        needed: list[str] = []
        for library in binary.libraries:
            (own if library.command.name == "ID_DYLIB" else needed).append(str(library.name))
        assert own in ([], [f"@rpath/{name.rpartition('/')[2]}"])
        assert "/usr/lib/libSystem.B.dylib" in needed
        for path in needed:
            assert path.startswith(("/usr/lib/", "/System/Library/Frameworks/"))
        assert binary.is_pie or not program


@pytest.mark.parametrize("kind", ["x86_64", "aarch64"])
def test_the_tag_for_linux_says_what_it_needs(kind: str, built: dict[str, Wheel]) -> None:
    command = [sys.executable, "-m", "auditwheel", "show", str(built[kind].path)]
    shown = " ".join(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert f'is consistent with the following platform tag: "{PLATFORMS[kind]}"' in shown


def test_the_limited_abi_is_kept_to(one: Wheel) -> None:
    command = [sys.executable, "-m", "abi3audit", "--strict", "--report", str(one.path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count('"is_abi3": true') == sum(name.endswith(".abi3.so") for name in NATIVE[one.kind])


def test_it_installs_and_runs_here(built: dict[str, Wheel], tmp_path: Path) -> None:
    wheel_here = built[os.uname().machine]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    subprocess.run([*pip, "--no-deps", "--no-index", "--target", tmp_path, wheel_here.path], check=True)
    code = "import vmette, vmette._native as n; print(n.__file__, n.lib.vmette_tsc_khz() > 0, vmette.__version__)"
    here = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=here, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == f"{tmp_path / 'vmette' / '_native.abi3.so'} True {__version__}\n"

"""csrc/vz_shim.m as far as one can tell without a Mac: it compiles and links, and the names in it are Apple's."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import cffi
import lief
import pytest
import ziglang

from tools import macos_sdk

ROOT = Path(__file__).parents[2]
HEADER = ROOT / "csrc/vz_shim.h"
SHIM = ROOT / "csrc/vz_shim.m"
FRAMEWORKS = ("Virtualization", "Foundation")
"""Those whose names are Objective-C's."""

PYOBJC = {"pyobjc-framework-Virtualization": "Virtualization", "pyobjc-framework-Cocoa": "Foundation"}
"""PyPI's packages that describe them, and the package within."""

BY_HAND = {
    "VZVirtualMachineConfiguration.h": (
        *("CPUCount", "memorySize", "bootLoader", "platform", "serialPorts", "consoleDevices", "storageDevices"),
        *("directorySharingDevices", "networkDevices", "socketDevices", "entropyDevices", "memoryBalloonDevices"),
        *("maximumAllowedCPUCount", "maximumAllowedMemorySize", "minimumAllowedCPUCount", "minimumAllowedMemorySize"),
    ),
    "VZVirtualMachine.h": ("state", "delegate", "socketDevices", "VZVirtualMachineDelegate"),
    "VZLinuxBootLoader.h": ("commandLine", "initialRamdiskURL"),
    "VZGenericMachineIdentifier.h": ("dataRepresentation",),
    "VZGenericPlatformConfiguration.h": ("machineIdentifier",),
    "VZSerialPortConfiguration.h, VZConsolePortConfiguration.h, VZNetworkDeviceConfiguration.h": ("attachment",),
    "VZVirtioConsoleDeviceConfiguration.h": ("ports",),
    "VZVirtioConsolePortConfigurationArray.h": ("objectAtIndexedSubscript:", "setObject:atIndexedSubscript:"),
    "VZVirtioFileSystemDeviceConfiguration.h": ("share",),
    "VZLinuxRosettaDirectoryShare.h": ("availability",),
    "VZNetworkDeviceConfiguration.h": ("MACAddress",),
    "VZMACAddress.h": ("randomLocallyAdministeredAddress",),
    "VZVirtioSocketConnection.h": ("fileDescriptor",),
    "VZVirtioSocketListener.h": ("VZVirtioSocketListener", "VZVirtioSocketListenerDelegate", "delegate"),
    "VZVirtioSocketDevice.h": ("setSocketListener:forPort:", "removeSocketListenerForPort:"),
    "NSString.h": ("NSConstantString", "stringWithString:"),
    "NSArray.h": ("addObject:", "firstObject"),
    "NSDictionary.h": (
        *("allKeys", "dictionary", "objectForKeyedSubscript:", "removeAllObjects", "removeObjectForKey:"),
        "setObject:forKeyedSubscript:",
    ),
    "NSError.h": (
        *("code", "domain", "localizedDescription", "localizedFailureReason", "userInfo"),
        "errorWithDomain:code:userInfo:",
    ),
    "NSProcessInfo.h": ("processInfo",),
    "NSValue.h": ("numberWithUnsignedInt:", "unsignedIntValue"),
}
"""What PyObjC has no need to describe, because it can ask the system about it, and the header that declares it."""


# --- The names


@dataclass
class Names:
    """What a stub header declares."""

    types: set[str] = field(default_factory=set)
    selectors: set[str] = field(default_factory=set)
    """Of methods and of properties."""
    constants: set[str] = field(default_factory=set)

    @property
    def all(self) -> set[str]:
        return self.types | self.selectors | self.constants


def declared(text: str) -> Names:
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    names = Names(types=set(re.findall(r"@(?:interface|protocol) (\w+)", text)))
    for attributes, declaration in re.findall(r"@property(?:\(([^)]*)\))?\s+([^;]*);", text):
        listed = re.sub(r"\s*SINCE_14$", "", declaration)
        names.selectors |= set(re.findall(r"\w+", re.split(r"[ *>](?=\w+(?:, \w+)*$)", listed, maxsplit=1)[-1]))
        names.selectors |= set(re.findall(r"getter=(\w+)", attributes))
    for method in re.findall(r"^[-+] \([^;]*;", text, re.MULTILINE):
        plain = re.sub(r"__attribute__\(\(.*\)\)", "", method)
        while (less := re.sub(r"\([^()]*\)", "", plain)) != plain:
            plain = less
        pieces = re.findall(r"\w+:", plain)
        names.selectors.add("".join(pieces) or re.findall(r"\w+", plain)[0])
    for body in re.findall(r"NS_ENUM\([^)]*\)\{([^}]*)\}", text):
        names.constants |= set(re.findall(r"\bVZ\w+", body))
    return names


def stub(framework: str) -> str:
    return (macos_sdk.STUBS / f"{framework}.framework/Headers/{framework}.h").read_text()


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """All that PyObjC says of the frameworks: names of classes and constants, and selectors."""
    directory = tmp_path_factory.mktemp("pyobjc")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    where = ["--only-binary", ":all:", "--python-version", "3.12", "--implementation", "cp", "--dest", str(directory)]
    where += [word for minor in range(9, 16) for word in ("--platform", f"macosx_10_{minor}_universal2")]
    subprocess.run([*pip, *where, *PYOBJC], check=True)
    found = set()
    for wheel in directory.iterdir():
        with zipfile.ZipFile(wheel) as archive:
            for package in PYOBJC.values():
                if f"{package}/_metadata.py" in archive.namelist():
                    found |= set(re.findall(r"[\w:]+", archive.read(f"{package}/_metadata.py").decode()))
    return found | {name.rstrip(":") for name in found if name.count(":") == 1}


def unknown(names: Names, metadata: set[str]) -> set[str]:
    return names.all - metadata - {name for listed in BY_HAND.values() for name in listed}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_every_name_is_apples(framework: str, metadata: set[str]) -> None:
    names = declared(stub(framework))
    assert len(names.all) > 40
    assert unknown(names, metadata) == set()


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("saveMachineStateToURL:", "saveMachineStateToUrl:"),
        ("VZLinuxBootLoader :", "VZLinuxBootloader :"),
        ("VZDiskImageCachingModeCached", "VZDiskImageCachingModeCache"),
        ("minimumAllowedMemorySize", "minimalAllowedMemorySize"),
        ("getter=isSupported", "getter=supports"),
        ("isConsole", "console"),
    ],
)
def test_a_misspelt_name_is_found(right: str, wrong: str, metadata: set[str]) -> None:
    text = stub("Virtualization")
    assert right in text
    assert unknown(declared(text.replace(right, wrong)), metadata)


def test_what_is_listed_by_hand_is_used() -> None:
    used = set.union(*[declared(stub(framework)).all for framework in FRAMEWORKS])
    assert {name for listed in BY_HAND.values() for name in listed} <= used


def test_what_macos_14_brought_says_so() -> None:
    """A property or method that the 11.3 SDK does not have is guarded, if it is newer than 13: these two are all."""
    guarded = re.findall(r"(\w+):?[^;\n]*\bSINCE_14[;,]", stub("Virtualization"))
    assert {"VZVirtualMachineStateSaving", "VZVirtualMachineStateRestoring"} <= set(guarded)
    assert len(guarded) == 5


# --- What the compiler says


def compiled(source: Path, output: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [*macos_sdk.compiler(), *flags, str(source), "-o", str(output)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_it_compiles_without_a_warning(tmp_path: Path) -> None:
    done = compiled(SHIM, tmp_path / "shim.o", "-c")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("if (@available(macOS 14.0, *)) {", "if (true) {", "only available on macOS 14.0 or newer"),
        ("setSocketListener:", "setListener:", "no visible @interface"),
        ("port.isConsole = NO;", "port.isConsole = NO; int unused;", "unused variable"),
    ],
)
def test_the_compiler_would_have_said_so(right: str, wrong: str, complaint: str, tmp_path: Path) -> None:
    text = SHIM.read_text()
    assert right in text
    (tmp_path / "shim.m").write_text(text.replace(right, wrong))
    done = compiled(tmp_path / "shim.m", tmp_path / "shim.o", "-c")
    assert done.returncode != 0
    assert complaint in done.stderr


def test_the_program_is_plain_c_for_both_systems(tmp_path: Path) -> None:
    command = ["gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-pedantic", "-fsyntax-only"]
    subprocess.run([*command, "-I", str(ROOT / "csrc"), str(ROOT / "csrc/vmm_main.c")], check=True)
    done = compiled(ROOT / "csrc/vmm_main.c", tmp_path / "main.o", "-c")
    assert (done.returncode, done.stderr) == (0, "")


# --- What the linker makes of it


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> lief.MachO.Binary:
    output = tmp_path_factory.mktemp("shim") / "libshim.dylib"
    name = "-Wl,-install_name,@rpath/libshim.dylib"
    done = compiled(SHIM, output, "-shared", name, *macos_sdk.linker())
    assert (done.returncode, done.stderr) == (0, "")
    return parsed(output)


def parsed(path: Path) -> lief.MachO.Binary:
    fat = lief.MachO.parse(str(path))
    assert fat is not None
    binary = fat.at(0)
    assert binary is not None
    return binary


def exports() -> Iterator[tuple[str, str]]:
    """What the linker was told of: the library's install name, and a symbol of it."""
    system = Path(ziglang.__file__).parent / "lib/libc/darwin/libSystem.tbd"
    for path in [*macos_sdk.STUBS.rglob("*.tbd"), system]:
        install = ""
        section = ""
        for line in path.read_text().splitlines():
            if match := re.match(r"install-name:\s+'?([^']+)'?$", line):
                install = match[1]
            if match := re.match(r"\s*(?:- )?(\w[\w-]*):", line):
                section = match[1]
            names = re.findall(r"'?([_$A-Za-z][\w.$]*)'?(?=,| \]|$)", line.partition(":")[2] if match else line)
            for name in names:
                if section in {"symbols", "weak-symbols"}:
                    yield install, name
                elif section == "objc-classes":
                    yield install, f"_OBJC_CLASS_$_{name}"
                    yield install, f"_OBJC_METACLASS_$_{name}"


def test_every_symbol_that_it_wants_is_somewhere(library: lief.MachO.Binary) -> None:
    there: dict[str, set[str]] = {}
    for install, name in exports():
        there.setdefault(name, set()).add(install)
    wanted = [str(symbol.name) for symbol in library.imported_symbols]
    assert len(wanted) > 50
    # dyld binds this one itself.
    assert [name for name in wanted if name not in there and name != "dyld_stub_binder"] == []


def test_it_names_the_libraries_of_a_mac(library: lief.MachO.Binary) -> None:
    names = {str(each.name) for each in library.libraries if each.command.name != "ID_DYLIB"}
    assert names == {
        "/System/Library/Frameworks/CoreFoundation.framework/Versions/A/CoreFoundation",
        "/System/Library/Frameworks/Foundation.framework/Versions/C/Foundation",
        "/System/Library/Frameworks/Security.framework/Versions/A/Security",
        "/System/Library/Frameworks/Virtualization.framework/Versions/A/Virtualization",
        "/usr/lib/libSystem.B.dylib",
        "/usr/lib/libobjc.A.dylib",
    }
    version = library.build_version
    assert version is not None
    assert (version.platform.name, list(version.minos[:2])) == ("MACOS", [13, 0])
    assert not library.has_rpath


def functions() -> set[str]:
    """What vz_shim.h declares."""
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    return set(re.findall(r"^[\w \*]*?\b(vz_\w+)\([^*]", text, re.MULTILINE))


def test_it_exports_the_c_api_and_nothing_else(library: lief.MachO.Binary) -> None:
    assert len(functions()) == 17
    linkers_own = {"___dso_handle", "__mh_dylib_header"}
    exported = {str(symbol.name) for symbol in library.exported_symbols}
    assert exported - linkers_own == {f"_{name}" for name in functions()}


# --- The module over it


def test_the_module_knows_every_function() -> None:
    ffi = runpy.run_path(str(ROOT / "csrc/vz_build.py"))["ffi"]
    known = set(re.findall(r"\b(vz_\w+)\(", "".join(ffi._cdefsources)))
    assert functions() <= known


def test_the_module_over_the_stand_in(tmp_path: Path) -> None:
    """cffi's own check that the structures are as the header has them, and a machine from within this process."""
    build = cffi.FFI()
    build.cdef("".join(runpy.run_path(str(ROOT / "csrc/vz_build.py"))["ffi"]._cdefsources))
    sources = ["tests/fake_vz/fake_vz.c", "csrc/spawn.c", "csrc/tsc.c"]
    build.set_source(
        "_vz",
        '#include "vz_shim.h"\n',
        sources=[str(ROOT / name) for name in sources],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=["-pthread"],
        py_limited_api=True,
    )
    build.compile(tmpdir=str(tmp_path))
    shutil.copy(ROOT / "tests/macos/in_process.py", tmp_path)
    done = subprocess.run(
        [sys.executable, "in_process.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "said something\nstopped\n"), done.stderr

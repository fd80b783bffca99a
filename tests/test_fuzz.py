"""The parsers of what guest and host send each other, and of archives, fuzzed with the guidance of coverage.

The targets are in tests/fuzz: in C for libFuzzer, under the sanitizers, and in Python for atheris. Here each makes a
number of runs that is always the same, as is the seed. For a long session, with a seed at random:

    VMETTE_FUZZ_RUNS=100000000 .venv/bin/pytest tests/test_fuzz.py -k 'agent and not planted'
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.fuzz import seeds

ROOT = Path(__file__).parent.parent
COMPILE = ("clang", "-std=gnu11", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-Icsrc/guest", "-Itests/fuzz")
SANITIZE = ("-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all")
PLANTED = "FUZZ_SELF_TEST"
UNIT_SECONDS = 60
"""One input that takes longer than this is a hang."""
MEMORY_MIB = 1024
SEARCH = 10
"""How many times as many runs a planted fault may take, which is found long before. But no two searches are quite the
same: a fuzzer learns from what is compared, addresses among it."""

RUNS = os.environ.get("VMETTE_FUZZ_RUNS")
pytestmark = pytest.mark.timeout(0 if RUNS else 300)


@dataclass(frozen=True)
class Target:
    """A target and how much of it is enough for every day: some seconds."""

    name: str
    runs: int
    longest: int = 4096
    """Bytes of an input."""


@dataclass(frozen=True)
class Native(Target):
    """A target in C."""

    sources: tuple[str, ...] = ()
    """Of the guest."""
    wrapped: str = ""
    """Calls that are the target's own."""

    def build(self, directory: Path, *, planted: bool) -> Path:
        program = directory / f"fuzz_{self.name}"
        own = [f"tests/fuzz/fuzz_{self.name}.c", "tests/fuzz/script.c", *["tests/fuzz/mutator.c"] * bool(self.wrapped)]
        guest = [f"csrc/guest/{name}.c" for name in self.sources]
        wrap = [f"-Wl,--wrap={name}" for name in self.wrapped.split()]
        define = [f"-D{PLANTED}"] * planted
        subprocess.run([*COMPILE, *SANITIZE, *define, *wrap, *own, *guest, "-o", program], cwd=ROOT, check=True)
        return program


NATIVE = (
    Native(
        "agent",
        40_000,
        sources=("agent", "command", "accounts", "address", "cgroup", "resume", "wire"),
        wrapped="start_child start_spare order_spare wait4 kill read write poll close open mkdirat unlinkat syscall "
        "fcntl ioctl tcgetattr signalfd setns setrlimit socket connect bind listen accept4 getsockopt setsockopt "
        "shutdown",
    ),
    Native(
        "untar",
        150_000,
        16384,
        sources=("tar", "function", "beneath", "wire"),
        wrapped="read write open openat mkdir mkdirat close fstat fstatat fchmod fchown fchownat utimensat futimens "
        "fsetxattr linkat symlinkat mknodat renameat unlinkat getrandom syscall fcntl _exit tar_checksum",
    ),
    Native("records", 1_000_000, sources=("command", "accounts", "address", "wire")),
    Native("dhcp", 1_000_000, sources=("dhcp",)),
)
PYTHON = (Target("protocol", 80_000), Target("archive", 25_000, 16384), Target("proxy", 40_000), Target("wire", 30_000))


@dataclass(frozen=True)
class Finding:
    """How a fuzzer ended."""

    status: int
    output: str
    reproducer: bytes | None

    def __str__(self) -> str:
        report = self.output[-8000:]
        return f"{report}\nThe input, in hex: {self.reproducer.hex()}" if self.reproducer is not None else report


def fuzz(target: Target, command: list[str | Path], directory: Path, *, planted: bool) -> Finding:
    """Runs a target from its seeds."""
    corpus, good = directory / "corpus", directory / "seeds"
    for each in (corpus, good):
        each.mkdir()
    for index, seed in enumerate(getattr(seeds, target.name)()):
        (good / str(index)).write_bytes(seed)
    words = directory / "words"
    words.write_text("".join(f'"{escaped(word)}"\n' for word in seeds.WORDS[target.name]))
    options = {
        "runs": RUNS or target.runs * (SEARCH if planted else 1),
        "seed": 0 if RUNS else 1,
        "max_len": target.longest,
        "timeout": UNIT_SECONDS,
        "rss_limit_mb": MEMORY_MIB,
        "artifact_prefix": f"{directory}/found-",
        "dict": words,
    }
    done = subprocess.run(
        [*command, *(f"-{name}={value}" for name, value in options.items()), corpus, good],
        cwd=ROOT,
        env={**os.environ, **({PLANTED: "1"} if planted else {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    found = next(directory.glob("found-*"), None)
    return Finding(done.returncode, done.stdout.decode(errors="replace"), found.read_bytes() if found else None)


def escaped(word: bytes) -> str:
    """As a dictionary of libFuzzer's has it."""
    return "".join(f"\\x{byte:02x}" for byte in word)


def fuzz_native(target: Native, directory: Path, *, planted: bool = False) -> Finding:
    return fuzz(target, [target.build(directory, planted=planted)], directory, planted=planted)


def fuzz_python(target: Target, directory: Path, *, planted: bool = False) -> Finding:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("there is no wheel of atheris for this Python or processor")
    command: list[str | Path] = [sys.executable, "-m", f"tests.fuzz.fuzz_{target.name}"]
    return fuzz(target, command, directory, planted=planted)


CASES = [pytest.param(partial(fuzz_native, target), target, id=f"c-{target.name}") for target in NATIVE] + [
    pytest.param(partial(fuzz_python, target), target, id=f"python-{target.name}") for target in PYTHON
]


@pytest.mark.parametrize(("run", "target"), CASES)
def test_nothing_is_found(run: partial[Finding], target: Target, tmp_path: Path) -> None:
    finding = run(tmp_path)
    assert finding.status == 0, str(finding)
    assert finding.reproducer is None, str(finding)
    assert f"Done {RUNS or target.runs} runs" in finding.output, str(finding)


@pytest.mark.parametrize(("run", "target"), CASES)
def test_a_planted_fault_is_found(run: partial[Finding], target: Target, tmp_path: Path) -> None:
    finding = run(tmp_path, planted=True)
    assert finding.status != 0, str(finding)
    assert finding.reproducer is not None, str(finding)
    assert finding.reproducer.hex() in str(finding)
    assert finding.reproducer not in getattr(seeds, target.name)(), "it was found without a search"
    sanitizer = "heap-buffer-overflow" if isinstance(target, Native) else "Uncaught Python exception"
    assert sanitizer in finding.output, str(finding)

"""The tests of the native code once more, with the code built so that it notices its own memory errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
TESTS = Path(__file__).resolve().parent
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g")

# Python imports this by itself, in the subprocesses of the tests too.
SITECUSTOMIZE = """
import importlib.abc, importlib.util, sys

SANITIZED = {path!r}

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "vmette._native":
            return importlib.util.spec_from_file_location(name, SANITIZED)

sys.meta_path.insert(0, Finder())
"""

PLUGIN = """
import sys
from sitecustomize import SANITIZED

def pytest_sessionfinish(session):
    assert sys.modules["vmette._native"].__file__ == SANITIZED
    print("tested", SANITIZED)
"""

FAULTS = """
import cffi
ffi = cffi.FFI()
ffi.cdef("int past_the_end(int n); int too_large(int n);")
ffi.set_source("faults", '''
    #include <stdlib.h>
    int past_the_end(int n) { char *p = malloc(n); int got = p[n]; free(p); return got; }
    int too_large(int n) { return n + 2147483647; }
''')
ffi.compile()
"""


def gcc_library(name: str) -> str:
    found = subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = Path(found.stdout.strip())
    assert path.is_absolute(), f"gcc has no {name}"
    return str(path)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for PYTHONPATH in which `vmette._native` is the sanitized one."""
    directory = tmp_path_factory.mktemp("sanitized")
    # setuptools takes these for compiling and for linking.
    environment = {**os.environ, "CFLAGS": " ".join(SANITIZE)}
    where = ("--build-lib", str(directory / "lib"), "--build-temp", str(directory / "temp"))
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "build_ext", *where]
    subprocess.run(command, cwd=REPOSITORY, env=environment, check=True)
    (native,) = (directory / "lib/vmette").iterdir()
    (directory / "sitecustomize.py").write_text(SITECUSTOMIZE.format(path=str(native)))
    (directory / "sanitized_only.py").write_text(PLUGIN)
    subprocess.run([sys.executable, "-c", FAULTS], cwd=directory, env=environment, check=True)
    return directory


def run_pytest(build: Path, *arguments: str | Path) -> tuple[int, str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(build),
        "PYTHONMALLOC": "malloc",  # else a small overflow stays within one of Python's own arenas
        "LD_PRELOAD": f"{gcc_library('libasan.so')} {gcc_library('libubsan.so')}",
        # The leaks are Python's own. A large quarantine makes every fork slow.
        "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "sanitized_only", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    return done.returncode, done.stdout.decode(errors="replace")


@pytest.mark.parametrize("name", ["test_tree.py", "test_spawn.py"])
def test_no_sanitizer_complains(build: Path, name: str) -> None:
    status, output = run_pytest(build, TESTS / name)
    assert status == 0, output
    assert f"tested {build}" in output
    assert "AddressSanitizer" not in output
    assert "runtime error" not in output


@pytest.mark.parametrize(
    ("fault", "complaint"), [("past_the_end", "heap-buffer-overflow"), ("too_large", "signed integer overflow")]
)
def test_a_sanitizer_that_complains_is_heard(build: Path, tmp_path: Path, fault: str, complaint: str) -> None:
    test = tmp_path / "test_fault.py"
    test.write_text(f"import vmette._native\nfrom faults import lib\n\ndef test_it():\n    lib.{fault}(8)\n")
    status, output = run_pytest(build, test, "-c", os.devnull, "--rootdir", tmp_path)
    assert status != 0
    assert complaint in output

"""What importing vmette costs: a command line that starts a VM in milliseconds must not spend them on imports."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import vmette

NATIVE = {"cffi", "_cffi_backend", "vmette._native"}
NETWORK = {"requests", "urllib3", "ssl", "http.client"}
HEAVY = NATIVE | NETWORK | {"xattr", "asyncio", "multiprocessing"}


def python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd="/", stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def modules_after(code: str) -> set[str]:
    """What is imported by `code` that Python itself does not import."""
    show = (
        "import sys; before = set(sys.modules); {}; after = set(sys.modules); import json; print(json.dumps([*after]))"
    )
    return set(json.loads(python("-c", show.format(code)))) - set(json.loads(python("-c", show.format("pass"))))


def test_importing_vmette_imports_next_to_nothing() -> None:
    imported = modules_after("import vmette")
    assert {name for name in imported if name.partition(".")[0] == "vmette"} == {"vmette", "vmette._version"}
    assert not imported & (HEAVY | {"click", "subprocess", "logging", "dataclasses"})


@pytest.mark.parametrize("module", ["vmette.cli", "vmette.errors", "vmette.providers", "vmette.config"])
def test_modules_that_do_not_import_what_they_do_not_need_yet(module: str) -> None:
    assert not modules_after(f"import {module}") & HEAVY


def test_the_library_does_not_import_the_command_line() -> None:
    imported = modules_after("import vmette.api, vmette.providers.registry, vmette.vmm.qemu")
    assert not imported & (NETWORK | {"click", "vmette.cli", "xattr", "asyncio"})


def test_the_help_needs_no_native_code() -> None:
    code = "import vmette.cli; vmette.cli.main(['--help']) and 0"
    show = f"import sys; {code}; print(); import json; print(json.dumps([*sys.modules]))"
    assert not set(json.loads(python("-c", show).splitlines()[-1])) & HEAVY


@pytest.mark.parametrize("name", vmette.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert python("-c", f"import vmette; print(vmette.{name} is vmette.{name})") == "True\n"
    assert getattr(vmette, name) is not None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("early", [False, True], ids=["in its command", "while it reads its modules"])
def test_a_signal_in_a_finalizer_ends_the_program(number: signal.Signals, *, early: bool) -> None:
    """Python prints what is raised there, and goes on: that includes what a signal's handler raises."""
    place = "vmette.headstart.begin" if early else "vmette.cli.group.main"
    code = f"""
import os, sys, time, vmette.__main__, vmette.cli

class Last:
    def __del__(self):
        os.kill(os.getpid(), {number:d})
        while True:  # a handler that is slow to come finds us here
            time.sleep(0.01)

def interrupted(*args, **kwargs):
    Last()
    time.sleep(60)

{place} = interrupted
sys.exit(vmette.__main__.main())
"""
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, check=False, timeout=50)
    died = early and number != signal.SIGINT  # nothing stands in the way of the others yet
    assert (done.returncode, done.stderr) == (-number if died else 128 + number, b"")


def test_what_else_is_raised_in_a_finalizer_is_told() -> None:
    code = """
import sys, vmette.__main__

class Last:
    def __del__(self):
        raise ValueError("from here")

vmette.headstart.begin = lambda words: Last() and None
sys.argv = ["vmette", "--version"]
sys.exit(vmette.__main__.main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, text=True)
    assert done.returncode == 0
    assert "ValueError: from here" in done.stderr


def test_public_names_are_listed() -> None:
    assert dir(vmette) == sorted(vmette.__all__)
    assert len(set(vmette.__all__)) == len(vmette.__all__)
    fresh = python("-c", "import vmette; print(dir(vmette))")
    assert fresh == f"{sorted(vmette.__all__)}\n"


def test_star_import() -> None:
    names = python("-c", "from vmette import *; print(*sorted(n for n in dir() if n[:2] != '__'))").split()
    assert names == sorted(name for name in vmette.__all__ if not name.startswith("__"))


@pytest.mark.parametrize("name", ["nothing", "Run", "_private", "__wrapped__", "import_module"])
def test_an_unknown_name_is_an_attribute_error(name: str) -> None:
    with pytest.raises(AttributeError) as caught:
        getattr(vmette, name)
    assert str(caught.value) == f"module 'vmette' has no attribute '{name}'"
    assert not hasattr(vmette, name)


def test_errors_are_their_modules() -> None:
    import vmette.errors

    for name in vmette.errors.__all__:
        assert getattr(vmette, name) is getattr(vmette.errors, name)


@pytest.mark.parametrize("start", [["-m", "vmette"], [str(Path(sys.executable).parent / "vmette")]])
def test_version(start: list[str]) -> None:
    assert python(*start, "--version").split()[-1] == vmette.__version__

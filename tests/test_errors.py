"""The exceptions of vmette, as a whole."""

from __future__ import annotations

import copy
import inspect
import pickle
import pkgutil
from importlib import import_module

import pytest

import vmette
from vmette.errors import VmetteError
from vmette.providers import Cancelled, InvalidSpec, OfflineCacheMiss, ProviderError

ARGUMENTS: dict[str, object] = {
    "message": "what is wrong",
    "exit_code": 127,
    "console": ("last", "words"),
    "returncode": -9,
    "cmd": ["ls", "-l"],
    "timeout": 1.5,
    "output": b"\xff out",
    "stderr": "err",
    "spec": "alpine:3.20",
    "number": 39,
    "text": "Directory not empty",
    "filename": "/tmp/directory",
    "domain": "VZErrorDomain",
    "code": 6,
    "error": FileNotFoundError(2, "No such file or directory", "layer"),
}
"""What exceptions are made from, by the parameter's name."""


def every_kind() -> list[type[VmetteError]]:
    for module in pkgutil.walk_packages(vmette.__path__, "vmette."):
        if module.name.rpartition(".")[2] not in {"__main__", "_native", "_vz"}:
            import_module(module.name)
    kinds = [VmetteError]
    for kind in kinds:
        kinds.extend(found for found in kind.__subclasses__() if found not in kinds)
    return [kind for kind in kinds if kind.__module__.startswith("vmette.")]


def made(kind: type[VmetteError]) -> VmetteError:
    if kind.__init__ is Exception.__init__:
        return kind("what is wrong")
    names = [*inspect.signature(kind).parameters]
    return kind(*(ARGUMENTS[name] for name in names))


@pytest.mark.parametrize("kind", every_kind(), ids=lambda kind: kind.__name__)
def test_every_error_can_be_pickled_and_copied(kind: type[VmetteError]) -> None:
    error = made(kind)
    error.noted = "by someone"  # type: ignore[attr-defined]
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is kind
        assert again is not error
        assert (str(again), repr(again), again.args) == (str(error), repr(error), error.args)
        assert vars(again) == vars(error)
        assert again.exit_code == error.exit_code


def test_there_are_all_kinds() -> None:
    assert {ProviderError, InvalidSpec, OfflineCacheMiss, Cancelled} < {*every_kind()}
    assert {getattr(vmette.errors, name) for name in vmette.errors.__all__} < {*every_kind()}

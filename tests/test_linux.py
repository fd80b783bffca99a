"""The guest's error numbers on hosts that have others."""

from __future__ import annotations

import errno
import os

import pytest

from vmette.linux import ERRNO, errno_of, strerror

SAME = {"ENOTSUP": "EOPNOTSUPP", "EDEADLOCK": "EDEADLK"}


def test_the_names_are_those_of_the_numbers() -> None:
    assert {number: SAME.get(name := errno.errorcode[number], name) for number in ERRNO} == ERRNO


def test_here_they_are_the_systems_own() -> None:
    assert [strerror(number) for number in (2, 40, 133)] == [os.strerror(number) for number in (2, 40, 133)]


def test_elsewhere_the_name_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("errno.ELOOP", 62)  # as macOS has it
    monkeypatch.setattr("os.strerror", "text {}".format)
    assert strerror(2) == "text 2"
    assert strerror(40) == "text 62"
    assert strerror(133) == "error 133 of Linux"


def test_the_hosts_errors_get_linuxs_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [errno_of(number) for number in (errno.EPERM, errno.ESTALE, None)] == [1, 116, 5]
    monkeypatch.setattr("sys.platform", "darwin")
    macos = {
        2: "ENOENT",
        11: "EDEADLK",
        34: "ERANGE",
        35: "EAGAIN",
        45: "ENOTSUP",
        62: "ELOOP",
        70: "ESTALE",
        93: "ENOATTR",
    }
    monkeypatch.setattr("errno.errorcode", macos | {79: "EFTYPE"})
    monkeypatch.setattr("errno.EDEADLK", 11)
    assert [errno_of(number) for number in (*macos, 79, 999)] == [2, 35, 34, 11, 95, 40, 116, 61, 5, 5]

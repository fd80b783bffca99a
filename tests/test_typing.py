"""The types of the public API, as a caller's mypy sees them: this file is for mypy, and is wrong if it says so."""

from __future__ import annotations

import ast
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

import vmette

if TYPE_CHECKING:
    from typing_extensions import assert_type

    ARGV = ["true"]

    def functions() -> None:
        assert_type(vmette.run("builtin://base", ARGV), vmette.CompletedProcess[bytes])
        assert_type(vmette.run("builtin://base", ARGV, text=True), vmette.CompletedProcess[str])
        vmette.run("builtin://base", ARGV, input="text")  # type: ignore[call-overload]
        vmette.run("builtin://base", ARGV, no_such_option=1)  # type: ignore[call-overload]

    def sandboxes(sandbox: vmette.Sandbox) -> None:
        assert_type(sandbox.run(ARGV).stdout, bytes)
        assert_type(sandbox.run(ARGV, text=True, input="text").stdout, str)
        assert_type(sandbox.popen(ARGV).lines(), Iterator[str])

    async def async_sandboxes(sandbox: vmette.AsyncSandbox) -> None:
        assert_type((await sandbox.run(ARGV)).stdout, bytes)
        assert_type((await sandbox.run(ARGV, text=True, input="text")).stdout, str)
        assert_type((await sandbox.popen(ARGV)).chunks(), AsyncIterator[tuple[int, bytes]])
        assert_type(await sandbox.files.read("/etc/passwd"), bytes)

    def executors(executor: vmette.SandboxExecutor) -> None:
        assert_type(executor.submit(ARGV), Future[vmette.CompletedProcess[bytes]])
        assert_type(executor.submit(ARGV, text=True), Future[vmette.CompletedProcess[str]])
        assert_type(executor.map([ARGV]), Iterator[vmette.CompletedProcess[bytes]])
        assert_type(executor.map([ARGV], text=True), Iterator[vmette.CompletedProcess[str]])


def test_the_package_says_that_it_is_typed() -> None:
    assert (Path(vmette.__file__).parent / "py.typed").is_file()


def test_checkers_see_every_public_name() -> None:
    """Names are fetched when they are used; a type checker reads the imports that never run."""
    tree = ast.parse(Path(vmette.__file__).read_text())
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {*vmette.__all__} <= imported

"""Sandboxes that are ready before they are asked for."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import vmette
from tests.vm.support import BASE, vmms, wait_until
from vmette import pool as module
from vmette.guest import Guest
from vmette.machine import prepare
from vmette.templates import Template


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with a template."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VMETTE_CACHE_DIR", str(cache))
        patch.delenv("VMETTE_TEMPLATES", raising=False)
        Template(prepare(BASE, {}).config).make()
    return cache


@pytest.fixture(autouse=True)
def templates(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMETTE_CACHE_DIR", str(cache))
    monkeypatch.delenv("VMETTE_TEMPLATES", raising=False)


@pytest.fixture
def pool() -> Iterator[vmette.Pool]:
    with vmette.Pool(BASE, size=2) as pool:
        yield pool


def full(pool: vmette.Pool) -> None:
    wait_until(lambda: pool.ready == pool.size, "a full pool")


def test_one_for_each_that_is_taken(pool: vmette.Pool) -> None:
    full(pool)
    before = vmms()
    assert len(before) == 2
    assert pool.run(["echo", "hi"], text=True).stdout == "hi\n"
    with pool.sandbox() as sandbox:
        assert sandbox.came_up == "woken from a template"
        assert sandbox.run(["cat"], input=b"x").stdout == b"x"
    full(pool)
    wait_until(lambda: len(vmms()) == 2, "the end of those that were used")
    assert not vmms() & before
    assert repr(pool) == "<vmette.Pool builtin://base size=2 ready=2>"


def test_the_template_is_made_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMETTE_CACHE_DIR", str(tmp_path))
    with vmette.Pool(BASE, size=1) as pool, pool.sandbox() as sandbox:
        assert sandbox.came_up == "woken from a template"


@pytest.mark.parametrize("when", ["it boots", "true runs"])
def test_a_pool_that_is_closed_does_not_wait_for_the_template(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes no further than where it is found to be closed."""
    monkeypatch.setenv("VMETTE_CACHE_DIR", str(tmp_path))
    there, closing = threading.Event(), threading.Event()
    turn = Guest.turn

    def held_up(guest: Guest, until: float | None = None) -> None:
        if when == "it boots" or guest.busy:
            there.set()
            assert closing.wait(60)
        turn(guest, until)

    monkeypatch.setattr(Guest, "turn", held_up)
    pool = vmette.Pool(BASE, size=2)
    assert there.wait(60)
    pool._shelf.closed.set()  # as close() does, which waits then
    closing.set()
    pool.close()
    assert [path.name for path in (tmp_path / "store/templates").iterdir()] == [".lock"]
    assert pool.ready == 0


def test_the_next_one_is_started_after_a_while_or_when_it_is_wanted(
    pool: vmette.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    full(pool)
    monkeypatch.setattr(module, "GIVE_WAY_SECONDS", 600.0)
    with pool.sandbox() as one, pool.sandbox() as other:
        assert one.run(["true"]).returncode == other.run(["true"]).returncode == 0
        time.sleep(0.5)
        assert len(vmms()) == 2, "the next ones have been started beside the first commands"
        with pool.sandbox(timeout=60) as wanted:
            assert wanted.run(["true"]).returncode == 0
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 60, "the end waits for what gives way"


def test_without_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    with vmette.Pool(BASE, size=1, template=False) as pool, pool.sandbox() as sandbox:
        assert sandbox.came_up == ""
        assert sandbox.run(["true"]).returncode == 0


def test_no_two_users_have_the_same(pool: vmette.Pool) -> None:
    def use(number: int) -> bool:
        with pool.sandbox() as sandbox:
            clean = sandbox.run(["ls", "/used"]).returncode != 0
            return clean and sandbox.run(["touch", "/used"]).returncode == 0

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(use, range(8)))


def test_the_warm_up_has_been_run() -> None:
    with vmette.Pool(BASE, size=1, warm_up=["sh", "-c", "echo warm >/tmp/warm"]) as pool:
        assert pool.run(["cat", "/tmp/warm"], text=True).stdout == "warm\n"
    for warm_up in (["no-such-program"], ["false"], None):
        with vmette.Pool(BASE, size=1, warm_up=warm_up) as pool:
            assert pool.run(["echo", "fine"], text=True).stdout == "fine\n"


def test_one_that_is_given_back(pool: vmette.Pool) -> None:
    full(pool)
    with pool.sandbox(reuse=True) as sandbox:
        sandbox.run(["touch", "/used"])
    for _ in range(5):
        with pool.sandbox(reuse=True) as sandbox:
            if sandbox.run(["ls", "/used"]).returncode == 0:
                break
    else:
        full(pool)  # it was one too many, and was ended
    wait_until(lambda: len(vmms()) <= 3, "no more than there are to be")
    with pytest.raises(KeyError), pool.sandbox(reuse=True) as sandbox:
        raise KeyError
    wait_until(lambda: sandbox.closed, "the end of one whose user failed")


def test_one_that_has_died_is_not_handed_out(pool: vmette.Pool) -> None:
    full(pool)
    for pid in vmms():
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)
    assert pool.run(["echo", "fine"], text=True).stdout == "fine\n"


@pytest.mark.only_qemu  # the process of another VMM is not what runs the guest
def test_one_that_does_not_answer_is_not_handed_out(pool: vmette.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALE_SECONDS", 0.0)
    monkeypatch.setattr(module, "ANSWER_SECONDS", 0.5)
    full(pool)
    stopped = vmms()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(module, "STALE_SECONDS", 2.0)
    time.sleep(2.0)
    assert pool.run(["echo", "fine"], text=True).stdout == "fine\n"
    wait_until(lambda: not vmms() & stopped, "the end of those that do not answer")


def test_a_wait_that_is_too_long(pool: vmette.Pool) -> None:
    with pytest.raises(TimeoutError, match="no sandbox was ready within 0 seconds"):
        while True:
            pool.acquire(0).close()


def test_what_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(vmette.ConfigError, match="a pool of 0 sandboxes"):
        vmette.Pool(BASE, 0)
    with pytest.raises(vmette.VmetteError, match="No such file"):
        vmette.Pool(str(tmp_path / "none"))
    with pytest.raises(vmette.ConfigError):
        vmette.Pool(BASE, mem_mib=1)


def test_those_that_do_not_come_up_are_told_of(tmp_path: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"\x7fELF" + bytes(4096))
    with vmette.Pool(BASE, 1, kernel=kernel) as pool:
        for _ in range(2):
            with pytest.raises(vmette.VmetteError):
                pool.acquire()


def test_its_end(pool: vmette.Pool) -> None:
    sandbox = pool.acquire()
    waiting = vmette.Pool(BASE, size=1, template=False)
    threading.Timer(0.2, waiting.close).start()
    with pytest.raises(vmette.SandboxClosed, match="the pool has been closed"):
        while True:
            waiting.acquire()
    pool.close()
    with pytest.raises(vmette.SandboxClosed):
        pool.acquire()
    assert sandbox.run(["true"]).returncode == 0
    pool.release(sandbox)
    wait_until(lambda: sandbox.closed, "the end of what is given back to none")
    pool.close()
    gc.collect()
    wait_until(lambda: not vmms(), "the end of all")


def test_only_what_is_in_use_is_given_back(pool: vmette.Pool) -> None:
    with pool.sandbox(reuse=True) as sandbox:
        pass
    with pytest.raises(ValueError, match=r"none of the pool's"):
        pool.release(sandbox)
    with vmette.Sandbox(BASE) as other, pytest.raises(ValueError, match=r"none of the pool's"):
        pool.release(other)


def test_one_that_nobody_has_any_more_ends() -> None:
    pool = vmette.Pool(BASE, size=1)
    full(pool)
    del pool
    gc.collect()
    wait_until(lambda: not vmms(), "the end of its sandboxes")


def test_an_executor_takes_from_it(pool: vmette.Pool) -> None:
    with vmette.SandboxExecutor(2, pool=pool) as executor:
        done = [each.stdout for each in executor.map([["echo", str(number)] for number in range(6)], text=True)]
    assert done == [f"{number}\n" for number in range(6)]
    full(pool)
    with pytest.raises(vmette.ConfigError, match="vcpus is settled by the pool"):
        vmette.SandboxExecutor(2, pool=pool, vcpus=2)
    with pytest.raises(KeyError), vmette.SandboxExecutor(2, pool=pool) as executor:
        executor.submit(["sleep", "1000"])
        raise KeyError

"""The entries of detached machines: names, states and locks."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from vmette.detached.client import reserved
from vmette.detached.machines import LOCK, STATE, State, check_name, machines, machines_root, new_state, open_machine
from vmette.errors import ConfigError, SandboxClosed, VmetteError


@pytest.fixture(autouse=True)
def state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VMETTE_STATE_DIR", str(tmp_path / "state"))
    return tmp_path / "state"


def create(name: str = "box", **fields: Any) -> int:
    with machines() as all_machines:
        return all_machines.create(State(name, "builtin://base", **{"created": 1.0, **fields}))


def names() -> list[str]:
    with machines() as all_machines:
        return [state.name for state in all_machines.states()]


# --- names and states


@pytest.mark.parametrize("name", ["a", "0", "box", "a.b_c-d", "x" * 63])
def test_good_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", ".", "..", ".lock", "-a", "_a", "A", "a/b", "a b", "a\n", "ä", "a\0", "x" * 64])
def test_bad_names(name: str) -> None:
    with pytest.raises(ConfigError, match="malformed"):
        check_name(name)


def test_names_that_nobody_chose_differ() -> None:
    states = [new_state(None, "x", remove=False) for _ in range(100)]
    assert len({check_name(state.name) for state in states}) == 100


def test_a_state_is_what_was_written() -> None:
    state = State("a", "b", 1.5, True, ("c", "d\udcff"), 7, 2.5, 3.5, 4, "why")
    assert State.decoded(state.encoded()) == state
    assert state.status == "ended"
    assert State("a", "b", 1.5).status == "starting"
    later = json.dumps({**json.loads(state.encoded()), "colour": "red"}).encode()
    assert State.decoded(later) == state


@pytest.mark.parametrize("data", [b"", b"{", b"null", b"[]", b"{}", b'{"name": "a"}', b'{"command": 3}', b"\xff"])
def test_what_is_no_state(data: bytes) -> None:
    with pytest.raises(ValueError):
        State.decoded(data)


# --- entries


def test_an_entry_lives_as_long_as_its_lock_is_held() -> None:
    lock = create()
    copy = os.dup(lock)  # as the supervisor has it
    os.close(lock)
    with open_machine("box") as entry:
        assert entry.alive
        state = entry.read_state()
        assert state is not None
        assert state.rootfs == "builtin://base"
        os.close(copy)
        assert not entry.alive
        entry.wait()
    assert names() == []  # its supervisor was killed: there was no word of its end
    with pytest.raises(ConfigError, match="no machine 'box'"):
        open_machine("box")


def test_an_entry_that_has_ended_stays_until_it_is_removed() -> None:
    os.close(create(ended=2.0, exit_code=3))
    assert names() == ["box"]
    with open_machine("box") as entry, machines() as all_machines:
        all_machines.remove(entry)
        all_machines.remove(entry)  # as if somebody had been faster
    assert names() == []


def test_only_the_entry_that_was_meant_is_removed() -> None:
    os.close(create(ended=2.0))
    with open_machine("box") as old:
        with machines() as all_machines:
            all_machines.remove(old)
        os.close(create(ended=3.0))
        with machines() as all_machines:
            all_machines.remove(old)
        assert names() == ["box"]


@pytest.mark.parametrize("ended", [None, 2.0])
def test_a_name_in_use(ended: float | None) -> None:
    lock = create(ended=ended)
    with pytest.raises(ConfigError, match="there is a machine 'box' already"):
        create()
    os.close(lock)


def test_the_name_of_a_stale_entry_is_free() -> None:
    os.close(create())
    os.close(create(ended=2.0))
    assert names() == ["box"]


@pytest.mark.parametrize("missing", [LOCK, STATE])
def test_remains_are_cleared_away(missing: str) -> None:
    os.close(create(ended=2.0))
    (machines_root() / "box" / missing).unlink()
    assert names() == ([] if missing == STATE else ["box"])


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (machines_root() / "Notes").mkdir()
    (machines_root() / "file").write_text("x")
    (tmp_path / "precious").mkdir()
    (machines_root() / "link").symlink_to(tmp_path / "precious")
    assert names() == []
    assert {path.name for path in machines_root().iterdir()} >= {"Notes", "file", "link"}
    assert (tmp_path / "precious").is_dir()


def test_directories_that_are_no_machines_are_left_alone() -> None:
    (machines_root() / "photos/a").mkdir(parents=True)
    (machines_root() / "empty").mkdir()  # as of one that was killed while it made an entry
    assert names() == []
    assert (machines_root() / "photos/a").is_dir()
    assert not (machines_root() / "empty").exists()
    with pytest.raises(ConfigError, match="something else"):
        create("photos")


def test_an_entry_that_is_alive_stays_whatever_its_state() -> None:
    lock = create()
    (machines_root() / "box" / STATE).write_text("{")
    assert names() == []
    with open_machine("box") as entry:
        assert entry.alive
    with pytest.raises(ConfigError, match="already"):
        create()
    os.close(lock)
    assert names() == []
    assert not (machines_root() / "box").exists()


def test_only_the_entry_of_a_lock_is_released() -> None:
    first = create(ended=2.0)
    with machines() as all_machines:
        all_machines.release("box", first)
        assert all_machines.states() == []
        second = all_machines.create(State("box", "builtin://base", 1.0))
        all_machines.release("box", first)
        assert [state.name for state in all_machines.states()] == ["box"]
        all_machines.release("box", second)
        all_machines.release("box", second)
    assert names() == []
    os.close(first)
    os.close(second)


def test_a_start_that_fails_gives_back_its_own_name_only() -> None:
    with reserved(State("box", "builtin://base", 1.0)) as reservation:
        reservation.directory.rename(reservation.directory.with_name("other"))
        reservation.directory.mkdir()
        (reservation.directory / "precious").touch()
    assert (machines_root() / "box/precious").exists()


def test_oldest_first() -> None:
    locks = [create(name, created=created) for name, created in (("b", 1.0), ("c", 3.0), ("a", 2.0))]
    assert names() == ["b", "a", "c"]
    for lock in locks:
        os.close(lock)


def test_others_may_not_enter(state_directory: Path) -> None:
    machines_root()
    assert (state_directory / "machines").stat().st_mode & 0o777 == 0o700
    (state_directory / "machines").chmod(0o750)
    with pytest.raises(ConfigError, match="open to others"):
        machines_root()


def test_a_link_is_not_followed_to_the_root(state_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir(mode=0o700)
    state_directory.mkdir()
    (state_directory / "machines").symlink_to(tmp_path / "private")
    with pytest.raises(ConfigError, match="symlink"):
        machines_root()


def test_a_root_that_cannot_be(state_directory: Path) -> None:
    state_directory.write_text("a file")
    with pytest.raises(ConfigError, match="VMETTE_STATE_DIR"):
        machines_root()


def _take(results: Any) -> None:
    try:
        lock = create("contended")
    except ConfigError:
        results.put("refused")
    else:
        results.put("won")
        fcntl.flock(lock, fcntl.LOCK_EX)  # which it has
        results.join()


def test_one_of_many_gets_a_name() -> None:
    context = multiprocessing.get_context("spawn")
    results = context.JoinableQueue()
    processes = [context.Process(target=_take, args=(results,)) for _ in range(4)]
    for process in processes:
        process.start()
    assert sorted(results.get() for _ in processes) == ["refused"] * 3 + ["won"]
    for _ in processes:
        results.task_done()
    for process in processes:
        process.join()
    assert names() == []


def test_no_connection_to_what_does_not_listen() -> None:
    lock = create()
    with open_machine("box") as entry:
        with pytest.raises(VmetteError, match="not up yet"):
            entry.connect()
        os.close(lock)
        with pytest.raises(SandboxClosed, match="has ended"):
            entry.connect()

"""What is on the disk of a saved machine, where nothing has to run."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from vmette import saved
from vmette.config import Saved
from vmette.errors import VmmError
from vmette.files import checksum

FACTS = {"vmette": "this"}


def sealed(directory: Path) -> Saved:
    """One with a single part, `state`, and the facts that it was sealed with."""
    directory.mkdir(mode=0o700)
    (directory / "state").write_bytes(b"state")
    with (directory / "state").open("rb") as file:
        checksums = {"state": checksum(file.fileno())}
    meta = {"format": saved.FORMAT, "facts": FACTS, "checksums": checksums}
    (directory / saved.META).write_text(json.dumps(meta))
    return Saved(directory)


def test_what_is_whole_passes(tmp_path: Path) -> None:
    files = sealed(tmp_path / "saved")
    saved.check(files, FACTS, saved.read(files))
    assert (tmp_path / "saved" / saved.CHECKED).exists()
    with pytest.raises(VmmError, match="it was made with another version of vmette"):
        saved.check(files, {"vmette": "that"}, saved.read(files))


@pytest.mark.timeout(30)
@pytest.mark.parametrize("writer", [False, True], ids=["nobody writes", "somebody may write"])
@pytest.mark.parametrize("name", [saved.META, saved.CHECKED, "state"])
def test_a_fifo_does_not_hold_us_up(name: str, writer: bool, tmp_path: Path) -> None:
    files = sealed(tmp_path / "saved")
    meta = saved.read(files)
    path = tmp_path / "saved" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with ExitStack() as stack:
        if writer:
            stack.callback(os.close, os.open(path, os.O_RDWR))
        if name == saved.META:
            with pytest.raises(ValueError, match="Expecting value"):
                saved.read(files)
        elif name == saved.CHECKED:
            saved.check(files, FACTS, meta)  # which reads all the rest, and remembers it
            assert path.is_file()
        else:
            with pytest.raises(VmmError, match="it is damaged: state is not as it was"):
                saved.check(files, FACTS, meta)

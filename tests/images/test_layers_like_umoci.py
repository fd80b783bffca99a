"""Layers make the tree that `umoci unpack` makes of them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.images.erofs_reader import Found, read
from tests.images.layer_tools import C, D, H, Item, L, P, directory, facts_of, image, item, tar, unpacked
from vmette.images.archive import ArchiveError

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("umoci") is None, reason="umoci has to be there, and to set owners"
)
SHM = "/dev/shm"
OPAQUE = ".wh..wh..opq"
CAPABILITY = b"\1\0\0\2\0\x20\0\0" + bytes(12)
TIME = 1_600_000_000_123_456_789
Facts = dict[bytes, tuple[object, ...]]


def blob(layout: Path, data: bytes, kind: str) -> dict[str, object]:
    digest = hashlib.sha256(data).hexdigest()
    (layout / "blobs/sha256" / digest).write_bytes(data)
    return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(data)}


def umoci(place: Path, archives: list[bytes]) -> Facts | None:
    """The tree that umoci makes; None if it refuses."""
    layout = place / "layout"
    (layout / "blobs/sha256").mkdir(parents=True)
    (layout / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    ids = [f"sha256:{hashlib.sha256(archive).hexdigest()}" for archive in archives]
    config = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": ids}}
    manifest = {
        "schemaVersion": 2,
        "config": blob(layout, json.dumps(config).encode(), "config.v1+json"),
        "layers": [blob(layout, archive, "layer.v1.tar") for archive in archives],
    }
    entry = blob(layout, json.dumps(manifest).encode(), "manifest.v1+json")
    entry["annotations"] = {"org.opencontainers.image.ref.name": "latest"}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    command: list[str | Path] = ["umoci", "raw", "unpack", "--image", f"{layout}:latest", place / "umoci"]
    done = subprocess.run(command, capture_output=True, text=True)
    return facts_of(place / "umoci") if done.returncode == 0 else None


def ours(found: dict[bytes, Found]) -> Facts:
    """What the reader found, in the form of facts_of."""
    first: dict[int, bytes] = {}
    for name, node in found.items():
        first[node.nid] = min(first.get(node.nid, name), name)
    out: Facts = {}
    for name, node in found.items():
        kind = node.mode >> 12
        mode = 0 if kind == 10 else node.mode & 0o7777
        content = node.target or node.content
        fact = (kind, mode, node.uid, node.gid, node.mtime_ns, content, node.rdev, node.xattrs)
        out[name] = fact if kind == 4 else (*fact, first[node.nid], node.nlink)
    return out


def without_times_of_directories(facts: Facts) -> Facts:
    """What whoever made something in them last has left there, unless the archive states them afterwards."""
    return {name: (*fact[:4], 0, *fact[5:]) if fact[0] == 4 else fact for name, fact in facts.items()}


def compare(archives: list[bytes], *, directory_too: bool = False) -> Facts | None:
    with tempfile.TemporaryDirectory(dir=SHM) as name:
        place = Path(name)
        theirs = umoci(place, archives)
        (place / "ours").mkdir()
        if theirs is None:
            with pytest.raises(ArchiveError):
                image(place / "ours", *archives)
            return None
        mine = ours(read(image(place / "ours", *archives)))
        theirs, mine = without_times_of_directories(theirs), without_times_of_directories(mine)
        assert {k: v for k, v in mine.items() if k} == {k: v for k, v in theirs.items() if k}
        if directory_too:
            (place / "dir").mkdir()
            unpacked_facts = without_times_of_directories(facts_of(unpacked(place / "dir", *archives)))
            assert unpacked_facts == mine
        return mine


BASE = [
    directory("usr"),
    directory("usr/lib"),
    item("usr/lib/a", content=b"a", mtime_ns=TIME),
    item("usr/lib/b", content=b"b", mode=0o4755, uid=5, gid=6),
    item("lib", L, target="usr/lib"),
    item("abs", L, target="/usr/lib"),
    item("up", L, target="../../usr"),
    directory("etc", 0o700),
    item("etc/f", content=b"f"),
    item("etc/hard", H, target="etc/f"),
    item("dev", C, device=(1, 3), mode=0o666, mtime_ns=TIME),
    item("pipe", P),
]


@pytest.mark.parametrize(
    "upper",
    [
        pytest.param([], id="nothing"),
        pytest.param([item("lib/new", content=b"n")], id="through a symlink"),
        pytest.param([item("abs/new", content=b"n"), item("up/lib/c")], id="through other symlinks"),
        pytest.param([directory("lib"), item("lib/new")], id="directory over symlink"),
        pytest.param([directory("lib"), item("lib/.wh.a"), item("lib/n")], id="whiteout below directory over symlink"),
        pytest.param([directory("lib"), item(f"lib/{OPAQUE}"), item("lib/n")], id="opaque directory over symlink"),
        pytest.param([item("lib/.wh.a")], id="whiteout through symlink"),
        pytest.param([item(".wh.lib")], id="whiteout of symlink"),
        pytest.param([item(".wh.lib"), directory("lib"), item("lib/x")], id="symlink, then a directory"),
        pytest.param([item("etc/.wh.f")], id="whiteout of a hard link"),
        pytest.param(
            [item("etc/n", H, target="etc/f"), item("etc/m", H, target="lib/a")], id="hard links across layers"
        ),
        pytest.param(
            [item("etc/n", H, target="abs/b"), item("abs/o", H, target="lib")], id="hard links through symlinks"
        ),
        pytest.param([item("etc/f", content=b"other")], id="one of two hard links replaced"),
        pytest.param([directory("etc"), item(f"etc/{OPAQUE}"), item("etc/n")], id="opaque"),
        pytest.param([directory("etc"), item("etc/n"), item(f"etc/{OPAQUE}")], id="opaque, after what is in it"),
        pytest.param([item("etc")], id="file over directory"),
        pytest.param([item("etc", L, target="usr"), item("etc/x")], id="symlink over directory, then through it"),
        pytest.param([directory("etc/f"), item("etc/f/x")], id="directory over file"),
        pytest.param([item("dev"), item("pipe", L, target="dev")], id="over special files"),
        pytest.param([item("etc", D, mode=0o1777, uid=9)], id="directory over directory"),
        pytest.param([item(".wh.etc"), directory("etc"), item("etc/n")], id="directory anew"),
        pytest.param([directory("etc"), item("etc/n"), item(".wh.etc")], id="directory anew, whiteout last"),
        pytest.param([item(".wh.usr"), item(".wh.nothing"), item("etc/.wh.nothing")], id="whiteouts"),
        pytest.param([item("x", xattrs={b"user.x": b"a\0b", b"security.capability": CAPABILITY})], id="xattrs"),
    ],
)
def test_fixed_cases(upper: list[Item]) -> None:
    assert compare([tar(*BASE), tar(*upper)], directory_too=True)


def test_attributes_of_a_directory_are_those_of_the_last_layer_that_has_it() -> None:
    lower = [item("d", D, xattrs={b"user.a": b"1", b"user.b": b"2"})]
    mine = compare([tar(*lower), tar(item("d", D, xattrs={b"user.c": b"3"}))], directory_too=True)
    assert mine is not None
    assert mine[b"d"][7] == {b"user.c": b"3"}


@pytest.mark.parametrize(
    "upper",
    [
        [item("etc/n", H, target="nothing")],
        [item("etc/n", H, target="etc")],
        [item("etc/f/below")],
        [item("loop", L, target="loop"), item("loop/x")],
    ],
    ids=["hard link to nothing", "hard link to a directory", "below a file", "loop"],
)
def test_both_refuse(upper: list[Item]) -> None:
    with tempfile.TemporaryDirectory(dir=SHM) as name:
        place = Path(name)
        (place / "ours").mkdir()
        assert umoci(place, [tar(*BASE), tar(*upper)]) is None
        with pytest.raises(ArchiveError, match=r"way|hard link"):
            image(place / "ours", tar(*BASE), tar(*upper))


# --- random layers

NAMES = ("a", "b", "c")
TARGETS = ("a", "b", "/c", "../a", "/a/b", ".", "b/c")


class World:
    """Knows what is where, so that layers are such as a program makes them."""

    def __init__(self) -> None:
        self.kinds: dict[str, str] = {"": "d"}
        self.passed: set[str] = set()
        """The symlinks that were on the way."""

    def of(self, kinds: str) -> list[str]:
        return sorted(path for path, kind in self.kinds.items() if kind in kinds)

    def put(self, path: str, kind: str) -> None:
        if not (kind == "d" and self.kinds.get(path) == "d"):
            self.drop(path)
        self.kinds[path] = kind

    def drop(self, path: str) -> None:
        self.kinds = {
            name: kind for name, kind in self.kinds.items() if name != path and not name.startswith(path + "/")
        }

    def real(self, path: str) -> str | None:
        """The directory that `path` leads to, if it is one now."""
        parts, at, links = path.split("/")[::-1], "", 0
        while parts:
            part = parts.pop()
            if part in {"", "."}:
                continue
            if part == "..":
                at = at.rpartition("/")[0]
                continue
            there = f"{at}/{part}" if at else part
            kind = self.kinds.get(there, "")
            if kind.startswith("l"):
                links += 1
                if links > 20:
                    return None
                self.passed.add(there)
                target = kind[1:]
                at = "" if target.startswith("/") else at
                parts += target.split("/")[::-1]
            elif kind == "d":
                at = there
            else:
                return None
        return at


class Layers(list[list[Item]]):
    def __repr__(self) -> str:
        return "\n".join(
            f"{n}: {info.type!r} {info.name} -> {info.linkname} {info.size} {info.mode:o} {info.pax_headers}"
            for n, items in enumerate(self)
            for info, _ in items
        )


@st.composite
def layer_stacks(draw: st.DrawFn) -> Layers:
    world = World()
    stack = Layers()
    for number in range(draw(st.integers(1, 4))):
        items: list[Item] = []
        lower = World()
        lower.kinds = dict(world.kinds)
        crossed: set[str] = set()
        """The symlinks on the way of whiteouts, which have to stay for the same reason."""
        touched: set[str] = set()
        """Where this layer has put something: whiteouts there would be a matter of order."""
        for _ in range(draw(st.integers(1, 9))):
            parent = draw(st.sampled_from([path for path, kind in world.kinds.items() if kind[0] in "dl"]))
            name = draw(st.sampled_from(NAMES))
            path = f"{parent}/{name}" if parent else name
            world.passed.clear()
            where = world.real(parent)
            if where is None:
                continue
            real = f"{where}/{name}" if where else name
            what = draw(st.sampled_from("ffddddllhwwo"))
            if what not in "wo" and any(each == real or each.startswith(real + "/") for each in crossed):
                continue
            mode, uid = draw(st.sampled_from([0o644, 0o755, 0o4711, 0o1777, 0])), draw(st.sampled_from([0, 1, 70000]))
            made = partial(item, path, mode=mode, uid=uid, gid=uid + 1, mtime_ns=draw(st.sampled_from([1, TIME])))
            if what == "f":
                content = draw(st.sampled_from([b"", b"x", b"content" * 1000]))
                xattrs = draw(st.sampled_from([{}, {b"user.k": b"v\0"}, {b"trusted.t": b"\xff"}]))
                items.append(made(content=content + b"%d" % number, xattrs=xattrs))
            elif what == "d":
                items.append(made(D, xattrs=draw(st.sampled_from([{}, {b"user.d": b"1"}, {b"user.e": b"2"}]))))
            elif what == "l":
                target = draw(st.sampled_from(TARGETS))
                items.append(made(L, target=target))
                what += target
            elif what == "h":
                files = [each for each in world.of("f") if each != real and not each.startswith(real + "/")]
                if not files:
                    continue
                target = draw(st.sampled_from(files))
                items.append(item(path, H, target=target))
                touched.add(target)
                what = "f"
            else:
                whole = real if what == "w" else where
                # Of a file that this layer replaced or linked to, of a symlink's other end: out of scope.
                if any(each == whole or each.startswith(whole + "/") or not whole for each in touched):
                    continue
                if lower.real(parent) != where:
                    continue
                crossed |= world.passed
                below = [each for each in lower.kinds if each == whole or each.startswith(whole + "/")]
                items.append(item(f"{parent}/{'.wh.' + name if what == 'w' else OPAQUE}".lstrip("/")))
                for each in below:
                    if each and (what == "w" or each != whole):
                        world.drop(each)
                continue
            world.put(real, what)
            touched |= {real, *world.passed}
        stack.append(items)
    return stack


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(layer_stacks())
def test_random_layers(stack: Layers) -> None:
    compare([tar(*items) for items in stack])

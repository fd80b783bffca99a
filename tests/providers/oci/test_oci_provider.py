"""The OCI provider as a whole: a real registry behind a proxy that counts and breaks, layouts and archives."""

from __future__ import annotations

import gzip
import http.client
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.images.layout import MANIFEST, Layout, member, tar
from tests.providers.oci.registry import Exchange, Server, docker_registry, push
from vmette.errors import ConfigError
from vmette.providers import BlockFs, BlockImage, Context, Directory, InvalidSpec, NetworkError, OfflineCacheMiss
from vmette.providers.base import Cancelled, Progress, ProviderIOError
from vmette.providers.oci.provider import OciProvider, cached

BASE = tar([member("etc/base", b"base"), member("large", os.urandom(6_000_000))])
TOP = tar([member("etc/top", b"top")])
OTHER = tar([member("etc/other", b"other")])


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with docker_registry(tmp_path_factory.mktemp("registry")) as host:
        yield host


class Proxy(Server):
    """In front of a registry: counts what is asked for, and lets `fault` answer in its place (and say so)."""

    def __init__(self, registry: str) -> None:
        super().__init__(self._forward)
        self.fault: Callable[[Exchange], bool] = lambda _: False
        self._registry = registry

    def _forward(self, exchange: Exchange) -> None:
        if self.fault(exchange):
            return
        headers = {name: value for name, value in exchange.seen.headers.items() if name in {"accept", "range"}}
        with closing(http.client.HTTPConnection(self._registry)) as connection:
            connection.request(exchange.seen.method, exchange.seen.path, headers=headers)
            answer = connection.getresponse()
            body = answer.read()
        kept = ("content-type", "docker-content-digest", "content-range", "content-length")
        named = {name.title().replace("-", "_"): value for name, value in answer.getheaders() if name.lower() in kept}
        exchange.reply(answer.status, body, **named)

    @property
    def asked(self) -> list[str]:
        """Method, and what was asked for, without the layers' digests."""
        kinds = [f"{seen.method} {seen.path.split('/')[-2]}" for seen in self.seen if seen.path.count("/") > 2]
        self.seen.clear()
        return kinds


@pytest.fixture
def proxy(registry: str) -> Iterator[Proxy]:
    server = Proxy(registry)
    with server:
        yield server


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(tmp_path / "cache", arch="x86_64")


def with_(context: Context, **changes: Any) -> Context:
    from dataclasses import replace

    return replace(context, **changes)


def names(artifact: object) -> set[str]:
    """The files of an artifact of the block form, by an independent program."""
    assert isinstance(artifact, BlockImage) and artifact.fstype is BlockFs.EROFS
    found = set()
    todo = ["/"]
    while todo:
        directory = todo.pop()
        argv = ["dump.erofs", "--ls", f"--path={directory}", str(artifact.path)]
        listing = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
        for line in listing.splitlines():
            words = line.split()
            if len(words) == 3 and words[0].isdecimal() and words[2] not in {".", ".."}:
                path = f"{directory.rstrip('/')}/{words[2]}"
                found.add(path)
                if words[1] == "2":
                    todo.append(path)
    return found


@pytest.fixture
def image(tmp_path: Path, registry: str) -> str:
    """An image of two layers that has been pushed; its repository, which is the test's own."""
    layout = Layout(tmp_path / "layout")
    repository = f"t{os.urandom(6).hex()}/image"
    push(layout.tag("x", layout.manifest([BASE, TOP], {"Env": ["A=1"], "Cmd": ["x"]})), registry, f"{repository}:1")
    return repository


provide = OciProvider().provide


def test_an_image_comes_from_the_registry_once(proxy: Proxy, image: str, context: Context) -> None:
    first = provide(f"{proxy.host}/{image}:1", context)
    assert names(first) == {"/etc", "/etc/base", "/etc/top", "/large"}
    assert first.config is not None
    assert (first.config.env, first.config.cmd) == ((("A", "1"),), ("x",))
    assert sorted(proxy.asked) == ["GET blobs"] * 3 + ["GET manifests"]
    assert provide(f"oci://{proxy.host}/{image}:1", context) == first
    assert proxy.asked == []
    (known,) = cached(context)
    assert (known.reference, known.platform) == (f"{proxy.host}/{image}:1", "linux/amd64")


def test_a_tag_is_asked_for_again_after_an_hour_and_a_digest_never(
    proxy: Proxy, image: str, context: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, registry: str
) -> None:
    spec = f"{proxy.host}/{image}:1"
    first = provide(spec, context)
    (known,) = cached(context)
    pinned = f"{proxy.host}/{image}@{known.manifest}"
    assert provide(pinned, context) == first
    proxy.seen.clear()
    now = time.time()
    monkeypatch.setattr("vmette.providers.oci.provider.time.time", lambda: now + 3599)
    assert provide(spec, context) == first
    assert proxy.asked == []
    monkeypatch.setattr("vmette.providers.oci.provider.time.time", lambda: now + 3601)
    assert provide(spec, context) == first
    assert proxy.asked == ["HEAD manifests"]
    assert provide(spec, context) == first
    assert provide(pinned, with_(context, pull="always")) == first
    assert proxy.asked == []
    layout = Layout(tmp_path / "new")
    push(layout.tag("x", layout.manifest([BASE, OTHER])), registry, f"{image}:1")
    assert provide(spec, context) == first
    second = provide(spec, with_(context, pull="always"))
    assert names(second) == {"/etc", "/etc/base", "/etc/other", "/large"}
    assert sorted(proxy.asked) == ["GET blobs"] * 2 + ["GET manifests", "HEAD manifests"]  # of two layers one is there


def test_what_may_not_be_asked_for_comes_from_the_cache_or_not_at_all(
    proxy: Proxy, image: str, context: Context
) -> None:
    spec = f"{proxy.host}/{image}:1"
    with pytest.raises(OfflineCacheMiss, match=f"offline mode: {spec} not in cache"):
        provide(spec, with_(context, offline=True))
    with pytest.raises(InvalidSpec, match="not in the cache"):
        provide(spec, with_(context, pull="never"))
    assert proxy.asked == []
    first = provide(spec, context)
    proxy.seen.clear()
    assert provide(spec, with_(context, offline=True, pull="always")) == first
    assert provide(spec, with_(context, pull="never")) == first
    assert proxy.asked == []


def test_a_registry_that_is_down_has_its_cached_image_used(
    registry: str, image: str, context: Context, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = Proxy(registry)
    with proxy:
        spec = f"{proxy.host}/{image}:1"
        first = provide(spec, context)
    now = time.time()
    monkeypatch.setattr("vmette.providers.oci.provider.time.time", lambda: now + 7200)
    monkeypatch.setattr("vmette.providers.http.BACKOFF", 0.001)
    with caplog.at_level(logging.WARNING):
        assert provide(spec, context) == first
    assert "using the cached image" in caplog.text
    with pytest.raises(NetworkError):
        provide(spec, with_(context, pull="always"))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_registry_that_refuses_is_not_one_that_is_down(
    proxy: Proxy, image: str, context: Context, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    spec = f"{proxy.host}/{image}:1"
    provide(spec, context)
    now = time.time()
    monkeypatch.setattr("vmette.providers.oci.provider.time.time", lambda: now + 7200)

    def refuse(exchange: Exchange) -> bool:
        exchange.reply(status)
        return True

    proxy.fault = refuse
    with pytest.raises(NetworkError):
        provide(spec, context)


def test_two_processes_fetch_an_image_once(proxy: Proxy, image: str, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "vmette", "pull", "--quiet", f"{proxy.host}/{image}:1"]
    environment = {**os.environ, "VMETTE_CACHE_DIR": str(tmp_path / "cache")}
    both = [subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert outputs[0] == outputs[1] != b""
    layers = [seen.path for seen in proxy.seen if "/blobs/" in seen.path]
    assert len(set(layers)) == 3
    # The config is not a layer: each of the two may want it.
    assert sum(layers.count(path) == 1 for path in set(layers)) >= 2


def test_a_killed_download_is_gone_on_with(proxy: Proxy, registry: str, image: str, tmp_path: Path) -> None:
    def stall(exchange: Exchange) -> bool:
        """Half of a large blob, and no more."""
        if exchange.seen.method != "GET" or "/blobs/" not in exchange.seen.path or "range" in exchange.seen.headers:
            return False
        with closing(http.client.HTTPConnection(registry)) as connection:
            connection.request("GET", exchange.seen.path)
            body = connection.getresponse().read()
        if len(body) < 100_000:
            return False
        exchange.start(200, Content_Length=len(body))
        exchange.wfile.write(body[:4_000_000])
        exchange.server.over.wait()
        return True

    proxy.fault = stall
    cache = tmp_path / "cache"
    argv = [sys.executable, "-m", "vmette", "pull", "--quiet", f"{proxy.host}/{image}:1"]
    environment = {**os.environ, "VMETTE_CACHE_DIR": str(cache)}
    with subprocess.Popen(argv, env=environment) as process:
        end = time.monotonic() + 30
        while not any(path.stat().st_size > 1_000_000 for path in cache.glob("store/downloads/*")):
            assert time.monotonic() < end
            time.sleep(0.01)
        process.kill()
    subprocess.run(argv, env=environment, check=True)
    (resumed,) = filter(None, proxy.sent("Range"))
    assert int(resumed.removeprefix("bytes=").removesuffix("-")) > 1_000_000
    assert list((cache / "store/downloads").iterdir()) == list((cache / "store/staging").iterdir()) == []


def test_a_pull_that_waits_for_a_dead_server_ends_when_it_is_told_to(proxy: Proxy, image: str, tmp_path: Path) -> None:
    def stall(exchange: Exchange) -> bool:
        if exchange.seen.method != "GET" or "/blobs/" not in exchange.seen.path:
            return False
        exchange.start(200, Content_Length=10**9)
        exchange.wfile.write(bytes(10))
        exchange.server.over.wait()
        return True

    proxy.fault = stall
    environment = {**os.environ, "VMETTE_CACHE_DIR": str(tmp_path / "cache")}
    argv = [sys.executable, "-m", "vmette", "pull", f"{proxy.host}/{image}:1"]
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        proxy.seen.clear()
        with subprocess.Popen(argv, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
            end = time.monotonic() + 30
            while not any("/blobs/" in seen.path for seen in proxy.seen):
                assert time.monotonic() < end
                time.sleep(0.01)
            process.send_signal(number)
            assert process.wait(10) == status
            assert process.stderr is not None and process.stderr.read() == b""
    left = [path.parent.name for path in (tmp_path / "cache/store").glob("*/*")]
    assert set(left) <= {"downloads"}


def test_the_platform_is_chosen_and_checked(tmp_path: Path, registry: str, proxy: Proxy, context: Context) -> None:
    layout = Layout(tmp_path / "layout")
    index = layout.index([layout.manifest([BASE], architecture="arm64"), layout.manifest([TOP])])
    push(layout.tag("x", index), registry, "two/platforms:1", "--all")
    push(layout.tag("y", layout.manifest([BASE], architecture="arm64")), registry, "one/platform:1")
    spec = f"{proxy.host}/two/platforms:1"
    assert names(provide(spec, context)) == {"/etc", "/etc/top"}
    assert names(provide(spec, with_(context, arch="aarch64"))) == {"/etc", "/etc/base", "/large"}
    assert names(provide(spec, with_(context, platform="linux/arm64/v8"))) == {"/etc", "/etc/base", "/large"}
    with pytest.raises(InvalidSpec, match="not there for linux/riscv64; it is for linux/amd64, linux/arm64"):
        provide(spec, with_(context, platform="linux/riscv64"))
    with pytest.raises(InvalidSpec, match="not there for linux/amd64, but for linux/arm64"):
        provide(f"{proxy.host}/one/platform:1", context)
    for malformed in ("linux", "linux/", "/arm64", "a/b/c/d"):
        with pytest.raises(InvalidSpec, match="platform"):
            provide(spec, with_(context, platform=malformed))


HOSTILE = {
    "out of the root": tar([member("../escaped", b"x")]),
    "no file": tar([member("x", kind="h", target="../../etc/passwd")]),
    "hides nothing": tar([member("d/.wh...", b"")]),
    "no tar": b"this is no archive" * 100,
    "within": BASE[:2_000_000],
}


@pytest.mark.parametrize("layer", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("form", ["block", "directory"])
def test_a_hostile_layer_leaves_nothing(tmp_path: Path, context: Context, layer: bytes, form: str) -> None:
    layout = Layout(tmp_path / "layout")
    spec = layout.tag("x", layout.manifest([TOP, layer]))
    before = sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts)
    with pytest.raises(ProviderIOError, match=r"oci-layout:.*: "):
        provide(spec, with_(context, form=form))
    assert sorted(path for path in tmp_path.rglob("*") if "cache" not in path.parts) == before
    store = context.cache_root / "store"
    for kind in ("images", "directories", "staging", "locks"):
        assert not (store / kind).is_dir() or list((store / kind).iterdir()) == []


def test_links_lead_nowhere_on_the_host(tmp_path: Path, context: Context) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    layout = Layout(tmp_path / "layout")
    layers = [
        tar(
            [
                member("link", kind="l", target=str(outside)),
                member("up", kind="l", target="../../../../.."),
                member("usr/local", kind="l", target=str(outside)),
            ]
        ),
        tar([member("link/.wh.kept"), member("link/.wh..wh..opq"), member("link/new", b"x"), member("up/top", b"x")]),
    ]
    spec = layout.tag("x", layout.manifest(layers))
    helpers = tmp_path / "helpers"
    helpers.mkdir()
    (helpers / "vsock-send").write_bytes(b"helper")
    artifact = provide(spec, with_(context, form="directory", guest_helpers_dir=helpers))
    assert isinstance(artifact, Directory)
    inside = artifact.path / str(outside).lstrip("/")
    assert (inside / "new").read_text() == "x"
    assert (inside / "bin/vsock-send").read_bytes() == b"helper"
    assert (artifact.path / "top").read_text() == "x"
    assert [path.name for path in outside.iterdir()] == ["kept"]


def test_a_damaged_cache_is_mended(proxy: Proxy, image: str, context: Context) -> None:
    spec = f"{proxy.host}/{image}:1"
    first = provide(spec, context)
    for path in [*(context.cache_root / "oci/blobs").iterdir(), *(context.cache_root / "oci/refs").iterdir()]:
        path.write_bytes(path.read_bytes()[:-3] + b"xxx")
        proxy.seen.clear()
        assert provide(spec, context) == first
        assert "GET manifests" in proxy.asked


def test_progress_is_told_and_a_wish_to_stop_is_heard(proxy: Proxy, image: str, context: Context) -> None:
    spec = f"{proxy.host}/{image}:1"
    seen: list[Progress] = []
    with pytest.raises(Cancelled):
        provide(spec, with_(context, progress=seen.append, cancelled=lambda: bool(seen)))
    assert list((context.cache_root / "store/staging").iterdir()) == []
    seen.clear()
    provide(spec, with_(context, progress=seen.append))
    assert {"downloading", "unpacking", "ready"} == {progress.state for progress in seen}
    assert len({progress.part for progress in seen}) == 2
    last = [progress for progress in seen if progress.state == "downloading"][-1]
    assert last.done == last.total


def test_layers_of_zstd(registry: str, tmp_path: Path, context: Context) -> None:
    layout = Layout(tmp_path / "layout")
    argv = ["zstd", "--quiet", "--stdout"]
    layers = [subprocess.run(argv, input=layer, capture_output=True, check=True).stdout for layer in (BASE, TOP)]
    kind = "application/vnd.oci.image.layer.v1.tar+zstd"
    push(layout.tag("x", layout.manifest(layers, media_type=kind)), registry, "zstd/image:1")
    assert names(provide(f"{registry}/zstd/image:1", context)) == {"/etc", "/etc/base", "/etc/top", "/large"}


@pytest.mark.parametrize("limit", ["0", "-1", "lots"])
def test_a_limit_that_is_none(tmp_path: Path, context: Context, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setenv("VMETTE_OCI_MAX_BYTES", limit)
    layout = Layout(tmp_path / "layout")
    with pytest.raises(ConfigError, match="VMETTE_OCI_MAX_BYTES"):
        provide(layout.tag("x", layout.manifest([TOP])), context)


def test_a_layer_over_the_limit(tmp_path: Path, context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VMETTE_OCI_MAX_BYTES", "2000000")
    layout = Layout(tmp_path / "layout")
    with pytest.raises(InvalidSpec, match="more than 2000000 bytes"):
        provide(layout.tag("x", layout.manifest([BASE])), context)
    with pytest.raises(ProviderIOError, match="more than 2000000 bytes"):
        provide(layout.tag("y", layout.manifest([tar([member("zeros", bytes(3_000_000))])])), context)


def test_no_file_gets_into_a_layer_that_has_another_digest(tmp_path: Path, context: Context) -> None:
    """A blob that is another one when it is read the second time, and one that says that it is a layer's."""
    layout = Layout(tmp_path / "layout")
    spec = layout.tag("x", layout.manifest([TOP]))
    described = json.loads((layout.path / "index.json").read_text())["manifests"][0]
    document = json.loads((layout.path / "blobs" / described["digest"].replace(":", "/")).read_text())
    blob = layout.path / "blobs" / document["layers"][0]["digest"].replace(":", "/")
    good = blob.read_bytes()
    evil = gzip.compress(OTHER, 1, mtime=0)
    blob.write_bytes(evil + bytes(len(good) - len(evil)) if len(evil) < len(good) else evil[: len(good)])
    with pytest.raises(ProviderIOError):
        provide(spec, context)
    assert not list((context.cache_root / "store/layers").iterdir())


def test_a_config_that_is_a_layer_of_somebody_else_does_not_touch_it(
    proxy: Proxy, registry: str, image: str, tmp_path: Path
) -> None:
    """Two pulls at once that want the same digest, one of them from a registry that has other bytes for it."""
    digests: list[str] = []

    def hostile(exchange: Exchange) -> None:
        path = exchange.seen.path
        if path.endswith("/manifests/1"):
            config = {"mediaType": "x", "digest": digests[0], "size": 6_000_000}
            body = json.dumps({"schemaVersion": 2, "config": config, "layers": []}).encode()
            exchange.reply(200, body, Content_Type="application/vnd.oci.image.manifest.v1+json")
        elif "/blobs/" in path:
            exchange.reply(200, b"evil" * 1_500_000)
        else:
            exchange.reply(404)

    def slow(exchange: Exchange) -> bool:
        if exchange.seen.method != "GET" or "/blobs/" not in exchange.seen.path:
            return False
        with closing(http.client.HTTPConnection(registry)) as connection:
            connection.request("GET", exchange.seen.path)
            body = connection.getresponse().read()
        exchange.start(200, Content_Length=len(body))
        for at in range(0, len(body), 1_000_000):
            if len(body) > 1_000_000:
                digests[:] = ["sha256:" + exchange.seen.path.rpartition(":")[2]]
            exchange.wfile.write(body[at : at + 1_000_000])
            time.sleep(0.1)
        return True

    proxy.fault = slow
    environment = {**os.environ, "VMETTE_CACHE_DIR": str(tmp_path / "cache")}
    pull = [sys.executable, "-m", "vmette", "pull", "--quiet"]
    with Server(hostile) as evil, subprocess.Popen([*pull, f"{proxy.host}/{image}:1"], env=environment) as good:
        end = time.monotonic() + 30
        while not digests:
            assert time.monotonic() < end
            time.sleep(0.01)
        done = subprocess.run([*pull, f"{evil.host}/x:1"], env=environment, capture_output=True, check=False)
        assert done.returncode == 125
        assert good.wait() == 0
    context = Context(tmp_path / "cache", arch="x86_64", offline=True)
    assert names(provide(f"{proxy.host}/{image}:1", context)) == {"/etc", "/etc/base", "/etc/top", "/large"}


ESCAPE = "\x1b]0;taken over\x07"


def test_images_have_no_say_in_what_the_terminal_does(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    described = layout.manifest([TOP], architecture=ESCAPE)
    specs = [layout.tag("x", layout.index([described])), layout.tag(ESCAPE, described).removesuffix(ESCAPE) + "y"]
    for spec in specs:
        argv = [sys.executable, "-m", "vmette", "pull", spec]
        environment = {**os.environ, "VMETTE_CACHE_DIR": str(tmp_path / "cache")}
        done = subprocess.run(argv, env=environment, capture_output=True, check=False)
        assert done.returncode == 125
        assert b"\x1b" not in done.stderr and b"taken over" in done.stderr


SURROGATES = [
    {"Env": ["A=\ud800"]},
    {"Cmd": ["\udc80"]},
    {"WorkingDir": "\ud800"},
    {"User": "\udfff"},
    {"User": "a\0b"},
]


@pytest.mark.parametrize("config", SURROGATES)
def test_configs_that_no_guest_can_be_told(tmp_path: Path, context: Context, config: dict[str, Any]) -> None:
    layout = Layout(tmp_path / "layout")
    with pytest.raises(InvalidSpec, match="config whose"):
        provide(layout.tag("x", layout.manifest([TOP], config)), context)


@pytest.mark.parametrize("size", [-1, 1 << 63, 10**400, 1.5, True, "1"])
def test_sizes_that_are_none(tmp_path: Path, context: Context, size: object) -> None:
    layout = Layout(tmp_path / "layout")
    layer = {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": "sha256:" + "0" * 64, "size": size}
    document = {"schemaVersion": 2, "config": {}, "layers": [layer]}
    with pytest.raises(InvalidSpec, match="malformed descriptor"):
        provide(layout.tag("x", layout.blob(json.dumps(document).encode(), MANIFEST)), context)


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path, context: Context) -> None:
    layout = Layout(tmp_path / "layout")
    spec = layout.tag("x", layout.manifest([TOP]))
    for blob in (layout.path / "blobs/sha256").iterdir():
        content = blob.read_bytes()
        blob.unlink()
        os.mkfifo(blob)
        with pytest.raises(ProviderIOError, match="no regular file"):
            provide(spec, with_(context, cache_root=tmp_path / blob.name))
        blob.unlink()
        blob.write_bytes(content)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ProviderIOError, match="no regular file"):
        provide(f"docker-archive:{tmp_path}/fifo", context)


def test_a_cache_that_may_only_be_read_will_do(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "layout")
    spec = layout.tag("x", layout.manifest([TOP]))
    cache = tmp_path / "cache"
    cache.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "cache", str(cache)], check=True)
    try:
        first = provide(spec, Context(cache, arch="x86_64"))
        subprocess.run(["mount", "-o", "remount,ro", str(cache)], check=True)
        assert provide(spec, Context(cache, arch="x86_64")) == first
    finally:
        subprocess.run(["umount", str(cache)], check=True)


def test_a_damaged_layer_is_made_anew(tmp_path: Path, context: Context, caplog: pytest.LogCaptureFixture) -> None:
    layout = Layout(tmp_path / "layout")
    spec = layout.tag("x", layout.manifest([TOP, BASE]))
    first = provide(spec, context)
    content = first.path.read_bytes()
    indexes = list((context.cache_root / "store/layers").glob("*/index"))
    good = [index.read_bytes() for index in indexes]
    for bad in (b"{", b"\xff", b"[]\n", b"1\n", b"[" * 100_000, good[0][:-4], None):
        for image in (context.cache_root / "store/images").iterdir():
            image.unlink()
        for index in indexes:
            if bad is None:
                index.unlink()
                (index.parent / "data").unlink()
            else:
                index.write_bytes(bad)
        caplog.clear()
        assert provide(spec, context) == first
        assert first.path.read_bytes() == content
        assert caplog.text.count("is damaged and is made anew") == 2
        assert [index.read_bytes() for index in indexes] == good


def test_the_form_is_the_providers_or_the_contexts(tmp_path: Path, context: Context) -> None:
    layout = Layout(tmp_path / "layout")
    spec = layout.tag("x", layout.manifest([BASE, TOP]))
    assert isinstance(provide(spec, context), BlockImage)
    for artifact in (
        provide(spec, with_(context, form="directory")),
        OciProvider(form="directory").provide(spec, context),
    ):
        assert isinstance(artifact, Directory)
        assert sorted(path.name for path in artifact.path.rglob("*")) == ["base", "etc", "large", "top"]
    assert isinstance(OciProvider(form="block").provide(spec, with_(context, form="directory")), BlockImage)
    with pytest.raises(ConfigError, match="form 'ball'"):
        OciProvider(form="ball").provide(spec, context)


# --- layouts and archives


def test_a_damaged_layout(tmp_path: Path, context: Context) -> None:
    layout = Layout(tmp_path / "layout")
    spec = layout.tag("x", layout.manifest([BASE, TOP]))
    with pytest.raises(InvalidSpec, match="no tag 'y'; there are x"):
        provide(spec.removesuffix("x") + "y", context)
    provide(spec.removesuffix(":x"), context)
    for blob in (layout.path / "blobs/sha256").iterdir():
        content = blob.read_bytes()
        blob.write_bytes(content[:-1] + b"?")
        with pytest.raises(ProviderIOError, match="damaged"):
            provide(spec, with_(context, cache_root=tmp_path / blob.name))
        blob.write_bytes(content)
    with pytest.raises(InvalidSpec, match=r"no index\.json"):
        provide(f"oci-layout:{tmp_path}", context)
    (layout.path / "index.json").write_text("[]")
    with pytest.raises(InvalidSpec):
        provide(spec, context)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_docker_archive(tmp_path: Path, context: Context, compressed: bool) -> None:
    layout = Layout(tmp_path / "layout")
    spec = layout.tag("x", layout.manifest([BASE, TOP], {"User": "nobody"}))
    archive = tmp_path / "a.tar"
    source = "oci:" + spec.removeprefix("oci-layout:")
    subprocess.run(["skopeo", "--insecure-policy", "copy", "-q", source, f"docker-archive:{archive}:a:b"], check=True)
    if compressed:
        with pytest.raises(InvalidSpec, match="no Docker archive"):
            (tmp_path / "a.tar.gz").write_bytes(gzip.compress(archive.read_bytes(), 1))
            provide(f"docker-archive:{tmp_path}/a.tar.gz", context)
        return
    artifact = provide(f"docker-archive:{archive}", context)
    assert names(artifact) == {"/etc", "/etc/base", "/etc/top", "/large"}
    assert artifact.config is not None and artifact.config.user == "nobody"
    data = archive.read_bytes()
    archive.write_bytes(data.replace(b"etc/base", b"etc/bAse"))
    with pytest.raises(InvalidSpec, match="damaged"):
        provide(f"docker-archive:{archive}", context)
    archive.write_bytes(data[:5000])
    with pytest.raises(InvalidSpec):
        provide(f"docker-archive:{archive}", context)


BAD_MANIFESTS = {
    "schema 1": {"schemaVersion": 1, "fsLayers": []},
    "no layers": {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json"},
    "no config": {"schemaVersion": 2, "layers": []},
    "a helm chart": {
        "schemaVersion": 2,
        "config": {},
        "layers": [
            {
                "mediaType": "application/vnd.cncf.helm.chart.content.v1.tar+gzip",
                "digest": "sha256:" + "0" * 64,
                "size": 1,
            }
        ],
    },
    "a bad digest": {
        "schemaVersion": 2,
        "config": {},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": "sha256:../../x", "size": 1}],
    },
    "a negative size": {
        "schemaVersion": 2,
        "config": {},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": "sha256:" + "0" * 64, "size": -1}],
    },
    "too many layers": {"schemaVersion": 2, "config": {}, "layers": [{}] * 600},
}


@pytest.mark.parametrize("document", BAD_MANIFESTS.values(), ids=BAD_MANIFESTS)
def test_manifests_that_are_none(tmp_path: Path, context: Context, document: object) -> None:
    layout = Layout(tmp_path / "layout")
    described = layout.blob(json.dumps(document).encode(), "application/vnd.oci.image.manifest.v1+json")
    with pytest.raises(InvalidSpec):
        provide(layout.tag("x", described), context)


def test_what_is_claimed() -> None:
    matches = OciProvider().matches
    for spec in (
        "alpine",
        "alpine:3.20",
        "ghcr.io/a/b@sha256:x",
        "localhost:5000/x",
        "oci:///x",
        "oci-layout:/x",
        "a b",
    ):
        assert matches(spec), spec
    for spec in ("", "/x", "./x", "../x", "~/x", ".", "tar+https://x", "http://x", "builtin://base"):
        assert not matches(spec), spec

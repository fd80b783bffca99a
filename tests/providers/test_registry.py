"""`vmette.providers.registry`: the first provider that claims a spec resolves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vmette.providers import (
    Artifact,
    BuiltinProvider,
    Context,
    Directory,
    DirProvider,
    InvalidSpec,
    OfflineCacheMiss,
    Registry,
    RootfsProvider,
    default_registry,
)

CONTEXT = Context(Path("/tmp"))


class Fake:
    """Claims what starts with `prefix`, and says that it is a directory of its own name."""

    def __init__(self, name: str, prefix: str = "") -> None:
        self._name = name
        self._prefix = prefix
        self.asked: list[str] = []
        self.contexts: list[Context] = []

    @property
    def name(self) -> str:
        return self._name

    def matches(self, spec: str) -> bool:
        self.asked.append(spec)
        return spec.startswith(self._prefix)

    def provide(self, spec: str, context: Context) -> Artifact:
        self.contexts.append(context)
        return Directory(Path("/", self._name))


def resolved(registry: Registry, spec: str) -> Path:
    artifact = registry.resolve(spec, CONTEXT)
    assert isinstance(artifact, Directory)
    return artifact.path


def test_the_first_match_resolves() -> None:
    """The seed's registry_dispatches_first_match."""
    registry = Registry().with_provider(Fake("a", "a:")).with_provider(Fake("b"))
    assert resolved(registry, "a:x") == Path("/a")
    assert resolved(registry, "z") == Path("/b")
    assert registry.names == ["a", "b"]


def test_a_spec_that_nobody_claims() -> None:
    """The seed's registry_reports_missing_provider."""
    with pytest.raises(InvalidSpec) as caught:
        Registry([DirProvider()]).resolve("alpine:3.20", CONTEXT)
    assert str(caught.value) == 'invalid spec: no provider claims "alpine:3.20"; registered: [dir]'


@pytest.mark.parametrize(
    ("spec", "quoted"),
    [("", '""'), ('a"b\\', r'"a\"b\\"'), ("a\nb\x1b", r'"a\nb\u001b"'), ("caf\u00e9", '"caf\u00e9"')],
)
def test_an_error_quotes_the_spec_and_lists_the_providers_in_order(spec: str, quoted: str) -> None:
    registry = Registry([Fake("z", "z:"), Fake("a", "a:")], more=lambda: [Fake("m", "m:")])
    with pytest.raises(InvalidSpec) as caught:
        registry.resolve(spec, CONTEXT)
    assert str(caught.value) == f"invalid spec: no provider claims {quoted}; registered: [z, a, m]"


def test_order_decides() -> None:
    for names in ("ab", "ba"):
        registry = Registry(Fake(name) for name in names)
        assert registry.names == list(names)
        assert resolved(registry, "x") == Path("/", names[0])


def test_those_after_the_first_match_are_not_asked_and_the_context_is_passed_on() -> None:
    before, first, after = Fake("before", "no"), Fake("first"), Fake("after")
    assert resolved(Registry([before, first, after]), "spec") == Path("/first")
    assert (before.asked, first.asked, after.asked) == (["spec"], ["spec"], [])
    assert (before.contexts, first.contexts, after.contexts) == ([], [CONTEXT], [])


def test_the_error_of_the_provider_that_claims_is_the_answer() -> None:
    class Failing(Fake):
        def provide(self, spec: str, context: Context) -> Artifact:
            raise OfflineCacheMiss(spec)

    with pytest.raises(OfflineCacheMiss, match="offline mode: x not in cache"):
        Registry([Failing("failing"), Fake("b")]).resolve("x", CONTEXT)


def test_an_empty_registry() -> None:
    registry = Registry()
    assert (len(registry), registry.names, list(registry)) == (0, [], [])
    assert not registry
    with pytest.raises(InvalidSpec, match=r'no provider claims "x"; registered: \[\]'):
        registry.resolve("x", CONTEXT)


def test_a_registry_knows_its_length_and_content() -> None:
    providers = [Fake("a"), Fake("b"), Fake("c")]
    registry = Registry(providers)
    assert len(registry) == 3
    assert registry
    assert list(registry) == providers


def test_with_provider_leaves_the_registry_as_it_was() -> None:
    one = Registry([Fake("a")])
    two = one.with_provider(Fake("b"))
    assert (one.names, two.names) == (["a"], ["a", "b"])


class Loader:
    """Counts how often the further providers are loaded."""

    def __init__(self, *providers: RootfsProvider) -> None:
        self.calls = 0
        self._providers = providers

    def __call__(self) -> Iterator[RootfsProvider]:
        self.calls += 1
        yield from self._providers


def resolve_in_vain(registry: Registry) -> None:
    with pytest.raises(InvalidSpec):
        registry.resolve("x", CONTEXT)


USES: list[Callable[[Registry], object]] = [
    len,
    list,
    lambda registry: registry.names,
    lambda registry: resolved(registry, "b:x"),
    resolve_in_vain,
]


@pytest.mark.parametrize("use", USES)
def test_further_providers_are_loaded_once_and_only_when_they_are_wanted(use: Callable[[Registry], object]) -> None:
    load = Loader(Fake("b", "b:"))
    registry = Registry([Fake("a", "a:")], load)
    assert resolved(registry, "a:x") == Path("/a")
    assert load.calls == 0
    for _ in range(2):
        use(registry)
        assert load.calls == 1


def test_further_providers_come_last() -> None:
    registry = Registry([Fake("a")], Loader(Fake("c"))).with_provider(Fake("b"))
    assert registry.names == ["a", "b", "c"]


def test_the_default_registry_starts_with_what_vmette_has() -> None:
    assert default_registry().names == ["builtin", "squashfs", "tar", "dir", "oci"]
    builtin, _, _, directory, _ = default_registry()
    assert isinstance(builtin, BuiltinProvider)
    assert isinstance(directory, DirProvider)


def test_the_default_registry_resolves_a_directory(tmp_path: Path) -> None:
    assert resolved(default_registry(), str(tmp_path)) == tmp_path

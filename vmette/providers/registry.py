"""The registry: an ordered list of providers, of which the first that claims a spec resolves it."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Iterable, Iterator

from .base import Artifact, Context, InvalidSpec, RootfsProvider
from .builtin import BuiltinProvider
from .dir import DirProvider

logger = logging.getLogger(__name__)

ENTRY_POINTS = "vmette.providers"


class Registry:
    """Providers in the order in which they are asked: register the specific ones first, a catch-all last.

    `more` gives further providers, asked after the others; each is taken only when none before it claims a spec.
    """

    def __init__(
        self, providers: Iterable[RootfsProvider] = (), more: Callable[[], Iterable[RootfsProvider]] | None = None
    ) -> None:
        self._providers = tuple(providers)
        self._more = more
        self._taken: list[RootfsProvider] = []
        self._rest: Iterator[RootfsProvider] | None = None

    def with_provider(self, provider: RootfsProvider) -> Registry:
        """A registry with `provider` after those of this one."""
        return Registry((*self._providers, provider), self._more)

    def __iter__(self) -> Iterator[RootfsProvider]:
        yield from self._providers
        if self._rest is None:
            self._rest = iter(self._more() if self._more is not None else ())
        for number in itertools.count():
            if number == len(self._taken):
                provider = next(self._rest, None)
                if provider is None:
                    return
                self._taken.append(provider)
            yield self._taken[number]

    def resolve(self, spec: str, context: Context) -> Artifact:
        """Has the first provider that claims `spec` resolve it.

        Raises:
            InvalidSpec: none claims it.
            ProviderError: the one that does cannot resolve it.
        """
        for provider in self:
            if provider.matches(spec):
                return provider.provide(spec, context)
        quoted = json.dumps(spec, ensure_ascii=False)
        raise InvalidSpec(f"no provider claims {quoted}; registered: [{', '.join(self.names)}]")

    @property
    def names(self) -> list[str]:
        """The providers' names in order."""
        return [provider.name for provider in self]

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _installed() -> Iterator[RootfsProvider]:
    """The providers of other packages. One that does not load is reported and left out: it must not stop the others."""
    from importlib.metadata import entry_points

    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        try:
            provider = entry.load()()
            known = isinstance(provider, RootfsProvider) and isinstance(provider.name, str)
        except Exception as error:  # whatever another's package raises
            logger.warning("provider %s (%s) does not load: %s", entry.name, entry.value, error)
            continue
        if known:
            yield provider
        else:
            logger.warning(
                "provider %s (%s) is no provider: it lacks name, matches or provide", entry.name, entry.value
            )


def _all() -> Iterator[RootfsProvider]:
    """Paths of archives and images come before paths of directories, and what claims every name comes last."""
    from .squashfs import SquashfsProvider
    from .tar import TarProvider

    yield SquashfsProvider()
    yield TarProvider()
    yield DirProvider()
    yield from _installed()
    from .oci.provider import OciProvider

    yield OciProvider()


def default_registry() -> Registry:
    """The built-in providers and those that other packages installed. Each is imported when it is its turn."""
    return Registry((BuiltinProvider(),), _all)

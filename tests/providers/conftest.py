"""For tests of the providers that download."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.providers import web
from tests.providers.web import Site


@pytest.fixture
def site() -> Iterator[Site]:
    with web.site() as server:
        yield server

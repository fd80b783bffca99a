r"""A plugin of pytest, which finds it by itself: the fixture `vmette_sandbox`, a fresh microVM for a test.

>>> @pytest.mark.vmette(rootfs="alpine:3.20", mem_mib=256)
... def test_it(vmette_sandbox):
...     assert vmette_sandbox.run(["uname"], text=True).stdout == "Linux\n"
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .sandbox import Sandbox


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the setting `vmette_rootfs`."""
    parser.addini("vmette_rootfs", "the root filesystem of the fixture vmette_sandbox", default="builtin://base")


def pytest_configure(config: pytest.Config) -> None:
    """Adds the marker `vmette`."""
    config.addinivalue_line(
        "markers", "vmette(**options): the fixture vmette_sandbox is vmette.Sandbox(**options), rootfs among them"
    )


@pytest.fixture
def vmette_sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """A :class:`vmette.Sandbox` that has booted, of this test alone.

    Its options are those of the markers `vmette` of the test, of its class and of its module, the nearest first.
    """
    from .sandbox import Sandbox  # every run of pytest, of any project, loads this module

    options = {"rootfs": request.config.getini("vmette_rootfs")}
    for marker in reversed([*request.node.iter_markers("vmette")]):
        if marker.args:
            raise pytest.UsageError(f"the marker vmette takes options by their names, not {marker.args[0]!r}")
        options.update(marker.kwargs)
    with Sandbox(**options) as sandbox:
        yield sandbox

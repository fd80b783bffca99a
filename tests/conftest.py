from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--arch", default=None, help="the guest's architecture for the tests in tests/vm (the host's)")

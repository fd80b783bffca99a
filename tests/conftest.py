from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--arch", default=None, help="also run the tests of this guest architecture")

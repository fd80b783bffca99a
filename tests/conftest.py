from __future__ import annotations

import signal

import pytest


def pytest_configure() -> None:
    """What started this run (nohup, a shell's `&`) may have had signals ignored, which all programs would inherit."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--arch", default=None, help="also run the tests of this guest architecture")


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Last of all, a line for each failure: of a CI run, sometimes nothing but the end of the output is kept."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None:
        return
    failed = [*reporter.stats.get("failed", []), *reporter.stats.get("error", [])]
    for report in failed[:10]:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = str(crash.message if crash is not None else report.longrepr)
        print(f"{report.nodeid}: {' '.join(message.split())[:200]}")

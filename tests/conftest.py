from __future__ import annotations

import os
import signal

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Sets up the process that all tests run in."""
    _take_signals()
    if not config.getoption("--templates"):  # each test boots its own machine, and leaves nothing in the background
        os.environ["VMETTE_TEMPLATES"] = "0"
    config.addinivalue_line("markers", "only_qemu: tests what only QEMU has or does")
    if config.getoption("--backend") == "vz":
        from tests.fake_vz.build import program

        os.environ |= {"VMETTE_VMM": "vz", "VMETTE_VZ": str(program()), "VMETTE_VSOCK": "relay"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With another VMM, leaves out what is QEMU's."""
    if config.getoption("--backend") != "qemu":
        left_out = [item for item in items if item.get_closest_marker("only_qemu")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def _take_signals() -> None:
    """What started this run (nohup, a shell's `&`) may have had signals ignored, which all programs would inherit."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGQUIT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--arch", default=None, help="also run the tests of this guest architecture")
    parser.addoption("--templates", action="store_true", help="have machines wake from templates where they can")
    parser.addoption("--backend", default="qemu", choices=["qemu", "vz"], help="what runs VMs; vz is a stand-in here")


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

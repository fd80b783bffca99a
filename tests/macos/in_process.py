"""Runs a machine by `vmette._vz` within this process: see test_shim.py."""

from __future__ import annotations

import socket
import threading
from typing import Any

from _vz import ffi, lib  # type: ignore[import-not-found]

from vmette import assets

ended = threading.Event()


@ffi.def_extern()  # type: ignore[untyped-decorator]
def vmette_vz_ended(context: Any, error: Any) -> None:
    """The machine's end."""
    assert error == ffi.NULL
    ended.set()


def main() -> None:
    """Boots a guest that lacks a root, and says so."""
    arch = assets.host_arch()
    control, theirs = socket.socketpair()
    error, capabilities = ffi.new("struct vz_error *"), ffi.new("struct vz_capabilities *")
    lib.vz_capabilities(capabilities)
    assert capabilities.supported
    assert capabilities.entitled
    name = ffi.new("char[]", b"vmette.control")
    port = ffi.new("struct vz_port *", {"name": name, "fd": theirs.fileno()})
    paths = [ffi.new("char[]", str(path).encode()) for path in (assets.kernel(arch), assets.initramfs(arch))]
    line = ffi.new("char[]", b"console=hvc0 quiet panic=-1")
    config = ffi.new(
        "struct vz_config *",
        {
            "kernel": paths[0],
            "initrd": paths[1],
            "cmdline": line,
            "cpus": 1,
            "memory": 256 << 20,
            "console": -1,
            "ports": port,
            "port_count": 1,
            "entropy": True,
        },
    )
    machine = lib.vz_create(config, lib.vmette_vz_ended, ffi.NULL, error)
    assert machine != ffi.NULL, ffi.string(error.text)
    assert lib.vz_start(machine, error), ffi.string(error.text)
    control.settimeout(60)
    assert control.recv(1)
    print("said something")
    assert lib.vz_stop(machine, error) or lib.vz_state(machine) == lib.VZ_STOPPED
    assert ended.wait(60)
    print("stopped")
    lib.vz_release(machine)


main()

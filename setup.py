"""What pyproject.toml cannot say: the native parts. cffi's modules everywhere; on a Mac also vmette-vz, signed.

On a Mac this needs Xcode's command line tools. The guest's kernel is built on Linux only: what runs in the guest comes
out of a released wheel, whose vmette/_payload/aarch64 is to be put into vmette/_payload here before, or named later by
VMETTE_ASSETS_DIR.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

MODULES = ["csrc/native_build.py:ffi"]
DEPLOYMENT_TARGET = "13.0"
"""Named console ports are of macOS 13."""
PROGRAM = Path("vmette", "_payload", "macos", "vmette-vz")
SOURCES = ("csrc/vmm_main.c", "csrc/vz_shim.m")
FRAMEWORKS = ("Foundation", "CoreFoundation", "Security", "Virtualization")
ENTITLEMENTS = "vmette/vmm/vmette-vz.entitlements"


class BuildForMacos(build_ext):
    """Builds vmette-vz beside the modules."""

    def run(self) -> None:
        """Builds all that is native."""
        super().run()
        program = Path() / PROGRAM if self.inplace else Path(self.build_lib, PROGRAM)
        program.parent.mkdir(parents=True, exist_ok=True)
        compiler = ["clang", "-arch", "arm64", f"-mmacosx-version-min={DEPLOYMENT_TARGET}", "-fobjc-arc"]
        compiler += ["-std=c11", "-O2", "-Wall", "-Wextra", *SOURCES, "-o", str(program)]
        compiler += [word for name in FRAMEWORKS for word in ("-framework", name)]
        signer = ["/usr/bin/codesign", "--sign", "-", "--force", "--identifier", program.name]
        signer += ["--entitlements", ENTITLEMENTS, str(program)]
        for command in (compiler, signer):
            subprocess.run(command, check=True)


commands: dict[str, type[build_ext]] = {}
if sys.platform == "darwin":
    MODULES.append("csrc/vz_build.py:ffi")
    commands["build_ext"] = BuildForMacos
    # Virtualization.framework's machines are for Apple silicon, whatever else this Python itself can run on.
    os.environ.setdefault("ARCHFLAGS", "-arch arm64")
    # A Python for a later macOS takes no extension for an earlier one.
    if float(sysconfig.get_config_var("MACOSX_DEPLOYMENT_TARGET") or 0) < float(DEPLOYMENT_TARGET):
        os.environ.setdefault("MACOSX_DEPLOYMENT_TARGET", DEPLOYMENT_TARGET)

setup(
    cffi_modules=MODULES,
    cmdclass=commands,
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)

"""The API reference that `make docs` writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import vmette


def test_the_reference_has_every_public_name(tmp_path: Path) -> None:
    makefile = Path(__file__).parents[1] / "Makefile"
    line = next(line for line in makefile.read_text().splitlines() if "/pdoc " in line)
    words = line.split("/pdoc ")[1].replace("build/docs", str(tmp_path)).split()
    subprocess.run([sys.executable, "-m", "pdoc", *words], check=True, stderr=subprocess.DEVNULL)
    page = (tmp_path / "vmette.html").read_text()
    assert [name for name in vmette.__all__ if not name.startswith("_") and f'id="{name}"' not in page] == []
    assert 'id="MachineOptions.allow_hosts"' in (tmp_path / "vmette" / "machine.html").read_text()

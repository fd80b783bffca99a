"""`vmette.run`, from Python."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import vmette
from tests.vm.support import BASE
from vmette.providers import BlockFs, BlockImage, Context, Registry


def test_the_result_is_shaped_after_subprocess() -> None:
    done = vmette.run(BASE, ["sh", "-c", "cat; echo err >&2; exit 3"], input=b"\xff\0in")
    assert done == vmette.CompletedProcess(("sh", "-c", "cat; echo err >&2; exit 3"), 3, b"\xff\0in", b"err\n")
    assert [timing.name for timing in done.timings][-1] == "end"
    assert vmette.run(BASE, ["sh", "-c", "kill -TERM $$"]).returncode == -15


def test_text() -> None:
    done = vmette.run(BASE, ["sh", "-c", r"cat; printf '\377'"], input="grüß\n", text=True)
    assert done.stdout == "grüß\n\ufffd"


def test_check_raises_with_the_output() -> None:
    with pytest.raises(vmette.CalledProcessError) as caught:
        vmette.run(BASE, ["sh", "-c", "echo out; echo err >&2; exit 9"], check=True)
    assert (caught.value.returncode, caught.value.stdout, caught.value.stderr) == (9, b"out\n", b"err\n")
    assert vmette.run(BASE, ["true"], check=True).returncode == 0


def test_a_time_out_carries_the_output_so_far() -> None:
    with pytest.raises(vmette.TimeoutExpired) as caught:
        vmette.run(BASE, ["sh", "-c", "echo out; echo err >&2; sleep 1000"], timeout=8, text=True)
    assert (caught.value.timeout, caught.value.stdout, caught.value.stderr) == (8, "out\n", "err\n")


def test_output_is_bounded() -> None:
    with pytest.raises(vmette.OutputTooLarge, match="more than 1000 bytes"):
        vmette.run(BASE, ["yes"], max_output=1000)


def test_missing_command() -> None:
    with pytest.raises(vmette.CommandNotStarted, match="no command 'nothing'") as caught:
        vmette.run(BASE, ["nothing"])
    assert caught.value.exit_code == 127


def test_environment_directory_user() -> None:
    done = vmette.run(BASE, ["sh", "-c", "echo $A; pwd; id -u"], env={"A": "b c"}, cwd="/usr", user="12:34", text=True)
    assert done.stdout == "b c\n/usr\n12\n"


def test_eight_at_once_from_threads() -> None:
    barrier = threading.Barrier(8)

    def one(number: int) -> bytes:
        barrier.wait()
        return vmette.run(BASE, ["sh", "-c", f"sleep 1; echo {number}"]).stdout

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(8))) == [b"%d\n" % number for number in range(8)]


class _Image:
    """A provider that takes its spec for the path of a squashfs image, whatever is in it."""

    name = "image"

    def matches(self, spec: str) -> bool:
        return spec.startswith("image:")

    def provide(self, spec: str, context: Context) -> BlockImage:
        return BlockImage(Path(spec.removeprefix("image:")), BlockFs.SQUASHFS)


def test_an_image_that_does_not_mount_is_told_with_its_reason(tmp_path: Path) -> None:
    image = tmp_path / "bad.squashfs"
    image.write_bytes(b"hsqs" + bytes(65532))
    message = r"cannot mount /dev/vda \(squashfs\) at /lower: Invalid argument"
    with pytest.raises(vmette.GuestError, match=message):
        vmette.run(f"image:{image}", ["true"], registry=Registry([_Image()]))


def test_an_image_is_not_written_to(tmp_path: Path) -> None:
    """Not even by root in the guest, who has the disk's device."""
    from vmette.assets import base_image

    image = tmp_path / "copy.squashfs"
    image.write_bytes(base_image().read_bytes())
    script = "blockdev --setrw /dev/vda; dd if=/dev/zero of=/dev/vda bs=4096 count=8 conv=fsync; sync; echo tried"
    done = vmette.run(f"image:{image}", ["sh", "-c", script], registry=Registry([_Image()]))
    assert done.stdout == b"tried\n"
    assert image.read_bytes() == base_image().read_bytes()

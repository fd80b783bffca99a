"""Our signer of Mach-O files against a reader that knows nothing of it, and against what other signers have written."""

from __future__ import annotations

import plistlib
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import lief
import pytest

from tests.macos.code_signature import InvalidSignature, decode_entitlements, image, verify
from tests.macos.conftest import compiled
from tools import codesign
from tools.artifacts import BuildError
from tools.codesign import MachOError, sign

ENTITLEMENTS = (Path(__file__).parents[2] / "vmette/vmm/vmette-vz.entitlements").read_bytes()
VALUES = {"com.apple.security.virtualization": True}
EMPTY_REQUIREMENTS = bytes.fromhex("fade0c01 0000000c 00000000")
EMPTY_WRAPPER = bytes.fromhex("fade0b01 00000008")


def unsigned(data: bytes) -> bytes:
    """`data` without its signature, whose load command is the last one, as linkers have it."""
    start, _ = image(data).signature or (0, 0)
    result = bytearray(data[:start])
    count, size = struct.unpack_from("<2I", data, 16)
    assert struct.unpack_from("<I", data, 32 + size - 16) == (0x1D,)
    result[32 + size - 16 : 32 + size] = bytes(16)
    struct.pack_into("<2I", result, 16, count - 1, size - 16)
    at = result.index(b"__LINKEDIT\0")
    struct.pack_into("<Q", result, at + 40, start - image(data).segments["__LINKEDIT"][0])
    return bytes(result)


# --- What is written


def test_a_program(program: bytes) -> None:
    signature = verify(sign(program, "org.example.program", ENTITLEMENTS))
    assert (signature.identifier, signature.version, signature.flags) == ("org.example.program", 0x20400, 0x2)
    assert (signature.page_size, signature.exec_flags) == (0x4000, 1)
    assert list(signature.blobs) == [0, 2, 5, 7, 0x10000]
    assert (signature.blobs[2], signature.blobs[0x10000]) == (EMPTY_REQUIREMENTS, EMPTY_WRAPPER)
    assert signature.blobs[5][8:] == ENTITLEMENTS
    assert signature.entitlements == signature.der_entitlements == VALUES
    # Info.plist, resources, and what is for the disk's own form: there are none of a bare program.
    assert [slot for slot, digest in enumerate(signature.special_slots, 1) if digest == bytes(32)] == [1, 3, 4, 6]


def test_a_library(library: bytes) -> None:
    signature = verify(sign(library, "library"))
    assert (signature.exec_flags, list(signature.blobs), len(signature.special_slots)) == (0, [0, 2, 0x10000], 2)
    assert signature.entitlements is None
    with pytest.raises(BuildError, match="only a program"):
        sign(library, "library", ENTITLEMENTS)


def test_nothing_but_the_signature_changes(program: bytes) -> None:
    signed = sign(program, "program", ENTITLEMENTS)
    end = struct.unpack_from("<I", program, 20)[0] + 32
    start, _ = image(program).signature or (0, 0)
    assert signed[end:start] == program[end:start]
    before, after = image(program), image(signed)
    assert {name: where for name, where in before.segments.items() if name != "__LINKEDIT"} == {
        name: where for name, where in after.segments.items() if name != "__LINKEDIT"
    }


def test_the_same_bytes_again(program: bytes, library: bytes) -> None:
    signed = sign(program, "program", ENTITLEMENTS)
    assert sign(signed, "program", ENTITLEMENTS) == signed == sign(program, "program", ENTITLEMENTS)
    assert sign(sign(program, "a much longer name", ENTITLEMENTS), "program", ENTITLEMENTS) == signed
    assert sign(sign(library, "library"), "library") == sign(library, "library")


def test_what_is_not_signed_gets_a_load_command(program: bytes) -> None:
    bare = unsigned(program)
    with pytest.raises(InvalidSignature, match="no signature"):
        verify(bare)
    assert verify(sign(bare, "program", ENTITLEMENTS)).entitlements == VALUES
    assert sign(bare, "program", ENTITLEMENTS) == sign(program, "program", ENTITLEMENTS)


def test_there_must_be_room_for_the_load_command(program: bytes) -> None:
    bare = bytearray(unsigned(program))
    size = struct.unpack_from("<I", bare, 20)[0]
    bare[32 + size + 15] = 1
    with pytest.raises(MachOError, match="no room"):
        sign(bytes(bare), "program")


def test_another_parser_of_load_commands(program: bytes, library: bytes) -> None:
    for data in (sign(program, "program", ENTITLEMENTS), sign(unsigned(library), "library")):
        binary = lief.MachO.parse(list(data))
        assert binary is not None
        parsed = binary.at(0)
        assert parsed is not None
        assert lief.MachO.check_layout(parsed) == (True, "")
        command, linkedit = parsed.code_signature, parsed.get_segment("__LINKEDIT")
        assert command is not None
        assert linkedit is not None
        assert (command.data_offset, command.data_size) == image(data).signature
        assert linkedit.file_offset + linkedit.file_size == len(data)
        assert bytes(command.content[:4]) == bytes.fromhex("fade0cc0")


# --- What others have written


def test_the_reader_takes_what_the_linker_signs(program: bytes, library: bytes) -> None:
    for data in (program, library):
        signature = verify(data)
        assert (signature.flags, list(signature.blobs)) == (0x20002, [0])  # ad hoc, by the linker


@pytest.fixture(scope="session")
def apples(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A library that Apple's codesign has signed ad hoc."""
    directory = tmp_path_factory.mktemp("apples")
    wanted = ["--no-deps", "--only-binary", ":all:", "--platform", "macosx_11_0_arm64", "--python-version", "3.11"]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", *wanted]
    subprocess.run([*command, "--dest", directory, "pillow==13.0.0"], check=True)
    with zipfile.ZipFile(next(directory.glob("*.whl"))) as wheel:
        return wheel.read("PIL/_webp.cpython-311-darwin.so")


def test_apples_codesign_writes_the_same(apples: bytes) -> None:
    theirs = verify(apples)
    ours = verify(sign(apples, theirs.identifier))
    assert {slot: blob for slot, blob in ours.blobs.items() if slot} == {
        slot: blob for slot, blob in theirs.blobs.items() if slot
    }
    # The code directory too, but for the first page's hash: how much room the signature has is in that page.
    first = len(ours.blobs[0]) - 32 * -(-ours.code_limit // ours.page_size)
    assert ours.blobs[0][:first] == theirs.blobs[0][:first]
    assert ours.blobs[0][first + 32 :] == theirs.blobs[0][first + 32 :]
    assert len(ours.blobs[0]) > first + 32


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "7005 020101 b000"),
        ({"key": False}, "700f 020101 b00a 3008 0c036b6579 010100"),
        ({"key": True}, "700f 020101 b00a 3008 0c036b6579 0101ff"),
        ({"b": True, "a": True}, "7015 020101 b010 3006 0c0161 0101ff 3006 0c0162 0101ff"),
    ],
)
def test_der_as_apples_codesign_has_it(values: dict[str, bool], expected: str) -> None:
    xml = plistlib.dumps(values, sort_keys=False)
    assert codesign.der(xml) == bytes.fromhex(expected)
    assert decode_entitlements(codesign.der(xml)) == values


@pytest.mark.parametrize("size", [1, 100, 117, 118, 127, 128, 240, 250, 300, 70_000])
def test_der_of_every_length(size: int) -> None:
    values = {"k" * size: True, "other": False}
    assert decode_entitlements(codesign.der(plistlib.dumps(values))) == values


@pytest.mark.parametrize(
    "entitlements",
    [b"", b"no list", plistlib.dumps([True]), plistlib.dumps({"key": 1}), plistlib.dumps({"key": "yes"})],
)
def test_entitlements_that_we_cannot_write(program: bytes, entitlements: bytes) -> None:
    with pytest.raises(BuildError, match="entitlements"):
        sign(program, "program", entitlements)


# --- What is not signed, or not so any more


@pytest.mark.parametrize("part", ["header", "code", "names", "identifier", "entitlements", "der"])
def test_a_flipped_bit_is_found(program: bytes, part: str) -> None:
    signed = bytearray(sign(program, "the.identifier", ENTITLEMENTS))
    verify(bytes(signed))
    offset, _ = image(program).signature or (0, 0)
    where = {
        "header": 24,
        "code": signed.index(b"a program"),
        "names": offset - 20,
        "identifier": signed.index(b"the.identifier"),
        "entitlements": signed.index(b"<true/>", offset) + 1,
        "der": len(signed.rstrip(b"\0")) - EMPTY_WRAPPER.rindex(b"\x08") - 2,
    }
    signed[where[part]] ^= 1
    if part == "identifier":  # which only a cdhash, known beforehand, covers
        assert verify(bytes(signed)).identifier == "uhe.identifier"
    else:
        with pytest.raises(InvalidSignature, match="another hash"):
            verify(bytes(signed))


def test_other_files(program: bytes, tmp_path: Path) -> None:
    intel = compiled(tmp_path, "int f(void) { return 1; }\n", "-shared", target="x86_64-macos.13.0")
    fat = struct.pack(">2I5I", 0xCAFEBABE, 1, 0x0100000C, 0, 64, len(program), 6).ljust(64, b"\0") + program
    for data in (b"", b"#!/bin/sh\n", b"\x7fELF".ljust(4096, b"\0"), intel, fat, program[:31]):
        with pytest.raises(MachOError):
            sign(data, "x")
    with pytest.raises(MachOError, match="neither a program nor a library"):
        sign(program[:12] + b"\1" + program[13:], "x")


@pytest.mark.parametrize("size", [32, 40, 100, 500, 2000, 20_000, 40_000])
def test_cut_off(program: bytes, size: int) -> None:
    with pytest.raises(MachOError):
        sign(program[:size], "x")
    with pytest.raises(MachOError):
        sign(program[:-1], "x")


def commands(data: bytes) -> dict[int, int]:
    """Kind → where the first load command of that kind is."""
    result: dict[int, int] = {}
    at = 32
    for _ in range(struct.unpack_from("<I", data, 16)[0]):
        kind, size = struct.unpack_from("<2I", data, at)
        result.setdefault(kind, at)
        at += size
    return result


SEGMENT, SYMTAB, UUID, SIGNATURE = 0x19, 0x2, 0x1B, 0x1D


@pytest.mark.parametrize(
    ("kind", "offset", "value", "message"),
    [
        (None, 16, 0xFFFFFFFF, "cut off"),
        (None, 16, 1, "not as long as"),
        (None, 20, 0xFFFFFFF8, "cut off"),
        (None, 20, 8, "impossible size"),
        (UUID, 4, 0, "impossible size"),
        (UUID, 4, 4, "impossible size"),
        (UUID, 4, 25, "impossible size"),
        (UUID, 4, 0xFFFFFFF8, "impossible size"),
        (UUID, 0, SEGMENT, "cut off"),
        (UUID, 0, SIGNATURE, "another size"),
        (SEGMENT, 40, 0x7FFFFFFF, "beyond the file"),
        (SEGMENT, 64, 0xFFFFFFFF, "sections"),
        (SIGNATURE, 4, 24, "impossible size"),
        (SIGNATURE, 8, 0, "not at its end"),
        (SIGNATURE, 12, 8, "not at its end"),
        (SYMTAB, 20, 0xFFFFFF, "not at its end"),
    ],
)
def test_contradictions(program: bytes, kind: int | None, offset: int, value: int, message: str) -> None:
    data = bytearray(program)
    struct.pack_into("<I", data, (commands(program)[kind] if kind is not None else 0) + offset, value)
    with pytest.raises(MachOError, match=message):
        sign(bytes(data), "x")


def test_segments_missing_twice_or_over_each_other(program: bytes) -> None:
    with pytest.raises(MachOError, match="there twice"):
        sign(program.replace(b"__DATA\0\0", b"__TEXT\0\0", 1), "x")
    with pytest.raises(MachOError, match="no segment b'__LINKEDIT'"):
        sign(program.replace(b"__LINKEDIT\0", b"__ELSEWHER\0", 1), "x")
    at = program.index(b"__LINKEDIT\0")
    offset, size, _ = image(program).segments["__LINKEDIT"]
    moved = bytearray(program)
    struct.pack_into("<2Q", moved, at + 32, offset - 0x4000, size + 0x4000)
    with pytest.raises(MachOError, match="overlaps"):
        sign(bytes(moved), "x")


def test_a_section_over_the_load_commands(program: bytes) -> None:
    moved = bytearray(program)
    struct.pack_into("<I", moved, program.index(b"__text\0\0") + 48, 64)
    with pytest.raises(MachOError, match="first section"):
        sign(bytes(moved), "x")

"""Reads and verifies the signature in a Mach-O file for arm64. It shares nothing with tools/codesign.py, which writes
them: what it knows is from the structures in xnu's osfmk/kern/cs_blobs.h and <mach-o/loader.h>.
"""

from __future__ import annotations

import hashlib
import plistlib
from dataclasses import dataclass, field
from typing import Any, Literal


class InvalidSignature(ValueError):
    """The signature is malformed, or not of this file."""


def need(condition: object, what: str) -> None:
    if not condition:
        raise InvalidSignature(what)


class View:
    """Bytes with integers in them, none of which can be read beyond the end."""

    def __init__(self, data: bytes, order: Literal["little", "big"]) -> None:
        self.data, self.order = data, order

    def cut(self, start: int, size: int) -> bytes:
        need(min(start, size) >= 0 and start + size <= len(self.data), f"{size} bytes at {start} are not there")
        return self.data[start : start + size]

    def number(self, start: int, size: int = 4) -> int:
        return int.from_bytes(self.cut(start, size), self.order)


@dataclass
class Image:
    """The segments, name → (offset, size, size in memory), and the place of the signature."""

    file_type: int
    segments: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    signature: tuple[int, int] | None = None


def image(data: bytes) -> Image:
    view = View(data, "little")
    need(view.number(0) == 0xFEEDFACF and view.number(4) == 0x0100000C, "not a thin Mach-O file for arm64")
    result = Image(file_type=view.number(12))
    at = 32
    for _ in range(view.number(16)):
        kind, size = view.number(at), view.number(at + 4)
        need(size >= 8, "a load command is too small")
        if kind == 0x19:
            name = view.cut(at + 8, 16).rstrip(b"\0").decode()
            result.segments[name] = (view.number(at + 40, 8), view.number(at + 48, 8), view.number(at + 32, 8))
        elif kind == 0x1D:
            need(result.signature is None, "two signatures")
            result.signature = (view.number(at + 8), view.number(at + 12))
        at += size
    need(at == 32 + view.number(20), "the load commands have another size")
    return result


@dataclass
class Signature:
    identifier: str
    version: int
    flags: int
    page_size: int
    code_limit: int
    exec_segment: tuple[int, int]
    exec_flags: int
    special_slots: list[bytes]
    """Hashes of the slots from 1 on."""
    blobs: dict[int, bytes]
    """Slot → the part, with its head."""

    @property
    def entitlements(self) -> dict[str, Any] | None:
        if 5 not in self.blobs:
            return None
        value = plistlib.loads(self.blobs[5][8:])
        assert isinstance(value, dict)
        return value

    @property
    def der_entitlements(self) -> dict[str, Any] | None:
        return None if 7 not in self.blobs else decode_entitlements(self.blobs[7][8:])


MAGICS = {0: 0xFADE0C02, 2: 0xFADE0C01, 5: 0xFADE7171, 7: 0xFADE7172, 0x10000: 0xFADE0B01}


def verify(data: bytes) -> Signature:
    """The signature of `data`, with everything in it that can be verified verified.

    Raises:
        InvalidSignature: there is none, or it is wrong.
    """
    file = image(data)
    need(file.signature is not None, "no signature")
    assert file.signature is not None
    start, size = file.signature
    need(start % 16 == 0, "the signature is not aligned")
    need(start + size == len(data), "the signature is not the end of the file")
    offset, in_file, in_memory = file.segments["__LINKEDIT"]
    need(offset + in_file == len(data), "__LINKEDIT is not the end of the file")
    need(in_memory >= in_file and in_memory % 0x4000 == 0, "__LINKEDIT's size in memory is wrong")
    blobs = read_blobs(View(View(data, "little").cut(start, size), "big"))
    need(0 in blobs, "no code directory")
    return verify_directory(View(blobs[0], "big"), blobs, data, start, file)


def read_blobs(view: View) -> dict[int, bytes]:
    need(view.number(0) == 0xFADE0CC0, "not an embedded signature")
    total, count = view.number(4), view.number(8)
    need(total <= len(view.data), "the signature is cut off")
    blobs: dict[int, bytes] = {}
    end = 12 + 8 * count
    for index in range(count):
        slot, offset = view.number(12 + 8 * index), view.number(16 + 8 * index)
        need(slot in MAGICS and slot not in blobs, f"slot {slot:#x} is unknown, or there twice")
        need(offset == end, f"slot {slot:#x} is not where the one before it ends")
        need(view.number(offset) == MAGICS[slot], f"slot {slot:#x} has another's magic")
        blobs[slot] = view.cut(offset, view.number(offset + 4))
        end = offset + len(blobs[slot])
        need(end <= total, f"slot {slot:#x} is cut off")
    need(end == total, "the signature has another size")
    need(list(blobs) == sorted(blobs), "the slots are not in order")
    return blobs


def verify_directory(view: View, blobs: dict[int, bytes], data: bytes, start: int, file: Image) -> Signature:
    version = view.number(8)
    need(version >= 0x20400, f"the code directory is of version {version:#x}")
    hashes, name, special, pages, limit = (view.number(at) for at in (16, 20, 24, 28, 32))
    need(view.number(36, 1) == 32 and view.number(37, 1) == 2, "not hashed with SHA-256")
    need(view.number(39, 1) in (12, 14), "a page is neither 4 nor 16 KiB")
    for at, size in ((38, 1), (40, 4), (44, 4), (48, 4), (52, 4), (56, 8)):
        need(view.number(at, size) == 0, f"what is at {at} in the code directory is not 0")
    need(name >= 88, "the identifier is in the head of the code directory")
    need(hashes - 32 * special == view.data.index(b"\0", name) + 1, "the hashes do not follow the identifier")
    need(hashes + 32 * pages == len(view.data), "the code directory has another size")
    need(limit == start, "not all of the file is signed")
    page = 1 << view.number(39, 1)
    need(pages == (limit + page - 1) // page, "the number of pages is wrong")
    for index in range(pages):
        digest = hashlib.sha256(data[index * page : min((index + 1) * page, limit)]).digest()
        need(view.cut(hashes + 32 * index, 32) == digest, f"page {index} has another hash")
    slots = [view.cut(hashes - 32 * slot, 32) for slot in range(1, special + 1)]
    need(all(slot == 0 or slot <= special for slot in blobs if slot < 0x1000), "there is a part without a hash")
    for slot, hashed in enumerate(slots, 1):
        digest = hashlib.sha256(blobs[slot]).digest() if slot in blobs else bytes(32)
        need(hashed == digest, f"slot {slot} has another hash")
    base, extent, exec_flags = (view.number(at, 8) for at in (64, 72, 80))
    need((base, extent) == file.segments["__TEXT"][:2], "the code is not where the code directory says")
    need(exec_flags == (1 if file.file_type == 2 else 0), "the flags of the code are wrong")
    identifier = view.data[name : view.data.index(b"\0", name)].decode()
    return Signature(identifier, version, view.number(12), page, limit, (base, extent), exec_flags, slots, blobs)


def decode_entitlements(data: bytes) -> dict[str, Any]:
    """What is in the DER form of entitlements: [APPLICATION 16] { INTEGER 1, a dictionary }, in definite lengths."""
    content, rest = unwrap(0x70, data)
    need(rest == b"", "there is something after the entitlements")
    version, dictionary = unwrap(0x02, content)
    need(version == b"\x01", "the entitlements are of another version")
    pairs, rest = unwrap(0xB0, dictionary)
    need(rest == b"", "there is something after the dictionary")
    result: dict[str, Any] = {}
    while pairs:
        pair, pairs = unwrap(0x30, pairs)
        key, tail = unwrap(0x0C, pair)
        value, tail = unwrap(0x01, tail)
        need(tail == b"", "a key has two values")
        need(value in (b"\0", b"\xff"), "a boolean is neither true nor false")
        need(not result or max(result) < key.decode(), "the keys are not in order")
        result[key.decode()] = value == b"\xff"
    return result


def unwrap(tag: int, data: bytes) -> tuple[bytes, bytes]:
    """The content of the value at the start of `data`, and what follows it."""
    view = View(data, "big")
    need(view.number(0, 1) == tag, f"tag {view.number(0, 1):#x} is not {tag:#x}")
    size, at = view.number(1, 1), 2
    if size & 0x80:
        at += size & 0x7F
        need(0 < size & 0x7F <= 4, "a length is indefinite or huge")
        size = view.number(2, at - 2)
        need(size >= 0x80 and data[2] != 0, "a length is not as short as it can be")
    return view.cut(at, size), data[at + size :]

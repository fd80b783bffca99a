"""Signs Mach-O files for Apple silicon ad hoc, as `codesign --sign - --force --entitlements …` does on a Mac.

The layout of a signature is that of xnu's osfmk/kern/cs_blobs.h. What is in one is what Apple's codesign puts there: a
code directory with the hashes of the file's pages and of the other parts, an empty list of requirements, the
entitlements as XML and as DER (which macOS reads since version 12, with the XML beside it for older programs), and an
empty wrapper, for ad hoc there is no CMS signature. All of it is big-endian, in a file that is little-endian.
"""

from __future__ import annotations

import hashlib
import plistlib
import struct
from dataclasses import dataclass

from .artifacts import BuildError

# Mach-O, from <mach-o/loader.h>
MAGIC_64 = 0xFEEDFACF
CPU_ARM64 = 0x0100000C
EXECUTE, DYLIB, BUNDLE = 2, 6, 8
SYMTAB, SEGMENT_64, CODE_SIGNATURE = 0x2, 0x19, 0x1D
HEADER = struct.Struct("<8I")
"""magic, CPU type and subtype, file type, number and bytes of the load commands, flags, nothing."""
COMMAND = struct.Struct("<2I")
"""Its kind and its bytes."""
SEGMENT = struct.Struct("<2I16s4Q4I")
"""After kind and bytes: name, address and size in memory, offset and size in the file, protections, sections, flags."""
SECTION = struct.Struct("<32s2Q8I")
"""Its and its segment's name, address, size, offset in the file, and what does not matter here."""
LINKEDIT_DATA = struct.Struct("<4I")
"""Kind, bytes, offset and size in the file: LC_CODE_SIGNATURE's form."""
SYMBOLS = struct.Struct("<6I")
"""Kind, bytes, offset and number of the symbols, offset and size of their names."""
SEGMENT_ALIGNMENT = 0x4000
"""Apple silicon's page."""
SIGNATURE_ALIGNMENT = 16

# Signatures
CODE_DIRECTORY, REQUIREMENTS, ENTITLEMENTS, DER_ENTITLEMENTS, CMS = 0, 2, 5, 7, 0x10000
"""The slots of the parts."""
MAGICS = {
    CODE_DIRECTORY: 0xFADE0C02,
    REQUIREMENTS: 0xFADE0C01,
    ENTITLEMENTS: 0xFADE7171,
    DER_ENTITLEMENTS: 0xFADE7172,
    CMS: 0xFADE0B01,
}
EMBEDDED_SIGNATURE = 0xFADE0CC0
DIRECTORY = struct.Struct(">9I4B4IQ3Q")
VERSION = 0x20400
"""Of the code directory: the first that tells where the code is, which arm64 wants. A later one would tell nothing."""
ADHOC = 0x2
"""The only flag. Not that of the linker's signatures, which have no entitlements and which tools replace unasked; not
the hardened runtime, which is for notarization: ad hoc anybody can give a program the entitlement, so that there is
nothing to guard, and the copy that vmette signs on a Mac (vmette/vmm/vz.py) is then as this one."""
SHA256 = 2
PAGE_BITS = 14
"""Apple silicon's page, as codesign has it since macOS 26 and zig's linker ever had it. (codesign had 4 KiB before, and
Apple's linker still has; the kernel takes what is between 4 KiB and its own page.)"""
PAGE = 1 << PAGE_BITS
MAIN_BINARY = 1


class MachOError(BuildError):
    """A file is no Mach-O file that can be signed."""


@dataclass(frozen=True)
class Segment:
    """A segment, and where in the file its load command is."""

    command: int
    name: bytes
    offset: int
    size: int

    @property
    def end(self) -> int:
        """Where in the file it ends."""
        return self.offset + self.size


@dataclass(frozen=True)
class MachO:
    """What of a Mach-O file matters for signing it. Offsets are in the file."""

    kind: int
    commands: int
    commands_end: int
    segments: dict[bytes, Segment]
    content: int
    """Where the first section is: up to there are the load commands, and room for more."""
    signature_command: int | None
    code_end: int
    """What is to be signed ends here: the signature that there is begins, or the file ends."""

    @classmethod
    def parse(cls, data: bytes) -> MachO:
        """Reads the load commands.

        Raises:
            MachOError: the file is of another kind, or contradicts itself.
        """
        magic, cpu, _, kind, commands, size, _, _ = _unpack(HEADER, data, 0, len(data))
        if magic != MAGIC_64 or cpu != CPU_ARM64:
            raise MachOError("it is no Mach-O file for arm64 alone")
        if kind not in (EXECUTE, DYLIB, BUNDLE):
            raise MachOError(f"it is neither a program nor a library: its type is {kind}")
        end = HEADER.size + size
        if end > len(data):
            raise MachOError("its load commands are cut off")
        segments: dict[bytes, Segment] = {}
        content, names_end, signature = len(data), 0, None
        position = HEADER.size
        for _ in range(commands):
            command, length = _unpack(COMMAND, data, position, end)
            if length < COMMAND.size or length % 8 or length > end - position:
                raise MachOError(f"the load command at {position} has an impossible size, {length}")
            limit = position + length
            if command == SEGMENT_64:
                segment, first = _segment(data, position, limit)
                if segments.setdefault(segment.name, segment) is not segment:
                    raise MachOError(f"segment {segment.name!r} is there twice")
                content = min(content, first)
            elif command == SYMTAB:
                *_, names, names_size = _unpack(SYMBOLS, data, position, limit)
                names_end = names + names_size
            elif command == CODE_SIGNATURE:
                if signature is not None or length != LINKEDIT_DATA.size:
                    raise MachOError("it has two signatures, or one in a command of another size")
                signature = position
            position = limit
        if position != end:
            raise MachOError("its load commands are not as long as its header says")
        if content < end:
            raise MachOError("its load commands reach into its first section")
        _check_layout(data, segments)
        code_end = len(data)
        if signature is not None:
            _, _, code_end, size = _unpack(LINKEDIT_DATA, data, signature, end)
            if code_end + size != len(data) or code_end < max(segments[b"__LINKEDIT"].offset, names_end):
                raise MachOError("its signature is not at its end")
        return cls(kind, commands, end, segments, content, signature, code_end)


def _unpack(form: struct.Struct, data: bytes, position: int, limit: int) -> tuple[int, ...]:
    """Reads a structure, which must end before `limit`."""
    if position + form.size > limit:
        raise MachOError(f"what is at {position} is cut off")
    return form.unpack_from(data, position)


def _segment(data: bytes, position: int, limit: int) -> tuple[Segment, int]:
    """A segment, and where the first of its sections is that has something in the file."""
    fields = _unpack(SEGMENT, data, position, limit)
    name, offset, size, sections = bytes(fields[2]).rstrip(b"\0"), fields[5], fields[6], fields[9]
    if offset + size > len(data):
        raise MachOError(f"segment {name!r} reaches beyond the file")
    if position + SEGMENT.size + sections * SECTION.size != limit:
        raise MachOError(f"segment {name!r} has another number of sections than it says")
    first = len(data)
    for index in range(sections):
        *_, length, start, _, _, _, _, _, _, _ = SECTION.unpack_from(
            data, position + SEGMENT.size + index * SECTION.size
        )
        if start and length:
            first = min(first, start)
    return Segment(position, name, offset, size), first


def _check_layout(data: bytes, segments: dict[bytes, Segment]) -> None:
    """Segments do not overlap, the code is the first of them, and __LINKEDIT the last, up to the file's end."""
    for name in (b"__TEXT", b"__LINKEDIT"):
        if name not in segments:
            raise MachOError(f"it has no segment {name!r}")
    end = 0
    in_file = [segment for segment in segments.values() if segment.size]
    for segment in sorted(in_file, key=lambda segment: segment.offset):
        if segment.offset < end:
            raise MachOError(f"segment {segment.name!r} overlaps the one before it")
        end = segment.end
    if segments[b"__TEXT"].offset != 0:
        raise MachOError("its code does not begin with its header")
    if segments[b"__LINKEDIT"].end != len(data) or end != len(data):
        raise MachOError("its segment __LINKEDIT is not at its end")


def sign(data: bytes, identifier: str, entitlements: bytes | None = None) -> bytes:
    """The Mach-O file `data` with a new signature in place of any that it has: the same input gives the same bytes.

    `identifier` is the program's name in the signature. `entitlements` is a property list in XML.

    Raises:
        MachOError: `data` is not a program or library for arm64, or has no room for the load command.
        BuildError: the entitlements are for a library, or not such as we can write.
    """
    file = MachO.parse(data)
    if entitlements is not None and file.kind != EXECUTE:
        raise BuildError("only a program can have entitlements")
    parts = {REQUIREMENTS: struct.pack(">I", 0)}  # how many there are
    if entitlements is not None:
        parts |= {ENTITLEMENTS: entitlements, DER_ENTITLEMENTS: der(entitlements)}
    code = bytearray(data[: file.code_end])
    code += bytes(-len(code) % SIGNATURE_ALIGNMENT)
    size = len(_signature(bytes(code), file, identifier, parts))  # which what is signed makes no difference to
    size += -size % SIGNATURE_ALIGNMENT
    _enter(code, file, size)
    return bytes(code) + _signature(bytes(code), file, identifier, parts).ljust(size, b"\0")


def _enter(code: bytearray, file: MachO, size: int) -> None:
    """Writes into the load commands that the signature comes after `code`, and has `size` bytes."""
    position = file.signature_command
    if position is None:
        position = file.commands_end
        if file.content - position < LINKEDIT_DATA.size or any(code[position : position + LINKEDIT_DATA.size]):
            raise MachOError("it has no room for one more load command")
        fields = list(HEADER.unpack_from(code))
        fields[4] += 1
        fields[5] += LINKEDIT_DATA.size
        HEADER.pack_into(code, 0, *fields)
    LINKEDIT_DATA.pack_into(code, position, CODE_SIGNATURE, LINKEDIT_DATA.size, len(code), size)
    linkedit = file.segments[b"__LINKEDIT"]
    values = list(SEGMENT.unpack_from(code, linkedit.command))
    values[6] = len(code) + size - linkedit.offset
    values[4] = values[6] + -values[6] % SEGMENT_ALIGNMENT
    SEGMENT.pack_into(code, linkedit.command, *values)


def _signature(code: bytes, file: MachO, identifier: str, parts: dict[int, bytes]) -> bytes:
    """The signature of `code`: a table of the parts' slots and offsets, and the parts, in the order of the slots."""
    blobs = {slot: _blob(MAGICS[slot], part) for slot, part in parts.items()}
    directory = _code_directory(code, file, identifier, blobs)
    blobs = {CODE_DIRECTORY: directory, **blobs, CMS: _blob(MAGICS[CMS], b"")}
    offset = 12 + 8 * len(blobs)  # of the part, in the signature
    table = struct.pack(">I", len(blobs))
    for slot, blob in blobs.items():
        table += struct.pack(">2I", slot, offset)
        offset += len(blob)
    return _blob(EMBEDDED_SIGNATURE, table + b"".join(blobs.values()))


def _code_directory(code: bytes, file: MachO, identifier: str, blobs: dict[int, bytes]) -> bytes:
    """The hashes of the file's pages, and before them in descending order those of the parts, zeros for what is not."""
    name = identifier.encode() + b"\0"
    count = max(blobs)
    special = [hashlib.sha256(blobs[slot]).digest() if slot in blobs else bytes(32) for slot in range(count, 0, -1)]
    pages = [hashlib.sha256(code[start : start + PAGE]).digest() for start in range(0, len(code), PAGE)]
    text = file.segments[b"__TEXT"]
    names = DIRECTORY.size
    hashes = names + len(name) + 32 * count
    head = (
        MAGICS[CODE_DIRECTORY],
        hashes + 32 * len(pages),
        VERSION,
        ADHOC,
        hashes,
        names,
        count,
        len(pages),
        len(code),
    )
    kinds = (32, SHA256, 0, PAGE_BITS)  # the size of a hash, its kind, the platform of Apple's own programs
    absent = (0, 0, 0, 0, 0)  # a spare, scattered pages, the team's identifier, a spare, a limit of 64 bits
    place = (text.offset, text.size, MAIN_BINARY if file.kind == EXECUTE else 0)
    return DIRECTORY.pack(*head, *kinds, *absent, *place) + name + b"".join(special + pages)


def _blob(magic: int, content: bytes) -> bytes:
    return struct.pack(">2I", magic, 8 + len(content)) + content


def der(entitlements: bytes) -> bytes:
    """A property list with entitlements in the form that macOS reads them from.

    It is [APPLICATION 16] of the INTEGER 1 and a dictionary, which is [CONTEXT 16] of a SEQUENCE for each key, in the
    order of the keys, with the key as a UTF8String and the value.

    Raises:
        BuildError: it is no dictionary, or has other values than true and false, which are all that we need.
    """
    try:
        values = plistlib.loads(entitlements, fmt=plistlib.FMT_XML)
    except Exception as error:  # plistlib lets through what its parser of XML and of each type raises
        raise BuildError(f"the entitlements are no property list in XML: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(value, bool) for value in values.values()):
        raise BuildError("the entitlements are not all true or false")
    pairs = sorted((key.encode(), b"\xff" if value else b"\0") for key, value in values.items())
    items = [_tagged(0x30, _tagged(0x0C, key) + _tagged(0x01, value)) for key, value in pairs]
    return _tagged(0x70, _tagged(0x02, b"\x01") + _tagged(0xB0, b"".join(items)))


def _tagged(tag: int, content: bytes) -> bytes:
    """A value of DER: its tag, its length, which is in the low bits of one byte or follows that byte, and itself."""
    length = len(content)
    if length < 0x80:
        return bytes((tag, length)) + content
    size = length.to_bytes((length.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(size))) + size + content

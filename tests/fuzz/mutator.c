/* The mutator of inputs that script.h describes. */
#include <string.h>

#include "script.h"

enum { MOST = 1 << 16, MAX_UNITS = 4096 };

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t room);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t room, unsigned seed);

static struct part {
    uint8_t bytes[MOST];
    size_t size;
} choices, bytes;

static void set_part(struct part *part, const uint8_t *from, size_t size) {
    part->size = size < MOST ? size : MOST;
    memcpy(part->bytes, from, part->size);
}

/* Replaces `gone` bytes at `at`. What does not fit is cut off at the end. */
static void splice(size_t at, size_t gone, const uint8_t *with, size_t size) {
    size_t rest = bytes.size - at - gone;
    if (size > MOST - at) size = MOST - at;
    if (rest > MOST - at - size) rest = MOST - at - size;
    memmove(bytes.bytes + at + size, bytes.bytes + at + gone, rest);
    memcpy(bytes.bytes + at, with, size);
    bytes.size = at + size + rest;
}

static size_t find_units(size_t starts[MAX_UNITS]) {
    size_t count = 0;
    for (size_t at = 0; at < bytes.size && count < MAX_UNITS; at += unit_length(bytes.bytes + at, bytes.size - at))
        starts[count++] = at;
    return count;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t room, unsigned seed) {
    static size_t starts[MAX_UNITS];
    static uint8_t unit[MOST];
    enum { CHOICES, BYTES, CHANGE, CHANGE_MORE, DOUBLE, DROP, WAYS };
    script_read(data, size);
    set_part(&choices, script.choices, script.choices_left);
    set_part(&bytes, script.bytes, script.size);
    const size_t count = find_units(starts), which = count > 0 ? seed / WAYS % count : 0;
    const size_t at = count > 0 ? starts[which] : 0;
    const size_t length = count > 0 ? unit_length(bytes.bytes + at, bytes.size - at) : 0;
    const size_t place = count > 0 ? starts[(seed / WAYS / count) % count] : 0;
    size_t changed = length;
    memcpy(unit, bytes.bytes + at, length);
    switch (seed % WAYS) {
        case CHOICES:
            choices.size = LLVMFuzzerMutate(choices.bytes, choices.size, room < MOST ? room : MOST);
            break;
        case BYTES:
            bytes.size = LLVMFuzzerMutate(bytes.bytes, bytes.size, room < MOST ? room : MOST);
            break;
        case CHANGE:
        case CHANGE_MORE:
            changed = LLVMFuzzerMutate(unit, length, room < MOST ? room : MOST);
            splice(at, length, unit, unit_repair(unit, changed));
            break;
        case DOUBLE:
            splice(place, 0, unit, length);
            break;
        default:
            splice(at, length, unit, 0);
    }
    if (room < SCRIPT_PREFIX) return 0;
    room -= SCRIPT_PREFIX;
    if (choices.size > room) choices.size = room;
    if (choices.size > UINT16_MAX) choices.size = UINT16_MAX;
    if (bytes.size > room - choices.size) bytes.size = room - choices.size;
    data[0] = (uint8_t)choices.size;
    data[1] = (uint8_t)(choices.size >> 8);
    memcpy(data + SCRIPT_PREFIX, choices.bytes, choices.size);
    memcpy(data + SCRIPT_PREFIX + choices.size, bytes.bytes, bytes.size);
    return SCRIPT_PREFIX + choices.size + bytes.size;
}

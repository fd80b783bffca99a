#include "wire.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

void put16(unsigned char *p, uint32_t v) {
    p[0] = (unsigned char)v;
    p[1] = (unsigned char)(v >> 8);
}

void put32(unsigned char *p, uint32_t v) {
    put16(p, v);
    put16(p + 2, v >> 16);
}

void put64(unsigned char *p, uint64_t v) {
    put32(p, (uint32_t)v);
    put32(p + 4, (uint32_t)(v >> 32));
}

uint32_t get16(const unsigned char *p) { return p[0] | (uint32_t)p[1] << 8; }
uint32_t get32(const unsigned char *p) { return get16(p) | get16(p + 2) << 16; }

uint64_t get64(const unsigned char *p) { return get32(p) | (uint64_t)get32(p + 4) << 32; }

void put_header(unsigned char *p, enum frame_type type, uint32_t stream, uint32_t length) {
    memset(p, 0, HEADER);
    p[0] = (unsigned char)type;
    put32(p + 4, stream);
    put32(p + 8, length);
}

void record_start(struct record *r) { r->used = HEADER; }

void record_add(struct record *r, enum tag tag, const void *data, size_t length) {
    size_t room = sizeof r->bytes - r->used;
    if (room < FIELD) return;
    if (length > room - FIELD) length = room - FIELD;
    unsigned char *p = r->bytes + r->used;
    put16(p, tag);
    put16(p + 2, 0);
    put32(p + 4, (uint32_t)length);
    memcpy(p + FIELD, data, length);
    r->used += FIELD + length;
}

void record_add_text(struct record *r, enum tag tag, const char *text) { record_add(r, tag, text, strlen(text)); }

void record_add32(struct record *r, enum tag tag, uint32_t value) {
    unsigned char bytes[4];
    put32(bytes, value);
    record_add(r, tag, bytes, sizeof bytes);
}

void record_add64(struct record *r, enum tag tag, uint64_t value) {
    unsigned char bytes[8];
    put64(bytes, value);
    record_add(r, tag, bytes, sizeof bytes);
}

void record_finish(struct record *r, enum frame_type type, uint32_t stream) {
    put_header(r->bytes, type, stream, (uint32_t)(r->used - HEADER));
}

int next_field(const unsigned char **p, size_t *left, uint32_t *tag, const unsigned char **data, size_t *length) {
    if (*left == 0) return 0;
    if (*left < FIELD || get16(*p + 2) != 0) return -1;
    *tag = get16(*p);
    *length = get32(*p + 4);
    if (*length > *left - FIELD) return -1;
    *data = *p + FIELD;
    *p += FIELD + *length;
    *left -= FIELD + *length;
    return 1;
}

bool parse_number(const char *text, uint32_t limit, uint32_t *value) {
    char *end;
    if (*text < '0' || *text > '9') return false;
    errno = 0;
    unsigned long long n = strtoull(text, &end, 10);
    if (errno != 0 || *end != 0 || n > limit) return false;
    *value = (uint32_t)n;
    return true;
}

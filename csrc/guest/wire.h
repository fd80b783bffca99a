/* The wire of the control protocol (docs/protocol.md): numbers, frames and records. */
#ifndef VMETTE_WIRE_H
#define VMETTE_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum frame_type {
    FRAME_HELLO = 1,
    FRAME_ERROR,
    FRAME_SHUTDOWN,
    FRAME_EXEC,
    FRAME_STDIN,
    FRAME_EOF,
    FRAME_STDOUT,
    FRAME_STDERR,
    FRAME_WINDOW,
    FRAME_SIGNAL,
    FRAME_EXIT,
    FRAME_RESIZE,
    FRAME_CONNECT,
    FRAME_LISTEN,
    FRAME_OPENED,
    FRAME_ACCEPTED,
    FRAME_PAUSE,
    FRAME_RESUME
};

enum tag {
    TAG_VERSION = 1,
    TAG_KERNEL,
    TAG_MILESTONE,
    TAG_ERRNO,
    TAG_STAGE,
    TAG_TEXT,
    TAG_ARG,
    TAG_ENV,
    TAG_CWD,
    TAG_USER,
    TAG_FLAGS,
    TAG_CODE,
    TAG_SIGNAL,
    TAG_WINSIZE,
    TAG_USAGE,
    TAG_PEAK,
    TAG_OOM_KILLS,
    TAG_ADDRESS,
    TAG_LISTENER,
    TAG_NAME,
    TAG_STAT,
    TAG_TARGET,
    TAG_SEED,
    TAG_CLOCK,
    TAG_HOSTNAME,
    TAG_SHARE
};

/* FLAGS of EXEC. */
enum exec_flag { EXEC_TERMINAL = 1, EXEC_BUILTIN = 2, EXEC_INIT = 4, EXEC_ANNOUNCED = 8, EXEC_FLAGS = 15 };

/* The flags byte of SIGNAL. */
enum signal_flag { SIGNAL_GROUP = 1, SIGNAL_ALL = 2 };

enum {
    VERSION = 1,
    HEADER = 12,
    FIELD = 8,
    MAX_DATA = 65536,
    MAX_EXEC = 2 << 20,
    MAX_CONTROL = 4096,
    INITIAL_WINDOW = 262144,
    MAX_STREAMS = 256
};

/* The bit that numbers of streams have which the guest opens. */
static const uint32_t from_guest = UINT32_C(1) << 31;

void put16(unsigned char *p, uint32_t v);
void put32(unsigned char *p, uint32_t v);
void put64(unsigned char *p, uint64_t v);
uint32_t get16(const unsigned char *p);
uint32_t get32(const unsigned char *p);
uint64_t get64(const unsigned char *p);

void put_header(unsigned char *p, enum frame_type type, uint32_t stream, uint32_t length);

/* A record being written into a frame of at most MAX_CONTROL bytes. A field that does not fit is cut short. */
struct record {
    unsigned char bytes[HEADER + MAX_CONTROL];
    size_t used;
};

void record_start(struct record *r);
void record_add(struct record *r, enum tag tag, const void *data, size_t length);
void record_add_text(struct record *r, enum tag tag, const char *text);
void record_add32(struct record *r, enum tag tag, uint32_t value);
void record_add64(struct record *r, enum tag tag, uint64_t value);
void record_finish(struct record *r, enum frame_type type, uint32_t stream);

/* Walks a record's fields. Returns 1 with the next one, 0 at the end, -1 when it is malformed. */
int next_field(const unsigned char **p, size_t *left, uint32_t *tag, const unsigned char **data, size_t *length);

/* A decimal number of digits alone, at most `limit`. */
bool parse_number(const char *text, uint32_t limit, uint32_t *value);

#endif

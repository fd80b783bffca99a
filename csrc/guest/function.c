#define _GNU_SOURCE
#include "function.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <unistd.h>

const char *function_name = "function";

static unsigned char output[BUFFER];
static size_t output_used;

static struct {
    int directory; /* -1: there is none */
    char name[32];
} draft = {.directory = -1};

/* --- Failure -------------------------------------------------------------------------------------------------------- */

void fail_because(int error, const char *what, const char *why) {
    struct record r;
    char text[2048];
    if (draft.directory >= 0) unlinkat(draft.directory, draft.name, 0);
    snprintf(text, sizeof text, "%.1024s%s%s", what != NULL ? what : "", what != NULL ? ": " : "", why);
    for (char *c = text; *c != 0; c++) /* names hold what they like; the text is one line */
        if ((unsigned char)*c < ' ' || *c == 0x7f) *c = '?';
    record_start(&r);
    record_add32(&r, TAG_ERRNO, (uint32_t)error);
    record_add(&r, TAG_STAGE, function_name, strnlen(function_name, 64));
    record_add_text(&r, TAG_TEXT, text);
    write_whole(STDERR_FILENO, r.bytes + HEADER, r.used - HEADER);
    _exit(1);
}

void fail(const char *what) {
    int error = errno;
    fail_because(error, what, strerror(error));
}

/* --- Reading and writing -------------------------------------------------------------------------------------------- */

ssize_t read_some(int fd, void *data, size_t size) {
    ssize_t n;
    do n = read(fd, data, size);
    while (n < 0 && errno == EINTR);
    return n;
}

int write_whole(int fd, const void *data, size_t size) {
    for (const unsigned char *p = data, *end = p + size; p < end;) {
        ssize_t n = write(fd, p, (size_t)(end - p));
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return -1;
        p += n;
    }
    return 0;
}

void put_flush(void) {
    if (write_whole(STDOUT_FILENO, output, output_used) != 0) fail("output");
    output_used = 0;
}

unsigned char *put_room(size_t *room) {
    if (output_used == BUFFER) put_flush();
    *room = BUFFER - output_used;
    return output + output_used;
}

void put_placed(size_t size) { output_used += size; }

void put(const void *data, size_t size) {
    for (const unsigned char *p = data; size > 0;) {
        size_t room;
        unsigned char *place = put_room(&room);
        if (room > size) room = size;
        memcpy(place, p, room);
        put_placed(room);
        p += room;
        size -= room;
    }
}

void put_field(enum tag tag, const void *data, size_t size) {
    unsigned char header[FIELD] = {0};
    put16(header, tag);
    put32(header + 4, (uint32_t)size);
    put(header, sizeof header);
    put(data, size);
}

void copy_stdin(int fd, const char *what) {
    fcntl(STDIN_FILENO, F_SETPIPE_SZ, BUFFER); /* fewer wake-ups; no matter if it is refused, or no pipe */
    for (;;) {
        ssize_t n = read_some(STDIN_FILENO, output, sizeof output); /* nothing else is in there */
        if (n < 0) fail("input");
        if (n == 0) return;
        if (write_whole(fd, output, (size_t)n) != 0) fail(what);
    }
}

/* --- Drafts --------------------------------------------------------------------------------------------------------- */

const char *draft_begin(int directory) {
    unsigned long long number;
    /* At random: what else runs in the guest cannot be there first, nor be left over from a draft that was killed. */
    if (getrandom(&number, sizeof number, 0) != sizeof number) fail("random name");
    snprintf(draft.name, sizeof draft.name, ".vmette-%016llx", number);
    draft.directory = directory;
    return draft.name;
}

int draft_publish(const char *name) {
    if (renameat(draft.directory, draft.name, draft.directory, name) != 0) return -1;
    /* Where both were links to one file, rename has left both. */
    unlinkat(draft.directory, draft.name, 0);
    draft.directory = -1;
    return 0;
}

/* --- Limits --------------------------------------------------------------------------------------------------------- */

void allow_open_files(void) {
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) != 0) return;
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
}

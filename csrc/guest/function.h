/* What the functions of the agent (builtins.h) have in common: how they fail, and how they write.
 *
 * A function owns its process, which ends with it: what it has open or allocated need not be given back.
 */
#ifndef VMETTE_FUNCTION_H
#define VMETTE_FUNCTION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "wire.h"

enum {
    BUFFER = 1 << 20,  /* bytes that are read or written at once */
    MAX_PATH = 4095,   /* of a path: what the kernel's PATH_MAX leaves */
    MAX_LEVELS = 2048, /* of directories in each other: as many as such a path has */
    MAX_NAME = 255
};

/* Which function runs: the STAGE of its errors. */
extern const char *function_name;

/* Ends the process with 1, and an error record on stderr: `what`, if that is not NULL, and why. */
_Noreturn void fail_because(int error, const char *what, const char *why);
_Noreturn void fail(const char *what); /* because of errno */

/* Stdout, through a buffer. It fails as a program does whose output nobody reads: by SIGPIPE. */
void put(const void *data, size_t size);
void put_field(enum tag tag, const void *data, size_t size);
unsigned char *put_room(size_t *room); /* at least one byte in which to place output */
void put_placed(size_t size);          /* that much has been placed there */
void put_flush(void);

/* read, or write all of it, past interruptions. Return -1 with errno. */
ssize_t read_some(int fd, void *data, size_t size);
int write_whole(int fd, const void *data, size_t size);

/* All of stdin into a file, which `what` names where that fails. */
void copy_stdin(int fd, const char *what);

/* A file that gets its name when it is whole, in place of what had the name: who has that open keeps it. There is one
 * draft at a time, and it goes away if the function fails. */
const char *draft_begin(int directory);  /* the name under which the caller is to make it, with O_EXCL or the like */
int draft_publish(const char *name);     /* returns -1 with errno */

/* So that a directory can be held open at every level of a deep tree. */
void allow_open_files(void);

#endif

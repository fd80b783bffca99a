/* A machine that was saved wakes up as another one: it gets what no two machines may share. */
#ifndef VMETTE_RESUME_H
#define VMETTE_RESUME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { RESUME_SHARES = 32 };

/* What the host's HELLO says beside its version, when it has woken a machine. */
struct resume {
    const unsigned char *seed; /* NULL: this machine was not woken, but has booted */
    size_t seed_size;
    uint64_t clock;       /* nanoseconds since 1970; 0 leaves it */
    const char *hostname; /* NULL leaves it */
    char *shares[RESUME_SHARES]; /* what vmette.share says on the command line of a machine that boots */
    size_t share_count;
};

/* The machine is about to be saved: has the kernel find now what it will be asked for then. */
void expect_resume(void);

/* Sees to entropy, clock, and the names of the machine; with `random`, a descriptor of /dev/urandom from before the root
 * was entered. Returns 0, or an errno and in `*stage` what could not be done. */
int resume_machine(const struct resume *resume, int random, const char **stage);

/* Names the machine, in /etc/hosts too, unless the root has no /etc of its own (see open_own). */
int name_machine(const char *hostname);

/* Opens a file of /etc that is ours to write, as under container engines. A link that the image put there is replaced,
 * never followed. -1 with ENOTDIR if /etc itself is one: such an image keeps what it has. */
int open_own(const char *path);

#endif

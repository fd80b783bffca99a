/* The guest side of the control protocol (docs/protocol.md): runs commands and relays their streams. */
#ifndef VMETTE_AGENT_H
#define VMETTE_AGENT_H

#include <stddef.h>
#include <stdint.h>

#include "resume.h"

/* A boot milestone: its name and the microseconds since the kernel started. */
struct milestone {
    const char *name;
    uint64_t usec;
};

/* Makes a machine that has woken its own, with `random`, a descriptor of /dev/urandom. Returns 0, or an errno and in
 * `*stage` what could not be done. */
typedef int (*waking)(const struct resume *resume, int random, const char **stage);

/* Serves the control port until the host sends SHUTDOWN or closes the port.
 * Returns 0 then, or -1 when the host broke the protocol (which has been reported on the port). */
int agent_serve(int port, const char *kernel, const struct milestone *milestones, size_t count, waking woken);

/* Reports a failure of the machine itself (ERROR on stream 0), waiting until the port has taken it. */
void agent_report(int port, int error, const char *stage, const char *text);

#endif

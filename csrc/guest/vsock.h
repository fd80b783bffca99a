/* What vsock-send and vsock-runner have in common. They are programs of their own, for the workload. */
#ifndef VMETTE_VSOCK_H
#define VMETTE_VSOCK_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

/* Who is speaking, in messages: the program's name. */
extern const char *const program;

/* A decimal number from 1 to 4294967294, which is a port, or a CID that something can have; or the program ends with 2. */
unsigned parse_vsock(const char *what, const char *text);

/* Connects to `port` of `cid`; -1 with errno.
 *
 * Where the machine has no vsock device, the host (CID 2) is out of reach, and its part is played on the guest's own
 * loopback (CID 1), by the agent, which relays over the control channel. */
int vsock_connect(unsigned cid, unsigned port);

/* Writes all of it; false with errno. */
bool write_all(int fd, const void *data, size_t size);

/* Copies until the end of `from`; false with errno. */
bool copy(int from, int to);

/* Ends the program with 1: what it could not do, and errno. */
__attribute__((format(printf, 1, 2))) _Noreturn void give_up(const char *format, ...);

#endif

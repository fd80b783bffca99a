#define _GNU_SOURCE
#include "vsock.h"

#include <errno.h>
#include <linux/vm_sockets.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

unsigned parse_vsock(const char *what, const char *text) {
    uint64_t value = 0;
    for (const char *p = text; *p != 0; p++) {
        if (*p < '0' || *p > '9' || value > UINT32_MAX) { /* which the next digit would only make worse */
            value = 0;
            break;
        }
        value = value * 10 + (uint64_t)(*p - '0');
    }
    if (value < 1 || value >= UINT32_MAX) {
        dprintf(STDERR_FILENO, "%s: %s %s is no number from 1 to %u\n", program, what, text, UINT32_MAX - 1);
        exit(2);
    }
    return (unsigned)value;
}

static int connect_to(unsigned cid, unsigned port) {
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = cid, .svm_port = port};
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) return -1;
    int done;
    do done = connect(fd, (struct sockaddr *)&address, sizeof address);
    while (done != 0 && errno == EINTR);
    if (done == 0) return fd;
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

int vsock_connect(unsigned cid, unsigned port) {
    int fd = connect_to(cid, port);
    /* A host that is there and has nobody at that port answers with a reset. These say that there is no way to a host. */
    if (fd < 0 && cid == VMADDR_CID_HOST && (errno == ENODEV || errno == ENETUNREACH || errno == EHOSTUNREACH))
        fd = connect_to(VMADDR_CID_LOCAL, port);
    return fd;
}

bool write_all(int fd, const void *data, size_t size) {
    const char *p = data;
    while (size > 0) {
        ssize_t n = write(fd, p, size);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return false;
        p += n;
        size -= (size_t)n;
    }
    return true;
}

bool copy(int from, int to) {
    static char buffer[65536];
    for (;;) {
        ssize_t n = read(from, buffer, sizeof buffer);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return n == 0;
        if (!write_all(to, buffer, (size_t)n)) return false;
    }
}

void give_up(const char *format, ...) {
    int error = errno;
    char text[256];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    dprintf(STDERR_FILENO, "%s: %s: %s\n", program, text, strerror(error));
    exit(1);
}

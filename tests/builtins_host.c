/* Runs a function of the guest agent on this host, for tests/test_builtins.py (which builds it).
 *
 *   builtins_host [--root DIR] [--no-openat2] FUNCTION [ARGUMENT…]
 *
 * With --root, DIR is its root directory, and what it mounts goes away with it; who is not root becomes root in a
 * namespace of his own. With --no-openat2, the kernel is one that does not have this call.
 */
#define _GNU_SOURCE
#include "builtins.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { CANNOT = 77 };

static bool no_openat2;

long __real_syscall(long number, long a, long b, long c, long d);
long __wrap_syscall(long number, ...);

long __wrap_syscall(long number, ...) {
    va_list arguments;
    long a[4];
    if (number == SYS_openat2 && no_openat2) {
        errno = ENOSYS;
        return -1;
    }
    va_start(arguments, number);
    for (int i = 0; i < 4; i++) a[i] = va_arg(arguments, long);
    va_end(arguments);
    return __real_syscall(number, a[0], a[1], a[2], a[3]);
}

static bool write_file(const char *path, const char *format, unsigned number) {
    char text[64];
    int fd = open(path, O_WRONLY | O_CLOEXEC), length = snprintf(text, sizeof text, format, number);
    bool written = fd >= 0 && write(fd, text, (size_t)length) == length;
    close(fd);
    return written;
}

static bool enter(const char *root) {
    const unsigned uid = geteuid(), gid = getegid();
    if (unshare(CLONE_NEWNS | (uid != 0 ? CLONE_NEWUSER : 0)) != 0) return false;
    if (uid != 0 && !(write_file("/proc/self/uid_map", "0 %u 1", uid) &&
                      write_file("/proc/self/setgroups", "deny", 0) && write_file("/proc/self/gid_map", "0 %u 1", gid)))
        return false;
    return mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) == 0 && chroot(root) == 0 && chdir("/") == 0;
}

int main(int argc, char **argv) {
    int i = 1;
    if (i + 1 < argc && strcmp(argv[i], "--root") == 0) {
        if (!enter(argv[i + 1])) {
            perror("builtins_host: root");
            return CANNOT;
        }
        i += 2;
    }
    if (i < argc && strcmp(argv[i], "--no-openat2") == 0) {
        no_openat2 = true;
        i++;
    }
    _exit(builtin_run(argv + i)); /* as the agent does */
}

/* The guest's openat2, for which there is no function but syscall(2), and that is called for nothing else. A target has
 * this below its `open_at`, which answers, and `running`: no other file can have that, as the sanitizers would look up
 * whether it may be read before they are ready for it. */
#ifndef VMETTE_FUZZ_OPENAT2_H
#define VMETTE_FUZZ_OPENAT2_H

#include <stdarg.h>
#include <sys/syscall.h>

long __real_syscall(long number, ...);
long __wrap_syscall(long number, ...);
long __wrap_syscall(long number, ...) {
    va_list list;
    long a[4];
    va_start(list, number);
    for (int i = 0; i < 4; i++) a[i] = va_arg(list, long);
    va_end(list);
    if (!running) return __real_syscall(number, a[0], a[1], a[2], a[3]);
    if (number != SYS_openat2) complain("an unknown system call");
    return open_at((int)a[0], (const char *)a[1], (const struct open_how *)a[2]);
}

#endif

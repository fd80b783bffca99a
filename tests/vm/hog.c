/* Takes what there is: `hog memory MIB` touches that much and says so, `hog priority` takes the processor before all
 * others, for ever. */
#define _GNU_SOURCE
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

int main(int argc, char **argv) {
    if (argc == 3 && strcmp(argv[1], "memory") == 0) {
        const size_t size = strtoul(argv[2], NULL, 10) << 20, page = 4096;
        volatile char *data = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (data == MAP_FAILED) return 1;
        for (size_t i = 0; i < size; i += page) data[i] = 1;
        puts("done");
        return 0;
    }
    const struct sched_param most = {.sched_priority = 99};
    if (syscall(SYS_sched_setscheduler, 0, SCHED_FIFO, &most) != 0) return 1; /* musl's own does nothing */
    puts("on");
    fflush(stdout);
    for (volatile int i = 0;; i = !i) continue;
}

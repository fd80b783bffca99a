/* Tries to get at PID 1, and at a process of its own, and prints what came of each attempt: an errno, or 0. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

static void result(const char *attempt, long value) { printf("%s %d\n", attempt, value < 0 ? errno : 0); }

static long open_file(pid_t pid, const char *name, int flags) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", (int)pid, name);
    return open(path, flags);
}

static void attempt_all(pid_t pid, void *address) {
    char byte = 1;
    struct iovec ours = {&byte, 1}, theirs = {address, 1};
    long attached = ptrace(PTRACE_ATTACH, pid, NULL, NULL);
    result("attach", attached);
    if (attached == 0) {
        waitpid(pid, NULL, 0); /* one that has not stopped yet cannot be let go */
        ptrace(PTRACE_DETACH, pid, NULL, NULL);
    }
    result("seize", ptrace(PTRACE_SEIZE, pid, NULL, NULL));
    result("readv", process_vm_readv(pid, &ours, 1, &theirs, 1, 0));
    result("writev", process_vm_writev(pid, &ours, 1, &theirs, 1, 0));
    result("mem", open_file(pid, "mem", O_RDWR));
    result("maps", open_file(pid, "maps", O_RDONLY));
    result("root", open_file(pid, "root", O_RDONLY));
    result("exe", open_file(pid, "exe", O_RDONLY));
    result("getfd", syscall(SYS_pidfd_getfd, syscall(SYS_pidfd_open, pid, 0), 0, 0));
}

int main(void) {
    static char here;
    pid_t child = fork();
    if (child == 0)
        for (;;) pause();
    puts("child");
    attempt_all(child, &here);
    kill(child, SIGKILL);
    puts("agent");
    attempt_all(1, &here);
    return 0;
}

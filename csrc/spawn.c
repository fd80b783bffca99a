#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
#ifdef __linux__
#include <sys/prctl.h>
#include <sys/syscall.h>
#endif

enum { MAX_FDS = 64, MAX_TARGET = 1023 };

static void close_from(int first) {
#ifdef SYS_close_range
    if (syscall(SYS_close_range, (unsigned)first, ~0U, 0U) == 0) return;
#endif
    long limit = sysconf(_SC_OPEN_MAX);
    if (limit < 0 || limit > 65536) limit = 65536;
    for (int fd = first; fd < limit; fd++) close(fd);
}

static bool is_among(int fd, const int *fds, int count) {
    for (int i = 0; i < count; i++)
        if (fds[i] == fd) return true;
    return false;
}

/* The child's half: async-signal-safe calls only. When it returns, errno says why, and `*report` is where to. */
static void become(pid_t parent, const char *path, char *const argv[], char *const envp[], const int *fds,
                   const int *targets, int count, int *report) {
    int high[MAX_FDS], top = 2;
    setsid();
    for (int i = 0; i < count; i++)
        if (targets[i] > top) top = targets[i];
    /* Two steps, so that a target never overwrites a source that is still wanted. */
    for (int i = 0; i < count; i++)
        if ((high[i] = fcntl(fds[i], F_DUPFD, top + 2)) < 0) return;
    int moved = fcntl(*report, F_DUPFD, top + 2);
    if (moved < 0) return;
    *report = moved; /* the old number may be a target */
    for (int i = 0; i < count; i++)
        if (dup2(high[i], targets[i]) < 0) return;
    if (dup2(*report, top + 1) < 0) return;
    *report = top + 1;
    for (int fd = 3; fd <= top; fd++)
        if (!is_among(fd, targets, count)) close(fd);
    close_from(top + 2);
    fcntl(*report, F_SETFD, FD_CLOEXEC);
    struct sigaction plain;
    memset(&plain, 0, sizeof plain);
    plain.sa_handler = SIG_DFL;
    for (int number = 1; number < NSIG; number++)
        if (number != SIGKILL && number != SIGSTOP) sigaction(number, &plain, NULL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
#ifdef __linux__
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0) return;
#endif
    if (getppid() != parent) { /* it died before the request was in force */
        errno = ESRCH;
        return;
    }
    execve(path, argv, envp);
}

static int open_report(int report[2]) {
#ifdef __linux__
    return pipe2(report, O_CLOEXEC); /* not even for a moment open to what another thread starts */
#else
    if (pipe(report) != 0) return -1;
    fcntl(report[0], F_SETFD, FD_CLOEXEC);
    fcntl(report[1], F_SETFD, FD_CLOEXEC);
    return 0;
#endif
}

int vmette_spawn(const char *path, char *const argv[], char *const envp[], const int *fds, const int *targets,
                 int count) {
    int report[2], error = 0;
    if (count < 0 || count > MAX_FDS) return -EINVAL;
    for (int i = 0; i < count; i++)
        if (targets[i] < 0 || targets[i] > MAX_TARGET) return -EBADF;
    if (open_report(report) != 0) return -errno;
    pid_t parent = getpid();
    sigset_t all, before;
    sigfillset(&all); /* no handler of this process may run in the child */
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pid_t pid = fork();
    if (pid == 0) {
        become(parent, path, argv, envp, fds, targets, count, &report[1]);
        error = errno;
        (void)!write(report[1], &error, sizeof error);
        _exit(127);
    }
    if (pid < 0) error = errno;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    close(report[1]);
    if (pid > 0) {
        ssize_t n;
        do n = read(report[0], &error, sizeof error);
        while (n < 0 && errno == EINTR);
        if (n == 0) error = 0;
        if (error != 0)
            while (waitpid(pid, NULL, 0) < 0 && errno == EINTR) continue;
    }
    close(report[0]);
    return error != 0 ? -error : (int)pid;
}

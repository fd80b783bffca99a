/* Runs the guest agent on this host, for tests/test_agent.py (which builds it, and says how).
 *
 *   agent_host serve FD KERNEL              serves the port FD; ends with 0, or BROKEN if the host broke the protocol.
 *                                           Prints how many processes the agent left behind
 *   agent_host report FD ERRNO STAGE TEXT   reports a failure of the machine on FD
 *
 * The linker sends the agent's calls to the __wrap_ functions (-Wl,--wrap=...).
 */
#define _GNU_SOURCE
#include "agent.h"

#include "builtins.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BROKEN = 3, MAX_IDLE = 100 };

int __real_poll(struct pollfd *polls, nfds_t count, int timeout);
int __wrap_poll(struct pollfd *polls, nfds_t count, int timeout);
ssize_t __real_read(int fd, void *data, size_t size);
ssize_t __wrap_read(int fd, void *data, size_t size);
ssize_t __real_write(int fd, const void *data, size_t size);
ssize_t __wrap_write(int fd, const void *data, size_t size);
int __real_initgroups(const char *user, gid_t group);
int __wrap_initgroups(const char *user, gid_t group);
int __real_setgroups(size_t count, const gid_t *groups);
int __wrap_setgroups(size_t count, const gid_t *groups);

/* --- An agent that is woken again and again and moves nothing spins ----------------------------------------------- */

static int idle;

int __wrap_poll(struct pollfd *polls, nfds_t count, int timeout) {
    if (timeout != 0 && ++idle > MAX_IDLE) {
        fprintf(stderr, "agent_host: the agent spins\n");
        abort();
    }
    return __real_poll(polls, count, timeout);
}

ssize_t __wrap_read(int fd, void *data, size_t size) {
    ssize_t n = __real_read(fd, data, size);
    if (n >= 0) idle = 0;
    return n;
}

ssize_t __wrap_write(int fd, const void *data, size_t size) {
    ssize_t n = __real_write(fd, data, size);
    if (n > 0) idle = 0;
    return n;
}

/* --- Those who are not root may run the tests as themselves: they have no groups to set --------------------------- */

int __wrap_initgroups(const char *user, gid_t group) { return geteuid() == 0 ? __real_initgroups(user, group) : 0; }
int __wrap_setgroups(size_t count, const gid_t *list) { return geteuid() == 0 ? __real_setgroups(count, list) : 0; }

/* --- A function of the agent, which stands for all of csrc/guest/builtins.c ----------------------------------------- */

/* Tells its arguments and what it was given, one a line, copies stdin to stdout, and ends with its second argument. */
int builtin_run(char **argv) {
    char directory[256], data[4096];
    ssize_t n;
    int open = -2; /* stdin and so on alone: not the list's own descriptor, nor its two entries for directories */
    DIR *list = opendir("/proc/self/fd");
    if (list == NULL || getcwd(directory, sizeof directory) == NULL) return 98;
    while (readdir(list) != NULL) open++;
    closedir(list);
    for (int i = 0; argv[i] != NULL; i++) printf("%s\n", argv[i]);
    printf("%s %u %d %s\n", directory, getuid(), open - 1, getenv("HOME"));
    fflush(stdout);
    while ((n = read(STDIN_FILENO, data, sizeof data)) > 0)
        if (write(STDOUT_FILENO, data, (size_t)n) != n) return 97;
    return argv[1] != NULL ? atoi(argv[1]) : 0;
}

/* --- What the agent does when it is woken, which would be done to this host (csrc/guest/init.c) -------------------- */

static int woken(const struct resume *resume, int random, const char **stage) {
    *stage = "hostname";
    if (fcntl(random, F_GETFD) < 0 || resume->seed_size != 64 || resume->clock != UINT64_C(0x1122334455667788))
        return EINVAL;
    *stage = "shares";
    if (resume->share_count != 2 || strcmp(resume->shares[1], "9p:share1:ro:/b") != 0) return ENODEV;
    *stage = "hostname";
    return resume->hostname != NULL && strcmp(resume->hostname, "woken") == 0 ? 0 : EPERM;
}

/* --- What commands leave behind becomes our child, as it would become PID 1's, and must not outlive the test ------ */

static int end_children(void) {
    for (int left = 0, status;; left += WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM) { /* not the agent's KILL */
        FILE *list = fopen("/proc/thread-self/children", "re");
        int pid;
        if (list == NULL) abort();
        while (fscanf(list, "%d", &pid) == 1) {
            kill(pid, SIGTERM);
            kill(pid, SIGCONT);
        }
        fclose(list);
        if (waitpid(-1, &status, 0) < 0) return left;
    }
}

int main(int argc, char **argv) {
    static const struct milestone milestones[] = {{"init", 1}, {"ready", UINT64_C(0x123456789abcdef)}};
    if (argc == 6 && strcmp(argv[1], "report") == 0) {
        agent_report(atoi(argv[2]), atoi(argv[3]), argv[4], argv[5]);
        return 0;
    }
    if (argc != 4 || strcmp(argv[1], "serve") != 0) return 2;
    int port = atoi(argv[2]);
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    fcntl(port, F_SETFD, FD_CLOEXEC);
    int result = agent_serve(port, argv[3], milestones, sizeof milestones / sizeof *milestones, woken);
    close(port);
    printf("%d\n", end_children());
    return result == 0 ? 0 : BROKEN;
}

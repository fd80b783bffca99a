#define _GNU_SOURCE
#include "command.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <termios.h>
#include <unistd.h>

#include <linux/openat2.h>
#include <linux/capability.h>
#include <linux/sched.h>

#include "accounts.h"
#include "builtins.h"
#include "wire.h"

enum {
    MAX_GROUPS = 256,
    MAX_ORDER = 4096, /* bytes of an EXEC for a spare: the kernel takes them as a whole or not at all (PIPE_BUF) */
    ADDED = 3 /* entries of the environment that are added where they are missing */
};

static const char default_path[] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/* --- EXEC ----------------------------------------------------------------------------------------------------------- */

static bool add_string(char **list, size_t *count, char **text, const unsigned char *data, size_t length) {
    if (memchr(data, 0, length) != NULL) return false;
    char *start = *text;
    memcpy(start, data, length);
    start[length] = 0;
    *text += length + 1;
    list[(*count)++] = start;
    return true;
}

void *parse_exec(const unsigned char *payload, size_t size, struct command *c) {
    const unsigned char *p = payload, *data;
    size_t left = size, length, args = 0, envs = 0, strings = 0;
    uint32_t tag;
    int more;
    while ((more = next_field(&p, &left, &tag, &data, &length)) > 0) {
        args += tag == TAG_ARG;
        envs += tag == TAG_ENV;
        strings += length + 1;
    }
    errno = EPROTO;
    if (more < 0 || args == 0) return NULL;
    size_t pointers = (args + 1 + envs + ADDED + 1) * sizeof(char *);
    char *block = malloc(pointers + strings);
    if (block == NULL) return NULL;
    char *text = block + pointers;
    char **argv = (char **)(void *)block, **env = argv + args + 1, *one[1];
    memset(c, 0, sizeof *c);
    args = envs = 0;
    bool good = true;
    p = payload;
    left = size;
    while (good && next_field(&p, &left, &tag, &data, &length) > 0) {
        size_t ignored = 0;
        if (tag == TAG_ARG)
            good = add_string(argv, &args, &text, data, length);
        else if (tag == TAG_ENV)
            good = add_string(env, &envs, &text, data, length);
        else if (tag == TAG_CWD && (good = add_string(one, &ignored, &text, data, length)))
            c->cwd = one[0];
        else if (tag == TAG_USER && (good = add_string(one, &ignored, &text, data, length)))
            c->user = one[0];
        else if (tag == TAG_FLAGS && (good = length == 4))
            c->flags = get32(data);
        else if (tag == TAG_WINSIZE && (good = length == 4)) {
            c->rows = (uint16_t)get16(data);
            c->columns = (uint16_t)get16(data + 2);
        }
    }
    if (!good) {
        free(block);
        errno = EPROTO;
        return NULL;
    }
    argv[args] = NULL;
    env[envs] = NULL;
    c->argv = argv;
    c->env = env;
    return block;
}

/* --- The child: its user -------------------------------------------------------------------------------------------- */

static _Noreturn void fail_start(int fd, const char *stage) {
    struct start_failure failure = {.error = errno};
    strncpy(failure.stage, stage, sizeof failure.stage - 1);
    (void)!write(fd, &failure, sizeof failure);
    _exit(127);
}

/* Becomes `user[:group]`, who gets `terminal` too if there is one. The guest's passwd and group files are not to be
 * trusted. Returns the user's home. */
static const char *become(const char *spec, int terminal, int failed) {
    static struct user account = {.home = "/"};
    static gid_t groups[MAX_GROUPS];
    char user[256], *group;
    if (strlen(spec) >= sizeof user) {
        errno = ENAMETOOLONG;
        fail_start(failed, "user");
    }
    strcpy(user, spec);
    group = strchr(user, ':');
    if (group != NULL) *group++ = 0;
    uint32_t uid, gid;
    const bool number = parse_number(user, UINT32_MAX - 1, &uid); /* the largest means to setuid: leave it as it is */
    const bool known = find_user(number ? NULL : user, uid, &account);
    if (!known && !number) {
        errno = ENOENT;
        fail_start(failed, "user");
    }
    if (known) uid = account.uid;
    size_t count = 1;
    groups[0] = known ? account.gid : 0;
    if (group == NULL && known) count = find_memberships(account.name, groups, count, MAX_GROUPS);
    if (group != NULL && *group != 0) {
        if (parse_number(group, UINT32_MAX - 1, &gid) || find_group(group, &gid)) {
            groups[0] = gid;
        } else {
            errno = ENOENT;
            fail_start(failed, "group");
        }
    }
    if (terminal >= 0 && fchown(terminal, uid, (gid_t)-1) != 0) fail_start(failed, "terminal");
    if (setgroups(count, groups) != 0 || setgid(groups[0]) != 0 || setuid(uid) != 0) fail_start(failed, "user");
    return account.home;
}

/* --- The child: its place ------------------------------------------------------------------------------------------- */

/* The agent is spared when memory runs out, and may open many files; a command is like any other process.
 *
 * CAP_SYS_PTRACE goes from the bounding set, so no program that is executed can ever have it, root's included (nor those
 * that the kernel itself executes: init.c, limit_helpers). Tracing
 * a process takes all the capabilities that it has, or this one: so the agent, which has it, is out of reach, while
 * debuggers work on what runs beside them. Those who are not root (tests) have none to give up. */
static void become_ordinary(const struct place *place) {
    int file = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (file >= 0) {
        (void)!write(file, "0", 1);
        close(file);
    }
    setrlimit(RLIMIT_NOFILE, &place->files);
    prctl(PR_CAPBSET_DROP, CAP_SYS_PTRACE, 0, 0, 0);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
}

/* PID 1 of its namespace, which start_child has made: mounts of its own, and a /proc that shows the namespace. */
static void become_init(int failed) {
    if (unshare(CLONE_NEWNS) != 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0 ||
        mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) != 0)
        fail_start(failed, "init");
}

/* Enters the mounts of the namespaces' init. It has made them when it has started, which the other end of its pipe tells
 * by going away. */
static void join_init(const struct place *place, int failed) {
    struct pollfd started = {.fd = place->init_started};
    if (place->init_started >= 0) poll(&started, 1, -1);
    if (setns(place->init_fd, CLONE_NEWNS) != 0) fail_start(failed, "init");
}

/* --- The child: its program ----------------------------------------------------------------------------------------- */

static bool has_variable(char **env, const char *name) {
    size_t length = strlen(name);
    for (; *env != NULL; env++)
        if (strncmp(*env, name, length) == 0 && (*env)[length] == '=') return true;
    return false;
}

/* Adds NAME=value unless the environment has the name. The list has room for ADDED entries. */
static void add_variable(char **env, char *entry, size_t size, const char *name, const char *value) {
    if (has_variable(env, name)) return;
    snprintf(entry, size, "%s=%s", name, value);
    while (*env != NULL) env++;
    env[0] = entry;
    env[1] = NULL;
}

/* What a spare child waits for. It ends where nobody has an order for it. */
static void await_order(int orders, struct command *c) {
    static unsigned char payload[MAX_ORDER];
    ssize_t size = read(orders, payload, sizeof payload);
    if (size <= 0 || parse_exec(payload, (size_t)size, c) == NULL) _exit(127);
}

/* The child's half of EXEC. Without a command it waits for one, from `orders`. */
static _Noreturn void run_child(const struct command *c, int orders, const struct place *place, const int fds[3],
                                int failed) {
    enum { FAILED = 3, ORDERS };
    const bool terminal = c != NULL && c->flags & EXEC_TERMINAL, init = c != NULL && c->flags & EXEC_INIT;
    struct command ordered;
    for (int i = 0; i < 3; i++)
        if (dup2(fds[i], i) < 0) fail_start(failed, "exec");
    setsid();
    if (terminal && ioctl(0, TIOCSCTTY, 0) != 0) fail_start(failed, "terminal");
    become_ordinary(place);
    if (init)
        become_init(failed);
    else if (place->init != 0)
        join_init(place, failed);
    /* What is the agent's: while this waits for a file of the image, no other command's stdin stays open because of it. */
    if (orders >= 0 && (orders = fcntl(orders, F_DUPFD_CLOEXEC, ORDERS + 1)) < 0) fail_start(failed, "exec");
    if (failed != FAILED && dup3(failed, FAILED, O_CLOEXEC) < 0) fail_start(failed, "exec");
    failed = FAILED;
    if (orders >= 0 && dup3(orders, ORDERS, O_CLOEXEC) < 0) fail_start(failed, "exec");
    syscall(SYS_close_range, orders >= 0 ? ORDERS + 1 : ORDERS, ~0U, 0);
    if (c == NULL) {
        await_order(ORDERS, &ordered);
        close(ORDERS);
        c = &ordered;
    }
    const char *home = become(c->user != NULL ? c->user : "0", terminal ? 0 : -1, failed);
    static char home_entry[MAX_HOME + 5], path_entry[sizeof default_path + 5], container_entry[32];
    add_variable(c->env, home_entry, sizeof home_entry, "HOME", home);
    add_variable(c->env, path_entry, sizeof path_entry, "PATH", default_path);
    /* Init systems look for this to know that the hardware is not theirs: https://systemd.io/CONTAINER_INTERFACE */
    if (init) add_variable(c->env, container_entry, sizeof container_entry, "container", "vmette");
    const char *cwd = c->cwd != NULL ? c->cwd : "/";
    errno = EINVAL;
    if (*cwd != '/' || chdir(cwd) != 0) fail_start(failed, "chdir");
    environ = c->env;
    if (c->flags & EXEC_BUILTIN) {
        close(failed); /* as exec would have */
        _exit(builtin_run(c->argv));
    }
    execvp(c->argv[0], c->argv);
    fail_start(failed, "exec");
}

/* --- The agent's half ----------------------------------------------------------------------------------------------- */

struct ends {
    int ours, theirs;
};

static bool make_pipe(struct ends *ends, bool to_child) {
    int fds[2]; /* the read end comes first */
    if (pipe2(fds, O_CLOEXEC) != 0) return false;
    ends->ours = fds[to_child];
    ends->theirs = fds[!to_child];
    return true;
}

static bool make_terminal(struct ends *ends, const struct command *c, int terminals) {
    const struct open_how how = {.flags = O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC,
                                 .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_XDEV};
    const struct winsize size = {.ws_row = c->rows, .ws_col = c->columns};
    struct termios settings;
    ends->ours = (int)syscall(SYS_openat2, terminals, "ptmx", &how, sizeof how);
    /* Where devpts has it for root alone, as on the hosts of tests. In the guest the agent is root. */
    if (ends->ours < 0 && errno == EACCES) ends->ours = open("/dev/ptmx", (int)how.flags);
    if (ends->ours < 0 || ioctl(ends->ours, TIOCSPTLCK, &(int){0}) != 0) return false;
    ends->theirs = ioctl(ends->ours, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (ends->theirs < 0 || ioctl(ends->theirs, TIOCSWINSZ, &size) != 0) return false;
    if (tcgetattr(ends->theirs, &settings) != 0) return false;
    settings.c_iflag |= IUTF8; /* so that erasing takes a whole character */
    return tcsetattr(ends->theirs, TCSANOW, &settings) == 0;
}

static bool enter_cgroup(int cgroup) {
    int file = openat(cgroup, "cgroup.procs", O_WRONLY | O_CLOEXEC);
    if (file < 0) return false;
    bool entered = write(file, "0", 1) == 1;
    close(file);
    return entered;
}

/* A child, born in the place's cgroup: to move there would wait for a grace period of the kernel's RCU. But where there
 * are as many processes as there may be, none can be born. The limit is for what commands start, and not for what the
 * host does: that may be just what ends a fork bomb. It is born outside then, and moves, which is not limited. */
static pid_t fork_into(int cgroup, int failed) {
    struct clone_args args = {.flags = CLONE_INTO_CGROUP, .exit_signal = SIGCHLD, .cgroup = (uint64_t)cgroup};
    pid_t pid = cgroup < 0 ? fork() : (pid_t)syscall(SYS_clone3, &args, sizeof args);
    if (pid >= 0 || cgroup < 0 || errno != EAGAIN) return pid;
    pid = fork();
    if (pid == 0 && !enter_cgroup(cgroup)) fail_start(failed, "cgroup");
    return pid;
}

/* Makes the PID namespace that all children are in from now on: the first one is its init. */
static int prepare_init(struct place *place) {
    if (place->init != 0) return EBUSY;
    return unshare(CLONE_NEWPID) != 0 ? errno : 0;
}

void leave_init(struct place *place) {
    setns(place->pids, CLONE_NEWPID);
    if (place->init != 0) close(place->init_fd);
    place->init = 0;
    place->init_fd = place->init_started = -1;
}

/* Starts a child for a command, or one that takes it from `orders`. */
static int start(const struct command *c, int orders, struct place *place, struct child *child, const char **stage) {
    enum { STDIN, STDOUT, STDERR, STARTED, ENDS };
    const bool terminal = c != NULL && c->flags & EXEC_TERMINAL, init = c != NULL && c->flags & EXEC_INIT;
    struct ends ends[ENDS] = {{-1, -1}, {-1, -1}, {-1, -1}, {-1, -1}};
    int error = 0;
    pid_t pid = -1;
    *stage = "fork";
    if (terminal) {
        if (!make_terminal(&ends[STDIN], c, place->terminals)) {
            error = errno;
            *stage = "terminal";
        }
    } else if (!make_pipe(&ends[STDIN], true) || !make_pipe(&ends[STDOUT], false) || !make_pipe(&ends[STDERR], false)) {
        error = errno;
    }
    if (error == 0 && !make_pipe(&ends[STARTED], false)) error = errno;
    if (error == 0 && init && (error = prepare_init(place)) != 0) *stage = "init";
    if (error == 0) {
        /* Large pipes: fewer wake-ups for bulk data. Beyond the limit for unprivileged users it is refused: no matter. */
        fcntl(ends[STDOUT].ours, F_SETPIPE_SZ, 1 << 20);
        int fds[3];
        for (int i = 0; i < 3; i++) fds[i] = ends[terminal ? STDIN : i].theirs;
        pid = fork_into(place->cgroup, ends[STARTED].theirs);
        if (pid < 0) error = errno;
        if (pid == 0) run_child(c, orders, place, fds, ends[STARTED].theirs);
        if (pid < 0 && init) leave_init(place);
    }
    for (int i = 0; i < ENDS; i++) {
        const bool kept = terminal && i == STDIN && error == 0;
        if (ends[i].theirs >= 0 && !kept) close(ends[i].theirs);
        if (ends[i].ours >= 0 && error != 0) close(ends[i].ours);
        if (ends[i].ours >= 0 && error == 0) fcntl(ends[i].ours, F_SETFL, O_NONBLOCK);
    }
    if (error != 0) return error;
    child->pid = pid;
    child->started = ends[STARTED].ours;
    child->stdin_fd = ends[STDIN].ours;
    child->out[0] = ends[terminal ? STDIN : STDOUT].ours;
    child->out[1] = ends[STDERR].ours;
    /* Held open, so that its master reads no end of file when the command closes the terminal and opens it again. */
    child->terminal = terminal ? ends[STDIN].theirs : -1;
    if (init) {
        place->init = pid;
        place->init_fd = (int)syscall(SYS_pidfd_open, pid, 0);
        place->init_started = child->started;
    }
    return 0;
}

int start_child(const struct command *c, struct place *place, struct child *child, const char **stage) {
    return start(c, -1, place, child, stage);
}

/* --- The spare ------------------------------------------------------------------------------------------------------ */

int start_spare(struct place *place, struct spare *spare) {
    struct ends orders;
    const char *stage;
    spare->orders = -1;
    if (place->init != 0) return EBUSY; /* its mounts are joined late, by those who know that they are to join them */
    if (!make_pipe(&orders, true)) return errno;
    int error = start(NULL, orders.theirs, place, &spare->child, &stage);
    close(orders.theirs);
    if (error != 0) {
        close(orders.ours);
        return error;
    }
    fcntl(orders.ours, F_SETFL, O_NONBLOCK);
    spare->orders = orders.ours;
    return 0;
}

bool order_spare(struct spare *spare, const struct command *c, const unsigned char *payload, size_t size) {
    if (size > MAX_ORDER || c->flags & (EXEC_TERMINAL | EXEC_INIT)) return false;
    if (write(spare->orders, payload, size) != (ssize_t)size) return false;
    close(spare->orders);
    spare->orders = -1;
    return true;
}

void dismiss_spare(struct spare *spare) {
    const int fds[] = {spare->orders, spare->child.started, spare->child.stdin_fd, spare->child.out[0], spare->child.out[1]};
    for (size_t i = 0; i < sizeof fds / sizeof *fds; i++) close(fds[i]);
    spare->orders = -1;
}

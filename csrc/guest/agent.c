/* The guest agent: many commands at once over one port. See docs/protocol.md for the wire.
 *
 * One thread and one poll loop. What it holds is bounded:
 *   - bytes from the host: one frame being received, and for each command its stdin window;
 *   - bytes to the host: one output buffer. Command output is read from its pipe only when the buffer has room for a
 *     whole frame and the host has given the channel window; answers (EXIT, ERROR, WINDOW) have a reserve of their own,
 *     and whatever would cause one waits while that reserve is used up.
 */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <poll.h>
#include <pwd.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

enum frame_type {
    HELLO = 1,
    ERROR,
    SHUTDOWN,
    EXEC,
    STDIN,
    STDIN_EOF,
    STDOUT,
    STDERR,
    WINDOW,
    SIGNAL,
    EXIT
};

enum tag {
    TAG_VERSION = 1,
    TAG_KERNEL,
    TAG_MILESTONE,
    TAG_ERRNO,
    TAG_STAGE,
    TAG_TEXT,
    TAG_ARG,
    TAG_ENV,
    TAG_CWD,
    TAG_USER,
    TAG_FLAGS,
    TAG_CODE,
    TAG_SIGNAL
};

enum {
    VERSION = 1,
    HEADER = 12,
    FIELD = 8,
    MAX_DATA = 65536,
    MAX_EXEC = 2 << 20,
    MAX_CONTROL = 4096,
    INITIAL_WINDOW = 262144,
    MAX_STREAMS = 64,
    MAX_GROUPS = 256,
    /* The kernel's virtio console takes at most 32 KiB in one write: one frame of ours is one write. */
    CHUNK = 32768 - HEADER,
    /* Room that command output leaves to answers. Whatever causes an answer looks first whether the largest one fits,
     * and waits for the port if it does not (can_answer): so no answer is ever lost. */
    LARGEST_ANSWER = HEADER + MAX_CONTROL,
    RESERVE = 3 * LARGEST_ANSWER,
    OUTPUT = 8 * 32768 + RESERVE,
    INPUT = 65536
};

static const char default_path[] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/* One output channel of a command. */
struct channel {
    int fd;          /* the pipe's read end; -1: closed */
    uint32_t window; /* bytes that the host still takes */
    uint32_t owed;   /* of a command that has ended: bytes that it left in the pipe and that must come before EXIT */
};

/* One command. */
struct stream {
    uint32_t id; /* 0: the slot is free */
    pid_t pid;
    bool exited;
    int status;
    int started; /* pipe that carries errno and stage if the program could not be started; -1: it has been */
    struct channel out[2];
    int stdin_fd; /* the pipe's write end; -1: closed */
    bool stdin_eof;
    unsigned char *stdin_data; /* a ring of INITIAL_WINDOW bytes, allocated when first used */
    uint32_t stdin_head, stdin_used;
    uint32_t stdin_passed; /* written to the command, not yet given back to the host */
};

struct agent {
    int port;
    int signals;
    bool greeted; /* the host's HELLO has come */
    bool shutdown;
    struct stream streams[MAX_STREAMS];
    unsigned turn; /* where the round of output channels goes on, so that none is starved */
    unsigned char out[OUTPUT];
    size_t out_head, out_tail;
    unsigned char in[INPUT];
    size_t in_used;
    unsigned char *large; /* the payload of a frame larger than `in`, while it arrives */
    unsigned char large_header[HEADER];
    size_t large_length, large_used;
};

/* What a child that could not exec tells its parent. */
struct start_failure {
    int error;
    char stage[12];
};

/* --- Encoding ----------------------------------------------------------------------------------------------------- */

static void put16(unsigned char *p, uint32_t v) {
    p[0] = (unsigned char)v;
    p[1] = (unsigned char)(v >> 8);
}

static void put32(unsigned char *p, uint32_t v) {
    put16(p, v);
    put16(p + 2, v >> 16);
}

static uint32_t get16(const unsigned char *p) { return p[0] | (uint32_t)p[1] << 8; }
static uint32_t get32(const unsigned char *p) { return get16(p) | get16(p + 2) << 16; }

static void put_header(unsigned char *p, enum frame_type type, uint32_t stream, uint32_t length) {
    memset(p, 0, HEADER);
    p[0] = (unsigned char)type;
    put32(p + 4, stream);
    put32(p + 8, length);
}

/* A record being written into a frame of at most MAX_CONTROL bytes. A field that does not fit is cut short. */
struct record {
    unsigned char bytes[HEADER + MAX_CONTROL];
    size_t used;
};

static void record_start(struct record *r) { r->used = HEADER; }

static void record_add(struct record *r, enum tag tag, const void *data, size_t length) {
    size_t room = sizeof r->bytes - r->used;
    if (room < FIELD) return;
    if (length > room - FIELD) length = room - FIELD;
    unsigned char *p = r->bytes + r->used;
    put16(p, tag);
    put16(p + 2, 0);
    put32(p + 4, (uint32_t)length);
    memcpy(p + FIELD, data, length);
    r->used += FIELD + length;
}

static void record_add32(struct record *r, enum tag tag, uint32_t value) {
    unsigned char bytes[4];
    put32(bytes, value);
    record_add(r, tag, bytes, sizeof bytes);
}

static void record_finish(struct record *r, enum frame_type type, uint32_t stream) {
    put_header(r->bytes, type, stream, (uint32_t)(r->used - HEADER));
}

static void record_error(struct record *r, uint32_t stream, int error, const char *stage, const char *text) {
    record_start(r);
    record_add32(r, TAG_ERRNO, (uint32_t)error);
    record_add(r, TAG_STAGE, stage, strlen(stage));
    record_add(r, TAG_TEXT, text, strnlen(text, 1024));
    record_finish(r, ERROR, stream);
}

/* --- Output to the port --------------------------------------------------------------------------------------------- */

static size_t out_room(const struct agent *a) { return OUTPUT - (a->out_tail - a->out_head); }
static bool can_answer(const struct agent *a) { return out_room(a) >= LARGEST_ANSWER; }

/* A place at the end of the output buffer for `length` bytes; the caller has checked out_room. */
static unsigned char *out_reserve(struct agent *a, size_t length) {
    if (OUTPUT - a->out_tail < length) {
        memmove(a->out, a->out + a->out_head, a->out_tail - a->out_head);
        a->out_tail -= a->out_head;
        a->out_head = 0;
    }
    return a->out + a->out_tail;
}

/* The caller has seen that it can_answer. */
static void answer(struct agent *a, const void *bytes, size_t length) {
    memcpy(out_reserve(a, length), bytes, length);
    a->out_tail += length;
}

static void answer_error(struct agent *a, uint32_t stream, int error, const char *stage, const char *text) {
    struct record r;
    record_error(&r, stream, error, stage, text);
    answer(a, r.bytes, r.used);
}

static void answer_window(struct agent *a, uint32_t stream, uint32_t bytes) {
    unsigned char frame[HEADER + 5];
    put_header(frame, WINDOW, stream, 5);
    frame[HEADER] = 0;
    put32(frame + HEADER + 1, bytes);
    answer(a, frame, sizeof frame);
}

static void answer_exit(struct agent *a, const struct stream *s) {
    struct record r;
    record_start(&r);
    if (WIFSIGNALED(s->status))
        record_add32(&r, TAG_SIGNAL, (uint32_t)WTERMSIG(s->status));
    else
        record_add32(&r, TAG_CODE, (uint32_t)WEXITSTATUS(s->status));
    record_finish(&r, EXIT, s->id);
    answer(a, r.bytes, r.used);
}

static void flush(struct agent *a) {
    while (a->out_head < a->out_tail) {
        ssize_t n = write(a->port, a->out + a->out_head, a->out_tail - a->out_head);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) return;
        if (n <= 0) { /* the host is gone: nobody is left to serve */
            a->shutdown = true;
            return;
        }
        a->out_head += (size_t)n;
    }
    a->out_head = a->out_tail = 0;
}

/* --- Streams -------------------------------------------------------------------------------------------------------- */

static struct stream *find_stream(struct agent *a, uint32_t id) {
    for (int i = 0; i < MAX_STREAMS; i++)
        if (id != 0 && a->streams[i].id == id) return &a->streams[i];
    return NULL;
}

static void close_fd(int *fd) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
}

static void free_stream(struct stream *s) {
    close_fd(&s->started);
    close_fd(&s->out[0].fd);
    close_fd(&s->out[1].fd);
    close_fd(&s->stdin_fd);
    free(s->stdin_data);
    memset(s, 0, sizeof *s);
}

/* Reads one chunk of a channel's pipe into the output buffer.
 * Returns whether something was read or the channel closed: false means nothing can be had now. */
static bool pump_output(struct agent *a, struct stream *s, int index) {
    struct channel *c = &s->out[index];
    if (c->fd < 0 || c->window == 0 || s->started >= 0) return false;
    if (out_room(a) < HEADER + CHUNK + RESERVE) return false;
    size_t length = c->window < CHUNK ? c->window : CHUNK;
    unsigned char *frame = out_reserve(a, HEADER + length);
    ssize_t n = read(c->fd, frame + HEADER, length);
    if (n < 0) {
        if (errno == EINTR || errno == EAGAIN) return false;
        n = 0;
    }
    if (n == 0) {
        close_fd(&c->fd);
        return true;
    }
    put_header(frame, index == 0 ? STDOUT : STDERR, s->id, (uint32_t)n);
    a->out_tail += HEADER + (size_t)n;
    c->window -= (uint32_t)n;
    c->owed -= c->owed < (uint32_t)n ? c->owed : (uint32_t)n;
    return true;
}

static uint32_t waiting_in(const struct channel *c) {
    int bytes = 0;
    return c->fd >= 0 && ioctl(c->fd, FIONREAD, &bytes) == 0 ? (uint32_t)bytes : 0;
}

/* Whether a channel of a command that has ended holds nothing more that the command wrote. What it left running may
 * fill the pipe for ever, or itself have read from it. */
static bool drained(const struct channel *c) { return c->owed == 0 || waiting_in(c) == 0; }

static void pump_stdin(struct agent *a, struct stream *s) {
    while (s->stdin_fd >= 0 && s->stdin_used > 0) {
        uint32_t run = INITIAL_WINDOW - s->stdin_head;
        if (run > s->stdin_used) run = s->stdin_used;
        ssize_t n = write(s->stdin_fd, s->stdin_data + s->stdin_head, run);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) break;
        if (n < 0) { /* the command closed its stdin: take what still comes and drop it */
            s->stdin_passed += s->stdin_used;
            s->stdin_used = 0;
            close_fd(&s->stdin_fd);
            break;
        }
        s->stdin_head = (s->stdin_head + (uint32_t)n) % INITIAL_WINDOW;
        s->stdin_used -= (uint32_t)n;
        s->stdin_passed += (uint32_t)n;
    }
    if (s->stdin_eof && s->stdin_used == 0) close_fd(&s->stdin_fd);
    /* Give back in large pieces, so that the host is not flooded with small ones. */
    if (can_answer(a) && (s->stdin_passed >= INITIAL_WINDOW / 4 || (s->stdin_passed > 0 && s->stdin_used == 0))) {
        answer_window(a, s->id, s->stdin_passed);
        s->stdin_passed = 0;
    }
}

/* The program has started, or told why not. */
static void finish_start(struct agent *a, struct stream *s) {
    struct start_failure failure;
    if (!can_answer(a)) return;
    ssize_t n = read(s->started, &failure, sizeof failure);
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) return;
    close_fd(&s->started);
    if (n != (ssize_t)sizeof failure) return;
    failure.stage[sizeof failure.stage - 1] = 0;
    answer_error(a, s->id, failure.error, failure.stage, strerror(failure.error));
    free_stream(s); /* the child is reaped like any orphan */
}

static void finish_if_ended(struct agent *a, struct stream *s) {
    if (s->id == 0 || !s->exited) return;
    if (s->started >= 0) {
        finish_start(a, s);
        if (s->id == 0 || s->started >= 0) return;
    }
    if (!drained(&s->out[0]) || !drained(&s->out[1])) return;
    if (!can_answer(a)) return;
    answer_exit(a, s);
    free_stream(s);
}

/* The number of a process that is not reaped is not given to another, so this never hits a stranger. */
static void send_signal(const struct stream *s, int number, bool group) {
    if (s->exited) return;
    /* The group is there once the child has called setsid: until then there is only the child. */
    if (!group || kill(-s->pid, number) != 0) kill(s->pid, number);
}

static void reap(struct agent *a) {
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        for (int i = 0; i < MAX_STREAMS; i++) {
            struct stream *s = &a->streams[i];
            if (s->id == 0 || s->exited || s->pid != pid) continue; /* one that has ended may share its number */
            s->exited = true;
            s->status = status;
            for (int k = 0; k < 2; k++) s->out[k].owed = waiting_in(&s->out[k]);
        }
    }
}

/* --- EXEC ----------------------------------------------------------------------------------------------------------- */

struct command {
    char **argv, **env;
    const char *cwd, *user;
};

static void fail_start(int fd, const char *stage) {
    struct start_failure failure = {.error = errno};
    strncpy(failure.stage, stage, sizeof failure.stage - 1);
    (void)!write(fd, &failure, sizeof failure);
    _exit(127);
}

static bool parse_number(const char *text, uint32_t *value) {
    char *end;
    if (*text < '0' || *text > '9') return false;
    errno = 0;
    unsigned long long n = strtoull(text, &end, 10);
    if (errno != 0 || *end != 0 || n >= UINT32_MAX) return false;
    *value = (uint32_t)n;
    return true;
}

static const char *getenv_of(char **env, const char *name) {
    size_t length = strlen(name);
    for (; *env != NULL; env++)
        if (strncmp(*env, name, length) == 0 && (*env)[length] == '=') return *env + length + 1;
    return NULL;
}

/* The entry of /etc/passwd for a name, or for `uid` if that is NULL. The files are read as they are: getpwnam and its kin
 * would ask a name service's socket first, which nobody has here and which an image could fake. */
static struct passwd *find_user(const char *name, uint32_t uid) {
    FILE *file = fopen("/etc/passwd", "re");
    struct passwd *entry = NULL;
    if (file == NULL) return NULL;
    while ((entry = fgetpwent(file)) != NULL)
        if (name != NULL ? strcmp(entry->pw_name, name) == 0 : entry->pw_uid == uid) break;
    fclose(file);
    return entry;
}

static bool has_member(const struct group *group, const char *name) {
    for (char **member = group->gr_mem; *member != NULL; member++)
        if (strcmp(*member, name) == 0) return true;
    return false;
}

/* Finds the number of the group `name`, if that is not NULL; or the groups that `user` is a member of, `groups` having
 * one already. Returns how many there are: 0 if there is none of that name. */
static size_t find_groups(const char *name, const char *user, gid_t *groups) {
    FILE *file = fopen("/etc/group", "re");
    struct group *entry;
    size_t count = name == NULL;
    if (file == NULL) return count;
    while ((entry = fgetgrent(file)) != NULL && count < MAX_GROUPS) {
        if (name != NULL ? strcmp(entry->gr_name, name) != 0 : entry->gr_gid == *groups || !has_member(entry, user))
            continue;
        groups[count++] = entry->gr_gid;
        if (name != NULL) break;
    }
    fclose(file);
    return count;
}

/* Becomes `user[:group]`. Runs in the child: the guest's passwd and group files are not to be trusted. */
static const char *become(const char *spec, int failed) {
    static char home[4096] = "/";
    static gid_t groups[MAX_GROUPS];
    char user[256], *group;
    if (strlen(spec) >= sizeof user) {
        errno = ENAMETOOLONG;
        fail_start(failed, "user");
    }
    strcpy(user, spec);
    group = strchr(user, ':');
    if (group != NULL) *group++ = 0;
    uint32_t uid, gid = 0;
    bool number = parse_number(user, &uid);
    struct passwd *entry = find_user(number ? NULL : user, uid);
    if (entry == NULL && !number) {
        errno = ENOENT;
        fail_start(failed, "user");
    }
    if (entry != NULL) {
        uid = entry->pw_uid;
        gid = entry->pw_gid;
        if (entry->pw_dir != NULL && strlen(entry->pw_dir) < sizeof home) strcpy(home, entry->pw_dir);
    }
    size_t count = 1;
    groups[0] = gid;
    if (group == NULL) {
        if (entry != NULL) count = find_groups(NULL, entry->pw_name, groups);
    } else if (*group != 0) {
        if (parse_number(group, &gid)) {
            groups[0] = gid;
        } else if (find_groups(group, NULL, groups) == 0) {
            errno = ENOENT;
            fail_start(failed, "group");
        }
    }
    if (setgroups(count, groups) != 0 || setgid(groups[0]) != 0 || setuid(uid) != 0) fail_start(failed, "user");
    return home;
}

/* The child's half of EXEC: never returns. */
static void run_command(const struct command *c, int fds[3], int failed) {
    for (int i = 0; i < 3; i++)
        if (dup2(fds[i], i) < 0) fail_start(failed, "exec");
    setsid();
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    const char *home = become(c->user != NULL ? c->user : "0", failed);
    /* HOME and PATH have the last two, spare places of the environment (see parse_exec). */
    char **end = c->env;
    while (*end != NULL) end++;
    static char home_entry[4096 + 5], path_entry[sizeof default_path + 5];
    if (getenv_of(c->env, "HOME") == NULL) {
        snprintf(home_entry, sizeof home_entry, "HOME=%s", home);
        *end++ = home_entry;
        *end = NULL;
    }
    if (getenv_of(c->env, "PATH") == NULL) {
        snprintf(path_entry, sizeof path_entry, "PATH=%s", default_path);
        *end++ = path_entry;
        *end = NULL;
    }
    if (chdir(c->cwd != NULL ? c->cwd : "/") != 0) fail_start(failed, "chdir");
    environ = c->env;
    execvp(c->argv[0], c->argv);
    fail_start(failed, "exec");
}

/* Walks a record's fields. Returns 1 with the next one, 0 at the end, -1 when it is malformed. */
static int next_field(const unsigned char **p, size_t *left, uint32_t *tag, const unsigned char **data, size_t *length) {
    if (*left == 0) return 0;
    if (*left < FIELD || get16(*p + 2) != 0) return -1;
    *tag = get16(*p);
    *length = get32(*p + 4);
    if (*length > *left - FIELD) return -1;
    *data = *p + FIELD;
    *p += FIELD + *length;
    *left -= FIELD + *length;
    return 1;
}

static bool add_string(char **list, size_t *count, char **text, const unsigned char *data, size_t length) {
    if (memchr(data, 0, length) != NULL) return false;
    char *start = *text;
    memcpy(start, data, length);
    start[length] = 0;
    *text += length + 1;
    list[(*count)++] = start;
    return true;
}

/* Parses EXEC into one allocation, returned and to be freed by the caller; NULL when malformed (errno EPROTO) or ENOMEM. */
static void *parse_exec(const unsigned char *payload, size_t size, struct command *c) {
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
    size_t pointers = (args + 1 + envs + 3) * sizeof(char *);
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

static bool start_command(struct agent *a, uint32_t id, const unsigned char *payload, size_t size) {
    struct command command;
    void *block = parse_exec(payload, size, &command);
    if (block == NULL && errno == EPROTO) return false;
    struct stream *s = NULL;
    for (int i = 0; i < MAX_STREAMS && s == NULL; i++)
        if (a->streams[i].id == 0) s = &a->streams[i];
    /* pipes: stdin, stdout, stderr, start status; [i][0] is the read end */
    int pipes[4][2], made = 0;
    int error = block == NULL ? ENOMEM : s == NULL ? EAGAIN : 0;
    while (error == 0 && made < 4) {
        if (pipe2(pipes[made], O_CLOEXEC) != 0)
            error = errno;
        else
            made++;
    }
    pid_t pid = -1;
    if (error == 0) {
        /* Large pipes: fewer wake-ups for bulk data. Beyond the limit for unprivileged users it is refused: no matter. */
        fcntl(pipes[1][0], F_SETPIPE_SZ, 1 << 20);
        int child[3] = {pipes[0][0], pipes[1][1], pipes[2][1]};
        pid = fork();
        if (pid < 0) error = errno;
        if (pid == 0) run_command(&command, child, pipes[3][1]);
    }
    free(block);
    if (error != 0) {
        while (made-- > 0) {
            close(pipes[made][0]);
            close(pipes[made][1]);
        }
        answer_error(a, id, error, "fork", strerror(error));
        return true;
    }
    memset(s, 0, sizeof *s);
    s->id = id;
    s->pid = pid;
    s->stdin_fd = pipes[0][1];
    close(pipes[0][0]);
    for (int i = 0; i < 2; i++) {
        s->out[i].fd = pipes[1 + i][0];
        s->out[i].window = INITIAL_WINDOW;
        fcntl(s->out[i].fd, F_SETFL, O_NONBLOCK);
        close(pipes[1 + i][1]);
    }
    s->started = pipes[3][0];
    close(pipes[3][1]);
    fcntl(s->stdin_fd, F_SETFL, O_NONBLOCK);
    fcntl(s->started, F_SETFL, O_NONBLOCK);
    return true;
}

/* --- Input from the port --------------------------------------------------------------------------------------------- */

static bool take_hello(struct agent *a, const unsigned char *payload, size_t size) {
    const unsigned char *data;
    size_t length;
    uint32_t tag;
    int more;
    bool spoken = false;
    while ((more = next_field(&payload, &size, &tag, &data, &length)) > 0)
        if (tag == TAG_VERSION && length == 4) spoken = get32(data) == VERSION;
    a->greeted = true;
    return more == 0 && spoken;
}

static bool take_stdin(struct stream *s, const unsigned char *data, size_t length) {
    if (length == 0) return false;
    if (s == NULL) return true;
    if (s->stdin_eof || length > INITIAL_WINDOW - s->stdin_used - s->stdin_passed) return false;
    if (s->stdin_fd < 0) {
        s->stdin_passed += (uint32_t)length;
        return true;
    }
    if (s->stdin_data == NULL && (s->stdin_data = malloc(INITIAL_WINDOW)) == NULL) {
        close_fd(&s->stdin_fd);
        s->stdin_passed += (uint32_t)length;
        return true;
    }
    for (size_t done = 0; done < length;) {
        uint32_t at = (s->stdin_head + s->stdin_used) % INITIAL_WINDOW;
        size_t run = INITIAL_WINDOW - at;
        if (run > length - done) run = length - done;
        memcpy(s->stdin_data + at, data + done, run);
        s->stdin_used += (uint32_t)run;
        done += run;
    }
    return true;
}

static bool take_window(struct stream *s, const unsigned char *payload, size_t size) {
    if (size != 5 || payload[0] < 1 || payload[0] > 2) return false;
    if (s == NULL) return true;
    struct channel *c = &s->out[payload[0] - 1];
    uint32_t bytes = get32(payload + 1);
    if (bytes > INITIAL_WINDOW - c->window) return false;
    c->window += bytes;
    return true;
}

static bool take_signal(struct stream *s, const unsigned char *payload, size_t size) {
    if (size != 2 || payload[0] < 1 || payload[0] > 64) return false;
    if (s != NULL) send_signal(s, payload[0], payload[1] & 1);
    return true;
}

/* Acts on one frame. False: the host broke the protocol. */
static bool take_frame(struct agent *a, int type, uint32_t id, const unsigned char *payload, size_t size) {
    struct stream *s = find_stream(a, id);
    if (!a->greeted) return type == HELLO && id == 0 && take_hello(a, payload, size);
    if ((type == SHUTDOWN) != (id == 0)) return false;
    switch (type) {
        case SHUTDOWN:
            a->shutdown = true;
            return size == 0;
        case EXEC:
            return s == NULL && start_command(a, id, payload, size);
        case STDIN:
            return take_stdin(s, payload, size);
        case STDIN_EOF:
            if (s != NULL) s->stdin_eof = true;
            return size == 0;
        case WINDOW:
            return take_window(s, payload, size);
        case SIGNAL:
            return take_signal(s, payload, size);
        default:
            return false;
    }
}

static size_t largest(int type) {
    return type == EXEC ? MAX_EXEC : type == STDIN ? MAX_DATA : MAX_CONTROL;
}

/* Takes the whole frames out of `in`. False: the host broke the protocol. */
static bool take_input(struct agent *a) {
    size_t at = 0;
    while (!a->shutdown && a->large == NULL && a->in_used - at >= HEADER && can_answer(a)) {
        const unsigned char *h = a->in + at;
        size_t length = get32(h + 8), here = a->in_used - at - HEADER;
        if (h[1] != 0 || h[2] != 0 || h[3] != 0 || length > largest(h[0])) return false;
        if (length > INPUT - HEADER) { /* an EXEC with many arguments, or STDIN just over the buffer */
            if ((a->large = malloc(length)) == NULL) return false;
            memcpy(a->large_header, h, HEADER);
            memcpy(a->large, h + HEADER, here); /* here < length: `in` is smaller than the frame */
            a->large_length = length;
            a->large_used = here;
            at = a->in_used;
            break;
        }
        if (here < length) break;
        if (!take_frame(a, h[0], get32(h + 4), h + HEADER, length)) return false;
        at += HEADER + length;
    }
    memmove(a->in, a->in + at, a->in_used - at);
    a->in_used -= at;
    return true;
}

/* Takes the large frame once it is whole. False: the host broke the protocol. */
static bool take_large(struct agent *a) {
    if (a->large == NULL || a->large_used < a->large_length || !can_answer(a)) return true;
    bool good = take_frame(a, a->large_header[0], get32(a->large_header + 4), a->large, a->large_length);
    free(a->large);
    a->large = NULL;
    return good;
}

/* Reads what the port has. False: the host broke the protocol. */
static bool read_port(struct agent *a) {
    unsigned char *to = a->large != NULL ? a->large + a->large_used : a->in + a->in_used;
    size_t room = a->large != NULL ? a->large_length - a->large_used : INPUT - a->in_used;
    if (room == 0) return true; /* frames wait for room for their answers */
    ssize_t n = read(a->port, to, room);
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) return true;
    if (n <= 0) { /* the host is gone */
        a->shutdown = true;
        return true;
    }
    if (a->large == NULL)
        a->in_used += (size_t)n;
    else
        a->large_used += (size_t)n;
    return true;
}

/* --- The loop ------------------------------------------------------------------------------------------------------ */

static void greet(struct agent *a, const char *kernel, const struct milestone *milestones, size_t count) {
    struct record r;
    record_start(&r);
    record_add32(&r, TAG_VERSION, VERSION);
    record_add(&r, TAG_KERNEL, kernel, strlen(kernel));
    for (size_t i = 0; i < count; i++) {
        unsigned char value[64];
        put32(value, (uint32_t)milestones[i].usec);
        put32(value + 4, (uint32_t)(milestones[i].usec >> 32));
        size_t name = strnlen(milestones[i].name, sizeof value - 8);
        memcpy(value + 8, milestones[i].name, name);
        record_add(&r, TAG_MILESTONE, value, 8 + name);
    }
    record_finish(&r, HELLO, 0);
    answer(a, r.bytes, r.used);
}

/* Reads from the commands' output pipes in turn, one chunk each, until there is no more room or nothing to read. */
static void pump_outputs(struct agent *a) {
    unsigned idle = 0;
    while (idle < 2 * MAX_STREAMS && out_room(a) >= HEADER + CHUNK + RESERVE) {
        unsigned turn = a->turn++ % (2 * MAX_STREAMS);
        struct stream *s = &a->streams[turn / 2];
        idle = s->id != 0 && pump_output(a, s, turn % 2) ? 0 : idle + 1;
    }
}

static void poll_fd(struct pollfd *polls, nfds_t *count, int fd, short events) {
    polls[(*count)++] = (struct pollfd){.fd = fd, .events = events};
}

/* Waits until something can be done. What was ready is found by trying: every descriptor is non-blocking. */
static void wait_for_work(struct agent *a) {
    struct pollfd polls[2 + 4 * MAX_STREAMS];
    nfds_t count = 0;
    bool room = out_room(a) >= HEADER + CHUNK + RESERVE, answers = can_answer(a);
    poll_fd(polls, &count, a->port, (short)((answers ? POLLIN : 0) | (a->out_head < a->out_tail ? POLLOUT : 0)));
    poll_fd(polls, &count, a->signals, POLLIN);
    for (int i = 0; i < MAX_STREAMS; i++) {
        const struct stream *s = &a->streams[i];
        if (s->id == 0) continue;
        if (s->started >= 0 && answers) poll_fd(polls, &count, s->started, POLLIN);
        for (int k = 0; k < 2 && room && s->started < 0; k++)
            if (s->out[k].fd >= 0 && s->out[k].window > 0) poll_fd(polls, &count, s->out[k].fd, POLLIN);
        if (s->stdin_fd >= 0 && s->stdin_used > 0) poll_fd(polls, &count, s->stdin_fd, POLLOUT);
    }
    /* That the host is gone is found by reading. While the port is full it is not read; nor need a write fail then: a
     * virtio port without a host is just never writable, and poll would say over and over that it has hung up. */
    if (poll(polls, count, -1) > 0 && !answers && (polls[0].revents & (POLLHUP | POLLERR))) a->shutdown = true;
}

int agent_serve(int port, const char *kernel, const struct milestone *milestones, size_t count) {
    static struct agent agent; /* large: not for the stack */
    struct agent *a = &agent;
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child, NULL);
    signal(SIGPIPE, SIG_IGN);
    memset(a, 0, sizeof *a);
    a->port = port;
    a->signals = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
    fcntl(port, F_SETFL, O_NONBLOCK);
    greet(a, kernel, milestones, count);
    bool good = true;
    while (good && !a->shutdown) {
        good = take_large(a) && take_input(a);
        if (!good || a->shutdown) break;
        for (int i = 0; i < MAX_STREAMS; i++) {
            struct stream *s = &a->streams[i];
            if (s->id != 0 && s->started >= 0) finish_start(a, s);
            if (s->id != 0) pump_stdin(a, s);
        }
        pump_outputs(a);
        for (int i = 0; i < MAX_STREAMS; i++) finish_if_ended(a, &a->streams[i]);
        /* All of the above is done before the wait, which knows of no work that is left. What waits for room is left
         * if the port takes nothing, and then poll tells when it does; otherwise it is done now. */
        bool full = !can_answer(a);
        flush(a);
        if (a->shutdown || (full && can_answer(a))) continue;
        wait_for_work(a);
        struct signalfd_siginfo ignored;
        while (read(a->signals, &ignored, sizeof ignored) > 0) continue;
        if (can_answer(a)) good = read_port(a);
        reap(a);
    }
    for (int i = 0; i < MAX_STREAMS; i++)
        if (a->streams[i].id != 0) {
            send_signal(&a->streams[i], SIGKILL, true);
            free_stream(&a->streams[i]);
        }
    free(a->large);
    close_fd(&a->signals);
    if (!good) {
        fcntl(port, F_SETFL, 0);
        flush(a); /* a frame that is half on its way must be whole before the next one */
        agent_report(port, EPROTO, "protocol", "the host broke the control protocol");
    }
    return good ? 0 : -1;
}

void agent_report(int port, int error, const char *stage, const char *text) {
    struct record r;
    record_error(&r, 0, error, stage, text);
    fcntl(port, F_SETFL, 0);
    for (size_t done = 0; done < r.used;) {
        ssize_t n = write(port, r.bytes + done, r.used - done);
        if (n <= 0) return;
        done += (size_t)n;
    }
}

/* The guest agent: many commands and connections at once over one port. See docs/protocol.md for the wire.
 *
 * One thread and one poll loop. What it holds is bounded:
 *   - bytes from the host: one frame being received, and for each stream its stdin window;
 *   - bytes to the host: one output buffer. Output is read from a pipe or socket only when the buffer has room for a
 *     whole frame and the host has given the channel window; answers (EXIT, ERROR, WINDOW…) have a reserve of their own,
 *     and whatever would cause one waits while that reserve is used up.
 */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include "address.h"
#include "cgroup.h"
#include "command.h"
#include "resume.h"
#include "wire.h"

enum {
    /* The kernel's virtio console takes at most 32 KiB in one write: one frame of ours is one write. */
    CHUNK = 32768 - HEADER,
    /* Room that output leaves to answers. Whatever causes an answer looks first whether the largest one fits, and waits
     * for the port if it does not (can_answer): so no answer is ever lost. */
    LARGEST_ANSWER = HEADER + MAX_CONTROL,
    RESERVE = 3 * LARGEST_ANSWER,
    OUTPUT = 8 * 32768 + RESERVE,
    INPUT = 65536,
    /* Descriptors: at most five for each stream, and some more. */
    OWN_FILES = 8 * MAX_STREAMS,
    /* Connections that listeners take, of all streams. */
    MAX_ACCEPTED = 128,
    /* More than the kernel holds of what was written to a terminal (640 KiB, TTYB_DEFAULT_MEM_LIMIT). */
    TERMINAL_HOLDS = 1 << 20
};

enum kind { COMMAND, CONNECTION, LISTENER };

/* What is read for the host: an output of a command, the receiving half of a connection, or a listener. */
struct channel {
    int fd;          /* -1: closed */
    bool ready;      /* poll has said so, and no read that it is not */
    uint32_t window; /* bytes that the host still takes */
    uint32_t owed;   /* of a command that has ended: bytes that it left behind and that must come before EXIT */
};

struct stream {
    uint32_t id; /* 0: the slot is free */
    enum kind kind;

    /* A command. */
    pid_t pid;
    bool builtin;    /* it is a function of this program */
    bool orphan;     /* its host is another machine's now: nothing is said of it, and its output goes nowhere */
    uint32_t cgroup; /* the number of its cgroup */
    bool killed;     /* with all of its processes */
    bool exited;
    int status;
    struct rusage usage;
    int started;  /* pipe that carries errno and stage if the program could not be started; -1: it has been */
    int terminal; /* -1: it has none. Its master is out[0] and stdin */
    bool midline; /* the last that was typed there is no whole line */
    bool announced; /* the host is told when it has started */

    /* A connection, whose socket is out[0] and stdin. */
    bool opening; /* it does not stand yet */
    int broken;   /* the errno that it ends with */

    /* A listener, whose socket is out[0]: it could not take a connection, and tries again with the next event. */
    bool resting;

    struct channel out[2];
    int stdin_fd; /* -1: closed */
    bool stdin_eof;
    unsigned char *stdin_data; /* a ring of INITIAL_WINDOW bytes, allocated when first used */
    uint32_t stdin_head, stdin_used;
    uint32_t stdin_passed; /* taken from the ring, not yet given back to the host */
};

struct agent {
    int port;
    int signals;
    bool greeted; /* the host's HELLO has come */
    bool paused;  /* nothing is said, so that the machine can be saved */
    const char *kernel;
    waking woken;
    int random; /* /dev/urandom */
    bool shutdown;
    struct place place;
    struct cgroups cgroups;
    struct stream streams[MAX_STREAMS];
    uint32_t accepted; /* the number of the last connection that a listener took */
    uint32_t cgroup;   /* the number of the last command's cgroup */
    struct spare spare;
    unsigned turn;     /* where the round of output channels goes on, so that none is starved */
    unsigned char out[OUTPUT];
    size_t out_head, out_tail;
    unsigned char in[INPUT];
    size_t in_used;
    unsigned char *large; /* the payload of a frame larger than `in`, while it arrives */
    unsigned char large_header[HEADER];
    size_t large_length, large_used;
};

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

/* The caller has seen that it can_answer, for these too. */
static void answer_record(struct agent *a, struct record *r, enum frame_type type, uint32_t stream) {
    record_finish(r, type, stream);
    answer(a, r->bytes, r->used);
}

static void make_error(struct record *r, uint32_t stream, int error, const char *stage, const char *text) {
    record_start(r);
    record_add32(r, TAG_ERRNO, (uint32_t)error);
    record_add_text(r, TAG_STAGE, stage);
    record_add(r, TAG_TEXT, text, strnlen(text, 1024));
    record_finish(r, FRAME_ERROR, stream);
}

static void answer_error(struct agent *a, uint32_t stream, int error, const char *stage) {
    struct record r;
    make_error(&r, stream, error, stage, strerror(error));
    answer(a, r.bytes, r.used);
}

static void answer_window(struct agent *a, uint32_t stream, uint32_t bytes) {
    unsigned char frame[HEADER + 5];
    put_header(frame, FRAME_WINDOW, stream, 5);
    frame[HEADER] = 0;
    put32(frame + HEADER + 1, bytes);
    answer(a, frame, sizeof frame);
}

static void answer_opened(struct agent *a, uint32_t stream) {
    unsigned char frame[HEADER];
    put_header(frame, FRAME_OPENED, stream, 0);
    answer(a, frame, sizeof frame);
}

static void answer_eof(struct agent *a, uint32_t stream) {
    unsigned char frame[HEADER + 1];
    put_header(frame, FRAME_EOF, stream, 1);
    frame[HEADER] = 1;
    answer(a, frame, sizeof frame);
}

/* EXIT of a connection or listener. */
static void answer_end(struct agent *a, uint32_t stream, enum tag how, uint32_t value) {
    struct record r;
    record_start(&r);
    record_add32(&r, how, value);
    answer_record(a, &r, FRAME_EXIT, stream);
}

static void put_time(unsigned char *p, struct timeval time) {
    put64(p, (uint64_t)time.tv_sec * 1000000 + (uint64_t)time.tv_usec);
}

/* EXIT of a command, with what it used. */
static void answer_exit(struct agent *a, const struct stream *s) {
    struct record r;
    unsigned char usage[24];
    uint64_t peak;
    uint32_t kills;
    record_start(&r);
    if (WIFSIGNALED(s->status))
        record_add32(&r, TAG_SIGNAL, (uint32_t)WTERMSIG(s->status));
    else
        record_add32(&r, TAG_CODE, (uint32_t)WEXITSTATUS(s->status));
    put_time(usage, s->usage.ru_utime);
    put_time(usage + 8, s->usage.ru_stime);
    put64(usage + 16, (uint64_t)s->usage.ru_maxrss * 1024);
    record_add(&r, TAG_USAGE, usage, sizeof usage);
    if (cgroup_peak(&a->cgroups, s->cgroup, &peak)) record_add64(&r, TAG_PEAK, peak);
    if (cgroup_oom_kills(&a->cgroups, s->cgroup, &kills)) record_add32(&r, TAG_OOM_KILLS, kills);
    answer_record(a, &r, FRAME_EXIT, s->id);
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
        if (id != 0 && a->streams[i].id == id && !a->streams[i].orphan) return &a->streams[i];
    return NULL;
}

static struct stream *free_slot(struct agent *a) {
    for (int i = 0; i < MAX_STREAMS; i++)
        if (a->streams[i].id == 0) return &a->streams[i];
    return NULL;
}

/* For a connection that a listener takes: these leave slots to what the host opens, whatever the guest does. */
static struct stream *free_slot_for_guest(struct agent *a) {
    int taken = 0;
    for (int i = 0; i < MAX_STREAMS; i++) taken += (a->streams[i].id & from_guest) != 0;
    return taken < MAX_ACCEPTED ? free_slot(a) : NULL;
}

/* Makes the free slot `s` a stream without any descriptors. */
static void open_stream(struct stream *s, uint32_t id, enum kind kind) {
    memset(s, 0, sizeof *s);
    s->id = id;
    s->kind = kind;
    s->started = s->terminal = s->stdin_fd = -1;
    for (int i = 0; i < 2; i++) s->out[i] = (struct channel){.fd = -1, .window = INITIAL_WINDOW};
}

static void close_fd(int *fd) {
    if (*fd >= 0) close(*fd);
    *fd = -1;
}

/* A socket or the master of a terminal is both stdin and out[0]: it is closed with the last of them. */
static void close_stdin(struct stream *s) {
    if (s->stdin_fd == s->out[0].fd) s->stdin_fd = -1;
    close_fd(&s->stdin_fd);
}

static void close_output(struct stream *s, int index) {
    if (s->out[index].fd == s->stdin_fd) s->out[index].fd = -1;
    close_fd(&s->out[index].fd);
}

static void free_stream(struct stream *s) {
    close_fd(&s->started);
    close_fd(&s->terminal);
    close_output(s, 0);
    close_output(s, 1);
    close_stdin(s);
    free(s->stdin_data);
    memset(s, 0, sizeof *s);
}

/* --- Output of commands and connections ----------------------------------------------------------------------------- */

static bool has_room(const struct agent *a) { return out_room(a) >= HEADER + CHUNK + RESERVE; }

/* Whether a channel is to be read now, if it has something. */
static bool wants_output(const struct stream *s, int index) {
    const struct channel *c = &s->out[index];
    return s->kind != LISTENER && c->fd >= 0 && c->window > 0 && s->started < 0 && !s->opening;
}

/* Nobody takes stdin any more: what still comes is dropped. */
static void drop_stdin(struct stream *s) {
    s->stdin_passed += s->stdin_used;
    s->stdin_used = 0;
    close_stdin(s);
}

/* A channel has ended, with an errno if it broke. */
static void end_output(struct agent *a, struct stream *s, int index, int error) {
    close_output(s, index);
    if (s->kind != CONNECTION) return;
    if (s->broken == 0) s->broken = error;
    if (s->broken != 0)
        drop_stdin(s);
    else
        answer_eof(a, s->id);
}

/* Reads one chunk of a channel into the output buffer, which has_room.
 * Returns whether something was read or the channel closed: false means nothing can be had now. */
static bool pump_output(struct agent *a, struct stream *s, int index) {
    struct channel *c = &s->out[index];
    if (!c->ready || !wants_output(s, index)) return false;
    size_t length = c->window < CHUNK ? c->window : CHUNK;
    unsigned char *frame = out_reserve(a, HEADER + length);
    ssize_t n = read(c->fd, frame + HEADER, length);
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) {
        c->ready = false;
        return false;
    }
    if (n <= 0) { /* a terminal ends with EIO */
        end_output(a, s, index, n < 0 ? errno : 0);
        return true;
    }
    if (!s->orphan) {
        put_header(frame, index == 0 ? FRAME_STDOUT : FRAME_STDERR, s->id, (uint32_t)n);
        a->out_tail += HEADER + (size_t)n;
        c->window -= (uint32_t)n;
    }
    c->owed -= c->owed < (uint32_t)n ? c->owed : (uint32_t)n;
    return true;
}

/* Reads from the channels in turn, one chunk each, until there is no more room or nothing to read. */
static void pump_outputs(struct agent *a) {
    unsigned idle = 0;
    while (idle < 2 * MAX_STREAMS && has_room(a)) {
        unsigned turn = a->turn++ % (2 * MAX_STREAMS);
        struct stream *s = &a->streams[turn / 2];
        idle = s->id != 0 && pump_output(a, s, turn % 2) ? 0 : idle + 1;
    }
}

/* How much a command that has just ended may have left in a channel. What is written to a terminal takes a while to
 * arrive at its master, and is not counted before. */
static uint32_t left_in(const struct stream *s, const struct channel *c) {
    int bytes = 0;
    if (c->fd < 0) return 0;
    if (s->terminal >= 0) return TERMINAL_HOLDS;
    return ioctl(c->fd, FIONREAD, &bytes) == 0 ? (uint32_t)bytes : 0;
}

/* Whether a channel of a command that has ended holds nothing more that the command wrote. What it left running may
 * fill the pipe for ever, or itself have read from it. Poll, unlike FIONREAD, waits for what is on its way in a
 * terminal. */
static bool drained(const struct channel *c) {
    struct pollfd holds = {.fd = c->fd, .events = POLLIN};
    return c->owed == 0 || c->fd < 0 || poll(&holds, 1, 0) <= 0 || !(holds.revents & POLLIN);
}

/* --- Their input ---------------------------------------------------------------------------------------------------- */

/* Types the character that ends a terminal's input. Within a line it only passes on what there is of the line: there
 * it takes a second one. A terminal in raw mode hands it to the program like any other. Returns whether it is done. */
static bool type_eof(struct stream *s) {
    struct termios settings;
    if (tcgetattr(s->terminal, &settings) != 0) return true;
    unsigned char key = settings.c_cc[VEOF] != _POSIX_VDISABLE ? settings.c_cc[VEOF] : 'D' - '@', keys[2] = {key, key};
    size_t count = (settings.c_lflag & ICANON) && s->midline ? 2 : 1;
    ssize_t n = write(s->stdin_fd, keys, count);
    if (n < 0) return errno != EAGAIN && errno != EINTR;
    if (n > 0) s->midline = false;
    return (size_t)n == count;
}

/* All stdin has been passed on: the command or peer is told. */
static void end_stdin(struct stream *s) {
    if (s->terminal >= 0 && !type_eof(s)) return;
    if (s->kind == CONNECTION) shutdown(s->stdin_fd, SHUT_WR);
    close_stdin(s);
}

static void pump_stdin(struct agent *a, struct stream *s) {
    if (s->opening) return;
    while (s->stdin_fd >= 0 && s->stdin_used > 0) {
        uint32_t run = INITIAL_WINDOW - s->stdin_head;
        if (run > s->stdin_used) run = s->stdin_used;
        ssize_t n = write(s->stdin_fd, s->stdin_data + s->stdin_head, run);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0 && errno == EAGAIN) break;
        if (n < 0) { /* the command closed its stdin. A peer that reads no more may still have sent something */
            if (s->kind == CONNECTION && errno != EPIPE) s->broken = errno;
            drop_stdin(s);
            break;
        }
        unsigned char last = s->stdin_data[s->stdin_head + (uint32_t)n - 1];
        s->midline = last != '\n' && last != '\r';
        s->stdin_head = (s->stdin_head + (uint32_t)n) % INITIAL_WINDOW;
        s->stdin_used -= (uint32_t)n;
        s->stdin_passed += (uint32_t)n;
    }
    if (s->stdin_fd >= 0 && s->stdin_eof && s->stdin_used == 0) end_stdin(s);
    if (s->orphan) return;
    /* Give back in large pieces, so that the host is not flooded with small ones. */
    if (can_answer(a) && (s->stdin_passed >= INITIAL_WINDOW / 4 || (s->stdin_passed > 0 && s->stdin_used == 0))) {
        answer_window(a, s->id, s->stdin_passed);
        s->stdin_passed = 0;
    }
}

/* --- Commands ------------------------------------------------------------------------------------------------------- */

/* Starts a command, or without one the spare, in a cgroup of its own. Returns 0, or an errno and at which stage it failed. */
static int start_in_cgroup(struct agent *a, const struct command *command, struct child *child, const char **stage) {
    struct place *place = &a->place;
    *stage = "cgroup";
    place->cgroup = -1;
    child->cgroup = a->cgroup;
    if (a->cgroups.parent >= 0) {
        child->cgroup = ++a->cgroup;
        place->cgroup = cgroup_make(&a->cgroups, child->cgroup);
        if (place->cgroup < 0) return errno;
    }
    int error = command != NULL ? start_child(command, place, child, stage) : start_spare(place, &a->spare);
    if (error != 0) cgroup_remove(&a->cgroups, child->cgroup);
    close_fd(&place->cgroup);
    return error;
}

/* Has a child ready for the next command: the machine is about to be saved. Without one, nothing is lost but time. */
static void prepare_spare(struct agent *a) {
    const char *stage;
    if (a->spare.orders < 0) start_in_cgroup(a, NULL, &a->spare.child, &stage);
}

static void drop_spare(struct agent *a) {
    if (a->spare.orders < 0) return;
    dismiss_spare(&a->spare);
    cgroup_remove(&a->cgroups, a->spare.child.cgroup);
}

/* EXEC. False: it is malformed. */
static bool start_command(struct agent *a, uint32_t id, const unsigned char *payload, size_t size) {
    struct command command;
    struct child child;
    const char *stage = "fork";
    struct stream *s = free_slot(a);
    void *block = parse_exec(payload, size, &command);
    if (block == NULL && errno == EPROTO) return false;
    int error = block == NULL ? ENOMEM : s == NULL ? EAGAIN : 0;
    if (error == 0 && (command.flags & ~(uint32_t)EXEC_FLAGS)) {
        error = EINVAL;
        stage = "flags";
    }
    if (error == 0 && a->spare.orders >= 0 && order_spare(&a->spare, &command, payload, size)) {
        child = a->spare.child;
    } else if (error == 0) {
        drop_spare(a); /* it would count among the command's processes, where these are limited */
        error = start_in_cgroup(a, &command, &child, &stage);
    }
    if (error != 0) {
        answer_error(a, id, error, stage);
    } else {
        open_stream(s, id, COMMAND);
        s->pid = child.pid;
        s->started = child.started;
        s->cgroup = child.cgroup;
        s->builtin = command.flags & EXEC_BUILTIN;
        s->announced = command.flags & EXEC_ANNOUNCED;
        s->terminal = child.terminal;
        s->stdin_fd = child.stdin_fd;
        for (int i = 0; i < 2; i++) s->out[i].fd = child.out[i];
    }
    free(block);
    return true;
}

/* The program has started, or told why not. */
static void finish_start(struct agent *a, struct stream *s) {
    struct start_failure failure;
    if (!can_answer(a)) return;
    ssize_t n = read(s->started, &failure, sizeof failure);
    if (n < 0 && (errno == EINTR || errno == EAGAIN)) return;
    close_fd(&s->started);
    if (s->pid == a->place.init) a->place.init_started = -1;
    if (n != (ssize_t)sizeof failure) {
        if (s->announced) answer_opened(a, s->id);
        return;
    }
    if (s->pid == a->place.init) leave_init(&a->place);
    failure.stage[sizeof failure.stage - 1] = 0;
    if (!s->orphan) answer_error(a, s->id, failure.error, failure.stage);
    cgroup_remove(&a->cgroups, s->cgroup);
    free_stream(s); /* the child is reaped like any orphan */
}

static void finish_command(struct agent *a, struct stream *s) {
    if (s->started >= 0) finish_start(a, s);
    if (s->id == 0 || s->started >= 0 || !s->exited) return;
    if (!drained(&s->out[0]) || !drained(&s->out[1]) || !can_answer(a)) return;
    if (!s->orphan) answer_exit(a, s);
    if (s->killed) cgroup_await_death(&a->cgroups, s->cgroup);
    cgroup_remove(&a->cgroups, s->cgroup);
    free_stream(s);
}

/* The number of a process that is not reaped is not given to another, so this never hits a stranger. */
static void send_signal(struct agent *a, struct stream *s, int number, unsigned flags) {
    if (flags & SIGNAL_ALL) {
        cgroup_kill(&a->cgroups, s->cgroup);
        s->killed = true;
        number = SIGKILL; /* for one who has left the cgroup, as the guest's root can, or where there is none */
    }
    if (s->exited) return;
    /* The group is there once the child has called setsid: until then there is only the child. */
    if (!(flags & (SIGNAL_GROUP | SIGNAL_ALL)) || kill(-s->pid, number) != 0) kill(s->pid, number);
}

static void reap(struct agent *a) {
    struct rusage usage;
    int status;
    pid_t pid;
    bool any = false;
    while ((pid = wait4(-1, &status, WNOHANG, &usage)) > 0) {
        any = true;
        if (pid == a->place.init) leave_init(&a->place);
        if (pid == a->spare.child.pid) drop_spare(a);
        for (int i = 0; i < MAX_STREAMS; i++) {
            struct stream *s = &a->streams[i];
            /* One that has ended may share its number. */
            if (s->id == 0 || s->kind != COMMAND || s->exited || s->pid != pid) continue;
            s->exited = true;
            s->status = status;
            s->usage = usage;
            for (int k = 0; k < 2; k++) {
                s->out[k].owed = left_in(s, &s->out[k]);
                s->out[k].ready = true;
            }
        }
    }
    if (any) a->cgroups.due = true; /* it may have been the last one in its cgroup */
}

/* --- Connections and listeners -------------------------------------------------------------------------------------- */

/* The one field of CONNECT and LISTEN. False: the record is malformed, or has none. */
static bool read_address(const unsigned char *payload, size_t size, struct address *address, int *error) {
    const unsigned char *data;
    size_t length;
    uint32_t tag;
    int more;
    bool found = false;
    while ((more = next_field(&payload, &size, &tag, &data, &length)) > 0)
        if (tag == TAG_ADDRESS) {
            *error = parse_address(address, data, length);
            found = true;
        }
    return more == 0 && found;
}

/* CONNECT or LISTEN. False: it is malformed. */
static bool open_socket_stream(struct agent *a, uint32_t id, enum kind kind, const unsigned char *payload, size_t size) {
    struct address address;
    struct stream *s = free_slot(a);
    const char *stage = kind == LISTENER ? "listen" : "connect";
    int error = 0, fd = -1;
    if (!read_address(payload, size, &address, &error)) return false;
    if (error != 0) {
        stage = "address";
    } else if (s == NULL) {
        error = EAGAIN;
    } else {
        fd = kind == LISTENER ? open_listener(&address) : open_connection(&address);
        error = errno;
    }
    if (fd < 0) {
        answer_error(a, id, error, stage);
        return true;
    }
    open_stream(s, id, kind);
    s->out[0].fd = fd;
    if (kind == CONNECTION) {
        s->stdin_fd = fd;
        s->opening = error == EINPROGRESS;
    }
    if (!s->opening) answer_opened(a, id);
    return true;
}

/* A connection in the making: poll tells when it stands, or has failed. */
static void finish_opening(struct agent *a, struct stream *s) {
    int error = 0;
    socklen_t length = sizeof error;
    if (!s->out[0].ready || !can_answer(a)) return;
    if (getsockopt(s->stdin_fd, SOL_SOCKET, SO_ERROR, &error, &length) != 0) error = errno;
    s->out[0].ready = s->opening = false;
    if (error == 0) {
        answer_opened(a, s->id);
    } else {
        answer_error(a, s->id, error, "connect");
        free_stream(s);
    }
}

static void finish_connection(struct agent *a, struct stream *s) {
    if (s->opening || s->stdin_fd >= 0 || s->out[0].fd >= 0 || !can_answer(a)) return;
    if (s->broken != 0)
        answer_error(a, s->id, s->broken, "connection");
    else
        answer_end(a, s->id, TAG_CODE, 0);
    free_stream(s);
}

static uint32_t new_number(struct agent *a) {
    do a->accepted = (a->accepted + 1) | from_guest;
    while (find_stream(a, a->accepted) != NULL);
    return a->accepted;
}

/* Takes the connections that wait, while there are slots for them and room to tell. */
static void pump_listener(struct agent *a, struct stream *listener) {
    struct channel *c = &listener->out[0];
    struct stream *s;
    while (c->ready && can_answer(a) && (s = free_slot_for_guest(a)) != NULL) {
        struct address peer;
        struct record r;
        char text[MAX_ADDRESS];
        int fd = accept_connection(c->fd, &peer);
        if (fd < 0) {
            c->ready = false;
            /* If memory or descriptors ran out the connection still waits, and poll would say so at once. Most other
             * errors are of a connection that is gone already. */
            listener->resting = errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM;
            return;
        }
        open_stream(s, new_number(a), CONNECTION);
        s->out[0].fd = s->stdin_fd = fd;
        format_address(&peer, text, sizeof text);
        record_start(&r);
        record_add32(&r, TAG_LISTENER, listener->id);
        record_add_text(&r, TAG_ADDRESS, text);
        answer_record(a, &r, FRAME_ACCEPTED, s->id);
    }
}

/* Ends a connection, which breaks for its peer, or a listener. */
static void cut_off(struct stream *s) {
    if (s->kind == CONNECTION) {
        int fd = s->stdin_fd >= 0 ? s->stdin_fd : s->out[0].fd;
        s->stdin_fd = s->out[0].fd = -1;
        if (fd >= 0) reset_connection(fd);
    }
    free_stream(s);
}

/* --- Input from the port --------------------------------------------------------------------------------------------- */

static void greet(struct agent *a, const struct milestone *milestones, size_t count) {
    struct record r;
    record_start(&r);
    record_add32(&r, TAG_VERSION, VERSION);
    record_add_text(&r, TAG_KERNEL, a->kernel);
    for (size_t i = 0; i < count; i++) {
        unsigned char value[64];
        put64(value, milestones[i].usec);
        size_t name = strnlen(milestones[i].name, sizeof value - 8);
        memcpy(value + 8, milestones[i].name, name);
        record_add(&r, TAG_MILESTONE, value, 8 + name);
    }
    answer_record(a, &r, FRAME_HELLO, 0);
}

/* Ends what a host that is another machine's now had open. A terminal hangs up, and a function of the agent is killed,
 * which might take the end of its input for the whole; other commands go on, with nothing more to read. */
static void leave_host(struct agent *a, struct stream *s) {
    if (s->kind == COMMAND && s->terminal < 0 && !s->builtin) {
        s->orphan = true;
        s->announced = false;
        s->out[0].window = s->out[1].window = INITIAL_WINDOW;
        drop_stdin(s);
        return;
    }
    if (s->kind == COMMAND && s->builtin) send_signal(a, s, SIGKILL, SIGNAL_ALL);
    if (s->kind == COMMAND) cgroup_remove(&a->cgroups, s->cgroup);
    cut_off(s);
}

/* The first frame of a host; another one comes from the next, once the machine has been saved and woken. */
static bool take_hello(struct agent *a, const unsigned char *payload, size_t size) {
    const unsigned char *data;
    size_t length;
    uint32_t tag;
    int more;
    bool spoken = false;
    char texts[2 * MAX_CONTROL], *room = texts; /* a field's header has room for the zero at its end */
    struct resume resume = {0};
    const char *stage;
    while ((more = next_field(&payload, &size, &tag, &data, &length)) > 0) {
        if (tag == TAG_VERSION && length == 4) spoken = get32(data) == VERSION;
        if (tag == TAG_SEED) {
            resume.seed = data;
            resume.seed_size = length;
        }
        if (tag == TAG_CLOCK && length == 8) resume.clock = get64(data);
        if (tag != TAG_HOSTNAME && tag != TAG_SHARE) continue;
        if (memchr(data, 0, length) != NULL) return false;
        char *text = room;
        memcpy(text, data, length);
        text[length] = 0;
        room += length + 1;
        if (tag == TAG_HOSTNAME) resume.hostname = text;
        if (tag == TAG_SHARE && resume.share_count == RESUME_SHARES) return false;
        if (tag == TAG_SHARE) resume.shares[resume.share_count++] = text;
    }
    if (more != 0 || !spoken || a->paused != (resume.seed != NULL) || (a->greeted && !a->paused)) return false;
    a->greeted = true;
    if (!a->paused) return true;
    a->paused = false;
    for (int i = 0; i < MAX_STREAMS; i++)
        if (a->streams[i].id != 0) leave_host(a, &a->streams[i]);
    int error = a->woken(&resume, a->random, &stage);
    if (error != 0) {
        answer_error(a, 0, error, stage);
    } else {
        cgroups_thaw(&a->cgroups);
        greet(a, NULL, 0);
    }
    return true;
}

/* PAUSE. All commands stand still: in a machine that wakes they go on when it has its own entropy, clock and names, and not
 * before. What there is to say is said, and then that there is no more: a host that has heard it, and says nothing either,
 * can save the machine with no frame half on its way. */
static bool take_pause(struct agent *a) {
    unsigned char frame[HEADER];
    cgroups_freeze(&a->cgroups);
    prepare_spare(a);
    expect_resume();
    put_header(frame, FRAME_PAUSE, 0, 0);
    answer(a, frame, sizeof frame);
    return a->paused = true;
}

static bool take_stdin(struct stream *s, const unsigned char *data, size_t length) {
    if (length == 0) return false;
    if (s == NULL) return true;
    if (s->kind == LISTENER || s->stdin_eof) return false;
    if (length > INITIAL_WINDOW - s->stdin_used - s->stdin_passed) return false;
    if (s->stdin_data == NULL && s->stdin_fd >= 0 && (s->stdin_data = malloc(INITIAL_WINDOW)) == NULL) {
        s->broken = ENOMEM;
        close_stdin(s);
    }
    if (s->stdin_fd < 0) {
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

static bool take_eof(struct stream *s, const unsigned char *payload, size_t size) {
    if (size != 1 || payload[0] > 2) return false;
    if (s == NULL) return true;
    if (s->kind == LISTENER) return false;
    if (payload[0] == 0) {
        s->stdin_eof = true;
        return true;
    }
    if (s->terminal >= 0 && payload[0] == 1) drop_stdin(s); /* a terminal goes as a whole: it hangs up */
    close_output(s, payload[0] - 1);
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

static bool take_signal(struct agent *a, uint32_t id, struct stream *s, const unsigned char *payload, size_t size) {
    if (size != 2 || payload[0] < 1 || payload[0] > 64) return false;
    if (s == NULL) return true;
    if (s->kind == COMMAND) {
        send_signal(a, s, payload[0], payload[1]);
    } else if (payload[0] == SIGKILL) {
        answer_end(a, id, TAG_SIGNAL, SIGKILL);
        cut_off(s);
    }
    return true;
}

static bool take_resize(const struct stream *s, const unsigned char *payload, size_t size) {
    if (size != 4) return false;
    struct winsize window = {.ws_row = (uint16_t)get16(payload), .ws_col = (uint16_t)get16(payload + 2)};
    if (s != NULL && s->terminal >= 0) ioctl(s->terminal, TIOCSWINSZ, &window);
    return true;
}

/* Acts on one frame. False: the host broke the protocol. */
static bool take_frame(struct agent *a, int type, uint32_t id, const unsigned char *payload, size_t size) {
    struct stream *s = find_stream(a, id);
    if (type == FRAME_HELLO || !a->greeted) return type == FRAME_HELLO && id == 0 && take_hello(a, payload, size);
    if (a->paused && type != FRAME_RESUME && type != FRAME_SHUTDOWN) return false;
    if ((type == FRAME_SHUTDOWN || type == FRAME_PAUSE || type == FRAME_RESUME) != (id == 0)) return false;
    const bool opens = s == NULL && !(id & from_guest);
    switch (type) {
        case FRAME_SHUTDOWN:
            a->shutdown = true;
            return size == 0;
        case FRAME_PAUSE:
            return size == 0 && take_pause(a);
        case FRAME_RESUME: {
            const bool paused = a->paused;
            a->paused = false;
            cgroups_thaw(&a->cgroups);
            return size == 0 && paused;
        }
        case FRAME_EXEC:
            return opens && start_command(a, id, payload, size);
        case FRAME_CONNECT:
            return opens && open_socket_stream(a, id, CONNECTION, payload, size);
        case FRAME_LISTEN:
            return opens && open_socket_stream(a, id, LISTENER, payload, size);
        case FRAME_STDIN:
            return take_stdin(s, payload, size);
        case FRAME_EOF:
            return take_eof(s, payload, size);
        case FRAME_WINDOW:
            return take_window(s, payload, size);
        case FRAME_SIGNAL:
            return take_signal(a, id, s, payload, size);
        case FRAME_RESIZE:
            return take_resize(s, payload, size);
        default:
            return false;
    }
}

static size_t largest(int type) {
    return type == FRAME_EXEC ? MAX_EXEC : type == FRAME_STDIN ? MAX_DATA : MAX_CONTROL;
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

/* The descriptors to wait for, and what to tell when they are ready. */
struct polls {
    struct pollfd fds[2 + 4 * MAX_STREAMS];
    bool *ready[2 + 4 * MAX_STREAMS];
    nfds_t count;
};

static void poll_fd(struct polls *p, int fd, short events, bool *ready) {
    p->fds[p->count] = (struct pollfd){.fd = fd, .events = events};
    p->ready[p->count++] = ready;
}

static void poll_stream(struct polls *p, struct stream *s, bool room, bool answers, bool slot) {
    if (s->opening) {
        if (answers) poll_fd(p, s->stdin_fd, POLLOUT, &s->out[0].ready);
        return;
    }
    if (s->kind == LISTENER) {
        if (answers && slot && !s->resting) poll_fd(p, s->out[0].fd, POLLIN, &s->out[0].ready);
        s->resting = false;
        return;
    }
    if (s->started >= 0 && answers) poll_fd(p, s->started, POLLIN, NULL);
    for (int k = 0; k < 2 && room; k++)
        if (wants_output(s, k)) poll_fd(p, s->out[k].fd, POLLIN, &s->out[k].ready);
    /* At its end it is closed, unless a terminal has yet to take the end's character. */
    if (s->stdin_fd >= 0 && (s->stdin_used > 0 || s->stdin_eof)) poll_fd(p, s->stdin_fd, POLLOUT, NULL);
}

/* Waits until something can be done. Every descriptor is non-blocking: what can be done is found by trying, and `ready`
 * only saves the attempts at what is not. */
static void wait_for_work(struct agent *a) {
    struct polls p;
    const bool room = has_room(a), answers = can_answer(a), slot = free_slot_for_guest(a) != NULL;
    p.count = 0;
    poll_fd(&p, a->port, (short)((answers ? POLLIN : 0) | (a->out_head < a->out_tail ? POLLOUT : 0)), NULL);
    poll_fd(&p, a->signals, POLLIN, NULL);
    for (int i = 0; i < MAX_STREAMS; i++)
        if (a->streams[i].id != 0 && !a->paused) poll_stream(&p, &a->streams[i], room, answers, slot);
    if (poll(p.fds, p.count, -1) <= 0) return;
    for (nfds_t i = 0; i < p.count; i++)
        if (p.ready[i] != NULL && p.fds[i].revents != 0) *p.ready[i] = true;
    /* That the host is gone is found by reading. While the port is full it is not read; nor need a write fail then: a
     * virtio port without a host is just never writable, and poll would say over and over that it has hung up. */
    if (!answers && (p.fds[0].revents & (POLLHUP | POLLERR))) a->shutdown = true;
}

/* What is to be done for a stream besides reading its output. */
static void pump_stream(struct agent *a, struct stream *s) {
    if (s->started >= 0) finish_start(a, s);
    if (s->opening) finish_opening(a, s);
    if (s->id != 0 && s->kind == LISTENER) pump_listener(a, s);
    if (s->id != 0) pump_stdin(a, s);
}

static void finish_stream(struct agent *a, struct stream *s) {
    if (s->kind == COMMAND) finish_command(a, s);
    if (s->kind == CONNECTION) finish_connection(a, s);
}

static void pump(struct agent *a) {
    for (int i = 0; i < MAX_STREAMS; i++)
        if (a->streams[i].id != 0) pump_stream(a, &a->streams[i]);
    pump_outputs(a);
    for (int i = 0; i < MAX_STREAMS; i++)
        if (a->streams[i].id != 0) finish_stream(a, &a->streams[i]);
}

/* Out of the OOM killer's sight, and with as many descriptors as there may be: those of all streams are more than the
 * usual limit, and more than what init may have set for commands. */
static void prepare_self(struct agent *a) {
    int file = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (file >= 0) {
        (void)!write(file, "-1000", 5);
        close(file);
    }
    getrlimit(RLIMIT_NOFILE, &a->place.files);
    rlim_t own = a->place.files.rlim_max > OWN_FILES ? a->place.files.rlim_max : OWN_FILES;
    setrlimit(RLIMIT_NOFILE, &(struct rlimit){own, own});
    a->place.pids = open("/proc/self/ns/pid", O_RDONLY | O_CLOEXEC);
    a->place.terminals = open("/dev/pts", O_PATH | O_DIRECTORY | O_CLOEXEC);
    a->place.init_fd = a->place.init_started = a->spare.orders = -1;
    a->random = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
    cgroups_open(&a->cgroups);
}

int agent_serve(int port, const char *kernel, const struct milestone *milestones, size_t count, waking woken) {
    static struct agent agent; /* large: not for the stack */
    struct agent *a = &agent;
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child, NULL);
    signal(SIGPIPE, SIG_IGN);
    memset(a, 0, sizeof *a);
    prepare_self(a);
    a->port = port;
    a->kernel = kernel;
    a->woken = woken;
    a->signals = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
    fcntl(port, F_SETFL, O_NONBLOCK);
    greet(a, milestones, count);
    bool good = true;
    while (good && !a->shutdown) {
        good = take_large(a) && take_input(a);
        if (!good || a->shutdown) break;
        if (!a->paused) pump(a);
        /* All of the above is done before the wait, which knows of no work that is left. What waits for room is left
         * if the port takes nothing, and then poll tells when it does; otherwise it is done now. */
        bool full = !can_answer(a);
        flush(a);
        if (a->shutdown || (full && can_answer(a))) continue;
        if (a->cgroups.due) cgroups_sweep(&a->cgroups); /* late: the host need not wait for it */
        wait_for_work(a);
        struct signalfd_siginfo ignored;
        while (read(a->signals, &ignored, sizeof ignored) > 0) continue;
        if (can_answer(a)) good = read_port(a);
        reap(a);
    }
    for (int i = 0; i < MAX_STREAMS; i++)
        if (a->streams[i].id != 0) {
            if (a->streams[i].kind == COMMAND) send_signal(a, &a->streams[i], SIGKILL, SIGNAL_ALL);
            free_stream(&a->streams[i]);
        }
    drop_spare(a);
    leave_init(&a->place);
    close_fd(&a->place.pids);
    close_fd(&a->place.terminals);
    close_fd(&a->random);
    cgroups_close(&a->cgroups);
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
    make_error(&r, 0, error, stage, text);
    fcntl(port, F_SETFL, 0);
    for (size_t done = 0; done < r.used;) {
        ssize_t n = write(port, r.bytes + done, r.used - done);
        if (n <= 0) return;
        done += (size_t)n;
    }
}

/* vmette-vz: runs one virtual machine of Virtualization.framework, for the process that started it.
 *
 *   vmette-vz --capabilities             prints what this computer can do, as lines of name=value
 *   vmette-vz CONFIG_FD CONNECTION_FD    makes the machine that CONFIG_FD describes, and serves CONNECTION_FD
 *
 * The configuration is read to its end: records name=value, each ended by NUL.
 *   kernel=PATH initrd=PATH cmdline=TEXT cpus=N memory=BYTES console=FD
 *   port=FD:NAME  disk=ro|rw|kept:PATH  share=ro|rw:TAG:PATH             may be repeated; `kept` survives a crash
 *   network=[MAC] vsock= entropy= balloon= rosetta=TAG identifier=HEX
 *
 * The connection is a stream of frames, each a header of three little-endian 32-bit numbers (kind, id, bytes of payload)
 * and a payload. A descriptor comes with the header (SCM_RIGHTS). Requests have an id of their own, not 0, and are
 * answered in their order, by DONE or FAILED of the same id. By itself the program says CREATED, or FAILED with id 0 and
 * ends; ACCEPTED, whose id is the port; and ENDED, after which it ends too. What is wrong stands in FAILED and ENDED as the
 * code (64 bits), the domain, NUL, and the text; an empty ENDED is of a guest that has powered off or been stopped.
 *
 * It dies with its parent: at the end of the connection, and on macOS with the parent's process even if a fork of that
 * holds the connection open. (On Linux, the kernel does that.)
 *
 * Exit status: 0 after an end as it should be, 1 after a failure, which stderr tells in a line, 2 for wrong arguments. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>
#ifdef __APPLE__
#include <sys/event.h>
#endif

#include "vz_shim.h"

enum {
    MAX_CONFIG = 256 << 10,
    MAX_PAYLOAD = 4096,
    MAX_ITEMS = 64, /* ports, disks, shares: each */
    MAX_IDENTIFIER = 1024,
    HEADER = 12
};

enum request {
    START = 1,
    PAUSE,
    RESUME,
    STOP,
    REQUEST_STOP,
    SAVE,
    RESTORE,
    CONNECT,
    LISTEN,
    UNLISTEN,
    IDENTIFIER,
    VALIDATE_SAVE
};

enum event { CREATED = 1, DONE, FAILED, ACCEPTED, ENDED };

static _Noreturn void die(const char *what, const char *detail) {
    fprintf(stderr, "vmette-vz: %s%s%s\n", what, *detail != 0 ? ": " : "", detail);
    _exit(1); /* whatever the framework's threads are doing */
}

/* --- The configuration --------------------------------------------------------------------------------------------- */

struct settings {
    struct vz_config config;
    struct vz_port ports[MAX_ITEMS];
    struct vz_disk disks[MAX_ITEMS];
    struct vz_share shares[MAX_ITEMS];
    uint8_t identifier[MAX_IDENTIFIER];
};

static uint64_t number(const char *what, const char *text, uint64_t most) {
    uint64_t value = 0;
    if (*text == 0) die("no number", what);
    for (; *text != 0; text++) {
        unsigned digit = (unsigned)(*text - '0');
        if (digit > 9 || value > (most - digit) / 10) die("no number, or too large a one", what);
        value = value * 10 + digit;
    }
    return value;
}

static int descriptor(const char *what, const char *text) {
    int fd = (int)number(what, text, INT_MAX);
    int flags = fcntl(fd, F_GETFD);
    if (flags < 0) die("a descriptor that is not open", what);
    fcntl(fd, F_SETFD, flags | FD_CLOEXEC);
    return fd;
}

/* Cuts `*text` at the next colon, and returns what was before that. */
static char *word(const char *what, char **text) {
    char *start = *text, *colon = strchr(start, ':');
    if (colon == NULL) die("a record without all its parts", what);
    *colon = 0;
    *text = colon + 1;
    return start;
}

/* Which of the words `text` is; there is a NULL after the last of them. */
static int choice(const char *what, const char *text, const char *const *words) {
    for (int i = 0; words[i] != NULL; i++)
        if (strcmp(text, words[i]) == 0) return i;
    die("a record with an unknown word", what);
}

static size_t next(const char *what, size_t *count) {
    if (*count == MAX_ITEMS) die("too many records", what);
    return (*count)++;
}

static int hex(char c) {
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static void read_identifier(struct settings *s, const char *text) {
    size_t length = strlen(text);
    if (length % 2 != 0 || length == 0 || length / 2 > sizeof s->identifier) die("a malformed record", "identifier");
    for (size_t i = 0; i < length / 2; i++) {
        int high = hex(text[2 * i]), low = hex(text[2 * i + 1]);
        if (high < 0 || low < 0) die("a malformed record", "identifier");
        s->identifier[i] = (uint8_t)(high << 4 | low);
    }
    s->config.identifier = s->identifier;
    s->config.identifier_size = length / 2;
}

static void set(struct settings *s, const char *name, char *value) {
    static const char *const access[] = {"ro", "rw", "kept", NULL};
    struct vz_config *c = &s->config;
    if (strcmp(name, "kernel") == 0)
        c->kernel = value;
    else if (strcmp(name, "initrd") == 0)
        c->initrd = value;
    else if (strcmp(name, "cmdline") == 0)
        c->cmdline = value;
    else if (strcmp(name, "cpus") == 0)
        c->cpus = (uint32_t)number(name, value, UINT32_MAX);
    else if (strcmp(name, "memory") == 0)
        c->memory = number(name, value, UINT64_MAX);
    else if (strcmp(name, "console") == 0)
        c->console = descriptor(name, value);
    else if (strcmp(name, "port") == 0) {
        struct vz_port *port = &s->ports[next(name, &c->port_count)];
        port->fd = descriptor(name, word(name, &value));
        port->name = value;
    } else if (strcmp(name, "disk") == 0) {
        struct vz_disk *disk = &s->disks[next(name, &c->disk_count)];
        int how = choice(name, word(name, &value), access);
        disk->read_only = how == 0;
        disk->kept = how == 2;
        disk->path = value;
    } else if (strcmp(name, "share") == 0) {
        struct vz_share *share = &s->shares[next(name, &c->share_count)];
        int how = choice(name, word(name, &value), access);
        if (how > 1) die("a record with an unknown word", name);
        share->read_only = how == 0;
        share->tag = word(name, &value);
        share->path = value;
    } else if (strcmp(name, "rosetta") == 0)
        c->rosetta = value;
    else if (strcmp(name, "network") == 0) {
        c->network = true;
        c->mac = *value != 0 ? value : NULL;
    } else if (strcmp(name, "identifier") == 0)
        read_identifier(s, value);
    else {
        bool *flag = strcmp(name, "vsock") == 0     ? &c->vsock
                     : strcmp(name, "entropy") == 0 ? &c->entropy
                     : strcmp(name, "balloon") == 0 ? &c->balloon
                                                    : NULL;
        if (flag == NULL || *value != 0) die("an unknown record", name);
        *flag = true;
    }
}

/* Reads the whole configuration. It stays in memory, for what points into it. */
static void configure(struct settings *s, int fd) {
    char *text = malloc(MAX_CONFIG + 1);
    size_t size = 0;
    ssize_t n;
    if (text == NULL) die("out of memory", "");
    while ((n = read(fd, text + size, MAX_CONFIG + 1 - size)) != 0) {
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) die("cannot read the configuration", strerror(errno));
        size += (size_t)n;
        if (size > MAX_CONFIG) die("the configuration is too long", "");
    }
    close(fd);
    if (size == 0 || text[size - 1] != 0) die("the configuration ends within a record", "");
    s->config.console = -1;
    s->config.ports = s->ports;
    s->config.disks = s->disks;
    s->config.shares = s->shares;
    for (char *record = text; record < text + size;) {
        char *following = record + strlen(record) + 1, *value = strchr(record, '=');
        if (value == NULL) die("a record without a value", "");
        *value++ = 0;
        set(s, record, value);
        record = following;
    }
    if (s->config.kernel == NULL) die("the configuration names no kernel", "");
    if (s->config.cmdline == NULL) s->config.cmdline = "";
}

/* --- The connection ------------------------------------------------------------------------------------------------ */

static int connection = -1;
static pthread_mutex_t sending = PTHREAD_MUTEX_INITIALIZER;

static void put32(uint8_t *to, uint32_t value) {
    for (int i = 0; i < 4; i++) to[i] = (uint8_t)(value >> 8 * i);
}

static uint32_t get32(const uint8_t *from) {
    return from[0] | (uint32_t)from[1] << 8 | (uint32_t)from[2] << 16 | (uint32_t)from[3] << 24;
}

/* Sends a frame, with a descriptor unless that is -1. Whoever is gone does not get it: the main thread finds out. */
static void say(enum event kind, uint32_t id, const void *payload, size_t size, int fd) {
    uint8_t frame[HEADER + MAX_PAYLOAD];
    if (size > MAX_PAYLOAD) size = MAX_PAYLOAD;
    put32(frame, kind);
    put32(frame + 4, id);
    put32(frame + 8, (uint32_t)size);
    if (size > 0) memcpy(frame + HEADER, payload, size);
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof fd)];
    } control;
    struct iovec bytes = {frame, HEADER + size};
    struct msghdr message = {.msg_iov = &bytes, .msg_iovlen = 1};
    if (fd >= 0) {
        memset(&control, 0, sizeof control);
        message.msg_control = control.space;
        message.msg_controllen = sizeof control.space;
        struct cmsghdr *header = CMSG_FIRSTHDR(&message);
        header->cmsg_level = SOL_SOCKET;
        header->cmsg_type = SCM_RIGHTS;
        header->cmsg_len = CMSG_LEN(sizeof fd);
        memcpy(CMSG_DATA(header), &fd, sizeof fd);
    }
    pthread_mutex_lock(&sending);
    while (bytes.iov_len > 0) {
        ssize_t n = sendmsg(connection, &message, 0);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) break;
        bytes.iov_base = (char *)bytes.iov_base + n;
        bytes.iov_len -= (size_t)n;
        message.msg_control = NULL;
        message.msg_controllen = 0;
    }
    pthread_mutex_unlock(&sending);
}

static void say_error(enum event kind, uint32_t id, const struct vz_error *error) {
    uint8_t payload[8 + sizeof error->domain + sizeof error->text];
    size_t domain = strlen(error->domain) + 1, text = strlen(error->text);
    put32(payload, (uint32_t)(uint64_t)error->code);
    put32(payload + 4, (uint32_t)((uint64_t)error->code >> 32));
    memcpy(payload + 8, error->domain, domain);
    memcpy(payload + 8 + domain, error->text, text);
    say(kind, id, payload, 8 + domain + text, -1);
}

/* Reads exactly `size` bytes; false at the end of the connection. */
static bool hear(void *to, size_t size) {
    char *p = to;
    while (size > 0) {
        ssize_t n = read(connection, p, size);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        p += n;
        size -= (size_t)n;
    }
    return true;
}

/* --- The machine --------------------------------------------------------------------------------------------------- */

static void describe(const struct vz_error *error) {
    fprintf(stderr, "vmette-vz: %s (%s %" PRId64 ")\n", error->text, error->domain, error->code);
}

/* On the machine's queue. The program ends here and now: an orderly release would wait for this very call. */
static void ended(void *context, const struct vz_error *error) {
    (void)context;
    if (error != NULL) {
        describe(error);
        say_error(ENDED, 0, error);
    } else
        say(ENDED, 0, NULL, 0, -1);
    _exit(error != NULL);
}

static void accepted(void *context, uint32_t port, int fd) {
    (void)context;
    say(ACCEPTED, port, NULL, 0, fd);
    close(fd);
}

static void answer(uint32_t id, bool good, const struct vz_error *error) {
    if (good)
        say(DONE, id, NULL, 0, -1);
    else
        say_error(FAILED, id, error);
}

/* The payload as a port number. */
static uint32_t port_of(const uint8_t *payload, uint32_t size) {
    if (size != 4) die("a malformed request", "port");
    return get32(payload);
}

/* The payload as a path; it has a NUL after it. */
static const char *path_of(const uint8_t *payload, uint32_t size) {
    if (size == 0 || strlen((const char *)payload) != size) die("a malformed request", "path");
    return (const char *)payload;
}

static void serve(struct vz_machine *machine, const struct vz_config *config, enum request kind, uint32_t id,
                  const uint8_t *payload, uint32_t size) {
    struct vz_error error = {.code = 0};
    uint8_t identifier[MAX_IDENTIFIER];
    size_t length;
    int fd;
    switch (kind) {
    case START: answer(id, vz_start(machine, &error), &error); return;
    case PAUSE: answer(id, vz_pause(machine, &error), &error); return;
    case RESUME: answer(id, vz_resume(machine, &error), &error); return;
    case REQUEST_STOP: answer(id, vz_request_stop(machine, &error), &error); return;
    case SAVE: answer(id, vz_save(machine, path_of(payload, size), &error), &error); return;
    case RESTORE: answer(id, vz_restore(machine, path_of(payload, size), &error), &error); return;
    case VALIDATE_SAVE: answer(id, vz_validate_save(config, &error), &error); return;
    case LISTEN: answer(id, vz_vsock_listen(machine, port_of(payload, size), accepted, NULL, &error), &error); return;
    case UNLISTEN:
        vz_vsock_unlisten(machine, port_of(payload, size));
        answer(id, true, NULL);
        return;
    case STOP: /* `ended` ends the program as soon as it has: a stop that works is answered by that */
        if (!vz_stop(machine, &error)) say_error(FAILED, id, &error);
        return;
    case CONNECT:
        fd = vz_vsock_connect(machine, port_of(payload, size), &error);
        if (fd < 0) {
            say_error(FAILED, id, &error);
        } else {
            say(DONE, id, NULL, 0, fd);
            close(fd);
        }
        return;
    case IDENTIFIER:
        length = vz_identifier(machine, identifier, sizeof identifier);
        if (length > sizeof identifier) die("the machine's identifier is too long", "");
        say(DONE, id, identifier, length, -1);
        return;
    }
    die("an unknown request", "");
}

#ifdef __APPLE__
/* Ends the program when the process `context` has. */
static void *watch_parent(void *context) {
    pid_t parent = (pid_t)(intptr_t)context;
    struct kevent change, event;
    int queue = kqueue();
    EV_SET(&change, (uintptr_t)parent, EVFILT_PROC, EV_ADD, NOTE_EXIT, 0, NULL);
    while (queue >= 0) {
        int n = kevent(queue, &change, 1, &event, 1, NULL);
        if (n > 0 || (n < 0 && errno == ESRCH)) _exit(0);
        if (n < 0 && errno != EINTR) break;
        if (getppid() != parent) _exit(0);
    }
    return NULL;
}
#endif

/* Has the program die with its parent, however that dies. */
static void follow_parent(void) {
#ifdef __APPLE__
    pthread_t thread;
    pid_t parent = getppid();
    if (parent == 1 || pthread_create(&thread, NULL, watch_parent, (void *)(intptr_t)parent) != 0)
        die("cannot watch the process that started this one", "");
    pthread_detach(thread);
#endif
}

static int print_capabilities(void) {
    static const char *const rosetta[] = {"not-supported", "not-installed", "installed"};
    struct vz_capabilities c;
    vz_capabilities(&c);
    printf("supported=%d\nentitled=%d\nsave_restore=%d\nrosetta=%s\n", c.supported, c.entitled, c.save_restore,
           rosetta[c.rosetta]);
    printf("macos=%u.%u.%u\nmin_cpus=%u\nmax_cpus=%u\n", c.macos[0], c.macos[1], c.macos[2], c.min_cpus, c.max_cpus);
    printf("min_memory=%" PRIu64 "\nmax_memory=%" PRIu64 "\n", c.min_memory, c.max_memory);
    return fflush(stdout) != 0;
}

/* Why this computer, or this process, can run no machine at all; NULL if it can. */
static const struct vz_error *refusal(void) {
    static const struct vz_error unsupported = {"vmette", ENOTSUP, "this computer cannot virtualize"};
    static const struct vz_error unentitled = {"vmette", EPERM,
                                               "the program lacks the entitlement com.apple.security.virtualization"};
    struct vz_capabilities c;
    vz_capabilities(&c);
    return !c.supported ? &unsupported : !c.entitled ? &unentitled : NULL;
}

int main(int argc, char **argv) {
    static struct settings settings;
    static uint8_t payload[MAX_PAYLOAD + 1];
    uint8_t header[HEADER];
    if (argc == 2 && strcmp(argv[1], "--capabilities") == 0) return print_capabilities();
    if (argc != 3) {
        fputs("usage: vmette-vz --capabilities | CONFIG_FD CONNECTION_FD\n", stderr);
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    follow_parent();
    connection = descriptor("connection", argv[2]);
    configure(&settings, descriptor("configuration", argv[1]));
    struct vz_error error;
    const struct vz_error *problem = refusal();
    struct vz_machine *machine = NULL;
    if (problem == NULL && (machine = vz_create(&settings.config, ended, NULL, &error)) == NULL) problem = &error;
    if (problem != NULL) {
        describe(problem);
        say_error(FAILED, 0, problem);
        return 1;
    }
    say(CREATED, 0, NULL, 0, -1);
    while (hear(header, sizeof header)) {
        uint32_t size = get32(header + 8), id = get32(header + 4);
        if (size > MAX_PAYLOAD || id == 0) die("a malformed request", "header");
        if (!hear(payload, size)) break;
        payload[size] = 0;
        serve(machine, &settings.config, get32(header), id, payload, size);
    }
    vz_release(machine); /* whoever wanted the machine is gone */
    return 0;
}

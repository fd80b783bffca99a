/* The guest agent (csrc/guest/agent.c) and a host that sends it anything.
 *
 * There is no kernel below it: the linker sends its calls here (-Wl,--wrap=...), where descriptors and processes are
 * numbers. So nothing is executed, a run takes microseconds and is the same each time, and what no test on a kernel
 * would notice is seen: a descriptor that is used when it is closed or is not closed, a signal to a process that is not
 * the agent's any more. What the agent says is held against docs/protocol.md.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <termios.h>
#include <unistd.h>

#include <linux/openat2.h>
#include <linux/vm_sockets.h>

#include "agent.h"
#include "builtins.h"
#include "command.h"
#include "script.h"
#include "wire.h"

static bool running; /* only then are the calls the agent's */

/* --- Descriptors -------------------------------------------------------------------------------------------------- */

enum file { CLOSED, PORT, SIGNALS, STARTED, INPUT, OUTPUT, MASTER, TERMINAL, SOCKET, OTHER };
enum { FIRST = 1 << 20, MAX_FILES = 4096 };

static enum file files[MAX_FILES]; /* a number is not given twice */
static int file_count;

static int new_file(enum file file) {
    if (file_count == MAX_FILES) {
        errno = EMFILE;
        return -1;
    }
    files[file_count] = file;
    return FIRST + file_count++;
}

static enum file file_of(int fd) {
    if (fd < FIRST || fd >= FIRST + file_count || files[fd - FIRST] == CLOSED)
        complain("a descriptor is used that is not open");
    return files[fd - FIRST];
}

/* --- Processes ---------------------------------------------------------------------------------------------------- */

enum { FIRST_PID = 1000, MAX_PROCESSES = 4096 };

static enum { RUNS, HAS_ENDED, REAPED } processes[MAX_PROCESSES];
static int process_count;

int builtin_run(char **argv) {
    (void)argv;
    complain("a child runs");
}

static unsigned wakes; /* how often the agent has yet to say hello once more */

static int woken(const struct resume *resume, int random, const char **stage) {
    const bool good = resume->seed_size == 0 || resume->seed[0] != 0;
    if (resume->hostname != NULL && strlen(resume->hostname) > MAX_CONTROL) complain("the agent wakes with half a name");
    for (size_t i = 0; i < resume->share_count; i++)
        if (strlen(resume->shares[i]) > MAX_CONTROL) complain("the agent wakes with half a share");
    (void)random;
    *stage = "entropy";
    wakes += good;
    return good ? 0 : EPERM;
}

static void touch(char *const *list) {
    for (; *list != NULL; list++) (void)!strnlen(*list, MAX_EXEC + 1);
}

static void look_at(const struct command *c) {
    if (c->argv[0] == NULL) complain("a command without a program");
    touch(c->argv);
    touch(c->env);
}

static int new_child(struct child *child, bool terminal) {
    if (REFUSE(0, EMFILE, EAGAIN) != 0 || process_count == MAX_PROCESSES || file_count > MAX_FILES - 8) return EAGAIN;
    processes[process_count] = RUNS;
    child->pid = FIRST_PID + process_count++;
    child->started = new_file(STARTED);
    child->stdin_fd = new_file(terminal ? MASTER : INPUT);
    child->out[0] = terminal ? child->stdin_fd : new_file(OUTPUT);
    child->out[1] = terminal ? -1 : new_file(OUTPUT);
    child->terminal = terminal ? new_file(TERMINAL) : -1;
    return 0;
}

WRAP(int, start_child, const struct command *c, struct place *place, struct child *child, const char **stage) {
    const bool init = c->flags & EXEC_INIT;
    look_at(c);
    *stage = "fork";
    if (init && place->init != 0) return EBUSY;
    const int error = new_child(child, c->flags & EXEC_TERMINAL);
    if (error == 0 && init) {
        place->init = child->pid;
        place->init_fd = new_file(OTHER);
        place->init_started = child->started;
    }
    return error;
}

WRAP(int, start_spare, struct place *place, struct spare *spare) {
    if (place->init != 0) return EBUSY;
    const int error = new_child(&spare->child, false);
    if (error == 0) spare->orders = new_file(OTHER);
    return error;
}

WRAP(bool, order_spare, struct spare *spare, const struct command *c, const unsigned char *payload, size_t size) {
    look_at(c);
    if (size > 0) (void)!strnlen((const char *)payload, size);
    if (c->flags & (EXEC_TERMINAL | EXEC_INIT) || REFUSE(0, EPIPE) != 0) return false;
    close(spare->orders);
    spare->orders = -1;
    return true;
}

static void end_process(uint8_t which) {
    if (process_count == 0) return;
    const int i = which % process_count;
    if (processes[i] == RUNS) processes[i] = HAS_ENDED;
}

WRAP(pid_t, wait4, pid_t pid, int *status, int options, struct rusage *usage) {
    if (!running) return __real_wait4(pid, status, options, usage);
    if (!(options & WNOHANG)) complain("the agent waits for a process");
    for (int i = 0; i < process_count; i++)
        if (processes[i] == HAS_ENDED) {
            const uint8_t choice = choose();
            processes[i] = REAPED;
            memset(usage, 0, sizeof *usage);
            *status = choice & 1 ? choice >> 2 : choice << 8; /* a signal, or a code */
            return FIRST_PID + i;
        }
    return 0;
}

WRAP(int, kill, pid_t pid, int number) {
    if (!running) return __real_kill(pid, number);
    const int i = (pid < 0 ? -pid : pid) - FIRST_PID;
    if (i < 0 || i >= process_count || processes[i] == REAPED) complain("a stranger gets a signal");
    planted(pid < 0 && number != SIGTERM && number != SIGKILL);
    if (number == SIGKILL && processes[i] == RUNS) processes[i] = HAS_ENDED;
    return pid < 0 ? REFUSE(0, ESRCH) : 0;
}

/* --- What the host says, as far as the agent has it --------------------------------------------------------------- */

static struct peer {
    uint32_t id;
    unsigned open;      /* how often it was opened and not ended */
    uint64_t credit[3]; /* of stdin, bytes that can be given back; of the outputs, bytes that can be sent */
} peers[4096];
static size_t peer_count;

static struct {
    uint8_t bytes[1 << 18];
    size_t size, heard, told; /* all; what the agent has of that; and what of that has been looked at */
    bool asked_to_end, gone;
    unsigned pauses; /* how often the agent has yet to say that it pauses */
    bool paused;     /* it has, and may say nothing */
    bool hasty;      /* it was woken before it had: what it had to say still comes, for streams that are no more */
} host;

/* The host says what is in the script. A frame that is cut off there goes on with x, if it may be so long: so there are
 * frames that are larger than what the agent reads at once, and inputs stay small. */
static void prepare_host(void) {
    const size_t most = sizeof host.bytes / 2;
    size_t at = 0, whole = 0;
    host.size = script.size < most ? script.size : most;
    host.heard = host.told = 0;
    host.asked_to_end = host.gone = host.paused = host.hasty = false;
    host.pauses = 0;
    memcpy(host.bytes, script.bytes, host.size);
    while (host.size - at >= HEADER && (whole = HEADER + (size_t)get32(host.bytes + at + 8)) <= host.size - at)
        at += whole;
    if (host.size - at < HEADER || whole > most) return;
    memset(host.bytes + host.size, 'x', at + whole - host.size);
    host.size = at + whole;
}

static struct peer *peer_of(uint32_t id) {
    for (size_t i = 0; i < peer_count; i++)
        if (peers[i].id == id) return &peers[i];
    if (peer_count == sizeof peers / sizeof *peers) complain("the input is too long for this program");
    peers[peer_count] = (struct peer){.id = id};
    return &peers[peer_count++];
}

static void open_peer(uint32_t id) {
    struct peer *peer = peer_of(id);
    peer->open++;
    peer->credit[1] += INITIAL_WINDOW;
    peer->credit[2] += INITIAL_WINDOW;
}

static void look_at_wake(void) {
    host.hasty |= !host.paused;
    host.paused = false;
    for (size_t i = 0; i < peer_count; i++) peers[i].open = 0;
}

static void look_at_host(void) {
    while (host.heard - host.told >= HEADER) {
        const uint8_t *h = host.bytes + host.told, *payload = h + HEADER;
        const uint32_t id = get32(h + 4), size = get32(h + 8);
        if (size > host.heard - host.told - HEADER) return;
        host.told += HEADER + size;
        if (h[0] == FRAME_SHUTDOWN) host.asked_to_end = true;
        if (h[0] == FRAME_PAUSE) host.pauses++;
        if (h[0] == FRAME_RESUME) host.hasty |= !host.paused;
        if (h[0] == FRAME_RESUME) host.paused = false;
        if (h[0] == FRAME_HELLO && host.told > HEADER + size) look_at_wake();
        if (h[0] == FRAME_EXEC || h[0] == FRAME_CONNECT || h[0] == FRAME_LISTEN) open_peer(id);
        if (h[0] == FRAME_STDIN) peer_of(id)->credit[0] += size;
        if (h[0] == FRAME_WINDOW && size == 5 && payload[0] < 3) peer_of(id)->credit[payload[0]] += get32(payload + 1);
    }
}

static ssize_t read_from_host(void *data, size_t size) {
    const size_t left = host.size - host.heard;
    const uint8_t choice = choose();
    if (host.gone || (left == 0 && !undecided())) {
        host.gone = true;
        return 0;
    }
    if (left == 0 || choice == 1) {
        errno = EAGAIN;
        return -1;
    }
    if (size > left) size = left;
    if (choice > 1 && size > choice) size = choice;
    memcpy(data, host.bytes + host.heard, size);
    host.heard += size;
    look_at_host();
    return (ssize_t)size;
}

/* --- What the agent says ------------------------------------------------------------------------------------------ */

static uint8_t said[HEADER + MAX_DATA];
static size_t said_size;
static bool greeted, port_waits;
static enum frame_type last_said;

static uint32_t look_at_record(const uint8_t *payload, size_t size, enum tag wanted) {
    const unsigned char *data;
    size_t length;
    uint32_t tag, found = 0;
    int more;
    while ((more = next_field(&payload, &size, &tag, &data, &length)) > 0)
        if (tag == wanted && length == 4) found = get32(data);
    if (more < 0) complain("the agent sends a malformed record");
    return found;
}

static void use_credit(struct peer *peer, int channel, uint32_t bytes) {
    if (bytes == 0 || bytes > peer->credit[channel]) complain("the agent overruns a window");
    peer->credit[channel] -= bytes;
}

static void look_at_frame(enum frame_type type, uint32_t id, const uint8_t *payload, uint32_t size) {
    const bool again = greeted && type == FRAME_HELLO && wakes > 0;
    wakes -= again;
    if (greeted == (type == FRAME_HELLO) && !again) complain("the agent does not say hello once and first");
    if (host.paused && type != FRAME_HELLO && type != FRAME_ERROR) complain("the agent does not pause");
    if (id == 0 && type == FRAME_PAUSE) {
        if (host.pauses-- == 0 || size != 0) complain("the agent pauses and was not asked to");
        host.paused = !host.hasty;
        return;
    }
    if (id == 0) {
        if (type != FRAME_HELLO && type != FRAME_ERROR) complain("the agent sends on stream 0");
        look_at_record(payload, size, TAG_VERSION);
        greeted = true;
        return;
    }
    if (host.hasty) return;
    struct peer *peer = peer_of(id);
    if (type == FRAME_ACCEPTED) {
        if (peer->open > 0 || !(id & from_guest)) complain("the agent accepts under a number that is not free");
        const uint32_t listener = look_at_record(payload, size, TAG_LISTENER);
        if (peer_of(listener)->open == 0) complain("the agent accepts where nobody listens");
        open_peer(id);
        return;
    }
    if (peer->open == 0) complain("the agent sends on a stream that is not open");
    switch (type) {
        case FRAME_STDOUT:
        case FRAME_STDERR:
            use_credit(peer, type == FRAME_STDOUT ? 1 : 2, size);
            return;
        case FRAME_WINDOW:
            if (size != 5 || payload[0] != 0) complain("the agent sends a malformed window");
            use_credit(peer, 0, get32(payload + 1));
            return;
        case FRAME_EOF:
            if (size != 1 || payload[0] != 1) complain("the agent ends what it cannot end");
            return;
        case FRAME_OPENED:
            if (size != 0) complain("the agent sends a malformed OPENED");
            return;
        case FRAME_ERROR:
        case FRAME_EXIT:
            look_at_record(payload, size, TAG_CODE);
            peer->open--;
            return;
        default:
            complain("the agent sends a frame that is the host's");
    }
}

static void look_at_agent(const uint8_t *data, size_t size) {
    while (size > 0) {
        size_t wanted = HEADER;
        if (said_size >= HEADER) wanted += get32(said + 8);
        if (said_size == HEADER && (get32(said) >> 8 != 0 || wanted > sizeof said))
            complain("the agent sends a bad header");
        const size_t step = size < wanted - said_size ? size : wanted - said_size;
        memcpy(said + said_size, data, step);
        said_size += step;
        data += step;
        size -= step;
        if (said_size < HEADER || said_size < HEADER + (size_t)get32(said + 8)) continue;
        last_said = said[0];
        look_at_frame(said[0], get32(said + 4), said + HEADER, get32(said + 8));
        said_size = 0;
    }
}

static ssize_t write_to_host(const void *data, size_t size) {
    const uint8_t choice = choose();
    if (choice == 1) host.gone = true;
    if (host.gone) {
        errno = EPIPE;
        return -1;
    }
    if (choice == 2 && !port_waits) {
        errno = EAGAIN;
        return -1;
    }
    if (choice > 2 && size > choice * 64u) size = choice * 64u;
    look_at_agent(data, size);
    return (ssize_t)size;
}

/* --- Reading and writing ------------------------------------------------------------------------------------------ */

static ssize_t read_started(void *data, size_t size) {
    struct start_failure failure = {.error = ENOENT};
    const uint8_t choice = choose();
    memset(failure.stage, 'x', sizeof failure.stage); /* without a NUL at its end */
    if (choice == 1) {
        errno = EAGAIN;
        return -1;
    }
    if (choice == 2 || choice == 3) memcpy(data, &failure, size < sizeof failure ? size : sizeof failure);
    return choice == 2 ? (ssize_t)sizeof failure : choice == 3; /* 3: a failure that is cut off */
}

WRAP(ssize_t, read, int fd, void *data, size_t size) {
    static const char numbers[] = "oom_kill 3\n";
    if (!running) return __real_read(fd, data, size);
    switch (file_of(fd)) {
        case PORT:
            return read_from_host(data, size);
        case STARTED:
            return read_started(data, size);
        case OUTPUT:
        case MASTER:
        case SOCKET: {
            const uint8_t choice = choose();
            if (choice == 0) return 0;
            if (choice < 8) return REFUSE(0, EAGAIN, EINTR, EIO, ECONNRESET);
            if (size > choice * 257u) size = choice * 257u;
            memset(data, choice, size);
            return (ssize_t)size;
        }
        case OTHER:
            if (size > sizeof numbers - 1) size = sizeof numbers - 1;
            memcpy(data, numbers, size);
            return (ssize_t)size;
        case SIGNALS:
            errno = EAGAIN;
            return -1;
        default:
            complain("the agent reads what cannot be read");
    }
}

WRAP(ssize_t, write, int fd, const void *data, size_t size) {
    if (!running) return __real_write(fd, data, size);
    switch (file_of(fd)) {
        case PORT:
            return write_to_host(data, size);
        case INPUT:
        case MASTER:
        case SOCKET: {
            const uint8_t choice = choose();
            if (choice > 8 && size > choice * 16u) size = choice * 16u;
            return choice == 0 || choice > 8 ? (ssize_t)size : REFUSE((int)size, EAGAIN, EINTR, EPIPE, ECONNRESET, EIO);
        }
        case OTHER:
            return (ssize_t)size;
        default:
            complain("the agent writes what cannot be written");
    }
}

/* --- Waiting ------------------------------------------------------------------------------------------------------ */

static unsigned idle;

/* Which of poll's bits the choice holds back. */
enum { NO_INPUT = 1, NO_OUTPUT = 2, NO_PORT = 4, NOT_STARTED = 8, PROCESS_ENDS = 16 };

static short ready(enum file file, short events, uint8_t held) {
    if (file == SIGNALS) return 0; /* it looks for processes that have ended in any case */
    if (file == PORT && host.gone) return (short)(events | POLLHUP);
    if (file == PORT && (held & NO_PORT)) return 0;
    if (file == STARTED && (held & NOT_STARTED)) return 0;
    if (held & NO_INPUT) events &= (short)~POLLIN;
    if (held & NO_OUTPUT) events &= (short)~POLLOUT;
    return events;
}

WRAP(int, poll, struct pollfd *polls, nfds_t count, int timeout) {
    if (!running) return __real_poll(polls, count, timeout);
    const uint8_t held = choose();
    int found = 0;
    if (timeout == 0) { /* whether a command that has ended left something */
        file_of(polls->fd);
        polls->revents = held & 1 ? POLLIN : 0;
        return held & 1;
    }
    if (held & PROCESS_ENDS) end_process(choose());
    for (nfds_t i = 0; i < count; i++) {
        polls[i].revents = ready(file_of(polls[i].fd), polls[i].events, held);
        found += polls[i].revents != 0;
    }
    if (!undecided() && ++idle > 1000) complain("the agent spins");
    if (found > 0) return found;
    if (held == 0) complain("the agent waits for what never comes");
    errno = EINTR;
    return -1;
}

/* --- The other calls ---------------------------------------------------------------------------------------------- */

WRAP(int, close, int fd) {
    if (!running) return __real_close(fd);
    if (file_of(fd) == PORT) complain("the agent closes its port");
    files[fd - FIRST] = CLOSED;
    return 0;
}

int __real_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...) {
    va_list list;
    va_start(list, flags);
    const mode_t mode = flags & O_CREAT ? (mode_t)va_arg(list, int) : 0;
    va_end(list);
    return running ? new_file(OTHER) : __real_open(path, flags, mode);
}

/* These are the files of cgroups. */
static int open_at(int directory, const char *path, const struct open_how *how) {
    (void)path, (void)how;
    if (file_of(directory) != OTHER) complain("a path that starts at what is no directory");
    return REFUSE(0, ENOENT, EXDEV) == 0 ? new_file(OTHER) : -1;
}

#include "openat2.h"

WRAP(int, mkdirat, int directory, const char *path, mode_t mode) {
    (void)path, (void)mode, (void)file_of(directory);
    return REFUSE(0, EEXIST, EAGAIN);
}

WRAP(int, unlinkat, int directory, const char *path, int flags) {
    (void)path, (void)flags, (void)file_of(directory);
    return REFUSE(0, EBUSY, ENOENT);
}

int __real_fcntl(int fd, int command, ...);
int __wrap_fcntl(int fd, int command, ...);
int __wrap_fcntl(int fd, int command, ...) {
    va_list list;
    va_start(list, command);
    void *argument = va_arg(list, void *);
    va_end(list);
    if (!running) return __real_fcntl(fd, command, argument);
    if (file_of(fd) == PORT && command == F_SETFL) port_waits = argument == NULL;
    return 0;
}

int __wrap_ioctl(int fd, unsigned long request, ...);
int __wrap_ioctl(int fd, unsigned long request, ...) {
    va_list list;
    va_start(list, request);
    int *bytes = va_arg(list, int *);
    va_end(list);
    if (request == FIONREAD) *bytes = choose() * 512;
    if (file_of(fd) != (request == FIONREAD ? OUTPUT : TERMINAL)) complain("an ioctl on something else");
    return 0;
}

int __wrap_tcgetattr(int fd, struct termios *settings);
int __wrap_tcgetattr(int fd, struct termios *settings) {
    const uint8_t choice = choose();
    if (file_of(fd) != TERMINAL) complain("settings of what is no terminal");
    memset(settings, 0, sizeof *settings);
    settings->c_lflag = choice & 2 ? 0 : ICANON;
    settings->c_cc[VEOF] = choice & 4 ? _POSIX_VDISABLE : 4;
    return choice & 1 ? -1 : 0;
}

int __wrap_signalfd(int fd, const sigset_t *set, int flags);
int __wrap_signalfd(int fd, const sigset_t *set, int flags) {
    (void)fd, (void)set, (void)flags;
    return new_file(SIGNALS);
}

WRAP(int, setns, int fd, int type) {
    (void)fd, (void)type;
    return 0;
}

WRAP(int, setrlimit, int resource, const struct rlimit *limit) {
    return running ? 0 : __real_setrlimit(resource, limit);
}

/* --- Sockets ------------------------------------------------------------------------------------------------------ */

WRAP(int, socket, int family, int type, int protocol) {
    (void)family, (void)protocol;
    if (!(type & SOCK_NONBLOCK) || !(type & SOCK_CLOEXEC)) complain("a socket that blocks, or that commands inherit");
    return REFUSE(0, EMFILE, EAFNOSUPPORT) == 0 ? new_file(SOCKET) : -1;
}

static void is_socket(int fd) {
    if (file_of(fd) != SOCKET) complain("no socket is taken for one");
}

WRAP(int, connect, int fd, const struct sockaddr *address, socklen_t size) {
    (void)address;
    is_socket(fd);
    if (size > sizeof(struct sockaddr_storage)) complain("an address that is too large");
    return REFUSE(0, EINPROGRESS, ECONNREFUSED, ENOENT);
}

WRAP(int, bind, int fd, const struct sockaddr *address, socklen_t size) {
    (void)address, (void)size;
    is_socket(fd);
    return REFUSE(0, EADDRINUSE);
}

WRAP(int, listen, int fd, int backlog) {
    (void)backlog;
    is_socket(fd);
    return REFUSE(0, EADDRINUSE);
}

WRAP(int, accept4, int fd, struct sockaddr *address, socklen_t *size, int flags) {
    static const sa_family_t families[] = {AF_INET, AF_INET6, AF_VSOCK, AF_UNIX};
    const uint8_t choice = choose();
    (void)flags;
    is_socket(fd);
    if (choice < 8) { /* 0, when nothing is left to choose, among them */
        static const int errors[8] = {EAGAIN, EMFILE, ENFILE, ENOBUFS, ENOMEM, ECONNABORTED, EINTR, EPROTO};
        errno = errors[choice];
        return -1;
    }
    memset(address, choice, *size); /* a path without a NUL at its end, among others */
    address->sa_family = families[choice % 4];
    *size = choice & 4 ? sizeof(struct sockaddr_un) : sizeof(sa_family_t);
    return new_file(SOCKET);
}

WRAP(int, getsockopt, int fd, int level, int option, void *value, socklen_t *size) {
    (void)level, (void)option, (void)size;
    is_socket(fd);
    *(int *)value = choose() % 2 ? ECONNREFUSED : 0;
    return REFUSE(0, ENOBUFS);
}

WRAP(int, setsockopt, int fd, int level, int option, const void *value, socklen_t size) {
    (void)level, (void)option, (void)value, (void)size;
    is_socket(fd);
    return 0;
}

WRAP(int, shutdown, int fd, int how) {
    (void)how;
    is_socket(fd);
    return 0;
}

/* --- A run -------------------------------------------------------------------------------------------------------- */

size_t unit_length(const uint8_t *bytes, size_t size) {
    return size < HEADER || get32(bytes + 8) > size - HEADER ? size : HEADER + get32(bytes + 8);
}

size_t unit_repair(uint8_t *unit, size_t size) {
    if (size < HEADER) memset(unit + size, 0, HEADER - size);
    if (size < HEADER) size = HEADER;
    put_header(unit, (enum frame_type)unit[0], get32(unit + 4), (uint32_t)(size - HEADER));
    return size;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static const struct milestone milestones[] = {{"init", 1}, {"ready", UINT64_C(0x123456789abcdef)}};
    script_read(data, size);
    file_count = process_count = 0;
    peer_count = said_size = 0;
    greeted = port_waits = false;
    wakes = 0;
    prepare_host();
    idle = 0;
    const int port = new_file(PORT);
    running = true;
    int result = agent_serve(port, "fuzz", milestones, sizeof milestones / sizeof *milestones, woken);
    running = false;
    if (result == 0 && !host.asked_to_end && !host.gone) complain("the agent ends unasked");
    if (result != 0 && !host.gone && last_said != FRAME_ERROR) complain("the agent does not tell why it ends");
    for (int i = 1; i < file_count; i++)
        if (files[i] != CLOSED) complain("a descriptor is left open");
    return 0;
}

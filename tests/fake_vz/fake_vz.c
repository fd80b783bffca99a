/* A stand-in for vz_shim.m where there is no Virtualization.framework: a machine is a QEMU under emulation.
 *
 * Nothing of the framework is imitated but what vmette-vz and vmette.vmm.vz rely on: results, states, the codes of errors,
 * and when `ended` is called. What differs:
 *   - virtio-fs is not fit for emulation (vmette/vmm/qemu.py says why): shares go over 9p, and the guest is told so.
 *   - There is no vsock device. A connection to the guest is answered by an echo, or by whoever listens at the port.
 *   - $FAKE_VZ_FAULT has things go wrong: words of the table below, with commas between them.
 *
 * The kernel kills QEMU when the thread that started it ends: vz_start and vz_restore are to be called in one that lasts. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysinfo.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "spawn.h"
#include "tsc.h"
#include "vz_shim.h"

enum { MAX_ARGS = 256, MAX_FDS = 64, MAX_LISTENERS = 64, MAX_LINE = 65536, FIRST_ECHO_PORT = 1024 };

/* VZErrorCode, of Apple's VZError.h. */
enum { INTERNAL = 1, INVALID_CONFIGURATION = 2, INVALID_STATE = 3, INVALID_DISK = 5, LIMIT = 6, SAVE = 11, RESTORE = 12 };

static const char magic[] = "QEVM"; /* what a state of QEMU's begins with (QEMU's migration/qemu-file-types.h) */

/* Whether $FAKE_VZ_FAULT names it: unsupported, unentitled, validate, start, limit, guest-error, save, restore,
 * slow-start. */
static bool fault(const char *name) {
    const char *faults = getenv("FAKE_VZ_FAULT");
    size_t length = strlen(name);
    while (faults != NULL && *faults != 0) {
        size_t word = strcspn(faults, ",");
        if (word == length && strncmp(faults, name, length) == 0) return true;
        faults += word + (faults[word] == ',');
    }
    return false;
}

__attribute__((format(printf, 4, 5))) static bool fail(struct vz_error *error, const char *domain, int64_t code,
                                                       const char *format, ...) {
    if (error != NULL) {
        va_list arguments;
        va_start(arguments, format);
        memset(error, 0, sizeof *error);
        strncpy(error->domain, domain, sizeof error->domain - 1);
        error->code = code;
        vsnprintf(error->text, sizeof error->text, format, arguments);
        va_end(arguments);
    }
    return false;
}

static bool vz_fail(struct vz_error *error, int64_t code, const char *text) {
    return fail(error, "VZErrorDomain", code, "%s", text);
}

/* --- This computer ------------------------------------------------------------------------------------------------- */

void vz_capabilities(struct vz_capabilities *c) {
    struct sysinfo info;
    memset(c, 0, sizeof *c);
    c->supported = !fault("unsupported");
    c->entitled = !fault("unentitled");
    c->save_restore = true;
    c->rosetta = VZ_ROSETTA_NOT_SUPPORTED;
    c->macos[0] = 14;
    c->min_cpus = 1;
    c->max_cpus = 16; /* which share what this computer has */
    c->min_memory = 4 << 20;
    c->max_memory = sysinfo(&info) == 0 ? (uint64_t)info.totalram * info.mem_unit : 1ULL << 30;
}

/* --- A machine ----------------------------------------------------------------------------------------------------- */

struct listener {
    uint32_t port;
    vz_accepted accepted;
    void *context;
};

struct vz_machine {
    char *argv[MAX_ARGS]; /* QEMU's */
    size_t argc;
    int fds[MAX_FDS], targets[MAX_FDS];
    size_t fd_count;
    vz_ended ended;
    void *context;
    pthread_mutex_t lock; /* of what follows */
    enum vz_state state;
    pid_t pid;
    int qmp;
    bool watched; /* there is a thread that waits for QEMU's end */
    pthread_t watcher;
    struct listener listeners[MAX_LISTENERS];
    size_t listener_count;
    uint8_t identifier[16];
};

__attribute__((format(printf, 2, 3))) static void add(struct vz_machine *m, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    if (m->argc + 1 >= MAX_ARGS || vasprintf(&m->argv[m->argc], format, arguments) < 0) abort();
    m->argv[++m->argc] = NULL;
    va_end(arguments);
}

/* Has QEMU inherit a descriptor. Returns its number there. */
static int inherit(struct vz_machine *m, int fd) {
    if (m->fd_count == MAX_FDS) abort();
    m->fds[m->fd_count] = fd;
    m->targets[m->fd_count] = (int)m->fd_count;
    return (int)m->fd_count++;
}

static bool is_arm(const char *kernel) {
    char start[64] = "";
    int fd = open(kernel, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, start, sizeof start);
    if (fd >= 0) close(fd);
    return n == sizeof start && memcmp(start + 56, "ARM\x64", 4) == 0; /* Documentation/arch/arm64/booting.rst */
}

/* The kernel's command line, as this machine needs it: shares go over 9p, and the platform has its own wants. */
static char *cmdline(const struct vz_config *config, bool arm) {
    static const char *const tokens[] = {"vmette.rootfs_share=", "vmette.share="};
    char *line, *copy = strdup(config->cmdline), *rest = copy, *token;
    size_t size;
    FILE *out = open_memstream(&line, &size);
    if (copy == NULL || out == NULL) abort();
    while ((token = strsep(&rest, " ")) != NULL) {
        for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++) {
            size_t length = strlen(tokens[i]);
            if (strncmp(token, tokens[i], length) == 0 && strncmp(token + length, "virtiofs:", 9) == 0) {
                fprintf(out, "%s9p:", tokens[i]);
                token += length + 9;
            }
        }
        fprintf(out, "%s ", token);
    }
    if (!arm) fprintf(out, "pci=off no_timer_check tsc=reliable tsc_early_khz=%u", vmette_tsc_khz());
    fclose(out);
    free(copy);
    return line;
}

/* `text` within one of QEMU's options, where a comma is doubled. */
static void add_path(FILE *out, const char *text) {
    for (; *text != 0; text++) fprintf(out, *text == ',' ? ",," : "%c", *text);
}

static void add_disk(struct vz_machine *m, const struct vz_disk *disk, size_t number) {
    char *option;
    size_t size;
    FILE *out = open_memstream(&option, &size);
    if (out == NULL) abort();
    fprintf(out, "driver=raw,node-name=disk%zu,read-only=%s,file.driver=file,file.filename=", number,
            disk->read_only ? "on" : "off");
    add_path(out, disk->path);
    if (!disk->read_only) fprintf(out, ",discard=unmap,file.discard=unmap");
    fclose(out);
    add(m, "-blockdev");
    add(m, "%s", option);
    free(option);
    add(m, "-device");
    add(m, "virtio-blk-device,drive=disk%zu%s", number, disk->read_only ? "" : ",werror=report");
}

static void add_share(struct vz_machine *m, const struct vz_share *share, size_t number) {
    char *option;
    size_t size;
    FILE *out = open_memstream(&option, &size);
    if (out == NULL) abort();
    fprintf(out, "local,id=share%zu,security_model=%s,multidevs=remap%s,path=", number,
            geteuid() == 0 ? "passthrough" : "none", share->read_only ? ",readonly=on" : "");
    add_path(out, share->path);
    fclose(out);
    add(m, "-fsdev");
    add(m, "%s", option);
    free(option);
    add(m, "-device");
    add(m, "virtio-9p-device,fsdev=share%zu,mount_tag=%s", number, share->tag);
}

static void add_socket(struct vz_machine *m, const char *name, int fd) {
    add(m, "-chardev");
    add(m, "socket,id=%s,fd=%d", name, inherit(m, fd));
}

static void compose(struct vz_machine *m, const struct vz_config *config) {
    bool arm = is_arm(config->kernel);
    char *line = cmdline(config, arm);
    for (int fd = 0; fd < 3; fd++) inherit(m, fd);
    add(m, arm ? "/usr/bin/qemu-system-aarch64" : "/usr/bin/qemu-system-x86_64");
    add(m, "-accel");
    add(m, "tcg");
    add(m, "-cpu");
    add(m, arm ? "max,pauth-impdef=on,sve=off,sme=off" : "max");
    add(m, "-M");
    add(m, arm ? "virt,gic-version=3" : "microvm,acpi=on,isa-serial=off,rtc=on");
    if (!arm) {
        add(m, "-bios");
        add(m, "qboot.rom");
    }
    add(m, "-m");
    add(m, "%lluM", (unsigned long long)(config->memory >> 20));
    add(m, "-smp");
    add(m, "%u", config->cpus);
    static const char *const usual[] = {"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-sandbox",
                                        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
                                        "-global", "virtio-mmio.force-legacy=false", "-device"};
    for (size_t i = 0; i < sizeof usual / sizeof *usual; i++) add(m, "%s", usual[i]);
    add(m, "virtio-serial-device,max_ports=%zu", config->port_count + 2); /* each takes memory of the guest's */
    if (config->console >= 0) {
        add_socket(m, "console", config->console);
        add(m, "-device");
        add(m, "virtconsole,chardev=console");
    }
    for (size_t i = 0; i < config->port_count; i++) {
        char name[32];
        snprintf(name, sizeof name, "port%zu", i);
        add_socket(m, name, config->ports[i].fd);
        add(m, "-device");
        add(m, "virtserialport,chardev=%s,name=%s", name, config->ports[i].name);
    }
    if (config->entropy) {
        static const char *const random[] = {"-object", "rng-builtin,id=rng", "-device", "virtio-rng-device,rng=rng"};
        for (size_t i = 0; i < sizeof random / sizeof *random; i++) add(m, "%s", random[i]);
    }
    /* The kernel names disks as it finds them, which on Arm's machine is backwards. */
    for (size_t i = 0; i < config->disk_count; i++)
        add_disk(m, &config->disks[arm ? config->disk_count - 1 - i : i], i);
    for (size_t i = 0; i < config->share_count; i++) add_share(m, &config->shares[i], i);
    if (config->network) {
        static const char *const net[] = {"-netdev", "user,ipv6=off,id=net", "-device"};
        for (size_t i = 0; i < sizeof net / sizeof *net; i++) add(m, "%s", net[i]);
        add(m, "virtio-net-device,netdev=net,guest_announce=off%s%s", config->mac != NULL ? ",mac=" : "",
            config->mac != NULL ? config->mac : "");
    }
    add(m, "-kernel");
    add(m, "%s", config->kernel);
    if (config->initrd != NULL) {
        add(m, "-initrd");
        add(m, "%s", config->initrd);
    }
    add(m, "-append");
    add(m, "%s", line);
    free(line);
}

static bool check_disk(const struct vz_disk *disk, struct vz_error *error) {
    struct stat st;
    int fd = open(disk->path, (disk->read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
    bool good = fd >= 0 && fstat(fd, &st) == 0;
    if (!good) fail(error, "NSPOSIXErrorDomain", errno, "The disk image %s cannot be opened.", disk->path);
    if (fd >= 0) close(fd);
    return good && (st.st_size > 0 && st.st_size % 512 == 0 ? true : vz_fail(error, INVALID_DISK, "Invalid disk image."));
}

static bool readable(const char *path, struct vz_error *error) {
    return access(path, R_OK) == 0 || fail(error, "VZErrorDomain", INVALID_CONFIGURATION, "Cannot read %s.", path);
}

bool vz_validate(const struct vz_config *config, struct vz_error *error) {
    struct vz_capabilities c;
    vz_capabilities(&c);
    if (fault("validate")) return vz_fail(error, INVALID_CONFIGURATION, "Invalid virtual machine configuration. A fault.");
    if (config->cpus < c.min_cpus || config->cpus > c.max_cpus)
        return vz_fail(error, INVALID_CONFIGURATION, "Invalid virtual machine configuration. The number of CPUs is odd.");
    if (config->memory % (1 << 20) != 0 || config->memory < c.min_memory || config->memory > c.max_memory)
        return vz_fail(error, INVALID_CONFIGURATION, "Invalid virtual machine configuration. The memory size is odd.");
    if (!readable(config->kernel, error) || (config->initrd != NULL && !readable(config->initrd, error))) return false;
    for (size_t i = 0; i < config->disk_count; i++)
        if (!check_disk(&config->disks[i], error)) return false;
    for (size_t i = 0; i < config->share_count; i++) {
        const struct vz_share *share = &config->shares[i];
        if (*share->tag == 0 || strlen(share->tag) > 35)
            return vz_fail(error, INVALID_CONFIGURATION, "Invalid virtual machine configuration. The tag is malformed.");
        if (!readable(share->path, error)) return false;
    }
    if (config->rosetta != NULL)
        return vz_fail(error, INVALID_CONFIGURATION, "Invalid virtual machine configuration. There is no Rosetta.");
    return true;
}

bool vz_validate_save(const struct vz_config *config, struct vz_error *error) {
    if (!vz_validate(config, error)) return false;
    if (config->share_count > 0)
        return vz_fail(error, INVALID_CONFIGURATION, "Invalid virtual machine configuration. Shares cannot be saved.");
    return true;
}

struct vz_machine *vz_create(const struct vz_config *config, vz_ended ended, void *context, struct vz_error *error) {
    if (!vz_validate(config, error)) return NULL;
    struct vz_machine *m = calloc(1, sizeof *m);
    if (m == NULL) abort();
    m->ended = ended;
    m->context = context;
    m->state = VZ_STOPPED;
    m->qmp = -1;
    pthread_mutex_init(&m->lock, NULL);
    for (size_t i = 0; i < sizeof m->identifier; i++)
        m->identifier[i] = i < config->identifier_size ? config->identifier[i] : (uint8_t)(getpid() >> i % 4 * 8);
    compose(m, config);
    return m;
}

void vz_release(struct vz_machine *m) {
    vz_stop(m, NULL);
    if (m->watched) pthread_join(m->watcher, NULL);
    if (m->qmp >= 0) close(m->qmp);
    for (size_t i = 0; i < m->argc; i++) free(m->argv[i]);
    pthread_mutex_destroy(&m->lock);
    free(m);
}

enum vz_state vz_state(struct vz_machine *m) {
    pthread_mutex_lock(&m->lock);
    enum vz_state state = m->state;
    pthread_mutex_unlock(&m->lock);
    return state;
}

static void enter(struct vz_machine *m, enum vz_state state) {
    pthread_mutex_lock(&m->lock);
    if (m->pid != 0 || state == VZ_STARTING || state == VZ_RESTORING) m->state = state;
    pthread_mutex_unlock(&m->lock);
}

/* What happens in the framework's own process: the machine's end is told once. */
static void *watch(void *argument) {
    struct vz_machine *m = argument;
    int status;
    while (waitpid(m->pid, &status, 0) < 0 && errno == EINTR) continue;
    struct vz_error error;
    pthread_mutex_lock(&m->lock);
    bool good = (WIFEXITED(status) && WEXITSTATUS(status) == 0) || m->state == VZ_STOPPING;
    if (!good) vz_fail(&error, INTERNAL, "Internal Virtualization error. The virtual machine stopped unexpectedly.");
    m->state = good ? VZ_STOPPED : VZ_ERROR;
    m->pid = 0;
    pthread_mutex_unlock(&m->lock);
    m->ended(m->context, good ? NULL : &error);
    return NULL;
}

/* Has a running machine come to grief. */
static void *spoil(void *argument) {
    struct vz_machine *m = argument;
    usleep(500000);
    kill(m->pid, SIGKILL);
    return NULL;
}

/* --- QEMU's monitor ------------------------------------------------------------------------------------------------ */

/* Reads a line; false at the end. */
static bool read_line(int fd, char *line) {
    size_t size = 0;
    while (size + 1 < MAX_LINE) {
        ssize_t n = read(fd, line + size, 1);
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return false;
        if (line[size] == '\n') break;
        size++;
    }
    line[size] = 0;
    return true;
}

/* Has QEMU execute a command, with a descriptor unless that is -1; `line` gets its answer. */
static bool execute(struct vz_machine *m, const char *command, int fd, char *line) {
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof fd)];
    } control;
    struct iovec bytes = {(void *)(uintptr_t)command, strlen(command)};
    struct msghdr message = {.msg_iov = &bytes, .msg_iovlen = 1};
    if (fd >= 0) {
        memset(&control, 0, sizeof control);
        message.msg_control = control.space;
        message.msg_controllen = sizeof control.space;
        *CMSG_FIRSTHDR(&message) =
            (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof fd), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(CMSG_FIRSTHDR(&message)), &fd, sizeof fd);
    }
    if (sendmsg(m->qmp, &message, MSG_NOSIGNAL) != (ssize_t)bytes.iov_len) return false;
    while (read_line(m->qmp, line)) {
        if (strncmp(line, "{\"return\"", 9) == 0) return true;
        if (strncmp(line, "{\"error\"", 8) == 0) return false;
    } /* the rest are events */
    return false;
}

static bool command(struct vz_machine *m, const char *text) {
    char *line = malloc(MAX_LINE);
    bool good = line != NULL && execute(m, text, -1, line);
    free(line);
    return good;
}

/* Asks until QEMU's answer has one of two words in it; true if it is the first. */
static bool becomes(struct vz_machine *m, const char *question, const char *good, const char *bad) {
    char *line = malloc(MAX_LINE);
    bool found = false;
    while (line != NULL && execute(m, question, -1, line)) {
        found = strstr(line, good) != NULL;
        if (found || strstr(line, bad) != NULL) break;
        usleep(5000);
    }
    free(line);
    return found;
}

/* Starts QEMU: from a saved state if `state` is a descriptor, and then it is paused. */
static bool launch(struct vz_machine *m, int state, struct vz_error *error) {
    static char path[] = "PATH=/usr/bin:/bin";
    static char *const environment[] = {path, NULL};
    int monitor[2];
    size_t argc = m->argc, fd_count = m->fd_count;
    if (fault("slow-start")) sleep(2);
    if (fault("start")) return vz_fail(error, INTERNAL, "Internal Virtualization error. The machine failed to start.");
    if (fault("limit")) return vz_fail(error, LIMIT, "The number of virtual machines exceeds the limit.");
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, monitor) != 0)
        return fail(error, "NSPOSIXErrorDomain", errno, "There are no descriptors left.");
    add_socket(m, "qmp", monitor[1]);
    add(m, "-mon");
    add(m, "chardev=qmp,mode=control");
    if (state >= 0) {
        add(m, "-S");
        add(m, "-incoming");
        add(m, "fd:%d", inherit(m, state));
    }
    int pid = vmette_spawn(m->argv[0], m->argv, environment, m->fds, m->targets, (int)m->fd_count);
    close(monitor[1]);
    while (m->argc > argc) {
        free(m->argv[--m->argc]);
        m->argv[m->argc] = NULL;
    }
    m->fd_count = fd_count;
    if (pid < 0) {
        close(monitor[0]);
        return fail(error, "NSPOSIXErrorDomain", -pid, "QEMU cannot be started.");
    }
    pthread_mutex_lock(&m->lock);
    m->pid = pid;
    m->qmp = monitor[0];
    pthread_mutex_unlock(&m->lock);
    if (pthread_create(&m->watcher, NULL, watch, m) != 0) abort();
    m->watched = true;
    if (!command(m, "{\"execute\":\"qmp_capabilities\"}\n"))
        return vz_fail(error, INTERNAL, "Internal Virtualization error. QEMU does not answer.");
    pthread_t spoiler;
    if (fault("guest-error") && pthread_create(&spoiler, NULL, spoil, m) == 0) pthread_detach(spoiler);
    return true;
}

/* --- What is asked of a machine ------------------------------------------------------------------------------------ */

/* Whether the machine is in the state that a request needs. */
static bool expect(struct vz_machine *m, enum vz_state state, struct vz_error *error) {
    return vz_state(m) == state ||
           vz_fail(error, INVALID_STATE, "Invalid virtual machine state. Transition from its state is invalid.");
}

bool vz_start(struct vz_machine *m, struct vz_error *error) {
    if (m->watched) return vz_fail(error, INVALID_STATE, "Invalid virtual machine state. The stand-in starts once.");
    if (!expect(m, VZ_STOPPED, error)) return false;
    enter(m, VZ_STARTING);
    bool good = launch(m, -1, error);
    if (good)
        enter(m, VZ_RUNNING);
    else if (!m->watched)
        m->state = VZ_STOPPED;
    return good;
}

bool vz_pause(struct vz_machine *m, struct vz_error *error) {
    if (!expect(m, VZ_RUNNING, error)) return false;
    if (!command(m, "{\"execute\":\"stop\"}\n")) return vz_fail(error, INTERNAL, "Internal Virtualization error.");
    enter(m, VZ_PAUSED);
    return true;
}

bool vz_resume(struct vz_machine *m, struct vz_error *error) {
    if (!expect(m, VZ_PAUSED, error)) return false;
    if (!command(m, "{\"execute\":\"cont\"}\n")) return vz_fail(error, INTERNAL, "Internal Virtualization error.");
    enter(m, VZ_RUNNING);
    return true;
}

bool vz_stop(struct vz_machine *m, struct vz_error *error) {
    pthread_mutex_lock(&m->lock);
    bool running = m->pid != 0;
    if (running) {
        m->state = VZ_STOPPING;
        kill(m->pid, SIGKILL);
    }
    pthread_mutex_unlock(&m->lock);
    if (!running) return vz_fail(error, INVALID_STATE, "Invalid virtual machine state. It does not run.");
    while (vz_state(m) == VZ_STOPPING) usleep(1000);
    return true;
}

bool vz_request_stop(struct vz_machine *m, struct vz_error *error) {
    if (!expect(m, VZ_RUNNING, error)) return false;
    return command(m, "{\"execute\":\"system_powerdown\"}\n") ||
           vz_fail(error, INTERNAL, "Internal Virtualization error.");
}

bool vz_save(struct vz_machine *m, const char *path, struct vz_error *error) {
    if (!expect(m, VZ_PAUSED, error)) return false;
    if (fault("save")) return vz_fail(error, SAVE, "Save error.");
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) return fail(error, "NSPOSIXErrorDomain", errno, "%s cannot be created.", path);
    enter(m, VZ_SAVING);
    char *line = malloc(MAX_LINE);
    bool good = line != NULL && execute(m, "{\"execute\":\"getfd\",\"arguments\":{\"fdname\":\"state\"}}\n", fd, line) &&
                execute(m, "{\"execute\":\"migrate\",\"arguments\":{\"uri\":\"fd:state\"}}\n", -1, line) &&
                becomes(m, "{\"execute\":\"query-migrate\"}\n", "\"completed\"", "\"failed\"");
    free(line);
    close(fd);
    enter(m, VZ_PAUSED);
    if (!good) unlink(path);
    return good || vz_fail(error, SAVE, "Save error.");
}

bool vz_restore(struct vz_machine *m, const char *path, struct vz_error *error) {
    char start[sizeof magic - 1];
    if (m->watched || !expect(m, VZ_STOPPED, error)) return false;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return fail(error, "NSPOSIXErrorDomain", errno, "%s cannot be opened.", path);
    bool good = !fault("restore") && pread(fd, start, sizeof start, 0) == (ssize_t)sizeof start &&
                memcmp(start, magic, sizeof start) == 0;
    if (!good) {
        close(fd);
        return vz_fail(error, RESTORE, "Restore error.");
    }
    enter(m, VZ_RESTORING);
    good = launch(m, fd, error);
    close(fd);
    if (!good) return false;
    if (!becomes(m, "{\"execute\":\"query-status\"}\n", "\"status\": \"paused\"", "\"internal-error\""))
        return vz_fail(error, RESTORE, "Restore error.");
    enter(m, VZ_PAUSED);
    return true;
}

size_t vz_identifier(struct vz_machine *m, uint8_t *buffer, size_t size) {
    memcpy(buffer, m->identifier, size < sizeof m->identifier ? size : sizeof m->identifier);
    return sizeof m->identifier;
}

/* --- vsock --------------------------------------------------------------------------------------------------------- */

static void *echo(void *argument) {
    int fd = (int)(intptr_t)argument;
    char data[4096];
    ssize_t n;
    while ((n = read(fd, data, sizeof data)) > 0)
        if (send(fd, data, (size_t)n, MSG_NOSIGNAL) != n) break;
    close(fd);
    return NULL;
}

int vz_vsock_connect(struct vz_machine *m, uint32_t port, struct vz_error *error) {
    int ends[2];
    pthread_t thread;
    if (port < FIRST_ECHO_PORT) {
        fail(error, "NSPOSIXErrorDomain", ECONNRESET, "Connection reset by peer");
        return -1;
    }
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
        fail(error, "NSPOSIXErrorDomain", errno, "There are no descriptors left.");
        return -1;
    }
    pthread_mutex_lock(&m->lock);
    for (size_t i = 0; i < m->listener_count; i++) {
        struct listener found = m->listeners[i];
        if (found.port != port) continue;
        found.accepted(found.context, port, ends[1]);
        pthread_mutex_unlock(&m->lock);
        return ends[0];
    }
    pthread_mutex_unlock(&m->lock);
    if (pthread_create(&thread, NULL, echo, (void *)(intptr_t)ends[1]) != 0) abort();
    pthread_detach(thread);
    return ends[0];
}

bool vz_vsock_listen(struct vz_machine *m, uint32_t port, vz_accepted accepted, void *context, struct vz_error *error) {
    bool taken = false;
    pthread_mutex_lock(&m->lock);
    for (size_t i = 0; i < m->listener_count; i++) taken |= m->listeners[i].port == port;
    taken |= m->listener_count == MAX_LISTENERS;
    if (!taken) m->listeners[m->listener_count++] = (struct listener){port, accepted, context};
    pthread_mutex_unlock(&m->lock);
    return !taken || fail(error, "vmette", EADDRINUSE, "Somebody listens at port %u.", port);
}

void vz_vsock_unlisten(struct vz_machine *m, uint32_t port) {
    pthread_mutex_lock(&m->lock);
    for (size_t i = 0; i < m->listener_count; i++)
        if (m->listeners[i].port == port) m->listeners[i--] = m->listeners[--m->listener_count];
    pthread_mutex_unlock(&m->lock);
}

/* PID 1 of the guest: builds the root filesystem, enters it and becomes the agent.
 *
 * What to do comes on the kernel's command line (vmette/vmm/cmdline.py writes it):
 *   vmette.rootfs_block=FSTYPE        the root is the first virtio disk, /dev/vda
 *   vmette.rootfs_share=TYPE:TAG      the root is a share; TYPE is virtiofs or 9p
 *   vmette.rootfs_ro                  the root, overlay and all, is read-only for the command
 *   vmette.scratch=/dev/vdX           an ext4 disk for what is written to the root, and for /tmp, in place of memory
 *   vmette.share=TYPE:TAG:ro|rw[:DIR] a share at DIR, or else at /mnt/TAG; may be repeated
 *   vmette.hostname=NAME
 *   vmette.net=HOW                    brings up the network card: see network.h
 *   vmette.pids=N                     the most processes and threads that all commands together may have
 *   vmette.nofile=N                   the most files that each process of a command may have open
 *   vmette.rosetta=TYPE:TAG           a share with a program named rosetta, which runs programs for x86_64
 *   vmette.helpers                    vsock-send and vsock-runner, in /usr/local/bin of whatever root it is
 * DIR has %XX in place of what is no letter, digit, `/`, `.`, `_` or `-`.
 *
 * The root is always an overlay: the block image or share below is never written to, changes go to a tmpfs or to the
 * scratch disk.
 *
 * Every failure is told on the control port and powers the machine off: there is no shell to fall into.
 */
#define _GNU_SOURCE
#include "agent.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#include <linux/capability.h>

#include "cgroup.h"
#include "network.h"
#include "resume.h"
#include "share.h"

enum { MAX_SHARES = 32, CMDLINE = 8192 };

static int port = -1;
static struct milestone milestones[8];
static size_t milestone_count;

static void reached(const char *name) {
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    milestones[milestone_count++] =
        (struct milestone){name, (uint64_t)now.tv_sec * 1000000 + (uint64_t)now.tv_nsec / 1000};
}

static _Noreturn void power_off(void) {
    sync();
    reboot(RB_POWER_OFF);
    for (;;) pause(); /* PID 1 must not return; the host ends a VM that does not power off */
}

/* --- The control port ---------------------------------------------------------------------------------------------- */

/* Where the kernel lists the ports and where their nodes are: opened before the root changes, so that a failure at any
 * time finds the port without asking the image. */
static int port_list = -1, port_nodes = -1;

/* The port's number is the kernel's business: it is found by its name. */
static int open_port(const char *name) {
    int list = openat(port_list, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *ports = list < 0 ? NULL : fdopendir(list);
    if (ports == NULL) return -1;
    struct dirent *entry;
    int fd = -1;
    while (fd < 0 && (entry = readdir(ports)) != NULL) {
        char path[300], found[64];
        if (entry->d_name[0] == '.') continue;
        snprintf(path, sizeof path, "%s/name", entry->d_name);
        int file = openat(port_list, path, O_RDONLY | O_CLOEXEC);
        if (file < 0) continue;
        ssize_t n = read(file, found, sizeof found - 1);
        close(file);
        if (n <= 0) continue;
        found[n] = 0;
        found[strcspn(found, "\n")] = 0;
        if (strcmp(found, name) == 0) fd = openat(port_nodes, entry->d_name, O_RDWR | O_CLOEXEC);
    }
    closedir(ports);
    return fd;
}

/* The host adds the port's name in a message that comes some milliseconds after the device: it is asked for when there
 * is something to say, and not waited for before. */
static bool wait_for_port(void) {
    for (int i = 0; i < 5000 && port < 0; i++) {
        port = open_port("vmette.control");
        if (port < 0) nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
    return port >= 0;
}

__attribute__((format(printf, 2, 3))) static _Noreturn void fail(const char *stage, const char *format, ...) {
    int error = errno;
    char text[512];
    va_list args;
    va_start(args, format);
    vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (wait_for_port())
        agent_report(port, error, stage, text);
    else
        dprintf(STDERR_FILENO, "vmette: %s: %s: %s\n", stage, text, strerror(error));
    power_off();
}

static void must_mount(const char *source, const char *target, const char *type, unsigned long flags, const char *data) {
    if (mount(source, target, type, flags, data) != 0)
        fail("mount", "cannot mount %s (%s) at %s", source, type, target);
}

/* Makes a directory whose parent is there. One that exists is as good, unless it is a symlink: the image is hostile. */
static bool make_dir(const char *path, mode_t mode) {
    struct stat st;
    if (mkdir(path, mode) == 0) return true;
    return errno == EEXIST && lstat(path, &st) == 0 && (S_ISDIR(st.st_mode) || (errno = ENOTDIR, false));
}

/* --- The root filesystem ------------------------------------------------------------------------------------------- */

struct share {
    const char *type, *tag, *target;
    bool read_only;
};

struct plan {
    const char *block_type;
    struct share root;
    bool root_read_only;
    const char *scratch;
    const char *hostname;
    const char *net;
    unsigned long pids, nofile; /* 0: as it is by default */
    bool helpers;
    struct share rosetta;
    struct share shares[MAX_SHARES];
    size_t share_count;
};

/* Mounts it at `where`, which is its target unless the path to that is not to be walked again. */
static void mount_share(const struct share *s, const char *where) {
    const char *options = NULL;
    if (strcmp(s->type, "9p") == 0)
        options = "trans=virtio,version=9p2000.L,msize=512000,cache=mmap,access=client";
    else if (strcmp(s->type, "virtiofs") != 0)
        fail("cmdline", "share type %s is not known", s->type);
    if (mount(s->tag, where, s->type, s->read_only ? MS_RDONLY : 0, options) != 0)
        fail("mount", "cannot mount %s (%s) at %s", s->tag, s->type, s->target != NULL ? s->target : where);
}

/* Puts back what cmdline.py has escaped, in place. */
static void unescape(char *text) {
    char *to = text;
    for (const char *from = text; *from != 0; from++) {
        char digits[3] = {from[0] == '%' ? from[1] : 0}, *end = digits;
        if (digits[0] != 0) digits[1] = from[2];
        unsigned long byte = strtoul(digits, &end, 16);
        bool escaped = end == digits + 2;
        *to++ = escaped ? (char)byte : *from;
        if (escaped) from += 2;
    }
    *to = 0;
}

static struct share parse_share(char *text) {
    struct share s = {.type = strsep(&text, ":"), .tag = strsep(&text, ":")};
    if (s.tag == NULL) fail("cmdline", "share %s has no tag", s.type);
    const char *access = strsep(&text, ":");
    s.read_only = access != NULL && strcmp(access, "rw") != 0;
    if (text != NULL) unescape(text);
    s.target = text;
    return s;
}

static unsigned long parse_limit(const char *name, const char *text) {
    char *end;
    unsigned long limit = strtoul(text, &end, 10);
    if (*text < '1' || *text > '9' || *end != 0) fail("cmdline", "%s=%s is no number", name, text);
    return limit;
}

static char *value_of(char *token, const char *name) {
    size_t length = strlen(name);
    return strncmp(token, name, length) == 0 ? token + length : NULL;
}

static void read_plan(struct plan *plan) {
    static char line[CMDLINE];
    int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, line, sizeof line - 1);
    if (n < 0) fail("cmdline", "cannot read /proc/cmdline");
    close(fd);
    line[n] = 0;
    plan->hostname = "vmette";
    char *rest = line, *token, *value;
    errno = EINVAL;
    while ((token = strsep(&rest, " \n")) != NULL) {
        if ((value = value_of(token, "vmette.rootfs_block=")) != NULL)
            plan->block_type = value;
        else if ((value = value_of(token, "vmette.rootfs_share=")) != NULL)
            plan->root = parse_share(value);
        else if (strcmp(token, "vmette.rootfs_ro") == 0)
            plan->root_read_only = true;
        else if ((value = value_of(token, "vmette.scratch=")) != NULL)
            plan->scratch = value;
        else if ((value = value_of(token, "vmette.hostname=")) != NULL)
            plan->hostname = value;
        else if ((value = value_of(token, "vmette.net=")) != NULL)
            plan->net = value;
        else if ((value = value_of(token, "vmette.pids=")) != NULL)
            plan->pids = parse_limit("vmette.pids", value);
        else if ((value = value_of(token, "vmette.nofile=")) != NULL)
            plan->nofile = parse_limit("vmette.nofile", value);
        else if ((value = value_of(token, "vmette.rosetta=")) != NULL)
            plan->rosetta = parse_share(value);
        else if (strcmp(token, "vmette.helpers") == 0)
            plan->helpers = true;
        else if ((value = value_of(token, "vmette.share=")) != NULL) {
            if (plan->share_count == MAX_SHARES) fail("cmdline", "more than %d shares", MAX_SHARES);
            plan->shares[plan->share_count++] = parse_share(value);
        }
    }
    if (plan->block_type == NULL && plan->root.tag == NULL) fail("cmdline", "no root filesystem is named");
}

/* Lower (read-only), upper (tmpfs, or the scratch disk) and the overlay of both at /new. */
static void mount_root(const struct plan *plan) {
    make_dir("/lower", 0755);
    make_dir("/upper", 0755);
    make_dir("/new", 0755);
    if (plan->block_type != NULL) {
        must_mount("/dev/vda", "/lower", plan->block_type, MS_RDONLY, NULL);
    } else {
        struct share lower = plan->root;
        lower.read_only = true;
        mount_share(&lower, "/lower");
    }
    if (plan->scratch != NULL) /* what is deleted there gives its space back to the host */
        must_mount(plan->scratch, "/upper", "ext4", MS_NOATIME, "discard");
    else
        must_mount("upper", "/upper", "tmpfs", 0, "mode=0755");
    make_dir("/upper/data", 0755);
    make_dir("/upper/work", 0755);
    struct stat st;
    if (stat("/lower", &st) == 0) { /* the root directory's own mode and owner show through the upper one */
        if (chown("/upper/data", st.st_uid, st.st_gid) != 0) fail("mount", "cannot set the owner of the root directory");
        chmod("/upper/data", st.st_mode & 07777);
    }
    must_mount("overlay", "/new", "overlay", 0, "lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work");
    if (plan->scratch != NULL) {
        make_dir("/upper/tmp", 01777);
        if (!make_dir("/new/tmp", 01777)) fail("mount", "cannot make /tmp in the root filesystem");
        must_mount("/upper/tmp", "/new/tmp", NULL, MS_BIND, NULL);
        must_mount("/upper/tmp", "/new/tmp", NULL, MS_REMOUNT | MS_BIND | MS_NOSUID | MS_NODEV | MS_NOATIME, NULL);
    }
}

static void move_into_root(const char *from, const char *to) {
    if (!make_dir(to, 0755)) fail("mount", "cannot make %s in the root filesystem", from);
    if (mount(from, to, NULL, MS_MOVE, NULL) != 0) fail("mount", "cannot move %s to the root filesystem", from);
}

/* Enters /new, and takes along what is mounted already. The initramfs cannot be unmounted: the new root is moved over
 * it and out of sight (as switch_root does). */
static void enter_root(void) {
    if (chdir("/new") != 0) fail("mount", "cannot enter the root filesystem");
    move_into_root("/proc", "proc");
    move_into_root("/sys", "sys");
    move_into_root("/dev", "dev");
    if (mount(".", "/", NULL, MS_MOVE, NULL) != 0 || chroot(".") != 0 || chdir("/") != 0)
        fail("mount", "cannot enter the root filesystem");
}

static const unsigned long safe = MS_NOSUID | MS_NODEV | MS_NOEXEC;

static void mount_in_root(const char *source, const char *target, const char *type, unsigned long flags,
                          const char *data) {
    if (!make_dir(target, 0755)) fail("mount", "cannot make %s in the root filesystem", target);
    must_mount(source, target, type, flags, data);
}

/* What every Linux program expects to find mounted, beside what mount_kernel has. */
static void mount_system(const struct plan *plan) {
    mount_in_root("cgroup2", "/sys/fs/cgroup", "cgroup2", safe, "nsdelegate");
    mount_in_root("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666");
    mount_in_root("shm", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
    mount_in_root("run", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755");
    if (plan->scratch == NULL) mount_in_root("tmp", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
    static const char *const links[][2] = {{"/proc/self/fd", "/dev/fd"},
                                           {"/proc/self/fd/0", "/dev/stdin"},
                                           {"/proc/self/fd/1", "/dev/stdout"},
                                           {"/proc/self/fd/2", "/dev/stderr"},
                                           {"pts/ptmx", "/dev/ptmx"}};
    for (size_t i = 0; i < sizeof links / sizeof *links; i++) {
        unlink(links[i][1]);
        if (symlink(links[i][0], links[i][1]) != 0) fail("mount", "cannot make %s", links[i][1]);
    }
}

/* The kernel's own filesystems, in the initramfs. */
static void mount_kernel(void) {
    make_dir("/proc", 0755);
    make_dir("/sys", 0755);
    must_mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755");
    must_mount("sysfs", "/sys", "sysfs", safe, NULL);
    must_mount("proc", "/proc", "proc", safe, NULL);
    port_nodes = open("/dev", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    port_list = open("/sys/class/virtio-ports", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
}

static void enter_dir(const char *path) {
    if (enter_directory(path) != 0) fail("mount", "cannot make %s in the root filesystem", path);
}

static void mount_shares(const struct share *shares, size_t count) {
    for (const struct share *s = shares; s < shares + count; s++) {
        char usual[128];
        snprintf(usual, sizeof usual, "/mnt/%s", s->tag);
        if (s->target != NULL) {
            enter_dir(s->target);
        } else { /* nobody chose that place, so no link does either */
            if (!make_dir("/mnt", 0755)) fail("mount", "cannot make /mnt in the root filesystem");
            if (!make_dir(usual, 0755)) fail("mount", "cannot make %s in the root filesystem", usual);
        }
        mount_share(s, s->target != NULL ? "." : usual);
    }
    if (count > 0 && chdir("/") != 0) fail("mount", "cannot enter the root filesystem");
}

/* Programs for the workload, which the initramfs brings along: the image need not have them. They are opened before the
 * root changes. */
static const char *const helpers[] = {"vsock-send", "vsock-runner"};
enum { HELPERS = sizeof helpers / sizeof *helpers };
static int helper_files[HELPERS];

static void open_helpers(void) {
    for (size_t i = 0; i < HELPERS; i++)
        if ((helper_files[i] = open(helpers[i], O_RDONLY | O_CLOEXEC)) < 0)
            fail("helpers", "the initramfs has no %s", helpers[i]);
}

static void install_helpers(void) {
    enter_dir("/usr/local/bin");
    for (size_t i = 0; i < HELPERS; i++) {
        int fd = open(helpers[i], O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0755);
        struct stat st;
        if (fd < 0 && errno == EEXIST) continue; /* the image's own */
        if (fd < 0 || fstat(helper_files[i], &st) != 0 ||
            sendfile(fd, helper_files[i], NULL, (size_t)st.st_size) != st.st_size)
            fail("helpers", "cannot install /usr/local/bin/%s", helpers[i]);
        close(fd);
        close(helper_files[i]);
    }
    if (chdir("/") != 0) fail("mount", "cannot enter the root filesystem");
}

/* --- The rest of the system ---------------------------------------------------------------------------------------- */

static void write_to(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, text, strlen(text)) < 0) fail("system", "cannot write %s to %s", text, path);
    close(fd);
}

/* Programs that the kernel executes itself (for a core dump, say) are of root and in no command's bounding set: they get
 * no CAP_SYS_PTRACE either, with which they could trace the agent. Two words of 32 bits; what is gone is gone for good. */
static void limit_helpers(void) {
    char text[32];
    snprintf(text, sizeof text, "%u %u", ~(1U << CAP_SYS_PTRACE), (1U << (CAP_LAST_CAP - 31)) - 1);
    write_to("/proc/sys/kernel/usermodehelper/bset", text);
    write_to("/proc/sys/kernel/usermodehelper/inheritable", text);
}

/* Half of the threads that the kernel sees fit for this much memory (threads-max: their stacks, of 16 KiB, may take an
 * eighth of it), and enough for anybody. */
static unsigned long usual_pids(uint64_t memory) {
    uint64_t half = memory / 8 / (16 << 10) / 2;
    return half < 4096 ? (unsigned long)half : 4096;
}

/* What commands may have together of the memory that is free now: all but a sixteenth, and no less than 8 MiB left for
 * the agent (2 MiB, and what waits for the stdin of commands: 256 KiB for each) and for what the kernel charges to nobody.
 * Whoever wants more is killed. If it were the kernel as a whole that ran out of memory, it might find nobody to kill: what
 * is in a tmpfs belongs to no process. */
static uint64_t usual_memory(uint64_t free) {
    uint64_t least = 8 << 20, reserve = free / 16 > least ? free / 16 : least;
    return free > 2 * reserve ? free - reserve : free / 2;
}

/* Has the kernel run programs for x86_64 by Apple's Rosetta: ELF files with that machine's number. The kernel opens it
 * here and now (F), so that no command has to find it, and gives it the program open (O) and with its credentials (C). */
static void register_rosetta(struct share *rosetta) {
    static const char rule[] =
        ":rosetta:M::\\x7fELF\\x02\\x01\\x01\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x00\\x02\\x00\\x3e\\x00:"
        "\\xff\\xff\\xff\\xff\\xff\\xfe\\xfe\\x00\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xff\\xfe\\xff\\xff\\xff:"
        "/rosetta/rosetta:OCF";
    make_dir("/rosetta", 0755);
    make_dir("/binfmt", 0755);
    rosetta->read_only = true;
    mount_share(rosetta, "/rosetta");
    must_mount("binfmt_misc", "/binfmt", "binfmt_misc", safe, NULL);
    write_to("/binfmt/register", rule);
}

/* The cgroup for commands: the agent makes one for each in it. As the agent stays outside, it gets as much of the
 * processors as all commands together, however many they are. */
static void limit_commands(const struct plan *plan) {
    static const char controllers[] = "+cpu +memory +pids";
    char text[32];
    struct sysinfo info;
    if (sysinfo(&info) != 0) fail("limits", "cannot find out how much memory there is");
    write_to("/sys/fs/cgroup/cgroup.subtree_control", controllers);
    if (!make_dir(CGROUP_PARENT, 0755)) fail("limits", "cannot make %s", CGROUP_PARENT);
    write_to(CGROUP_PARENT "/cgroup.subtree_control", controllers);
    unsigned long pids = plan->pids != 0 ? plan->pids : usual_pids((uint64_t)info.totalram * info.mem_unit);
    snprintf(text, sizeof text, "%lu", pids);
    write_to(CGROUP_PARENT "/pids.max", text);
    snprintf(text, sizeof text, "%llu", (unsigned long long)usual_memory((uint64_t)info.freeram * info.mem_unit));
    write_to(CGROUP_PARENT "/memory.max", text);
    struct rlimit files = {plan->nofile, plan->nofile};
    if (plan->nofile != 0 && setrlimit(RLIMIT_NOFILE, &files) != 0)
        fail("limits", "cannot limit open files to %lu", plan->nofile);
}

static void write_hosts(const char *hostname) {
    if ((errno = name_machine(hostname)) != 0) fail("hostname", "cannot name the machine %s", hostname);
}

static void write_resolv_conf(const struct lease *lease) {
    int fd = lease->dns_count > 0 ? open_own("/etc/resolv.conf") : -1;
    if (fd < 0 && lease->dns_count > 0 && errno != ENOTDIR) fail("mount", "cannot write /etc/resolv.conf");
    if (fd < 0) return;
    for (size_t i = 0; i < lease->dns_count; i++) dprintf(fd, "nameserver %s\n", inet_ntoa(lease->dns[i]));
    close(fd);
}

static void start_network(const struct plan *plan, const char *(*up)(const char *how, struct lease *lease)) {
    struct lease lease;
    const char *problem = plan->net != NULL ? up(plan->net, &lease) : NULL;
    if (problem != NULL) fail("network", "%s", problem);
    if (plan->net != NULL) write_resolv_conf(&lease);
}

static void lock_root(const struct plan *plan, unsigned long flag) {
    if (plan->root_read_only && mount(NULL, "/", NULL, MS_REMOUNT | flag, NULL) != 0)
        fail("mount", "cannot make the root filesystem %s", flag != 0 ? "read-only" : "ready");
}

/* --- Its start, and how it goes on elsewhere ------------------------------------------------------------------------- */

static struct plan plan;

/* See `waking`. What cannot be done is told as at a boot, where it is of the same kind. */
static int wake(const struct resume *resume, int random, const char **stage) {
    struct share shares[RESUME_SHARES];
    for (size_t i = 0; i < resume->share_count; i++) shares[i] = parse_share(resume->shares[i]);
    umask(0);
    lock_root(&plan, 0);
    int error = resume_machine(resume, random, stage);
    if (error != 0) return error;
    start_network(&plan, network_again);
    mount_shares(shares, resume->share_count);
    lock_root(&plan, MS_RDONLY);
    umask(022);
    return 0;
}

int main(void) {
    reached("init");
    umask(0);
    mount_kernel();
    read_plan(&plan);
    if (plan.helpers) open_helpers();
    if (plan.rosetta.tag != NULL) register_rosetta(&plan.rosetta);
    mount_root(&plan);
    reached("root");
    enter_root();
    mount_system(&plan);
    mount_shares(plan.shares, plan.share_count);
    if (plan.helpers) install_helpers();
    limit_commands(&plan);
    limit_helpers();
    const char *problem = loopback_up();
    if (problem != NULL) fail("network", "%s", problem);
    start_network(&plan, network_up);
    write_hosts(plan.hostname);
    lock_root(&plan, MS_RDONLY);
    umask(022);
    reached("ready");
    if (!wait_for_port()) fail("control", "there is no port named vmette.control");
    close(port_list);
    close(port_nodes);
    reached("port");
    struct utsname name;
    uname(&name);
    agent_serve(port, name.release, milestones, milestone_count, wake);
    power_off();
}

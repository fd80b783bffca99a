/* PID 1 of the guest: builds the root filesystem, enters it and becomes the agent.
 *
 * What to do comes on the kernel's command line (vmette/vmm/cmdline.py writes it):
 *   vmette.rootfs_block=FSTYPE        the root is the first virtio disk, /dev/vda
 *   vmette.rootfs_share=TYPE:TAG      the root is a share; TYPE is virtiofs or 9p
 *   vmette.rootfs_ro                  the root, overlay and all, is read-only for the command
 *   vmette.share=TYPE:TAG:ro|rw       a share at /mnt/TAG; may be repeated
 *   vmette.hostname=NAME
 * The root is always an overlay: the block image or share below is never written to, changes go to a tmpfs.
 *
 * Every failure is told on the control port and powers the machine off: there is no shell to fall into.
 */
#define _GNU_SOURCE
#include "agent.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

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
    const char *type, *tag;
    bool read_only;
};

struct plan {
    const char *block_type;
    struct share root;
    bool root_read_only;
    const char *hostname;
    struct share shares[MAX_SHARES];
    size_t share_count;
};

static void mount_share(const struct share *s, const char *target) {
    unsigned long flags = s->read_only ? MS_RDONLY : 0;
    if (strcmp(s->type, "virtiofs") == 0)
        must_mount(s->tag, target, "virtiofs", flags, NULL);
    else if (strcmp(s->type, "9p") == 0)
        must_mount(s->tag, target, "9p", flags, "trans=virtio,version=9p2000.L,msize=512000,cache=mmap,access=client");
    else
        fail("cmdline", "share type %s is not known", s->type);
}

static struct share parse_share(char *text) {
    struct share s = {.type = text};
    char *tag = strchr(text, ':');
    if (tag == NULL) fail("cmdline", "share %s has no tag", text);
    *tag++ = 0;
    s.tag = tag;
    char *access = strchr(tag, ':');
    if (access != NULL) {
        *access++ = 0;
        s.read_only = strcmp(access, "rw") != 0;
    }
    return s;
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
        else if ((value = value_of(token, "vmette.hostname=")) != NULL)
            plan->hostname = value;
        else if ((value = value_of(token, "vmette.share=")) != NULL) {
            if (plan->share_count == MAX_SHARES) fail("cmdline", "more than %d shares", MAX_SHARES);
            plan->shares[plan->share_count++] = parse_share(value);
        }
    }
    if (plan->block_type == NULL && plan->root.tag == NULL) fail("cmdline", "no root filesystem is named");
}

/* Lower (read-only), upper (tmpfs) and the overlay of both at /new. */
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
    must_mount("upper", "/upper", "tmpfs", 0, "mode=0755");
    make_dir("/upper/data", 0755);
    make_dir("/upper/work", 0755);
    struct stat st;
    if (stat("/lower", &st) == 0) { /* the root directory's own mode and owner show through the upper one */
        if (chown("/upper/data", st.st_uid, st.st_gid) != 0) fail("mount", "cannot set the owner of the root directory");
        chmod("/upper/data", st.st_mode & 07777);
    }
    must_mount("overlay", "/new", "overlay", 0, "lowerdir=/lower,upperdir=/upper/data,workdir=/upper/work");
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
static void mount_system(void) {
    mount_in_root("cgroup2", "/sys/fs/cgroup", "cgroup2", safe, "nsdelegate");
    mount_in_root("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666");
    mount_in_root("shm", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
    mount_in_root("run", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=0755");
    mount_in_root("tmp", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
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

static void mount_shares(const struct plan *plan) {
    if (plan->share_count > 0 && !make_dir("/mnt", 0755)) fail("mount", "cannot make /mnt in the root filesystem");
    for (size_t i = 0; i < plan->share_count; i++) {
        char target[128];
        snprintf(target, sizeof target, "/mnt/%s", plan->shares[i].tag);
        if (!make_dir(target, 0755)) fail("mount", "cannot make %s in the root filesystem", target);
        mount_share(&plan->shares[i], target);
    }
}

/* --- The rest of the system ---------------------------------------------------------------------------------------- */

static void loopback_up(void) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request) != 0) fail("network", "cannot bring up loopback");
    close(fd);
}

/* /etc/hosts is ours, as under container engines. A link that the image put there is replaced, never followed. */
static void write_hosts(const char *hostname) {
    struct stat st;
    if (sethostname(hostname, strlen(hostname)) != 0) fail("hostname", "cannot set the host name to %s", hostname);
    if (!make_dir("/etc", 0755)) return; /* an image with /etc as a link keeps what it has */
    if (lstat("/etc/hosts", &st) == 0 && !S_ISREG(st.st_mode)) unlink("/etc/hosts");
    int fd = open("/etc/hosts", O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0644);
    if (fd < 0) fail("hostname", "cannot write /etc/hosts");
    dprintf(fd, "127.0.0.1\tlocalhost %s\n::1\tlocalhost ip6-localhost ip6-loopback\n", hostname);
    close(fd);
}

int main(void) {
    reached("init");
    umask(0);
    mount_kernel();
    static struct plan plan;
    read_plan(&plan);
    mount_root(&plan);
    reached("root");
    enter_root();
    mount_system();
    mount_shares(&plan);
    loopback_up();
    write_hosts(plan.hostname);
    if (plan.root_read_only && mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL) != 0)
        fail("mount", "cannot make the root filesystem read-only");
    umask(022);
    reached("ready");
    if (!wait_for_port()) fail("control", "there is no port named vmette.control");
    close(port_list);
    close(port_nodes);
    reached("port");
    struct utsname name;
    uname(&name);
    agent_serve(port, name.release, milestones, milestone_count);
    power_off();
}

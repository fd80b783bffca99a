#define _GNU_SOURCE
#include "share.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <linux/openat2.h>

#include "function.h"

enum {
    FUSE_MAJOR = 10, /* the device's number (Documentation/admin-guide/devices.txt) */
    FUSE_MINOR = 229,
    MAX_REQUEST = 32768, /* as the host has it (vmette/fuse.py) */
    LENGTH = 4,          /* every answer begins with its length (struct fuse_out_header of <linux/fuse.h>) … */
    SHORTEST = 16,       /* … and is at least that header */
    MAX_REPLY = 1 << 18
};

/* --- Where it is mounted -------------------------------------------------------------------------------------------- */

/* Opens a directory, but through no link to what a process holds open or has for its root. */
static int open_directory(const char *path) {
    struct open_how how = {.flags = O_PATH | O_DIRECTORY | O_CLOEXEC, .resolve = RESOLVE_NO_MAGICLINKS};
    return (int)syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof how);
}

int enter_directory(const char *path) {
    char part[MAX_PATH + 1];
    if (strlen(path) > MAX_PATH) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(part, path);
    if (chdir("/") != 0) return -1;
    for (char *end = part; end != NULL;) {
        char *name = end + 1;
        end = strchr(name, '/');
        if (end != NULL) *end = 0;
        int fd = open_directory(part);
        if (fd < 0 && errno == ENOENT && mkdir(name, 0755) == 0) fd = open_directory(part);
        if (fd < 0) return -1;
        int entered = fchdir(fd);
        close(fd);
        if (entered != 0) return -1;
        if (end != NULL) *end = '/';
    }
    return 0;
}

/* --- The device ----------------------------------------------------------------------------------------------------- */

/* The guest's root may have put something else there, on which one might wait for ever. */
static int open_device(void) {
    static const char path[] = "/dev/fuse";
    struct stat st;
    int fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) != 0) fail(path);
    if (!S_ISCHR(st.st_mode) || st.st_rdev != makedev(FUSE_MAJOR, FUSE_MINOR)) fail_because(ENODEV, path, strerror(ENODEV));
    return fd;
}

static void mount_share(int device, const char *target, bool read_only) {
    char options[128];
    if (*target != '/') fail_because(EINVAL, target, "it is no absolute path");
    if (enter_directory(target) != 0) fail(target);
    snprintf(options, sizeof options, "fd=%d,rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other", device);
    if (mount("vmette", ".", "fuse", MS_NODEV | (read_only ? MS_RDONLY : 0), options) != 0) fail(target);
}

/* --- Requests and answers ------------------------------------------------------------------------------------------- */

static unsigned char request[MAX_REQUEST], replies[MAX_REPLY];
static size_t request_used, request_sent, replies_used;

/* Takes a request from the kernel, if there is one. False: the file system is no more. */
static bool take_request(int device) {
    ssize_t n = read(device, request, sizeof request);
    /* ENOENT: whoever asked has gone meanwhile. */
    if (n < 0) return errno == EAGAIN || errno == EINTR || errno == ENOENT;
    request_sent = 0;
    request_used = (size_t)n;
    return n > 0;
}

/* False: nobody takes it any more. */
static bool send_request(void) {
    ssize_t n = write(STDOUT_FILENO, request + request_sent, request_used - request_sent);
    if (n < 0) return errno == EAGAIN || errno == EINTR;
    request_sent += (size_t)n;
    return true;
}

/* Takes what there is of answers; the kernel gets those that are whole. False: no more come. */
static bool take_replies(int device) {
    ssize_t n = read(STDIN_FILENO, replies + replies_used, sizeof replies - replies_used);
    if (n < 0) return errno == EAGAIN || errno == EINTR;
    replies_used += (size_t)n;
    size_t at = 0;
    while (replies_used - at >= LENGTH) {
        const size_t length = get32(replies + at);
        if (length < SHORTEST || length > sizeof replies) return false;
        if (length > replies_used - at) break;
        /* It fails if whoever asked has gone meanwhile, and if the file system is no more: which a read tells. */
        (void)!write(device, replies + at, length);
        at += length;
    }
    memmove(replies, replies + at, replies_used - at);
    replies_used -= at;
    return n > 0;
}

/* What keeps a file system that others use is spared when memory runs out. */
static void stay_alive(void) {
    int file = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (file < 0) return;
    (void)!write(file, "-1000", 5);
    close(file);
}

void serve_share(const char *target, bool read_only) {
    const int device = open_device();
    stay_alive();
    signal(SIGPIPE, SIG_IGN); /* it is to unmount */
    mount_share(device, target, read_only);
    /* Answers are taken whatever becomes of requests: were one to wait for the other, both sides could for ever. */
    fcntl(STDOUT_FILENO, F_SETFL, O_NONBLOCK);
    for (;;) {
        const bool sending = request_sent < request_used;
        struct pollfd fds[] = {{.fd = STDIN_FILENO, .events = POLLIN},
                               {.fd = sending ? STDOUT_FILENO : device, .events = sending ? POLLOUT : POLLIN}};
        if (poll(fds, 2, -1) < 0 && errno != EINTR) break;
        if (fds[0].revents != 0 && !take_replies(device)) break;
        if (fds[1].revents != 0 && !(sending ? send_request() : take_request(device))) break;
        if (!sending && request_sent < request_used && !send_request()) break;
    }
    close(device); /* first: the way there may lead through this very file system, which nobody answers for any more */
    umount2(target, MNT_DETACH | UMOUNT_NOFOLLOW);
}

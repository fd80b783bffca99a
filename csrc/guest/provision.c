#define _GNU_SOURCE
#include "provision.h"

#include <errno.h>
#include <fcntl.h>
#include <pwd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

#include <linux/magic.h>

#include "function.h"

/* --- Secrets -------------------------------------------------------------------------------------------------------- */

/* The number of a user of the image: see find_user of command.c, which does more. */
static uid_t user_number(const char *user) {
    uint32_t number;
    char name[256];
    const size_t length = strcspn(user, ":"); /* a group, which EXEC may have too, cannot read it */
    if (length >= sizeof name) fail_because(ENAMETOOLONG, "user", strerror(ENAMETOOLONG));
    memcpy(name, user, length);
    name[length] = 0;
    if (parse_number(name, UINT32_MAX - 1, &number)) return number;
    FILE *file = fopen("/etc/passwd", "re");
    struct passwd *entry = NULL;
    while (file != NULL && (entry = fgetpwent(file)) != NULL)
        if (strcmp(entry->pw_name, name) == 0) break;
    if (entry == NULL) fail_because(ENOENT, name, "there is no such user in /etc/passwd");
    return entry->pw_uid;
}

/* /run/secrets, which is in memory: where the image has no /run, that is not in a tmpfs already. */
static int open_secrets(void) {
    static const char path[] = "/run/secrets";
    const int flags = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
    struct statfs fs;
    if (mkdir("/run", 0755) != 0 && errno != EEXIST) fail("/run");
    if (mkdir(path, 0755) != 0 && errno != EEXIST) fail(path);
    int fd = open(path, flags);
    if (fd < 0 || fstatfs(fd, &fs) != 0) fail(path);
    if (fs.f_type != TMPFS_MAGIC) {
        if (mount("secrets", path, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0755") != 0) fail(path);
        close(fd);
        fd = open(path, flags);
    }
    if (fd < 0 || fchown(fd, 0, 0) != 0 || fchmod(fd, 0755) != 0) fail(path);
    return fd;
}

void give_secret(const char *name, const char *user) {
    if (*name == 0 || strchr(name, '/') != NULL || strcmp(name, ".") == 0 || strcmp(name, "..") == 0)
        fail_because(EINVAL, name, "it is not the name of a file");
    const uid_t uid = user_number(user);
    int directory = open_secrets();
    int fd = openat(directory, draft_begin(directory), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0400);
    if (fd < 0) fail(name);
    copy_stdin(fd, name);
    if (fchown(fd, uid, 0) != 0 || draft_publish(name) != 0) fail(name);
}

/* --- Certificates --------------------------------------------------------------------------------------------------- */

enum { MAX_PEM = 4 << 20, MAX_BUNDLE = 64 << 20 };

/* Where programs look: Debian, Alpine, Arch; Fedora and its kin, twice; openSUSE; Alpine. */
static const char *const bundles[] = {
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
};

/* Where what makes the bundles anew looks: Debian, Alpine; Fedora and its kin; openSUSE; Arch. */
static const char *const anchors[] = {
    "/usr/local/share/ca-certificates",
    "/etc/pki/ca-trust/source/anchors",
    "/etc/pki/trust/anchors",
    "/etc/ca-certificates/trust-source/anchors",
};

struct bytes {
    char *data;
    size_t size;
};

/* All that can be read, at most `most` bytes. */
static struct bytes read_all(int fd, size_t most, const char *what) {
    struct bytes b = {0};
    for (size_t room = 0;;) {
        if (b.size == room && (b.data = realloc(b.data, room += BUFFER)) == NULL) fail(what);
        ssize_t n = read_some(fd, b.data + b.size, room - b.size);
        if (n < 0) fail(what);
        if (n == 0) return b;
        b.size += (size_t)n;
        if (b.size > most) fail_because(EFBIG, what, "it is too large for certificates");
    }
}

/* The next certificate of `pem`, which loses all up to its end; false if there is none. */
static bool next_certificate(struct bytes *pem, struct bytes *certificate) {
    static const char begin[] = "-----BEGIN CERTIFICATE-----", end[] = "-----END CERTIFICATE-----";
    char *from = memmem(pem->data, pem->size, begin, strlen(begin));
    if (from == NULL) return false;
    char *limit = pem->data + pem->size, *to = memmem(from, (size_t)(limit - from), end, strlen(end));
    if (to == NULL) return false;
    to += strlen(end);
    *certificate = (struct bytes){from, (size_t)(to - from)};
    *pem = (struct bytes){to, (size_t)(limit - to)};
    return true;
}

/* Opens a bundle, if it is a regular file: nothing that would hold us up, and nothing is made at a link's end. */
static int open_bundle(const char *path) {
    struct stat st;
    if (stat(path, &st) != 0 || !S_ISREG(st.st_mode)) return -1; /* first: to open a device may do something */
    int fd = open(path, O_RDWR | O_APPEND | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) != 0) fail(path);
    if (S_ISREG(st.st_mode)) return fd;
    close(fd);
    return -1;
}

/* Adds those of the certificates that a bundle does not have. */
static void add_certificates(int fd, struct bytes pem, const char *path) {
    const struct bytes old = read_all(fd, MAX_BUNDLE, path);
    struct bytes more = {.data = malloc(2 * pem.size + 2)}, one;
    if (more.data == NULL) fail(path);
    if (old.size > 0 && old.data[old.size - 1] != '\n') more.data[more.size++] = '\n';
    const size_t nothing = more.size;
    while (next_certificate(&pem, &one)) {
        if (old.size > 0 && memmem(old.data, old.size, one.data, one.size) != NULL) continue;
        memcpy(more.data + more.size, one.data, one.size);
        more.size += one.size;
        more.data[more.size++] = '\n';
    }
    if (more.size > nothing && write_whole(fd, more.data, more.size) != 0) {
        int error = errno;
        (void)!ftruncate(fd, (off_t)old.size); /* half a certificate would spoil the others */
        errno = error;
        fail(path);
    }
    free(old.data);
    free(more.data);
}

static void make_bundle(struct bytes pem, const char *path) {
    static const char *const parents[] = {"/etc", "/etc/ssl", "/etc/ssl/certs"};
    for (size_t i = 0; i < sizeof parents / sizeof *parents; i++)
        if (mkdir(parents[i], 0755) != 0 && errno != EEXIST) fail(parents[i]);
    int fd = open(path, O_RDWR | O_APPEND | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
    if (fd < 0) fail(path);
    add_certificates(fd, pem, path);
    close(fd);
}

static void add_anchor(struct bytes pem, const char *path) {
    int directory = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (directory < 0) return; /* not such a distribution */
    int fd = openat(directory, draft_begin(directory), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
    if (fd < 0 || write_whole(fd, pem.data, pem.size) != 0 || draft_publish("vmette.crt") != 0) fail(path);
    close(fd);
    close(directory);
}

void trust_certificates(void) {
    struct bytes pem = read_all(STDIN_FILENO, MAX_PEM, "input"), rest = pem, one;
    bool any = false;
    if (!next_certificate(&rest, &one)) fail_because(EINVAL, "input", "there is no PEM certificate in it");
    for (size_t i = 0; i < sizeof bundles / sizeof *bundles; i++) {
        int fd = open_bundle(bundles[i]);
        if (fd < 0) continue;
        add_certificates(fd, pem, bundles[i]);
        close(fd);
        any = true;
    }
    if (!any) make_bundle(pem, bundles[0]);
    for (size_t i = 0; i < sizeof anchors / sizeof *anchors; i++) add_anchor(pem, anchors[i]);
}

/* --- The clock ------------------------------------------------------------------------------------------------------ */

void set_clock(uint64_t nanoseconds) {
    const struct timespec time = {.tv_sec = (time_t)(nanoseconds / 1000000000),
                                  .tv_nsec = (long)(nanoseconds % 1000000000)};
    if (clock_settime(CLOCK_REALTIME, &time) != 0) fail("clock");
}

/* The function `tar`: a tree becomes an archive, as a stream and in memory that does not grow with the tree. */
#define _GNU_SOURCE
#include "tar.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <sys/xattr.h>
#include <unistd.h>

#include <linux/limits.h>
#include <linux/magic.h>

#include "function.h"

enum {
    MAX_ATTRIBUTES = 16384, /* bytes of names and values, of one file: what the host's reader takes (archive.py) */
    EXTENDED = 2 * (MAX_PATH + 64) + 2 * MAX_ATTRIBUTES + 4096,
    MAX_LINKS = 1 << 16, /* files of several names that are remembered; a name of a further one is a file of its own */
    BUCKETS = 1 << 14
};

/* --- Headers -------------------------------------------------------------------------------------------------------- */

/* The pax records of the next entry. */
static char extended[EXTENDED];
static size_t extended_used;

/* A record is its own length in decimal, a space, key=value and a newline. */
static void extend(const char *key, const void *value, size_t size) {
    size_t rest = 1 + strlen(key) + 1 + size + 1, length = rest + 1;
    for (;;) {
        size_t digits = (size_t)snprintf(NULL, 0, "%zu", length);
        if (rest + digits == length) break;
        length = rest + digits;
    }
    char *at = extended + extended_used;
    if (length >= sizeof extended - extended_used) fail_because(E2BIG, key, strerror(E2BIG));
    at += sprintf(at, "%zu %s=", length, key);
    memcpy(at, value, size);
    at[size] = '\n';
    extended_used += length;
}

static void extend_number(const char *key, uint64_t value) {
    char text[24];
    extend(key, text, (size_t)snprintf(text, sizeof text, "%llu", (unsigned long long)value));
}

static void extend_time(const char *key, struct timespec time) {
    char text[40];
    long long seconds = time.tv_sec;
    long nanoseconds = time.tv_nsec;
    const bool minus = seconds < 0;
    if (minus) { /* -2 s and 0.75 s are -1.25 s */
        seconds = nanoseconds > 0 ? -(seconds + 1) : -seconds;
        nanoseconds = nanoseconds > 0 ? 1000000000 - nanoseconds : 0;
    }
    extend(key, text, (size_t)snprintf(text, sizeof text, "%s%lld.%09ld", minus ? "-" : "", seconds, nanoseconds));
}

/* Fills an octal field; returns whether the number is too large for it, which leaves it zero. */
static bool octal(char *field, size_t size, uint64_t value) {
    const bool large = value >> (3 * (size - 1)) != 0;
    if (large) value = 0;
    field[--size] = 0;
    for (; size > 0; value >>= 3) field[--size] = (char)('0' + (value & 7));
    return large;
}

/* Fills a text field; returns whether the text is too long for it, which leaves a part. */
static bool text(char *field, size_t size, const char *value) {
    size_t length = strlen(value);
    memcpy(field, value, length < size ? length : size);
    return length > size;
}

unsigned tar_checksum(const struct tar_header *header) {
    const unsigned char *bytes = (const unsigned char *)header;
    unsigned sum = sizeof header->checksum * ' ';
    for (size_t i = 0; i < sizeof *header; i++) sum += bytes[i];
    for (size_t i = 0; i < sizeof header->checksum; i++) sum -= (unsigned char)header->checksum[i];
    return sum;
}

static void pad(uint64_t size) {
    static const unsigned char zeros[BLOCK];
    put(zeros, (size_t)(-size % BLOCK));
}

/* Seals a header and writes it. */
static void end_header(struct tar_header *header, enum tar_type type) {
    header->type = (char)type;
    memcpy(header->magic, "ustar", 6);
    memcpy(header->version, "00", 2);
    octal(header->checksum, 7, tar_checksum(header));
    header->checksum[7] = ' ';
    put(header, sizeof *header);
}

static void put_extended(void) {
    struct tar_header header = {0};
    text(header.name, sizeof header.name, "././@PaxHeader"); /* where it would be, were it a file: as Python says it */
    octal(header.mode, sizeof header.mode, 0644);
    octal(header.uid, sizeof header.uid, 0);
    octal(header.gid, sizeof header.gid, 0);
    octal(header.mtime, sizeof header.mtime, 0);
    octal(header.size, sizeof header.size, extended_used);
    end_header(&header, TAR_EXTENDED);
    put(extended, extended_used);
    pad(extended_used);
    extended_used = 0;
}

/* Writes an entry, all but its data. A name that is too long for the header is bytes like any other in its record:
 * no reader that we know minds whether they are UTF-8, but some do not know hdrcharset=BINARY. */
static void put_entry(const char *name, enum tar_type type, const struct stat *st, uint64_t size, const char *target) {
    struct tar_header header = {0};
    const bool early = st->st_mtim.tv_sec < 0;
    if (text(header.name, sizeof header.name, name)) extend("path", name, strlen(name));
    if (text(header.target, sizeof header.target, target)) extend("linkpath", target, strlen(target));
    octal(header.mode, sizeof header.mode, st->st_mode & 07777);
    if (octal(header.uid, sizeof header.uid, st->st_uid)) extend_number("uid", st->st_uid);
    if (octal(header.gid, sizeof header.gid, st->st_gid)) extend_number("gid", st->st_gid);
    if (octal(header.size, sizeof header.size, size)) extend_number("size", size);
    if (octal(header.mtime, sizeof header.mtime, early ? 0 : (uint64_t)st->st_mtim.tv_sec) || early ||
        st->st_mtim.tv_nsec != 0)
        extend_time("mtime", st->st_mtim);
    const bool device = type == TAR_CHARACTER_DEVICE || type == TAR_BLOCK_DEVICE;
    octal(header.major, sizeof header.major, device ? major(st->st_rdev) : 0);
    octal(header.minor, sizeof header.minor, device ? minor(st->st_rdev) : 0);
    if (extended_used > 0) put_extended();
    end_header(&header, type);
}

/* --- Extended attributes -------------------------------------------------------------------------------------------- */

bool tar_keeps_attribute(const char *name) {
    return (strncmp(name, "user.", 5) == 0 && strncmp(name, "user.overlay.", 13) != 0) ||
           strcmp(name, "security.capability") == 0;
}

static void extend_attributes(int fd, const char *what) {
    static char names[XATTR_LIST_MAX], value[MAX_ATTRIBUTES + 1];
    ssize_t size = flistxattr(fd, names, sizeof names), total = 0;
    for (const char *name = names; name < names + size; name += strlen(name) + 1) { /* no file system has any: -1 */
        char key[sizeof TAR_ATTRIBUTE + MAX_NAME];
        if (!tar_keeps_attribute(name)) continue;
        ssize_t length = fgetxattr(fd, name, value, sizeof value);
        if (length < 0 && errno == ENODATA) continue; /* it has just gone */
        if (length < 0) fail(what);
        total += (ssize_t)strlen(name) + length;
        if (total > MAX_ATTRIBUTES) fail_because(E2BIG, what, "it has too many extended attributes");
        snprintf(key, sizeof key, TAR_ATTRIBUTE "%.*s", MAX_NAME, name);
        extend(key, value, (size_t)length);
    }
}

/* --- Hard links ----------------------------------------------------------------------------------------------------- */

struct link {
    struct link *next;
    dev_t device;
    ino_t inode;
    char name[];
};

static struct link *buckets[BUCKETS];
static unsigned link_count;

/* The name under which the archive has the file already, or NULL; then it is remembered under `name`. */
static const char *find_link(const struct stat *st, const char *name) {
    struct link **bucket = &buckets[(st->st_ino ^ st->st_dev * 31) % BUCKETS];
    for (struct link *l = *bucket; l != NULL; l = l->next)
        if (l->device == st->st_dev && l->inode == st->st_ino) return l->name;
    size_t size = strlen(name) + 1;
    struct link *l = link_count < MAX_LINKS ? malloc(sizeof *l + size) : NULL;
    if (l == NULL) return NULL;
    *l = (struct link){.next = *bucket, .device = st->st_dev, .inode = st->st_ino};
    memcpy(l->name, name, size);
    *bucket = l;
    link_count++;
    return NULL;
}

/* --- Entries -------------------------------------------------------------------------------------------------------- */

/* The file's bytes, as many as the header says: a file that has shrunk since is filled up with zeros. */
static void put_data(int fd, uint64_t size, const char *what) {
    for (uint64_t left = size; left > 0;) {
        size_t room;
        unsigned char *place = put_room(&room);
        if (room > left) room = (size_t)left;
        ssize_t n = read_some(fd, place, room);
        if (n < 0) fail(what);
        if (n == 0) memset(place, 0, room);
        if (n > 0) room = (size_t)n;
        put_placed(room);
        left -= room;
    }
    pad(size);
}

/* Opens what lstat has said is a regular file, or a directory. Something else that has taken its place since is not
 * waited for. Returns -1 if it is gone. */
static int open_entry(int parent, const char *base, int flags, mode_t type, struct stat *st, const char *what) {
    int fd = openat(parent, base, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC | flags);
    if (fd < 0 && errno == ENOENT) return -1;
    if (fd < 0 || fstat(fd, st) != 0) fail(what);
    if ((st->st_mode & S_IFMT) != type) fail_because(EAGAIN, what, "it became something else");
    return fd;
}

static void put_other(int parent, const char *base, const struct stat *st, const char *name) {
    char target[MAX_PATH + 1] = "";
    enum tar_type type = S_ISFIFO(st->st_mode)  ? TAR_FIFO
                         : S_ISCHR(st->st_mode) ? TAR_CHARACTER_DEVICE
                         : S_ISBLK(st->st_mode) ? TAR_BLOCK_DEVICE
                                                : TAR_SYMLINK;
    if (type == TAR_SYMLINK) {
        ssize_t n = readlinkat(parent, base, target, sizeof target - 1);
        if (n < 0 && errno == ENOENT) return;
        if (n < 0) fail(name);
        target[n] = 0;
    }
    put_entry(name, type, st, 0, target);
}

/* Writes an entry that is no directory. With `flags` O_NOFOLLOW, not what a link leads to either. */
static void put_nondirectory(int parent, const char *base, int flags, struct stat *st, const char *name) {
    int fd = -1;
    if (S_ISSOCK(st->st_mode)) return; /* no archive can hold one */
    if (S_ISREG(st->st_mode) && (fd = open_entry(parent, base, flags, S_IFREG, st, name)) < 0) return;
    const char *first = fd >= 0 && st->st_nlink > 1 ? find_link(st, name) : NULL;
    if (first != NULL) {
        put_entry(name, TAR_HARD_LINK, st, 0, first);
    } else if (fd < 0) {
        put_other(parent, base, st, name);
    } else {
        extend_attributes(fd, name);
        put_entry(name, TAR_FILE, st, (uint64_t)st->st_size, "");
        put_data(fd, (uint64_t)st->st_size, name);
    }
    if (fd >= 0) close(fd);
}

/* --- The walk ------------------------------------------------------------------------------------------------------- */

struct level {
    DIR *list;
    dev_t device;
    size_t length; /* of the directory's name */
};

/* Whether a directory is where the kernel's own files begin: they are no data, some block for ever, some have no end. */
static bool is_kernels(int fd) {
    struct statfs fs;
    if (fstatfs(fd, &fs) != 0) return false;
    switch ((unsigned long)fs.f_type) {
    case PROC_SUPER_MAGIC:
    case SYSFS_MAGIC:
    case CGROUP_SUPER_MAGIC:
    case CGROUP2_SUPER_MAGIC:
    case DEVPTS_SUPER_MAGIC:
    case DEBUGFS_MAGIC:
    case TRACEFS_MAGIC:
    case SECURITYFS_MAGIC:
    case BPF_FS_MAGIC:
        return true;
    default:
        return false;
    }
}

/* Writes the directory itself and opens its list. */
static struct level enter(int fd, const struct stat *st, const char *name, size_t length) {
    extend_attributes(fd, name);
    put_entry(name, TAR_DIRECTORY, st, 0, "");
    DIR *list = fdopendir(fd);
    if (list == NULL) fail(name);
    return (struct level){.list = list, .device = st->st_dev, .length = length};
}

static void put_tree(int fd, const struct stat *top) {
    static struct level levels[MAX_LEVELS + 1]; /* no more than a name has components, and the top */
    static char name[MAX_PATH + 1];
    int depth = 0;
    levels[0] = enter(fd, top, ".", 0);
    while (depth >= 0) {
        const struct level *at = &levels[depth];
        struct stat st;
        errno = 0;
        const struct dirent *entry = readdir(at->list);
        if (entry == NULL) {
            name[at->length] = 0;
            if (errno != 0 && errno != ENOENT) fail(depth > 0 ? name : "."); /* ENOENT: it has been removed */
            closedir(at->list);
            depth--;
            continue;
        }
        const char *base = entry->d_name;
        if (strcmp(base, ".") == 0 || strcmp(base, "..") == 0) continue;
        size_t length = at->length + (at->length > 0) + strlen(base);
        if (at->length > 0) name[at->length] = '/';
        if (length > MAX_PATH) fail_because(ENAMETOOLONG, base, strerror(ENAMETOOLONG));
        strcpy(name + length - strlen(base), base);
        const int parent = dirfd(at->list);
        if (fstatat(parent, base, &st, AT_SYMLINK_NOFOLLOW) != 0) {
            if (errno != ENOENT) fail(name);
        } else if (!S_ISDIR(st.st_mode)) {
            put_nondirectory(parent, base, O_NOFOLLOW, &st, name);
        } else if ((fd = open_entry(parent, base, O_DIRECTORY | O_NOFOLLOW, S_IFDIR, &st, name)) >= 0) {
            const bool foreign = st.st_dev != at->device && is_kernels(fd);
            levels[++depth] = enter(fd, &st, name, length);
            if (foreign) closedir(levels[depth--].list);
        }
    }
}

void tar(const char *path) {
    static const unsigned char end[2 * BLOCK];
    struct stat st;
    allow_open_files();
    if (stat(path, &st) != 0) fail(path);
    if (S_ISDIR(st.st_mode)) {
        int fd = open_entry(AT_FDCWD, path, O_DIRECTORY, S_IFDIR, &st, path);
        if (fd < 0) fail(path);
        put_tree(fd, &st);
    } else {
        const char *slash = strrchr(path, '/');
        put_nondirectory(AT_FDCWD, path, 0, &st, slash != NULL ? slash + 1 : path);
    }
    put(end, sizeof end);
    put_flush();
}

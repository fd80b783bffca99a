/* The function `untar`: an archive becomes a tree. What it holds in memory does not grow with either.
 *
 * Neither the archive nor the tree is trusted. Names lead down from the directory and nowhere else, no link is followed,
 * and nothing that is there is written to: it is replaced.
 */
#define _GNU_SOURCE
#include "tar.h"

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/xattr.h>
#include <unistd.h>

#include "beneath.h"
#include "function.h"

enum { MAX_EXTENDED = 1 << 20 }; /* bytes of the pax records of one entry */

struct entry {
    char name[MAX_PATH + 1]; /* clean: relative, no `.`, `..` or empty component; empty is the directory itself */
    char target[MAX_PATH + 1];
    enum tar_type type;
    mode_t mode;
    uid_t uid;
    gid_t gid;
    struct timespec mtime;
    uint64_t size;
    unsigned major, minor;
};

static int root;
static bool with_owners;

/* --- The archive as a stream ---------------------------------------------------------------------------------------- */

static unsigned char input[BUFFER];
static size_t input_head, input_tail;

static _Noreturn void damaged(const char *what, const char *why) { fail_because(EBADMSG, what, why); }

/* Has at least `size` bytes in the buffer; returns false where the stream ends before. */
static bool fill(size_t size) {
    if (input_tail - input_head >= size) return true;
    memmove(input, input + input_head, input_tail - input_head);
    input_tail -= input_head;
    input_head = 0;
    while (input_tail < size) {
        ssize_t n = read_some(STDIN_FILENO, input + input_tail, sizeof input - input_tail);
        if (n < 0) fail("input");
        if (n == 0) return false;
        input_tail += (size_t)n;
    }
    return true;
}

/* Some bytes of an entry, at least one and at most `most`. */
static const unsigned char *take(uint64_t most, size_t *size, const char *what) {
    if (!fill(1)) damaged(what, "the archive ends within it");
    const unsigned char *bytes = input + input_head;
    *size = input_tail - input_head;
    if (*size > most) *size = (size_t)most;
    input_head += *size;
    return bytes;
}

static void skip(uint64_t left, const char *what) {
    for (size_t size; left > 0; left -= size) take(left, &size, what);
}

/* What is behind an entry's bytes. */
static uint64_t padding(uint64_t size) { return -size % BLOCK; }

/* --- Headers -------------------------------------------------------------------------------------------------------- */

/* A number in octal, or of GNU's in binary with the highest bit set (and the next one where it is negative). */
static int64_t number(const char *field, size_t size) {
    const unsigned char *p = (const unsigned char *)field, *end = p + size;
    uint64_t value = 0;
    if (*p & 0x80) {
        const unsigned char sign = *p & 0x40 ? 0xff : 0;
        value = sign ? UINT64_MAX : 0;
        for (unsigned char byte = (unsigned char)(sign ? *p : *p & 0x7f);; byte = *p) {
            if ((value >> 55) != (sign ? 0x1ff : 0)) damaged("header", "a number is too large");
            value = value << 8 | byte;
            if (++p == end) break;
        }
        return (int64_t)value;
    }
    while (p < end && *p == ' ') p++;
    for (; p < end && *p >= '0' && *p <= '7'; p++) value = value << 3 | (uint64_t)(*p - '0'); /* at most 36 bits */
    if (p < end && *p != ' ' && *p != 0) damaged("header", "a number is not octal");
    return (int64_t)value;
}

#define NUMBER(field) number(field, sizeof(field))

/* Copies what a field holds before its NUL, if it has one, to the end of `text`. */
static void append(char *text, const char *field, size_t size) {
    size_t used = strlen(text), length = strnlen(field, size);
    memcpy(text + used, field, length);
    text[used + length] = 0;
}

/* Whether the sum is right: of bytes without a sign, or, as some have computed it, with one. */
static bool is_sound(const struct tar_header *header) {
    const int64_t expected = NUMBER(header->checksum);
    const signed char *bytes = (const signed char *)header;
    int64_t with_sign = sizeof header->checksum * ' ';
    for (size_t i = 0; i < sizeof *header; i++)
        if (i < offsetof(struct tar_header, checksum) || i >= offsetof(struct tar_header, type)) with_sign += bytes[i];
    return expected == tar_checksum(header) || expected == with_sign;
}

/* The next header; false at the archive's end, which is a block of zeros. */
static bool next_header(struct tar_header *header) {
    static const struct tar_header zeros;
    if (!fill(BLOCK)) damaged(NULL, input_tail == input_head ? "the archive ends without its mark" : "a header is cut");
    memcpy(header, input + input_head, BLOCK);
    input_head += BLOCK;
    if (memcmp(header, &zeros, BLOCK) == 0) return false;
    if (!is_sound(header)) damaged(NULL, "there is something else where a header should be");
    return true;
}

/* --- What headers say ----------------------------------------------------------------------------------------------- */

/* The pax records of the present entry. */
static char extended[MAX_EXTENDED + 1];
static size_t extended_used;

static uint64_t size_of(const struct tar_header *header) {
    int64_t size = NUMBER(header->size);
    if (size < 0) damaged("header", "a size is negative");
    return (uint64_t)size;
}

/* Reads the data of an entry that is really a part of the next one's header. */
static size_t read_extension(const struct tar_header *header, char *data, size_t room) {
    const uint64_t size = size_of(header);
    if (size > room) damaged("header", "it is too long");
    for (size_t used = 0, n; used < size; used += n) {
        const unsigned char *bytes = take(size - used, &n, "header");
        memcpy(data + used, bytes, n);
    }
    skip(padding(size), "header");
    return (size_t)size;
}

static void read_long(const struct tar_header *header, char *text) {
    size_t size = read_extension(header, text, MAX_PATH + 1); /* with a NUL at its end */
    if (strnlen(text, size) > MAX_PATH) fail_because(ENAMETOOLONG, "header", strerror(ENAMETOOLONG));
    text[strnlen(text, size)] = 0;
}

struct pax_record {
    const char *key, *value; /* the key ends with a NUL, the value after `size` bytes with another one */
    size_t size;
};

/* Walks the records, `at` being where the next one is; false at their end. They are checked and cut up by that. */
static bool next_record(size_t *at, struct pax_record *record) {
    static const char malformed[] = "a pax record is malformed";
    size_t length = 0, digits = 0;
    char *p = extended + *at;
    const size_t left = extended_used - *at;
    if (left == 0) return false;
    while (digits < left && digits < 8 && p[digits] >= '0' && p[digits] <= '9')
        length = length * 10 + (size_t)(p[digits++] - '0');
    if (digits == 0 || length > left || length < digits + 3 || p[digits] != ' ') damaged("header", malformed);
    char *key = p + digits + 1, *last = p + length - 1, *equals;
    equals = memchr(key, '=', (size_t)(last - key));
    if (equals == NULL || equals == key || *last != '\n') damaged("header", malformed);
    *record = (struct pax_record){.key = key, .value = equals + 1, .size = (size_t)(last - equals - 1)};
    *equals = *last = 0;
    *at += length;
    return true;
}

/* After next_record has cut up the records, they are put together again for the next walk. */
static void mend(const struct pax_record *record) {
    char *value = extended + (record->value - extended);
    value[-1] = '=';
    value[record->size] = '\n';
}

static int64_t decimal(const char **text) {
    const bool minus = **text == '-';
    int64_t value = 0;
    const char *p = *text + minus, *start = p;
    for (; *p >= '0' && *p <= '9'; p++)
        if (__builtin_mul_overflow(value, 10, &value) || __builtin_add_overflow(value, *p - '0', &value))
            damaged("header", "a number is too large");
    if (p == start) damaged("header", "a number is not decimal");
    *text = p;
    return minus ? -value : value;
}

static int64_t whole(const char *text) {
    int64_t value = decimal(&text);
    if (*text != 0) damaged("header", "a number is not decimal");
    return value;
}

/* Reads a time, or leaves it as it is: Python writes those of 1970's first instant like 1e-09. */
static void read_time(const char *text, struct timespec *time) {
    const bool minus = *text == '-';
    int64_t seconds = decimal(&text), nanoseconds = 0;
    if (*text == '.') {
        text++;
        for (int64_t unit = 100000000; *text >= '0' && *text <= '9'; text++, unit /= 10)
            nanoseconds += unit * (*text - '0');
    }
    if (*text != 0) return;
    if (minus && nanoseconds > 0) { /* -1.25 s are -2 s and 0.75 s */
        if (__builtin_sub_overflow(seconds, 1, &seconds)) damaged("header", "a number is too large");
        nanoseconds = 1000000000 - nanoseconds;
    }
    *time = (struct timespec){.tv_sec = seconds, .tv_nsec = nanoseconds};
}

static void copy_text(char *text, const struct pax_record *record) {
    if (memchr(record->value, 0, record->size) != NULL) damaged("header", "a name has a NUL in it");
    if (record->size > MAX_PATH) fail_because(ENAMETOOLONG, "header", strerror(ENAMETOOLONG));
    memcpy(text, record->value, record->size + 1);
}

static uint32_t owner(int64_t number, const char *what) {
    if (number < 0 || number >= UINT32_MAX) damaged(what, "it has an owner that Linux does not take");
    return (uint32_t)number;
}

/* Takes what the pax records say instead of the header. */
static void read_records(struct entry *e, int64_t *size, int64_t *uid, int64_t *gid) {
    struct pax_record r;
    for (size_t at = 0; next_record(&at, &r); mend(&r)) {
        if (strncmp(r.key, "GNU.sparse.", 11) == 0) fail_because(EOPNOTSUPP, e->name, "it is a sparse file of GNU's");
        if (r.size == 0) continue; /* it stands for the header's own */
        if (strcmp(r.key, "path") == 0) copy_text(e->name, &r);
        if (strcmp(r.key, "linkpath") == 0) copy_text(e->target, &r);
        if (strcmp(r.key, "size") == 0) *size = whole(r.value);
        if (strcmp(r.key, "uid") == 0) *uid = whole(r.value);
        if (strcmp(r.key, "gid") == 0) *gid = whole(r.value);
        if (strcmp(r.key, "mtime") == 0) read_time(r.value, &e->mtime);
    }
}

/* Makes a name clean, in place. One that leads elsewhere is refused. */
static void clean(char *name) {
    char *to = name;
    if (*name == '/') fail_because(EINVAL, name, "the archive has an absolute name");
    for (const char *from = name; *from != 0;) {
        size_t length = strcspn(from, "/");
        if (length == 2 && memcmp(from, "..", 2) == 0) fail_because(EINVAL, from, "the archive has a name with ..");
        if (length > 0 && !(length == 1 && *from == '.')) {
            if (to > name) *to++ = '/';
            memmove(to, from, length);
            to += length;
        }
        from += length;
        from += strspn(from, "/");
    }
    *to = 0;
}

static void read_fields(struct entry *e, const struct tar_header *h, bool long_name, bool long_target) {
    int64_t uid = NUMBER(h->uid), gid = NUMBER(h->gid), size = NUMBER(h->size);
    if (!long_name) {
        *e->name = 0;
        if (memcmp(h->magic, "ustar", sizeof h->magic) == 0 && *h->prefix != 0) {
            append(e->name, h->prefix, sizeof h->prefix);
            append(e->name, "/", 1);
        }
        append(e->name, h->name, sizeof h->name);
    }
    if (!long_target) {
        *e->target = 0;
        append(e->target, h->target, sizeof h->target);
    }
    e->mtime = (struct timespec){.tv_sec = NUMBER(h->mtime)};
    read_records(e, &size, &uid, &gid);
    e->type = h->type != 0 ? (unsigned char)h->type : TAR_FILE;
    if (h->type == 0 && *e->name != 0 && e->name[strlen(e->name) - 1] == '/') e->type = TAR_DIRECTORY; /* before POSIX */
    if (e->type == TAR_CONTIGUOUS_FILE) e->type = TAR_FILE;
    e->mode = (mode_t)(NUMBER(h->mode) & 07777);
    e->uid = owner(uid, e->name);
    e->gid = owner(gid, e->name);
    if (size < 0 || size > INT64_MAX - BLOCK) damaged(e->name, "it has a size that no file has");
    e->size = e->type == TAR_FILE ? (uint64_t)size : 0; /* nothing else has data, whatever it says */
    if (e->type == TAR_CHARACTER_DEVICE || e->type == TAR_BLOCK_DEVICE) {
        int64_t major = NUMBER(h->major), minor = NUMBER(h->minor);
        if (major < 0 || major >= 1 << 12 || minor < 0 || minor >= 1 << 20)
            damaged(e->name, "it has a device number that Linux does not take");
        e->major = (unsigned)major;
        e->minor = (unsigned)minor;
    }
    clean(e->name);
    if (e->type == TAR_HARD_LINK) clean(e->target);
}

/* The next entry, up to its data; false at the archive's end. */
static bool next_entry(struct entry *e) {
    struct tar_header header;
    bool long_name = false, long_target = false;
    extended_used = 0;
    for (;;) {
        if (!next_header(&header)) {
            if (long_name || long_target || extended_used > 0) damaged(NULL, "the archive ends within a header");
            return false;
        }
        switch (header.type) {
        case TAR_LONG_NAME:
            read_long(&header, e->name);
            long_name = true;
            break;
        case TAR_LONG_TARGET:
            read_long(&header, e->target);
            long_target = true;
            break;
        case TAR_EXTENDED:
        case TAR_EXTENDED_SUN:
            extended_used = read_extension(&header, extended, MAX_EXTENDED);
            break;
        case TAR_EXTENDED_ALL: /* comments: nobody gives all files one name, size or time */
            skip(size_of(&header), "header");
            skip(padding(size_of(&header)), "header");
            break;
        default:
            read_fields(e, &header, long_name, long_target);
            return true;
        }
    }
}

/* --- Places --------------------------------------------------------------------------------------------------------- */

static _Noreturn void fail_place(const char *name) {
    if (errno == ELOOP) fail_because(ELOOP, name, "a symbolic link is in its way");
    fail(name);
}

/* The directory that holds `name`, and the name's last part. It stays open for the next one. */
static int parent_of(const char *name, const char **base, bool make) {
    static struct {
        char path[MAX_PATH + 1];
        int fd;
    } last = {.fd = -1};
    const char *slash = strrchr(name, '/');
    const size_t length = slash != NULL ? (size_t)(slash - name) : 0;
    *base = slash != NULL ? slash + 1 : name;
    if (last.fd >= 0 && strncmp(last.path, name, length) == 0 && last.path[length] == 0) return last.fd;
    if (last.fd >= 0) close(last.fd);
    memcpy(last.path, name, length);
    last.path[length] = 0;
    last.fd = open_beneath(root, last.path, O_PATH, make);
    if (last.fd < 0) fail_place(name);
    return last.fd;
}

/* --- Directories ---------------------------------------------------------------------------------------------------- */

/* Directories whose contents are being unpacked, each in the one before it: they get their modes, owners and times
 * when an entry comes that is not in them. If one in them comes even later, the time is its own. */
static struct {
    char path[MAX_PATH + 1]; /* of the innermost; the paths of the others are its beginnings */
    int count;
    struct {
        size_t length;
        mode_t mode;
        uid_t uid;
        gid_t gid;
        struct timespec mtime;
    } list[MAX_LEVELS + 1];
} open_directories;

static void set_times(int fd, const char *name, struct timespec mtime, const char *what) {
    const struct timespec times[2] = {{.tv_nsec = UTIME_NOW}, mtime};
    if ((name != NULL ? utimensat(fd, name, times, AT_SYMLINK_NOFOLLOW) : futimens(fd, times)) != 0) fail(what);
}

static void finish_innermost(void) {
    const int i = --open_directories.count;
    char *path = open_directories.path;
    path[open_directories.list[i].length] = 0;
    const char *what = *path != 0 ? path : ".";
    int fd = open_beneath(root, path, O_RDONLY, false);
    if (fd < 0) fail_place(what);
    if (with_owners && fchown(fd, open_directories.list[i].uid, open_directories.list[i].gid) != 0) fail(what);
    if (fchmod(fd, open_directories.list[i].mode) != 0) fail(what);
    set_times(fd, NULL, open_directories.list[i].mtime, what);
    close(fd);
}

/* Finishes all but those that `name` is in. */
static void finish_others(const char *name) {
    while (open_directories.count > 0) {
        const size_t length = open_directories.list[open_directories.count - 1].length;
        const bool within = strncmp(open_directories.path, name, length) == 0 && (length == 0 || name[length] == '/');
        if (within && *name != 0) return;
        finish_innermost();
    }
}

/* --- Entries -------------------------------------------------------------------------------------------------------- */

static void set_attributes(int fd, const char *what) {
    struct pax_record r;
    for (size_t at = 0; next_record(&at, &r); mend(&r)) {
        const char *name = r.key + strlen(TAR_ATTRIBUTE);
        if (strncmp(r.key, TAR_ATTRIBUTE, strlen(TAR_ATTRIBUTE)) != 0 || !tar_keeps_attribute(name)) continue;
        if (!with_owners && strncmp(name, "user.", 5) != 0) continue; /* capabilities are no user's to give */
        if (fsetxattr(fd, name, r.value, r.size, 0) != 0 && errno != EOPNOTSUPP) fail(what);
    }
}

static void make_directory(const struct entry *e) {
    const char *base = ".", *what = *e->name != 0 ? e->name : ".";
    int parent = *e->name != 0 ? parent_of(e->name, &base, true) : root;
    struct stat st;
    bool made = *e->name != 0 && mkdirat(parent, base, 0700) == 0;
    if (!made && *e->name != 0 && errno != EEXIST) fail(what);
    int fd = openat(parent, base, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) fail(what);
    /* So that its contents can be made. This matters to those who are not root, and works for their own directories. */
    if (!made && fstat(fd, &st) == 0 && (st.st_mode & 0700) != 0700) (void)!fchmod(fd, (st.st_mode & 07777) | 0700);
    set_attributes(fd, what);
    close(fd);
    const int i = open_directories.count++; /* no more than the path has components, and the directory itself */
    strcpy(open_directories.path, e->name);
    open_directories.list[i].length = strlen(e->name);
    open_directories.list[i].mode = e->mode;
    open_directories.list[i].uid = e->uid;
    open_directories.list[i].gid = e->gid;
    open_directories.list[i].mtime = e->mtime;
}

/* Gives a new entry that is not to be opened its owner and time. */
static void dress(int parent, const char *name, const struct entry *e) {
    if (with_owners && fchownat(parent, name, e->uid, e->gid, AT_SYMLINK_NOFOLLOW) != 0) fail(e->name);
    set_times(parent, name, e->mtime, e->name);
}

static void make_file(int parent, const struct entry *e) {
    int fd = openat(parent, draft_begin(parent), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0) fail(e->name);
    size_t size;
    for (uint64_t left = e->size; left > 0; left -= size) {
        const unsigned char *bytes = take(left, &size, e->name);
        if (write_whole(fd, bytes, size) != 0) fail(e->name);
    }
    skip(padding(e->size), e->name);
    if (with_owners && fchown(fd, e->uid, e->gid) != 0) fail(e->name);
    set_attributes(fd, e->name); /* after fchown, which takes capabilities away */
    if (fchmod(fd, e->mode) != 0) fail(e->name); /* and the setuid bit */
    set_times(fd, NULL, e->mtime, e->name);
    close(fd);
}

static void make_hard_link(int parent, const struct entry *e) {
    const char *base;
    if (*e->target == 0) damaged(e->name, "it is a hard link to no file");
    /* Opened anew: parent_of would close `parent`. */
    char directory[MAX_PATH + 1];
    strcpy(directory, e->target);
    char *slash = strrchr(directory, '/');
    base = slash != NULL ? slash + 1 : directory;
    if (slash != NULL) *slash = 0;
    int fd = open_beneath(root, slash != NULL ? directory : "", O_PATH, false);
    if (fd < 0) fail_place(e->target);
    if (linkat(fd, base, parent, draft_begin(parent), 0) != 0) fail(e->target);
    close(fd);
}

static void make_symlink(int parent, const struct entry *e) {
    if (*e->target == 0) damaged(e->name, "it is a symbolic link to nowhere");
    const char *name = draft_begin(parent);
    if (symlinkat(e->target, parent, name) != 0) fail(e->name);
    dress(parent, name, e);
}

static void make_node(int parent, const struct entry *e) {
    const mode_t type = e->type == TAR_FIFO ? S_IFIFO : e->type == TAR_BLOCK_DEVICE ? S_IFBLK : S_IFCHR;
    if (type != S_IFIFO && !with_owners) fail_because(EPERM, e->name, "it is a device, which needs `owners`");
    const char *name = draft_begin(parent);
    if (mknodat(parent, name, type | e->mode, makedev(e->major, e->minor)) != 0) fail(e->name);
    dress(parent, name, e);
}

static void make_entry(const struct entry *e) {
    const char *base;
    finish_others(e->name);
    if (e->type == TAR_DIRECTORY) {
        make_directory(e);
        return;
    }
    if (*e->name == 0) damaged(".", "it is no directory");
    const int parent = parent_of(e->name, &base, true);
    switch (e->type) {
    case TAR_FILE:
        make_file(parent, e);
        break;
    case TAR_HARD_LINK:
        make_hard_link(parent, e);
        break;
    case TAR_SYMLINK:
        make_symlink(parent, e);
        break;
    case TAR_FIFO:
    case TAR_CHARACTER_DEVICE:
    case TAR_BLOCK_DEVICE:
        make_node(parent, e);
        break;
    default:
        fail_because(EOPNOTSUPP, e->name, "it is of a type that is not known");
    }
    if (draft_publish(base) != 0) fail(e->name);
}

void untar(const char *directory, bool owners) {
    static struct entry e;
    with_owners = owners;
    fcntl(STDIN_FILENO, F_SETPIPE_SZ, BUFFER); /* fewer wake-ups; no matter if it is refused, or no pipe */
    if (mkdir(directory, 0755) != 0 && errno != EEXIST) fail(directory);
    root = open(directory, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (root < 0) fail(directory);
    while (next_entry(&e)) make_entry(&e);
    while (open_directories.count > 0) finish_innermost();
    size_t size;
    while (fill(1)) take(sizeof input, &size, NULL); /* the writer is heard out: it fills up its last record */
}

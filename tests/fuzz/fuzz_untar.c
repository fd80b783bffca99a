/* The function `untar` (csrc/guest/untar.c) and an archive of anything, in a tree of anything.
 *
 * There is no file system below it: the linker sends its calls here (-Wl,--wrap=...), where each succeeds or fails as
 * the input chooses. What is asked for is looked at: no call may name a place that could be outside the tree. Checksums
 * are always right, or hardly any input would come further.
 */
#define _GNU_SOURCE
#include "untar.c" /* a function ends with its process, and leaves its state: for the next run that is reset here */

#include <setjmp.h>
#include <stdarg.h>

#include <linux/openat2.h>

#include "script.h"

static const char target[] = "target";
static bool running, resetting, owned;
static jmp_buf end_of_process;

/* --- Descriptors -------------------------------------------------------------------------------------------------- */

enum file { CLOSED, PLACE, DIRECTORY, REGULAR };
enum { FIRST = 1 << 20, MAX_FILES = 1 << 16, MAX_OPEN = 8 };

static enum file files[MAX_FILES]; /* a number is not given twice */
static int file_count, open_count;

static int new_file(enum file file) {
    if (file_count == MAX_FILES) {
        errno = EMFILE;
        return -1;
    }
    if (++open_count > MAX_OPEN) complain("descriptors are left open");
    files[file_count] = file;
    return FIRST + file_count++;
}

static enum file file_of(int fd) {
    if (fd < FIRST || fd >= FIRST + file_count || files[fd - FIRST] == CLOSED)
        complain("a descriptor is used that is not open");
    return files[fd - FIRST];
}

static void is_place(int fd) {
    if (file_of(fd) == REGULAR) complain("a file is taken for a directory");
}

/* What is below a directory and directly in it, whatever the tree holds. */
static void is_name(const char *name) {
    if (*name == 0 || strchr(name, '/') != NULL || strcmp(name, "..") == 0)
        complain("a name leads out of its directory");
}

static void is_entry(int directory, const char *name) {
    is_place(directory);
    is_name(name);
    if (strcmp(name, ".") == 0) complain("a directory is taken for its own entry");
}

WRAP(int, close, int fd) {
    if (!running) return __real_close(fd);
    if (resetting) return 0; /* of what the last run had */
    (void)file_of(fd);
    files[fd - FIRST] = CLOSED;
    open_count--;
    return 0;
}

/* --- Opening ------------------------------------------------------------------------------------------------------ */

int __real_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...);
int __wrap_open(const char *path, int flags, ...) {
    va_list list;
    va_start(list, flags);
    const mode_t mode = flags & O_CREAT ? (mode_t)va_arg(list, int) : 0;
    va_end(list);
    if (!running) return __real_open(path, flags, mode);
    if (strcmp(path, target) != 0) complain("another path than the directory's is opened");
    return new_file(PLACE);
}

int __wrap_openat(int directory, const char *path, int flags, ...);
int __wrap_openat(int directory, const char *path, int flags, ...) {
    is_place(directory);
    is_name(path);
    if (!(flags & O_NOFOLLOW) && strcmp(path, ".") != 0) complain("a link may be followed");
    if (!(flags & O_DIRECTORY) && !((flags & O_CREAT) && (flags & O_EXCL))) complain("a file that is there is opened");
    if (REFUSE(0, ENOENT, ENOTDIR, ELOOP, EACCES, EEXIST) != 0) return -1;
    return new_file(!(flags & O_DIRECTORY) ? REGULAR : flags & O_PATH ? PLACE : DIRECTORY);
}

static int open_at(int directory, const char *path, const struct open_how *how) {
    const uint64_t needed = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS;
    if (directory != root || (how->resolve & needed) != needed) complain("a path may lead anywhere");
    if (*path == 0 || *path == '/' || strstr(path, "//") != NULL) complain("a path is not clean");
    for (const char *p = path; p != NULL; p = strchr(p, '/') != NULL ? strchr(p, '/') + 1 : NULL)
        if (strncmp(p, "..", 2) == 0 && (p[2] == 0 || p[2] == '/')) complain("a path has ..");
    if (REFUSE(0, ENOSYS, ENOENT, ELOOP, EXDEV, ENAMETOOLONG) != 0) return -1;
    return new_file(how->flags & O_PATH ? PLACE : DIRECTORY);
}

#include "openat2.h"

/* --- Making ------------------------------------------------------------------------------------------------------- */

WRAP(int, mkdir, const char *path, mode_t mode) {
    if (!running) return __real_mkdir(path, mode);
    if (strcmp(path, target) != 0) complain("another directory than the target is made");
    return REFUSE(0, EEXIST);
}

WRAP(int, mkdirat, int directory, const char *path, mode_t mode) {
    (void)mode;
    is_entry(directory, path);
    return REFUSE(0, EEXIST, ENOSPC);
}

WRAP(int, linkat, int from_directory, const char *from, int directory, const char *name, int flags) {
    is_entry(from_directory, from);
    is_entry(directory, name);
    if (flags != 0) complain("a link may be followed");
    planted(strlen(from) > 8);
    return REFUSE(0, EPERM, ENOENT);
}

WRAP(int, symlinkat, const char *to, int directory, const char *name) {
    if (*to == 0) complain("a symbolic link to nowhere");
    is_entry(directory, name);
    return REFUSE(0, ENOSPC);
}

WRAP(int, mknodat, int directory, const char *name, mode_t mode, dev_t device) {
    (void)device;
    is_entry(directory, name);
    if (!owned && !S_ISFIFO(mode)) complain("a device is made without `owners`");
    return REFUSE(0, EPERM);
}

WRAP(int, renameat, int from_directory, const char *from, int directory, const char *name) {
    is_entry(from_directory, from);
    is_entry(directory, name);
    return REFUSE(0, EISDIR, ENOTEMPTY);
}

WRAP(int, unlinkat, int directory, const char *path, int flags) {
    is_entry(directory, path);
    if (flags != 0 || strncmp(path, ".vmette-", 8) != 0) complain("something else than a draft is removed");
    return REFUSE(0, ENOENT);
}

/* --- Attributes --------------------------------------------------------------------------------------------------- */

static void is_mode(mode_t mode) {
    if (mode & ~(mode_t)07777) complain("a mode that is none");
}

static void is_owner(uid_t uid, gid_t gid) {
    if (!owned || uid == (uid_t)-1 || gid == (gid_t)-1) complain("an owner that is not to be given");
}

static void are_times(const struct timespec times[2]) {
    if (times[1].tv_nsec < 0 || times[1].tv_nsec > 999999999) complain("a time that is none");
}

WRAP(int, fstat, int fd, struct stat *st) {
    if (!running) return __real_fstat(fd, st);
    (void)file_of(fd);
    memset(st, 0, sizeof *st);
    st->st_mode = (mode_t)choose();
    return REFUSE(0, EIO);
}

WRAP(int, fstatat, int directory, const char *path, struct stat *st, int flags) {
    is_entry(directory, path);
    if (flags != AT_SYMLINK_NOFOLLOW) complain("a link may be followed");
    memset(st, 0, sizeof *st);
    st->st_mode = choose() & 1 ? S_IFLNK : S_IFREG;
    return REFUSE(0, ENOENT);
}

WRAP(int, fchmod, int fd, mode_t mode) {
    if (file_of(fd) == PLACE) complain("a mode for what is open as a place only");
    is_mode(mode);
    return REFUSE(0, EPERM);
}

WRAP(int, fchown, int fd, uid_t uid, gid_t gid) {
    if (file_of(fd) == PLACE) complain("an owner for what is open as a place only");
    is_owner(uid, gid);
    return REFUSE(0, EPERM);
}

WRAP(int, fchownat, int directory, const char *name, uid_t uid, gid_t gid, int flags) {
    is_entry(directory, name);
    is_owner(uid, gid);
    if (flags != AT_SYMLINK_NOFOLLOW) complain("a link may be followed");
    return REFUSE(0, EPERM);
}

WRAP(int, utimensat, int directory, const char *name, const struct timespec times[2], int flags) {
    is_entry(directory, name);
    are_times(times);
    if (flags != AT_SYMLINK_NOFOLLOW) complain("a link may be followed");
    return REFUSE(0, EPERM);
}

WRAP(int, futimens, int fd, const struct timespec times[2]) {
    if (file_of(fd) == PLACE) complain("times for what is open as a place only");
    are_times(times);
    return REFUSE(0, EPERM);
}

WRAP(int, fsetxattr, int fd, const char *name, const void *value, size_t size, int flags) {
    (void)flags;
    if (file_of(fd) == PLACE) complain("an attribute for what is open as a place only");
    if (!owned && strncmp(name, "user.", 5) != 0) complain("an attribute that is not to be given");
    for (size_t i = 0; i < size; i++) (void)!((const volatile char *)value)[i];
    return REFUSE(0, EOPNOTSUPP, ENOSPC);
}

/* --- Bytes -------------------------------------------------------------------------------------------------------- */

WRAP(ssize_t, read, int fd, void *data, size_t size) {
    if (!running) return __real_read(fd, data, size);
    if (fd != STDIN_FILENO) complain("something else than stdin is read");
    const uint8_t choice = choose();
    if (choice == 1) {
        errno = EINTR;
        return -1;
    }
    if (choice > 1 && size > choice * 16u) size = choice * 16u;
    if (size > script.size) size = script.size;
    memcpy(data, script.bytes, size);
    script.bytes += size;
    script.size -= size;
    return (ssize_t)size;
}

/* What tells that it failed. */
static void look_at_error(const unsigned char *record, size_t size) {
    const unsigned char *data;
    size_t length;
    uint32_t tag;
    int more;
    while ((more = next_field(&record, &size, &tag, &data, &length)) > 0) continue;
    if (more < 0) complain("the error is no record");
}

WRAP(ssize_t, write, int fd, const void *data, size_t size) {
    if (!running) return __real_write(fd, data, size);
    if (fd == STDERR_FILENO) {
        look_at_error(data, size);
        return (ssize_t)size;
    }
    if (file_of(fd) != REGULAR) complain("something else than a file is written");
    for (size_t i = 0; i < size; i++) (void)!((const volatile char *)data)[i];
    return REFUSE(0, ENOSPC) == 0 ? (ssize_t)size : -1;
}

int __real_fcntl(int fd, int command, ...);
int __wrap_fcntl(int fd, int command, ...);
int __wrap_fcntl(int fd, int command, ...) {
    va_list list;
    va_start(list, command);
    void *argument = va_arg(list, void *);
    va_end(list);
    return running ? 0 : __real_fcntl(fd, command, argument);
}

WRAP(ssize_t, getrandom, void *data, size_t size, unsigned flags) {
    if (!running) return __real_getrandom(data, size, flags);
    memset(data, 7, size);
    return (ssize_t)size;
}

unsigned __wrap_tar_checksum(const struct tar_header *header);
unsigned __wrap_tar_checksum(const struct tar_header *header) { return (unsigned)NUMBER(header->checksum); }

/* --- A run -------------------------------------------------------------------------------------------------------- */

void __real__exit(int status) __attribute__((noreturn));
void __wrap__exit(int status) __attribute__((noreturn));
void __wrap__exit(int status) {
    if (!running) __real__exit(status);
    longjmp(end_of_process, 1);
}

/* The state that the last run left becomes that of a new process. Only parent_of keeps a directory, as it always does:
 * it is brought to keep the root. */
static void reset(void) {
    const char *base;
    input_head = input_tail = extended_used = 0;
    open_directories.count = file_count = open_count = 0;
    script = (struct script){0}; /* every call succeeds */
    running = resetting = true;
    root = new_file(PLACE);
    draft_begin(root);
    draft_publish("name");
    parent_of("elsewhere/name", &base, false);
    parent_of("name", &base, false);
    running = resetting = false;
}

size_t unit_length(const uint8_t *bytes, size_t size) {
    (void)bytes;
    return size < BLOCK ? size : BLOCK;
}

size_t unit_repair(uint8_t *unit, size_t size) {
    if (size < BLOCK) memset(unit + size, 0, BLOCK - size);
    return BLOCK;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    reset();
    script_read(data, size);
    owned = choose() & 1;
    running = true;
    if (setjmp(end_of_process) == 0) untar(target, owned);
    running = false;
    return 0;
}

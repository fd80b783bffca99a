#define _GNU_SOURCE
#include "builtins.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "function.h"
#include "provision.h"
#include "share.h"
#include "tar.h"

/* --- Arguments ------------------------------------------------------------------------------------------------------ */

static const char *argument(char ***args) {
    if (**args == NULL) fail_because(EINVAL, NULL, "an argument is missing");
    return *(*args)++;
}

/* Whether the next argument is this word, which is then taken. */
static bool word(char ***args, const char *expected) {
    if (**args == NULL || strcmp(**args, expected) != 0) return false;
    ++*args;
    return true;
}

static void no_more(char ***args) {
    if (**args != NULL) fail_because(EINVAL, **args, "this argument makes no sense here");
}

static unsigned long long number(const char *text, int base, unsigned long long limit) {
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, base);
    if (errno != 0 || *text < '0' || *text > '9' || *end != 0 || value > limit)
        fail_because(EINVAL, text, "it is not a number that can be here");
    return value;
}

static mode_t mode_argument(char ***args) { return (mode_t)number(argument(args), 8, 07777); }

/* --- Files ---------------------------------------------------------------------------------------------------------- */

static void run_read(char **args) {
    const char *path = argument(&args);
    const uint64_t offset = *args != NULL ? number(argument(&args), 10, INT64_MAX) : 0;
    uint64_t left = *args != NULL ? number(argument(&args), 10, INT64_MAX) : UINT64_MAX;
    no_more(&args);
    struct stat st;
    int fd = open(path, O_RDONLY | O_NOCTTY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st) != 0) fail(path);
    if (S_ISDIR(st.st_mode)) fail_because(EISDIR, path, strerror(EISDIR));
    if (offset > 0 && lseek(fd, (off_t)offset, SEEK_SET) < 0) fail(path);
    while (left > 0) {
        size_t room;
        unsigned char *place = put_room(&room);
        ssize_t n = read_some(fd, place, room < left ? room : (size_t)left);
        if (n < 0) fail(path);
        if (n == 0) break;
        put_placed((size_t)n);
        put_flush(); /* what comes slowly is passed on as it comes */
        left -= (uint64_t)n;
    }
}

static void run_write(char **args) {
    const char *path = argument(&args);
    const mode_t mode = mode_argument(&args);
    const int how = word(&args, "append") ? O_APPEND : O_TRUNC;
    no_more(&args);
    int fd = open(path, O_WRONLY | O_CREAT | O_NOCTTY | O_CLOEXEC | how, mode);
    if (fd < 0) fail(path);
    copy_stdin(fd, path);
    if (close(fd) != 0) fail(path);
}

static void put_stat(const struct stat *st) {
    unsigned char data[40];
    int64_t mtime;
    if (__builtin_mul_overflow(st->st_mtim.tv_sec, INT64_C(1000000000), &mtime) ||
        __builtin_add_overflow(mtime, st->st_mtim.tv_nsec, &mtime))
        mtime = st->st_mtim.tv_sec < 0 ? INT64_MIN : INT64_MAX;
    put32(data, st->st_mode);
    put32(data + 4, st->st_uid);
    put32(data + 8, st->st_gid);
    put32(data + 12, (uint32_t)st->st_nlink);
    put64(data + 16, (uint64_t)st->st_size);
    put64(data + 24, (uint64_t)mtime);
    put32(data + 32, major(st->st_rdev));
    put32(data + 36, minor(st->st_rdev));
    put_field(TAG_STAT, data, sizeof data);
}

/* Puts what there is to say of a file: NAME unless that is NULL, STAT and, of a link, TARGET. Returns -1 with errno, and
 * nothing has been put. */
static int describe(int directory, const char *path, int flags, const char *name) {
    struct stat st;
    char target[MAX_PATH + 1];
    ssize_t length = 0;
    if (fstatat(directory, path, &st, flags | AT_NO_AUTOMOUNT) != 0) return -1;
    if (S_ISLNK(st.st_mode) && (length = readlinkat(directory, path, target, sizeof target)) < 0) return -1;
    if (name != NULL) put_field(TAG_NAME, name, strlen(name));
    put_stat(&st);
    if (S_ISLNK(st.st_mode)) put_field(TAG_TARGET, target, (size_t)length);
    return 0;
}

static void run_stat(char **args) {
    const char *path = argument(&args);
    const int flags = word(&args, "nofollow") ? AT_SYMLINK_NOFOLLOW : 0;
    no_more(&args);
    if (describe(AT_FDCWD, path, flags, NULL) != 0) fail(path);
}

static bool is_dots(const char *name) { return strcmp(name, ".") == 0 || strcmp(name, "..") == 0; }

static void run_list(char **args) {
    const char *path = argument(&args);
    no_more(&args);
    DIR *list = opendir(path);
    if (list == NULL) fail(path);
    const struct dirent *entry;
    while (errno = 0, (entry = readdir(list)) != NULL) {
        if (is_dots(entry->d_name)) continue;
        /* ENOENT: it has just gone. EINVAL: it is no link any more */
        if (describe(dirfd(list), entry->d_name, AT_SYMLINK_NOFOLLOW, entry->d_name) != 0 && errno != ENOENT &&
            errno != EINVAL)
            fail(entry->d_name);
    }
    if (errno != 0) fail(path);
}

/* --- Trees ---------------------------------------------------------------------------------------------------------- */

/* Makes the directories that lead to `path`. */
static void make_parents(const char *path) {
    char parent[MAX_PATH + 1];
    if (strlen(path) > MAX_PATH) fail_because(ENAMETOOLONG, path, strerror(ENAMETOOLONG));
    for (const char *p = path + strspn(path, "/");; p += strspn(p, "/")) {
        p += strcspn(p, "/");
        if (p[strspn(p, "/")] == 0) return; /* this is the path itself */
        memcpy(parent, path, (size_t)(p - path));
        parent[p - path] = 0;
        if (mkdir(parent, 0755) != 0 && errno != EEXIST) fail(parent);
    }
}

static void run_mkdir(char **args) {
    const char *path = argument(&args);
    const mode_t mode = mode_argument(&args);
    const bool parents = word(&args, "parents");
    struct stat st;
    no_more(&args);
    if (parents) make_parents(path);
    if (mkdir(path, mode) != 0) {
        const int error = errno;
        if (parents && error == EEXIST && stat(path, &st) == 0 && S_ISDIR(st.st_mode)) return;
        fail_because(error, path, strerror(error));
    }
    if ((mode & (S_ISUID | S_ISGID)) == 0) return;
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC); /* mkdir takes no such bits */
    if (fd < 0 || fchmod(fd, mode) != 0) fail(path);
}

/* Removes a file, a link or an empty directory, or sees that it is gone. Returns false for a directory that is not
 * empty; one that something is mounted on is not to be removed at all (EBUSY). */
static bool remove_one(int parent, const char *name, const char *what) {
    if (unlinkat(parent, name, 0) == 0) return true;
    if (errno == EISDIR && unlinkat(parent, name, AT_REMOVEDIR) == 0) return true;
    if (errno == ENOTEMPTY || errno == EEXIST) return false;
    if (errno != ENOENT) fail(what);
    return true;
}

struct level {
    int parent;
    const char *name; /* in the parent's list, which does not move on before the directory is gone */
    DIR *list;
};

static struct level open_level(int parent, const char *name) {
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    DIR *list = fd >= 0 ? fdopendir(fd) : NULL;
    if (list == NULL) fail(name);
    return (struct level){.parent = parent, .name = name, .list = list};
}

/* Removes a directory with its contents. Each directory on its way down is open: so it cannot be led elsewhere. */
static void remove_tree(int parent, const char *name) {
    static struct level levels[MAX_LEVELS];
    int depth = 0;
    allow_open_files();
    levels[0] = open_level(parent, name);
    while (depth >= 0) {
        const struct level *at = &levels[depth];
        errno = 0;
        const struct dirent *entry = readdir(at->list);
        if (entry == NULL) {
            if (errno != 0 && errno != ENOENT) fail(at->name); /* ENOENT: it has just been removed */
            closedir(at->list);
            if (!remove_one(at->parent, at->name, at->name)) fail(at->name);
            depth--;
        } else if (!is_dots(entry->d_name) && !remove_one(dirfd(at->list), entry->d_name, entry->d_name)) {
            if (++depth == MAX_LEVELS) fail_because(ELOOP, entry->d_name, "the tree is too deep");
            levels[depth] = open_level(dirfd(at->list), entry->d_name);
        }
    }
}

static void run_remove(char **args) {
    const char *path = argument(&args);
    const bool recursive = word(&args, "recursive"), missing = word(&args, "missing");
    char parent[MAX_PATH + 1];
    struct stat st;
    no_more(&args);
    size_t length = strlen(path);
    while (length > 0 && path[length - 1] == '/') length--;
    if (length > MAX_PATH) fail_because(ENAMETOOLONG, path, strerror(ENAMETOOLONG));
    memcpy(parent, path, length);
    parent[length] = 0;
    char *slash = strrchr(parent, '/');
    char *name = slash != NULL ? slash + 1 : parent;
    if (*name == 0 || is_dots(name)) fail_because(EINVAL, path, "it has no name by which it could be removed");
    if (slash != NULL) *slash = 0;
    int fd = open(slash == NULL ? "." : slash == parent ? "/" : parent, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || fstatat(fd, name, &st, AT_SYMLINK_NOFOLLOW) != 0) {
        if (missing && errno == ENOENT) return;
        fail(path);
    }
    if (remove_one(fd, name, path)) return;
    if (!recursive) fail_because(ENOTEMPTY, path, strerror(ENOTEMPTY));
    remove_tree(fd, name);
}

static void run_tar(char **args) {
    const char *path = argument(&args);
    no_more(&args);
    tar(path);
}

static void run_untar(char **args) {
    const char *directory = argument(&args);
    const bool owners = word(&args, "owners");
    no_more(&args);
    untar(directory, owners);
}

/* --- What a guest is given ------------------------------------------------------------------------------------------ */

static void run_secret(char **args) {
    const char *name = argument(&args), *user = argument(&args);
    no_more(&args);
    give_secret(name, user);
}

static void run_ca_certs(char **args) {
    no_more(&args);
    trust_certificates();
}

static void run_clock(char **args) {
    const char *text = argument(&args);
    no_more(&args);
    const uint64_t nanoseconds = number(text, 10, INT64_MAX);
    set_clock(nanoseconds);
}

static void run_share(char **args) {
    const char *target = argument(&args);
    const bool read_only = word(&args, "ro");
    no_more(&args);
    serve_share(target, read_only);
}

int builtin_run(char **argv) {
    static const struct {
        const char *name;
        void (*run)(char **args);
    } functions[] = {
        {"read", run_read},
        {"write", run_write},
        {"list", run_list},
        {"stat", run_stat},
        {"mkdir", run_mkdir},
        {"remove", run_remove},
        {"tar", run_tar},
        {"untar", run_untar},
        {"secret", run_secret},
        {"ca-certs", run_ca_certs},
        {"clock", run_clock},
        {"share", run_share},
    };
    umask(0); /* modes are exact */
    for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
        if (argv[0] == NULL || strcmp(argv[0], functions[i].name) != 0) continue;
        function_name = functions[i].name;
        functions[i].run(argv + 1);
        put_flush();
        return 0;
    }
    fail_because(EINVAL, argv[0], "the agent has no such function");
}

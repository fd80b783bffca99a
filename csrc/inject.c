#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "inject.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#ifdef __linux__
#include <linux/fs.h>
#include <linux/openat2.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#define MTIME(st) ((st).st_mtim)
#else
#include <copyfile.h>
#include <sys/clonefile.h>
#include <sys/random.h>
#define MTIME(st) ((st).st_mtimespec)
#endif

enum { PATH_BYTES = 4096, NAME_BYTES = 256 };

/* Opens the directory `name` in `parent`; -1 with errno. A symlink is ELOOP. */
static int open_child(int parent, const char *name) {
    int fd = openat(parent, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC), error = errno;
    struct stat st;
    if (fd < 0 && error == ENOTDIR && fstatat(parent, name, &st, AT_SYMLINK_NOFOLLOW) == 0 && S_ISLNK(st.st_mode))
        error = ELOOP; /* Linux says ENOTDIR of a link when both flags are given */
    errno = error;
    return fd;
}

/* Opens the directory `path` below `root`, each piece of it with `step`, so that no symlink is followed. */
static int walk(int root, char *path, int (*step)(int, const char *)) {
    int fd = fcntl(root, F_DUPFD_CLOEXEC, 0);
    while (fd >= 0) {
        char *slash = strchr(path, '/');
        if (slash != NULL) *slash = 0;
        int child = step(fd, path), error = errno;
        close(fd);
        errno = error;
        fd = child;
        if (slash == NULL) break;
        *slash = '/';
        path = slash + 1;
    }
    return fd;
}

/* --- copy_into ---------------------------------------------------------------------------------------------------- */

/* As open_child, but the directory is made if it is missing. */
static int open_or_make_child(int parent, const char *name) {
    bool made = mkdirat(parent, name, 0755) == 0;
    if (!made && errno != EEXIST) return -1;
    int fd = open_child(parent, name);
    if (fd >= 0 && made) fchmod(fd, 0755); /* whatever this process's umask is: the guest's users go through it */
    return fd;
}

/* The directory that holds the last component of `path`, with all above it made; `path` is cut at its last slash. */
static int open_parent(int root, char *path, const char **name) {
    char *slash = strrchr(path, '/');
    if (slash == NULL) {
        *name = path;
        return fcntl(root, F_DUPFD_CLOEXEC, 0);
    }
    *slash = 0;
    *name = slash + 1;
#ifdef __linux__
    /* One call when all directories are there, which is the usual case. Whatever it refuses, the walk explains. */
    struct open_how how = {.flags = O_RDONLY | O_DIRECTORY | O_CLOEXEC,
                           .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS};
    long whole = syscall(SYS_openat2, root, path, &how, sizeof how);
    if (whole >= 0) return (int)whole;
#endif
    return walk(root, path, open_or_make_child);
}

/* Every component is a plain name: no "", "." or "..". */
static bool is_plain(const char *path) {
    for (;;) {
        size_t length = strcspn(path, "/");
        if (length == 0 || length >= NAME_BYTES || (path[0] == '.' && (length == 1 || (length == 2 && path[1] == '.'))))
            return false;
        if (path[length] == 0) return true;
        path += length + 1;
    }
}

static int copy_loop(int from, int to) {
    char buffer[65536];
    ssize_t n;
    while ((n = read(from, buffer, sizeof buffer)) != 0) {
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return -errno;
        for (ssize_t done = 0; done < n;) {
            ssize_t written = write(to, buffer + done, (size_t)(n - done));
            if (written < 0 && errno == EINTR) continue;
            if (written < 0) return -errno;
            done += written;
        }
    }
    return 0;
}

static int copy_content(int from, int to) {
#ifdef __linux__
    if (ioctl(to, FICLONE, from) == 0) return 0;
    ssize_t n;
    while ((n = copy_file_range(from, NULL, to, NULL, 1 << 30, 0)) > 0) continue;
    if (n < 0 && (errno == ENOSPC || errno == EDQUOT || errno == EIO)) return -errno;
    return copy_loop(from, to); /* what is left: all of it where the kernel cannot, nothing where it has */
#else
    if (fcopyfile(from, to, NULL, COPYFILE_DATA) == 0) return 0;
    if (errno != ENOTSUP) return -errno;
    return copy_loop(from, to);
#endif
}

static bool not_older(struct timespec a, struct timespec b) {
    return a.tv_sec != b.tv_sec ? a.tv_sec > b.tv_sec : a.tv_nsec >= b.tv_nsec;
}

/* Makes a new file of a name that nobody can have guessed. */
static int make_temporary(int parent, char name[NAME_BYTES]) {
    for (int tries = 0; tries < 16; tries++) {
        uint64_t random;
        if (getentropy(&random, sizeof random) != 0) return -1;
        snprintf(name, NAME_BYTES, ".vmette-%016llx", (unsigned long long)random);
        int fd = openat(parent, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
        if (fd >= 0 || errno != EEXIST) return fd;
    }
    return -1;
}

static int replace(int parent, const char *name, int from, const struct stat *source, unsigned mode) {
    char temporary[NAME_BYTES];
    int to = make_temporary(parent, temporary);
    if (to < 0) return -errno;
    struct timespec times[2] = {MTIME(*source), MTIME(*source)};
    int result = copy_content(from, to);
    if (result == 0 && (fchmod(to, mode & 07777) != 0 || futimens(to, times) != 0 || fsync(to) != 0)) result = -errno;
    if (close(to) != 0 && result == 0) result = -errno;
    if (result == 0 && renameat(parent, temporary, parent, name) != 0) result = -errno;
    if (result != 0) unlinkat(parent, temporary, 0);
    return result;
}

int vmette_copy_into(const char *root, const char *relative, const char *source, unsigned mode) {
    char path[PATH_BYTES];
    const char *name;
    struct stat have, want;
    if (strlen(relative) >= sizeof path || !is_plain(relative)) return -EINVAL;
    memcpy(path, relative, strlen(relative) + 1);
    int result = 0, parent = -1, from = -1;
    int top = open(root, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (top < 0 || (from = open(source, O_RDONLY | O_CLOEXEC | O_NONBLOCK)) < 0 || /* a FIFO must not hold us */
        fstat(from, &want) != 0)
        result = -errno;
    else if (!S_ISREG(want.st_mode))
        result = -EINVAL;
    else if ((parent = open_parent(top, path, &name)) < 0)
        result = -errno;
    else if (fstatat(parent, name, &have, AT_SYMLINK_NOFOLLOW) == 0 && S_ISREG(have.st_mode) &&
             have.st_size == want.st_size && not_older(MTIME(have), MTIME(want)))
        result = 0;
    else if ((result = replace(parent, name, from, &want, mode)) == 0)
        result = 1;
    if (parent >= 0) close(parent);
    if (from >= 0) close(from);
    if (top >= 0) close(top);
    return result;
}

/* --- stat_tree ---------------------------------------------------------------------------------------------------- */

/* Directories still to be read, as paths below the root. A queue instead of recursion: a deep tree costs memory, not
 * the stack, and at most two descriptors are open. */
struct pending {
    char **paths;
    size_t count, room;
};

static int push(struct pending *p, const char *parent, const char *name) {
    if (p->count == p->room) {
        size_t room = p->room ? 2 * p->room : 64;
        char **grown = realloc(p->paths, room * sizeof *grown);
        if (grown == NULL) return -ENOMEM;
        p->paths = grown;
        p->room = room;
    }
    size_t size = strlen(parent) + strlen(name) + 2;
    char *path = malloc(size);
    if (path == NULL) return -ENOMEM;
    if (*parent)
        snprintf(path, size, "%s/%s", parent, name);
    else
        snprintf(path, size, "%s", name);
    p->paths[p->count++] = path;
    return 0;
}

/* A tree can hold times and sizes (of sparse files) beyond what their sums can: those stay at the limit. */
static void note(struct vmette_tree *t, const struct stat *st) {
    int64_t mtime;
    if (__builtin_mul_overflow((int64_t)MTIME(*st).tv_sec, (int64_t)1000000000, &mtime) ||
        __builtin_add_overflow(mtime, (int64_t)MTIME(*st).tv_nsec, &mtime))
        mtime = MTIME(*st).tv_sec < 0 ? INT64_MIN : INT64_MAX;
    if (mtime > t->newest) t->newest = mtime;
    if (S_ISREG(st->st_mode) && __builtin_add_overflow(t->bytes, (uint64_t)st->st_size, &t->bytes))
        t->bytes = UINT64_MAX;
}

/* Opens the directory root/path, as long as it may be; a symlink on the way is an error. */
static int open_below(int root, char *path) {
    int fd = fcntl(root, F_DUPFD_CLOEXEC, 0);
    while (fd >= 0 && *path) {
        size_t length = strlen(path);
        char *cut = NULL;
        if (length >= PATH_BYTES) {
            cut = path + PATH_BYTES - 1;
            while (*cut != '/') cut--;
            *cut = 0;
        }
#ifdef __linux__
        struct open_how how = {.flags = O_RDONLY | O_DIRECTORY | O_CLOEXEC | O_NOFOLLOW,
                               .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS};
        int next = (int)syscall(SYS_openat2, fd, path, &how, sizeof how);
        if (next < 0 && (errno == ENOSYS || errno == EPERM)) next = walk(fd, path, open_child);
#else
        int next = openat(fd, path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW_ANY | O_CLOEXEC);
#endif
        int error = errno;
        close(fd);
        errno = error;
        fd = next;
        if (cut == NULL) break;
        *cut = '/';
        path = cut + 1;
    }
    return fd;
}

static int read_directory(int root, char *path, struct pending *pending, struct vmette_tree *t) {
    int fd = open_below(root, path);
    if (fd < 0 && (errno == ENOENT || errno == ENOTDIR || errno == ELOOP)) return 0; /* no directory any more */
    if (fd < 0) return -errno;
    DIR *directory = fdopendir(fd);
    if (directory == NULL) {
        int error = errno;
        close(fd);
        return -error;
    }
    int result = 0;
    struct dirent *entry;
    while (result == 0 && (errno = 0, entry = readdir(directory)) != NULL) {
        struct stat st;
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0) continue;
        if (fstatat(fd, entry->d_name, &st, AT_SYMLINK_NOFOLLOW) != 0) {
            if (errno == ENOENT) continue; /* it has just been removed */
            result = -errno;
            break;
        }
        t->entries++;
        note(t, &st);
        if (S_ISDIR(st.st_mode)) result = push(pending, path, entry->d_name);
    }
    if (entry == NULL && errno != 0) result = -errno;
    closedir(directory);
    return result;
}

int vmette_stat_tree(const char *root, struct vmette_tree *result) {
    struct pending pending = {0};
    struct stat st;
    memset(result, 0, sizeof *result);
    int top = open(root, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (top < 0) return -errno;
    if (fstat(top, &st) != 0) {
        int error = errno;
        close(top);
        return -error;
    }
    result->newest = INT64_MIN;
    note(result, &st);
    int error = push(&pending, "", "");
    while (error == 0 && pending.count > 0) {
        char *path = pending.paths[--pending.count];
        error = read_directory(top, path, &pending, result);
        free(path);
    }
    while (pending.count > 0) free(pending.paths[--pending.count]);
    free(pending.paths);
    close(top);
    return error;
}

#define _GNU_SOURCE
#include "beneath.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <linux/openat2.h>

#include "function.h"

/* Opens the directory `name` of `directory`, which may be made first. */
static int step(int directory, const char *name, bool make) {
    const int flags = O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC;
    struct stat st;
    int fd = openat(directory, name, flags);
    if (fd < 0 && errno == ENOENT && make) {
        if (mkdirat(directory, name, 0755) != 0 && errno != EEXIST) return -1;
        fd = openat(directory, name, flags);
    }
    if (fd >= 0 || errno != ENOTDIR) return fd;
    const bool link = fstatat(directory, name, &st, AT_SYMLINK_NOFOLLOW) == 0 && S_ISLNK(st.st_mode);
    errno = link ? ELOOP : ENOTDIR;
    return -1;
}

/* One component after the other. */
static int walk(int root, const char *path, int flags, bool make) {
    int at = openat(root, ".", O_PATH | O_DIRECTORY | O_CLOEXEC);
    while (at >= 0 && *path != 0) {
        char name[MAX_NAME + 1];
        size_t length = strcspn(path, "/");
        int next = -1;
        if (length > MAX_NAME) {
            errno = ENAMETOOLONG;
        } else {
            memcpy(name, path, length);
            name[length] = 0;
            next = step(at, name, make);
        }
        int error = errno;
        close(at);
        errno = error;
        at = next;
        path += length;
        path += strspn(path, "/");
    }
    if (at < 0) return -1;
    int fd = openat(at, ".", flags | O_DIRECTORY | O_CLOEXEC), error = errno;
    close(at);
    errno = error;
    return fd;
}

int open_beneath(int root, const char *path, int flags, bool make) {
    const struct open_how how = {.flags = (uint64_t)(flags | O_DIRECTORY | O_CLOEXEC),
                                 .resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS};
    int fd = (int)syscall(SYS_openat2, root, *path != 0 ? path : ".", &how, sizeof how);
    if (fd >= 0 || !(errno == ENOSYS || (errno == ENOENT && make))) return fd;
    return walk(root, path, flags, make);
}
